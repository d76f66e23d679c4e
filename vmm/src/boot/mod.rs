//! Putting a kernel, its initial RAM file system and other files into guest memory, and starting it: by the PVH protocol or by
//! Linux's 64-bit one.

use std::fs::File;
use std::io;
use std::path::Path;

use vm_memory::{Bytes as _, GuestAddress};

use crate::config::VmConfig;
use crate::limits::{CMDLINE_MAX_BYTES, LINUX_CMDLINE_BYTES, LOW_RAM_END};
use crate::memory::Memory;

mod acpi;
pub(crate) mod bzimage;
mod cmdline;
pub(crate) mod elf;
mod error;
pub(crate) mod kernel;
pub(crate) mod layout;
pub(crate) mod linux64;
pub(crate) mod mptable;
pub(crate) mod pvh;
mod restart;

pub use error::{BootError, KernelError};
use kernel::Kernel;
pub use kernel::check_kernel;
use layout::{ACPI_TABLES, Area, CMDLINE, MP_TABLE, Map};

/// A device whose registers stand in memory, as the kernel is told of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MmioDevice {
    /// The guest-physical address of its first register, below 4 GiB.
    pub(crate) base: u64,
    /// The length of its registers.
    pub(crate) bytes: u64,
    /// Its interrupt line: edge-triggered, active high.
    pub(crate) gsi: u32,
}

/// How the boot processor is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// 32-bit protected mode without paging; `info` goes to EBX.
    Protected,
    /// 64-bit mode on these page tables; `info` goes to RSI.
    Long { page_tables: u64 },
}

/// The registers of the boot processor that a protocol leaves to the loader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BootRegisters {
    pub(crate) mode: Mode,
    pub(crate) entry: u64,
    /// What the kernel finds its parameters by.
    pub(crate) info: u64,
    pub(crate) gdt_base: u64,
    pub(crate) gdt_limit: u16,
    pub(crate) code_selector: u16,
    pub(crate) data_selector: u16,
    pub(crate) tss_selector: u16,
}

/// A file that is going to `area`.
struct Placed<'a> {
    what: &'static str,
    path: &'a Path,
    file: File,
    area: Area,
}

/// Puts everything into memory and says with which registers the boot processor starts.
///
/// # Errors
/// [`BootError`]. Nothing is written over anything else: what would overlap is refused first.
pub(crate) fn load(
    config: &VmConfig,
    devices: &[MmioDevice],
    memory: &Memory,
) -> Result<BootRegisters, BootError> {
    let faulty = |source| BootError::Kernel { path: config.kernel.clone(), source };
    let mut file = open("the kernel", &config.kernel)?;
    let kernel = kernel::inspect(&mut file, config.boot).map_err(faulty)?;
    let named = if config.acpi { &[] } else { devices };
    let cmdline = cmdline::build(&config.cmdline, named, cmdline_max(&kernel))?;
    if cmdline.len() > LINUX_CMDLINE_BYTES {
        let bytes = cmdline.len();
        tracing::warn!(bytes, "Linux reads only the first {LINUX_CMDLINE_BYTES} bytes of its command line");
    }

    let mut map = Map::new(memory);
    for area in layout::boot_areas(cmdline.len()) {
        map.claim(area)?;
    }
    let mut files = place_files(config, &mut map)?;
    let kernel_at = place_kernel(&kernel, &mut map)?;
    let initramfs = place_initramfs(config, &kernel, &mut map)?;
    let initramfs_area = initramfs.as_ref().map(|i| i.area.clone());
    files.extend(initramfs);

    match &kernel {
        Kernel::Pvh(image, _) | Kernel::Linux64(image, _) => image.load(&mut file, memory),
        Kernel::BzImage(image) => image.load(kernel_at, &mut file, memory),
    }
    .map_err(faulty)?;
    for placed in files {
        copy(placed, memory)?;
    }
    let mut structures = vec![(CMDLINE, [cmdline.as_bytes(), &[0]].concat())];
    structures.push((restart::ENTRY, restart::CODE.to_vec()));
    let rsdp = if config.acpi { ACPI_TABLES } else { 0 };
    structures.push(match config.acpi {
        true => (ACPI_TABLES, acpi::build(ACPI_TABLES, config.cpus, devices)),
        false => (MP_TABLE, mptable::build(config.cpus, MP_TABLE)),
    });
    let runs = layout::memory_map(memory.extents());
    let told = |header| linux64::Told {
        header,
        initramfs: initramfs_area.as_ref(),
        map: &runs,
        rsdp,
        cmdline_bytes: cmdline.len(),
    };
    let registers = match &kernel {
        Kernel::Pvh(_, entry) => {
            structures.extend(pvh::structures(initramfs_area.as_ref(), &runs, rsdp));
            pvh::registers(*entry)
        }
        Kernel::Linux64(_, entry) => {
            structures.extend(linux64::structures(&told(None)));
            linux64::registers(*entry)
        }
        Kernel::BzImage(image) => {
            structures.extend(linux64::structures(&told(Some((&image.header, kernel_at)))));
            linux64::registers(bzimage::Image::entry(kernel_at))
        }
    };
    for (at, bytes) in structures {
        memory.mapping().write_slice(&bytes, GuestAddress(at)).expect("the areas were claimed in RAM");
    }
    Ok(registers)
}

fn cmdline_max(kernel: &Kernel) -> usize {
    match kernel {
        Kernel::Pvh(..) | Kernel::Linux64(..) => CMDLINE_MAX_BYTES,
        Kernel::BzImage(image) => image.cmdline_max().min(CMDLINE_MAX_BYTES),
    }
}

/// Claims the kernel's place, and says where a bzImage goes.
fn place_kernel(kernel: &Kernel, map: &mut Map<'_>) -> Result<u64, BootError> {
    match kernel {
        Kernel::Pvh(image, entry) | Kernel::Linux64(image, entry) => {
            for segment in &image.segments {
                map.claim(Area::new("a segment of the kernel", segment.start, segment.bytes))?;
            }
            Ok(*entry)
        }
        Kernel::BzImage(image) => match image.alignment() {
            Some(alignment) => {
                map.claim_low("the kernel", image.bytes(), image.preferred(), alignment).map(|a| a.start)
            }
            None => {
                map.claim(Area::new("the kernel", image.preferred(), image.bytes()))?;
                Ok(image.preferred())
            }
        },
    }
}

fn place_files<'a>(config: &'a VmConfig, map: &mut Map<'_>) -> Result<Vec<Placed<'a>>, BootError> {
    let mut placed = Vec::with_capacity(config.loads.len() + 1);
    for load in &config.loads {
        let (what, path) = ("the file to load", load.file.as_path());
        let file = open(what, path)?;
        let area = Area::new(format!("the file {}", path.display()), load.addr, length(path, &file)?);
        map.claim(area.clone())?;
        placed.push(Placed { what, path, file, area });
    }
    Ok(placed)
}

fn place_initramfs<'a>(
    config: &'a VmConfig,
    kernel: &Kernel,
    map: &mut Map<'_>,
) -> Result<Option<Placed<'a>>, BootError> {
    let Some(path) = &config.initramfs else { return Ok(None) };
    let what = "the initramfs";
    let below = match kernel {
        Kernel::Pvh(..) | Kernel::Linux64(..) => LOW_RAM_END,
        Kernel::BzImage(image) => image.initramfs_end(),
    };
    let file = open(what, path)?;
    let area = map.claim_high(what, length(path, &file)?, below)?;
    Ok(Some(Placed { what, path, file, area }))
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
fn copy(mut placed: Placed<'_>, memory: &Memory) -> Result<(), BootError> {
    let bytes = usize::try_from(placed.area.bytes).expect("the area is within RAM");
    memory
        .mapping()
        .read_exact_volatile_from(GuestAddress(placed.area.start), &mut placed.file, bytes)
        .map_err(|e| BootError::File {
            what: placed.what,
            path: placed.path.to_owned(),
            source: io::Error::other(e),
        })
}
