//! What can be wrong with a kernel, and with what is put into memory beside it.

use std::io;
use std::path::PathBuf;

use super::layout::Area;
use crate::limits::CMDLINE_MAX_BYTES;

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
    /// A kernel that cannot be booted.
    #[error("{path} cannot be booted")]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: KernelError,
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
    /// No gap for the kernel.
    #[error("no free {bytes} bytes of guest memory from {from:#x} on for the kernel: raise --memory")]
    NoRoomForKernel {
        /// What it needs until it manages memory itself.
        bytes: u64,
        /// Where it would go first.
        from: u64,
    },
    /// No gap for the initial RAM file system.
    #[error("no free {bytes} bytes of guest memory below {below:#x} for the initramfs: raise --memory")]
    NoRoomForInitramfs {
        /// Its length.
        bytes: u64,
        /// Where it must end.
        below: u64,
    },
    /// A command line that holds a zero.
    #[error("the kernel's command line holds a zero byte: leave it out")]
    CmdlineZero,
    /// A command line that is too long.
    #[error("the kernel's command line has {bytes} bytes{with_devices} and may have {most}: shorten it")]
    CmdlineLength {
        /// Its length.
        bytes: usize,
        /// Says so if the words that name the devices are among them.
        with_devices: &'static str,
        /// The longest that this kernel takes, [`CMDLINE_MAX_BYTES`] if it does not say.
        most: usize,
    },
}

const _: () = assert!(CMDLINE_MAX_BYTES < 1 << 16, "the command line has 64 KiB of guest memory");

/// What is wrong with a kernel's file.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// It cannot be read.
    #[error("reading it failed")]
    Read(#[source] io::Error),
    /// It is shorter than it says.
    #[error("it is truncated: {what} would end at byte {end}, and it has {bytes}; get the whole file")]
    Truncated {
        /// What is missing.
        what: &'static str,
        /// Where that would end.
        end: u64,
        /// The file's length.
        bytes: u64,
    },
    /// Neither of the formats.
    #[error(
        "it is {what} and no kernel that can be started: give a vmlinux (ELF) or a bzImage, as /boot/vmlinuz-* are"
    )]
    UnknownFormat {
        /// What it looks like.
        what: &'static str,
    },
    /// For another processor.
    #[error("it is not for 64-bit x86 ({what}): give a kernel built with CONFIG_X86_64=y")]
    WrongMachine {
        /// What it is for.
        what: String,
    },
    /// An ELF file that makes no sense.
    #[error("its ELF headers are broken ({what}): build or get it again")]
    BadElf {
        /// What is wrong.
        what: &'static str,
    },
    /// No PVH entry where one was asked for.
    #[error("it has no PVH entry note: build it with CONFIG_PVH=y, or start it with --boot linux64")]
    NoPvhNote,
    /// A bzImage has only the Linux protocol's entry.
    #[error(
        "a bzImage has no PVH entry: give the vmlinux (scripts/extract-vmlinux gets it), or leave --boot away"
    )]
    BzImageByPvh,
    /// Its entry is not in anything that it loads.
    #[error("its entry {entry:#x} is in none of the segments that it loads: build or get it again")]
    EntryOutside {
        /// The entry.
        entry: u64,
    },
    /// Its entry is where no protocol can begin.
    #[error(
        "its entry {entry:#x} is above 4 GiB, where no kernel is entered: link it to a lower physical address"
    )]
    EntryHigh {
        /// The entry.
        entry: u64,
    },
    /// A zImage, for low memory.
    #[error("it is a zImage, which loads below 1 MiB: give a bzImage or a vmlinux")]
    ZImage,
    /// Too old to have a 64-bit entry.
    #[error(
        "it speaks version {major}.{minor} of the Linux boot protocol, and the 64-bit entry needs 2.12: give Linux 3.8 or \
         later, or its vmlinux"
    )]
    OldProtocol {
        /// The version before the point.
        major: u8,
        /// The version after the point.
        minor: u8,
    },
    /// A bzImage without the 64-bit entry.
    #[error("it has only a 32-bit entry: give a kernel built with CONFIG_X86_64=y")]
    Only32Bit,
    /// A bzImage that makes no sense.
    #[error("its setup header is broken ({what}): build or get it again")]
    BadSetupHeader {
        /// What is wrong.
        what: &'static str,
    },
}
