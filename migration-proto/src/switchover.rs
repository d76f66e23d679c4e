//! Who owns the VM, at each message.
//!
//! ```text
//!   message                 the source may run it         the destination may run it
//!   before Commit is sent   yes                           no
//!   Commit sent             no, whatever happens          once it has received Commit
//!   Running received        no, ever                      yes
//!   NotRunning received     yes: the destination has      no, ever: it gave the migration up, and Commit for it is answered
//!                           promised never to run it      NotRunning
//!   Unknown received        no: another process may       no
//!                           have run it there
//! ```
//! A spill file (`vmm migrate --spill`) gives whoever has it the absent pages and no right: Serve, which its server says in the place of Commit, starts nothing.
//!
//! In post-copy the same holds, although the destination runs the VM before it has all of its memory: the source keeps memory until Complete, without
//! the right to run on it.
//!
//! Commit is idempotent: a source in doubt sends it again over a new connection, and the destination's answer settles the
//! matter. A process that has taken the place of the destination's knows nothing of what that one did, perhaps for hours, and
//! says so (Unknown). A destination that no longer exists cannot answer. In both cases the operator, who can look at the host, decides.
//!
//! The VM's epoch counts its owners. Each hand-over adds one, and whoever holds an older epoch is fenced.

use std::collections::BTreeMap;
use std::fmt;

/// Which VM: random, given at launch, the same for all its life.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmId(pub [u8; 16]);

/// Which attempt to migrate: random, given by the source.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MigrationId(pub [u8; 16]);

/// How many owners a VM had before the present one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch after a hand-over.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

fn hex(bytes: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    bytes.iter().try_for_each(|b| write!(f, "{b:02x}"))
}

impl fmt::Debug for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, f)
    }
}

impl fmt::Debug for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, f)
    }
}

/// The right to run a VM, which only the protocol gives: a driver can resume a VM in the course of a migration only
/// with one of these in hand.
#[derive(Debug, PartialEq, Eq)]
pub struct RunPermit {
    epoch: Epoch,
}

impl RunPermit {
    pub(crate) fn new(epoch: Epoch) -> Self {
        Self { epoch }
    }

    /// The epoch as whose owner the VM runs.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }
}

/// What became of a migration that this host was the destination of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// The VM was run here as this epoch's owner.
    Ran(Epoch),
    /// It was not and will never be.
    Refused,
    /// This process never heard of it and will never run it; one that was here before may have.
    Unknown,
}

/// A destination host's memory of past migrations, so that a Commit that comes again, or too late, gets the one true answer.
#[derive(Debug, Default)]
pub struct Ledger {
    fates: BTreeMap<MigrationId, Fate>,
    epochs: BTreeMap<VmId, Epoch>,
}

impl Ledger {
    /// Writes down how a migration ended. The first entry stands for ever.
    pub fn record(&mut self, migration: MigrationId, vm: VmId, fate: Fate) {
        let fate = *self.fates.entry(migration).or_insert(fate);
        if let Fate::Ran(epoch) = fate {
            let newest = self.epochs.entry(vm).or_insert(epoch);
            *newest = epoch.max(*newest);
        }
    }

    /// The answer to a Commit for a migration that is not under way here: Running, NotRunning or Unknown. One that was never heard
    /// of will never run here from now on.
    pub fn answer(&mut self, migration: MigrationId) -> Fate {
        *self.fates.entry(migration).or_insert(Fate::Unknown)
    }

    /// The answer to [`Message::Serve`](crate::wire::Message::Serve) for a migration that is not under way here: as [`Ledger::answer`], but it promises nothing.
    #[must_use]
    pub fn look_up(&self, migration: MigrationId) -> Fate {
        self.fates.get(&migration).copied().unwrap_or(Fate::Unknown)
    }

    /// Whether an offer of `vm` by an owner of `epoch` is older than what ran here.
    #[must_use]
    pub fn is_fenced(&self, vm: VmId, epoch: Epoch) -> bool {
        self.epochs.get(&vm).is_some_and(|newest| epoch < *newest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VM: VmId = VmId([1; 16]);

    #[test]
    fn an_unknown_migration_never_runs() {
        let mut ledger = Ledger::default();
        let id = MigrationId([2; 16]);
        assert_eq!(ledger.answer(id), Fate::Unknown);
        ledger.record(id, VM, Fate::Ran(Epoch(1)));
        assert_eq!(ledger.answer(id), Fate::Unknown);
        assert!(!ledger.is_fenced(VM, Epoch(0)));
    }

    #[test]
    fn an_owner_of_an_older_epoch_is_fenced() {
        let mut ledger = Ledger::default();
        ledger.record(MigrationId([3; 16]), VM, Fate::Ran(Epoch(5)));
        assert!(ledger.is_fenced(VM, Epoch(4)));
        assert!(!ledger.is_fenced(VM, Epoch(5)));
        assert!(!ledger.is_fenced(VmId([9; 16]), Epoch(0)));
    }
}
