//! A file in which a device keeps what its driver wrote.
//!
//! Linux reports a failed write-back to an open file once (fsync(2)). Where the monitor itself writes the file down, before a hand-over, a
//! failure is kept for the driver: its next flush must not succeed.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

/// The file, and whether something written to it was lost without its driver knowing.
#[derive(Debug)]
pub(super) struct Stored {
    file: File,
    lost: AtomicBool,
}

impl Stored {
    pub(super) fn new(file: File) -> Self {
        Self { file, lost: AtomicBool::new(false) }
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// The driver's flush: returns when all that was written survives a loss of power.
    /// # Errors
    /// The host's, of now or of an earlier [`Stored::write_down`].
    pub(super) fn flush(&self) -> io::Result<()> {
        if self.lost.swap(false, Ordering::SeqCst) {
            return Err(io::Error::other("an earlier write could not be written down"));
        }
        self.file.sync_data()
    }

    /// The monitor's: as a flush, but what fails is told to the driver as well.
    /// # Errors
    /// The host's; also while an earlier failure has not been told to the driver.
    pub(super) fn write_down(&self) -> io::Result<()> {
        if self.lost.load(Ordering::SeqCst) {
            return Err(io::Error::other("an earlier write could not be written down"));
        }
        self.file.sync_data().inspect_err(|_| self.lost.store(true, Ordering::SeqCst))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_monitor_saw_fail_fails_for_the_driver_once() {
        let (_reader, writer) = io::pipe().unwrap();
        // A pipe cannot be synchronised: EINVAL stands for any failure.
        let stored = Stored::new(File::from(std::os::fd::OwnedFd::from(writer)));
        assert!(stored.write_down().is_err());
        assert!(stored.lost.load(Ordering::SeqCst) && stored.write_down().is_err());
        assert!(stored.flush().unwrap_err().to_string().contains("earlier"));
        assert!(!stored.lost.load(Ordering::SeqCst));
        let good = Stored::new(tempfile::tempfile().unwrap());
        good.write_down().and_then(|()| good.flush()).unwrap();
    }
}
