//! A kernel's file: is taken or is refused. As bytes alone seldom begin as a kernel does, they are tried with its magic numbers too.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::boot::check_kernel;
use vmm::config::BootProtocol;

/// Bytes, and where in the file they stand.
type Patch = &'static [(usize, &'static [u8])];

/// No magic numbers, an ELF kernel's, and a bzImage's.
const NONE: Patch = &[];
const ELF: Patch = &[(0, b"\x7fELF\x02\x01"), (18, &[62, 0]), (54, &[56, 0])];
const BZIMAGE: Patch = &[(0x1fe, &[0x55, 0xaa]), (0x202, b"HdrS\x0f\x02"), (0x211, &[1]), (0x236, &[1, 0])];

fuzz_target!(|file: &[u8]| {
    for magic in [NONE, ELF, BZIMAGE] {
        let mut file = file.to_vec();
        for (at, bytes) in magic {
            if let Some(place) = file.get_mut(*at..at + bytes.len()) {
                place.copy_from_slice(bytes);
            }
        }
        for protocol in [BootProtocol::Auto, BootProtocol::Pvh, BootProtocol::Linux64] {
            // Either is right; what is looked for is a panic or memory without bound.
            let _ = check_kernel(&file, protocol);
        }
    }
});
