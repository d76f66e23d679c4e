//! One search of the site for pages, as a state machine.
//!
//! ```text
//!           an owner asked             a holder is known          asked of a holder
//! wanted ──────────────────► looking ───────────────────► queued ─────────────────► fetching ──► found
//!                            │   │ ▲ the next owner: the one  ▲ next holder: it had not the page, served wrong   │
//!                            │   │ asked failed or was slow   │ bytes, failed, or was slow (then both are asked) │
//!                            │   │                            │                                                  │
//!   answered, no holder named│   └ no owner keeps the name ──►├─ holders of pages near it are guessed            │
//!                            ▼                                │                                                  │
//!                          missing ◄──────────────────────────┴──────── no holder left ◄─────────────────────────┘
//! ```
//!
//! Of a shard's owners each id is asked of one, chosen by the id, and of the next only if that one failed or is slow: so a search of any size asks
//! each owner once, and once more for each [`LOOKUP_BATCH`] ids. Full owners keep only some names and say which ([`crate::sample`]): an id is asked of an
//! owner that keeps it. A page whose name no owner keeps, or none that answers, waits until those near it in the request are looked up, and is then
//! asked of the holders that the nearest of them have.
//!
//! It takes `now` and answers, and gives out requests to make. The driver's contract: hand in whatever came, then take requests
//! with [`Search::next`] until there is none, then wait for an answer or for [`Search::deadline`]. Every request has a deadline;
//! a late answer is still taken until its request has timed out. What comes back as found has been hashed by the driver.
//! [`Search::take_missing`] gives the missing ones as soon as they are, and at the end each page was given as found or as missing, once.

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    time::Instant,
};

use page::ShortId;

use crate::{
    asked::{PeerNo, Peers},
    limits::{
        FETCH_BATCH, FETCH_TIMEOUT, FETCHES_IN_FLIGHT, FETCHES_PER_HOLDER, LOOKUP_BATCH, LOOKUP_TIMEOUT,
        LOOKUP_TIMEOUT_PER_ID, LOOKUPS_IN_FLIGHT, NEAR_HOLDERS, OWNERS,
    },
    membership::Role,
    near::{Windows, cover, nearest},
    sample::Sampling,
    shard::{MemberId, ShardId},
    trust::Evidence,
    want::{At, Stage, Want, Word, distinct},
};

/// Names one request of a search.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Ticket(pub u64);

/// A request to make.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request {
    /// Ask an owner who holds pages.
    Lookup {
        /// To answer by.
        ticket: Ticket,
        /// The owner.
        owner: MemberId,
        /// The pages.
        ids: Vec<ShortId>,
    },
    /// Ask a holder for pages.
    Fetch {
        /// To answer by.
        ticket: Ticket,
        /// The holder.
        holder: MemberId,
        /// The pages.
        ids: Vec<ShortId>,
    },
    /// A peer did not answer in time: skip it elsewhere too. There is nothing to answer.
    TimedOut {
        /// The peer.
        peer: MemberId,
        /// What it was asked as.
        role: Role,
    },
}

#[derive(Debug)]
struct Flight {
    peer: PeerNo,
    wants: Vec<At>,
    deadline: Instant,
    kind: FlightKind,
}

#[derive(Clone, Copy, Debug)]
enum FlightKind {
    Lookup,
    Fetch {
        /// When another holder is asked as well, unless that has happened.
        hedge: Option<Instant>,
        /// How often the holder had answered before.
        answers: u32,
        asked: Instant,
    },
}

/// A search for pages.
#[derive(Debug)]
pub struct Search {
    /// Each once, in the order in which they were asked for: pages near each other are likely to be held by the same peer.
    ids: Vec<ShortId>,
    /// The places in `ids`, by id.
    sorted: Vec<At>,
    wants: Vec<Want>,
    /// How many wants are open.
    open: usize,
    /// Wants that were closed without having been found; some may have been opened again.
    closed: Vec<At>,
    windows: Windows,
    peers: Peers,
    /// The owners of each shard, and which names they keep as far as is known.
    owners: Vec<Vec<(PeerNo, Sampling)>>,
    /// What is to be asked of owners; one after the other has its turn.
    lookups: BTreeMap<PeerNo, VecDeque<At>>,
    last_asked: Option<PeerNo>,
    queues: BTreeMap<PeerNo, VecDeque<At>>,
    flights: BTreeMap<Ticket, Flight>,
    timed_out: VecDeque<(MemberId, Role)>,
    evidence: Vec<Evidence>,
    next_ticket: u64,
}

impl Search {
    /// A search for `ids`, in the order in which they stand in what they are wanted for; `owners` gives the owners of a shard
    /// that can be asked, and which names they keep as far as is known.
    #[must_use]
    pub fn new<O: IntoIterator<Item = (MemberId, Sampling)>>(
        ids: Vec<ShortId>,
        mut owners: impl FnMut(ShardId) -> O,
    ) -> Self {
        let (ids, sorted) = distinct(ids);
        let mut peers = Peers::default();
        let mut numbered = |(member, sampling)| Some((peers.number(member)?, sampling));
        let mut numbers =
            |shard| owners(shard).into_iter().filter_map(&mut numbered).take(OWNERS).collect::<Vec<_>>();
        let owners = ShardId::all().map(&mut numbers).collect();
        let mut search = Self {
            windows: Windows::new(ids.len()),
            wants: ids.iter().map(|_| Want::new()).collect(),
            open: ids.len(),
            closed: Vec::new(),
            ids,
            sorted,
            peers,
            owners,
            lookups: BTreeMap::new(),
            last_asked: None,
            queues: BTreeMap::new(),
            flights: BTreeMap::new(),
            timed_out: VecDeque::new(),
            evidence: Vec::new(),
            next_ticket: 0,
        };
        for at in (0..).take(search.ids.len()) {
            search.ask_next_owner(at);
        }
        search
    }

    fn at(&self, id: ShortId) -> Option<At> {
        let place = self.sorted.binary_search_by_key(&id, |at| self.ids[*at as usize]).ok()?;
        Some(self.sorted[place])
    }

    /// Changes a want, and keeps count of the open ones.
    fn change<T>(&mut self, at: At, change: impl FnOnce(&mut Want) -> T) -> T {
        let want = &mut self.wants[at as usize];
        let before = want.open();
        let result = change(want);
        self.open = self.open + usize::from(want.open()) - usize::from(before);
        if before && !want.open() && !want.found {
            self.closed.push(at);
        }
        result
    }

    /// The pages that nobody is left to ask for, in so far as that has not been said before. What is said is final: nothing is asked for
    /// them any more, and nothing found.
    pub fn take_missing(&mut self) -> Vec<ShortId> {
        let mut missing = Vec::new();
        for at in std::mem::take(&mut self.closed) {
            let want = &mut self.wants[at as usize];
            if !want.found && !want.open() && want.stage != Stage::Missing {
                want.stage = Stage::Missing;
                missing.push(self.ids[at as usize]);
            }
        }
        missing
    }

    /// Queues a page at the first of its owners that keeps its name, was not asked and has not failed. If there is none, it is looked for beside others.
    fn ask_next_owner(&mut self, at: At) {
        let id = self.ids[at as usize];
        let owners = &self.owners[ShardId::of(id).index()];
        // By bits that neither name the shard nor are zero in sampled names.
        let first = usize::from(id.0.to_be_bytes()[2]);
        let asked = self.wants[at as usize].owners_asked;
        let left = |place: &usize| {
            let (owner, sampling) = owners[*place];
            asked & 1 << place == 0 && !self.peers.bad_owner[usize::from(owner)] && sampling.keeps(id)
        };
        match (0..owners.len()).map(|step| (first + step) % owners.len()).find(left) {
            Some(place) => {
                self.wants[at as usize].owners_asked |= 1 << place;
                self.lookups.entry(owners[place].0).or_default().push_back(at);
            }
            None => self.end_lookup(at, Stage::Near),
        }
    }

    /// A page is not looked up any more; it is missing, or looked for beside others.
    fn end_lookup(&mut self, at: At, stage: Stage) {
        if self.wants[at as usize].stage == Stage::Owner {
            self.change(at, |want| want.stage = stage);
            self.windows.looked_up(at);
        }
    }

    /// An owner has answered about a page.
    fn answered(&mut self, at: At, owner: PeerNo) {
        let want = &self.wants[at as usize];
        let id = self.ids[at as usize];
        let owners = &self.owners[ShardId::of(id).index()];
        let keeps = owners.iter().any(|(other, sampling)| *other == owner && sampling.keeps(id));
        if want.known > 0 || want.found || keeps {
            self.end_lookup(at, Stage::Over);
        } else if want.stage == Stage::Owner {
            self.ask_next_owner(at);
        }
    }

    /// Has those pages asked for whose holders are to be guessed from the pages near them, as soon as these are looked up.
    fn settle(&mut self) {
        while let Some(window) = self.windows.next_settled() {
            let near = |at: &At| self.wants[*at as usize].stage == Stage::Near;
            if !window.clone().any(|at| near(&at)) {
                continue;
            }
            let hits: Vec<At> = window.clone().filter(|at| self.wants[*at as usize].known > 0).collect();
            let cover = cover(hits.iter().map(|at| self.wants[*at as usize].holders()), NEAR_HOLDERS);
            for at in window {
                if self.wants[at as usize].stage == Stage::Near {
                    self.ask_near(&hits, &cover, at);
                }
            }
        }
    }

    fn ask_near(&mut self, hits: &[At], cover: &[PeerNo], at: At) {
        // Of those who hold a page beside it one after the other has its turn, a request's worth of pages each.
        let turn = at as usize / FETCH_BATCH;
        let beside = nearest(hits, at).map(|near| {
            let holders = self.wants[near as usize].holders();
            holders[turn % holders.len()]
        });
        for holder in beside.collect::<Vec<_>>().into_iter().chain(cover.iter().copied()) {
            if self.wants[at as usize].holders().len() < NEAR_HOLDERS {
                self.wants[at as usize].add(holder, Word::Nobody);
            }
        }
        self.change(at, |want| want.stage = Stage::Over);
        self.queue_if_idle(at);
    }

    /// Notes holders that told this peer themselves; such a page is not looked up.
    pub fn known(&mut self, holders: impl IntoIterator<Item = (ShortId, MemberId)>) {
        self.note(holders, Word::Holder);
    }

    /// Notes holders that are hearsay: another owner of the shard passed on what they announced.
    pub fn hearsay(&mut self, holders: impl IntoIterator<Item = (ShortId, MemberId)>) {
        self.note(holders, Word::Nobody);
    }

    fn note(&mut self, holders: impl IntoIterator<Item = (ShortId, MemberId)>, word: Word) {
        let mut named = Vec::new();
        for (id, holder) in holders {
            let (Some(at), Some(holder)) = (self.at(id), self.peers.number(holder)) else { continue };
            self.wants[at as usize].add(holder, word);
            named.push(at);
        }
        // Only when all holders of a page are known is the one with the least to do chosen.
        for at in named {
            self.queue_if_idle(at);
        }
    }

    /// A holder did not keep what it promised before: in this search it is asked after all others.
    pub fn doubt(&mut self, holder: MemberId) {
        if let Some(holder) = self.peers.number(holder) {
            self.peers.doubted[usize::from(holder)] = true;
        }
    }

    fn queue_if_idle(&mut self, at: At) {
        if self.wants[at as usize].fetching == 0 {
            self.queue_next(at);
        }
    }

    /// Queues a page at the holder with the shortest queue among those left, if one is left. Those that are only guessed have their order.
    fn queue_next(&mut self, at: At) {
        let want = &self.wants[at as usize];
        let left = |n: &usize| want.asked & 1 << n == 0 && !self.peers.silent[usize::from(want.holders[*n])];
        let cost = |n: &usize| {
            let (holder, guess) = (want.holders[*n], want.word[*n] == Word::Nobody);
            let queued = self.queues.get(&holder).map_or(0, VecDeque::len);
            (self.peers.doubted[usize::from(holder)], if guess { *n } else { 0 }, queued)
        };
        let best = (0..want.holders().len()).filter(left).min_by_key(cost);
        let Some(best) = best.filter(|_| !want.found && want.stage != Stage::Missing) else { return };
        let holder = want.holders[best];
        self.change(at, |want| {
            want.asked |= 1 << best;
            want.fetching += 1;
        });
        self.queues.entry(holder).or_default().push_back(at);
    }

    /// An owner named holders; those not worth asking are left out by the driver. `sampled` are its shards of which it does not keep every name.
    pub fn on_holders(
        &mut self,
        ticket: Ticket,
        holders: &[(ShortId, MemberId)],
        sampled: &[(ShardId, Sampling)],
    ) {
        let Some(flight) = self.flights.remove(&ticket) else { return };
        for (shard, owners) in ShardId::all().zip(&mut self.owners) {
            for (_, keeps) in owners.iter_mut().filter(|(owner, _)| *owner == flight.peer) {
                let said = sampled.iter().find(|(of, _)| *of == shard);
                *keeps = said.map_or(Sampling::ALL, |(_, sampling)| *sampling);
            }
        }
        self.note(holders.iter().copied(), Word::Owner(flight.peer));
        for at in flight.wants {
            self.answered(at, flight.peer);
        }
        self.settle();
    }

    /// A holder answered with pages that hash to these ids; the other pages of the request it did not have. Returns which
    /// of `found` are new.
    pub fn on_pages(&mut self, ticket: Ticket, found: &[ShortId], now: Instant) -> Vec<bool> {
        let Some(flight) = self.flights.remove(&ticket) else { return vec![false; found.len()] };
        let holder = usize::from(flight.peer);
        self.peers.answers[holder] = self.peers.answers[holder].saturating_add(1);
        if let FlightKind::Fetch { asked, .. } = flight.kind {
            self.peers.round_trips[holder].measured(now.saturating_duration_since(asked));
        }
        let (asked, mut next) = (flight.wants.len(), 0);
        let news = found
            .iter()
            .map(|id| {
                // Pages come in about the order in which they were asked: each is looked for from the one before on.
                let mut places = (0..asked).map(|step| (next + step) % asked);
                let Some(n) = places.find(|n| self.ids[flight.wants[*n] as usize] == *id) else {
                    return false;
                };
                next = n + 1;
                !self.change(flight.wants[n], |want| std::mem::replace(&mut want.found, true))
            })
            .collect();
        self.testify(&flight, found);
        self.end_fetch(&flight.wants);
        news
    }

    /// Counts what a holder delivered of what it had announced.
    fn testify(&mut self, flight: &Flight, found: &[ShortId]) {
        let found: HashSet<ShortId> = found.iter().copied().collect();
        let mut counts: BTreeMap<Word, (u32, u32)> = BTreeMap::new();
        for at in &flight.wants {
            let want = &self.wants[*at as usize];
            let place = want.holders().iter().position(|holder| *holder == flight.peer);
            let word = place.map_or(Word::Nobody, |place| want.word[place]);
            let (asked, delivered) = counts.entry(word).or_default();
            *asked += 1;
            *delivered += u32::from(found.contains(&self.ids[*at as usize]));
        }
        let holder = self.peers.members[usize::from(flight.peer)];
        for (word, (asked, delivered)) in counts {
            let owner = match word {
                Word::Nobody => continue,
                Word::Holder => None,
                Word::Owner(owner) => Some(self.peers.members[usize::from(owner)]),
            };
            self.evidence.push(Evidence { holder, owner, asked, delivered });
        }
    }

    /// What came of asking holders since this was last asked.
    pub fn take_evidence(&mut self) -> Vec<Evidence> {
        std::mem::take(&mut self.evidence)
    }

    fn end_fetch(&mut self, wants: &[At]) {
        for at in wants {
            self.change(*at, |want| want.fetching -= 1);
            self.queue_if_idle(*at);
        }
    }

    /// A request failed.
    pub fn on_failed(&mut self, ticket: Ticket) {
        let Some(flight) = self.flights.remove(&ticket) else { return };
        match flight.kind {
            FlightKind::Lookup => self.lookup_failed(flight),
            FlightKind::Fetch { .. } => self.end_fetch(&flight.wants),
        }
    }

    /// A holder that has answered nothing for as long as a request may take is not asked again in this search: the pages that wait
    /// for it are asked of others, or are missing. One that is only slow has answered something else meanwhile.
    fn give_up_holder(&mut self, holder: PeerNo) {
        self.peers.silent[usize::from(holder)] = true;
        let queued: Vec<At> = self.queues.remove(&holder).unwrap_or_default().into();
        self.end_fetch(&queued);
    }

    /// An owner that failed once is not asked again in this search: what it was asked, or was to be asked, the next owner is.
    fn lookup_failed(&mut self, flight: Flight) {
        self.peers.bad_owner[usize::from(flight.peer)] = true;
        let queued = self.lookups.remove(&flight.peer).unwrap_or_default();
        for at in flight.wants.into_iter().chain(queued) {
            self.ask_next_owner(at);
        }
        self.settle();
    }

    /// The next request to make.
    pub fn next(&mut self, now: Instant) -> Option<Request> {
        self.settle();
        self.run_out(now);
        if let Some((peer, role)) = self.timed_out.pop_front() {
            return Some(Request::TimedOut { peer, role });
        }
        self.next_lookup(now).or_else(|| self.next_fetch(now))
    }

    fn run_out(&mut self, now: Instant) {
        let over: Vec<Ticket> = self.flights.iter().filter(|f| f.1.deadline <= now).map(|f| *f.0).collect();
        for ticket in over {
            let (number, kind) = (self.flights[&ticket].peer, self.flights[&ticket].kind);
            let peer = usize::from(number);
            let (role, news) = match kind {
                FlightKind::Lookup => (Role::Owner, !self.peers.bad_owner[peer]),
                FlightKind::Fetch { answers, .. } => {
                    let silent = self.peers.answers[peer] == answers;
                    let known = self.peers.silent[peer];
                    if silent && !known {
                        self.give_up_holder(number);
                    }
                    (Role::Holder, !known)
                }
            };
            if news {
                self.timed_out.push_back((self.peers.members[peer], role));
            }
            self.on_failed(ticket);
        }
        let mut hedged = Vec::new();
        for flight in self.flights.values_mut() {
            match &mut flight.kind {
                FlightKind::Fetch { hedge, .. } if hedge.is_some_and(|at| at <= now) => {
                    *hedge = None;
                    hedged.extend_from_slice(&flight.wants);
                }
                FlightKind::Fetch { .. } | FlightKind::Lookup => {}
            }
        }
        for at in hedged {
            self.queue_next(at);
        }
    }

    fn fly(&mut self, flight: Flight) -> (Ticket, MemberId, Vec<ShortId>) {
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        let ids = flight.wants.iter().map(|at| self.ids[*at as usize]).collect();
        let peer = self.peers.members[usize::from(flight.peer)];
        self.flights.insert(ticket, flight);
        (ticket, peer, ids)
    }

    fn next_lookup(&mut self, now: Instant) -> Option<Request> {
        let flying = self.flights.values().filter(|f| matches!(f.kind, FlightKind::Lookup)).count();
        if flying >= LOOKUPS_IN_FLIGHT {
            return None;
        }
        let (owner, wants) = loop {
            let (owner, wants) = self.next_batch()?;
            if !wants.is_empty() {
                break (owner, wants);
            }
        };
        let many = u32::try_from(wants.len()).expect("a batch is bounded");
        let deadline = now + LOOKUP_TIMEOUT + LOOKUP_TIMEOUT_PER_ID * many;
        let (ticket, owner, ids) =
            self.fly(Flight { peer: owner, wants, deadline, kind: FlightKind::Lookup });
        Some(Request::Lookup { ticket, owner, ids })
    }

    /// What the next owner is to be asked; empty if all of it is known by now.
    fn next_batch(&mut self) -> Option<(PeerNo, Vec<At>)> {
        // In turn over the owners, so that all of them work at once.
        let behind = self.last_asked.map_or(0, |last| last.saturating_add(1));
        let turn = self.lookups.range(behind..).next().or_else(|| self.lookups.iter().next());
        let owner = *turn?.0;
        self.last_asked = Some(owner);
        let mut queue = self.lookups.remove(&owner).expect("chosen from the queues");
        let mut wants: Vec<At> = Vec::new();
        while wants.len() < LOOKUP_BATCH
            && let Some(at) = queue.pop_front()
        {
            // A holder may be known without asking.
            if self.wants[at as usize].known == 0 {
                wants.push(at);
            } else {
                self.end_lookup(at, Stage::Over);
            }
        }
        if !queue.is_empty() {
            self.lookups.insert(owner, queue);
        }
        self.settle();
        Some((owner, wants))
    }

    fn next_fetch(&mut self, now: Instant) -> Option<Request> {
        let fetches = || self.flights.values().filter(|f| matches!(f.kind, FlightKind::Fetch { .. }));
        if fetches().count() >= FETCHES_IN_FLIGHT {
            return None;
        }
        let full: Vec<PeerNo> = {
            let busy: Vec<PeerNo> = fetches().map(|flight| flight.peer).collect();
            let asked = |holder: &PeerNo| busy.iter().filter(|other| *other == holder).count();
            busy.iter().copied().filter(|holder| asked(holder) >= FETCHES_PER_HOLDER).collect()
        };
        let (holder, wants) = loop {
            let room = self.queues.iter_mut().filter(|(holder, _)| !full.contains(holder));
            let (holder, queue) = room.max_by_key(|(_, queue)| queue.len())?;
            if queue.is_empty() {
                return None;
            }
            let mut wants: Vec<At> = queue.drain(..queue.len().min(FETCH_BATCH)).collect();
            wants.retain(|at| {
                let want = &mut self.wants[*at as usize];
                // Found through another holder meanwhile, and so not open any more.
                want.fetching -= u8::from(want.found);
                !want.found
            });
            if !wants.is_empty() {
                break (*holder, wants);
            }
        };
        let answers = self.peers.answers[usize::from(holder)];
        let hedge = now + self.peers.round_trips[usize::from(holder)].slow_after();
        let kind = FlightKind::Fetch { hedge: Some(hedge), answers, asked: now };
        let flight = Flight { peer: holder, wants, deadline: now + FETCH_TIMEOUT, kind };
        let (ticket, holder, ids) = self.fly(flight);
        Some(Request::Fetch { ticket, holder, ids })
    }

    /// When to call [`Self::next`] again if nothing comes in.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        let wake = |flight: &Flight| match flight.kind {
            FlightKind::Fetch { hedge: Some(hedge), .. } => hedge.min(flight.deadline),
            FlightKind::Fetch { hedge: None, .. } | FlightKind::Lookup => flight.deadline,
        };
        self.flights.values().map(wake).min()
    }

    /// Whether every page is found, or missing for good: nothing is out or queued that could still bring one.
    #[must_use]
    pub fn done(&self) -> bool {
        self.open == 0
    }

    /// Pages that are not found so far.
    #[must_use]
    pub fn missing(&self) -> usize {
        self.wants.iter().filter(|want| !want.found).count()
    }
}

#[cfg(test)]
#[path = "lookup_tests.rs"]
mod tests;
