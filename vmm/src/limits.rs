//! Every bound of this crate.

use std::time::Duration;

/// Connections to the control socket at one time; more wait in the kernel's backlog.
pub const CONTROL_CONNECTIONS: usize = 64;
/// The longest request body, bytes.
pub const REQUEST_BODY_BYTES: usize = 16 * 1024;
/// The longest response body that the client takes, bytes (event streams are bounded by the line).
pub const RESPONSE_BODY_BYTES: usize = 1024 * 1024;
/// The longest line of an event stream that the client takes, bytes.
pub const EVENT_LINE_BYTES: usize = 64 * 1024;
/// Events that a slow reader may be behind before it loses the oldest and is told so.
pub const EVENT_BACKLOG: usize = 256;
/// The shortest time between two progress events.
pub const PROGRESS_PERIOD: Duration = Duration::from_millis(100);
/// How long the client waits for an answer that does not stand for long work.
pub const CLIENT_ANSWER: Duration = Duration::from_secs(30);
/// How long a cancelled migration may take to let the VM go on here before the caller is told that it still ends.
pub const CANCEL_WAIT: Duration = Duration::from_secs(20);
/// How long a migration may stand in doubt before the request that started it is answered so; the source goes on asking.
pub const IN_DOUBT_ANSWER: Duration = Duration::from_secs(30);

/// How long the answer to `stop` waits for the VM's threads: they have been told, and the VM does not run any more.
pub const STOP_ANSWER: Duration = Duration::from_secs(2);
const _: () = assert!(STOP_ANSWER.as_secs() < DRAIN.as_secs());
/// How long an ending process lets answers that are under way reach their operators.
pub const DRAIN: Duration = Duration::from_secs(5);
/// The first wait before the site's peer is tried again; doubles up to [`SITE_RETRY_LONGEST`].
pub const SITE_RETRY_FIRST: Duration = Duration::from_millis(250);
/// The longest wait before the site's peer is tried again.
pub const SITE_RETRY_LONGEST: Duration = Duration::from_secs(10);
/// How long a VM's process that has given its VM away waits for the site's peer to copy the memory that it leaves behind.
pub const RETAIN: Duration = Duration::from_secs(300);
/// The longest path of a Unix socket, bytes, without its final NUL (`sun_path` of unix(7)).
pub const SOCKET_PATH_BYTES: usize = 107;
/// The longest `--downtime`, milliseconds.
pub const DOWNTIME_MS: u64 = 60 * 60 * 1000;
/// The longest `--resume-for`, milliseconds.
pub const RESUME_FOR_MS: u64 = migration_proto::limits::RESUME_FOR_MAX.millis();
/// The longest name of a VM, bytes.
pub const NAME_BYTES: usize = 64;
/// The longest `to` of a migration, bytes.
pub const DESTINATION_BYTES: usize = 512;
/// The most that a guest is slowed down, percent of the time that its virtual CPUs rest.
pub const THROTTLE_PERCENT: u8 = 99;
/// How long the virtual CPUs of a throttled guest run at a time; at 99 percent they rest for one second after it.
pub const THROTTLE_SLICE: Duration = Duration::from_millis(10);
/// Page faults of absent frames that are read at once.
pub const FAULTS_A_READ: usize = 16;
/// The most virtual CPUs of a VM: as many as the MultiProcessor table has room for in one kibibyte.
pub const CPUS_MAX: u8 = 32;
/// RAM comes in multiples of this: one region of the manifest.
pub const MEMORY_GRANULE_BYTES: u64 = 2 << 20;
/// The most RAM that a VM may have. KVM's memory slots and this build's frame numbers would go further.
pub const MEMORY_MAX_BYTES: u64 = 1 << 40;
/// RAM below 4 GiB ends here at the latest: above it stand the interrupt controllers and, later, devices.
pub const LOW_RAM_END: u64 = 3 << 30;
/// The longest kernel command line, bytes, without its final zero.
pub const CMDLINE_MAX_BYTES: usize = 65_535;
/// What Linux on x86 keeps of its command line, bytes: COMMAND_LINE_SIZE less the final zero (arch/x86/include/asm/setup.h).
pub const LINUX_CMDLINE_BYTES: usize = 2047;
/// The most program headers of a kernel's ELF file that are looked at.
pub const ELF_SEGMENTS_MAX: u16 = 128;
/// The most bytes of one segment of notes in a kernel's ELF file that are looked at.
pub const ELF_NOTES_MAX_BYTES: u64 = 1 << 20;
/// Serial output that waits for a slow reader, bytes. What comes beyond it is dropped: a reader must not stall a guest.
pub const SERIAL_PENDING_MAX_BYTES: usize = 1 << 20;
/// The longest saved state that is read, bytes: well above what [`CPUS_MAX`] virtual CPUs need.
pub const STATE_MAX_BYTES: usize = 8 << 20;
/// The longest CPU baseline file, bytes.
pub const BASELINE_MAX_BYTES: usize = 64 * 1024;
/// Widths of physical addresses that a CPU baseline may have: from the first 64-bit processors to what the architecture allows.
pub const PHYSICAL_ADDRESS_BITS: std::ops::RangeInclusive<u8> = 32..=52;
/// The most model-specific registers, and CPUID entries, of one virtual CPU: KVM's own bound.
pub const STATE_ENTRIES_MAX: usize = 256;
/// A virtual CPU's vector state, bytes, where the processor has no more than the first structure of KVM holds.
pub const STATE_XSAVE_MIN_BYTES: usize = 4096;
/// The most of a virtual CPU's vector state, bytes: the tile registers of AMX need 11 KiB.
pub const STATE_XSAVE_MAX_BYTES: usize = 64 * 1024;
/// The most devices in a saved state.
pub const STATE_DEVICES_MAX: usize = 64;
/// The most of one device's saved state, bytes.
pub const STATE_DEVICE_MAX_BYTES: usize = 64 * 1024;
/// The most virtio devices: one for each pin of the I/O APIC that no older device has, 5 to 23.
pub const DEVICES_MAX: usize = 19;
/// The most queues of a device.
pub const QUEUES_MAX: usize = 8;
/// The most descriptors of one request: the segments that a disk takes, its header and its status.
pub const CHAIN_DESCRIPTORS_MAX: usize = 128;
/// The most requests that a device takes from one queue before it looks at the others.
pub const CHAINS_A_LOOK: usize = 64;
/// The longest name of a device, bytes.
pub const DEVICE_NAME_BYTES: usize = 64;
/// The most state that a device may have besides its registers, bytes.
pub const DEVICE_STATE_MAX_BYTES: usize = 32 * 1024;
/// The most random bytes that one request gets; its driver asks again.
pub const RANDOM_REQUEST_BYTES: usize = 64 * 1024;
/// The longest segment of a disk's request, bytes.
pub const BLOCK_SEGMENT_BYTES: u32 = 64 * 1024;
/// The most segments of a disk's request, besides its header and its status.
pub const BLOCK_SEGMENTS: u32 = 126;
/// The longest request of a disk, bytes: parking waits for one at most.
pub const BLOCK_REQUEST_BYTES: usize = BLOCK_SEGMENT_BYTES as usize * BLOCK_SEGMENTS as usize;
/// The most ranges of one discard, or of one write of zeros.
pub const BLOCK_RANGES: u32 = 16;
/// The longest range of a discard, sectors of 512 bytes.
pub const BLOCK_DISCARD_SECTORS: u32 = 256 << 11;
/// The longest range of a write of zeros, sectors of 512 bytes: a host that cannot do it otherwise writes them.
pub const BLOCK_WRITE_ZEROES_SECTORS: u32 = 2 << 11;
/// The longest id of a disk, bytes: what a driver can ask for (virtio 1.2, 5.2.6).
pub const DISK_ID_BYTES: usize = 20;
/// The longest packet, bytes, with the 12 of its virtio header: Ethernet's header and 64 KiB that the receiver cuts into segments.
pub const PACKET_MAX_BYTES: usize = 12 + 14 + 65_536;
/// The shortest packet that a guest may send, bytes: Ethernet's header.
pub const PACKET_MIN_BYTES: usize = 14;
/// The most pages that a guest may give its balloon in one request (Linux gives 256).
pub const BALLOON_PAGES_A_REQUEST: usize = 16 * 1024;
/// The most memory in one report of free pages, bytes (Linux reports at most 32 blocks of 4 MiB).
pub const BALLOON_REPORT_BYTES: usize = 1 << 30;
/// Input of the console that waits for the guest, bytes.
pub const CONSOLE_INPUT_BYTES: usize = 4096;
/// The most output in one request to the console, bytes.
pub const CONSOLE_REQUEST_BYTES: usize = 64 * 1024;
/// The longest id of a network device, bytes.
pub const NET_ID_BYTES: usize = 32;
/// What a guest can trigger is logged at most this often in [`LOG_PERIOD`].
pub const LOG_BURST: u32 = 5;
/// See [`LOG_BURST`].
pub const LOG_PERIOD: Duration = Duration::from_secs(10);

const _: () = assert!(BLOCK_SEGMENTS as usize + 2 <= CHAIN_DESCRIPTORS_MAX);
const _: () = assert!(DEVICES_MAX <= STATE_DEVICES_MAX);
const _: () =
    assert!(DEVICE_STATE_MAX_BYTES + DEVICE_NAME_BYTES + QUEUES_MAX * 64 + 256 < STATE_DEVICE_MAX_BYTES);
/// The longest name of a snapshot, bytes.
pub const SNAPSHOT_NAME_BYTES: usize = 64;
/// The most pages of one pack: 1 GiB. A bigger snapshot has several.
pub const PACK_PAGES_MAX: u32 = 1 << 18;
/// Pages gathered before they are written to a pack: 1 MiB.
pub const PACK_BUFFER_PAGES: usize = 256;
/// The most packs that one snapshot refers to; a directory may have half as many before its pages are no longer looked up.
pub const SNAPSHOT_PACKS_MAX: usize = 1 << 15;
/// Pages that a worker reads and names, or reads and verifies, at once: 1 MiB.
pub const SNAPSHOT_BATCH_PAGES: usize = 256;
/// Batches that wait for the one thread that looks them up and writes them.
pub const SNAPSHOT_BATCHES: usize = 8;
/// What is left of a running VM's memory is taken while it stands still when it is no more than this: 4 MiB.
pub const SNAPSHOT_STILL_PAGES: u64 = 1024;
/// The most walks over a running VM's memory before it is made to stand still.
pub const SNAPSHOT_ROUNDS_MAX: u32 = 8;
/// The longest description of a machine in a snapshot, bytes.
pub const SNAPSHOT_DESCRIPTION_BYTES: u64 = 1 << 20;
/// How often a VM's two clocks are read to find readings that lie close together.
pub const CLOCK_READINGS: usize = 8;

/// The longest manifest, bytes: a name and a run for every page of the biggest VM.
pub const MANIFEST_MAX_BYTES: u64 = (MEMORY_MAX_BYTES >> 12) * 64 + (1 << 20);

const _: () = assert!((PACK_PAGES_MAX as u64) * (SNAPSHOT_PACKS_MAX as u64) / 2 > MEMORY_MAX_BYTES >> 12);
const _: () = assert!(LOW_RAM_END.is_multiple_of(MEMORY_GRANULE_BYTES));
const _: () = assert!(
    CPUS_MAX as usize * (STATE_ENTRIES_MAX * 64 + 16_384 + STATE_XSAVE_MAX_BYTES)
        + STATE_DEVICES_MAX * STATE_DEVICE_MAX_BYTES
        < STATE_MAX_BYTES
);
const _: () =
    assert!(STATE_XSAVE_MIN_BYTES.is_multiple_of(4) && STATE_XSAVE_MAX_BYTES > STATE_XSAVE_MIN_BYTES);
