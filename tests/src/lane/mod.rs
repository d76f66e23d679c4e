//! The hardware lane: the real `vmm` on a KVM with hardware virtualisation, wherever QEMU's TCG runs.
//!
//! Hosts whose KVM emulates supervisor code cannot boot a stock kernel, and say nothing about how Tern behaves on a user's machine.
//! QEMU's TCG emulates AMD's SVM; a Debian kernel that runs in it (the first level) has a real `kvm_amd`, and `vmm` runs there as on
//! hardware, with guests of its own (the second level): pagestorm, and Debian's unmodified cloud and generic kernels.
//!
//! ```text
//! cargo run --bin lane                                   outside: fetches the packages, builds an initramfs, starts QEMU, reads verdicts
//!   qemu-system-x86_64 -accel tcg                        first level: Debian's cloud kernel, guest-images/lane/init
//!     lane inside                                        the stories, on the harness of the end-to-end tests (crate::real)
//!       vmm run …, vmm receive …                         second level: the guests
//! ```
//!
//! Every step prints one [`verdict::Verdict`] on the first level's serial console. It is slow, so it is for correctness, never for figures.
//! Under TCG a CPU that halts is now and then not woken by its timer (seen with no migration near, and with bare-metal guests too): about
//! one first level in forty freezes, and a guest of the second level sometimes does. So every wait has a bound, and the command tries
//! once more after whatever failure, having printed it.

mod archive;
mod debian;
mod dmesg;
pub mod inputs;
pub mod inside;
pub mod limits;
pub mod outside;
mod packages;
mod unpack;
pub mod verdict;
