//! Post-copy as stories over the public interface: a switchover with nothing lost, a source that is lost for a time, one that is lost for good.

use std::collections::BTreeMap;

use migration_proto::destination::{self, Destination, RequestId, SiteRung};
use migration_proto::limits::{FAULT_LIMIT, RUNNING_TIMEOUT};
use migration_proto::postcopy::FullName;
use migration_proto::source::{self, End, LiteralsSent, Source, SourceConfig, SourceProgress, StopWhy};
use migration_proto::source::{TooLate, WhyPostcopy};
use migration_proto::timer::{Link, Time};
use migration_proto::wire::{Message, decode, encode};
use migration_proto::{Epoch, Extent, Layout, MigrationId, Mode, Span, VmId};
use page::{Domain, Gfn, PAGE_SIZE, PageHash, PageSet, REGION_PAGES, RegionId, ShortId, VerifiedPage};

const MIGRATION: MigrationId = MigrationId([1; 16]);
const LINK: Link = Link { rtt: Span::from_millis(50), bytes_per_s: 12_500_000 };
const PAGES: u64 = 2 * REGION_PAGES as u64;

fn page(fill: u8) -> VerifiedPage {
    VerifiedPage::new(&Domain::unkeyed(), Box::new([fill; PAGE_SIZE]))
}

fn name(fill: u8) -> PageHash {
    page(fill).name()
}

fn set(frames: &[u64]) -> PageSet {
    let mut set = PageSet::empty(PAGES);
    frames.iter().for_each(|gfn| assert!(set.insert(Gfn(*gfn))));
    set
}

/// A VM of two regions that moves from one machine to the other; its pages are filled with one byte each, zero where nothing is said.
struct Move {
    now: Time,
    memory: BTreeMap<Gfn, u8>,
    source: Source,
    destination: Destination,
    /// What the destination has installed, each frame once.
    arrived: BTreeMap<Gfn, u8>,
    /// Whether messages reach the other side.
    connected: bool,
    /// What the source's driver was asked, apart from sending.
    here: Vec<source::Action>,
    /// What the destination's driver was asked, apart from sending.
    there: Vec<destination::Action>,
    /// Messages to the source, as they were sent.
    asked: Vec<Message>,
}

impl Move {
    /// All that is zero has moved; the guest has written these frames since, frame n with byte n, and the VM runs at the destination.
    fn switched_over(written: &[u64]) -> Self {
        let domain = Domain::unkeyed();
        let layout = Layout::new(vec![Extent { first: RegionId(0), regions: 2 }]).expect("one extent");
        let now = Time(1);
        let config = SourceConfig {
            migration: MIGRATION,
            vm: VmId([2; 16]),
            epoch: Epoch(0),
            domain: domain.clone(),
            layout,
            machine: vec![],
            downtime: Span::from_millis(300),
            link: LINK,
            mode: Mode::Postcopy,
            kept_versions: 0,
            auto_converge: false,
            spill: false,
            resume_for: Span(0),
        };
        let mut source = Source::new(now, config);
        let Some(source::Action::Send(Message::Offer(offer))) = source.poll() else { panic!("no offer") };
        let destination = Destination::new(now, offer, Some(&domain), LINK, true);
        let memory = BTreeMap::new();
        let (here, there, asked) = (vec![], vec![], vec![]);
        let arrived = BTreeMap::new();
        let mut this =
            Self { now, memory, source, destination, arrived, connected: true, here, there, asked };
        this.destination.prepared(now);
        this.run();
        assert_eq!(this.take_here(), [source::Action::StartDirtyLog, source::Action::CollectDirty]);

        let (last, before) = written.split_last().expect("something was written");
        this.memory =
            written.iter().map(|gfn| (Gfn(*gfn), u8::try_from(gfn % 251).expect("below 256"))).collect();
        this.source.dirty(now, &set(before));
        this.run();
        assert_eq!(this.take_here(), [source::Action::Pause]);
        this.source.vm_paused(now);
        this.run();
        assert_eq!(this.take_here(), [source::Action::SaveState]);
        this.source.state_saved(now, vec![7]);
        this.run();
        assert_eq!(this.take_here(), [source::Action::CollectDirty]);
        this.source.dirty(now, &set(&[*last]));
        this.deliver_to_destination();
        let marked = destination::Action::Absent(set(written));
        assert_eq!(this.take_there(), [marked, destination::Action::LoadState(vec![7])]);
        this
    }

    fn start(&mut self) {
        self.destination.loaded(self.now);
        self.deliver_to_source();
        self.deliver_to_destination();
        assert!(matches!(self.take_there()[..], [destination::Action::Run(_)]));
        self.destination.running(self.now);
        self.deliver_to_source();
    }

    fn take_here(&mut self) -> Vec<source::Action> {
        std::mem::take(&mut self.here)
    }

    fn take_there(&mut self) -> Vec<destination::Action> {
        std::mem::take(&mut self.there)
    }

    fn take_asked(&mut self) -> Vec<Message> {
        std::mem::take(&mut self.asked)
    }

    fn content(&self, gfn: Gfn) -> VerifiedPage {
        page(self.memory.get(&gfn).copied().unwrap_or(0))
    }

    /// Carries out what the source asks for, until it asks for nothing but what `here` keeps. Names of absent frames are kept back.
    fn deliver_to_destination(&mut self) {
        while let Some(action) = self.source.poll() {
            match action {
                source::Action::Send(message) if self.connected => {
                    self.destination.message(self.now, decode(&encode(&message)).expect("what was encoded"));
                }
                source::Action::Hash { region, pages } if !self.ended_rounds() => {
                    let names: Vec<_> = pages.iter().map(|gfn| (*gfn, self.content(*gfn).name())).collect();
                    self.source.hashed(self.now, region, &names);
                }
                source::Action::SendLiterals { pages, .. } => {
                    for source::Literal { gfn, name, .. } in pages {
                        let page = self.content(gfn);
                        assert_eq!(page.name(), name);
                        let frames = self.destination.literal(self.now, gfn, &page);
                        self.install(&frames, &page);
                    }
                    self.source.literals_sent(self.now, LiteralsSent::default());
                }
                source::Action::SendFault(gfn) => {
                    let page = self.content(gfn);
                    self.source.fault_sent(self.now, gfn, page.name());
                    let frames = self.destination.fault_page(self.now, gfn, page.name(), &page);
                    self.install(&frames, &page);
                }
                other => self.here.push(other),
            }
        }
        self.drain_destination();
    }

    fn ended_rounds(&self) -> bool {
        !matches!(self.source.progress(), SourceProgress::Offering | SourceProgress::Precopy)
    }

    fn drain_destination(&mut self) {
        while let Some(action) = self.destination.poll() {
            match action {
                destination::Action::Send(message) => self.asked.push(message),
                destination::Action::Prepare { .. } => {}
                destination::Action::Zero(gfn) => self.install(&[gfn], &page(0)),
                other => self.there.push(other),
            }
        }
    }

    fn deliver_to_source(&mut self) {
        self.drain_destination();
        for message in self.take_asked() {
            if self.connected {
                self.source.message(self.now, decode(&encode(&message)).expect("what was encoded"));
            }
        }
    }

    /// Until nobody has anything to say.
    fn run(&mut self) {
        for _ in 0..8 {
            self.deliver_to_destination();
            self.deliver_to_source();
        }
        self.drain_destination();
    }

    fn install(&mut self, frames: &[Gfn], page: &VerifiedPage) {
        for gfn in frames {
            assert!(self.arrived.insert(*gfn, page.bytes()[0]).is_none(), "{gfn} is installed once");
        }
    }

    /// The source's driver has named the pages that it was asked to name.
    fn hash(&mut self) {
        for action in self.take_here() {
            let source::Action::Hash { region, pages } = action else { panic!("{action:?}") };
            let names: Vec<_> = pages.iter().map(|gfn| (*gfn, self.content(*gfn).name())).collect();
            self.source.hashed(self.now, region, &names);
        }
    }

    fn question(&mut self) -> (RequestId, Vec<ShortId>) {
        let asked = self.take_there();
        let [destination::Action::Resolve { request, ids }] = &asked[..] else { panic!("{asked:?}") };
        (*request, ids.clone())
    }

    fn site_gives(&mut self, fill: u8) -> Vec<Gfn> {
        let page = page(fill);
        let frames = self.destination.site_page(self.now, SiteRung::Host, page.name().short(), &page);
        self.install(&frames, &page);
        self.drain_destination();
        frames
    }

    fn later(&mut self, span: Span) {
        self.now = self.now + span;
    }
}

#[test]
fn the_rest_follows_by_the_ladder_and_a_fault_goes_before_it() {
    let mut moving = Move::switched_over(&[0, 1, 2, 600, 1000]);
    assert_eq!(moving.source.stop_why(), Some(StopWhy::Postcopy(WhyPostcopy::Asked)));
    assert!(
        moving.source.expected_downtime() < Some(Span::from_millis(100 + 50)),
        "two round trips and 50 ms"
    );
    moving.start();
    assert_eq!(moving.source.progress(), SourceProgress::Postcopy);
    assert_eq!(moving.source.cancel(), Err(TooLate::Committed));

    // Nothing is named yet: the source answers, name and bytes.
    assert!(moving.destination.fault(moving.now, Gfn(600)));
    moving.later(LINK.rtt);
    moving.deliver_to_source();
    moving.deliver_to_destination();
    assert_eq!(moving.arrived, [(Gfn(600), 98)].into());
    assert!(!moving.destination.fault(moving.now, Gfn(600)), "it is there");

    // Named: the zero page is there at once, the rest is asked of the site.
    moving.hash();
    moving.deliver_to_destination();
    assert_eq!(moving.arrived, [(Gfn(0), 0), (Gfn(600), 98)].into());
    let mut bulk = Vec::new();
    for action in moving.take_there() {
        let destination::Action::Resolve { request, ids } = action else { panic!("{action:?}") };
        bulk.push((request, ids));
    }
    let named: Vec<ShortId> = bulk.iter().flat_map(|(_, ids)| ids.clone()).collect();
    assert_eq!(named, [1, 2, 247].map(|fill| name(fill).short()));

    // A virtual CPU waits for one of them: it gets a question of its own.
    assert!(moving.destination.fault(moving.now, Gfn(2)));
    moving.drain_destination();
    let (_, ids) = moving.question();
    assert_eq!(ids, [name(2).short()]);
    moving.later(Span::from_millis(1));
    assert_eq!(moving.site_gives(2), [Gfn(2)]);
    assert_eq!(moving.site_gives(2), [], "twice is once too often");

    // What the site lacks comes from the source.
    for (request, _) in bulk {
        moving.destination.site_done(moving.now, request);
    }
    moving.run();
    assert_eq!(moving.arrived, moving.memory);
    assert_eq!(moving.source.end(), Some(&End::Completed));
    let stats = moving.source.postcopy_stats().unwrap();
    assert_eq!((stats.absent, stats.zero, stats.host, stats.source), (5, 1, 1, 3));
    assert_eq!((stats.faults, stats.faults_host, stats.faults_source), (2, 1, 1));
    assert_eq!(stats.longest_wait_us, LINK.rtt.0);
    assert_eq!(moving.take_there().last(), Some(&destination::Action::Released));
}

#[test]
fn a_late_site_does_not_hold_up_a_fault() {
    let mut moving = Move::switched_over(&[1, 2]);
    moving.start();
    moving.hash();
    moving.deliver_to_destination();
    moving.take_there();
    assert!(moving.destination.fault(moving.now, Gfn(2)));
    moving.drain_destination();
    moving.take_there();
    moving.later(LINK.rtt);
    moving.destination.timeout(moving.now);
    moving.drain_destination();
    assert_eq!(moving.asked, [Message::Fault(Gfn(2))]);
    moving.deliver_to_source();
    moving.deliver_to_destination();
    assert_eq!(moving.arrived, [(Gfn(2), 2)].into());
}

#[test]
fn after_a_break_only_what_is_lacked_is_asked_for() {
    let mut moving = Move::switched_over(&[1, 2, 3, 600, 601]);
    moving.start();
    // The names of the first region arrive, and the page of frame 1; those of the second are lost with the connection.
    let mut hashes = moving.take_here();
    let second = hashes.pop().unwrap();
    moving.here = hashes;
    moving.hash();
    moving.deliver_to_destination();
    let (request, _) = moving.question();
    assert_eq!(moving.site_gives(1), [Gfn(1)]);
    moving.connected = false;
    moving.source.disconnected(moving.now);
    moving.destination.disconnected(moving.now);
    moving.here = vec![second];
    moving.deliver_to_destination();
    assert_eq!(moving.here.pop(), Some(source::Action::PostcopyCut));
    moving.hash();
    // Meanwhile the site goes on giving: its question is still under way.
    assert_eq!(moving.site_gives(2), [Gfn(2)]);
    moving.destination.site_done(moving.now, request);
    moving.take_asked();

    moving.source.timeout(moving.source.next_timeout().unwrap());
    moving.deliver_to_destination();
    assert_eq!(moving.take_here(), [source::Action::Reconnect]);
    moving.connected = true;
    moving.source.connected(moving.now);
    moving.destination.connected();
    moving.deliver_to_destination();
    let asked = moving.asked.clone();
    assert!(matches!(asked[0], Message::Running { .. }), "{asked:?}");
    assert_eq!(asked[1..], [Message::Want(vec![Gfn(3)]), Message::WantNames(RegionId(1))]);
    moving.deliver_to_source();
    assert_eq!(moving.source.progress(), SourceProgress::Postcopy);
    moving.run();
    let (request, _) = moving.question();
    moving.destination.site_done(moving.now, request);
    moving.run();
    assert_eq!(moving.arrived, moving.memory);
    assert_eq!(moving.source.postcopy_stats().unwrap().reconnects, 1);
}

#[test]
fn a_vm_whose_source_is_lost_stops_at_the_page_that_nobody_gives_and_goes_on_when_it_comes() {
    let mut moving = Move::switched_over(&[1, 2, 600]);
    moving.start();
    moving.here.pop();
    moving.hash();
    moving.deliver_to_destination();
    moving.take_there();
    moving.connected = false;
    moving.destination.disconnected(moving.now);
    moving.drain_destination();
    moving.take_there();

    // Frame 600 was never named, frame 2 was.
    let touched = moving.now;
    assert!(moving.destination.fault(moving.now, Gfn(2)));
    let mut stopped = None;
    while stopped.is_none() {
        moving.drain_destination();
        for action in moving.take_there() {
            match action {
                destination::Action::Resolve { request, .. } => {
                    moving.destination.site_done(moving.now, request);
                }
                destination::Action::PauseVm { gfn, name } => stopped = Some((gfn, name)),
                destination::Action::Forget(_) => {}
                other => panic!("{other:?}"),
            }
        }
        moving.now = moving.destination.next_timeout().expect("it does not wait for ever");
        moving.destination.timeout(moving.now);
        assert!(moving.now - touched <= Span(FAULT_LIMIT.0 * 2));
    }
    assert_eq!(stopped, Some((Gfn(2), Some(name(2)))));
    assert!(moving.destination.is_starved());
    assert_eq!(moving.destination.fate(), Some(migration_proto::switchover::Fate::Ran(Epoch(1))));

    // A host that holds it joins the site.
    assert_eq!(moving.site_gives(2), [Gfn(2)]);
    assert!(moving.take_there().contains(&destination::Action::ResumeVm));
    assert!(moving.destination.fault(moving.now, Gfn(600)));
    moving.later(FAULT_LIMIT);
    moving.destination.timeout(moving.now);
    moving.drain_destination();
    let unnamed = destination::Action::PauseVm { gfn: Gfn(600), name: None };
    assert!(moving.take_there().contains(&unnamed));
    assert_eq!(moving.destination.postcopy_stats().unwrap().pauses, 2);
}

#[test]
fn a_source_in_post_copy_serves_and_never_runs_the_vm() {
    let mut moving = Move::switched_over(&[1, 2]);
    moving.start();
    moving.take_here();
    moving.source.disconnected(moving.now);
    moving.deliver_to_destination();
    assert_eq!(moving.take_here(), [source::Action::PostcopyCut]);
    moving.source.timeout(moving.source.next_timeout().unwrap());
    moving.source.connected(moving.now);
    moving.source.message(moving.now, Message::NotRunning { migration: MIGRATION });
    moving.source.message(moving.now, Message::Abort { migration: MIGRATION, reason: String::new() });
    moving.source.failed("a page cannot be read".to_owned());
    let sent: Vec<_> = std::iter::from_fn(|| moving.source.poll()).collect();
    let commit = Message::Commit { migration: MIGRATION, epoch: Epoch(1) };
    let expected = [source::Action::Reconnect, source::Action::Send(commit), source::Action::Reconnect];
    assert_eq!(sent, expected, "it dials, asks, and dials again");
    assert_eq!(moving.source.resolve(true), Err(TooLate::RunsThere));
    assert_eq!(moving.source.progress(), SourceProgress::PostcopyCut);
    assert!(moving.source.next_timeout().unwrap() <= moving.now + Span(RUNNING_TIMEOUT.0 * 2));
    moving.source.resolve(false).unwrap();
    assert_eq!(moving.source.end(), Some(&End::LetGo));
    assert_eq!(moving.source.poll(), Some(source::Action::Release));
}

/// The site gave a page whose first eight bytes of the name are right.
#[test]
fn a_page_with_another_name_is_not_installed() {
    let mut moving = Move::switched_over(&[1, 2]);
    moving.start();
    let named = Message::PageNames { region: RegionId(0), entries: vec![(Gfn(1), FullName::Name(name(1)))] };
    moving.destination.message(moving.now, named);
    let other = page(9);
    assert_eq!(moving.destination.literal(moving.now, Gfn(1), &other), []);
    let wrong = moving.destination.site_page(moving.now, SiteRung::Site, name(1).short(), &other);
    assert_eq!(wrong, []);
    assert!(moving.destination.fault(moving.now, Gfn(2)));
    assert_eq!(moving.destination.fault_page(moving.now, Gfn(2), name(2), &other), []);
    assert_eq!(moving.destination.postcopy_stats().unwrap().wrong, 3);
    assert_eq!(moving.destination.fault_page(moving.now, Gfn(2), name(2), &page(2)), [Gfn(2)]);
}
