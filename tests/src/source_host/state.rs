//! Where the source's host is, for all who look at it.

use migration_proto::source::{End, Source, SourceProgress};
use migration_proto::timer::Time;
use migration_proto::wire::Message;
use migration_proto::{MigrationId, Span};
use page::{RegionId, ShortId};

use super::SourceHost;

impl SourceHost {
    /// The migration of the machine there is, if it has not ended.
    pub(crate) fn active(&self) -> Option<MigrationId> {
        self.machine.as_ref().filter(|machine| machine.end().is_none()).map(|_| self.migration())
    }

    pub(crate) fn resume_for(&self) -> Span {
        self.terms.resume_for
    }

    /// The connection is lost before Commit, all that the machine was asked for is done, and its VM stands still.
    pub(crate) fn stands_still_cut(&self, now: Time) -> bool {
        let still = self.guest.as_ref().is_some_and(|guest| !guest.running);
        still && self.is_cut() && self.lane < now
    }

    pub(crate) fn is_cut(&self) -> bool {
        self.progress() == Some(SourceProgress::PrecopyCut)
    }

    pub(super) fn progress(&self) -> Option<SourceProgress> {
        self.machine.as_ref().map(Source::progress)
    }

    pub(crate) fn in_doubt(&self) -> bool {
        self.progress() == Some(SourceProgress::InDoubt)
    }

    pub(crate) fn committed(&self) -> bool {
        match self.progress() {
            Some(
                SourceProgress::InDoubt
                | SourceProgress::Committing
                | SourceProgress::Postcopy
                | SourceProgress::PostcopyCut,
            ) => true,
            Some(
                SourceProgress::Offering
                | SourceProgress::Precopy
                | SourceProgress::PrecopyCut
                | SourceProgress::StopAndCopy
                | SourceProgress::Handover
                | SourceProgress::Ended,
            )
            | None => false,
        }
    }

    pub(super) fn in_postcopy(&self) -> bool {
        matches!(self.progress(), Some(SourceProgress::Postcopy | SourceProgress::PostcopyCut))
    }

    /// The VM lives at the destination, needs memory from here, and cannot be reached.
    pub(crate) fn cut(&self) -> bool {
        self.progress() == Some(SourceProgress::PostcopyCut)
    }

    pub(crate) fn next_timeout(&self) -> Option<Time> {
        self.machine.as_ref()?.next_timeout()
    }

    /// The phase and the deadline of a machine that has not ended.
    pub(crate) fn wait(&self) -> Option<(&'static str, Option<Time>)> {
        let machine = self.machine.as_ref().filter(|machine| machine.end().is_none())?;
        Some((machine.phase_name(), machine.next_timeout()))
    }

    /// The roots that were told last, for those that the destination says.
    pub(super) fn believe(&self, message: Message) -> Message {
        let Message::Held { regions, last } = message else { return message };
        let told = |(region, root)| (region, self.told.roots.get(&region).copied().unwrap_or(root));
        Message::Held { regions: regions.into_iter().map(told).collect(), last }
    }

    /// What the destination was last told of all regions.
    pub(crate) fn told_roots(&self) -> Vec<(RegionId, ShortId)> {
        self.told.roots.iter().map(|(region, root)| (*region, *root)).collect()
    }

    /// Why the last attempt was given up.
    pub(crate) fn aborted(&self) -> Option<String> {
        match self.machine.as_ref()?.end()? {
            End::Aborted(reason) => Some(reason.to_string()),
            End::Completed | End::LetGo | End::NotServed { .. } => None,
        }
    }
}
