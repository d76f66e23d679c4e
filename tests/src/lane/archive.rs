//! Writes a cpio archive as Linux unpacks it into its first root file system
//! (Documentation/driver-api/early-userspace/buffer-format.rst, format "newc").

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::Path;

/// File types of `st_mode`.
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// An archive that is being written. Directories above an entry are made with it.
#[derive(Debug)]
pub(super) struct Archive<W> {
    out: W,
    inode: u32,
    directories: BTreeSet<String>,
}

struct Entry<'a> {
    name: &'a str,
    mode: u32,
    device: (u32, u32),
    data: &'a [u8],
}

impl<W: Write> Archive<W> {
    pub(super) fn new(out: W) -> Self {
        Self { out, inode: 0, directories: BTreeSet::new() }
    }

    /// A directory.
    pub(super) fn directory(&mut self, name: &str) -> io::Result<()> {
        if name.is_empty() || !self.directories.insert(name.to_owned()) {
            return Ok(());
        }
        self.parents(name)?;
        self.entry(&Entry { name, mode: DIRECTORY | 0o755, device: (0, 0), data: &[] })
    }

    /// A file that everybody may run.
    pub(super) fn file(&mut self, name: &str, data: &[u8]) -> io::Result<()> {
        self.parents(name)?;
        self.entry(&Entry { name, mode: REGULAR | 0o755, device: (0, 0), data })
    }

    /// A character device.
    pub(super) fn device(&mut self, name: &str, major: u32, minor: u32) -> io::Result<()> {
        self.parents(name)?;
        self.entry(&Entry { name, mode: CHARACTER_DEVICE | 0o600, device: (major, minor), data: &[] })
    }

    /// Ends the archive.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.entry(&Entry { name: "TRAILER!!!", mode: 0, device: (0, 0), data: &[] })?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn parents(&mut self, name: &str) -> io::Result<()> {
        let parent = Path::new(name).parent().and_then(Path::to_str).unwrap_or_default().to_owned();
        self.directory(&parent)
    }

    fn entry(&mut self, entry: &Entry<'_>) -> io::Result<()> {
        let Entry { name, mode, device: (major, minor), data } = *entry;
        let too_long = |_| io::Error::new(io::ErrorKind::InvalidInput, format!("{name} is beyond 4 GiB"));
        let data_bytes = u32::try_from(data.len()).map_err(too_long)?;
        let name_bytes = u32::try_from(name.len() + 1).map_err(too_long)?;
        self.inode += 1;
        write!(self.out, "070701")?;
        // inode, mode, user, group, links, time, size, device of the archive (2), device of the node (2), name's length, checksum
        let fields = [self.inode, mode, 0, 0, 1, 0, data_bytes, 0, 0, major, minor, name_bytes, 0];
        for field in fields {
            write!(self.out, "{field:08x}")?;
        }
        self.out.write_all(name.as_bytes())?;
        self.out.write_all(&[0])?;
        self.pad(6 + 13 * 8 + name.len() + 1)?;
        self.out.write_all(data)?;
        self.pad(data.len())
    }

    fn pad(&mut self, written: usize) -> io::Result<()> {
        let zeros = [0; 3];
        self.out.write_all(&zeros[..written.next_multiple_of(4) - written])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_its_directories_once_and_every_part_on_four_bytes() {
        let mut archive = Archive::new(Vec::new());
        archive.file("bin/one", b"12345").unwrap();
        archive.file("bin/two", b"").unwrap();
        archive.device("dev/console", 5, 1).unwrap();
        let bytes = archive.finish().unwrap();
        assert!(bytes.len().is_multiple_of(4));
        let names: Vec<usize> =
            bytes.windows(6).enumerate().filter(|(_, w)| w == b"070701").map(|(at, _)| at).collect();
        assert_eq!(names.len(), 6, "bin, one, two, dev, console and the trailer");
        assert!(names.iter().all(|at| at.is_multiple_of(4)));
        assert_eq!(&bytes[110..114], b"bin\0");
    }
}
