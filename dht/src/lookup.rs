//! One search of the site for pages, as a state machine.
//!
//! ```text
//!            owners asked             a holder is known          asked of a holder
//! wanted ──────────────────► looking ───────────────────► queued ─────────────────► fetching ──► found
//!                               │ all owners answered,       ▲ next holder: it had not the page, served wrong   │
//!                               ▼ none named a holder        │ bytes, failed, or was slow (then both are asked) │
//!                            missing ◄───────────────────────┴─────────── no holder left ◄───────────────────────┘
//! ```
//!
//! It takes `now` and answers, and gives out requests to make. The driver's contract: hand in whatever came, then take requests
//! with [`Search::next`] until there is none, then wait for an answer or for [`Search::deadline`]. Every request has a deadline;
//! a late answer is still taken until its request has timed out. What comes back as found has been hashed by the driver.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Instant,
};

use page::ShortId;

use crate::{
    limits::{
        FETCH_BATCH, FETCH_HEDGE, FETCH_TIMEOUT, FETCHES_IN_FLIGHT, FETCHES_PER_HOLDER, HOLDERS_PER_NAME,
        INDEX_BATCH, LOOKUP_TIMEOUT, LOOKUPS_IN_FLIGHT,
    },
    membership::Role,
    shard::MemberId,
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

#[derive(Debug, Default)]
struct Want {
    /// Holders not asked yet, the best last.
    holders: Vec<MemberId>,
    /// Holders asked, so that none is asked twice.
    asked: Vec<MemberId>,
    /// Lookups whose answer is still out.
    looking: u8,
    /// Requests to holders that are out or queued.
    fetching: u8,
    found: bool,
}

#[derive(Debug)]
struct Flight {
    peer: MemberId,
    wants: Vec<usize>,
    deadline: Instant,
    kind: FlightKind,
}

#[derive(Debug)]
enum FlightKind {
    Lookup,
    /// When another holder is asked as well, unless that has happened.
    Fetch {
        hedge: Option<Instant>,
    },
}

/// A search for pages.
#[derive(Debug)]
pub struct Search {
    ids: Vec<ShortId>,
    wants: Vec<Want>,
    lookups: VecDeque<(MemberId, Vec<usize>)>,
    queues: BTreeMap<MemberId, VecDeque<usize>>,
    flights: BTreeMap<Ticket, Flight>,
    timed_out: VecDeque<(MemberId, Role)>,
    next_ticket: u64,
}

impl Search {
    /// A search for `ids`; `owners` gives the owners to ask for an id.
    #[must_use]
    pub fn new<O: IntoIterator<Item = MemberId>>(
        mut ids: Vec<ShortId>,
        mut owners: impl FnMut(ShortId) -> O,
    ) -> Self {
        ids.sort_unstable();
        ids.dedup();
        let mut wants: Vec<Want> = ids.iter().map(|_| Want::default()).collect();
        let mut by_owner: BTreeMap<MemberId, Vec<usize>> = BTreeMap::new();
        for (at, (id, want)) in ids.iter().zip(&mut wants).enumerate() {
            for owner in owners(*id) {
                want.looking = want.looking.saturating_add(1);
                by_owner.entry(owner).or_default().push(at);
            }
        }
        // Round-robin over the owners, so that all of them work at once.
        let mut lookups = VecDeque::new();
        let longest = by_owner.values().map(Vec::len).max().unwrap_or(0);
        for from in (0..longest).step_by(INDEX_BATCH) {
            for (owner, wants) in &by_owner {
                if let Some(batch) = wants.get(from..).filter(|rest| !rest.is_empty()) {
                    lookups.push_back((*owner, batch[..batch.len().min(INDEX_BATCH)].to_vec()));
                }
            }
        }
        Self {
            ids,
            wants,
            lookups,
            queues: BTreeMap::new(),
            flights: BTreeMap::new(),
            timed_out: VecDeque::new(),
            next_ticket: 0,
        }
    }

    fn at(&self, id: ShortId) -> Option<usize> {
        self.ids.binary_search(&id).ok()
    }

    /// Notes holders that are known without a request.
    pub fn known(&mut self, holders: impl IntoIterator<Item = (ShortId, MemberId)>) {
        let named = holders.into_iter().filter_map(|(id, holder)| Some((self.at(id)?, holder)));
        let named: Vec<(usize, MemberId)> = named.collect();
        for (at, holder) in &named {
            self.add_holder(*at, *holder);
        }
        // Only when all holders of a page are known is the one with the least to do chosen.
        for (at, _) in named {
            if self.wants[at].fetching == 0 {
                self.queue_next(at);
            }
        }
    }

    fn add_holder(&mut self, at: usize, holder: MemberId) {
        let want = &mut self.wants[at];
        let seen = want.asked.contains(&holder) || want.holders.contains(&holder);
        if !want.found && !seen && want.asked.len() + want.holders.len() < HOLDERS_PER_NAME {
            want.holders.push(holder);
        }
    }

    /// Queues a page at the holder with the shortest queue among those left; `false` if none is left.
    fn queue_next(&mut self, at: usize) -> bool {
        let want = &mut self.wants[at];
        let queued = |holder: &MemberId| self.queues.get(holder).map_or(0, VecDeque::len);
        let best = (0..want.holders.len()).min_by_key(|n| queued(&want.holders[*n]));
        let Some(best) = best.filter(|_| !want.found) else { return false };
        let holder = want.holders.swap_remove(best);
        want.asked.push(holder);
        want.fetching += 1;
        self.queues.entry(holder).or_default().push_back(at);
        true
    }

    /// An owner named holders; those not worth asking are left out by the driver.
    pub fn on_holders(&mut self, ticket: Ticket, holders: &[(ShortId, MemberId)]) {
        if self.end_lookup(ticket) {
            self.known(holders.iter().copied());
        }
    }

    fn end_lookup(&mut self, ticket: Ticket) -> bool {
        let Some(flight) = self.flights.remove(&ticket) else { return false };
        for at in flight.wants {
            self.wants[at].looking = self.wants[at].looking.saturating_sub(1);
        }
        true
    }

    /// A holder answered with pages that hash to these ids; the other pages of the request it did not have. Returns which
    /// of `found` are new.
    pub fn on_pages(&mut self, ticket: Ticket, found: &[ShortId]) -> Vec<bool> {
        let Some(flight) = self.flights.remove(&ticket) else { return vec![false; found.len()] };
        let news = found
            .iter()
            .map(|id| {
                let Some(at) = self.at(*id) else { return false };
                !std::mem::replace(&mut self.wants[at].found, true)
            })
            .collect();
        self.end_fetch(&flight.wants);
        news
    }

    fn end_fetch(&mut self, wants: &[usize]) {
        for at in wants {
            let want = &mut self.wants[*at];
            want.fetching -= 1;
            if !want.found && want.fetching == 0 {
                self.queue_next(*at);
            }
        }
    }

    /// A request failed.
    pub fn on_failed(&mut self, ticket: Ticket) {
        let Some(flight) = self.flights.get(&ticket) else { return };
        match flight.kind {
            FlightKind::Lookup => {
                self.end_lookup(ticket);
            }
            FlightKind::Fetch { .. } => {
                self.on_pages(ticket, &[]);
            }
        }
    }

    /// The next request to make.
    pub fn next(&mut self, now: Instant) -> Option<Request> {
        self.run_out(now);
        if let Some((peer, role)) = self.timed_out.pop_front() {
            return Some(Request::TimedOut { peer, role });
        }
        self.next_lookup(now).or_else(|| self.next_fetch(now))
    }

    fn run_out(&mut self, now: Instant) {
        let over: Vec<Ticket> = self.flights.iter().filter(|f| f.1.deadline <= now).map(|f| *f.0).collect();
        for ticket in over {
            let flight = &self.flights[&ticket];
            let role = match flight.kind {
                FlightKind::Lookup => Role::Owner,
                FlightKind::Fetch { .. } => Role::Holder,
            };
            self.timed_out.push_back((flight.peer, role));
            self.on_failed(ticket);
        }
        let mut hedged = Vec::new();
        for flight in self.flights.values_mut() {
            match &mut flight.kind {
                FlightKind::Fetch { hedge } if hedge.is_some_and(|at| at <= now) => {
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

    fn fly(&mut self, flight: Flight) -> (Ticket, Vec<ShortId>) {
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        let ids = flight.wants.iter().map(|at| self.ids[*at]).collect();
        self.flights.insert(ticket, flight);
        (ticket, ids)
    }

    fn next_lookup(&mut self, now: Instant) -> Option<Request> {
        let flying = self.flights.values().filter(|f| matches!(f.kind, FlightKind::Lookup)).count();
        if flying >= LOOKUPS_IN_FLIGHT {
            return None;
        }
        let (owner, wants) = self.lookups.pop_front()?;
        let deadline = now + LOOKUP_TIMEOUT;
        let (ticket, ids) = self.fly(Flight { peer: owner, wants, deadline, kind: FlightKind::Lookup });
        Some(Request::Lookup { ticket, owner, ids })
    }

    fn next_fetch(&mut self, now: Instant) -> Option<Request> {
        let fetches = || self.flights.values().filter(|f| matches!(f.kind, FlightKind::Fetch { .. }));
        if fetches().count() >= FETCHES_IN_FLIGHT {
            return None;
        }
        let room = |holder: &MemberId| fetches().filter(|f| f.peer == *holder).count() < FETCHES_PER_HOLDER;
        let longest = self.queues.iter().filter(|(holder, queue)| !queue.is_empty() && room(holder));
        let holder = *longest.max_by_key(|(_, queue)| queue.len())?.0;
        let queue = self.queues.get_mut(&holder).expect("chosen from the queues");
        let mut wants: Vec<usize> = queue.drain(..queue.len().min(FETCH_BATCH)).collect();
        // Found through another holder meanwhile.
        wants.retain(|at| {
            let want = &mut self.wants[*at];
            want.fetching -= u8::from(want.found);
            !want.found
        });
        if wants.is_empty() {
            return self.next_fetch(now);
        }
        let kind = FlightKind::Fetch { hedge: Some(now + FETCH_HEDGE) };
        let flight = Flight { peer: holder, wants, deadline: now + FETCH_TIMEOUT, kind };
        let (ticket, ids) = self.fly(flight);
        Some(Request::Fetch { ticket, holder, ids })
    }

    /// When to call [`Self::next`] again if nothing comes in.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        let wake = |flight: &Flight| match flight.kind {
            FlightKind::Fetch { hedge: Some(hedge) } => hedge.min(flight.deadline),
            FlightKind::Fetch { hedge: None } | FlightKind::Lookup => flight.deadline,
        };
        self.flights.values().map(wake).min()
    }

    /// Whether every page is found, or missing for good: nothing is out or queued that could still bring one.
    #[must_use]
    pub fn done(&self) -> bool {
        let open = |want: &Want| !want.found && (want.looking > 0 || want.fetching > 0);
        !self.wants.iter().any(open)
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
