//! Why a peer cannot start, or cannot take content.

use std::{io, net::SocketAddr, path::PathBuf};

use libp2p::Multiaddr;
use thiserror::Error;

use crate::limits::SOCKET_PATH_BYTES;

/// Errors of the peer.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum NodeError {
    /// A key file cannot be read.
    #[error("cannot read the key file {}", path.display())]
    ReadKey {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A key file is not one.
    #[error("{} is not a {expected}: it must be the line \"{header}\" and then 64 hex digits", path.display())]
    BadKey {
        /// The file.
        path: PathBuf,
        /// What was expected.
        expected: &'static str,
        /// The first line it must have.
        header: &'static str,
    },
    /// A key file cannot be written.
    #[error("cannot write the key file {}", path.display())]
    WriteKey {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A key would go where a file stands.
    #[error("{} exists, and an existing key is never overwritten: choose another file", path.display())]
    KeyExists {
        /// The file.
        path: PathBuf,
    },
    /// The system gives no random bytes.
    #[error("the system gives no random bytes for a key: {0}")]
    Random(getrandom::Error),
    /// An address is neither IP:PORT nor a multiaddr over TCP.
    #[error("{text:?} is not an address: give IP:PORT, or a multiaddr like /ip4/10.0.0.1/tcp/4160")]
    Address {
        /// What was given.
        text: String,
    },
    /// The peer cannot listen.
    #[error("cannot listen on {address}")]
    Listen {
        /// Where, as IP:PORT.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// The address is another host's.
    #[error("cannot listen on {address}: this host has no such address; give one of its own")]
    ListenElsewhere {
        /// Where, as IP:PORT.
        address: String,
    },
    /// Another process listens there.
    #[error("another process listens on {address} already; stop it, or listen elsewhere")]
    ListenInUse {
        /// Where.
        address: Multiaddr,
    },
    /// The listener ended.
    #[error("the listener on the site's network ended")]
    ListenerEnded {
        /// Why, if it said so.
        source: Option<io::Error>,
    },
    /// The peer's identity is not an Ed25519 key, which the site's connections are authenticated by.
    #[error("the peer's identity is not an Ed25519 key")]
    IdentityKind,
    /// TLS cannot be set up.
    #[error("cannot set up TLS for the site's connections")]
    Tls(#[from] rustls::Error),
    /// The local socket cannot be made.
    #[error("cannot serve the local socket {}", path.display())]
    LocalSocket {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something else than a socket stands where the local socket is to be.
    #[error(
        "{} exists and is not a socket: it is left as it is; choose another path for --local, or remove it", path.display()
    )]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The local socket's path is longer than the kernel takes.
    #[error(
        "the socket's path {} has {length} bytes, and a Unix socket's has {SOCKET_PATH_BYTES} bytes at most: choose a shorter one", path.display()
    )]
    LocalSocketTooLong {
        /// The path.
        path: PathBuf,
        /// Its bytes.
        length: usize,
    },
    /// Another process serves the local socket.
    #[error("another process serves the local socket {}; stop it or choose another path", path.display())]
    LocalSocketLive {
        /// The socket.
        path: PathBuf,
    },
    /// The scanning threads cannot be had.
    #[error("cannot start the threads that read this host's content")]
    Threads(#[source] io::Error),
    /// Metrics cannot be served.
    #[error("cannot serve metrics on {address}")]
    Metrics {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The directory of retained checkpoints cannot be used.
    #[error("cannot keep checkpoints in {}", path.display())]
    Retain {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The directory that is to hold the one of retained checkpoints is not there.
    #[error(
        "cannot keep checkpoints in {}: {} does not exist; mount its volume, or make it", path.display(), parent.display()
    )]
    RetainNowhere {
        /// The directory of checkpoints.
        path: PathBuf,
        /// The one that it is to be made in.
        parent: PathBuf,
    },
    /// A file that was to be served from the start cannot be.
    #[error("--add: {0}")]
    Add(ContentError),
    /// Another peer uses the directory of retained checkpoints.
    #[error("another peer keeps its checkpoints in {}; give each its own directory", path.display())]
    RetainInUse {
        /// The directory.
        path: PathBuf,
    },
    /// Signals cannot be watched.
    #[error("cannot watch for SIGTERM")]
    Signals(#[source] io::Error),
}

/// Why a memory or a file was not taken.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ContentError {
    /// It cannot be read.
    #[error("cannot read {name}: {source}")]
    Unreadable {
        /// What.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// It is not a regular file.
    #[error("{name} is not a regular file: block devices, directories and pipes are not served")]
    NotAFile {
        /// What.
        name: String,
    },
    /// An extent is not page-aligned, or lies outside of the descriptor's file.
    #[error(
        "{name}: an extent at offset {file_offset} of {pages} pages does not fit the descriptor's {bytes} bytes, or is not aligned to pages"
    )]
    Extent {
        /// The memory.
        name: String,
        /// The extent's offset.
        file_offset: u64,
        /// Its pages.
        pages: u64,
        /// The size of the file behind the descriptor.
        bytes: u64,
    },
    /// It has more pages than a peer takes of one content.
    #[error("{name} has {pages} pages, the bound is {bound}")]
    TooLarge {
        /// What.
        name: String,
        /// Its pages.
        pages: u64,
        /// The bound.
        bound: u64,
    },
    /// Too many contents.
    #[error("this peer already serves {bound} memories, files and checkpoints, which is its bound")]
    Full {
        /// The bound.
        bound: usize,
    },
}
