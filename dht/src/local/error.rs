//! Why an operation on the local socket failed.

use std::{io, path::PathBuf};

use page::{DomainId, ShortId};
use thiserror::Error;

use super::protocol::{FailureCode, PROTOCOL_VERSION};
pub use crate::codec::CodecError;
use crate::limits::SOCKET_PATH_BYTES;

/// Errors of [`SiteClient`](crate::SiteClient).
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SiteError {
    /// Nobody listens on the socket.
    #[error("cannot connect to the site's peer at {}; is `dht serve` running there?", socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The socket's path is longer than the kernel takes.
    #[error(
        "the socket's path {} has {length} bytes, and a Unix socket's has {SOCKET_PATH_BYTES} bytes at most", socket.display()
    )]
    SocketPathTooLong {
        /// The socket.
        socket: PathBuf,
        /// The path's bytes.
        length: usize,
    },
    /// The connection broke.
    #[error("the connection to the site's peer broke")]
    Io(#[from] io::Error),
    /// The peer closed the connection before its answer was complete.
    #[error("the site's peer closed the connection before it answered")]
    Closed,
    /// The peer did not answer in time.
    #[error("the site's peer did not answer within {seconds} s")]
    Timeout {
        /// The limit.
        seconds: u64,
    },
    /// The peer speaks another version.
    #[error(
        "the site's peer speaks version {theirs} of the local protocol, this build speaks {PROTOCOL_VERSION}: update the older one"
    )]
    Version {
        /// The peer's version.
        theirs: u16,
    },
    /// The peer sent something that is not an answer.
    #[error("the site's peer sent a malformed frame")]
    Malformed(#[from] CodecError),
    /// The peer sent an answer that belongs to another request.
    #[error("the site's peer sent an answer that does not belong to the request ({got})")]
    Unexpected {
        /// What it sent.
        got: &'static str,
    },
    /// The peer gave a page, or said that one is missing, that it was not asked for.
    #[error("the site's peer answered for {id:?}, which it was not asked for")]
    Unasked {
        /// The page's id.
        id: ShortId,
    },
    /// The peer answered twice for one page.
    #[error("the site's peer answered twice for {id:?}")]
    AnsweredTwice {
        /// The page's id.
        id: ShortId,
    },
    /// The peer said that it was done before it had answered for all that it was asked for.
    #[error("the site's peer ended its answer with {ids} of the pages neither given nor said to be missing")]
    Unanswered {
        /// How many.
        ids: usize,
    },
    /// The peer refused the request.
    #[error("the site's peer refused: {message}")]
    Refused {
        /// Why, for programs.
        code: FailureCode,
        /// Why, for people.
        message: String,
    },
    /// The peer on the socket now names pages in another domain than the one this client connected to.
    #[error("the peer on the socket was replaced by one of another domain ({now:?}, before {before:?})")]
    DomainChanged {
        /// The domain at connect.
        before: DomainId,
        /// The domain now.
        now: DomainId,
    },
    /// A request exceeds a bound.
    #[error("{what} is {value}, the bound is {bound}")]
    TooLarge {
        /// What.
        what: &'static str,
        /// How much.
        value: u64,
        /// How much may be.
        bound: u64,
    },
    /// A memory was offered with a descriptor that can write.
    #[error("the memory's descriptor is writable; reopen it read-only (/proc/self/fd/N with O_RDONLY)")]
    WritableMemory,
}
