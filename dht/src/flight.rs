//! Which pages are on their way to this host, and who waits for them, so that each is asked for once. Pure.
//!
//! ```text
//!            start: nobody fetches it                         arrived: whoever waits gets a copy
//! (unknown) ─────────────────────────► on its way, by a search ──────────────────────────────────► (unknown)
//!                                        │          ▲ start by another search: it waits
//!                                        │ ended: it failed, or its search was dropped: whoever waits starts itself
//!                                        └──────────────────────────────────────────────────────► (unknown)
//! ```
//!
//! The one exception is a hedge: a search that fetches a page, or waits for it, and asks another holder because the first one is slow.

use page::ShortId;

use crate::{id_map::IdMap, shard::MemberId};

/// Names a search.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SearchId(pub u64);

/// What to do about a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Start {
    /// Fetch it; others wait for this.
    Fetch,
    /// Fetch it as well: the same search has it on its way already, slowly.
    Hedge,
    /// Wait: another search fetches it, from this holder.
    Wait(MemberId),
}

#[derive(Debug)]
struct Flight<W> {
    by: SearchId,
    from: MemberId,
    waiting: Vec<(SearchId, W)>,
}

/// The pages on their way. `W` is how whoever waits is told.
#[derive(Debug)]
pub struct Flights<W> {
    flights: IdMap<Flight<W>>,
}

impl<W> Default for Flights<W> {
    fn default() -> Self {
        Self { flights: IdMap::default() }
    }
}

impl<W> Flights<W> {
    /// A search wants to fetch a page from a holder. If it is to wait, `waiter` is kept until the page arrives or its fetch ends.
    pub fn start(&mut self, id: ShortId, by: SearchId, from: MemberId, waiter: impl FnOnce() -> W) -> Start {
        let Some(flight) = self.flights.get_mut(&id) else {
            self.flights.insert(id, Flight { by, from, waiting: Vec::new() });
            return Start::Fetch;
        };
        if flight.by == by || flight.waiting.iter().any(|(other, _)| *other == by) {
            return Start::Hedge;
        }
        flight.waiting.push((by, waiter()));
        Start::Wait(flight.from)
    }

    /// A page is here, whoever fetched it: returns who waits for it.
    pub fn arrived(&mut self, id: ShortId) -> Vec<W> {
        let flight = self.flights.remove(&id);
        flight.map_or_else(Vec::new, |flight| flight.waiting.into_iter().map(|(_, waiter)| waiter).collect())
    }

    /// A search's fetch of a page has ended without it: returns who waits for it, to be told to start anew.
    pub fn ended(&mut self, id: ShortId, by: SearchId) -> Vec<W> {
        if self.flights.get(&id).is_none_or(|flight| flight.by != by) {
            return Vec::new();
        }
        self.arrived(id)
    }

    /// A search does not wait for a page any more.
    pub fn left(&mut self, id: ShortId, by: SearchId) {
        if let Some(flight) = self.flights.get_mut(&id) {
            flight.waiting.retain(|(other, _)| *other != by);
        }
    }

    /// Pages on their way.
    #[must_use]
    pub fn len(&self) -> usize {
        self.flights.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.flights.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    const PAGE: ShortId = ShortId(7);

    fn holder() -> MemberId {
        MemberId::of_peer(b"holder")
    }

    #[test]
    fn a_second_search_waits_and_gets_the_page() {
        let mut flights = Flights::default();
        assert_eq!(flights.start(PAGE, SearchId(1), holder(), || 1), Start::Fetch);
        assert_eq!(flights.start(PAGE, SearchId(2), holder(), || 2), Start::Wait(holder()));
        assert_eq!(flights.start(PAGE, SearchId(1), holder(), || 1), Start::Hedge);
        assert_eq!(flights.start(PAGE, SearchId(2), holder(), || 2), Start::Hedge);
        assert_eq!(flights.arrived(PAGE), [2]);
        assert!(flights.is_empty() && flights.arrived(PAGE).is_empty());
    }

    #[test]
    fn when_the_first_fails_the_second_goes_on() {
        let mut flights = Flights::default();
        flights.start(PAGE, SearchId(1), holder(), || 1);
        flights.start(PAGE, SearchId(2), holder(), || 2);
        assert!(flights.ended(PAGE, SearchId(2)).is_empty(), "it is not the second's");
        assert_eq!(flights.ended(PAGE, SearchId(1)), [2]);
        assert_eq!(flights.start(PAGE, SearchId(2), holder(), || 2), Start::Fetch);
        flights.start(PAGE, SearchId(3), holder(), || 3);
        flights.left(PAGE, SearchId(3));
        assert!(flights.arrived(PAGE).is_empty());
    }

    proptest! {
        /// Whatever happens, a page is fetched by one search at a time, and whoever waits is told exactly once, unless it left.
        #[test]
        fn one_fetches_and_all_others_hear_of_it(steps in prop::collection::vec((0u8..4, 0u64..4), 1..100)) {
            let mut flights = Flights::default();
            let (mut fetching, mut waiting) = (None, HashSet::new());
            for (step, n) in steps {
                let by = SearchId(n);
                let told = match step {
                    0 => {
                        match flights.start(PAGE, by, holder(), || n) {
                            Start::Fetch => prop_assert_eq!(fetching.replace(n), None),
                            Start::Wait(_) => prop_assert!(fetching.is_some() && waiting.insert(n)),
                            Start::Hedge => prop_assert!(fetching == Some(n) || waiting.contains(&n)),
                        }
                        continue;
                    }
                    1 => flights.arrived(PAGE),
                    2 if fetching == Some(n) => flights.ended(PAGE, by),
                    2 => {
                        prop_assert!(flights.ended(PAGE, by).is_empty());
                        continue;
                    }
                    _ => {
                        flights.left(PAGE, by);
                        waiting.remove(&n);
                        continue;
                    }
                };
                fetching = None;
                prop_assert_eq!(told.len(), waiting.len());
                prop_assert!(told.iter().all(|n| waiting.remove(n)));
            }
            prop_assert_eq!(flights.len(), usize::from(fetching.is_some()));
        }
    }
}
