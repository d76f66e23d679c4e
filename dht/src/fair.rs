//! Whose request is served next, and whose is refused. Pure.
//!
//! Each requester has a queue of its own. The next request is that of the requester which has been served the fewest bytes since it began to
//! wait (start-time fair queueing), so that one that asks much waits for itself and not the others for it. Bounds hold for one requester and for all
//! together, on what waits and on what is worked on, in requests and in bytes. When everything that may wait is taken, a request still gets in before
//! those of a requester with more waiting: the newest of the latter goes.

use std::collections::{BTreeMap, VecDeque};

/// An amount of work: requests, and the bytes of their answers.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Load {
    /// Requests.
    pub requests: usize,
    /// Bytes that they are answered with, at most.
    pub bytes: usize,
}

impl Load {
    fn one(bytes: usize) -> Self {
        Self { requests: 1, bytes }
    }

    fn plus(self, other: Self) -> Self {
        Self { requests: self.requests + other.requests, bytes: self.bytes.saturating_add(other.bytes) }
    }

    fn minus(self, other: Self) -> Self {
        Self { requests: self.requests - other.requests, bytes: self.bytes - other.bytes }
    }

    /// Whether `more` fits as well. One request fits alone, whatever its size.
    fn has_room(self, more: Self, bound: Self) -> bool {
        let sum = self.plus(more);
        self.requests == 0 || (sum.requests <= bound.requests && sum.bytes <= bound.bytes)
    }

    /// The larger share of `of`, in either measure.
    fn share(self, of: Self) -> u128 {
        let part = |is: usize, all: usize| is as u128 * (1 << 32) / all.max(1) as u128;
        part(self.requests, of.requests).max(part(self.bytes, of.bytes))
    }
}

/// What may wait and be worked on.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Waiting, of one requester.
    pub waiting_each: Load,
    /// Waiting, of all.
    pub waiting: Load,
    /// Worked on, of one requester.
    pub working_each: Load,
    /// Worked on, of all.
    pub working: Load,
}

/// Why a request is not served.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// Its requester has as much waiting as one may have.
    Share,
    /// As much waits as may wait, and its requester has the most of it.
    Full,
}

/// A request that is not served.
#[derive(Debug)]
pub struct Refused<K, T> {
    /// Whose it is.
    pub from: K,
    /// The request.
    pub item: T,
    /// Why.
    pub why: Refusal,
}

#[derive(Debug)]
struct Requester<T> {
    waiting: VecDeque<(usize, T)>,
    waits: Load,
    works: Load,
    /// Bytes served since the beginning of its wait, on the scale of [`Fair::served`].
    tag: u128,
}

/// The requests of all requesters.
#[derive(Debug)]
pub struct Fair<K, T> {
    bounds: Bounds,
    requesters: BTreeMap<K, Requester<T>>,
    waits: Load,
    works: Load,
    /// The tag of whoever was served last.
    served: u128,
}

/// A request to be worked on.
#[derive(Debug)]
pub struct Turn<K, T> {
    /// Whose it is; for [`Fair::done`].
    pub from: K,
    /// Its bytes; for [`Fair::done`].
    pub bytes: usize,
    /// The request.
    pub item: T,
}

impl<K: Ord + Clone, T> Fair<K, T> {
    /// Nothing waits.
    #[must_use]
    pub fn new(bounds: Bounds) -> Self {
        let (waits, works) = (Load::default(), Load::default());
        Self { bounds, requesters: BTreeMap::new(), waits, works, served: 0 }
    }

    /// Queues a request whose answer takes up to `bytes`. Returns the requests that are refused for it: itself, or the newest of requesters
    /// with more waiting.
    pub fn offer(&mut self, from: K, bytes: usize, item: T) -> Vec<Refused<K, T>> {
        let load = Load::one(bytes);
        let own = self.requesters.get(&from).map_or(Load::default(), |requester| requester.waits);
        if !own.has_room(load, self.bounds.waiting_each) {
            return vec![Refused { from, item, why: Refusal::Share }];
        }
        let mut pushed_out = Vec::new();
        while !self.waits.has_room(load, self.bounds.waiting) {
            let Some(pushed) = self.push_out(own.plus(load)) else {
                // Nobody has more: what was pushed out goes back to where it was, the newest last.
                pushed_out.into_iter().rev().for_each(|(whose, bytes, item)| self.queue(whose, bytes, item));
                return vec![Refused { from, item, why: Refusal::Full }];
            };
            pushed_out.push(pushed);
        }
        self.queue(from, bytes, item);
        let refused = |(from, _, item)| Refused { from, item, why: Refusal::Full };
        pushed_out.into_iter().map(refused).collect()
    }

    fn queue(&mut self, from: K, bytes: usize, item: T) {
        let (served, load) = (self.served, Load::one(bytes));
        let requester = self.requesters.entry(from).or_insert_with(|| Requester {
            waiting: VecDeque::new(),
            waits: Load::default(),
            works: Load::default(),
            tag: served,
        });
        if requester.waiting.is_empty() {
            // Time in which it asked nothing gives no credit.
            requester.tag = requester.tag.max(served);
        }
        requester.waiting.push_back((bytes, item));
        requester.waits = requester.waits.plus(load);
        self.waits = self.waits.plus(load);
    }

    /// Takes the newest request of the requester with the most waiting, if that is more than `than`.
    fn push_out(&mut self, than: Load) -> Option<(K, usize, T)> {
        let all = self.bounds.waiting;
        let most = self.requesters.iter_mut().max_by_key(|(_, requester)| requester.waits.share(all))?;
        let (from, requester) = most;
        if requester.waits.share(all) <= than.share(all) {
            return None;
        }
        let (bytes, item) = requester.waiting.pop_back()?;
        requester.waits = requester.waits.minus(Load::one(bytes));
        self.waits = self.waits.minus(Load::one(bytes));
        Some((from.clone(), bytes, item))
    }

    /// The next request to work on, if there is room to.
    pub fn take(&mut self) -> Option<Turn<K, T>> {
        let (bounds, works) = (self.bounds, self.works);
        let ready = |requester: &Requester<T>| {
            let load = Load::one(requester.waiting.front()?.0);
            let room =
                works.has_room(load, bounds.working) && requester.works.has_room(load, bounds.working_each);
            room.then_some(requester.tag)
        };
        let least = self.requesters.iter().filter_map(|(from, r)| Some((ready(r)?, from)));
        let from = least.min()?.1.clone();
        let requester = self.requesters.get_mut(&from)?;
        let (bytes, item) = requester.waiting.pop_front()?;
        let load = Load::one(bytes);
        self.served = requester.tag;
        requester.tag += bytes.max(1) as u128;
        requester.waits = requester.waits.minus(load);
        requester.works = requester.works.plus(load);
        self.waits = self.waits.minus(load);
        self.works = self.works.plus(load);
        Some(Turn { from, bytes, item })
    }

    /// A request that was worked on is answered, or never will be.
    pub fn done(&mut self, from: &K, bytes: usize) {
        let Some(requester) = self.requesters.get_mut(from) else { return };
        requester.works = requester.works.minus(Load::one(bytes));
        self.works = self.works.minus(Load::one(bytes));
        // One that has been served more than others is remembered until they have caught up, or nobody is left to: otherwise whoever
        // asks anew as soon as it is answered would always be first.
        let served = if self.waits.plus(self.works).requests == 0 { u128::MAX } else { self.served };
        self.requesters.retain(|_, r| r.waits.plus(r.works).requests > 0 || r.tag > served);
    }

    /// What waits.
    #[must_use]
    pub fn waiting(&self) -> Load {
        self.waits
    }

    /// What is worked on.
    #[must_use]
    pub fn working(&self) -> Load {
        self.works
    }
}

#[cfg(test)]
#[path = "fair_tests.rs"]
mod tests;
