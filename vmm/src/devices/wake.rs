//! An event that ends another thread's poll.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

/// The event: it stays set until it is cleared.
#[derive(Debug)]
pub(crate) struct Wake(OwnedFd);

impl Wake {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Sets it.
    pub(crate) fn wake(&self) {
        match rustix::io::write(&self.0, &1u64.to_ne_bytes()) {
            // A full counter is set as well.
            Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
            Err(error) => tracing::error!(%error, "could not wake a device's thread"),
        }
    }

    /// Clears it.
    pub(crate) fn clear(&self) {
        match rustix::io::read(&self.0, &mut [0u8; 8]) {
            Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
            Err(error) => tracing::error!(%error, "could not clear a device's wake-up event"),
        }
    }

    /// Waits until it is set, and clears it.
    pub(crate) fn wait(&self) -> io::Result<()> {
        loop {
            match poll(&mut [PollFd::new(self, PollFlags::IN)], None) {
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.clear();
        Ok(())
    }
}

impl From<OwnedFd> for Wake {
    /// Takes over an event: it must not block.
    fn from(event: OwnedFd) -> Self {
        Self(event)
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
