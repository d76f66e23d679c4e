//! Why a demo failed.

use std::io;
use std::path::PathBuf;

/// Why a demo failed, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DemoError {
    /// Options that do not go together.
    #[error("{0}")]
    Options(String),
    /// A file or directory that cannot be used.
    #[error("cannot {what} {path}")]
    File {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A process that cannot be started or steered.
    #[error("cannot {what} the process `{process}`")]
    Process {
        /// What was tried.
        what: &'static str,
        /// With which.
        process: String,
        /// Why not.
        source: io::Error,
    },
    /// A process that ended by itself.
    #[error("the process `{process}` ended too early, with {status}; its log ends with:\n{log}")]
    Ended {
        /// Which.
        process: String,
        /// How.
        status: std::process::ExitStatus,
        /// The last lines of its log.
        log: String,
    },
    /// A condition that did not come true in time.
    #[error("waited {seconds} s in vain until {what}")]
    Timeout {
        /// The condition.
        what: &'static str,
        /// How long.
        seconds: u64,
    },
    /// A dht peer that refused or failed.
    #[error("the peer of host {host} failed")]
    Site {
        /// Whose peer.
        host: &'static str,
        /// Why.
        source: dht::SiteError,
    },
    /// A vmm that refused or failed.
    #[error("the vmm `{vm}` did not {what}")]
    Vmm {
        /// What it should have done.
        what: &'static str,
        /// Which.
        vm: &'static str,
        /// Why not.
        source: vmm::control::client::ClientError,
    },
    /// A host's key that cannot be made.
    #[error("cannot make the hosts' keys")]
    Identity(#[from] vmm::migrate::MigrateError),
    /// An answer that makes no sense.
    #[error("{0}")]
    Answer(String),
    /// The WAN link cannot be made.
    #[error("cannot make the WAN link")]
    Link(#[source] io::Error),
    /// A thread of the demo panicked.
    #[error("a thread of the demo failed")]
    Thread(#[from] tokio::task::JoinError),
    /// The operator ended it.
    #[error("interrupted; every process of the demo has been ended")]
    Interrupted,
}

impl DemoError {
    /// Wraps a file's error.
    pub(crate) fn file(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { what, path, source }
    }
}
