//! A lab of real processes: `vmm` and `dht` as users start them, real guests on /dev/kvm, and a WAN link in between that can be cut.
//!
//! `cargo test -p tern-tests --test kvm_migrate` runs one story. The binaries come from the build that the test itself is of
//! ([`binaries`]). A [`Lab`] holds one test's hosts, logs and sockets in a directory of its own, [`Vm`] is a vmm process with its
//! control socket and its guest's serial port, [`Peer`] a dht process, [`Wan`] the link. Whatever is waited for has a deadline
//! ([`limits`]) and is asked for again and again until then; nothing sleeps for effect. Processes are killed when their
//! handles are dropped, and the logs of a test that fails are printed with it.
#![expect(
    clippy::missing_panics_doc,
    reason = "a harness of tests: every function panics with what was expected and did not come"
)]

pub mod binaries;
mod booted;
mod journey;
pub mod lab;
pub mod limits;
mod linux;
mod net;
mod peer;
mod process;
mod verdict;
mod vm;
mod wan;

pub use booted::{Booted, copy};
pub use journey::{Journey, Terms};
pub use lab::{Host, Lab, Said, finish, run};
pub use linux::{Links, LinuxGuest, LinuxVm};
pub use net::{Counter, Net};
pub use peer::{Fault, Peer, Site};
pub use process::{Process, TIMED_OUT, timed_out, until};
pub use tern::demo::shaper::Cut;
pub(crate) use verdict::LATE;
pub use verdict::{Verdict, Workload};
pub use vm::{Guest, Load, Vm};
pub use wan::Wan;
