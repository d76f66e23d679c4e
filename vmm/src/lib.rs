//! The KVM monitor: one process a VM.
//!
//! [`machine`] assembles a VM from [`kvm`], [`boot`], [`memory`] and [`devices`], runs it and pauses it; [`control`] is the
//! socket that operators talk to; [`migrate`] drives the pure protocol core over a real connection; [`process`] is the life of
//! one process around them, and [`cli`] its command line. [`snapshot`] writes a VM into a directory and makes a VM of it.

pub mod boot;
pub mod cli;
pub mod config;
pub mod control;
pub mod devices;
mod file_size;
pub mod kvm;
pub mod limits;
pub mod machine;
pub mod memory;
pub mod migrate;
pub mod process;
pub mod snapshot;
pub mod spill;
