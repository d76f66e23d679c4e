//! Bytes of our own formats.

use dht::local::protocol::{Answer, DomainBlock, FailureCode, Request, take_frame};
use dht::{FoundOn, Holder, MemoryExtent};
use guest_images::pagestorm::options::Options;
use migration_proto::manifest::Entry;
use migration_proto::postcopy::FullName;
use migration_proto::stats::{DestinationStats, PostcopyStats};
use migration_proto::wire::{Message, Offer, Region, decode, encode};
use migration_proto::{Epoch, Extent, Layout, MigrationId, Mode, Span, VmId, literal};
use page::{DomainId, Gfn, PAGE_SIZE, PageHash, REGION_PAGES, RegionId, ShortId};
use sha2::{Digest as _, Sha256};
use vmm::boot::check_kernel;
use vmm::config::BootProtocol;
use vmm::devices::virtio::state::{QueueState, VirtioState};
use vmm::kvm::check_state;
use vmm::kvm::cpu::{CpuModel, Level};
use vmm::migrate::ticket::Ticket;
use vmm::snapshot::check_manifest;
use vmm::snapshot::manifest::{Manifest, PackRef, Run};
use vmm::spill::{Head, encode as encode_spill, parse as parse_spill};

use super::Target;

const DIGEST_BYTES: usize = 32;

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("a seed of text")
}

fn with_digest(bytes: &[u8]) -> Vec<u8> {
    [bytes, &Sha256::digest(bytes)].concat()
}

fn plain_offer(migration: MigrationId) -> Message {
    Message::Offer(Offer {
        migration,
        vm: VmId([1; 16]),
        epoch: Epoch(0),
        domain: DomainId([2; 16]),
        layout: Layout::new(vec![Extent { first: RegionId(0), regions: 1 }]).expect("a good layout"),
        machine: vec![],
        mode: Mode::Precopy,
        deltas: false,
        resume_for: Span(0),
    })
}

fn messages() -> Vec<Message> {
    let migration = MigrationId([7; 16]);
    let (root, id) = (PageHash([9; 32]), ShortId(0x1234_5678_9abc_def0));
    let layout = Layout::new(vec![
        Extent { first: RegionId(0), regions: 4 },
        Extent { first: RegionId(2048), regions: 1 },
    ]);
    let stats = DestinationStats { zero: 1, site: 300, wrong: 1 << 40, ..Default::default() };
    let postcopy = PostcopyStats { absent: 300, faults: 17, longest_wait_us: 52_000, ..Default::default() };
    let entries = vec![
        (Gfn(512), Entry::Zero),
        (Gfn(513), Entry::Zero),
        (Gfn(600), Entry::Name(id)),
        (Gfn(601), Entry::Duplicate(Gfn(3))),
    ];
    let page = [5; PAGE_SIZE];
    vec![
        Message::Offer(Offer {
            migration,
            vm: VmId([1; 16]),
            epoch: Epoch(3),
            domain: DomainId([2; 16]),
            layout: layout.expect("a good layout"),
            machine: br#"{"cpus":1}"#.to_vec(),
            mode: Mode::Hybrid,
            deltas: true,
            resume_for: Span::from_secs(300),
        }),
        plain_offer(migration),
        Message::Accept { shared: true, postcopy: true },
        Message::Refuse("it lacks avx2".to_owned()),
        Message::Abort { migration, reason: "cancelled".to_owned() },
        Message::Region(Region { region: RegionId(1), pushed: true, entries, root }),
        Message::FullNames { region: RegionId(1), names: vec![root; REGION_PAGES] },
        Message::RoundEnd { round: 2 },
        Message::State(vec![1; 100]),
        Message::Final { round: 3, root },
        Message::Literals(literal::encode(&[(Gfn(1), &page)])),
        Message::Stale(vec![(Gfn(1), id), (Gfn(700), id)]),
        Message::Want(vec![Gfn(1), Gfn(2), Gfn(1 << 20)]),
        Message::WantNames(RegionId(1)),
        Message::RoundDone { round: 2, stats },
        Message::Ready { root },
        Message::Commit { migration, epoch: Epoch(4) },
        Message::Serve { migration, epoch: Epoch(4), root },
        Message::Running { migration, stats },
        Message::NotRunning { migration },
        Message::Unknown { migration },
        Message::Released { migration },
        Message::Absent { region: RegionId(1), frames: vec![Gfn(512), Gfn(513), Gfn(1023)], root },
        Message::Absent { region: RegionId(0), frames: (0..512).step_by(2).map(Gfn).collect(), root },
        Message::PageNames {
            region: RegionId(1),
            entries: vec![
                (Gfn(512), FullName::Zero),
                (Gfn(513), FullName::Name(root)),
                (Gfn(1023), FullName::Duplicate(Gfn(513))),
            ],
        },
        Message::Fault(Gfn(1 << 20)),
        Message::FaultPage { gfn: Gfn(513), name: root, batch: literal::encode(&[(Gfn(513), &page)]) },
        Message::Complete { migration, stats, postcopy: Box::new(postcopy) },
        Message::Resume { migration, epoch: Epoch(3) },
        Message::Held { regions: vec![(RegionId(0), id), (RegionId(5), id)], last: true },
    ]
}

fn literals() -> Vec<Vec<u8>> {
    let (flat, mut mixed) = ([5; PAGE_SIZE], [0; PAGE_SIZE]);
    mixed.iter_mut().zip(0u32..).for_each(|(byte, at)| *byte = ((at * at) >> 3).to_le_bytes()[0]);
    // Against what the target says stands there.
    let delta = literal::Delta { gfn: Gfn(7), page: &mixed, base: &[3; PAGE_SIZE] };
    vec![
        literal::encode(&[(Gfn(1), &flat)]),
        literal::encode(&[(Gfn(1), &flat), (Gfn(2), &mixed), (Gfn(1 << 21), &flat)]),
        literal::encode_with(3, &[delta], &[]).batch,
        literal::encode_with(3, &[delta], &[(Gfn(9), &flat)]).batch,
    ]
}

/// A spill file of so many pages, without the digest at its end.
fn spill_file(pages: u64) -> Vec<u8> {
    let layout = Layout::new(vec![Extent { first: RegionId(0), regions: 1 }]);
    let whose = Head {
        migration: MigrationId([7; 16]),
        vm: VmId([1; 16]),
        epoch: Epoch(3),
        domain: DomainId([2; 16]),
        zero: PageHash([3; 32]),
        layout: layout.expect("a good layout"),
    };
    let page = [5; PAGE_SIZE];
    let content = |gfn: u64| gfn.is_multiple_of(2).then_some((PageHash([4; 32]), &page));
    let pages: Vec<_> = (0..pages).map(|gfn| (Gfn(gfn), content(gfn))).collect();
    let mut whole = encode_spill(&whose, &pages, &PageHash([9; 32]));
    whole.truncate(whole.len() - DIGEST_BYTES);
    whole
}

fn framed<T>(all: &[T], encode: impl Fn(&T, &mut Vec<u8>)) -> Vec<Vec<u8>> {
    let frame = |message: &T| {
        let mut out = Vec::new();
        encode(message, &mut out);
        out
    };
    all.iter().map(frame).collect()
}

fn requests() -> Vec<Request> {
    let ids = vec![ShortId(1), ShortId(u64::MAX)];
    let extents = vec![MemoryExtent { first_gfn: 0, pages: 512, file_offset: 0 }];
    vec![
        Request::Hello { version: 1 },
        Request::Register { name: "vm-1".to_owned(), extents },
        Request::Resolve { ids },
        Request::ReportWrong { id: ShortId(1) },
        Request::Status,
        Request::AddFile { path: "/boot/vmlinux".into() },
        Request::Locate { id: ShortId(1) },
    ]
}

fn answers() -> Vec<Answer> {
    let holder = Holder { rung: FoundOn::Host, peer_id: "12D3".to_owned(), what: "vm-1".to_owned() };
    let page = |byte| (ShortId(u64::from(byte)), Box::new([byte; PAGE_SIZE]));
    vec![
        Answer::Welcome { version: 1, domain: DomainBlock([3; 64]), peer_id: "12D3".to_owned() },
        Answer::Done,
        Answer::Pages { rung: FoundOn::Site, pages: vec![page(1)] },
        Answer::Missing { ids: vec![ShortId(2), ShortId(1)] },
        Answer::Status { json: b"{}".to_vec() },
        Answer::FileAdded { pages: 7 },
        Answer::Located { holders: vec![holder.clone(), holder] },
        Answer::Failed { code: FailureCode::Full, message: "no room".to_owned() },
    ]
}

fn section(length: usize, out: &mut Vec<u8>) {
    out.extend(u32::try_from(length).expect("short").to_le_bytes());
    out.resize(out.len() + length, 0);
}

fn count(value: u32, out: &mut Vec<u8>) {
    out.extend(4u32.to_le_bytes());
    out.extend(value.to_le_bytes());
}

/// A saved state of zeros, without its digest: sections as long as KVM's structures.
fn machine_state(devices: u32, cpus: u32) -> Vec<u8> {
    let mut out = b"TERNVMST".to_vec();
    out.extend(2u32.to_le_bytes());
    // The clock, three interrupt controllers, the timer; the serial port's registers and its input.
    [8, 520, 520, 520, 112, 9, 3].into_iter().for_each(|length| section(length, &mut out));
    count(devices, &mut out);
    for _ in 0..devices {
        count(2, &mut out);
        section(50, &mut out);
    }
    count(cpus, &mut out);
    for _ in 0..cpus {
        // CPUID, TSC rate, MP state, registers, system registers, no page-directory pointers, vectors, XCRs, debug, APIC, MSRs, events.
        [80, 4, 4, 144, 312, 0, 4096, 392, 128, 1024, 32, 64]
            .into_iter()
            .for_each(|length| section(length, &mut out));
    }
    out
}

fn manifest(packs: u32) -> Vec<u8> {
    let run = |first, pack| Run { first: Gfn(first), pack, page: 1, names: vec![PageHash([4; 32]); 2] };
    let manifest = Manifest {
        domain: page::Domain::unkeyed().id(),
        created_unix_ms: 1,
        machine: [1; 32],
        state: [2; 32],
        packs: (0..packs).map(|id| PackRef { id: id.into(), pages: 9 }).collect(),
        runs: (0..packs).map(|pack| run(u64::from(pack) * 100, pack)).collect(),
    };
    let mut bytes = manifest.encode();
    bytes.truncate(bytes.len() - DIGEST_BYTES);
    bytes
}

fn device_state() -> VirtioState {
    let queue =
        QueueState { size: 256, ready: true, descriptors: 0x1000, next_used: 65_535, ..Default::default() };
    let queues = vec![queue, QueueState::default()];
    VirtioState { kind: 2, name: "disk a".to_owned(), status: 15, queues, own: vec![1], ..Default::default() }
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// An ELF kernel of 256 bytes with one segment, and a PVH note if wanted.
fn elf(note: bool) -> Vec<u8> {
    let mut image = vec![0; 256];
    put(&mut image, 0, b"\x7fELF\x02\x01\x01");
    put(&mut image, 18, &[62]);
    put(&mut image, 24, &0x10_0000u64.to_le_bytes());
    put(&mut image, 32, &64u64.to_le_bytes());
    put(&mut image, 54, &[56, 0, if note { 2 } else { 1 }]);
    put(&mut image, 64, &[1]);
    put(&mut image, 64 + 24, &0x10_0000u64.to_le_bytes());
    put(&mut image, 64 + 32, &256u64.to_le_bytes());
    put(&mut image, 64 + 40, &512u64.to_le_bytes());
    if note {
        put(&mut image, 120, &[4]);
        put(&mut image, 120 + 8, &200u64.to_le_bytes());
        put(&mut image, 120 + 32, &20u64.to_le_bytes());
        put(&mut image, 200, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
        put(&mut image, 212, b"Xen\0\0\0\x10\0");
    }
    image
}

/// A bzImage of one setup sector and 1 KiB.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 2048];
    put(&mut image, 0x1f1, &[1]);
    put(&mut image, 0x1f4, &64u32.to_le_bytes());
    put(&mut image, 0x1fe, &[0x55, 0xaa, 0xeb, 0x66]);
    put(&mut image, 0x202, b"HdrS\x0f\x02");
    put(&mut image, 0x211, &[1]);
    put(&mut image, 0x22c, &u32::MAX.to_le_bytes());
    put(&mut image, 0x230, &0x20_0000u32.to_le_bytes());
    put(&mut image, 0x234, &[1, 21, 1, 0]);
    put(&mut image, 0x238, &2047u32.to_le_bytes());
    put(&mut image, 0x258, &0x10_0000u64.to_le_bytes());
    put(&mut image, 0x260, &0x10_0000u32.to_le_bytes());
    image
}

fn baselines() -> Vec<Vec<u8>> {
    let model = |level: Level| CpuModel {
        vendor: "GenuineIntel".to_owned(),
        physical_address_bits: 46,
        features: level.shown(),
    };
    let text = |level| model(level).to_json().expect("strings can be written").into_bytes();
    [Level::V2, Level::V3, Level::V4].into_iter().map(text).collect()
}

pub(super) fn all() -> Vec<Target> {
    let key = "ab".repeat(32);
    let tickets = ["127.0.0.1:7000".to_owned(), format!("[::1]:7000#{key}"), format!("b1.example:1#{key}")];
    let lines = [Options::default().to_string(), "rate=5 content=text idle=spin seed=7".to_owned()];
    let bytes = |texts: &[String]| texts.iter().map(|text| text.clone().into_bytes()).collect();
    let target = |name, seeds, takes| Target { name, seeds, takes };
    vec![
        target("wire", messages().iter().map(encode).collect(), |b| decode(b).is_ok()),
        target("literal", literals(), |b| literal::decode_with(b, |_, base| base.fill(3)).is_ok()),
        target(
            "local_request",
            framed(&requests(), Request::encode),
            |b| matches!(take_frame(b), Ok(Some((frame, _))) if Request::decode(frame).is_ok()),
        ),
        target(
            "local_answer",
            framed(&answers(), Answer::encode),
            |b| matches!(take_frame(b), Ok(Some((frame, _))) if Answer::decode(frame).is_ok()),
        ),
        target("virtio_state", vec![device_state().encode(), VirtioState::default().encode()], |b| {
            VirtioState::decode(b).is_ok()
        }),
        target("machine_state", vec![machine_state(0, 1), machine_state(2, 2)], |b| {
            check_state(&with_digest(b)).is_ok()
        }),
        target("snapshot_manifest", vec![manifest(0), manifest(3)], |b| {
            check_manifest(&with_digest(b)).is_ok()
        }),
        target("spill", vec![spill_file(0), spill_file(3)], |b| {
            parse_spill(with_digest(b).as_slice()).is_ok()
        }),
        target("kernel", vec![elf(false), elf(true), bzimage()], |b| {
            check_kernel(b, BootProtocol::Auto).is_ok()
        }),
        target("cpu_baseline", baselines(), |b| CpuModel::parse(b).is_ok()),
        target("ticket", bytes(&tickets), |b| text(b).parse::<Ticket>().is_ok()),
        target("guest_cmdline", bytes(&lines), |b| Options::parse(text(b)).is_ok()),
    ]
}
