//! One simulated host's peer: the real membership, announcer and owner's table, and what it holds.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use dht::{
    announce::Announcer,
    lease::OwnerTable,
    membership::Membership,
    sample::Sampling,
    shard::{MemberId, SHARDS, ShardId},
};
use page::ShortId;

use super::{
    content::{Content, Holding, every_name, is_background},
    net::Pipe,
};

/// How a peer behaves towards others.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Conduct {
    /// As it should.
    Honest,
    /// Its answers take ten times as long.
    Slow,
    /// It is connected and never answers.
    Silent,
    /// It serves wrong bytes for every page.
    WrongBytes,
    /// It announces every name of the looked-up VMs, whether it holds it or not.
    FalseNames,
}

/// A host.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) member: MemberId,
    pub(super) alive: bool,
    /// Which side of a partition it is on.
    pub(super) half: bool,
    pub(super) conduct: Conduct,
    pub(super) holding: Holding,
    /// It is one of those that are simulated with contents.
    pub(super) announces: bool,
    /// When others find it by Kademlia.
    pub(super) visible_us: u64,
    pub(super) out: Pipe,
    pub(super) inward: Pipe,
    pub(super) mind: Option<Box<Mind>>,
}

/// What a peer knows; peers that own nothing and hold nothing that is simulated have none.
#[derive(Debug)]
pub(super) struct Mind {
    pub(super) membership: Membership,
    pub(super) announcer: Announcer,
    /// What other peers announced to this owner: probe names, and background names, apart so that each can be weighed.
    pub(super) probes: OwnerTable,
    pub(super) background: OwnerTable,
    /// The version of the membership that the announcer knows.
    pub(super) version: Option<u64>,
    /// Peers that a connection was made to, beyond the mesh.
    pub(super) connected: BTreeSet<MemberId>,
    /// Upkeep runs.
    pub(super) ticks: u64,
}

impl Mind {
    /// Its table has room for so many background entries; sampled by these, the probes' table has no bound of its own.
    pub(super) fn new(me: MemberId, room: usize, now: Instant) -> Self {
        Self {
            membership: Membership::new(me),
            announcer: Announcer::new(now),
            probes: OwnerTable::new(now),
            background: OwnerTable::with_room(room, now),
            version: None,
            connected: BTreeSet::new(),
            ticks: 0,
        }
    }

    /// An announcement arrives at this owner. Returns how many background entries are new.
    pub(super) fn hear(&mut self, from: MemberId, ids: &[ShortId], now: Instant) -> usize {
        let (background, probes): (Vec<ShortId>, Vec<ShortId>) =
            ids.iter().partition(|id| is_background(**id));
        let before = self.background.len();
        self.background.announce(from, &background, now);
        self.sample_probes();
        self.probes.announce(from, &probes, now);
        // A full table may have dropped some for it.
        self.background.len().saturating_sub(before)
    }

    /// Samples the probes as the background is: it is one table.
    fn sample_probes(&mut self) {
        for shard in ShardId::all() {
            let sampling = self.background.sampling(shard);
            if self.probes.sampling(shard) != sampling {
                self.probes.sample(shard, sampling);
            }
        }
    }

    /// What its answers say of how it samples.
    pub(super) fn samplings(&self) -> Vec<(ShardId, Sampling)> {
        self.background.samplings()
    }

    /// An owner says how it samples.
    pub(super) fn sampled(&mut self, owner: MemberId, sampled: Vec<(ShardId, Sampling)>) {
        self.announcer.sampled(owner, &sampled);
        self.membership.sampled(owner, sampled);
    }

    /// Once a second: leases that are due are renewed, and one shard of the tables is swept.
    pub(super) fn upkeep(&mut self, now: Instant) {
        // The host holds what it held.
        for renewal in self.announcer.renewals(now) {
            self.announcer.renew(renewal, now);
        }
        let shard = ShardId(u8::try_from(self.ticks % SHARDS as u64).expect("reduced modulo the shards"));
        let membership = &self.membership;
        let keep = membership.shards().owners(shard).contains(&membership.me());
        self.probes.sweep(shard, keep, now);
        self.background.sweep(shard, keep, now);
        self.sample_probes();
        self.ticks += 1;
    }

    /// Tells the announcer of the owners, if they changed.
    pub(super) fn rehome(&mut self) {
        let version = self.membership.version();
        if self.version != Some(version) {
            self.announcer.set_owners(self.membership.shards(), self.membership.me());
            self.version = Some(version);
        }
    }
}

impl Peer {
    /// The names that this host announces.
    pub(super) fn announced(&self, number: u64, content: Content) -> Vec<ShortId> {
        if !self.announces {
            return Vec::new();
        }
        let probes = if self.conduct == Conduct::FalseNames { every_name() } else { self.holding.names() };
        probes.into_iter().chain(content.background(number)).collect()
    }

    /// Whether it serves pages as they are.
    pub(super) fn honest_holder(&self) -> bool {
        match self.conduct {
            // What a liar does hold it serves.
            Conduct::Honest | Conduct::Slow | Conduct::FalseNames => true,
            Conduct::Silent | Conduct::WrongBytes => false,
        }
    }
}

/// Virtual time: microseconds since a start that the real code sees as an [`Instant`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    start: Instant,
    pub(super) now_us: u64,
}

impl Clock {
    /// The start is the process's own; only differences to it are ever looked at.
    pub(super) fn new() -> Self {
        Self { start: Instant::now(), now_us: 0 }
    }

    pub(super) fn now(&self) -> Instant {
        self.start + Duration::from_micros(self.now_us)
    }

    /// The first microsecond at which `instant` has come.
    pub(super) fn us(&self, instant: Instant) -> u64 {
        let since = instant.saturating_duration_since(self.start).as_nanos().div_ceil(1000);
        u64::try_from(since).unwrap_or(u64::MAX)
    }
}
