//! The destination while its connection is lost before it has said Ready: it keeps what it has, and tells the source that comes back what is whole.

use super::phase::Phase;
use super::{Action, Destination};
use crate::error::{AbortReason, ProtocolError};
use crate::limits;
use crate::switchover::Epoch;
use crate::timer::{Span, Time};
use crate::wire::Message;

/// Whether, and for how long, what is here outlives its connection.
#[derive(Debug)]
pub(super) struct Keeping {
    resume_for: Span,
    /// The connection is lost.
    pub(super) cut_off: bool,
}

impl Keeping {
    pub(super) fn new(resume_for: Span) -> Self {
        Self { resume_for, cut_off: false }
    }
}

impl Destination {
    /// Whether the connection is lost and what is here is kept for the source to come back.
    #[must_use]
    pub fn is_cut_off(&self) -> bool {
        self.keeping.cut_off && matches!(self.phase, Phase::Filling)
    }

    /// The connection is lost. False if nothing is kept.
    pub(super) fn keep(&mut self, now: Time) -> bool {
        let keeps = matches!(self.phase, Phase::Filling) && self.keeping.resume_for > Span(0);
        // A loss that is told twice does not make the wait longer.
        if keeps && !std::mem::replace(&mut self.keeping.cut_off, true) {
            self.deadline = Some(now + self.keeping.resume_for + limits::RESUME_GRACE);
        }
        keeps
    }

    /// The source has come back, over a new connection, and runs the VM.
    pub(super) fn resume(&mut self, now: Time, epoch: Epoch) -> Result<(), ProtocolError> {
        let migration = self.migration;
        match &self.phase {
            Phase::Filling if epoch == self.epoch => self.say_held(now),
            // The state that is loaded is void, and a machine takes but one.
            Phase::Loading { .. } | Phase::Prepared { .. } if epoch == self.epoch => {
                self.actions.push_back(Action::Send(Message::NotRunning { migration }));
                self.discard(AbortReason::Disconnected);
            }
            Phase::Ended(_) => self.actions.push_back(Action::Send(Message::NotRunning { migration })),
            // By the operator's word, or the question is older than the source's Commit.
            Phase::Running { .. } => self.say_running(),
            Phase::Starting { .. } => {}
            // Before Accept there is nothing to come back to.
            Phase::Preparing { .. } | Phase::Filling | Phase::Loading { .. } | Phase::Prepared { .. } => {
                return Err(ProtocolError::OtherMigration);
            }
        }
        Ok(())
    }

    /// What was said over the lost connection counts as not said, but for the regions that are whole: their frames keep their names.
    fn say_held(&mut self, now: Time) {
        self.keeping.cut_off = false;
        for request in self.pending.forget_all() {
            self.actions.push_back(Action::Forget(request));
        }
        (self.state, self.last, self.round_end, self.absent) = (None, None, None, None);
        self.rescued = false;
        self.delta_misses.clear();
        let held = self.memory.keep_whole();
        let mut rest = &held[..];
        loop {
            let (part, after) = rest.split_at(rest.len().min(limits::HELD_REGIONS));
            let last = after.is_empty();
            self.actions.push_back(Action::Send(Message::Held { regions: part.to_vec(), last }));
            rest = after;
            if last {
                break;
            }
        }
        self.progressed(now);
    }
}
