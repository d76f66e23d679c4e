//! Putting a kernel, its initial RAM file system and other files into guest memory, and starting it by the PVH protocol.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes as _, GuestAddress};

use crate::config::{Load, VmConfig};
use crate::limits::CMDLINE_MAX_BYTES;
use crate::memory::Memory;

pub(crate) mod elf;
pub(crate) mod layout;
pub(crate) mod mptable;
pub(crate) mod pvh;

use layout::{Area, Map};
pub(crate) use pvh::BootRegisters;

/// Errors of booting.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file that cannot be read.
    #[error("could not read {what} {path}")]
    File {
        /// What it is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not an ELF file, or a broken one.
    #[error("{path} is not a 64-bit little-endian ELF kernel: {what}; give the uncompressed vmlinux")]
    BadElf {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// An ELF file without the note that says where to enter it.
    #[error("{path} has no PVH entry note: build the kernel with CONFIG_PVH=y")]
    NoPvhNote {
        /// The file.
        path: PathBuf,
    },
    /// Its entry is not in anything that it loads.
    #[error("{path}: its PVH entry {entry:#x} is in none of the segments that it loads")]
    EntryOutside {
        /// The file.
        path: PathBuf,
        /// The entry.
        entry: u64,
    },
    /// Two things want the same addresses.
    #[error("{first} and {second} overlap in guest memory: put one of them elsewhere")]
    Overlap {
        /// What was there.
        first: Area,
        /// What came.
        second: Area,
    },
    /// Something that is outside RAM.
    #[error("{area} does not fit into guest memory of {memory_bytes} bytes: raise --memory, or move it")]
    OutOfMemory {
        /// What it is.
        area: Area,
        /// The guest's RAM.
        memory_bytes: u64,
    },
    /// No gap for the initial RAM file system.
    #[error("no free {bytes} bytes of guest memory below 3 GiB for the initramfs: raise --memory")]
    NoRoomForInitramfs {
        /// Its length.
        bytes: u64,
    },
    /// A command line that is too long, or holds a zero.
    #[error("the kernel's command line must be at most {CMDLINE_MAX_BYTES} bytes long and hold no zero byte")]
    Cmdline,
}

/// Puts everything into memory and says with which registers the boot processor starts.
///
/// # Errors
/// [`BootError`]. Nothing is written over anything else: what would overlap is refused first.
pub(crate) fn load(config: &VmConfig, memory: &Memory) -> Result<BootRegisters, BootError> {
    let mut map = Map::new(memory);
    let mut kernel = open("the kernel", &config.kernel)?;
    let image = elf::inspect(&config.kernel, &mut kernel)?;
    if config.cmdline.len() > CMDLINE_MAX_BYTES || config.cmdline.contains('\0') {
        return Err(BootError::Cmdline);
    }
    for area in layout::boot_areas(config.cmdline.len(), config.cpus) {
        map.claim(area)?;
    }
    for segment in &image.segments {
        map.claim(Area::new("a segment of the kernel", segment.start, segment.bytes))?;
    }
    let mut loads = Vec::with_capacity(config.loads.len());
    for load in &config.loads {
        let file = open("the file to load", &load.file)?;
        let area =
            Area::new(format!("the file {}", load.file.display()), load.addr, length(&load.file, &file)?);
        map.claim(area.clone())?;
        loads.push((load, file, area));
    }
    let initramfs = match &config.initramfs {
        None => None,
        Some(path) => {
            let file = open("the initramfs", path)?;
            let area = map.claim_high("the initramfs", length(path, &file)?)?;
            Some((path, file, area))
        }
    };

    let entry = elf::load(&config.kernel, &mut kernel, memory)?;
    if !image.segments.iter().any(|s| s.holds(entry)) {
        return Err(BootError::EntryOutside { path: config.kernel.clone(), entry });
    }
    for (Load { file: path, .. }, mut file, area) in loads {
        copy("the file to load", path, &mut file, &area, memory)?;
    }
    let module = match initramfs {
        None => None,
        Some((path, mut file, area)) => {
            copy("the initramfs", path, &mut file, &area, memory)?;
            Some(area)
        }
    };
    pvh::write_boot_parameters(config, entry, module.as_ref(), memory)
}

fn open(what: &'static str, path: &Path) -> Result<File, BootError> {
    File::open(path).map_err(|source| BootError::File { what, path: path.to_owned(), source })
}

fn length(path: &Path, file: &File) -> Result<u64, BootError> {
    let failed = |source| BootError::File { what: "the length of", path: path.to_owned(), source };
    let meta = file.metadata().map_err(failed)?;
    if !meta.is_file() {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file")));
    }
    Ok(meta.len())
}

/// Reads a file straight into guest memory: it may be as large as that.
fn copy(
    what: &'static str,
    path: &Path,
    file: &mut File,
    area: &Area,
    memory: &Memory,
) -> Result<(), BootError> {
    let bytes = usize::try_from(area.bytes).expect("the area is within RAM");
    memory
        .mapping()
        .read_exact_volatile_from(GuestAddress(area.start), file, bytes)
        .map_err(|e| BootError::File { what, path: path.to_owned(), source: io::Error::other(e) })
}
