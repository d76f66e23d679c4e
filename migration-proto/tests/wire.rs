//! The bytes of the messages that the two versions of the wire say differently, and of those that post-copy added.

use migration_proto::postcopy::FullName;
use migration_proto::stats::{DestinationStats, PostcopyStats};
use migration_proto::wire::{Message, Offer, Probe, WireError, decode, encode};
use migration_proto::{Epoch, Extent, Layout, MigrationId, Mode, Span, VmId, limits, literal};
use page::{DomainId, Gfn, PAGE_SIZE, PageHash, RegionId, ShortId};
use proptest::prelude::*;

const ROOT: PageHash = PageHash([9; 32]);
const MIGRATION: MigrationId = MigrationId([7; 16]);

fn offer(mode: Mode, deltas: bool) -> Message {
    Message::Offer(offered(mode, deltas))
}

fn offer_to_resume(mode: Mode, deltas: bool, resume_for: Span) -> Message {
    Message::Offer(Offer { resume_for, ..offered(mode, deltas) })
}

fn offered(mode: Mode, deltas: bool) -> Offer {
    Offer {
        migration: MIGRATION,
        vm: VmId([1; 16]),
        epoch: Epoch(3),
        domain: DomainId([2; 16]),
        layout: Layout::new(vec![Extent { first: RegionId(0), regions: 4 }]).expect("one extent"),
        machine: b"{}".to_vec(),
        mode,
        deltas,
        resume_for: Span(0),
    }
}

fn messages() -> Vec<Message> {
    let postcopy = PostcopyStats { absent: 1 << 30, faults: 17, reconnects: 1, ..PostcopyStats::default() };
    let stats = DestinationStats { zero: 1, root_mismatches: 2, ..DestinationStats::default() };
    let entries = vec![
        (Gfn(512), FullName::Zero),
        (Gfn(513), FullName::Name(ROOT)),
        (Gfn(1023), FullName::Duplicate(Gfn(3))),
    ];
    vec![
        offer(Mode::Precopy, false),
        offer(Mode::Precopy, true),
        offer(Mode::Hybrid, false),
        offer(Mode::Postcopy, true),
        offer_to_resume(Mode::Precopy, false, Span::from_secs(300)),
        offer_to_resume(Mode::Hybrid, true, limits::RESUME_FOR_MAX),
        Message::Resume { migration: MIGRATION, epoch: Epoch(300) },
        Message::Held {
            regions: vec![(RegionId(0), ShortId(7)), (RegionId(limits::REGIONS - 1), ShortId(u64::MAX))],
            last: false,
        },
        Message::Held { regions: vec![], last: true },
        Message::Accept { shared: false, postcopy: true },
        Message::Absent { region: RegionId(1), frames: vec![Gfn(512), Gfn(1023)], root: ROOT },
        Message::Absent { region: RegionId(0), frames: (0..512).step_by(2).map(Gfn).collect(), root: ROOT },
        Message::PageNames { region: RegionId(1), entries },
        Message::PageNames { region: RegionId(2), entries: vec![] },
        Message::Fault(Gfn(1 << 33)),
        Message::FaultPage { gfn: Gfn(5), name: ROOT, batch: literal::encode(&[(Gfn(5), &[3; PAGE_SIZE])]) },
        Message::Complete { migration: MIGRATION, stats, postcopy: Box::new(postcopy) },
        Message::Probe(Probe::Ask {
            offer: offered(Mode::Hybrid, true),
            ids: vec![ShortId(1), ShortId(u64::MAX)],
        }),
        Message::Probe(Probe::Answer { shared: true, postcopy: false, held: vec![true; 16] }),
        Message::Probe(Probe::Answer { shared: false, postcopy: true, held: vec![false, true, false] }),
        Message::Probe(Probe::Burst(vec![7; 100])),
        Message::Probe(Probe::Carried { bytes_per_s: 1 << 40, enough: true }),
    ]
}

#[test]
fn every_message_comes_back_and_none_does_when_it_is_cut_short() {
    for message in messages() {
        let bytes = encode(&message);
        assert_eq!(decode(&bytes).as_ref(), Ok(&message));
        // Of a batch the protocol knows no length: its own decoder does.
        let fixed = match &message {
            Message::FaultPage { batch, .. } => batch.len(),
            Message::Probe(Probe::Burst(bytes)) => bytes.len(),
            _ => 0,
        };
        for cut in 0..bytes.len() - fixed {
            assert!(decode(&bytes[..cut]).is_err(), "{message:?} cut to {cut} bytes");
        }
    }
}

/// Written down from version 1's encoder: kind 1, version 1, and no mode at the end.
#[test]
fn an_offer_of_version_1_is_one_of_pre_copy_and_pre_copy_is_offered_in_version_1() {
    let mut bytes = vec![1, 1];
    bytes.extend([7; 16]);
    bytes.extend([1; 16]);
    bytes.push(3);
    bytes.extend([2; 16]);
    bytes.extend([1, 0, 4, 2]);
    bytes.extend(b"{}");
    assert_eq!(decode(&bytes), Ok(offer(Mode::Precopy, false)));
    assert_eq!(encode(&offer(Mode::Precopy, false)), bytes);
    bytes[1] = 2;
    assert_eq!(decode(&bytes), Err(WireError::Truncated { field: "mode" }));
    bytes[1] = 3;
    assert_eq!(decode(&bytes), Err(WireError::UnknownVersion(3)));
    // What version 1 said in its Accept, and takes.
    assert_eq!(encode(&Message::Accept { shared: true, postcopy: false }), [2, 1]);
}

proptest! {
    #[test]
    fn any_bytes_are_a_message_that_comes_back_or_an_error(
        kind in prop_oneof![Just(1u8), Just(2), 21u8..=28, Just(64)],
        bytes in prop::collection::vec(any::<u8>(), 0..400),
    ) {
        let frame = [&[kind], &bytes[..]].concat();
        if let Ok(message) = decode(&frame) {
            prop_assert_eq!(decode(&encode(&message)), Ok(message));
        }
    }
}
