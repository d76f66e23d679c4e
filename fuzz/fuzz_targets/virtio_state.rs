//! A virtio device's saved state: is read, and then written as it was, or is refused.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::devices::virtio::state::VirtioState;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(state) = VirtioState::decode(bytes) {
        let again = VirtioState::decode(&state.encode());
        assert_eq!(again, Ok(state));
    }
});
