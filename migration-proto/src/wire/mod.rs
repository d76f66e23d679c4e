//! The wire: messages, and their bytes.
//!
//! A message is one frame: a kind (1 byte) and its fields in order, as `codec` writes them. The driver puts a 4-byte
//! little-endian length before each frame and refuses a length above [`crate::limits::FRAME_BYTES`]. docs/wire.md has the
//! layout of each message in prose.
#![deny(clippy::indexing_slicing)]

mod codec;
mod fields;
mod held;
mod message;
mod offer;
mod probe;

pub use codec::{Reader, WireError, Writer};
pub use message::{Channel, Message, Offer, Region, decode, encode};
pub use probe::Probe;
