//! A listening Unix socket that is private from its first instant, replaces a dead one and nothing else, and is gone when its peer is.

use std::{
    fs::{self, Metadata},
    io::{self, ErrorKind},
    os::{
        fd::OwnedFd,
        unix::{
            fs::{FileTypeExt, MetadataExt},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::Mode,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};

use crate::{
    error::NodeError,
    limits::{SOCKET_BACKLOG, SOCKET_PATH_BYTES},
};

/// A bound socket; dropping it removes its path, unless something else stands there by now.
#[derive(Debug)]
pub(crate) struct BoundSocket {
    pub(crate) listener: tokio::net::UnixListener,
    path: PathBuf,
    file: FileId,
}

/// Which file stands at a path. The time tells a file from a later one that got its inode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct FileId {
    device: u64,
    inode: u64,
    changed: (i64, i64),
}

impl FileId {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

impl BoundSocket {
    /// Listens on `path` with mode 0600. Must be called within a tokio runtime.
    pub(crate) fn bind(path: &Path) -> Result<Self, NodeError> {
        let length = path.as_os_str().len();
        if length > SOCKET_PATH_BYTES {
            return Err(NodeError::LocalSocketTooLong { path: path.to_owned(), length });
        }
        remove_stale(path)?;
        let bind = || -> io::Result<Self> {
            let socket = new_socket()?;
            // Linux gives the path the mode of the unbound socket: there is no instant at which others can connect.
            rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
            rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
            rustix::net::listen(&socket, SOCKET_BACKLOG)?;
            Ok(Self {
                file: FileId::of(&fs::symlink_metadata(path)?),
                listener: tokio::net::UnixListener::from_std(UnixListener::from(socket))?,
                path: path.to_owned(),
            })
        };
        bind().map_err(|source| NodeError::LocalSocket { path: path.to_owned(), source })
    }
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        // Of its own socket only the inode is compared: a chmod by the operator changes the time.
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|now| (now.dev(), now.ino()) == (self.file.device, self.file.inode));
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the local socket's path could not be removed");
        }
    }
}

/// A socket of neither end yet. It does not block: a connection to a full backlog fails at once.
fn new_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?)
}

/// Removes a socket that no process listens on. Connecting to a file of another type is refused just as connecting to such a socket is, so the type
/// is looked at first.
fn remove_stale(path: &Path) -> Result<(), NodeError> {
    let failed = |source| NodeError::LocalSocket { path: path.to_owned(), source };
    let seen = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(NodeError::NotASocket { path: path.to_owned() });
        }
        Ok(metadata) => FileId::of(&metadata),
    };
    let address = SocketAddrUnix::new(path).map_err(|error| failed(error.into()))?;
    match rustix::net::connect(&new_socket().map_err(failed)?, &address).map_err(io::Error::from) {
        // A full backlog is a process that listens.
        Err(error) if error.kind() == ErrorKind::WouldBlock => {
            Err(NodeError::LocalSocketLive { path: path.to_owned() })
        }
        Ok(()) => Err(NodeError::LocalSocketLive { path: path.to_owned() }),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            // Another peer that starts at this moment may have put its own in its place.
            let now = fs::symlink_metadata(path).map_err(failed)?;
            if FileId::of(&now) != seen {
                return Err(NodeError::LocalSocketLive { path: path.to_owned() });
            }
            fs::remove_file(path).map_err(failed)
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::{fs::PermissionsExt, net::UnixStream};

    use super::*;

    #[tokio::test]
    async fn it_is_private_replaces_a_stale_socket_and_goes_when_it_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        let socket = BoundSocket::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        UnixStream::connect(&path).unwrap();
        assert!(matches!(BoundSocket::bind(&path), Err(NodeError::LocalSocketLive { .. })));
        drop(socket);
        assert!(!path.exists());
    }

    /// A key's copy was given as the socket's path: connecting to it was refused, as to a stale socket, and it was removed.
    #[tokio::test]
    async fn what_is_not_a_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("key"), dir.path().join("link"));
        fs::write(&file, "precious").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        for path in [&file, &link, &dir.path().to_owned()] {
            assert!(matches!(BoundSocket::bind(path), Err(NodeError::NotASocket { .. })));
        }
        assert_eq!(fs::read(&file).unwrap(), b"precious");
    }

    #[tokio::test]
    async fn a_successor_s_socket_survives_the_drop() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let socket = BoundSocket::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _successor = UnixListener::bind(&path).unwrap();
        drop(socket);
        assert!(path.exists());
    }

    #[tokio::test]
    async fn a_path_too_long_is_told_with_its_length_and_the_limit() {
        let path = PathBuf::from(format!("/tmp/{}", "x".repeat(SOCKET_PATH_BYTES - 4)));
        let text = BoundSocket::bind(&path).unwrap_err().to_string();
        assert!(text.contains("108 bytes") && text.contains("107 bytes"), "{text}");
    }
}
