//! The local socket: how the processes of a host talk to their peer.
//!
//! A connection carries one operation at a time: the client sends its handshake and a request, the peer answers its own
//! handshake and then the request's answers up to the last one. Whoever wants several at once opens several
//! connections; on a Unix socket that costs less than keeping requests apart on one. Closing the connection cancels
//! what runs on it, and ends the registration that was made on it.

pub mod client;
pub mod error;
pub mod protocol;
mod question;
#[cfg(feature = "node")]
pub(crate) mod server;
#[cfg(feature = "node")]
mod socket;
