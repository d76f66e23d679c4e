//! Who knows whom: the mesh of small sites, and beyond it what Kademlia's queries bring; crashes, joins and partitions.
//!
//! In a site of up to 256 everyone is connected to everyone: a dead connection is found by ping within 5 to 10 seconds, a new member
//! within two, and what a healed partition kept apart within 30. A larger site's peer asks Kademlia for the peers closest to one shard's key
//! a second, so that it has asked for each after [`dht::shard::SHARDS`] seconds; between two queries its view of a shard is stale. A
//! query finds the closest peers that are up and reachable, and those that joined after they have been seen.

use dht::shard::{MemberId, SHARDS, ShardId};

use super::{
    content::{Holding, IMAGE_HOSTS},
    net,
    peer::{Conduct, Peer},
    scenario::SECOND,
    world::{Event, World},
};

/// The closest peers that a query for a shard's key adds to the known ones: its owners, and some to take their place.
const LEARNT: usize = 4;
/// Until a peer that joined is found by Kademlia, at most.
const SEEN_US: u64 = 30 * SECOND;
/// Until a dead connection of the mesh is found, at least and at most.
const DEAD_US: (u64, u64) = (5 * SECOND, 10 * SECOND);
/// Until a new member of the mesh is connected, at most.
const CONNECTED_US: u64 = 2 * SECOND;

/// The peers that are up by their distance to each shard's key; its first 64 bits tell them apart.
#[derive(Debug)]
pub(super) struct Distances {
    shards: Vec<Vec<(u64, usize)>>,
}

impl Default for Distances {
    fn default() -> Self {
        Self { shards: vec![Vec::new(); SHARDS] }
    }
}

fn distance(member: MemberId, shard: ShardId) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = member.distance(shard.key());
    u64::from_be_bytes([a, b, c, d, e, f, g, h])
}

impl Distances {
    /// Takes the first peers.
    pub(super) fn fill(&mut self, peers: &[Peer]) {
        for (shard, order) in ShardId::all().zip(&mut self.shards) {
            order.extend(peers.iter().zip(0..).map(|(peer, number)| (distance(peer.member, shard), number)));
            order.sort_unstable();
        }
    }

    fn insert(&mut self, member: MemberId, number: usize) {
        for (shard, order) in ShardId::all().zip(&mut self.shards) {
            let entry = (distance(member, shard), number);
            let at = order.partition_point(|other| *other < entry);
            order.insert(at, entry);
        }
    }

    fn remove(&mut self, member: MemberId, number: usize) {
        for (shard, order) in ShardId::all().zip(&mut self.shards) {
            if let Ok(at) = order.binary_search(&(distance(member, shard), number)) {
                order.remove(at);
            }
        }
    }
}

impl World {
    /// A peer joins.
    pub(super) fn join(&mut self, conduct: Conduct, holding: Holding) -> usize {
        let number = self.peers.len();
        let salt = self.rng.next();
        let member = MemberId::of_peer(&[salt.to_be_bytes(), (number as u64).to_be_bytes()].concat());
        let now_us = self.clock.now_us;
        let visible_us = if now_us == 0 { 0 } else { now_us + self.rng.below(SEEN_US) };
        self.peers.push(Peer {
            member,
            alive: true,
            half: self.rng.chance(50),
            conduct,
            holding,
            announces: number.is_multiple_of(self.stride),
            visible_us,
            out: net::Pipe::default(),
            inward: net::Pipe::default(),
            mind: None,
        });
        self.numbers.insert(member, number);
        if now_us > 0 {
            self.distances.insert(member, number);
        }
        number
    }

    /// Gives a peer its mind and its names.
    pub(super) fn settle(&mut self, number: usize) {
        let names = self.peers[number].announced(number as u64, self.content);
        self.mind(number).announcer.note(&names);
    }

    /// Everyone of the mesh knows everyone.
    pub(super) fn connect_all(&mut self) {
        let members: Vec<MemberId> = self.peers.iter().map(|peer| peer.member).collect();
        for (number, me) in members.iter().enumerate() {
            let mind = self.mind(number);
            for member in members.iter().filter(|member| *member != me) {
                mind.membership.joined(*member);
            }
            mind.rehome();
        }
    }

    /// The closest peers to a shard's key that a peer's query finds.
    fn query(&self, from: usize, shard: ShardId) -> Vec<usize> {
        let found = self.distances.shards[shard.index()].iter().map(|(_, number)| *number);
        let up = found.filter(|number| {
            *number != from
                && self.reaches(from, *number)
                && self.peers[*number].visible_us <= self.clock.now_us
        });
        up.take(LEARNT).collect()
    }

    fn learn(&mut self, peer: usize, shard: ShardId) {
        let found: Vec<MemberId> =
            self.query(peer, shard).into_iter().map(|number| self.peers[number].member).collect();
        let mind = self.peers[peer].mind.as_mut().expect("who learns has one");
        for member in found {
            mind.membership.joined(member);
        }
        // The query has asked the owners known so far: those that did not answer are known no longer.
        let known = mind.membership.shards().owners(shard).to_vec();
        let dead: Vec<MemberId> = known
            .into_iter()
            .filter(|member| {
                let number = self.numbers[member];
                number != peer && !self.reaches(peer, number)
            })
            .collect();
        let mind = self.peers[peer].mind.as_mut().expect("who learns has one");
        for member in dead {
            mind.membership.left(member);
        }
    }

    /// A new peer asks for all shards.
    pub(super) fn learn_all(&mut self, peer: usize) {
        for shard in ShardId::all() {
            self.learn(peer, shard);
        }
    }

    /// The second's query.
    pub(super) fn learn_next(&mut self, peer: usize) {
        let ticks = self.mind(peer).ticks + peer as u64 * 97;
        let shard = ShardId(u8::try_from(ticks % SHARDS as u64).expect("reduced modulo the shards"));
        self.learn(peer, shard);
        if self.measuring() {
            let (messages, bytes) = net::kademlia_query(self.size);
            self.sums.kademlia_messages += messages;
            self.sums.kademlia_bytes += bytes;
        }
    }

    /// A connection of the mesh came up, or was found dead, if that is still so.
    pub(super) fn noticed(&mut self, peer: usize, member: MemberId, joined: bool) {
        let number = self.numbers[&member];
        if !self.peers[peer].alive || self.reaches(peer, number) != joined {
            return;
        }
        let mind = self.mind(peer);
        let changed = if joined { mind.membership.joined(member) } else { mind.membership.left(member) };
        if changed {
            mind.rehome();
        }
    }

    fn tell_mesh(&mut self, number: usize, joined: bool) {
        let member = self.peers[number].member;
        for peer in (0..self.peers.len()).filter(|peer| *peer != number) {
            if !self.peers[peer].alive {
                continue;
            }
            let after =
                if joined { self.rng.below(CONNECTED_US) } else { self.rng.between(DEAD_US.0, DEAD_US.1) };
            let at = self.clock.now_us + after;
            self.at(at, Event::Noticed { peer, member, joined });
            if joined {
                let other = self.peers[peer].member;
                self.at(at, Event::Noticed { peer: number, member: other, joined });
            }
        }
    }

    /// One peer crashes, and another joins with an image's files or without.
    pub(super) fn churn(&mut self) {
        let gone = loop {
            let number = self.rng.index(self.peers.len());
            if self.peers[number].alive && !self.askers.contains(&number) {
                break number;
            }
        };
        self.peers[gone].alive = false;
        self.peers[gone].mind = None;
        self.distances.remove(self.peers[gone].member, gone);
        let holding = Holding { image: self.rng.below(IMAGE_HOSTS) == 0, ..Holding::default() };
        let new = self.join(Conduct::Honest, holding);
        if self.is_mesh() {
            self.settle(new);
            self.tell_mesh(gone, false);
            self.tell_mesh(new, true);
        } else if self.peers[new].announces {
            self.settle(new);
        }
    }

    /// The site is cut in two, or healed.
    pub(super) fn cut(&mut self, cut: bool) {
        self.cut = cut;
        if !self.is_mesh() {
            return;
        }
        let size = self.size;
        for (one, other) in (0..size).flat_map(|a| (0..size).map(move |b| (a, b))) {
            if self.peers[one].half != self.peers[other].half {
                let after =
                    if cut { self.rng.between(DEAD_US.0, DEAD_US.1) } else { self.rng.below(SEEN_US) };
                let member = self.peers[other].member;
                let at = self.clock.now_us + after;
                self.at(at, Event::Noticed { peer: one, member, joined: !cut });
            }
        }
    }
}
