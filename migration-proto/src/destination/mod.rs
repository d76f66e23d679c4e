//! The destination: resolves names by the ladder, verifies what comes, and takes the VM over.

mod absent;
mod action;
#[cfg(test)]
mod collision;
mod delta;
mod handover;
mod memory;
mod pending;
mod phase;
mod postcopy;
mod resume;

use std::collections::{BTreeMap, VecDeque};

use page::{Domain, Gfn, PageHash, RegionId, ShortId, VerifiedPage};

use self::absent::Absent;
pub use self::action::{Action, NotHeld, SiteRung};
use self::memory::{Memory, Told};
pub use self::pending::RequestId;
use self::pending::{Comes, Pending};
use self::phase::Phase;
use self::resume::Keeping;
use crate::error::{AbortReason, ProtocolError};
use crate::limits;
use crate::postcopy::Mode;
use crate::stats::DestinationStats;
use crate::switchover::{Epoch, Fate, MigrationId, VmId};
use crate::timer::{Link, Span, Time};
use crate::wire::{Message, Offer};

/// The destination's state machine.
#[derive(Debug)]
pub struct Destination {
    migration: MigrationId,
    vm: VmId,
    epoch: Epoch,
    domain: Domain,
    phase: Phase,
    memory: Memory,
    pending: Pending,
    has_site: bool,
    /// Whether both ends can do post-copy and the caller wants it.
    may_postcopy: bool,
    keeping: Keeping,
    /// What comes while the VM runs, if anything does.
    absent: Option<Absent>,
    state: Option<Vec<u8>>,
    rescued: bool,
    /// How often in a row a delta for a frame did not serve.
    delta_misses: BTreeMap<Gfn, u32>,
    last: Option<(u32, PageHash)>,
    round_end: Option<u32>,
    link: Link,
    stats: DestinationStats,
    deadline: Option<Time>,
    actions: VecDeque<Action>,
}

impl Destination {
    /// Takes up an offer. `site`: the domain of this host's site, if it has one. `postcopy`: the driver can make frames absent and is told of who
    /// touches them (userfaultfd). The driver has asked the ledger whether the VM's epoch is fenced.
    #[must_use]
    pub fn new(now: Time, offer: Offer, site: Option<&Domain>, link: Link, postcopy: bool) -> Self {
        let shared = site.filter(|domain| domain.id() == offer.domain).cloned();
        let unkeyed = Domain::unkeyed();
        // Two ends without a site share the unkeyed domain: their names agree, but there is nobody to ask.
        let agreed = shared.is_some() || offer.domain == unkeyed.id();
        let has_site = shared.is_some();
        let domain = shared.unwrap_or(unkeyed);
        let actions =
            VecDeque::from([Action::Prepare { machine: offer.machine, layout: offer.layout.clone() }]);
        Self {
            migration: offer.migration,
            vm: offer.vm,
            epoch: offer.epoch,
            phase: Phase::Preparing { shared: agreed },
            memory: Memory::new(offer.layout, domain.zero_name()),
            domain,
            pending: Pending::new(has_site),
            has_site,
            may_postcopy: postcopy && offer.mode != Mode::Precopy,
            keeping: Keeping::new(offer.resume_for),
            absent: None,
            state: None,
            rescued: false,
            delta_misses: BTreeMap::new(),
            last: None,
            round_end: None,
            link,
            stats: DestinationStats::default(),
            deadline: Some(now + limits::LOCAL_TIMEOUT),
            actions,
        }
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Option<Action> {
        // Complete comes when all that was to be installed and zeroed has been.
        self.actions.pop_front().or_else(|| self.complete_memory())
    }

    /// When [`Destination::timeout`] is to be called, if no input comes before.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Time> {
        let absent = self.absent.as_ref().and_then(Absent::next_timeout);
        self.deadline.into_iter().chain(self.pending.deadline()).chain(absent).min()
    }

    /// The domain that names are computed in.
    #[must_use]
    pub fn domain(&self) -> &Domain {
        &self.domain
    }

    /// Which migration.
    #[must_use]
    pub fn migration(&self) -> MigrationId {
        self.migration
    }

    /// Which VM.
    #[must_use]
    pub fn vm(&self) -> VmId {
        self.vm
    }

    /// What was counted.
    #[must_use]
    pub fn stats(&self) -> DestinationStats {
        self.stats
    }

    /// Why it ended without the VM; `None` if it has not.
    #[must_use]
    pub fn discarded(&self) -> Option<&AbortReason> {
        if let Phase::Ended(reason) = &self.phase { Some(reason) } else { None }
    }

    /// The phase, for people.
    #[must_use]
    pub fn phase_name(&self) -> &'static str {
        self.phase.name()
    }

    /// Whether the operator has been told that the source is silent.
    #[must_use]
    pub fn is_held(&self) -> bool {
        matches!(self.phase, Phase::Prepared { held: true })
    }

    /// For the ledger: how it ended, once it has.
    #[must_use]
    pub fn fate(&self) -> Option<Fate> {
        match &self.phase {
            Phase::Running { epoch } => Some(Fate::Ran(*epoch)),
            Phase::Ended(_) => Some(Fate::Refused),
            Phase::Preparing { .. }
            | Phase::Filling
            | Phase::Loading { .. }
            | Phase::Prepared { .. }
            | Phase::Starting { .. } => None,
        }
    }

    /// A new measurement of the link.
    pub fn link(&mut self, link: Link) {
        self.link = link;
    }

    /// The machine is built.
    pub fn prepared(&mut self, now: Time) {
        if let Phase::Preparing { shared } = self.phase {
            self.phase = Phase::Filling;
            let postcopy = self.may_postcopy;
            self.actions.push_back(Action::Send(Message::Accept { shared, postcopy }));
            self.progressed(now);
            self.advance(now);
        }
    }

    /// A message came, other than `Literals`, which the driver decodes and hashes first: see [`Destination::literal`].
    pub fn message(&mut self, now: Time, message: Message) {
        if let Err(error) = self.try_message(now, message) {
            self.give_up(AbortReason::Protocol(error));
        }
    }

    fn try_message(&mut self, now: Time, message: Message) -> Result<(), ProtocolError> {
        let (name, ours) = (message.name(), self.migration);
        let fills = matches!(self.phase, Phase::Filling);
        match message {
            Message::Abort { migration, reason } if migration == ours => self.aborted(reason),
            Message::Commit { migration, epoch } if migration == ours => self.commit(now, epoch)?,
            Message::Serve { migration, epoch, root } if migration == ours => self.served(now, epoch, root),
            Message::Resume { migration, epoch } if migration == ours => self.resume(now, epoch)?,
            Message::Released { migration } if migration == ours => self.released(),
            Message::Region(region) if fills && self.absent.is_none() => {
                self.progressed(now);
                let told = self.memory.region(&region)?;
                self.told(told, region.pushed);
            }
            Message::FullNames { region, names } if fills => {
                self.progressed(now);
                let frames = self.memory.full_names(region, &names)?;
                self.want(&frames);
            }
            Message::Absent { region, frames, root } if fills && self.may_postcopy => {
                self.progressed(now);
                self.mark_absent(region, &frames, root)?;
            }
            Message::PageNames { region, entries } if self.takes_names() => {
                self.names_came(now, region, &entries)?;
            }
            Message::RoundEnd { round } if fills => self.round_end = Some(round),
            Message::State(state) if fills => self.state = Some(state),
            Message::Final { round, root } if fills => self.last = Some((round, root)),
            Message::Stale(frames) if fills => {
                self.progressed(now);
                self.stale(&frames);
            }
            // Answers to wants that something else has satisfied may come late.
            Message::Stale(_) | Message::FullNames { .. }
                if !matches!(self.phase, Phase::Preparing { .. }) => {}
            _ if matches!(self.phase, Phase::Ended(_)) => {}
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
            | Message::RoundDone { .. }
            | Message::Ready { .. }
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
        self.advance(now);
        Ok(())
    }

    /// Does at once what needs nobody else, and queues the rest.
    fn told(&mut self, told: Vec<Told>, pushed: bool) {
        let mut ask = Vec::new();
        for page in told {
            match page {
                Told::Renamed { from, gfn } => ask.extend(self.pending.forget(from, gfn)),
                Told::Zero { gfn, write } => {
                    self.stats.zero += 1;
                    if write {
                        self.actions.push_back(Action::Zero(gfn));
                    }
                }
                Told::InPlace => self.stats.in_place += 1,
                Told::Copy { from, to } => {
                    self.stats.duplicate += 1;
                    self.actions.push_back(Action::Copy { from, to });
                }
                Told::Missing { id, gfn, duplicate } => {
                    let comes = match (pushed, duplicate) {
                        (true, false) => Comes::Unasked,
                        // No time for the site, and nobody sends it unasked.
                        (true, true) => Comes::OnRequest,
                        (false, _) => Comes::ByTheLadder,
                    };
                    ask.extend(self.pending.add(id, gfn, comes));
                }
            }
        }
        self.want(&ask);
    }

    fn want(&mut self, frames: &[Gfn]) {
        for batch in frames.chunks(limits::WANT_BATCH_PAGES) {
            self.actions.push_back(Action::Send(Message::Want(batch.to_vec())));
        }
    }

    /// The site gave `page` for `id`: the frames to install it at, at once. Empty if it is the wrong page or came too late.
    #[must_use = "the page is installed at these frames before the next input"]
    pub fn site_page(&mut self, now: Time, from: SiteRung, id: ShortId, page: &VerifiedPage) -> Vec<Gfn> {
        if let Some(absent) = self.late() {
            let frames = absent.site_page(now, from, id, page);
            self.after_late();
            return frames;
        }
        if page.name().short() != id {
            // Its question's end or deadline sends the want to the source.
            self.stats.wrong += 1;
            return Vec::new();
        }
        let frames = self.install(now, page.name());
        if !frames.is_empty() {
            self.pending.site_gave(now);
            match from {
                SiteRung::Host => self.stats.host += 1,
                SiteRung::Site => self.stats.site += 1,
            }
        }
        frames
    }

    /// Nobody in the site has these: the source is asked at once. What was not asked for there, or has come meanwhile, is passed over.
    pub fn site_missing(&mut self, now: Time, request: RequestId, ids: &[ShortId]) {
        if let Some(absent) = self.late() {
            absent.site_missing(now, request, ids);
            return self.after_late();
        }
        let frames = self.pending.missing(now, request, ids);
        self.want(&frames);
        self.advance(now);
    }

    /// A literal came for `gfn`: the frames to install it at, at once. Empty if it is needed no more.
    #[must_use = "the page is installed at these frames before the next input"]
    pub fn literal(&mut self, now: Time, gfn: Gfn, page: &VerifiedPage) -> Vec<Gfn> {
        if let Some(absent) = self.late() {
            let frames = absent.literal(now, gfn, page);
            self.after_late();
            return frames;
        }
        self.progressed(now);
        let frames = self.install_literal(now, gfn, page);
        if frames.is_empty() {
            self.stats.unneeded += 1;
        } else {
            self.stats.source += 1;
        }
        frames
    }

    fn install_literal(&mut self, now: Time, gfn: Gfn, page: &VerifiedPage) -> Vec<Gfn> {
        let mut frames = self.install(now, page.name());
        // One that was asked for over a connection that is lost may come late, and is what belongs there all the same.
        let expected = |memory: &mut Memory| {
            memory.install_strictly(gfn, page.name()) || memory.install(gfn, page.name())
        };
        if frames.is_empty() && matches!(self.phase, Phase::Filling) && expected(&mut self.memory) {
            frames.push(gfn);
            self.check_region(gfn.region());
            self.advance(now);
        }
        frames
    }

    /// Writes down that `name` stands at every frame that awaited it.
    fn install(&mut self, now: Time, name: PageHash) -> Vec<Gfn> {
        if !matches!(self.phase, Phase::Filling) {
            return Vec::new();
        }
        let awaiting = self.pending.take(name.short());
        let frames: Vec<Gfn> = awaiting.into_iter().filter(|gfn| self.memory.install(*gfn, name)).collect();
        self.stats.duplicate += (frames.len() as u64).saturating_sub(1);
        let mut checked = None;
        for gfn in &frames {
            if checked.replace(gfn.region()) != Some(gfn.region()) {
                self.check_region(gfn.region());
            }
        }
        self.advance(now);
        frames
    }

    /// If a region is complete and its root is not what was announced, a short id has led to a wrong page: ask for full names.
    fn check_region(&mut self, region: RegionId) {
        if self.memory.check(region) {
            self.stats.root_mismatches += 1;
            self.actions.push_back(Action::Send(Message::WantNames(region)));
        }
    }

    /// The site has said all it knows.
    pub fn site_done(&mut self, now: Time, request: RequestId) {
        let link = self.link;
        if self.late().is_some_and(|absent| absent.site_done(now, link, request)) {
            return self.after_late();
        }
        let frames = self.pending.answered(request);
        self.want(&frames);
        self.advance(now);
    }

    /// The source could not send these: they have changed since.
    fn stale(&mut self, frames: &[(Gfn, ShortId)]) {
        let mut ask = Vec::new();
        for (gfn, id) in frames {
            // A frame that has been named anew since awaits another content.
            if self.memory.awaited(*gfn) == Some(*id) {
                self.memory.relax(*gfn);
                ask.extend(self.pending.forget(*id, *gfn));
            }
        }
        self.want(&ask);
    }

    /// Goes on to whatever is possible now.
    fn advance(&mut self, now: Time) {
        if !matches!(self.phase, Phase::Filling) {
            return;
        }
        while let Some((request, ids)) = self.pending.next_question(now, self.link) {
            self.actions.push_back(Action::Resolve { request, ids });
        }
        if !self.pending.is_empty() {
            return;
        }
        for region in self.memory.take_unchecked() {
            self.check_region(region);
        }
        // What ends a round, or all of them, is said again over the next connection.
        if self.memory.awaits_names() || self.keeping.cut_off {
            return;
        }
        if let Some(round) = self.round_end.take() {
            self.delta_misses.clear();
            self.actions.push_back(Action::Send(Message::RoundDone { round, stats: self.stats }));
        }
        if self.last.is_some() && self.state.is_some() {
            self.complete(now);
        }
    }

    /// Everything that was named is here: compare the roots and load the state.
    fn complete(&mut self, now: Time) {
        let (Some((_, theirs)), Some(state)) = (self.last, self.state.take()) else { return };
        let missing = self.memory.missing();
        if !missing.is_empty() {
            self.state = Some(state);
            return self.rescue(&missing);
        }
        let root = self.memory.root();
        if root != theirs {
            return self.give_up(AbortReason::RootMismatch);
        }
        self.phase = Phase::Loading { root };
        self.begin_absent(now);
        self.actions.push_back(Action::LoadState(state));
        self.deadline = Some(now + limits::LOCAL_TIMEOUT);
        self.after_late();
    }

    /// Pages that were called stale and not named again: the VM stands still now, so the source can send each as it is.
    fn rescue(&mut self, missing: &[(Gfn, ShortId)]) {
        if std::mem::replace(&mut self.rescued, true) {
            return self.give_up(AbortReason::Unresolved(missing.len() as u64));
        }
        for (gfn, id) in missing {
            self.pending.add(*id, *gfn, Comes::Unasked);
        }
        let frames: Vec<Gfn> = missing.iter().map(|(gfn, _)| *gfn).collect();
        self.want(&frames);
    }

    fn progressed(&mut self, now: Time) {
        if matches!(self.phase, Phase::Filling) && !self.keeping.cut_off {
            self.deadline = Some(now + PATIENCE);
        }
    }
}

const PATIENCE: Span = limits::PROGRESS_TIMEOUT;
