//! A CPU baseline file: is read, and comes back as it was, or is refused.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::kvm::cpu::CpuModel;

fuzz_target!(|text: &[u8]| {
    if let Ok(model) = CpuModel::parse(text) {
        let again = CpuModel::parse(model.to_json().expect("strings can be written").as_bytes());
        assert_eq!(again.expect("what is written is read"), model);
    }
});
