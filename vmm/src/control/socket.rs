//! A listening Unix socket that is private from its first instant, replaces a dead one, and is gone when its process is.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::limits::SOCKET_PATH_BYTES;

/// Connections that the kernel queues before they are accepted.
const BACKLOG: i32 = 64;

/// Why a control socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Longer than the kernel's `sun_path`.
    #[error(
        "the socket path {path} is {length} bytes long, a Unix socket's may be {SOCKET_PATH_BYTES}: choose a shorter one"
    )]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Its bytes.
        length: usize,
    },
    /// A process listens there.
    #[error("another process listens on {path}: stop it or choose another path")]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// Something else stands there.
    #[error("{path} exists and is not a socket: remove it or choose another path")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("cannot {action} for the control socket {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A bound socket; dropping it removes the path, unless something else stands there by now.
#[derive(Debug)]
pub struct ControlSocket {
    path: PathBuf,
    device: u64,
    inode: u64,
    listener: UnixListener,
}

impl ControlSocket {
    /// Listens on `path` with mode 0600.
    /// # Errors
    /// If a process already listens there, if something else than a socket stands there, or if the kernel refuses.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let failed = |action| move |source| SocketError::Io { action, path: path.to_owned(), source };
        check_path(path)?;
        // Two processes that start at once on one stale path would each take the other's new socket for the stale one.
        let directory = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            Some(_) | None => Path::new("."),
        };
        let lock = File::open(directory).map_err(failed("open the directory"))?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive)
            .map_err(io::Error::from)
            .map_err(failed("lock the directory"))?;

        remove_stale(path)?;
        let socket = new_socket().map_err(failed("make a socket"))?;
        // Linux gives the bound path the mode of the unbound socket, so there is no instant at which others can connect.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)
            .map_err(io::Error::from)
            .map_err(failed("set the mode"))?;
        let address =
            SocketAddrUnix::new(path).map_err(io::Error::from).map_err(failed("make an address"))?;
        rustix::net::bind(&socket, &address).map_err(io::Error::from).map_err(failed("bind"))?;
        rustix::net::listen(&socket, BACKLOG).map_err(io::Error::from).map_err(failed("listen"))?;
        let metadata = fs::symlink_metadata(path).map_err(failed("look at the bound path"))?;
        Ok(Self {
            path: path.to_owned(),
            device: metadata.dev(),
            inode: metadata.ino(),
            listener: UnixListener::from(socket),
        })
    }

    /// The path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A listener for the runtime; the path stays this value's to remove.
    /// # Errors
    /// If the descriptor cannot be duplicated or registered. Must be called within a Tokio runtime.
    pub fn listener(&self) -> io::Result<tokio::net::UnixListener> {
        tokio::net::UnixListener::from_std(self.listener.try_clone()?)
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        let ours =
            fs::symlink_metadata(&self.path).is_ok_and(|m| m.dev() == self.device && m.ino() == self.inode);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the control socket's path could not be removed");
        }
    }
}

/// A socket of neither end yet. It does not block: a connection to a full backlog must fail at once.
fn new_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?)
}

/// Removes a socket that no process listens on.
fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let failed = |action| move |source| SocketError::Io { action, path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("look at the path")(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(SocketError::NotASocket { path: path.to_owned() });
        }
        Ok(_) => {}
    }
    let address = SocketAddrUnix::new(path).map_err(io::Error::from).map_err(failed("make an address"))?;
    let socket = new_socket().map_err(failed("make a socket"))?;
    match rustix::net::connect(&socket, &address).map_err(io::Error::from) {
        Ok(()) => Err(SocketError::InUse { path: path.to_owned() }),
        // A full backlog is a process that listens.
        Err(error) if error.kind() == ErrorKind::WouldBlock => {
            Err(SocketError::InUse { path: path.to_owned() })
        }
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed("remove the stale socket"))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed("try the socket that stands there")(error)),
    }
}

/// Whether `path` can name a Unix socket at all: for the client, which wants the same words.
/// # Errors
/// If it is too long.
pub fn check_path(path: &Path) -> Result<(), SocketError> {
    match path.as_os_str().len() {
        length if length > SOCKET_PATH_BYTES => Err(SocketError::TooLong { path: path.to_owned(), length }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn private_from_the_start_and_gone_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let socket = ControlSocket::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        UnixStream::connect(&path).unwrap();
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_one_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "the standard library leaves the path behind");
        let socket = ControlSocket::bind(&path).unwrap();
        assert!(matches!(ControlSocket::bind(&path), Err(SocketError::InUse { .. })));
        UnixStream::connect(&path).unwrap();
        drop(socket);
    }

    #[test]
    fn what_is_not_a_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(ControlSocket::bind(&path), Err(SocketError::NotASocket { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_successors_socket_survives_the_drop() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let socket = ControlSocket::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let successor = UnixListener::bind(&path).unwrap();
        drop(socket);
        assert!(path.exists());
        drop(successor);
    }

    #[test]
    fn a_path_too_long_is_named() {
        let path = PathBuf::from(format!("/tmp/{}", "x".repeat(200)));
        let error = ControlSocket::bind(&path).unwrap_err();
        assert!(error.to_string().contains("205 bytes"), "{error}");
    }
}
