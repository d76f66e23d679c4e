//! What a snapshot, or a restore, can fail of.

use std::io;
use std::path::{Path, PathBuf};

use page::Gfn;

use super::manifest::ManifestError;
use crate::limits::SNAPSHOT_NAME_BYTES;
use crate::machine::MachineError;

/// Errors of snapshots. A VM that was to be saved runs on (or stays paused) after any of them.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// A name that cannot be a directory's.
    #[error(
        "`{0}` cannot be a snapshot's name: 1 to {SNAPSHOT_NAME_BYTES} letters, digits, `.`, `_` and `-`, no `.` in front"
    )]
    Name(String),
    /// A directory that depends on where the caller stands.
    #[error("{} is not an absolute path", .0.display())]
    Relative(PathBuf),
    /// There is one already.
    #[error("{} has a snapshot `{name}` already: choose another name, or remove snapshots/{name} there", dir.display())]
    NameTaken {
        /// The directory.
        dir: PathBuf,
        /// The name.
        name: String,
    },
    /// Another process writes there.
    #[error("another process writes a snapshot into {}: try again when it has ended", .0.display())]
    Locked(PathBuf),
    /// No room.
    #[error("there is no room for {}: make some and try again", path.display())]
    Full {
        /// What was being written.
        path: PathBuf,
        /// What the system says: no space, quota, or a file-size limit.
        source: io::Error,
    },
    /// The file system failed.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// No such snapshot.
    #[error("{} has no snapshot `{name}`: {there}", dir.display())]
    NotFound {
        /// The directory.
        dir: PathBuf,
        /// The name.
        name: String,
        /// For people: what is there.
        there: String,
    },
    /// No snapshot at all.
    #[error("{} has no snapshot", .0.display())]
    Empty(PathBuf),
    /// A manifest that is damaged, or of another build.
    #[error("the manifest {} cannot be used", path.display())]
    Manifest {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: ManifestError,
    },
    /// A file that is not the one that the manifest was written with.
    #[error("{} is damaged, or of another snapshot: its digest is not the one that the manifest names", .0.display())]
    Digest(PathBuf),
    /// A description that is no machine's.
    #[error("{} does not describe a machine that this build knows", path.display())]
    Description {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: serde_json::Error,
    },
    /// The manifest names frames that the machine does not have.
    #[error("the manifest {} places a page at frame {:#x}, where this machine has no memory", path.display(), gfn.0)]
    Frame {
        /// The file.
        path: PathBuf,
        /// The frame.
        gfn: Gfn,
    },
    /// A page of a pack that is not what the manifest says.
    #[error(
        "page {page} of {} is damaged (it belongs at frame {:#x}): its bytes do not have the name that the manifest gives; nothing was run",
        pack.display(), gfn.0
    )]
    Page {
        /// The pack.
        pack: PathBuf,
        /// Which of its pages, from 0.
        page: u64,
        /// Where it belongs.
        gfn: Gfn,
    },
    /// A pack that ends too early.
    #[error(
        "{} ends before its page {page}, which belongs at frame {:#x}: it was cut short; nothing was run",
        pack.display(), gfn.0
    )]
    Truncated {
        /// The pack.
        pack: PathBuf,
        /// The first page that was to be read.
        page: u64,
        /// Where it belongs.
        gfn: Gfn,
    },
    /// The VM.
    #[error("the VM cannot be saved or restored")]
    Machine(#[from] MachineError),
    /// A thread of the work.
    #[error("the system gives no thread")]
    Thread(#[source] io::Error),
    /// A signal that must not end the process cannot be caught.
    #[error("the signal of a file-size limit cannot be handled")]
    Signal(#[source] io::Error),
    /// The host gives no random numbers.
    #[error("could not get random bytes for a pack's name")]
    Random(#[source] getrandom::Error),
}

impl SnapshotError {
    /// Names what failed, and tells a full disk from the rest.
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                Self::Full { path, source }
            }
            _ => Self::Io { action, path, source },
        }
    }

    /// The status of the control socket's answer.
    #[must_use]
    pub fn http_status(&self) -> u16 {
        match self {
            Self::Name(_) | Self::Relative(_) => 400,
            Self::NameTaken { .. } | Self::Locked(_) => 409,
            Self::Full { .. } => 507,
            Self::Io { .. }
            | Self::NotFound { .. }
            | Self::Empty(_)
            | Self::Manifest { .. }
            | Self::Digest(_)
            | Self::Truncated { .. }
            | Self::Description { .. }
            | Self::Frame { .. }
            | Self::Page { .. }
            | Self::Machine(_)
            | Self::Thread(_)
            | Self::Signal(_)
            | Self::Random(_) => 500,
        }
    }

    /// A stable word for programs: the `code` of the control socket's error body.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Name(_) | Self::Relative(_) => "bad_request",
            Self::NameTaken { .. } => "name_taken",
            Self::Locked(_) => "locked",
            Self::Full { .. } => "no_space",
            Self::Io { .. } => "io",
            Self::NotFound { .. } | Self::Empty(_) => "not_found",
            Self::Manifest { .. }
            | Self::Digest(_)
            | Self::Truncated { .. }
            | Self::Description { .. }
            | Self::Frame { .. }
            | Self::Page { .. } => "damaged",
            Self::Machine(_) | Self::Thread(_) | Self::Signal(_) | Self::Random(_) => "internal",
        }
    }
}
