//! The destination: resolves names by the ladder, verifies what comes, and takes the VM over.

mod action;
#[cfg(test)]
mod collision;
mod memory;
mod pending;
mod phase;

use std::collections::VecDeque;

use page::{Domain, Gfn, PageHash, RegionId, ShortId, VerifiedPage};

pub use self::action::{Action, NotHeld, SiteRung};
use self::memory::{Memory, Told};
pub use self::pending::RequestId;
use self::pending::{Comes, Pending};
use self::phase::Phase;
use crate::error::{AbortReason, ProtocolError};
use crate::limits;
use crate::stats::DestinationStats;
use crate::switchover::{Epoch, Fate, MigrationId, RunPermit, VmId};
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
    state: Option<Vec<u8>>,
    rescued: bool,
    last: Option<(u32, PageHash)>,
    round_end: Option<u32>,
    link: Link,
    stats: DestinationStats,
    deadline: Option<Time>,
    actions: VecDeque<Action>,
}

impl Destination {
    /// Takes up an offer. `site`: the domain of this host's site, if it has one. The driver has asked the ledger whether the VM's
    /// epoch is fenced.
    #[must_use]
    pub fn new(now: Time, offer: Offer, site: Option<&Domain>, link: Link) -> Self {
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
            state: None,
            rescued: false,
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
        self.actions.pop_front()
    }

    /// When [`Destination::timeout`] is to be called, if no input comes before.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Time> {
        self.deadline.into_iter().chain(self.pending.deadline()).min()
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
            self.actions.push_back(Action::Send(Message::Accept { shared }));
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
        let name = message.name();
        let fills = matches!(self.phase, Phase::Filling);
        match message {
            Message::Abort { migration, reason } if migration == self.migration => self.aborted(reason),
            Message::Commit { migration, epoch } if migration == self.migration => {
                return self.commit(now, epoch);
            }
            Message::Released { migration } if migration == self.migration => self.released(),
            Message::Region(region) if fills => {
                self.progressed(now);
                let told = self.memory.region(&region)?;
                self.told(told, region.pushed);
            }
            Message::FullNames { region, names } if fills => {
                self.progressed(now);
                let frames = self.memory.full_names(region, &names)?;
                self.want(&frames);
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
            | Message::Abort { .. }
            | Message::Region(_)
            | Message::FullNames { .. }
            | Message::RoundEnd { .. }
            | Message::State(_)
            | Message::Final { .. }
            | Message::Literals(_)
            | Message::Stale(_)
            | Message::Want(_)
            | Message::WantNames(_)
            | Message::RoundDone { .. }
            | Message::Ready { .. }
            | Message::Commit { .. }
            | Message::Running { .. }
            | Message::NotRunning { .. }
            | Message::Unknown { .. }
            | Message::Released { .. } => {
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
                        // The VM stands still: no time for the site, and nobody sends it unasked.
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
        let frames = self.pending.missing(now, request, ids);
        self.want(&frames);
        self.advance(now);
    }

    /// A literal came for `gfn`: the frames to install it at, at once. Empty if it is needed no more.
    #[must_use = "the page is installed at these frames before the next input"]
    pub fn literal(&mut self, now: Time, gfn: Gfn, page: &VerifiedPage) -> Vec<Gfn> {
        self.progressed(now);
        let mut frames = self.install(now, page.name());
        if frames.is_empty() && self.memory.install_strictly(gfn, page.name()) {
            frames.push(gfn);
            self.check_region(gfn.region());
            self.advance(now);
        }
        if frames.is_empty() {
            self.stats.unneeded += 1;
        } else {
            self.stats.source += 1;
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
        if self.memory.awaits_names() {
            return;
        }
        if let Some(round) = self.round_end.take() {
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
        self.actions.push_back(Action::LoadState(state));
        self.deadline = Some(now + limits::LOCAL_TIMEOUT);
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

    /// The source offers the VM in another migration, so it owns and runs it: what is held here is void.
    pub fn superseded(&mut self) {
        if matches!(self.phase, Phase::Prepared { .. }) {
            self.discard(AbortReason::Peer("it offered the VM anew".to_owned()));
        }
    }

    /// State is loaded: this side could run the VM.
    pub fn loaded(&mut self, now: Time) {
        if let Phase::Loading { root } = self.phase {
            self.phase = Phase::Prepared { held: false };
            self.actions.push_back(Action::Send(Message::Ready { root }));
            self.deadline = Some(now + limits::COMMIT_TIMEOUT);
        }
    }

    fn commit(&mut self, now: Time, epoch: Epoch) -> Result<(), ProtocolError> {
        match &self.phase {
            Phase::Prepared { .. } if epoch == self.epoch.next() => self.start(now, epoch, false),
            Phase::Running { epoch: ours } if epoch == *ours => self.say_running(),
            Phase::Starting { epoch: ours, .. } if epoch == *ours => {}
            Phase::Ended(_) => {
                let migration = self.migration;
                self.actions.push_back(Action::Send(Message::NotRunning { migration }));
            }
            // Commit before Ready, or of an epoch that is not the next: whoever says so is not this migration's source.
            Phase::Preparing { .. }
            | Phase::Filling
            | Phase::Loading { .. }
            | Phase::Prepared { .. }
            | Phase::Starting { .. }
            | Phase::Running { .. } => return Err(ProtocolError::OtherMigration),
        }
        Ok(())
    }

    fn start(&mut self, now: Time, epoch: Epoch, held: bool) {
        self.phase = Phase::Starting { epoch, held };
        self.actions.push_back(Action::Run(RunPermit::new(epoch)));
        self.deadline = Some(now + limits::LOCAL_TIMEOUT);
    }

    /// The virtual CPUs run.
    pub fn running(&mut self) {
        if let Phase::Starting { epoch, .. } = self.phase {
            self.phase = Phase::Running { epoch };
            self.deadline = None;
            self.say_running();
        }
    }

    fn say_running(&mut self) {
        let (migration, stats) = (self.migration, self.stats);
        self.actions.push_back(Action::Send(Message::Running { migration, stats }));
    }

    fn released(&mut self) {
        if matches!(self.phase, Phase::Running { .. }) {
            self.actions.push_back(Action::Released);
        }
    }

    /// Something that the driver was asked to do failed.
    pub fn failed(&mut self, what: String) {
        match self.phase {
            // Commit was received and the VM has not run one instruction here: the source may have it back.
            Phase::Starting { held: false, .. } => {
                let migration = self.migration;
                self.actions.push_back(Action::Send(Message::NotRunning { migration }));
                self.discard(AbortReason::Local(what));
            }
            // The operator wanted it to run here, perhaps because the source is no more: this may be the only copy.
            Phase::Starting { held: true, .. } => {
                self.phase = Phase::Prepared { held: false };
                self.hold();
            }
            Phase::Preparing { .. }
            | Phase::Filling
            | Phase::Loading { .. }
            | Phase::Prepared { .. }
            | Phase::Running { .. }
            | Phase::Ended(_) => self.give_up(AbortReason::Local(what)),
        }
    }

    /// The connection was lost. The driver feeds messages of a later connection of the same migration to this machine.
    pub fn disconnected(&mut self) {
        match &mut self.phase {
            Phase::Preparing { .. } | Phase::Filling | Phase::Loading { .. } => {
                self.discard(AbortReason::Disconnected)
            }
            Phase::Prepared { .. } => self.hold(),
            Phase::Starting { .. } | Phase::Running { .. } | Phase::Ended(_) => {}
        }
    }

    fn hold(&mut self) {
        self.deadline = None;
        if let Phase::Prepared { held } = &mut self.phase
            && !std::mem::replace(held, true)
        {
            self.actions.push_back(Action::Hold);
        }
    }

    /// The operator, who has looked at the source, settles a VM that is held here: `run_here` if the source does not run it and cannot
    /// come to run it.
    ///
    /// # Errors
    /// If nothing is held.
    pub fn resolve(&mut self, now: Time, run_here: bool) -> Result<(), NotHeld> {
        if !self.is_held() {
            return Err(NotHeld(self.phase.name()));
        }
        if run_here {
            self.start(now, self.epoch.next(), true);
        } else {
            self.discard(AbortReason::Local(
                "an operator resolved the doubt: the VM does not run here".to_owned(),
            ));
        }
        Ok(())
    }

    /// The deadline of [`Destination::next_timeout`] has come.
    pub fn timeout(&mut self, now: Time) {
        for (request, frames) in self.pending.overdue(now) {
            self.stats.site_timeouts += 1;
            self.actions.push_back(Action::Forget(request));
            self.want(&frames);
        }
        self.advance(now);
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        match self.phase {
            Phase::Prepared { .. } => self.hold(),
            Phase::Starting { .. } => {
                // Whether the virtual CPUs run is not known: only their word settles it. The source stays paused meanwhile.
                self.deadline = None;
            }
            Phase::Preparing { .. } | Phase::Filling | Phase::Loading { .. } => {
                self.give_up(AbortReason::Timeout(self.phase.name()));
            }
            Phase::Running { .. } | Phase::Ended(_) => self.deadline = None,
        }
    }

    fn aborted(&mut self, reason: String) {
        match self.phase {
            Phase::Preparing { .. } | Phase::Filling | Phase::Loading { .. } | Phase::Prepared { .. } => {
                self.discard(AbortReason::Peer(reason));
            }
            // It runs here by the source's own Commit or the operator's word: an Abort cannot take it back.
            Phase::Starting { .. } | Phase::Running { .. } | Phase::Ended(_) => {}
        }
    }

    /// The one failure path before Ready. After it a fault of the connection or the source's words decides nothing.
    fn give_up(&mut self, reason: AbortReason) {
        match self.phase {
            Phase::Preparing { .. } | Phase::Filling | Phase::Loading { .. } => {
                let migration = self.migration;
                self.actions
                    .push_back(Action::Send(Message::Abort { migration, reason: reason.to_string() }));
                self.discard(reason);
            }
            Phase::Prepared { .. } => self.hold(),
            Phase::Starting { .. } | Phase::Running { .. } | Phase::Ended(_) => {}
        }
    }

    fn discard(&mut self, reason: AbortReason) {
        self.actions.push_back(Action::Discard(reason.clone()));
        self.phase = Phase::Ended(reason);
        self.deadline = None;
    }

    fn progressed(&mut self, now: Time) {
        if matches!(self.phase, Phase::Filling) {
            self.deadline = Some(now + PATIENCE);
        }
    }
}

const PATIENCE: Span = limits::PROGRESS_TIMEOUT;
