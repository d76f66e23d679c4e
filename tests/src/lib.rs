//! Deterministic simulation of migrations, end-to-end tests on real KVM, and checks of the house rules.
//!
//! The simulation ([`world::run`]) drives the real protocol core, encoders and decoders with a model VM (`guest`; at the destination `arrived`), a model site
//! (`site`) and a model link (`net`) through faults (`faults`), and looks at every step (`check`). One seed is one run; `sim` runs
//! any number of them.
//!
//! [`site_sim`] simulates sites of up to 10,000 hosts with the index code of `dht`.
//!
//! The end-to-end tests (`kvm_*`) play in [`real`]: real processes and real guests. [`lane`] brings the same harness to a KVM with
//! hardware virtualisation, which QEMU emulates.

mod arrived;
mod check;
mod destination_host;
mod faults;
mod guest;
pub mod lane;
pub mod mutation;
mod net;
mod operator;
mod palette;
pub mod real;
mod rng;
mod site;
pub mod site_sim;
mod source_host;
mod spill_host;
mod versions;
pub mod world;
