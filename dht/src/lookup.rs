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
//! each owner once, and once more for each [`LOOKUP_BATCH`](crate::limits::LOOKUP_BATCH) ids. Full owners keep only some names and say which ([`crate::sample`]): an id is asked of an
//! owner that keeps it. A page whose name no owner keeps, or none that answers, waits until those near it in the request are looked up, and is then
//! asked of the holders that the nearest of them have.
//!
//! It takes `now` and answers, and gives out requests to make. The driver's contract: hand in whatever came, then take requests
//! with [`Search::next`] until there is none, then wait for an answer or for [`Search::deadline`]. Every request has a deadline;
//! a late answer is still taken until its request has timed out. What comes back as found has been hashed by the driver.
//! [`Search::take_missing`] gives the missing ones as soon as they are, and at the end each page was given as found or as missing, once.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Instant,
};

use page::ShortId;

use crate::{
    asked::{PeerNo, Peers},
    limits::{
        FETCH_BATCH, FETCH_TIMEOUT, FETCHES_IN_FLIGHT, FETCHES_PER_HOLDER, NEAR_HOLDERS, OWNERS,
        SUGGESTED_PAGES,
    },
    membership::{Owner, Role},
    near::Windows,
    round_trip::RoundTrip,
    sample::Sampling,
    shard::{MemberId, ShardId},
    trust::Evidence,
    want::{At, Stage, Want, Word, distinct},
};

#[path = "lookup_near.rs"]
mod near_pages;
#[path = "lookup_owners.rs"]
mod owners;

/// How far from where it is expected a claim is looked for first.
const CLAIMS_BESIDE: usize = 16;

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
    /// An owner takes longer than owners do: elsewhere, ask it after others until it answers something. There is nothing to answer.
    Late {
        /// The owner.
        owner: MemberId,
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
    asked: Instant,
    /// When another peer is asked as well, unless that has happened.
    hedge: Option<Instant>,
    deadline: Instant,
    kind: FlightKind,
}

#[derive(Clone, Copy, Debug)]
enum FlightKind {
    Lookup,
    Fetch {
        /// How often the holder had answered before.
        answers: u32,
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
    /// What is to be told of peers that did not answer.
    told: VecDeque<Request>,
    /// How long owners take to answer, all of them together: each is asked a few times only.
    owners_take: RoundTrip,
    /// Who served this host lately, and for how many more pages with nothing beside them they are asked.
    suggested: Vec<PeerNo>,
    suggestions: usize,
    evidence: Vec<Evidence>,
    next_ticket: u64,
}

impl Search {
    /// A search for `ids`, in the order in which they stand in what they are wanted for; `owners` gives the owners of a shard
    /// that can be asked.
    #[must_use]
    pub fn new<O: IntoIterator<Item = Owner>>(
        ids: Vec<ShortId>,
        mut owners: impl FnMut(ShardId) -> O,
    ) -> Self {
        let (ids, sorted) = distinct(ids);
        let mut peers = Peers::default();
        let mut numbered = |Owner { member, sampling, late }| {
            let number = peers.number(member)?;
            peers.late_owner[usize::from(number)] |= late;
            Some((number, sampling))
        };
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
            told: VecDeque::new(),
            owners_take: RoundTrip::default(),
            suggested: Vec::new(),
            suggestions: SUGGESTED_PAGES,
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

    /// As [`Self::at`], where the id is likely to stand in `order` at `next` or soon after: a search in all ids misses the cache at each step.
    fn at_beside(&self, id: ShortId, order: &[At], next: &mut usize) -> Option<At> {
        let place = |n: usize| if order.is_empty() { At::try_from(n).ok() } else { order.get(n).copied() };
        let here = |n: &usize| place(*n).is_some_and(|at| self.ids.get(at as usize) == Some(&id));
        if let Some(n) = (*next..*next + CLAIMS_BESIDE).find(here) {
            // The next claim may be of the same page.
            *next = n;
            return place(n);
        }
        let at = self.at(id)?;
        *next = if order.is_empty() { at as usize } else { order.binary_search(&at).unwrap_or(*next) };
        Some(at)
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

    /// Notes holders that told this peer themselves; such a page is not looked up.
    pub fn known(&mut self, holders: impl IntoIterator<Item = (ShortId, MemberId)>) {
        self.note(holders, Word::Holder, &[]);
    }

    /// Notes holders that are hearsay: another owner of the shard passed on what they announced.
    pub fn hearsay(&mut self, holders: impl IntoIterator<Item = (ShortId, MemberId)>) {
        self.note(holders, Word::Nobody, &[]);
    }

    /// Claims come in about the order in which their pages were asked for: that of `order`, ascending, or that of all ids if it is empty.
    fn note(&mut self, holders: impl IntoIterator<Item = (ShortId, MemberId)>, word: Word, order: &[At]) {
        let (mut named, mut next) = (Vec::new(), 0);
        for (id, holder) in holders {
            let (Some(at), Some(holder)) = (self.at_beside(id, order, &mut next), self.peers.number(holder))
            else {
                continue;
            };
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

    /// These have served this host lately, the most useful first: they are asked for pages of which there is nothing else to go by, a few of them.
    pub fn suggest(&mut self, holders: impl IntoIterator<Item = MemberId>) {
        let numbers = holders.into_iter().take(NEAR_HOLDERS).filter_map(|holder| self.peers.number(holder));
        self.suggested = numbers.collect();
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

    /// A holder answered with pages that hash to these ids; the other pages of the request it did not have. Returns which
    /// of `found` are new.
    pub fn on_pages(&mut self, ticket: Ticket, found: &[ShortId], now: Instant) -> Vec<bool> {
        let Some(flight) = self.flights.remove(&ticket) else { return vec![false; found.len()] };
        let holder = usize::from(flight.peer);
        self.peers.answers[holder] = self.peers.answers[holder].saturating_add(1);
        self.peers.round_trips[holder].measured(now.saturating_duration_since(flight.asked));
        let (asked, mut next) = (flight.wants.len(), 0);
        let mut delivered = vec![false; asked];
        let news = found
            .iter()
            .map(|id| {
                // Pages come in about the order in which they were asked: each is looked for from the one before on.
                let mut places = (0..asked).map(|step| (next + step) % asked);
                let Some(n) = places.find(|n| self.ids[flight.wants[*n] as usize] == *id) else {
                    return false;
                };
                next = n + 1;
                delivered[n] = true;
                !self.change(flight.wants[n], |want| std::mem::replace(&mut want.found, true))
            })
            .collect();
        self.testify(&flight, &delivered);
        self.end_fetch(&flight.wants);
        news
    }

    /// Counts what a holder delivered of what it had announced.
    fn testify(&mut self, flight: &Flight, came: &[bool]) {
        let mut counts: BTreeMap<Word, (u32, u32)> = BTreeMap::new();
        for (at, came) in flight.wants.iter().zip(came) {
            let want = &self.wants[*at as usize];
            let place = want.holders().iter().position(|holder| *holder == flight.peer);
            let word = place.map_or(Word::Nobody, |place| want.word[place]);
            let (asked, delivered) = counts.entry(word).or_default();
            *asked += 1;
            *delivered += u32::from(*came);
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

    /// The next request to make.
    pub fn next(&mut self, now: Instant) -> Option<Request> {
        self.settle();
        self.run_out(now);
        if let Some(told) = self.told.pop_front() {
            return Some(told);
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
                FlightKind::Fetch { answers } => {
                    let silent = self.peers.answers[peer] == answers;
                    let known = self.peers.silent[peer];
                    if silent && !known {
                        self.give_up_holder(number);
                    }
                    (Role::Holder, !known)
                }
            };
            if news {
                self.told.push_back(Request::TimedOut { peer: self.peers.members[peer], role });
            }
            self.on_failed(ticket);
        }
        let slow = |flight: &Flight| flight.hedge.is_some_and(|at| at <= now);
        let hedged: Vec<Ticket> = self.flights.iter().filter(|f| slow(f.1)).map(|f| *f.0).collect();
        for ticket in hedged {
            let Some(flight) = self.flights.get_mut(&ticket) else { continue };
            flight.hedge = None;
            let (peer, kind, wants) = (flight.peer, flight.kind, flight.wants.clone());
            match kind {
                FlightKind::Lookup => self.owner_is_late(peer, &wants),
                FlightKind::Fetch { .. } => wants.into_iter().for_each(|at| self.queue_next(at)),
            }
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
        let kind = FlightKind::Fetch { answers };
        let deadline = now + FETCH_TIMEOUT;
        let flight = Flight { peer: holder, wants, asked: now, hedge: Some(hedge), deadline, kind };
        let (ticket, holder, ids) = self.fly(flight);
        Some(Request::Fetch { ticket, holder, ids })
    }

    /// When to call [`Self::next`] again if nothing comes in.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        let wake = |flight: &Flight| flight.hedge.map_or(flight.deadline, |at| at.min(flight.deadline));
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
