//! Which connections a peer keeps, which it lets go, and when it asks Kademlia for the owners of which shard.
//!
//! Knowing a member and being connected to it are two things. Up to [`MeshLimits::mesh`] members a peer is connected to every one of them.
//! In a larger site it keeps the members nearest to itself connected, and others as they are needed: a request connects, and the
//! connection is let go once nothing has used it for a while, or, when there are too many, the least recently used first. Who dialled a connection
//! lets it go for lack of use, so that two ends never undo each other's; too many are let go by either end. Pure: time comes in as `now`.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use crate::{
    config::MeshLimits,
    limits::{CONNECTION_GRACE, IDLE_CLOSE, REFRESH_EVERY, REFRESHES_IN_FLIGHT},
    shard::{MemberId, SHARDS, ShardId},
};

/// One open connection.
#[derive(Clone, Copy, Debug)]
struct Link {
    /// This end dialled it.
    dialled: bool,
    /// When it was made, or a request on it began or ended.
    used: Instant,
}

/// The connections of one peer.
#[derive(Debug)]
pub struct Mesh {
    me: MemberId,
    limits: MeshLimits,
    links: BTreeMap<MemberId, Link>,
    /// Requests under way, either way; the connection of one may still have to be made.
    busy: BTreeMap<MemberId, u32>,
}

impl Mesh {
    /// No connections.
    #[must_use]
    pub fn new(me: MemberId, limits: MeshLimits) -> Self {
        Self { me, limits, links: BTreeMap::new(), busy: BTreeMap::new() }
    }

    /// A connection to a peer was made; a second one to it changes nothing.
    pub fn connected(&mut self, peer: MemberId, dialled: bool, now: Instant) {
        self.links.entry(peer).or_insert(Link { dialled, used: now });
    }

    /// The last connection to a peer is gone.
    pub fn disconnected(&mut self, peer: MemberId) {
        self.links.remove(&peer);
    }

    /// A request to or from a peer begins.
    pub fn began(&mut self, peer: MemberId, now: Instant) {
        self.used(peer, now);
        *self.busy.entry(peer).or_default() += 1;
    }

    /// It has ended, with its connection or before.
    pub fn ended(&mut self, peer: MemberId, now: Instant) {
        self.used(peer, now);
        if let Some(busy) = self.busy.get_mut(&peer) {
            *busy -= 1;
            if *busy == 0 {
                self.busy.remove(&peer);
            }
        }
    }

    fn used(&mut self, peer: MemberId, now: Instant) {
        if let Some(link) = self.links.get_mut(&peer) {
            link.used = now;
        }
    }

    /// How many peers are connected.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.links.len()
    }

    /// Whether there are fewer connections than there may be.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.links.len() < self.limits.connections
    }

    /// Whether a peer is connected.
    #[must_use]
    pub fn is_connected(&self, peer: MemberId) -> bool {
        self.links.contains_key(&peer)
    }

    /// Whether everyone is to be connected to everyone.
    #[must_use]
    pub fn is_full(&self, members: usize) -> bool {
        members <= self.limits.mesh
    }

    /// The members to stay connected to, of those known: all of a small site, the nearest to this peer of a large one.
    #[must_use]
    pub fn kept(&self, members: &BTreeSet<MemberId>) -> BTreeSet<MemberId> {
        let mut others: Vec<_> = members.iter().copied().filter(|member| *member != self.me).collect();
        if !self.is_full(members.len()) {
            let count = self.limits.neighbours();
            if count < others.len() {
                others.select_nth_unstable_by_key(count, |member| member.distance(&self.me.0));
                others.truncate(count);
            }
        }
        others.into_iter().collect()
    }

    /// The connections to let go now; `kept` are those to stay.
    #[must_use]
    pub fn to_close(&self, kept: &BTreeSet<MemberId>, now: Instant) -> Vec<MemberId> {
        let idle = |link: &Link| now.saturating_duration_since(link.used);
        let mut free: Vec<(MemberId, Link)> = self
            .links
            .iter()
            .map(|(peer, link)| (*peer, *link))
            .filter(|(peer, _)| !self.busy.contains_key(peer) && !kept.contains(peer))
            .filter(|(_, link)| idle(link) >= CONNECTION_GRACE)
            .collect();
        free.sort_by_key(|(peer, link)| (link.used, *peer));
        let too_many = self.links.len().saturating_sub(self.limits.connections);
        let goes = |(at, (_, link)): &(usize, (MemberId, Link))| {
            *at < too_many || (link.dialled && idle(link) >= IDLE_CLOSE)
        };
        free.into_iter().enumerate().filter(goes).map(|(_, (peer, _))| peer).collect()
    }
}

/// When to ask Kademlia which peers are closest to which shard.
///
/// A small site needs no asking: everyone is connected to everyone. In a larger one each shard is asked for at once when the site becomes large,
/// and when an owner of it is lost, and then in turn, each once in [`REFRESH_EVERY`], in an order of this peer's own.
#[derive(Debug)]
pub struct Refresh {
    shards: Vec<Due>,
    flying: usize,
    /// Shifts this peer's turns against others'.
    shift: u8,
}

#[derive(Clone, Copy, Debug)]
struct Due {
    at: Instant,
    flying: bool,
    /// It has been asked for before.
    again: bool,
}

impl Refresh {
    /// Every shard is due.
    #[must_use]
    pub fn new(me: MemberId, now: Instant) -> Self {
        Self { shards: vec![Due { at: now, flying: false, again: false }; SHARDS], flying: 0, shift: me.0[0] }
    }

    /// The next shard to ask for: the one that has been due for longest.
    pub fn next(&mut self, now: Instant) -> Option<ShardId> {
        if self.flying >= REFRESHES_IN_FLIGHT {
            return None;
        }
        let due = |shard: &ShardId| {
            let due = self.shards[shard.index()];
            !due.flying && due.at <= now
        };
        let shard = ShardId::all().filter(due).min_by_key(|shard| self.shards[shard.index()].at)?;
        self.shards[shard.index()].flying = true;
        self.flying += 1;
        Some(shard)
    }

    /// The answer has come, or none will.
    pub fn done(&mut self, shard: ShardId, now: Instant) {
        let due = &mut self.shards[shard.index()];
        if !std::mem::replace(&mut due.flying, false) {
            return;
        }
        self.flying -= 1;
        // The first turns come all at once; from then on they are spread over the whole time.
        let turn = u32::from(shard.0 ^ self.shift) + 1;
        let wait = if due.again { REFRESH_EVERY } else { REFRESH_EVERY * turn / 256 };
        (due.at, due.again) = (now + wait, true);
    }

    /// An owner of this shard is lost: whoever follows it is looked for at once.
    pub fn hurry(&mut self, shard: ShardId, now: Instant) {
        let due = &mut self.shards[shard.index()];
        due.at = due.at.min(now);
    }
}

#[cfg(test)]
#[path = "mesh_tests.rs"]
mod tests;
