//! The spill file of a switchover to post-copy: the pages that the VM lacks when it runs at the destination, on storage that outlives the source's host.
//!
//! # Goals
//! - A file that is there under its name (`VM-MIGRATION.spill`) holds every absent page, on stable storage: the source sends Commit only after that. What is being written
//!   is called `….spill.part` and is worth nothing.
//! - A file that was torn, cut or damaged is recognised before a byte of it is served.
//! - It holds guest memory: its owner alone may read it.
//!
//! # Non-goals
//! Starting a VM. The file has no device state, and whoever serves it (`crate::migrate::serve_spill`) has no right to the VM.
//!
//! # Format, version 1
//! Numbers are little-endian.
//!
//! | bytes | of | are |
//! |---|---|---|
//! | 8 | head | `TERNSPIL` |
//! | 4 | | the version |
//! | 16, 16, 8 | | migration, VM, epoch as whose owner the source ran it |
//! | 16, 32 | | the migration's dedup domain, and the name of a zero page in it |
//! | 4, then 16 each | | extents of RAM: how many; each: first region, regions |
//! | 1, 8, 32, 4096 | page | `1`, frame, full name, bytes |
//! | 1, 8 | zero page | `2`, frame |
//! | 1, 32, 8 | end | `0`, the root that both ends agree on, how many pages and zero pages stand before |
//! | 32 | | SHA-256 of everything before it |
//!
//! Pages and zero pages come in any number and order; of two of one frame the later counts, since the guest wrote in between. Nothing follows the digest.
//! The destination hashes each page again, and compares it with the name.

mod file;
mod format;
mod writer;

use std::io;
use std::path::{Path, PathBuf};

pub use file::SpillFile;
pub use format::{Contents, FormatError, Head, Place, encode, parse};
pub use writer::{Sealed, Writer};

/// What a spill file can fail of. Before Commit the VM runs on at the source after any of them.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpillError {
    /// A directory that depends on where the caller stands.
    #[error("{} is not an absolute path", .0.display())]
    Relative(PathBuf),
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
    /// The file is not what its name says.
    #[error(
        "{} is not a whole spill file: it is damaged, or its source died before Commit, and then the VM never ran without these pages",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where it is wrong.
        source: FormatError,
    },
}

impl SpillError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}
