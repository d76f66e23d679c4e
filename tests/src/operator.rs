//! An operator who looks at both hosts before they decide, as `resolve` demands. They may take their time: the protocol may
//! settle the matter first.

use migration_proto::Span;

use crate::source_host::SourceJob;
use crate::world::{Event, World};

impl World {
    /// An operator is told, or looks again later.
    pub(crate) fn call_operator(&mut self) {
        if !std::mem::replace(&mut self.operator_waits, true) {
            let later = Span(self.rng.spread(1_000, 300_000_000));
            self.after(later, Event::Operator);
        }
    }

    /// An operator does not wait for the link to come back.
    pub(crate) fn lose_patience(&mut self, outage: Span) {
        let later = Span(self.rng.below(outage.0 + 1));
        self.after(later, Event::Source { attempt: self.source.attempt, job: SourceJob::Cancel });
    }

    /// Cancels at once, whatever the source is at; after Commit it is refused.
    pub(crate) fn cancel_source(&mut self) {
        let too_late = self.source.active().is_none() || self.source.committed();
        let mut said = None;
        self.tell_source(|machine| said = Some(machine.cancel()));
        // Before the first connection there is nothing to cancel.
        let Some(said) = said else { return };
        let ended = self.source.active().is_none();
        self.check.require(said.is_err() == too_late && (too_late || ended), || {
            format!("cancelled, too late: {too_late}, the source said {said:?}, and ended: {ended}")
        });
    }

    pub(crate) fn operate(&mut self) {
        self.operator_waits = false;
        if self.source.in_doubt() {
            self.settle_source();
        } else if self.source.cut() {
            self.settle_cut();
        } else if self.destination.held() {
            self.settle_destination();
        }
        if self.source.in_doubt() || self.source.cut() || self.destination.held() {
            self.call_operator();
        }
    }

    /// The source is in doubt, so it is alive and its VM stands still.
    fn settle_source(&mut self) {
        if !self.destination.alive() {
            // Nobody can run the VM there. One who restarts the process there first learns what it says.
            if !self.destination.restarts() {
                self.resolve_source(true);
            }
        } else if self.destination.migration() != self.source.active() {
            // A new process, which never heard of the VM. The operator knows that the old one, and whatever it ran, is dead.
            self.resolve_source(true);
        } else if self.destination.running {
            self.resolve_source(false);
        } else if self.destination.held() {
            // Either side will do; the other one first promises not to.
            if self.rng.chance(50) {
                self.resolve_destination(false);
                self.resolve_source(true);
            } else {
                self.resolve_source(false);
                self.resolve_destination(true);
            }
        }
    }

    /// The VM lives at the destination, which cannot be reached. Only if it is no more is there nothing to keep memory for.
    fn settle_cut(&mut self) {
        let there = self.destination.alive() && self.destination.migration() == self.source.active();
        if !there && !self.destination.restarts() {
            self.resolve_source(false);
        }
    }

    /// The destination holds the VM, and the source is not in doubt.
    fn settle_destination(&mut self) {
        if !self.source.alive {
            self.resolve_destination(true);
        } else if self.source.active() != self.destination.migration() {
            // That attempt has ended at the source: with an abort, or with an operator's word that the VM lives here.
            let let_go = self.source.guest.is_none();
            self.resolve_destination(let_go);
        }
    }
}
