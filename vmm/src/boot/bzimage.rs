//! A bzImage: its setup header, and where in guest memory it wants to stand (the kernel's Documentation/arch/x86/boot.rst,
//! "The Real-Mode Kernel Header" and "64-bit Boot Protocol").

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use linux_loader::loader::bootparam::setup_header;
use vm_memory::{ByteValued as _, Bytes as _, GuestAddress};

use super::error::KernelError;
use super::kernel::Source;
use super::layout::LEGACY_HOLE;
use crate::memory::Memory;

/// Where the setup header begins, in the file and in `boot_params`.
const HEADER_AT: u64 = 0x1f1;
/// The bytes of it up to 0x202, the end of a short jump over the rest: the jump's operand, the last of them, is the length of that.
const FIXED_BYTES: usize = 0x202 - 0x1f1;
const BOOT_FLAG: u16 = 0xaa55;
/// "HdrS".
const MAGIC: u32 = 0x5372_6448;
/// The version that has the 64-bit entry's flag.
const VERSION_MIN: u16 = 0x20c;
const LOADED_HIGH: u8 = 1;
/// XLF_KERNEL_64: there is a 64-bit entry at 0x200.
const KERNEL_64: u16 = 1;
const ENTRY_OFFSET: u64 = 0x200;
const SECTOR: u64 = 512;
/// `syssize` counts these.
const PARAGRAPH: u64 = 16;

/// What a bzImage asks for.
#[derive(Debug)]
pub(crate) struct Image {
    /// Its setup header, as it stands in the file.
    pub(crate) header: setup_header,
    /// Where the part that runs in protected or long mode begins in the file.
    offset: u64,
    /// The length of that part.
    file_bytes: u64,
}

/// Whether the file has the magic numbers of a Linux boot sector with a setup header.
pub(crate) fn is_one<F: Read + Seek>(source: &mut Source<'_, F>) -> Result<bool, KernelError> {
    let mut bytes = [0; 0x206 - 0x1fe];
    match source.read("a setup header", 0x1fe, &mut bytes) {
        Ok(()) => Ok(bytes[..2] == BOOT_FLAG.to_le_bytes() && bytes[4..] == MAGIC.to_le_bytes()),
        Err(KernelError::Truncated { .. }) => Ok(false),
        Err(other) => Err(other),
    }
}

/// Reads the setup header and checks it against the file's length.
pub(crate) fn inspect<F: Read + Seek>(source: &mut Source<'_, F>) -> Result<Image, KernelError> {
    let bad = |what| Err(KernelError::BadSetupHeader { what });
    let mut raw = [0; FIXED_BYTES + 0xff];
    source.read("its setup header", HEADER_AT, &mut raw[..FIXED_BYTES])?;
    let bytes = FIXED_BYTES + usize::from(raw[FIXED_BYTES - 1]);
    source.read("its setup header", HEADER_AT, &mut raw[..bytes])?;
    let mut header = setup_header::default();
    // What an older header lacks stays zero; what a newer one adds is not known here.
    let known = bytes.min(size_of::<setup_header>());
    header.as_mut_slice()[..known].copy_from_slice(&raw[..known]);

    let version = header.version;
    if version < VERSION_MIN {
        let [minor, major] = version.to_le_bytes();
        return Err(KernelError::OldProtocol { major, minor });
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(KernelError::ZImage);
    }
    if header.xloadflags & KERNEL_64 == 0 {
        return Err(KernelError::Only32Bit);
    }
    // Zero stands for four, for historical reasons; and the boot sector comes first.
    let sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let offset = (sectors + 1) * SECTOR;
    let file_bytes = u64::from(header.syssize) * PARAGRAPH;
    if file_bytes <= ENTRY_OFFSET {
        return bad("its protected-mode part has no room for the 64-bit entry");
    }
    // Some build tools leave out the padding to the last paragraph.
    let end = offset + file_bytes;
    source.must_hold("its protected-mode part", offset, file_bytes - (PARAGRAPH - 1))?;
    let image = Image { header, offset, file_bytes: file_bytes.min(source.bytes() - offset) };
    let payload_end = u64::from(header.payload_offset) + u64::from(header.payload_length);
    if payload_end > file_bytes {
        return Err(KernelError::Truncated { what: "its payload", end: offset + payload_end, bytes: end });
    }
    if u64::from(header.init_size) < file_bytes {
        return bad("it needs less memory (init_size) than its file has bytes");
    }
    if header.relocatable_kernel != 0 && !header.kernel_alignment.is_power_of_two() {
        return bad("its alignment is not a power of two");
    }
    if !(LEGACY_HOLE.1..1 << 32).contains(&{ header.pref_address }) {
        return bad("its preferred address is below 1 MiB or above 4 GiB");
    }
    Ok(image)
}

impl Image {
    /// The guest memory that it needs, in one run, until it manages memory itself.
    pub(crate) fn bytes(&self) -> u64 {
        u64::from(self.header.init_size)
    }

    /// Where it wants to stand: a kernel that cannot be relocated moves there by itself, and one that can moves up to there.
    pub(crate) fn preferred(&self) -> u64 {
        self.header.pref_address
    }

    /// The multiples at which it may stand instead; none if it cannot be relocated.
    pub(crate) fn alignment(&self) -> Option<u64> {
        (self.header.relocatable_kernel != 0).then_some(u64::from(self.header.kernel_alignment))
    }

    /// The address behind the last at which the initramfs may end.
    pub(crate) fn initramfs_end(&self) -> u64 {
        u64::from(self.header.initrd_addr_max) + 1
    }

    /// The longest command line that it takes, bytes without the final zero.
    pub(crate) fn cmdline_max(&self) -> usize {
        self.header.cmdline_size as usize
    }

    /// Its 64-bit entry when it stands at `at`.
    pub(crate) fn entry(at: u64) -> u64 {
        at + ENTRY_OFFSET
    }

    /// Puts it to `at`, which is claimed.
    pub(crate) fn load(&self, at: u64, file: &mut File, memory: &Memory) -> Result<(), KernelError> {
        let bytes = usize::try_from(self.file_bytes).expect("less than 64 GiB");
        file.seek(SeekFrom::Start(self.offset)).map_err(KernelError::Read)?;
        memory
            .mapping()
            .read_exact_volatile_from(GuestAddress(at), file, bytes)
            .map_err(|e| KernelError::Read(io::Error::other(e)))
    }
}
