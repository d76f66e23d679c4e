//! The hardware lane: the real `vmm` on a KVM with hardware virtualisation, wherever QEMU's TCG runs.
//!
//! Hosts whose KVM emulates supervisor code cannot boot a stock kernel, and say nothing about how Tern behaves on a user's machine.
//! QEMU's TCG emulates AMD's SVM; a Debian kernel that runs in it (the first level) has a real `kvm_amd`, and `vmm` runs there as on
//! hardware, with guests of its own (the second level): pagestorm, and Debian's unmodified cloud and generic kernels.
//!
//! ```text
//! cargo run --bin lane                                   outside: fetches the packages, builds an initramfs for each part, starts QEMUs, reads verdicts
//!   qemu-system-x86_64 -accel tcg -smp 1                 a first level for each part, side by side: Debian's cloud kernel, guest-images/lane/init
//!     lane inside boots                                  the stories, on the harness of the end-to-end tests (crate::real)
//!       vmm run …, vmm receive …                         second level: pagestorm, and the generic kernel (an ELF file, by PVH) with 4.5 GiB
//!     lane inside moves
//!       vmm run …, vmm receive …, vmm restore …          second level: the cloud kernel as its package has it (a bzImage), at work
//! ```
//!
//! Every step prints one [`verdict::Verdict`] on its first level's serial console. The guests judge themselves: their workloads, their clocks, and
//! their kernels' logs from the first line on, in which every warning that is not known for the emulator's (dmesg.rs) is a failure.
//! It is slow, so it is for correctness, never for figures.
//!
//! Under TCG a virtual CPU now and then sleeps for ever, with no migration near. QEMU's VMRUN does not load the interrupt shadow that a VM exit
//! has saved in the VMCB (target/i386/tcg, svm_helper.c), so that after an exit between `sti` and `hlt` a pending timer interrupt is delivered before
//! the `hlt` instead of ending it. A pagestorm that froze after 130,000 halts was looked at: halted behind the `hlt`, in RAX what its timer's
//! handler leaves there, nothing requested or in service in its APIC, the timer expired. Linux halts in the same way. About one first
//! level in forty freezes as a whole, too. So every wait has a bound, and a part in which something did not come in time is tried once
//! more, having been printed. Whatever else fails, fails at once.

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
