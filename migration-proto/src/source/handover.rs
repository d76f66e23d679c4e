//! The end of a migration: Ready, Commit and what answers it, doubt and the operator's word, deadlines and lost connections.

use page::PageHash;

use super::phase::{End, Phase};
use super::{Action, Source, TooLate};
use crate::error::{AbortReason, ProtocolError};
use crate::limits;
use crate::stats::DestinationStats;
use crate::switchover::RunPermit;
use crate::timer::{Span, Time};
use crate::wire::Message;

impl Source {
    pub(super) fn ready(&mut self, now: Time, theirs: PageHash) -> Result<(), ProtocolError> {
        match self.phase {
            Phase::Handover { root } if root == theirs => {
                self.verified = true;
                self.commit_if_safe(now);
                Ok(())
            }
            Phase::Handover { .. } => {
                self.abort(AbortReason::RootMismatch);
                Ok(())
            }
            Phase::Ended(_) => Ok(()),
            Phase::Offering
            | Phase::Collecting
            | Phase::Round(_)
            | Phase::Pausing { .. }
            | Phase::CollectingLast { .. }
            | Phase::LastRound(_)
            | Phase::Cut(_)
            | Phase::Committed { .. }
            | Phase::Postcopy { .. } => {
                Err(ProtocolError::Unexpected { message: "Ready", phase: self.phase.name() })
            }
        }
    }

    /// The destination is ready. If absent pages are to stand in a spill file, they do so first.
    pub(super) fn commit_if_safe(&mut self, now: Time) {
        if self.verified && matches!(self.phase, Phase::Handover { .. }) && self.is_spilled() {
            self.phase = Phase::Committed { connected: true, in_doubt: false };
            self.actions.push_back(Action::Send(self.first_word()));
            self.deadline = Some(now + limits::RUNNING_TIMEOUT);
        }
    }

    /// What a connection after Commit begins with. A source made of a spill file does not know whether the one that it was had sent Commit: it must say
    /// nothing that starts a VM.
    pub(super) fn first_word(&self) -> Message {
        let (migration, epoch) = (self.config.migration, self.config.epoch.next());
        match self.served {
            Some(root) => Message::Serve { migration, epoch, root },
            None => Message::Commit { migration, epoch },
        }
    }

    pub(super) fn runs_there(&mut self, now: Time, stats: DestinationStats) -> Result<(), ProtocolError> {
        if matches!(self.phase, Phase::Cut(_)) {
            let two = "the destination says that the VM runs there, by its operator's word, and it runs here too: stop one of the two";
            self.run_on(AbortReason::Local(two.to_owned()), false);
            return Ok(());
        }
        if !matches!(self.phase, Phase::Committed { .. } | Phase::Postcopy { .. }) {
            return Err(ProtocolError::Unexpected { message: "Running", phase: self.phase.name() });
        }
        self.destination = stats;
        if self.naming.is_some() {
            self.serve(now);
            return Ok(());
        }
        let migration = self.config.migration;
        self.actions.push_back(Action::Send(Message::Released { migration }));
        self.actions.push_back(Action::Release);
        self.finish(End::Completed);
        Ok(())
    }

    pub(super) fn never_ran_there(&mut self) -> Result<(), ProtocolError> {
        if self.served.is_some() {
            self.not_served(true);
            return Ok(());
        }
        if matches!(self.phase, Phase::Cut(_)) {
            self.run_on(AbortReason::Peer("it has given the migration up".to_owned()), false);
            return Ok(());
        }
        // After Running no promise can take back that it ran.
        if !matches!(self.phase, Phase::Committed { .. } | Phase::Postcopy { ran: false, .. }) {
            return Err(ProtocolError::Unexpected { message: "NotRunning", phase: self.phase.name() });
        }
        self.run_on(AbortReason::Peer("it did not run the VM and never will".to_owned()), false);
        Ok(())
    }

    /// Another process answers where the destination's was: whether that one ran the VM, only the operator can find out.
    pub(super) fn nobody_knows(&mut self, now: Time) -> Result<(), ProtocolError> {
        if self.served.is_some() {
            self.not_served(false);
            return Ok(());
        }
        match &mut self.phase {
            Phase::Committed { in_doubt, .. } => {
                if !std::mem::replace(in_doubt, true) {
                    self.actions.push_back(Action::InDoubt);
                }
            }
            Phase::Postcopy { .. } => self.cut_off(),
            Phase::Cut(_) => {
                let why = "another process answers there, which knows nothing of the migration";
                self.run_on(AbortReason::Peer(why.to_owned()), false);
                return Ok(());
            }
            Phase::Offering
            | Phase::Collecting
            | Phase::Round(_)
            | Phase::Pausing { .. }
            | Phase::CollectingLast { .. }
            | Phase::LastRound(_)
            | Phase::Handover { .. }
            | Phase::Ended(_) => {
                return Err(ProtocolError::Unexpected { message: "Unknown", phase: self.phase.name() });
            }
        }
        // The process that is asked for may come back at the address.
        self.deadline = Some(now + limits::RUNNING_TIMEOUT);
        Ok(())
    }

    /// An operator wants the migration to end and the VM to run on here.
    ///
    /// # Errors
    /// After Commit: the VM may run at the destination.
    pub fn cancel(&mut self) -> Result<(), TooLate> {
        match self.phase {
            Phase::Committed { .. } | Phase::Postcopy { .. } => Err(TooLate::Committed),
            Phase::Ended(_) => Err(TooLate::Ended),
            Phase::Offering
            | Phase::Collecting
            | Phase::Round(_)
            | Phase::Pausing { .. }
            | Phase::CollectingLast { .. }
            | Phase::LastRound(_)
            | Phase::Handover { .. }
            | Phase::Cut(_) => {
                self.abort(AbortReason::Cancelled);
                Ok(())
            }
        }
    }

    /// Something that the driver was asked to do failed.
    pub fn failed(&mut self, what: String) {
        if matches!(self.phase, Phase::Committed { .. } | Phase::Postcopy { .. }) {
            self.begin_anew();
        } else {
            self.abort(AbortReason::Local(what));
        }
    }

    /// The connection was lost, or a [`Action::Reconnect`] failed.
    pub fn disconnected(&mut self, now: Time) {
        if self.lost() {
            self.deadline = Some(now + limits::ASK_AGAIN);
        } else if !self.break_off(now) {
            self.abort(AbortReason::Disconnected);
        }
    }

    /// The answer to Commit, or in post-copy the connection, is overdue or lost. False before Commit.
    fn lost(&mut self) -> bool {
        match &mut self.phase {
            Phase::Committed { connected, in_doubt } => {
                *connected = false;
                if !std::mem::replace(in_doubt, true) {
                    self.actions.push_back(Action::InDoubt);
                }
                self.forget_connection();
                true
            }
            Phase::Postcopy { .. } => {
                self.cut_off();
                true
            }
            Phase::Offering
            | Phase::Collecting
            | Phase::Round(_)
            | Phase::Pausing { .. }
            | Phase::CollectingLast { .. }
            | Phase::LastRound(_)
            | Phase::Handover { .. }
            | Phase::Cut(_)
            | Phase::Ended(_) => false,
        }
    }

    /// A new connection stands: the question is asked again.
    pub fn connected(&mut self, now: Time) {
        match &mut self.phase {
            Phase::Committed { connected, .. } => *connected = true,
            // Whether the destination's process is still there, its answer tells.
            Phase::Postcopy { .. } => {}
            Phase::Cut(_) => return self.ask_what_is_held(now),
            Phase::Offering
            | Phase::Collecting
            | Phase::Round(_)
            | Phase::Pausing { .. }
            | Phase::CollectingLast { .. }
            | Phase::LastRound(_)
            | Phase::Handover { .. }
            | Phase::Ended(_) => return,
        }
        self.forget_connection();
        let word = self.first_word();
        self.actions.push_back(Action::Send(word));
        self.deadline = Some(now + limits::RUNNING_TIMEOUT);
    }

    /// The operator, who has looked at the destination, settles a hand-over in doubt: `run_here` if the VM does not run there
    /// and cannot come to run there.
    ///
    /// In post-copy the VM, when it lives at the destination, may need this host's memory: letting go of a hand-over in doubt only settles where it
    /// lives, and memory is kept and the destination dialled. Letting go again, while the connection is lost, frees the memory: the VM, if it runs
    /// there, does without what it lacks, and stops where it needs that.
    ///
    /// # Errors
    /// If nothing is in doubt, or the destination has said that it runs the VM.
    pub fn resolve(&mut self, run_here: bool) -> Result<(), TooLate> {
        if let Phase::Postcopy { connected, ran, .. } = self.phase {
            return self.resolve_postcopy(connected, ran, run_here);
        }
        if !matches!(self.phase, Phase::Committed { in_doubt: true, .. }) {
            return Err(if self.end().is_some() { TooLate::Ended } else { TooLate::NotInDoubt });
        }
        if run_here {
            self.run_on(
                AbortReason::Local("an operator resolved the doubt: the VM runs here".to_owned()),
                true,
            );
        } else if self.naming.is_some() {
            self.phase = Phase::Postcopy { connected: false, told: true, ran: false };
        } else {
            self.actions.push_back(Action::Release);
            self.finish(End::LetGo);
        }
        Ok(())
    }

    /// The deadline of [`Source::next_timeout`] has come.
    pub fn timeout(&mut self, now: Time) {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        // Either the answer or the connection is overdue: ask anew, for ever; only an answer or the operator settles it.
        if self.lost() {
            self.actions.push_back(Action::Reconnect);
            self.deadline = Some(now + limits::RUNNING_TIMEOUT);
        } else if matches!(self.phase, Phase::Cut(_)) {
            self.cut_for_long(now);
        } else {
            self.abort(AbortReason::Timeout(self.phase.name()));
        }
    }

    /// The one failure path: before Commit the VM runs on here; after it nothing but an answer counts.
    pub(super) fn abort(&mut self, reason: AbortReason) {
        match self.phase {
            Phase::Committed { .. } | Phase::Postcopy { .. } | Phase::Ended(_) => {}
            Phase::Offering
            | Phase::Collecting
            | Phase::Round(_)
            | Phase::Pausing { .. }
            | Phase::CollectingLast { .. }
            | Phase::LastRound(_)
            | Phase::Handover { .. }
            | Phase::Cut(_) => {
                let notify = self.is_kept_there(&reason);
                let migration = self.config.migration;
                self.actions
                    .push_back(Action::Send(Message::Abort { migration, reason: reason.to_string() }));
                self.run_on(reason, notify);
            }
        }
    }

    /// Whether the destination may hold the VM, or keep what it has of it, if it does not hear of the end.
    fn is_kept_there(&self, reason: &AbortReason) -> bool {
        match reason {
            AbortReason::Refused(_) | AbortReason::Peer(_) => false,
            AbortReason::Cancelled
            | AbortReason::Protocol(_)
            | AbortReason::Disconnected
            | AbortReason::Timeout(_)
            | AbortReason::Spill(_)
            | AbortReason::Local(_)
            | AbortReason::RootMismatch
            | AbortReason::Unresolved(_) => {
                // Without a time to keep it, only what has been sent the last page can have said Ready and hold the VM.
                self.config.resume_for > Span(0) || matches!(self.phase, Phase::Handover { .. })
            }
        }
    }

    pub(super) fn run_on(&mut self, reason: AbortReason, notify: bool) {
        self.full_speed(None);
        let permit = RunPermit::new(self.config.epoch);
        self.actions.push_back(Action::Resume { permit, notify, reason: reason.clone() });
        self.finish(End::Aborted(reason));
    }

    pub(super) fn finish(&mut self, end: End) {
        self.phase = Phase::Ended(end);
        self.deadline = None;
        self.wants.clear();
    }
}
