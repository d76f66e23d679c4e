//! Takes the ELF kernel out of a bzImage: unpacking itself under two levels of emulation would take the kernel minutes.
//! Linux' Documentation/arch/x86/boot.rst has the header.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::limits::VMLINUX_BYTES;

/// What a packed kernel begins with, and the program that unpacks it.
const PACKERS: [(&[u8], &str); 4] = [
    (b"\xfd7zXZ\0", "xz"),
    (b"\x02\x21\x4c\x18", "lz4"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x1f\x8b", "gzip"),
];

/// Why there is no ELF kernel.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnpackError {
    /// The file is not there.
    #[error("{} cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is something else.
    #[error("{} is no bzImage of boot protocol 2.08 or later", path.display())]
    NotBzImage {
        /// The file.
        path: PathBuf,
    },
    /// Packed by something that nobody here can unpack.
    #[error("the kernel in {} is packed in a way that is not known here: it begins with {head:02x?}", path.display())]
    Packer {
        /// The file.
        path: PathBuf,
        /// The first bytes.
        head: Vec<u8>,
    },
    /// The unpacker cannot be started.
    #[error("`{program}` cannot be started: install it")]
    Program {
        /// Its name.
        program: &'static str,
        /// Why.
        source: io::Error,
    },
    /// What came out is not a kernel.
    #[error("`{program}` made no ELF file of the kernel in {}: {said}", path.display())]
    NotElf {
        /// The unpacker.
        program: &'static str,
        /// The file.
        path: PathBuf,
        /// What it said.
        said: String,
    },
}

/// The ELF file in the bzImage `path`.
/// # Errors
/// If there is none, or its packer is unknown or absent.
pub(super) fn vmlinux(path: &Path) -> Result<Vec<u8>, UnpackError> {
    let image = std::fs::read(path).map_err(|source| UnpackError::Read { path: path.to_owned(), source })?;
    let payload = payload(&image).ok_or_else(|| UnpackError::NotBzImage { path: path.to_owned() })?;
    let packer = PACKERS.iter().find(|(magic, _)| payload.starts_with(magic));
    let Some((_, program)) = packer else {
        let head = payload.iter().take(8).copied().collect();
        return Err(UnpackError::Packer { path: path.to_owned(), head });
    };
    let (elf, said) = run(program, payload).map_err(|source| UnpackError::Program { program, source })?;
    if !elf.starts_with(b"\x7fELF") || elf.len() > VMLINUX_BYTES {
        return Err(UnpackError::NotElf { program, path: path.to_owned(), said });
    }
    Ok(elf)
}

/// The packed kernel within a bzImage.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let byte = |at: usize| image.get(at).copied();
    let word = |at: usize| Some(u32::from_le_bytes(*image.get(at..)?.first_chunk()?));
    let version = u16::from_le_bytes([byte(0x206)?, byte(0x207)?]);
    if image.get(0x202..0x206)? != b"HdrS" || version < 0x208 {
        return None;
    }
    let sectors = if byte(0x1f1)? == 0 { 4 } else { usize::from(byte(0x1f1)?) };
    let begin = (sectors + 1) * 512 + usize::try_from(word(0x248)?).ok()?;
    let length = usize::try_from(word(0x24c)?).ok()?;
    // The last four bytes are the unpacked length, appended by Linux' build where the format has none of its own.
    image.get(begin..begin.checked_add(length)?)
}

/// Feeds `packed` to `program` and collects what it writes. What stands behind the packed stream makes it complain, and is no failure.
fn run(program: &str, packed: &[u8]) -> io::Result<(Vec<u8>, String)> {
    let mut child = Command::new(program)
        .args(["-d", "-c"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut input = child.stdin.take().expect("it was piped");
    let output = std::thread::scope(|scope| {
        // It may close its input before the trailing length: the ELF file is judged, not the pipe.
        scope.spawn(move || input.write_all(packed).is_ok());
        child.wait_with_output()
    })?;
    Ok((output.stdout, String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_payload_stands_where_the_header_says_and_nowhere_else() {
        let mut image = vec![0; 0x600];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&0x10_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&3_u32.to_le_bytes());
        image[0x410..0x413].copy_from_slice(b"abc");
        assert_eq!(payload(&image), Some(&b"abc"[..]));
        image[0x24c..0x250].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(payload(&image), None, "beyond the file");
        assert_eq!(payload(b"MZ"), None);
    }
}
