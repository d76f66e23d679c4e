//! `tern demo`: two sites on loopback, a VM that moves between them over a shaped link, and a report.
//!
//! [`content`] makes the memory, [`bound`] the yardstick, [`link`] and [`shaper`] the WAN.

pub(crate) mod bound;
pub(crate) mod content;
pub(crate) mod link;
pub(crate) mod shaper;
