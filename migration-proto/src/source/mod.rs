//! The source: names its pages round by round, answers wants, and hands the VM over.

mod action;
mod converge;
mod handover;
mod naming;
mod phase;
mod postcopy;
mod resume;
mod round;
mod spill;
mod throttle;
mod versions;
mod wants;

use std::collections::{BTreeMap, VecDeque};

use page::{Domain, Gfn, PageHash, PageSet, RegionId, ShortId};

pub use self::action::{Action, Literal, LiteralsSent, SourceConfig, SourceProgress, SpillConfig, TooLate};
pub(crate) use self::converge::Converge;
use self::converge::WrittenPage;
pub use self::converge::{StopWhy, WhyPostcopy};
use self::naming::Naming;
pub use self::phase::End;
use self::phase::Phase;
use self::resume::Owed;
use self::round::{PLAIN_PAGE_BYTES, PLAIN_ZERO_BYTES, Round};
use self::spill::Spill;
use self::versions::Versions;
use crate::error::{AbortReason, ProtocolError};
use crate::limits;
use crate::manifest::Entry;
use crate::memory_names::MemoryNames;
use crate::postcopy::Mode;
use crate::stats::{DestinationStats, PostcopyStats, SourceStats};
use crate::timer::{Link, Span, Time};
use crate::wire::{Message, Offer, Region};

/// The source's state machine.
#[derive(Debug)]
pub struct Source {
    config: SourceConfig,
    domain: Domain,
    phase: Phase,
    names: MemoryNames,
    /// A frame for each short id that has been named; checked against `names` when used.
    places: BTreeMap<ShortId, Gfn>,
    named_once: PageSet,
    /// Taken out of the dirty log and not named since.
    unnamed: PageSet,
    owed: Owed,
    wants: VecDeque<Gfn>,
    versions: Versions,
    literal_batches: usize,
    converge: Converge,
    /// Since when the guest is slowed down, and by how many percent now; none if it runs at full speed.
    throttled: Option<(Time, u8)>,
    stop_why: Option<StopWhy>,
    expected_downtime: Option<Span>,
    /// What both ends can and the caller wants.
    mode: Mode,
    /// What the destination was told is absent, and in how many messages.
    absent: PageSet,
    absent_regions: u64,
    /// The names of that, from the switchover to post-copy on.
    naming: Option<Naming>,
    /// What a literal of a page that the guest has written takes, bytes.
    written_page: WrittenPage,
    /// What of it stands in a spill file, if it is to.
    spill: Option<Spill>,
    /// This source is made of a spill file with this root: it gives pages, and the VM was never its own.
    served: Option<PageHash>,
    link: Link,
    stats: SourceStats,
    destination: DestinationStats,
    postcopy: Option<PostcopyStats>,
    verified: bool,
    deadline: Option<Time>,
    actions: VecDeque<Action>,
}

impl Source {
    /// Begins a migration by offering the VM.
    #[must_use]
    pub fn new(now: Time, config: SourceConfig) -> Self {
        let offer = Offer {
            migration: config.migration,
            vm: config.vm,
            epoch: config.epoch,
            domain: config.domain.id(),
            layout: config.layout.clone(),
            machine: config.machine.clone(),
            mode: config.mode,
            deltas: config.kept_versions > 0,
            resume_for: config.resume_for,
        };
        Self {
            domain: config.domain.clone(),
            phase: Phase::Offering,
            names: MemoryNames::new(config.layout.clone(), config.domain.zero_name()),
            places: BTreeMap::new(),
            named_once: PageSet::empty(config.layout.page_bound()),
            unnamed: PageSet::empty(config.layout.page_bound()),
            owed: Owed::default(),
            wants: VecDeque::new(),
            versions: Versions::new(config.kept_versions),
            literal_batches: 0,
            converge: Converge::new(config.downtime, config.auto_converge),
            throttled: None,
            stop_why: None,
            expected_downtime: None,
            mode: config.mode,
            absent: PageSet::empty(config.layout.page_bound()),
            absent_regions: 0,
            naming: None,
            written_page: WrittenPage::default(),
            spill: Spill::asked_for(&config),
            served: None,
            link: config.link,
            stats: SourceStats::default(),
            destination: DestinationStats::default(),
            postcopy: None,
            verified: false,
            deadline: Some(now + limits::ACCEPT_TIMEOUT),
            actions: VecDeque::from([Action::Send(Message::Offer(offer))]),
            config,
        }
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Option<Action> {
        let action = self.actions.pop_front()?;
        self.owed.give_out(&action);
        Some(action)
    }

    /// When [`Source::timeout`] is to be called, if no input comes before.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Time> {
        self.deadline
    }

    /// The domain that names are computed in.
    #[must_use]
    pub fn domain(&self) -> &Domain {
        &self.domain
    }

    /// What the source counted.
    #[must_use]
    pub fn stats(&self) -> SourceStats {
        self.stats
    }

    /// What the destination said last of what it counted.
    #[must_use]
    pub fn destination_stats(&self) -> DestinationStats {
        self.destination
    }

    /// What the destination counted after the VM ran there; `None` before it has said so, or without post-copy.
    #[must_use]
    pub fn postcopy_stats(&self) -> Option<PostcopyStats> {
        self.postcopy
    }

    /// How the migration ended, once it has.
    #[must_use]
    pub fn end(&self) -> Option<&End> {
        match &self.phase {
            Phase::Ended(end) => Some(end),
            Phase::Offering
            | Phase::Collecting
            | Phase::Round(_)
            | Phase::Pausing { .. }
            | Phase::CollectingLast { .. }
            | Phase::LastRound(_)
            | Phase::Handover { .. }
            | Phase::Cut(_)
            | Phase::Committed { .. }
            | Phase::Postcopy { .. } => None,
        }
    }

    /// The phase, for people.
    #[must_use]
    pub fn phase_name(&self) -> &'static str {
        self.phase.name()
    }

    /// Where the migration is.
    #[must_use]
    pub fn progress(&self) -> SourceProgress {
        match &self.phase {
            Phase::Offering => SourceProgress::Offering,
            Phase::Collecting | Phase::Round(_) => SourceProgress::Precopy,
            Phase::Pausing { .. } | Phase::CollectingLast { .. } | Phase::LastRound(_) => {
                SourceProgress::StopAndCopy
            }
            Phase::Handover { .. } => SourceProgress::Handover,
            Phase::Cut(_) => SourceProgress::PrecopyCut,
            Phase::Committed { in_doubt: false, .. } => SourceProgress::Committing,
            Phase::Committed { in_doubt: true, .. } => SourceProgress::InDoubt,
            Phase::Postcopy { connected: true, .. } => SourceProgress::Postcopy,
            Phase::Postcopy { connected: false, .. } => SourceProgress::PostcopyCut,
            Phase::Ended(_) => SourceProgress::Ended,
        }
    }

    /// Whether both ends agreed on one root over all of RAM.
    #[must_use]
    pub fn is_verified(&self) -> bool {
        self.verified
    }

    /// Why the VM was stopped when it was; `None` before.
    #[must_use]
    pub fn stop_why(&self) -> Option<StopWhy> {
        self.stop_why
    }

    /// What the downtime was expected to be when the VM was stopped; `None` before. Where it is more than was asked for, [`Source::stop_why`] says why,
    /// and in post-copy, if it is, one and a half round trips with the state alone take longer.
    #[must_use]
    pub fn expected_downtime(&self) -> Option<Span> {
        self.expected_downtime
    }

    /// How the VM is to move: as was asked for, or [`Mode::Precopy`] if the destination cannot do post-copy. Known once the offer is accepted.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// A new measurement of the link.
    pub fn link(&mut self, link: Link) {
        self.link = link;
    }

    /// A message came.
    pub fn message(&mut self, now: Time, message: Message) {
        if let Err(error) = self.try_message(now, message) {
            self.abort(AbortReason::Protocol(error));
        }
    }

    fn try_message(&mut self, now: Time, message: Message) -> Result<(), ProtocolError> {
        let (name, ours) = (message.name(), self.config.migration);
        match message {
            Message::Accept { shared, postcopy } if matches!(self.phase, Phase::Offering) => {
                self.accepted(now, shared, postcopy);
            }
            Message::Refuse(reason) if matches!(self.phase, Phase::Offering) => {
                self.abort(AbortReason::Refused(reason))
            }
            Message::Abort { migration, reason } if migration == ours => {
                self.abort(AbortReason::Peer(reason))
            }
            Message::Want(frames) if self.names_pages() => self.wanted(now, frames)?,
            Message::WantNames(region) if self.names_pages() => self.names_wanted(now, region)?,
            Message::Want(frames) if self.serves() => self.wanted(now, frames)?,
            Message::WantNames(region) if self.serves() => self.absent_wanted(now, region)?,
            Message::Fault(gfn) if !self.is_over() => {
                self.faulted(now, gfn)?;
            }
            Message::RoundDone { round, stats } => self.round_done(now, round, stats)?,
            Message::Ready { root } => self.ready(now, root)?,
            Message::Running { migration, stats } if migration == ours => self.runs_there(now, stats)?,
            Message::Complete { migration, stats, postcopy } if migration == ours && !self.is_over() => {
                self.completed(stats, *postcopy)?;
            }
            Message::Held { regions, last } if !self.is_over() && !self.is_dialling() => {
                self.held(now, &regions, last)?;
            }
            Message::NotRunning { migration } if migration == ours => self.never_ran_there()?,
            Message::Unknown { migration } if migration == ours => self.nobody_knows(now)?,
            // What was on its way when this side ended, or when the connection was lost, means nothing any more.
            _ if self.is_over() || self.is_dialling() => {}
            // Wants may overtake Ready on another channel; after it they need no answer.
            Message::Want(_) | Message::WantNames(_) if matches!(self.phase, Phase::Committed { .. }) => {}
            Message::Offer(_)
            | Message::Accept { .. }
            | Message::Refuse(_)
            | Message::Serve { .. }
            | Message::Abort { .. }
            | Message::Region(_)
            | Message::FullNames { .. }
            | Message::RoundEnd { .. }
            | Message::State(_)
            | Message::Absent { .. }
            | Message::PageNames { .. }
            | Message::Final { .. }
            | Message::Literals(_)
            | Message::Stale(_)
            | Message::Want(_)
            | Message::WantNames(_)
            | Message::Fault(_)
            | Message::FaultPage { .. }
            | Message::Commit { .. }
            | Message::Running { .. }
            | Message::Complete { .. }
            | Message::NotRunning { .. }
            | Message::Unknown { .. }
            | Message::Resume { .. }
            | Message::Held { .. }
            | Message::Released { .. }
            | Message::Probe(_) => {
                return Err(ProtocolError::Unexpected { message: name, phase: self.phase.name() });
            }
        }
        Ok(())
    }

    /// Whether the destination may ask for pages now.
    fn names_pages(&self) -> bool {
        match self.phase {
            Phase::Collecting
            | Phase::Round(_)
            | Phase::Pausing { .. }
            | Phase::CollectingLast { .. }
            | Phase::LastRound(_)
            | Phase::Handover { .. } => true,
            Phase::Offering
            | Phase::Cut(_)
            | Phase::Committed { .. }
            | Phase::Postcopy { .. }
            | Phase::Ended(_) => false,
        }
    }

    /// Whether the destination, which may run the VM, may ask for absent pages now.
    fn serves(&self) -> bool {
        self.naming.is_some() && matches!(self.phase, Phase::Committed { .. } | Phase::Postcopy { .. })
    }

    fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Ended(_))
    }

    fn accepted(&mut self, now: Time, shared: bool, postcopy: bool) {
        if !postcopy {
            self.mode = Mode::Precopy;
        }
        if !shared {
            self.domain = Domain::unkeyed();
            self.names = MemoryNames::new(self.config.layout.clone(), self.domain.zero_name());
        }
        let mut all = PageSet::empty(self.config.layout.page_bound());
        for region in self.config.layout.regions() {
            (region.first().0..RegionId(region.0 + 1).first().0).for_each(|gfn| {
                all.insert(Gfn(gfn));
            });
        }
        // Logging begins before the first page is read, so that no write falls between.
        self.actions.push_back(Action::StartDirtyLog);
        self.unnamed = all.clone();
        self.begin_round(now, all);
    }

    fn new_round(&mut self, now: Time, todo: PageSet, pushed: bool) -> Round {
        let round = Round::new(self.stats.rounds, todo, self.config.layout.region_bound(), pushed);
        self.stats.rounds += 1;
        self.stats.round_pages = round.pages();
        self.stats.named_pages = 0;
        self.progressed(now);
        round
    }

    fn begin_round(&mut self, now: Time, todo: PageSet) {
        let pushed = self.asking_takes_longer(todo.len());
        self.phase = Phase::Round(self.new_round(now, todo, pushed));
        self.advance(now);
    }

    /// The dirty log, as [`Action::CollectDirty`] asked for it.
    pub fn dirty(&mut self, now: Time, dirty: &PageSet) {
        let mut left = PageSet::empty(self.config.layout.page_bound());
        dirty.iter().filter(|gfn| self.config.layout.has(gfn.region())).for_each(|gfn| {
            left.insert(gfn);
        });
        self.owed.machine_answered();
        self.unnamed.union_with(&left);
        match &mut self.phase {
            Phase::Collecting => {
                let sent = (self.stats.literal_pages, self.stats.literal_bytes);
                let a_page = self.written_page.round_over(sent);
                let (rounds, pages) = (self.stats.rounds, left.len());
                if self.stop_why.is_none() {
                    self.stop_why = self.converge.stop(rounds, pages, self.link, a_page, self.mode);
                }
                self.slow_down(now);
                if self.stop_why.is_none() {
                    self.begin_round(now, left);
                } else {
                    self.stop_vm(now, left);
                }
            }
            Phase::CollectingLast { dirty, state } => {
                left.union_with(dirty);
                let state = std::mem::take(state);
                self.actions.push_back(Action::Send(Message::State(state)));
                self.last_pages(now, left);
            }
            Phase::Cut(_) => self.settle(now),
            // An abort came first.
            Phase::Offering
            | Phase::Round(_)
            | Phase::Pausing { .. }
            | Phase::LastRound(_)
            | Phase::Handover { .. }
            | Phase::Committed { .. }
            | Phase::Postcopy { .. }
            | Phase::Ended(_) => {}
        }
    }

    /// The virtual CPUs stand still. State is saved before the log is collected for the last time, because reading
    /// some of it makes KVM write to guest memory.
    pub fn vm_paused(&mut self, now: Time) {
        self.owed.machine_answered();
        if matches!(self.phase, Phase::Pausing { .. }) {
            // It stands still: full speed is what it goes on with, wherever that is.
            self.full_speed(Some(now));
            self.actions.push_back(Action::SaveState);
            self.deadline = Some(now + limits::LOCAL_TIMEOUT);
        }
        self.settle(now);
    }

    /// vCPU and device state.
    pub fn state_saved(&mut self, now: Time, state: Vec<u8>) {
        self.owed.machine_answered();
        if state.len() > limits::STATE_BYTES {
            let what = format!("the device state has {} bytes, more than the protocol carries", state.len());
            return self.abort(AbortReason::Local(what));
        }
        if let Phase::Pausing { dirty } = &mut self.phase {
            let dirty = std::mem::take(dirty);
            self.phase = Phase::CollectingLast { dirty, state };
            self.actions.push_back(Action::CollectDirty);
            self.deadline = Some(now + limits::LOCAL_TIMEOUT);
        }
        self.settle(now);
    }

    /// The names of pages that [`Action::Hash`] asked for.
    pub fn hashed(&mut self, now: Time, region: RegionId, pages: &[(Gfn, PageHash)]) {
        self.owed.hashed();
        let pushed = match &mut self.phase {
            Phase::Round(round) | Phase::LastRound(round) => {
                round.hashed();
                round.pushed
            }
            Phase::Handover { .. } | Phase::Committed { .. } | Phase::Postcopy { .. } => {
                return self.absent_hashed(now, region, pages);
            }
            Phase::Cut(_) => return self.settle(now),
            Phase::Offering
            | Phase::Collecting
            | Phase::Pausing { .. }
            | Phase::CollectingLast { .. }
            | Phase::Ended(_) => return,
        };
        let mut entries = Vec::with_capacity(pages.len());
        let mut push = Vec::new();
        for (gfn, name) in pages {
            let Some(entry) = self.name_page(*gfn, *name) else { continue };
            if pushed && matches!(entry, Entry::Name(_)) {
                push.push((*gfn, *name));
            }
            entries.push((*gfn, entry));
        }
        if !entries.is_empty() {
            let root = self.names.region_root(region);
            self.actions.push_back(Action::Send(Message::Region(Region { region, pushed, entries, root })));
        }
        self.wants.extend(push.into_iter().map(|(gfn, _)| gfn));
        self.progressed(now);
        self.advance(now);
    }

    /// Writes down a page's name and says how to tell it; `None` if the destination has been told already.
    fn name_page(&mut self, gfn: Gfn, name: PageHash) -> Option<Entry> {
        let is_zero = name == self.domain.zero_name();
        self.stats.named_pages += 1;
        // What is named again because of a lost connection a plain migration would have sent once too.
        if self.unnamed.remove(gfn) {
            self.stats.plain_bytes += if is_zero { PLAIN_ZERO_BYTES } else { PLAIN_PAGE_BYTES };
        }
        let known = self.names.get(gfn) == Some(name);
        if !self.named_once.insert(gfn) && known {
            self.stats.unchanged += 1;
            return None;
        }
        self.names.set(gfn, name);
        self.versions.named(gfn);
        if is_zero {
            return Some(Entry::Zero);
        }
        let place = *self.places.entry(name.short()).or_insert(gfn);
        if place != gfn && self.named_once.contains(place) && self.names.get(place) == Some(name) {
            return Some(Entry::Duplicate(place));
        }
        self.places.insert(name.short(), gfn);
        Some(Entry::Name(name.short()))
    }

    fn round_done(&mut self, now: Time, number: u32, stats: DestinationStats) -> Result<(), ProtocolError> {
        match &self.phase {
            Phase::Round(round) if round.number == number && round.is_named() => {
                self.destination = stats;
                self.phase = Phase::Collecting;
                self.actions.push_back(Action::CollectDirty);
                self.deadline = Some(now + limits::LOCAL_TIMEOUT);
                Ok(())
            }
            Phase::Ended(_) => Ok(()),
            Phase::Offering
            | Phase::Collecting
            | Phase::Round(_)
            | Phase::Pausing { .. }
            | Phase::CollectingLast { .. }
            | Phase::LastRound(_)
            | Phase::Handover { .. }
            | Phase::Cut(_)
            | Phase::Committed { .. }
            | Phase::Postcopy { .. } => {
                Err(ProtocolError::Unexpected { message: "RoundDone", phase: self.phase.name() })
            }
        }
    }

    /// Gives out what there is to hash and to send, and ends the round when all is named.
    fn advance(&mut self, now: Time) {
        self.answer_wants();
        match &mut self.phase {
            Phase::Round(round) => {
                while let Some((region, pages)) = round.next(limits::HASH_WINDOW_REGIONS) {
                    self.actions.push_back(Action::Hash { region, pages });
                }
                if round.take_end() {
                    self.actions.push_back(Action::Send(Message::RoundEnd { round: round.number }));
                }
            }
            Phase::LastRound(round) => {
                while let Some((region, pages)) = round.next(limits::HASH_WINDOW_REGIONS) {
                    self.actions.push_back(Action::Hash { region, pages });
                }
                if round.take_end() {
                    let (number, root) = (round.number, self.names.root());
                    self.actions.push_back(Action::Send(Message::Final { round: number, root }));
                    self.phase = Phase::Handover { root };
                    self.progressed(now);
                }
            }
            Phase::Offering
            | Phase::Collecting
            | Phase::Pausing { .. }
            | Phase::CollectingLast { .. }
            | Phase::Handover { .. }
            | Phase::Cut(_)
            | Phase::Committed { .. }
            | Phase::Postcopy { .. }
            | Phase::Ended(_) => {}
        }
    }

    /// Something came or went. Where only one answer counts, that changes nothing.
    fn progressed(&mut self, now: Time) {
        match self.phase {
            Phase::Cut(_)
            | Phase::Committed { .. }
            | Phase::Postcopy { connected: false, .. }
            | Phase::Ended(_) => {}
            Phase::Offering
            | Phase::Collecting
            | Phase::Round(_)
            | Phase::Pausing { .. }
            | Phase::CollectingLast { .. }
            | Phase::LastRound(_)
            | Phase::Handover { .. }
            | Phase::Postcopy { connected: true, .. } => {
                self.deadline = Some(now + limits::PROGRESS_TIMEOUT);
            }
        }
    }
}
