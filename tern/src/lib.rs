//! The demo, and the WAN link that it shares with the tests.

pub mod demo;
mod limits;
