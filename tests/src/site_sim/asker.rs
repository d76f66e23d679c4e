//! A lookup of a VM in flight: the driver of the real [`Search`], as `dht`'s resolve drives it.

use dht::{
    limits::HOLDERS_PER_NAME,
    lookup::{Request, Search, Ticket},
    membership::Role,
    sample::Sampling,
    shard::{MemberId, ShardId},
};
use page::ShortId;

use super::{
    content::{Kind, PageSeed, makeup, vm_names},
    net,
    peer::Conduct,
    world::{Event, World},
};

/// A lookup.
#[derive(Debug)]
pub(super) struct Lookup {
    pub(super) asker: usize,
    pub(super) vm: u64,
    pub(super) search: Option<Search>,
    /// When it will be woken.
    pub(super) wake_us: Option<u64>,
}

impl World {
    /// Pages of a VM that an oracle knows to be held by an honest peer that the asker reaches.
    fn held(&self, asker: usize, vm: u64) -> u64 {
        let holders = || {
            let all = self.peers.iter().enumerate();
            all.filter(|(number, peer)| {
                peer.announces && *number != asker && peer.honest_holder() && self.reaches(asker, *number)
            })
        };
        let held = |kind: Kind| match kind {
            Kind::Image => holders().any(|(_, peer)| peer.holding.image),
            Kind::Sibling => holders().any(|(_, peer)| peer.holding.sibling.contains(&vm)),
            Kind::Retained => holders().any(|(_, peer)| peer.holding.retained.contains(&vm)),
            Kind::Own => false,
        };
        makeup(vm).into_iter().filter(|(kind, _)| held(*kind)).map(|(_, count)| count).sum()
    }

    /// A VM arrives at a host, which asks the site for its pages.
    pub(super) fn look(&mut self, lookup: usize) {
        let Lookup { asker, vm, .. } = self.lookups[lookup];
        let held = self.held(asker, vm);
        let ids = vm_names(vm, &mut self.rng);
        self.looked[lookup].started_us = self.clock.now_us;
        self.looked[lookup].held = held;
        let now = self.clock.now();
        let mind = self.mind(asker);
        let membership = &mind.membership;
        let owners = |shard| {
            let asked = membership.owners_to_ask(shard, now);
            asked.map(|owner| (owner, membership.sampling(owner, shard))).collect()
        };
        let owners: Vec<Vec<(MemberId, Sampling)>> = ShardId::all().map(owners).collect();
        let usable = |member| membership.usable_holder(member, now);
        let known = mind.probes.lookup(&ids, now, usable).into_iter();
        let known: Vec<(ShortId, MemberId)> = known.map(|(at, who)| (ids[at as usize], who)).collect();
        let mut search = Search::new(ids, |shard| owners[shard.index()].iter().copied());
        search.known(known);
        self.lookups[lookup].search = Some(search);
        self.drive(lookup);
    }

    /// Takes the requests that are due, as the driver's contract has it.
    fn drive(&mut self, lookup: usize) {
        let Some(mut search) = self.lookups[lookup].search.take() else { return };
        let now = self.clock.now();
        while let Some(request) = search.next(now) {
            self.make(lookup, request);
        }
        if search.done() {
            // Peers may have come back meanwhile.
            let Lookup { asker, vm, .. } = self.lookups[lookup];
            let held = self.held(asker, vm);
            let looked = &mut self.looked[lookup];
            looked.held = looked.held.max(held);
            looked.ended = true;
            return;
        }
        // Nothing in flight and not done would be a lookup that never ends; it is counted as one.
        let state = &mut self.lookups[lookup];
        let wake = search.deadline().map(|deadline| self.clock.us(deadline));
        if wake.is_some() && wake != state.wake_us {
            state.wake_us = wake;
            self.at(wake.unwrap_or(0), Event::Wake { lookup });
        }
        self.lookups[lookup].search = Some(search);
    }

    pub(super) fn wake(&mut self, lookup: usize) {
        if self.lookups[lookup].wake_us == Some(self.clock.now_us) {
            self.lookups[lookup].wake_us = None;
            self.drive(lookup);
        }
    }

    fn make(&mut self, lookup: usize, request: Request) {
        let asker = self.lookups[lookup].asker;
        match request {
            Request::Lookup { ticket, owner: member, ids } => {
                let bytes = net::lookup(ids.len());
                let looked = &mut self.looked[lookup];
                looked.requests += 1;
                looked.owners.insert(member);
                looked.index_bytes += bytes;
                let owner = self.numbers[&member];
                if let Some(at) = self.deliver(lookup, asker, owner, bytes) {
                    self.at(at, Event::AskOwner { lookup, ticket, owner, ids });
                }
            }
            Request::Fetch { ticket, holder: member, ids } => {
                let bytes = net::fetch(ids.len());
                self.looked[lookup].fetches += 1;
                self.looked[lookup].fetch_bytes += bytes;
                let holder = self.numbers[&member];
                if let Some(at) = self.deliver(lookup, asker, holder, bytes) {
                    self.at(at, Event::AskHolder { lookup, ticket, holder, ids });
                }
            }
            Request::TimedOut { peer: member, role } => {
                let looked = &mut self.looked[lookup];
                looked.timeouts += 1;
                if role == Role::Owner {
                    looked.index_us = self.clock.now_us - looked.started_us;
                }
                let gone = !self.reaches(asker, self.numbers[&member]) && !self.is_mesh();
                let now = self.clock.now();
                let mind = self.mind(asker);
                mind.membership.timed_out(member, role, now);
                if gone {
                    mind.membership.left(member);
                }
            }
        }
    }

    /// When a request is at a peer that answers, over a connection made first where there is none.
    fn deliver(&mut self, lookup: usize, asker: usize, to: usize, bytes: u64) -> Option<u64> {
        if !self.reaches(asker, to) || self.peers[to].conduct == Conduct::Silent {
            return None;
        }
        let mut ready = self.clock.now_us;
        let member = self.peers[to].member;
        if !self.is_mesh() && self.mind(asker).connected.insert(member) {
            self.looked[lookup].connections += 1;
            self.looked[lookup].index_bytes += net::HANDSHAKE_BYTES;
            ready += net::HANDSHAKE_TRIPS * 2 * self.latency_us();
        }
        Some(self.carry(asker, to, bytes, ready))
    }

    /// An owner answers what it knows, as `dht`'s `answer_index` does.
    pub(super) fn ask_owner(&mut self, lookup: usize, ticket: Ticket, owner: usize, ids: &[ShortId]) {
        let asker = self.lookups[lookup].asker;
        if !self.reaches(asker, owner) {
            return;
        }
        let (now, asking) = (self.clock.now(), self.peers[asker].member);
        let me = self.peers[owner].member;
        self.mind(owner);
        let peer = &self.peers[owner];
        let mind = peer.mind.as_ref().expect("it was made");
        let usable = |member| member != asking && mind.membership.usable_holder(member, now);
        let here = |id: &ShortId| peer.announces && peer.holding.has(*id);
        let mut named: Vec<usize> = ids.iter().map(|id| usize::from(here(id))).collect();
        let mut claims: Vec<(ShortId, MemberId)> =
            ids.iter().filter(|id| here(id)).map(|id| (*id, me)).collect();
        for (at, who) in mind.probes.lookup(ids, now, usable) {
            named[at as usize] += 1;
            if named[at as usize] <= HOLDERS_PER_NAME {
                claims.push((ids[at as usize], who));
            }
        }
        let mut who: Vec<MemberId> = claims.iter().map(|(_, who)| *who).collect();
        who.sort_unstable();
        who.dedup();
        let sampled = mind.samplings();
        let bytes = net::holders(sampled.len(), who.len(), claims.len());
        let work = net::lookup_work_us(ids.len()) * self.slowness(owner);
        let wait = self.latency_us() * (self.slowness(owner) - 1);
        let at = self.carry(owner, asker, bytes, self.clock.now_us + work + wait);
        self.looked[lookup].index_bytes += bytes;
        self.at(at, Event::Holders { lookup, ticket, owner, claims, sampled });
    }

    /// An owner's answer comes.
    pub(super) fn holders(
        &mut self,
        lookup: usize,
        ticket: Ticket,
        owner: usize,
        claims: &[(ShortId, MemberId)],
        sampled: Vec<(ShardId, Sampling)>,
    ) {
        let asker = self.lookups[lookup].asker;
        let (now, mesh, from) = (self.clock.now(), self.is_mesh(), self.peers[owner].member);
        let mind = self.mind(asker);
        if !mesh {
            // Named with their addresses: they can be connected to.
            claims.iter().for_each(|(_, holder)| {
                mind.membership.joined(*holder);
            });
        }
        mind.membership.answered(from, Role::Owner);
        let membership = &mind.membership;
        let usable: Vec<(ShortId, MemberId)> =
            claims.iter().copied().filter(|(_, holder)| membership.usable_holder(*holder, now)).collect();
        let looked = &mut self.looked[lookup];
        looked.index_us = self.clock.now_us - looked.started_us;
        if let Some(search) = &mut self.lookups[lookup].search {
            search.on_holders(ticket, &usable, &sampled);
        }
        self.mind(asker).sampled(from, sampled);
        self.drive(lookup);
    }

    /// A holder reads what it has.
    pub(super) fn ask_holder(&mut self, lookup: usize, ticket: Ticket, holder: usize, ids: Vec<ShortId>) {
        let asker = self.lookups[lookup].asker;
        if !self.reaches(asker, holder) {
            return;
        }
        let peer = &self.peers[holder];
        let held = ids.iter().filter(|id| peer.announces && peer.holding.has(**id));
        let page = |id: &ShortId| {
            let PageSeed(right) = PageSeed::of(*id);
            (*id, PageSeed(if peer.conduct == Conduct::WrongBytes { !right } else { right }))
        };
        let pages: Vec<(ShortId, PageSeed)> = held.map(page).collect();
        let bytes = net::pages(pages.len());
        let work = net::page_work_us(pages.len()) * self.slowness(holder);
        let wait = self.latency_us() * (self.slowness(holder) - 1);
        let at = self.carry(holder, asker, bytes, self.clock.now_us + work + wait);
        self.looked[lookup].fetch_bytes += bytes;
        self.at(at, Event::Pages { lookup, ticket, holder, ids, pages });
    }

    /// Pages come: they are hashed, and only what has its name is taken.
    pub(super) fn pages(
        &mut self,
        lookup: usize,
        ticket: Ticket,
        holder: usize,
        asked: &[ShortId],
        pages: &[(ShortId, PageSeed)],
    ) {
        let (right, wrong): (Vec<_>, Vec<_>) =
            pages.iter().partition(|(id, page)| asked.contains(id) && page.name() == *id);
        let ids: Vec<ShortId> = right.iter().map(|(id, _)| *id).collect();
        let (asker, now, from) = (self.lookups[lookup].asker, self.clock.now(), self.peers[holder].member);
        let mind = self.mind(asker);
        mind.membership.answered(from, Role::Holder);
        if !wrong.is_empty() {
            mind.membership.lied(from, wrong.len() as u64, now);
        }
        if let Some(search) = &mut self.lookups[lookup].search {
            let news = search.on_pages(ticket, &ids, now).into_iter().filter(|new| *new).count() as u64;
            let looked = &mut self.looked[lookup];
            looked.found += news;
            looked.wrong_pages += wrong.len() as u64;
            if news > 0 {
                looked.answer_us = self.clock.now_us - looked.started_us;
            }
            let accepted_wrong = right.iter().filter(|(id, page)| PageSeed::of(*id) != *page).count();
            self.wrong_accepted += accepted_wrong as u64;
        }
        self.drive(lookup);
    }
}
