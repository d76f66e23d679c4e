//! What pagestorm does, apart from the machine it runs on: the same source is compiled into the guest (no_std) and
//! into this library, where it is tested and where a host can check a dump of a guest's memory with it.
//!
//! Forward through the files: [`options`] (command line) → [`layout`] (working set) → [`engine`] (what is due in a
//! turn) → [`pace`] (when, and which page) → [`storm`] (write and check a page) → [`content`] and [`rewrite`] (its
//! bytes) → [`counters`] (what the check trusts) → [`report`] and [`console`] (what the serial port says).
//!
//! No dependency and no derive from outside `core`: the guest is compiled by `rustc` alone. Hence the hand-written
//! `Display` of the error types.

pub mod console;
pub mod content;
pub mod counters;
pub mod engine;
pub mod layout;
pub mod limits;
pub mod mix;
pub mod options;
pub mod pace;
pub mod report;
pub mod rewrite;
pub mod storm;
