//! The peers that one search asks, and what it has learnt of each.

use std::collections::HashMap;

use crate::{round_trip::RoundTrip, shard::MemberId};

/// A peer's number in a search.
pub(crate) type PeerNo = u16;

/// The peers that a search has to do with, by number.
#[derive(Debug, Default)]
pub(crate) struct Peers {
    pub(crate) members: Vec<MemberId>,
    numbers: HashMap<MemberId, PeerNo>,
    /// Owners that failed in this search, and holders that are asked last.
    pub(crate) bad_owner: Vec<bool>,
    /// Owners that take longer than owners do, here or in searches before: they are asked last.
    pub(crate) late_owner: Vec<bool>,
    pub(crate) doubted: Vec<bool>,
    /// How often each has answered as a holder, and whether it was given up as one.
    pub(crate) answers: Vec<u32>,
    pub(crate) silent: Vec<bool>,
    /// How long each takes to answer as a holder.
    pub(crate) round_trips: Vec<RoundTrip>,
}

impl Peers {
    /// `None` beyond 2^16 peers, which no site has.
    pub(crate) fn number(&mut self, member: MemberId) -> Option<PeerNo> {
        if let Some(number) = self.numbers.get(&member) {
            return Some(*number);
        }
        let number = PeerNo::try_from(self.members.len()).ok()?;
        self.members.push(member);
        self.bad_owner.push(false);
        self.late_owner.push(false);
        self.doubted.push(false);
        self.answers.push(0);
        self.silent.push(false);
        self.round_trips.push(RoundTrip::default());
        self.numbers.insert(member, number);
        Some(number)
    }
}
