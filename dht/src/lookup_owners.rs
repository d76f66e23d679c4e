//! The part of a search that asks owners who holds what.

use std::time::Instant;

use page::ShortId;

use super::{Flight, FlightKind, Request, Search, Ticket};
use crate::{
    asked::PeerNo,
    limits::{
        LOOKUP_BATCH, LOOKUP_HEDGE_LEAST, LOOKUP_TIMEOUT, LOOKUP_TIMEOUT_PER_ID, LOOKUPS_IN_FLIGHT,
        LOOKUPS_IN_FLIGHT_MOST,
    },
    sample::Sampling,
    shard::{MemberId, ShardId},
    want::{At, Stage, Word},
};

impl Search {
    /// Queues a page at one of its owners that keeps its name, was not asked and has not failed, those that are late last. Returns whether there is one.
    fn ask_another(&mut self, at: At) -> bool {
        let id = self.ids[at as usize];
        let owners = &self.owners[ShardId::of(id).index()];
        let want = &mut self.wants[at as usize];
        // By bits that neither name the shard nor are zero in sampled names.
        let first = usize::from(id.0.to_be_bytes()[2]);
        let left = |place: &usize| {
            let (owner, sampling) = owners[*place];
            let asked = want.owners_asked & 1 << place != 0;
            !asked && !self.peers.bad_owner[usize::from(owner)] && sampling.keeps(id)
        };
        let late = |place: &usize| self.peers.late_owner[usize::from(owners[*place].0)];
        let in_turn = (0..owners.len()).map(|step| (first + step) % owners.len());
        let Some(place) = in_turn.filter(left).min_by_key(late) else { return false };
        want.owners_asked |= 1 << place;
        want.asking += 1;
        self.lookups.entry(owners[place].0).or_default().push_back(at);
        true
    }

    /// Asks the next owner about a page. If there is none and no answer is out, it is looked for beside others.
    pub(super) fn ask_next_owner(&mut self, at: At) {
        if !self.ask_another(at) && self.wants[at as usize].asking == 0 {
            self.end_lookup(at, Stage::Near);
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
        let want = &mut self.wants[at as usize];
        want.asking -= 1;
        let id = self.ids[at as usize];
        let owners = &self.owners[ShardId::of(id).index()];
        let keeps = owners.iter().any(|(other, sampling)| *other == owner && sampling.keeps(id));
        if want.known > 0 || want.found || keeps {
            self.end_lookup(at, Stage::Over);
        } else if want.stage == Stage::Owner {
            self.ask_next_owner(at);
        }
    }

    /// An owner named holders; those not worth asking are left out by the driver. `sampled` are its shards of which it does not keep every name.
    pub fn on_holders(
        &mut self,
        ticket: Ticket,
        holders: &[(ShortId, MemberId)],
        sampled: &[(ShardId, Sampling)],
        now: Instant,
    ) {
        let Some(flight) = self.flights.remove(&ticket) else { return };
        let owner = flight.peer;
        self.owners_take.measured(now.saturating_duration_since(flight.asked));
        self.peers.late_owner[usize::from(owner)] = false;
        for (shard, owners) in ShardId::all().zip(&mut self.owners) {
            for (_, keeps) in owners.iter_mut().filter(|(other, _)| *other == owner) {
                let said = sampled.iter().find(|(of, _)| *of == shard);
                *keeps = said.map_or(Sampling::ALL, |(_, sampling)| *sampling);
            }
        }
        self.note(holders.iter().copied(), Word::Owner(owner), &flight.wants);
        for at in flight.wants {
            self.answered(at, owner);
        }
        self.settle();
    }

    /// An owner that failed once is not asked again in this search: what it was asked, or was to be asked, the next owner is.
    pub(super) fn lookup_failed(&mut self, flight: Flight) {
        self.peers.bad_owner[usize::from(flight.peer)] = true;
        let queued = self.lookups.remove(&flight.peer).unwrap_or_default();
        for at in flight.wants.into_iter().chain(queued) {
            self.wants[at as usize].asking -= 1;
            if self.wants[at as usize].stage == Stage::Owner {
                self.ask_next_owner(at);
            }
        }
        self.settle();
    }

    /// An owner takes longer than owners do: what it was asked, or was to be asked, another owner is as well.
    pub(super) fn owner_is_late(&mut self, owner: PeerNo, wants: &[At]) {
        let number = usize::from(owner);
        if !self.peers.late_owner[number] {
            self.peers.late_owner[number] = true;
            self.told.push_back(Request::Late { owner: self.peers.members[number] });
        }
        for at in wants {
            if self.wants[*at as usize].stage == Stage::Owner {
                self.ask_another(*at);
            }
        }
        for at in self.lookups.remove(&owner).unwrap_or_default() {
            // It was not asked after all, and may be if nobody else can be.
            let owners = &self.owners[ShardId::of(self.ids[at as usize]).index()];
            let place = owners.iter().position(|(other, _)| *other == owner).unwrap_or_default();
            let want = &mut self.wants[at as usize];
            want.asking -= 1;
            want.owners_asked &= !(1 << place);
            self.ask_next_owner(at);
        }
    }

    /// How many owners may be asked at once. Those that are late do not count: while they are waited for the others are asked, and more of them the more
    /// are late.
    fn may_ask(&self) -> bool {
        let lookups = || self.flights.values().filter(|f| matches!(f.kind, FlightKind::Lookup));
        let late = lookups().filter(|flight| flight.hedge.is_none()).count();
        lookups().count() - late < (LOOKUPS_IN_FLIGHT + late).min(LOOKUPS_IN_FLIGHT_MOST)
    }

    pub(super) fn next_lookup(&mut self, now: Instant) -> Option<Request> {
        if !self.may_ask() {
            return None;
        }
        let (owner, wants) = loop {
            let (owner, wants) = self.next_batch()?;
            if !wants.is_empty() {
                break (owner, wants);
            }
        };
        let work = LOOKUP_TIMEOUT_PER_ID * u32::try_from(wants.len()).expect("a batch is bounded");
        let hedge = now + self.owners_take.slow_after().max(LOOKUP_HEDGE_LEAST) + work;
        let (kind, deadline) = (FlightKind::Lookup, now + LOOKUP_TIMEOUT + work);
        let flight = Flight { peer: owner, wants, asked: now, hedge: Some(hedge), deadline, kind };
        let (ticket, owner, ids) = self.fly(flight);
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
            // A holder may be known without asking, or another owner may have answered meanwhile.
            let want = &mut self.wants[at as usize];
            if want.known == 0 && want.stage == Stage::Owner {
                wants.push(at);
            } else {
                want.asking -= 1;
                self.end_lookup(at, Stage::Over);
            }
        }
        if !queue.is_empty() {
            self.lookups.insert(owner, queue);
        }
        self.settle();
        Some((owner, wants))
    }
}
