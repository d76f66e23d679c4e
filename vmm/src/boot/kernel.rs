//! A kernel's file: which format it is, told from its bytes, and by which protocol it is entered.

use std::io::{self, Cursor, Read, Seek, SeekFrom};

use super::error::KernelError;
use super::{bzimage, elf};
use crate::config::BootProtocol;

/// A kernel that can be loaded.
#[derive(Debug)]
pub(crate) enum Kernel {
    /// A vmlinux, or another ELF file, entered by PVH at this address.
    Pvh(elf::Image, u64),
    /// A vmlinux, entered by Linux's 64-bit protocol at this address.
    Linux64(elf::Image, u64),
    /// A bzImage, entered by Linux's 64-bit protocol.
    BzImage(bzimage::Image),
}

/// A file, and its length.
#[derive(Debug)]
pub(crate) struct Source<'a, F> {
    file: &'a mut F,
    bytes: u64,
}

impl<'a, F: Read + Seek> Source<'a, F> {
    pub(crate) fn new(file: &'a mut F) -> Result<Self, KernelError> {
        let bytes = file.seek(SeekFrom::End(0)).map_err(KernelError::Read)?;
        Ok(Self { file, bytes })
    }

    /// Checks that `bytes` bytes at `at` are in the file.
    pub(crate) fn must_hold(&self, what: &'static str, at: u64, bytes: u64) -> Result<(), KernelError> {
        let end = at.saturating_add(bytes);
        if end > self.bytes {
            return Err(KernelError::Truncated { what, end, bytes: self.bytes });
        }
        Ok(())
    }

    /// Reads `into.len()` bytes at `at`, which are `what`.
    pub(crate) fn read(&mut self, what: &'static str, at: u64, into: &mut [u8]) -> Result<(), KernelError> {
        self.must_hold(what, at, into.len() as u64)?;
        self.file.seek(SeekFrom::Start(at)).and_then(|_| self.file.read_exact(into)).map_err(|e| {
            match e.kind() {
                // It shrank since it was measured.
                io::ErrorKind::UnexpectedEof => KernelError::Truncated {
                    what,
                    end: at.saturating_add(into.len() as u64),
                    bytes: self.bytes,
                },
                _ => KernelError::Read(e),
            }
        })
    }

    /// Its length in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Beginnings of files that are given for kernels by mistake.
const MISTAKES: &[(&[u8], &str)] = &[
    (b"\x1f\x8b", "compressed with gzip"),
    (b"\xfd7zXZ\0", "compressed with xz"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd"),
    (b"\x04\x22\x4d\x18", "compressed with lz4"),
    (b"BZh", "compressed with bzip2"),
    (b"070701", "an initramfs (cpio archive)"),
    (b"#!", "a script"),
];

/// Looks at a kernel's headers and checks all that can be checked without guest memory.
pub(crate) fn inspect<F: Read + Seek>(file: &mut F, wanted: BootProtocol) -> Result<Kernel, KernelError> {
    let mut source = Source::new(file)?;
    let mut start = [0; 8];
    source.read("the first bytes of any kernel", 0, &mut start)?;
    if start.starts_with(elf::MAGIC) {
        let image = elf::inspect(&mut source)?;
        return match (wanted, image.pvh_entry) {
            (BootProtocol::Auto | BootProtocol::Pvh, Some(entry)) => {
                image.must_hold(entry)?;
                Ok(Kernel::Pvh(image, entry))
            }
            (BootProtocol::Pvh, None) => Err(KernelError::NoPvhNote),
            (BootProtocol::Auto, None) | (BootProtocol::Linux64, _) => {
                let entry = image.entry;
                image.must_hold(entry)?;
                Ok(Kernel::Linux64(image, entry))
            }
        };
    }
    if bzimage::is_one(&mut source)? {
        return match wanted {
            BootProtocol::Auto | BootProtocol::Linux64 => bzimage::inspect(&mut source).map(Kernel::BzImage),
            BootProtocol::Pvh => Err(KernelError::BzImageByPvh),
        };
    }
    let looks_like = MISTAKES.iter().find(|(magic, _)| start.starts_with(magic));
    Err(KernelError::UnknownFormat { what: looks_like.map_or("something else", |(_, what)| *what) })
}

/// Whether this build would boot the kernel whose file holds `image`, as far as that can be told without guest memory.
///
/// # Errors
/// [`KernelError`].
pub fn check_kernel(image: &[u8], wanted: BootProtocol) -> Result<(), KernelError> {
    inspect(&mut Cursor::new(image), wanted).map(drop)
}
