//! A simulated site: peers, virtual time, and the events between them.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
};

use dht::{
    announce::Announcement,
    limits::{INDEX_BATCH, LOOKUP_TIMEOUT, MESH, OWNER_ENTRIES},
    lookup::Ticket,
    membership::Role,
    sample::Sampling,
    shard::{MemberId, ShardId},
};
use page::ShortId;

use super::{
    asker::Lookup,
    content::{Content, PageSeed},
    measure::{Looked, Sums},
    net,
    peer::{Clock, Conduct, Mind, Peer},
    scenario::{CHURN_US, CUT_US, END_US, HEALED_US, MEASURE_US, PATIENCE_US, SECOND, Scenario},
    views::Distances,
};
use crate::rng::Rng;

/// What happens next.
#[derive(Debug)]
pub(super) enum Event {
    /// A peer's upkeep.
    Tick { peer: usize },
    /// An announcement was answered, or was given up.
    Announced { peer: usize, announcement: Box<Announcement>, taken: bool },
    /// A connection of the mesh came up, or was found dead.
    Noticed { peer: usize, member: MemberId, joined: bool },
    /// A lookup begins.
    Look { lookup: usize },
    /// A question reaches an owner.
    AskOwner { lookup: usize, ticket: Ticket, owner: usize, ids: Vec<ShortId> },
    /// Its answer reaches the asker.
    Holders {
        lookup: usize,
        ticket: Ticket,
        owner: usize,
        claims: Vec<(ShortId, MemberId)>,
        sampled: Vec<(ShardId, Sampling)>,
    },
    /// A request reaches a holder.
    AskHolder { lookup: usize, ticket: Ticket, holder: usize, ids: Vec<ShortId> },
    /// Its pages reach the asker.
    Pages { lookup: usize, ticket: Ticket, holder: usize, ids: Vec<ShortId>, pages: Vec<(ShortId, PageSeed)> },
    /// A lookup's deadline.
    Wake { lookup: usize },
    /// One peer crashes and one joins.
    Churn,
    /// The site is cut in two, or healed.
    Cut { cut: bool },
}

#[derive(Debug)]
struct Scheduled {
    at_us: u64,
    order: u64,
    event: Event,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}
impl Eq for Scheduled {}
impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at_us, self.order).cmp(&(other.at_us, other.order))
    }
}

/// A site in virtual time.
#[derive(Debug)]
pub(super) struct World {
    pub(super) scenario: Scenario,
    /// Peers that the site has at any time.
    pub(super) size: usize,
    /// One host in so many is simulated with contents, and stands for as many.
    pub(super) stride: usize,
    pub(super) content: Content,
    /// Background entries that an owner has room for.
    room: usize,
    pub(super) clock: Clock,
    pub(super) rng: Rng,
    pub(super) peers: Vec<Peer>,
    pub(super) numbers: BTreeMap<MemberId, usize>,
    pub(super) distances: Distances,
    pub(super) cut: bool,
    pub(super) lookups: Vec<Lookup>,
    pub(super) looked: Vec<Looked>,
    pub(super) sums: Sums,
    pub(super) wrong_accepted: u64,
    /// Peers that never crash: those that look up.
    pub(super) askers: Vec<usize>,
    queue: BinaryHeap<Reverse<Scheduled>>,
    order: u64,
}

impl World {
    /// An empty site; `build` fills it.
    pub(super) fn new(size: usize, scenario: Scenario, stride: usize, per_host: u64, rng: Rng) -> Self {
        let content = Content::new(per_host);
        let scale = usize::try_from(content.background_weight).expect("far below 2^32") * stride;
        Self {
            scenario,
            size,
            stride,
            content,
            room: OWNER_ENTRIES / scale,
            clock: Clock::new(),
            rng,
            peers: Vec::new(),
            numbers: BTreeMap::new(),
            distances: Distances::default(),
            cut: false,
            lookups: Vec::new(),
            looked: Vec::new(),
            sums: Sums::default(),
            wrong_accepted: 0,
            askers: Vec::new(),
            queue: BinaryHeap::new(),
            order: 0,
        }
    }

    /// Whether everybody is connected to everybody.
    pub(super) fn is_mesh(&self) -> bool {
        self.size <= MESH
    }

    /// Whether what is counted now is counted.
    pub(super) fn measuring(&self) -> bool {
        (MEASURE_US..END_US).contains(&self.clock.now_us)
    }

    pub(super) fn at(&mut self, at_us: u64, event: Event) {
        self.order += 1;
        self.queue.push(Reverse(Scheduled { at_us: at_us.max(self.clock.now_us), order: self.order, event }));
    }

    /// Whether a message from one peer can come to another.
    pub(super) fn reaches(&self, from: usize, to: usize) -> bool {
        let (from, to) = (&self.peers[from], &self.peers[to]);
        from.alive && to.alive && (!self.cut || from.half == to.half)
    }

    /// One way through the LAN.
    pub(super) fn latency_us(&mut self) -> u64 {
        self.rng.between(net::LATENCY_US.0, net::LATENCY_US.1)
    }

    /// When `bytes` that are ready at `ready_us` have come from one peer to another.
    pub(super) fn carry(&mut self, from: usize, to: usize, bytes: u64, ready_us: u64) -> u64 {
        let left = self.peers[from].out.pass(ready_us, bytes);
        let latency = self.latency_us();
        self.peers[to].inward.pass(left + latency, bytes)
    }

    /// How much longer a peer takes than others.
    pub(super) fn slowness(&self, peer: usize) -> u64 {
        match self.peers[peer].conduct {
            Conduct::Slow => net::SLOW_FACTOR,
            Conduct::Honest | Conduct::Silent | Conduct::WrongBytes | Conduct::FalseNames => 1,
        }
    }

    /// The mind of a peer; one that had none gets one, and its upkeep begins.
    pub(super) fn mind(&mut self, peer: usize) -> &mut Mind {
        if self.peers[peer].mind.is_none() {
            let (member, now) = (self.peers[peer].member, self.clock.now());
            self.peers[peer].mind = Some(Box::new(Mind::new(member, self.room, now)));
            let at = self.clock.now_us + self.rng.below(SECOND);
            self.at(at, Event::Tick { peer });
            if !self.is_mesh() {
                self.learn_all(peer);
            }
        }
        self.peers[peer].mind.as_mut().expect("it was made")
    }

    /// Schedules what the scenario has happen.
    fn plan(&mut self) {
        match self.scenario {
            Scenario::Steady | Scenario::Slow | Scenario::Lying => {}
            Scenario::Churn if self.size < 100 => self.at(CUT_US, Event::Churn),
            Scenario::Churn => {
                let every = 60 * SECOND * 100 / self.size as u64;
                for n in 0..(END_US - CHURN_US) / every {
                    self.at(CHURN_US + n * every, Event::Churn);
                }
            }
            Scenario::Partition => {
                self.at(CUT_US, Event::Cut { cut: true });
                self.at(HEALED_US, Event::Cut { cut: false });
            }
        }
    }

    /// Runs to the end of the measured time and of every lookup.
    pub(super) fn run(&mut self) {
        self.plan();
        while let Some(Reverse(next)) = self.queue.pop() {
            if next.at_us >= END_US + PATIENCE_US
                || (next.at_us >= END_US && self.looked.iter().all(|looked| looked.ended))
            {
                break;
            }
            self.clock.now_us = next.at_us;
            self.on(next.event);
        }
    }

    fn on(&mut self, event: Event) {
        match event {
            Event::Tick { peer } => self.tick(peer),
            Event::Announced { peer, announcement, taken } => self.announced(peer, &announcement, taken),
            Event::Noticed { peer, member, joined } => self.noticed(peer, member, joined),
            Event::Look { lookup } => self.look(lookup),
            Event::AskOwner { lookup, ticket, owner, ids } => self.ask_owner(lookup, ticket, owner, &ids),
            Event::Holders { lookup, ticket, owner, claims, sampled } => {
                self.holders(lookup, ticket, owner, &claims, sampled);
            }
            Event::AskHolder { lookup, ticket, holder, ids } => self.ask_holder(lookup, ticket, holder, ids),
            Event::Pages { lookup, ticket, holder, ids, pages } => {
                self.pages(lookup, ticket, holder, &ids, &pages);
            }
            Event::Wake { lookup } => self.wake(lookup),
            Event::Churn => self.churn(),
            Event::Cut { cut } => self.cut(cut),
        }
    }

    fn tick(&mut self, peer: usize) {
        if !self.peers[peer].alive {
            return;
        }
        if !self.is_mesh() {
            self.learn_next(peer);
        }
        let (now, measuring, announces) = (self.clock.now(), self.measuring(), self.peers[peer].announces);
        let mind = self.mind(peer);
        mind.upkeep(now);
        mind.rehome();
        self.sums.mind_seconds += u64::from(measuring);
        self.sums.announcer_seconds += u64::from(measuring && announces);
        if announces {
            self.announce(peer);
        }
        self.at(self.clock.now_us + SECOND, Event::Tick { peer });
    }

    /// Sends what is due, as `dht`'s upkeep does.
    fn announce(&mut self, peer: usize) {
        let now = self.clock.now();
        loop {
            let mind = self.peers[peer].mind.as_mut().expect("who announces has one");
            let membership = &mind.membership;
            let due = mind.announcer.next(now, |member| membership.answering(member, Role::Owner, now));
            let Some(announcement) = due else { return };
            self.count_announcement(&announcement);
            let owner = self.numbers[&announcement.owner];
            let taken = self.reaches(peer, owner) && self.peers[owner].conduct != Conduct::Silent;
            let trip = 2 * self.latency_us() * self.slowness(owner);
            let timeout = u64::try_from(LOOKUP_TIMEOUT.as_micros()).expect("seconds");
            let at = self.clock.now_us + if taken { trip } else { timeout };
            self.at(at, Event::Announced { peer, announcement: Box::new(announcement), taken });
        }
    }

    fn count_announcement(&mut self, announcement: &Announcement) {
        if !self.measuring() {
            return;
        }
        let background = announcement.ids.iter().filter(|id| super::content::is_background(**id)).count();
        let names = background as u64 * self.content.background_weight;
        let (messages, bytes) = net::announcement(names, INDEX_BATCH as u64);
        self.sums.announce_messages += messages;
        self.sums.announce_bytes += bytes;
    }

    fn announced(&mut self, peer: usize, announcement: &Announcement, taken: bool) {
        if !self.peers[peer].alive {
            return;
        }
        let (now, me) = (self.clock.now(), self.peers[peer].member);
        let owner = self.numbers[&announcement.owner];
        let mut sampled: Vec<(ShardId, Sampling)> = Vec::new();
        if taken && self.peers[owner].alive {
            let mesh = self.is_mesh();
            let mind = self.mind(owner);
            if !mesh {
                // Whoever announces is connected, and so a member to the owner.
                mind.membership.joined(me);
            }
            let added = mind.hear(me, &announcement.ids, now) as u64;
            sampled = mind.samplings();
            if self.measuring() && self.clock.now_us > self.peers[peer].visible_us + 60 * SECOND {
                self.sums.rehomed_bytes += added * self.content.background_weight * 8;
            }
        }
        let reached = self.reaches(peer, owner);
        let mesh = self.is_mesh();
        let mind = self.mind(peer);
        if taken {
            mind.announcer.acknowledged(announcement);
            mind.sampled(announcement.owner, sampled);
            mind.membership.answered(announcement.owner, Role::Owner);
        } else {
            mind.announcer.failed(announcement, now);
            mind.membership.timed_out(announcement.owner, Role::Owner, now);
            if !mesh && !reached {
                mind.membership.left(announcement.owner);
                mind.rehome();
            }
        }
        self.announce(peer);
    }
}
