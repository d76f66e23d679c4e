//! What several fuzz targets share.

use std::os::unix::fs::FileExt as _;
use std::path::Path;

use vmm::config::DiskOptions;
use vmm::devices::virtio::exercise::Exercise;

const DISK_BYTES: usize = 64 * 1024;
/// A file system in memory: a flush costs nothing there.
const MEMORY: &str = "/dev/shm";

/// A disk whose file is in memory where that is possible.
#[derive(Debug)]
pub struct Disk {
    file: tempfile::NamedTempFile,
    /// The device.
    pub device: Exercise,
}

impl Disk {
    /// A disk.
    /// # Panics
    /// If there is no place for its file.
    #[expect(clippy::new_without_default, reason = "it makes a file")]
    pub fn new() -> Self {
        let file = if Path::new(MEMORY).is_dir() {
            tempfile::NamedTempFile::new_in(MEMORY)
        } else {
            tempfile::NamedTempFile::new()
        };
        let file = file.expect("a place for a temporary file");
        let path = file.path().to_owned();
        let device = Exercise::block(DiskOptions { path, read_only: false, id: None, direct: false });
        let this = Self { file, device };
        this.clear();
        this
    }

    /// Makes it as it was at first, so that the same bytes do the same: not zeros, so that what is read is seen in memory.
    /// # Panics
    /// If the host's file system fails.
    pub fn clear(&self) {
        let file = self.file.as_file();
        let fresh = file.set_len(DISK_BYTES as u64).and_then(|()| file.write_all_at(&[0x5a; DISK_BYTES], 0));
        fresh.expect("room for a small file");
    }

    /// Checks that no guest has changed its length.
    /// # Panics
    /// If one has.
    pub fn check(&self) {
        let length = self.file.as_file().metadata().expect("the file is there").len();
        assert_eq!(length, DISK_BYTES as u64, "a guest has changed its disk's length");
    }
}
