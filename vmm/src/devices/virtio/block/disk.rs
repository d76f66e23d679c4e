//! What a block device stores its sectors in: a raw file, or a block device of the host.
//!
//! A disk is locked while its VM may run (flock(2), of this open file): a writer alone, readers together. At a hand-over the source writes
//! everything down and gives the lock up when it has paused the VM, and the destination takes it when it runs the VM. In between nobody
//! has it: the protocol lets one side run. A source that goes on takes it again first, and if another has it by then, the VM stays paused.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _};
use std::sync::Mutex;

use rustix::fs::{Advice, FallocateFlags, FlockOperation, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use super::SECTOR_BYTES;
use super::direct::{self, Direct};
use super::stored::Stored;
use crate::config::DiskOptions;
use crate::devices::DeviceError;
use crate::kvm::threads::lock;
use crate::memory::buffers::Buffers;

/// Zeros to write where the host cannot make a range read as zeros by itself.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// An open disk.
#[derive(Debug)]
pub(crate) struct Disk {
    stored: Stored,
    options: DiskOptions,
    capacity_bytes: u64,
    /// If the host's page cache is passed by: what the file then wants.
    direct: Option<Direct>,
    locked: Mutex<bool>,
}

impl Disk {
    /// Opens it, without its lock.
    pub(super) fn open(options: &DiskOptions) -> Result<Self, DeviceError> {
        let failed = |source: io::Error| DeviceError::Disk { path: options.path.clone(), source };
        let access = if options.read_only { OFlags::RDONLY } else { OFlags::RDWR };
        let direct = if options.direct { OFlags::DIRECT } else { OFlags::empty() };
        // Not blocking: a name may turn out to be a pipe's.
        let flags = access | direct | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = rustix::fs::open(&options.path, flags, Mode::empty()).map_err(|error| match error {
            Errno::INVAL if options.direct => failed(direct::none()),
            other => failed(other.into()),
        })?;
        let file = File::from(file);
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(failed(io::Error::other("it is neither a regular file nor a block device")));
        }
        let capacity_bytes = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|e| failed(e.into()))?;
        let direct = options.direct.then(|| Direct::of(&file)).transpose().map_err(failed)?;
        let block_bytes = direct.map_or(SECTOR_BYTES, |direct| direct.block_bytes);
        if capacity_bytes == 0 || !capacity_bytes.is_multiple_of(block_bytes.into()) {
            let path = options.path.clone();
            return Err(DeviceError::DiskSize { path, bytes: capacity_bytes, block: block_bytes });
        }
        let stored = Stored::new(file);
        Ok(Self { stored, options: options.clone(), capacity_bytes, direct, locked: Mutex::new(false) })
    }

    pub(super) fn options(&self) -> &DiskOptions {
        &self.options
    }

    pub(super) fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    /// The smallest unit of I/O, bytes.
    pub(super) fn block_bytes(&self) -> u32 {
        self.direct.map_or(SECTOR_BYTES, |direct| direct.block_bytes)
    }

    /// Writes down what the driver has written so far, while the VM still runs: [`Disk::unlock`] then has little left to wait for.
    pub(crate) fn write_down(&self) -> Result<(), DeviceError> {
        if self.options.read_only {
            return Ok(());
        }
        let path = self.options.path.clone();
        self.stored.write_down().map_err(|source| DeviceError::WriteDown { path, source })
    }

    /// Takes the lock, which only a VM that runs may hold. Idempotent.
    pub(crate) fn lock(&self) -> Result<(), DeviceError> {
        let mut locked = lock(&self.locked);
        if *locked {
            return Ok(());
        }
        let path = self.options.path.clone();
        let how = if self.options.read_only {
            FlockOperation::NonBlockingLockShared
        } else {
            FlockOperation::NonBlockingLockExclusive
        };
        match rustix::fs::flock(self.stored.file(), how) {
            Ok(()) => *locked = true,
            Err(Errno::WOULDBLOCK) => return Err(DeviceError::DiskInUse { path }),
            Err(error @ (Errno::OPNOTSUPP | Errno::NOLCK | Errno::NOSYS)) => {
                tracing::warn!(
                    path = %path.display(),
                    %error,
                    "this file system has no locks: nothing keeps a second VM from opening the disk"
                );
                *locked = true;
            }
            Err(error) => return Err(DeviceError::Disk { path, source: error.into() }),
        }
        // What this host has cached may be older than what the VM's last host wrote.
        if !self.options.direct
            && let Err(error) = rustix::fs::fadvise(self.stored.file(), 0, None, Advice::DontNeed)
        {
            tracing::debug!(%error, "the host's cache of a disk could not be dropped");
        }
        Ok(())
    }

    /// Writes everything down and gives the lock up: the VM is about to run elsewhere. Idempotent.
    pub(crate) fn unlock(&self) -> Result<(), DeviceError> {
        let mut locked = lock(&self.locked);
        if !*locked {
            return Ok(());
        }
        self.write_down()?;
        match rustix::fs::flock(self.stored.file(), FlockOperation::Unlock) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOLCK | Errno::NOSYS) => {}
            Err(error) => {
                return Err(DeviceError::Disk { path: self.options.path.clone(), source: error.into() });
            }
        }
        *locked = false;
        Ok(())
    }

    pub(super) fn read(&self, offset: u64, into: &Buffers<'_>) -> io::Result<()> {
        match self.direct {
            None => into.fill_at(self.stored.file().as_fd(), offset),
            Some(direct) => direct.read(self.stored.file(), offset, into),
        }
    }

    pub(super) fn write(&self, offset: u64, from: &Buffers<'_>) -> io::Result<()> {
        match self.direct {
            None => from.drain_at(self.stored.file().as_fd(), offset),
            Some(direct) => direct.write(self.stored.file(), offset, from),
        }
    }

    /// Returns when all that was written survives a loss of power.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.stored.flush()
    }

    /// Gives a range's storage back; it reads as zeros. [`io::ErrorKind::Unsupported`] if the host cannot.
    pub(super) fn discard(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(self.stored.file(), how, offset, bytes)?)
    }

    /// Makes a range read as zeros, and gives its storage back if `unmap` and if it can.
    pub(super) fn write_zeroes(&self, offset: u64, bytes: u64, unmap: bool) -> io::Result<()> {
        let how = if unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        match rustix::fs::fallocate(self.stored.file(), how | FallocateFlags::KEEP_SIZE, offset, bytes) {
            Ok(()) => return Ok(()),
            Err(Errno::OPNOTSUPP) => {}
            Err(error) => return Err(error.into()),
        }
        let mut done = 0;
        while done < bytes {
            let count = usize::try_from(bytes - done).unwrap_or(usize::MAX).min(ZEROS.len());
            match self.direct {
                None => self.stored.file().write_all_at(&ZEROS[..count], offset + done)?,
                Some(direct) => direct.write_zeros(self.stored.file(), offset + done, count)?,
            }
            done += count as u64;
        }
        Ok(())
    }
}
