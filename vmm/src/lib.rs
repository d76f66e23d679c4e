//! The KVM monitor: one process a VM.
//!
//! [`machine`] assembles a VM from [`kvm`], [`boot`], [`memory`] and [`devices`], runs it and pauses it; [`control`] is the
//! socket that operators talk to; [`migrate`] drives the pure protocol core over a real connection.

pub mod boot;
pub mod config;
pub mod control;
pub mod devices;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod migrate;
