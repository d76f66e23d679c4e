//! Bugs that the simulation found, each told as a story over the public interface.

use migration_proto::destination::{self, Destination, SiteRung};
use migration_proto::manifest::Entry;
use migration_proto::source::{self, LiteralsSent, Source, SourceConfig, SourceProgress};
use migration_proto::switchover::{Fate, Ledger};
use migration_proto::timer::{Link, Time};
use migration_proto::wire::{Channel, Message, Offer, Region};
use migration_proto::{Epoch, Extent, Layout, MigrationId, Mode, Span, VmId, limits};
use page::{Domain, Gfn, PAGE_SIZE, PageHash, PageSet, REGION_PAGES, RegionId, VerifiedPage, root_of};

const MIGRATION: MigrationId = MigrationId([1; 16]);
const VM: VmId = VmId([2; 16]);
const LINK: Link = Link { rtt: Span::from_millis(50), bytes_per_s: 12_500_000 };
/// So near that asking for a page takes less time than sending it.
const NEAR: Link = Link { rtt: Span(0), ..LINK };
const NOW: Time = Time(1);

fn layout() -> Layout {
    Layout::new(vec![Extent { first: RegionId(0), regions: 1 }]).expect("one region")
}

fn page(fill: u8) -> VerifiedPage {
    VerifiedPage::new(&Domain::unkeyed(), Box::new([fill; PAGE_SIZE]))
}

fn name(fill: u8) -> PageHash {
    page(fill).name()
}

/// A destination that receives memory, and what it does.
struct There(Destination);

impl There {
    fn new(with_site: bool) -> Self {
        let domain = Domain::unkeyed();
        let offer = Offer {
            migration: MIGRATION,
            vm: VM,
            epoch: Epoch(0),
            domain: domain.id(),
            layout: layout(),
            machine: vec![],
            mode: Mode::Precopy,
            deltas: false,
            resume_for: Span(0),
        };
        let mut there = Self(Destination::new(NOW, offer, with_site.then_some(&domain), LINK, true));
        there.0.prepared(NOW);
        there.drain();
        there
    }

    fn drain(&mut self) -> Vec<destination::Action> {
        std::iter::from_fn(|| self.0.poll()).collect()
    }

    fn gets(&mut self, message: Message) -> Vec<destination::Action> {
        self.0.message(NOW, message);
        self.drain()
    }

    /// Names the first frames; the others are zero pages if `whole`.
    fn named(&mut self, pushed: bool, whole: bool, entries: &[(u64, Entry)]) -> Vec<destination::Action> {
        let mut entries: Vec<_> = entries.iter().map(|(gfn, entry)| (Gfn(*gfn), *entry)).collect();
        if whole {
            let rest = entries.len() as u64..REGION_PAGES as u64;
            entries.extend(rest.map(|gfn| (Gfn(gfn), Entry::Zero)));
        }
        // The root does not matter here: it is looked at when no page is missing.
        self.gets(Message::Region(Region { region: RegionId(0), pushed, entries, root: root_of([].iter()) }))
    }
}

fn want(frames: &[u64]) -> destination::Action {
    destination::Action::Send(Message::Want(frames.iter().map(|gfn| Gfn(*gfn)).collect()))
}

/// Frames 0 and 1 held X, frame 1 as the last one that X came to. Then frame 1 was named anew, and in the last round frame 2 was called a
/// duplicate of frame 0. The destination remembered one frame for each id, frame 1, where X stood no more; it awaited X as
/// though the source would push it, which pushes no duplicates. The VM stood still until the source's patience ended.
#[test]
fn a_duplicate_is_copied_from_the_frame_that_it_names() {
    let mut there = There::new(true);
    let x = Entry::Name(name(1).short());
    there.named(false, true, &[(0, x), (1, Entry::Duplicate(Gfn(0))), (2, Entry::Zero)]);
    assert_eq!(there.0.site_page(NOW, SiteRung::Host, name(1).short(), &page(1)), [Gfn(0), Gfn(1)]);
    there.drain();
    there.named(true, false, &[(1, Entry::Zero), (2, Entry::Duplicate(Gfn(0)))]);
    let copied = there.named(true, false, &[(3, Entry::Duplicate(Gfn(0)))]);
    assert_eq!(copied[0], destination::Action::Copy { from: Gfn(0), to: Gfn(3) });
}

/// As above, but X never came to frame 0: the source had called it stale. Nobody sends a duplicate in the last round unasked, so
/// the destination has to ask.
#[test]
fn a_duplicate_of_a_missing_page_is_asked_for_in_the_last_round() {
    let mut there = There::new(false);
    let x = name(1).short();
    let asked = there.named(false, true, &[(0, Entry::Name(x))]);
    assert_eq!(asked, [want(&[0])]);
    there.gets(Message::Stale(vec![(Gfn(0), x)]));
    assert_eq!(there.named(true, false, &[(1, Entry::Duplicate(Gfn(0)))]), [want(&[1])]);
}

/// The source was killed after the destination had said Ready. The operator let the destination run the VM; its virtual CPUs could
/// not be started, and the destination threw away the only copy.
#[test]
fn a_held_vm_that_cannot_be_started_is_held_on() {
    let mut there = There::new(false);
    there.gets(Message::State(vec![]));
    let zero = Domain::unkeyed().zero_name();
    let region = root_of(&[zero; REGION_PAGES]);
    let entries = (0..REGION_PAGES as u64).map(|gfn| (Gfn(gfn), Entry::Zero)).collect();
    there.gets(Message::Region(Region { region: RegionId(0), pushed: true, entries, root: region }));
    let loads = there.gets(Message::Final { round: 0, root: root_of([&region]) });
    assert_eq!(loads, [destination::Action::LoadState(vec![])]);
    there.0.loaded(NOW);
    there.0.disconnected(NOW);
    assert_eq!(there.drain().last(), Some(&destination::Action::Hold));
    there.0.resolve(NOW, true).unwrap();
    assert!(matches!(there.drain()[..], [destination::Action::Run(_)]));
    there.0.failed("no memory for the virtual CPUs".to_owned());
    assert_eq!(there.drain(), [destination::Action::Hold]);
    there.0.resolve(NOW, true).unwrap();
    assert!(matches!(there.drain()[..], [destination::Action::Run(_)]), "the operator may try again");
}

/// The two ends did not have the same page at a frame: the destination's hash says so, it asks again, and does not do so for ever.
#[test]
fn a_delta_that_does_not_serve_is_asked_for_again_and_not_for_ever() {
    let mut there = There::new(false);
    let wants = there.named(false, true, &[(0, Entry::Name(name(1).short()))]);
    assert_eq!(wants, [want(&[0])]);
    assert!(there.0.delta(NOW, Gfn(0), Some(&page(2))).is_empty(), "another page than the one named");
    assert_eq!(there.drain(), [want(&[0])]);
    assert!(there.0.delta(NOW, Gfn(0), None).is_empty(), "no page at all");
    assert_eq!(there.drain(), [want(&[0])]);
    assert_eq!(there.0.literal(NOW, Gfn(0), &page(1)), [Gfn(0)]);
    there.drain();
    assert!(there.0.delta(NOW, Gfn(0), Some(&page(2))).is_empty(), "late, and needed no more");
    assert_eq!(there.drain(), []);
    assert_eq!((there.0.stats().source, there.0.stats().unneeded), (1, 1));

    let mut there = There::new(false);
    there.named(false, true, &[(0, Entry::Name(name(1).short()))]);
    let asked = (0..100).filter(|_| {
        assert!(there.0.delta(NOW, Gfn(0), None).is_empty());
        there.drain().contains(&want(&[0]))
    });
    assert_eq!(asked.count(), limits::DELTA_MISSES as usize);
    assert!(there.0.discarded().is_some(), "a source that sends nothing else is given up");
}

/// A delta made for one page gave another, since something else stood at its frame, and that was what a second frame awaited. It was installed there, and nobody
/// asked again for the first frame's page.
#[test]
fn a_delta_that_serves_another_frame_is_asked_for_again() {
    let mut there = There::new(false);
    let entries = [(0, Entry::Name(name(1).short())), (1, Entry::Name(name(2).short()))];
    assert_eq!(there.named(false, true, &entries), [want(&[0, 1])]);
    assert_eq!(there.0.delta(NOW, Gfn(0), Some(&page(2))), [Gfn(1)]);
    assert_eq!(there.drain(), [want(&[0])]);
    assert_eq!(there.0.stats().source, 1);
}

/// A source in its first round, and what it does.
struct Here(Source);

impl Here {
    fn new() -> Self {
        Self::with_downtime(Span(0))
    }

    fn with_downtime(downtime: Span) -> Self {
        let config = SourceConfig {
            migration: MIGRATION,
            vm: VM,
            epoch: Epoch(0),
            domain: Domain::unkeyed(),
            layout: layout(),
            machine: vec![],
            downtime,
            link: LINK,
            mode: Mode::Precopy,
            kept_versions: 16,
            auto_converge: false,
            spill: false,
            resume_for: Span(0),
        };
        let mut here = Self(Source::new(NOW, config));
        here.gets(Message::Accept { shared: true, postcopy: true });
        here
    }

    fn drain(&mut self) -> Vec<source::Action> {
        std::iter::from_fn(|| self.0.poll()).collect()
    }

    fn gets(&mut self, message: Message) -> Vec<source::Action> {
        self.0.message(NOW, message);
        self.drain()
    }

    /// The pages of the round have been hashed: frame 0 holds `fill`, the others nothing.
    fn hashed(&mut self, fill: u8, frames: u64) -> Vec<source::Action> {
        let zero = Domain::unkeyed().zero_name();
        let names: Vec<_> =
            (0..frames).map(|gfn| (Gfn(gfn), if gfn == 0 { name(fill) } else { zero })).collect();
        self.0.hashed(NOW, RegionId(0), &names);
        self.drain()
    }

    fn dirty(&mut self, frames: &[u64]) -> Vec<source::Action> {
        let mut dirty = PageSet::empty(REGION_PAGES as u64);
        frames.iter().for_each(|gfn| assert!(dirty.insert(Gfn(*gfn))));
        self.0.dirty(NOW, &dirty);
        self.drain()
    }

    fn round_done(&mut self, round: u32) {
        let collect = self.gets(Message::RoundDone { round, stats: Default::default() });
        assert_eq!(collect, [source::Action::CollectDirty]);
    }
}

/// A page was named X, was Y when the destination wanted it, and had changed back to X when the next round came. The source took it for
/// told, the destination had given it up: it was missing to the end.
#[test]
fn a_page_that_was_called_stale_is_named_again_even_if_it_changed_back() {
    let mut here = Here::new();
    here.0.link(NEAR);
    here.hashed(1, REGION_PAGES as u64);
    here.gets(Message::Want(vec![Gfn(0)]));
    let stale = vec![(Gfn(0), name(1).short())];
    here.0.literals_sent(NOW, LiteralsSent { stale, ..LiteralsSent::default() });
    assert!(matches!(here.drain()[..], [source::Action::Send(Message::Stale(_))]));
    here.round_done(0);
    here.dirty(&[0]);
    let named = here.hashed(1, 1);
    let source::Action::Send(Message::Region(region)) = &named[0] else { panic!("{named:?}") };
    assert_eq!(region.entries, [(Gfn(0), Entry::Name(name(1).short()))]);
}

/// A round that takes 10 ms to send and 50 ms to ask for: its page goes behind its name, and if it is written meanwhile that is said behind it too.
#[test]
fn a_round_shorter_than_a_round_trip_is_sent_without_being_asked_for() {
    let mut here = Here::with_downtime(Span::from_millis(100));
    here.hashed(1, REGION_PAGES as u64);
    here.round_done(0);
    let written: Vec<u64> = (0..30).collect();
    here.dirty(&written);
    let sent = here.hashed(2, 30);
    let [
        source::Action::Send(Message::Region(region)),
        source::Action::SendLiterals { channel: Channel::Names, pages },
        source::Action::Send(Message::RoundEnd { round: 1 }),
    ] = &sent[..]
    else {
        panic!("{sent:?}")
    };
    assert!(region.pushed && region.entries == [(Gfn(0), Entry::Name(name(2).short()))], "{region:?}");
    assert_eq!(pages.iter().map(|page| (page.gfn, page.name)).collect::<Vec<_>>(), [(Gfn(0), name(2))]);
    let stale = vec![(Gfn(0), name(2).short())];
    here.0.literals_sent(NOW, LiteralsSent { stale, ..LiteralsSent::default() });
    let told = here.drain();
    let [source::Action::Send(message @ Message::Stale(_))] = &told[..] else { panic!("{told:?}") };
    assert_eq!(message.channel(), Channel::Names);
}

/// The first delta of a page is against what was sent before; if the destination asks again for the same, it comes plain.
#[test]
fn a_page_written_again_goes_as_a_delta_and_plain_if_that_did_not_serve() {
    let mut here = Here::new();
    here.0.link(NEAR);
    let sent = |actions: Vec<source::Action>| match &actions[..] {
        [source::Action::SendLiterals { pages, .. }] => pages.clone(),
        other => panic!("{other:?}"),
    };
    let (gfn, keep) = (Gfn(0), true);
    here.hashed(1, REGION_PAGES as u64);
    let first = sent(here.gets(Message::Want(vec![gfn])));
    assert_eq!(first, [source::Literal { gfn, name: name(1), base: None, keep }]);
    here.0.literals_sent(NOW, LiteralsSent { pages: 1, ..LiteralsSent::default() });
    here.round_done(0);
    here.dirty(&[0]);
    here.hashed(2, 1);
    let second = source::Literal { gfn, name: name(2), base: Some(name(1)), keep };
    assert_eq!(sent(here.gets(Message::Want(vec![gfn]))), [second]);
    let again = source::Literal { base: None, ..second };
    assert_eq!(sent(here.gets(Message::Want(vec![gfn]))), [again]);
}

/// The destination's process ran the VM and was killed before the source heard of it; another took its place, knew nothing, and
/// answered that the VM had not run. The source let it run on from where it had stood: whatever the VM had done at the destination,
/// to its disks for instance, was undone in its memory alone. One who does not know has to say so.
#[test]
fn a_process_that_never_heard_of_the_migration_does_not_give_the_vm_back() {
    let mut here = Here::new();
    here.hashed(1, REGION_PAGES as u64);
    here.round_done(0);
    here.dirty(&[]);
    here.0.vm_paused(NOW);
    here.drain();
    here.0.state_saved(NOW, vec![]);
    here.drain();
    let sent = here.dirty(&[]);
    let Some(source::Action::Send(Message::Final { root, .. })) = sent.last() else { panic!("{sent:?}") };
    here.gets(Message::Ready { root: *root });
    here.0.disconnected(NOW);
    here.0.connected(NOW);
    here.drain();

    assert_eq!(Ledger::default().answer(MIGRATION), Fate::Unknown);
    assert_eq!(here.gets(Message::Unknown { migration: MIGRATION }), []);
    assert_eq!(here.0.progress(), SourceProgress::InDoubt);
    assert!(here.0.next_timeout().is_some(), "it asks again");
    here.0.resolve(true).unwrap();
    assert!(matches!(here.drain()[..], [source::Action::Resume { .. }]));
}

/// KVM writes to guest memory when some of the state is read. The dirty log was collected for the last time before the state was
/// saved, so such a page would have gone on at the destination as it had been.
#[test]
fn the_log_is_collected_for_the_last_time_when_the_state_is_saved() {
    let mut here = Here::new();
    here.hashed(1, REGION_PAGES as u64);
    here.round_done(0);
    assert_eq!(here.dirty(&[]), [source::Action::Pause]);
    here.0.vm_paused(NOW);
    assert_eq!(here.drain(), [source::Action::SaveState]);
    here.0.state_saved(NOW, vec![7]);
    assert_eq!(here.drain(), [source::Action::CollectDirty]);
    let sent = here.dirty(&[5]);
    assert_eq!(sent[0], source::Action::Send(Message::State(vec![7])));
    assert!(matches!(&sent[1], source::Action::Hash { pages, .. } if pages == &[Gfn(5)]), "{sent:?}");
}
