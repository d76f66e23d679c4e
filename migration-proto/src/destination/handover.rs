//! The end of a migration at the destination: Ready, Commit and what answers it, doubt and the operator's word, deadlines and lost connections.

use page::PageHash;

use super::phase::Phase;
use super::{Action, Destination, NotHeld};
use crate::error::{AbortReason, ProtocolError};
use crate::limits;
use crate::switchover::{Epoch, RunPermit};
use crate::timer::Time;
use crate::wire::Message;

impl Destination {
    /// The source offers the VM in another migration, so it owns and runs it: what is held or kept here is void.
    pub fn superseded(&mut self) {
        match self.phase {
            Phase::Preparing { .. } | Phase::Filling | Phase::Loading { .. } | Phase::Prepared { .. } => {
                self.discard(AbortReason::Peer("it offered the VM anew".to_owned()));
            }
            Phase::Starting { .. } | Phase::Running { .. } | Phase::Ended(_) => {}
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

    pub(super) fn commit(&mut self, now: Time, epoch: Epoch) -> Result<(), ProtocolError> {
        match &self.phase {
            Phase::Prepared { .. } if epoch == self.epoch.next() => self.start(now, epoch, false),
            Phase::Running { epoch: ours } if epoch == *ours => {
                self.say_running();
                self.tell_lack(now);
            }
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

    /// A connection begins with [`Message::Serve`]: what is answered to it, after which it is closed; `None` if it is the machine's from here on. It is only where the
    /// VM runs by this very switchover: nothing that was said with a spill file in hand starts a VM, ends one, or takes the source's connection away before.
    #[must_use]
    pub fn serve_answer(&self, epoch: Epoch, root: PageHash) -> Option<Message> {
        let migration = self.migration;
        let agreed = self.last.is_some_and(|(_, ours)| ours == root);
        match &self.phase {
            Phase::Starting { epoch: ours, .. } | Phase::Running { epoch: ours }
                if *ours == epoch && agreed =>
            {
                None
            }
            Phase::Ended(_) => Some(Message::NotRunning { migration }),
            Phase::Preparing { .. }
            | Phase::Filling
            | Phase::Loading { .. }
            | Phase::Prepared { .. }
            | Phase::Starting { .. }
            | Phase::Running { .. } => Some(Message::Unknown { migration }),
        }
    }

    pub(super) fn served(&mut self, now: Time, epoch: Epoch, root: PageHash) {
        if let Some(answer) = self.serve_answer(epoch, root) {
            self.actions.push_back(Action::Send(answer));
        } else if matches!(self.phase, Phase::Running { .. }) {
            self.say_running();
            self.tell_lack(now);
        }
    }

    fn start(&mut self, now: Time, epoch: Epoch, held: bool) {
        self.phase = Phase::Starting { epoch, held };
        self.actions.push_back(Action::Run(RunPermit::new(epoch)));
        self.deadline = Some(now + limits::LOCAL_TIMEOUT);
    }

    /// The virtual CPUs run.
    pub fn running(&mut self, now: Time) {
        if let Phase::Starting { epoch, .. } = self.phase {
            self.phase = Phase::Running { epoch };
            self.deadline = None;
            self.say_running();
            if let Some(absent) = &mut self.absent {
                absent.runs();
            }
            self.tell_lack(now);
        }
    }

    pub(super) fn say_running(&mut self) {
        let (migration, stats) = (self.migration, self.stats);
        self.actions.push_back(Action::Send(Message::Running { migration, stats }));
    }

    pub(super) fn released(&mut self) {
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
    pub fn disconnected(&mut self, now: Time) {
        let link = self.link;
        if let Some(absent) = self.late() {
            absent.disconnected(now, link);
            self.after_late();
        }
        if self.keep(now) {
            return;
        }
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
        let link = self.link;
        if let Some(absent) = self.late() {
            self.stats.site_timeouts += absent.timeout(now, link);
            self.after_late();
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
            Phase::Filling if self.keeping.cut_off => self.discard(AbortReason::Disconnected),
            Phase::Preparing { .. } | Phase::Filling | Phase::Loading { .. } => {
                self.give_up(AbortReason::Timeout(self.phase.name()));
            }
            Phase::Running { .. } | Phase::Ended(_) => self.deadline = None,
        }
    }

    pub(super) fn aborted(&mut self, reason: String) {
        match self.phase {
            Phase::Preparing { .. } | Phase::Filling | Phase::Loading { .. } | Phase::Prepared { .. } => {
                self.discard(AbortReason::Peer(reason));
            }
            // It runs here by the source's own Commit or the operator's word: an Abort cannot take it back.
            Phase::Starting { .. } | Phase::Running { .. } | Phase::Ended(_) => {}
        }
    }

    /// The one failure path before Ready. After it a fault of the connection or the source's words decides nothing.
    pub(super) fn give_up(&mut self, reason: AbortReason) {
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

    pub(super) fn discard(&mut self, reason: AbortReason) {
        self.actions.push_back(Action::Discard(reason.clone()));
        self.phase = Phase::Ended(reason);
        self.absent = None;
        self.deadline = None;
    }
}
