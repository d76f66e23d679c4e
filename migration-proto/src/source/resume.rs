//! The source while its connection is lost before Commit: the VM runs on here, writes go on being logged, the destination is dialled, and when it is
//! reached only what it does not hold is named again.
//!
//! What must not be lost on the way is a page between the dirty log and the names. So a frame that was taken out of the log counts as unnamed until it
//! is named, and a round of a new connection has every frame that is unnamed, or was never named, or lies in a region that the destination does not hold
//! as it was told. That round begins when everything that was given out before the break has come back: no late answer can pass for a new one.

use std::collections::BTreeSet;

use page::{Gfn, PageSet, RegionId, ShortId};

use super::converge::Converge;
use super::phase::Phase;
use super::{Action, Source};
use crate::error::{AbortReason, ProtocolError};
use crate::limits;
use crate::switchover::RunPermit;
use crate::timer::{Span, Time};
use crate::wire::Message;

/// What is known in [`Phase::Cut`].
#[derive(Debug)]
pub(super) struct Cut {
    since: Time,
    /// When the migration is given up.
    until: Time,
    /// The virtual CPUs have been asked to stand still and are to run on.
    still: bool,
    talk: Talk,
}

/// How far the new connection is.
#[derive(Debug)]
enum Talk {
    /// There is none.
    Dialling,
    /// The destination has been asked what it holds; these regions it holds as they were told.
    Asked(BTreeSet<RegionId>),
    /// It has said all.
    Told(BTreeSet<RegionId>),
}

/// What was given to the driver and has not come back.
#[derive(Debug, Default)]
pub(super) struct Owed {
    hashes: usize,
    /// Answers of the machine: paused, saved, collected, running on.
    machine: usize,
    /// Batches for the spill file.
    spills: usize,
}

impl Owed {
    pub(super) fn give_out(&mut self, action: &Action) {
        match action {
            Action::Hash { .. } => self.hashes += 1,
            Action::CollectDirty | Action::Pause | Action::SaveState | Action::RunOn(_) => self.machine += 1,
            Action::Spill { .. } => self.spills += 1,
            // `SendLiterals` has a window of its own, and a break after `SealSpill` ends the migration; the others need no answer.
            Action::SendLiterals { .. }
            | Action::Send(_)
            | Action::StartDirtyLog
            | Action::DropVersions(_)
            | Action::SendFault(_)
            | Action::SealSpill { .. }
            | Action::Throttle { .. }
            | Action::Reconnect
            | Action::InDoubt
            | Action::PostcopyCut
            | Action::Resume { .. }
            | Action::Release => {}
        }
    }

    pub(super) fn hashed(&mut self) {
        self.hashes = self.hashes.saturating_sub(1);
    }

    pub(super) fn machine_answered(&mut self) {
        self.machine = self.machine.saturating_sub(1);
    }

    pub(super) fn spilled(&mut self) {
        self.spills = self.spills.saturating_sub(1);
    }

    /// Whether nothing that reads memory or the dirty log is under way.
    fn is_nothing(&self) -> bool {
        self.hashes == 0 && self.machine == 0 && self.spills == 0
    }
}

impl Source {
    /// The connection is lost. False if that ends the migration: nothing has come about yet, or the time to dial again is over, or there is none.
    pub(super) fn break_off(&mut self, now: Time) -> bool {
        // A spill file's root says nothing of the pages in it: with two files of one migration, one that could not be removed could be served for the other.
        if self.config.resume_for == Span(0) || self.seals_spill() {
            return false;
        }
        let still = match &mut self.phase {
            Phase::Collecting | Phase::Round(_) => false,
            Phase::Pausing { .. }
            | Phase::CollectingLast { .. }
            | Phase::LastRound(_)
            | Phase::Handover { .. } => true,
            Phase::Cut(cut) => {
                if matches!(cut.talk, Talk::Told(_)) {
                    cut.until = now + self.config.resume_for;
                }
                cut.talk = Talk::Dialling;
                let until = cut.until;
                self.deadline = Some((now + limits::ASK_AGAIN).min(until));
                return now < until;
            }
            Phase::Offering | Phase::Committed { .. } | Phase::Postcopy { .. } | Phase::Ended(_) => {
                return false;
            }
        };
        self.stats.breaks += 1;
        self.wants.clear();
        self.full_speed(Some(now));
        self.converge = Converge::new(self.config.downtime, self.config.auto_converge);
        self.forget_switchover();
        let until = now + self.config.resume_for;
        self.phase = Phase::Cut(Cut { since: now, until, still, talk: Talk::Dialling });
        self.dial(now, until);
        self.settle(now);
        true
    }

    /// What was told to be absent is to be named after all: the VM runs on here and decides anew when to stop.
    fn forget_switchover(&mut self) {
        for gfn in self.absent.iter() {
            self.named_once.remove(gfn);
        }
        self.absent = PageSet::empty(self.config.layout.page_bound());
        self.absent_regions = 0;
        self.naming = None;
        self.verified = false;
        self.stop_why = None;
        self.expected_downtime = None;
    }

    fn dial(&mut self, now: Time, until: Time) {
        self.actions.push_back(Action::Reconnect);
        self.deadline = Some((now + limits::RUNNING_TIMEOUT).min(until));
    }

    /// The deadline has come while the connection is lost.
    pub(super) fn cut_for_long(&mut self, now: Time) {
        let Phase::Cut(cut) = &mut self.phase else { return };
        let until = cut.until;
        match cut.talk {
            Talk::Told(_) => {
                self.abort(AbortReason::Timeout("what was under way when the connection was lost"))
            }
            Talk::Dialling | Talk::Asked(_) if now >= until => self.abort(AbortReason::Disconnected),
            Talk::Dialling | Talk::Asked(_) => {
                cut.talk = Talk::Dialling;
                self.dial(now, until);
            }
        }
    }

    /// A new connection stands: its first message.
    pub(super) fn ask_what_is_held(&mut self, now: Time) {
        let Phase::Cut(cut) = &mut self.phase else { return };
        cut.talk = Talk::Asked(BTreeSet::new());
        self.deadline = Some((now + limits::RUNNING_TIMEOUT).min(cut.until));
        let (migration, epoch) = (self.config.migration, self.config.epoch);
        self.actions.push_back(Action::Send(Message::Resume { migration, epoch }));
    }

    /// Whether there is no connection that could bring anything.
    pub(super) fn is_dialling(&self) -> bool {
        matches!(&self.phase, Phase::Cut(cut) if matches!(cut.talk, Talk::Dialling))
    }

    /// What the destination holds. It is believed where it agrees with what was told.
    pub(super) fn held(
        &mut self,
        now: Time,
        regions: &[(RegionId, ShortId)],
        last: bool,
    ) -> Result<(), ProtocolError> {
        let phase = self.phase.name();
        let Phase::Cut(Cut { talk, until, .. }) = &mut self.phase else {
            return Err(ProtocolError::Unexpected { message: "Held", phase });
        };
        let Talk::Asked(held) = talk else {
            return Err(ProtocolError::Unexpected { message: "Held", phase });
        };
        for (region, root) in regions {
            if !self.config.layout.has(*region) {
                return Err(ProtocolError::NoSuchRegion(*region));
            }
            if self.names.region_root(*region).short() == *root {
                held.insert(*region);
            }
        }
        if last {
            *talk = Talk::Told(std::mem::take(held));
            self.deadline = Some(now + limits::LOCAL_TIMEOUT);
            self.settle(now);
        } else {
            self.deadline = Some((now + limits::RUNNING_TIMEOUT).min(*until));
        }
        Ok(())
    }

    /// The VM runs on after [`Action::RunOn`].
    pub fn vm_runs_on(&mut self, now: Time) {
        self.owed.machine_answered();
        self.settle(now);
    }

    /// Goes on as far as what was given out has come back.
    pub(super) fn settle(&mut self, now: Time) {
        let Phase::Cut(cut) = &mut self.phase else { return };
        if cut.still {
            if self.owed.machine == 0 {
                cut.still = false;
                self.actions.push_back(Action::RunOn(RunPermit::new(self.config.epoch)));
            }
            return;
        }
        if !self.owed.is_nothing() || self.literal_batches > 0 {
            return;
        }
        if let Talk::Told(held) = &mut cut.talk {
            let held = std::mem::take(held);
            self.stats.cut_off.0 += (now - cut.since).0;
            self.forget_spill();
            // Not before now: a page encoded late is kept by the driver too.
            self.versions.forget();
            self.drop_versions();
            let todo = self.lacks_names(&held);
            self.begin_round(now, todo);
        }
    }

    fn lacks_names(&mut self, held: &BTreeSet<RegionId>) -> PageSet {
        let mut todo = self.unnamed.clone();
        for region in self.config.layout.regions() {
            let known = held.contains(&region);
            for gfn in (region.first().0..RegionId(region.0 + 1).first().0).map(Gfn) {
                if !known {
                    self.named_once.remove(gfn);
                }
                if !self.named_once.contains(gfn) {
                    todo.insert(gfn);
                }
            }
        }
        todo
    }
}
