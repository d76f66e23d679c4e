//! The source from the switchover to post-copy on: what is absent is named, faults are answered, and memory is kept until the destination has all of it.

use page::{Gfn, PageHash, PageSet, RegionId};

use super::converge::{Converge, StopWhy, WhyPostcopy};
use super::naming::{Naming, Step};
use super::phase::{End, Phase};
use super::{Action, Source, TooLate};
use crate::error::{AbortReason, ProtocolError};
use crate::limits;
use crate::postcopy::{ABSENT_NAME, Mode};
use crate::stats::{DestinationStats, PostcopyStats};
use crate::timer::Time;
use crate::wire::Message;

impl Source {
    /// The VM is to stand still, with these pages not at the destination as they are. What a spill file takes of them is written first.
    pub(super) fn stop_vm(&mut self, now: Time, left: PageSet) {
        if matches!(self.stop_why, Some(StopWhy::Postcopy(_))) {
            self.tell_absent(&left);
            if self.spill_ahead(now, &left) {
                return;
            }
        }
        self.phase = Phase::Pausing { dirty: left };
        self.actions.push_back(Action::Pause);
        self.deadline = Some(now + limits::LOCAL_TIMEOUT);
    }

    /// The VM stands still, and these pages are not at the destination as they are.
    pub(super) fn last_pages(&mut self, now: Time, left: PageSet) {
        let a_page = self.written_page.bytes();
        let (pages, link) = (left.len(), self.link);
        if self.stop_why == Some(StopWhy::Fits)
            && self.mode != Mode::Precopy
            && !self.converge.fits(pages, link, a_page)
        {
            self.stop_why = Some(StopWhy::Postcopy(WhyPostcopy::Grew));
        }
        if matches!(self.stop_why, Some(StopWhy::Postcopy(_))) {
            self.leave_absent(now, &left);
        } else {
            self.expected_downtime = Some(Converge::estimate(link, pages, a_page));
            self.phase = Phase::LastRound(self.new_round(now, left, true));
            self.advance(now);
        }
    }

    /// Tells which frames are absent instead of naming them. First while the VM still runs, so that little is left to tell, and to compute roots of, when
    /// it stands still; all that was named before is at the destination or stale.
    pub(super) fn tell_absent(&mut self, dirty: &PageSet) {
        let mut frames: Vec<Gfn> = Vec::new();
        for region in self.config.layout.regions() {
            let all = (region.first().0..RegionId(region.0 + 1).first().0).map(Gfn);
            // What was called stale and not named again is in the dirty log as a rule, but nothing is lost by not trusting that.
            let here = all.filter(|gfn| dirty.contains(*gfn) || !self.named_once.contains(*gfn));
            frames.extend(here.filter(|gfn| !self.absent.contains(*gfn)));
        }
        // What stood at these frames at the destination is no more.
        self.versions.end();
        self.drop_versions();
        for gfn in &frames {
            self.absent.insert(*gfn);
            self.names.set(*gfn, ABSENT_NAME);
        }
        for frames in frames.chunk_by(|a, b| a.region() == b.region()) {
            let Some(region) = frames.first().map(|gfn| gfn.region()) else { continue };
            let root = self.names.region_root(region);
            self.actions.push_back(Action::Send(Message::Absent { region, frames: frames.to_vec(), root }));
            self.absent_regions += 1;
        }
    }

    /// The VM stands still, its state is on its way, and these frames were written since it was told what is absent.
    fn leave_absent(&mut self, now: Time, dirty: &PageSet) {
        self.tell_absent(dirty);
        let (round, root) = (self.stats.rounds, self.names.root());
        self.stats.rounds += 1;
        self.stats.round_pages = self.absent.len();
        self.stats.named_pages = 0;
        self.actions.push_back(Action::Send(Message::Final { round, root }));
        self.expected_downtime = Some(Converge::estimate_postcopy(self.link, self.absent_regions));
        self.phase = Phase::Handover { root };
        self.progressed(now);
        self.spill_rest(now, dirty, root);
        if !self.absent.is_empty() {
            self.naming = Some(Naming::new(self.absent.clone(), self.domain.zero_name()));
            // Names may be there before the VM is.
            self.name_absent();
        }
    }

    /// Gives out what there is to hash, to tell and to send for faults.
    pub(super) fn name_absent(&mut self) {
        while let Some(step) = self.naming.as_mut().and_then(Naming::step) {
            self.take_step(step);
        }
    }

    fn take_step(&mut self, step: Step) {
        let action = match step {
            Step::Hash { region, pages } => Action::Hash { region, pages },
            Step::Tell { region, entries } => {
                self.stats.named_pages += entries.len() as u64;
                Action::Send(Message::PageNames { region, entries })
            }
            Step::Fault(gfn) => Action::SendFault(gfn),
        };
        self.actions.push_back(action);
    }

    /// Names of absent frames.
    pub(super) fn absent_hashed(&mut self, now: Time, region: RegionId, pages: &[(Gfn, PageHash)]) {
        let Some(naming) = &mut self.naming else { return };
        if let Some(step) = naming.hashed(region, pages) {
            self.take_step(step);
        }
        self.progressed(now);
        self.name_absent();
    }

    /// The page of an [`Action::SendFault`] is on its way, and has this name.
    pub fn fault_sent(&mut self, now: Time, gfn: Gfn, name: PageHash) {
        let Some(naming) = self.naming.as_mut().filter(|_| !matches!(self.phase, Phase::Ended(_))) else {
            return;
        };
        naming.fault_sent(gfn, name);
        self.progressed(now);
        self.name_absent();
    }

    /// A virtual CPU at the destination waits for an absent frame.
    pub(super) fn faulted(&mut self, now: Time, gfn: Gfn) -> Result<(), ProtocolError> {
        let phase = self.phase.name();
        let Some(naming) = self.naming.as_mut().filter(|naming| naming.has(gfn)) else {
            return Err(ProtocolError::Unexpected { message: "Fault", phase });
        };
        naming.fault(gfn);
        self.progressed(now);
        self.name_absent();
        Ok(())
    }

    /// The destination, which has got a new connection, lacks names of this region.
    pub(super) fn absent_wanted(&mut self, now: Time, region: RegionId) -> Result<(), ProtocolError> {
        if !self.config.layout.has(region) {
            return Err(ProtocolError::NoSuchRegion(region));
        }
        if let Some(naming) = &mut self.naming {
            naming.wanted(region);
        }
        self.progressed(now);
        self.name_absent();
        Ok(())
    }

    /// The VM runs at the destination, which lacks memory: from here on this side serves it and never runs the VM.
    pub(super) fn serve(&mut self, now: Time) {
        self.phase = Phase::Postcopy { connected: true, told: false, ran: true };
        self.progressed(now);
        self.advance(now);
    }

    /// Nothing is needed of this side any more.
    pub(super) fn completed(
        &mut self,
        stats: DestinationStats,
        postcopy: PostcopyStats,
    ) -> Result<(), ProtocolError> {
        if !matches!(self.phase, Phase::Postcopy { .. }) {
            return Err(ProtocolError::Unexpected { message: "Complete", phase: self.phase.name() });
        }
        self.destination = stats;
        self.postcopy = Some(postcopy);
        let migration = self.config.migration;
        self.actions.push_back(Action::Send(Message::Released { migration }));
        self.actions.push_back(Action::Release);
        self.finish(End::Completed);
        Ok(())
    }

    /// What was said over the connection may be lost with it.
    pub(super) fn forget_connection(&mut self) {
        self.wants.clear();
        if let Some(naming) = &mut self.naming {
            naming.cut();
        }
    }

    /// The connection is lost, or a process answers that is not the one that the VM went to.
    pub(super) fn cut_off(&mut self) {
        self.forget_connection();
        if let Phase::Postcopy { connected, told, .. } = &mut self.phase {
            *connected = false;
            if !std::mem::replace(told, true) {
                self.actions.push_back(Action::PostcopyCut);
            }
        }
    }

    /// Work for the destination failed after Commit. The destination says over a new connection what it lacks, and the work begins anew.
    pub(super) fn begin_anew(&mut self) {
        let Some(naming) = &mut self.naming else { return };
        naming.lost_work();
        self.literal_batches = 0;
        self.forget_connection();
        match &mut self.phase {
            Phase::Committed { connected, .. } | Phase::Postcopy { connected, .. } => *connected = false,
            Phase::Offering
            | Phase::Collecting
            | Phase::Round(_)
            | Phase::Pausing { .. }
            | Phase::CollectingLast { .. }
            | Phase::LastRound(_)
            | Phase::Handover { .. }
            | Phase::Cut(_)
            | Phase::Ended(_) => return,
        }
        self.actions.push_back(Action::Reconnect);
    }

    /// The operator's word once the VM lives at the destination.
    pub(super) fn resolve_postcopy(
        &mut self,
        connected: bool,
        ran: bool,
        run_here: bool,
    ) -> Result<(), TooLate> {
        match (run_here, connected) {
            (true, _) if ran => Err(TooLate::RunsThere),
            // An operator said before that the VM lives there, and has looked again.
            (true, _) => {
                let why = "an operator resolved the doubt: the VM runs here";
                self.run_on(AbortReason::Local(why.to_owned()), true);
                Ok(())
            }
            (false, true) => Err(TooLate::Needed),
            (false, false) => {
                self.actions.push_back(Action::Release);
                self.finish(End::LetGo);
                Ok(())
            }
        }
    }
}
