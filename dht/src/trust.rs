//! Which holders keep what the index promises of them.
//!
//! A peer may announce names that it does not hold. Whoever asks it finds out: of the pages asked of it, it delivers few or none. Below a quarter
//! it is asked after all other holders, below a sixteenth it is left out for a while. Counts lose half of their weight
//! each [`TRUST_HALF_LIFE`], so that a busy VM's stale names, or those of one that just left, are forgotten again.
//!
//! Only what a holder said itself counts: a page asked of it on a guess, or because one owner passed its claim on to another, says nothing.
//! And since an owner may lie about what it was told, its word alone is not enough: counts are kept apart by who passed on the holder's word, and
//! all of them must agree, at least two, unless the holder told this peer itself.
//!
//! Pure: time comes in as `now`.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::{
    limits::{AVOID_FALSE, TRUST_ASKED, TRUST_HALF_LIFE, TRUST_HOLDERS, TRUST_WITNESSED},
    shard::MemberId,
};

/// By what a holder delivers of what it announced.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Verdict {
    /// Enough, or too little is known of it.
    Trusted,
    /// Less than a quarter: it is asked last.
    Doubted,
    /// Less than a sixteenth: it is not asked for a while.
    LeftOut,
}

/// What came of asking a holder for pages that it had announced.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Evidence {
    /// The holder.
    pub holder: MemberId,
    /// The owner by whose word the holder announced them; `None` if it told this peer itself.
    pub owner: Option<MemberId>,
    /// Pages asked of it.
    pub asked: u32,
    /// Of those, pages that it delivered.
    pub delivered: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
struct Tally {
    asked: u32,
    delivered: u32,
}

impl Tally {
    fn faded(self, times: u32) -> Self {
        let half = |count: u32| count.checked_shr(times).unwrap_or(0);
        Self { asked: half(self.asked), delivered: half(self.delivered) }
    }

    fn below(self, share: u64) -> bool {
        u64::from(self.delivered) * share < u64::from(self.asked)
    }
}

/// Owners whose word is counted apart; in a large site each stands for many, by a bit of their keys.
const WITNESSES: usize = 4;

#[derive(Debug)]
struct Record {
    /// When the tallies last lost half of their weight.
    halved: Instant,
    own: Tally,
    witnesses: Vec<(MemberId, Tally)>,
    left_out_until: Option<Instant>,
}

impl Record {
    fn new(now: Instant) -> Self {
        Self { halved: now, own: Tally::default(), witnesses: Vec::new(), left_out_until: None }
    }

    /// How often the tallies lose half of their weight between the last time and now.
    fn halvings(&self, now: Instant) -> u32 {
        let past = now.saturating_duration_since(self.halved);
        u32::try_from(past.as_secs() / TRUST_HALF_LIFE.as_secs()).unwrap_or(u32::MAX)
    }

    fn fade(&mut self, now: Instant) {
        let times = self.halvings(now);
        if times > 0 {
            self.halved = now;
            self.own = self.own.faded(times);
            self.witnesses.iter_mut().for_each(|(_, tally)| *tally = tally.faded(times));
        }
    }

    fn tally(&mut self, owner: Option<MemberId>) -> &mut Tally {
        let Some(owner) = owner else { return &mut self.own };
        let known = self.witnesses.iter().position(|(other, _)| *other == owner);
        let at = known.unwrap_or_else(|| {
            if self.witnesses.len() < WITNESSES {
                self.witnesses.push((owner, Tally::default()));
                self.witnesses.len() - 1
            } else {
                usize::from(owner.0[0]) % WITNESSES
            }
        });
        &mut self.witnesses[at].1
    }

    /// What the tallies come to now.
    fn ratio(&self, now: Instant) -> Verdict {
        let times = self.halvings(now);
        let seen = |tally: &Tally| tally.asked >= TRUST_WITNESSED;
        let witnesses = self.witnesses.iter().map(|(_, tally)| tally.faded(times));
        let tallies: Vec<Tally> = witnesses.filter(seen).collect();
        let own = Some(self.own.faded(times)).filter(seen);
        let enough = own.is_some() || tallies.len() >= 2;
        let all = || tallies.iter().copied().chain(own);
        if !enough || all().map(|tally| u64::from(tally.asked)).sum::<u64>() < u64::from(TRUST_ASKED) {
            Verdict::Trusted
        } else if all().all(|tally| tally.below(16)) {
            Verdict::LeftOut
        } else if all().all(|tally| tally.below(4)) {
            Verdict::Doubted
        } else {
            Verdict::Trusted
        }
    }
}

/// What is thought of all holders that were asked not long ago.
#[derive(Debug, Default)]
pub struct Trust {
    records: BTreeMap<MemberId, Record>,
}

impl Trust {
    /// Counts what came of a request. Returns what is thought of the holder if that has become worse.
    pub fn note(&mut self, evidence: Evidence, now: Instant) -> Option<Verdict> {
        let Evidence { holder, owner, asked, delivered } = evidence;
        if self.records.len() >= TRUST_HOLDERS && !self.records.contains_key(&holder) {
            self.records
                .retain(|_, record| now.saturating_duration_since(record.halved) < TRUST_HALF_LIFE * 4);
            if self.records.len() >= TRUST_HOLDERS {
                return None;
            }
        }
        let before = self.verdict(holder, now);
        let record = self.records.entry(holder).or_insert_with(|| Record::new(now));
        record.fade(now);
        let tally = record.tally(owner);
        tally.asked = tally.asked.saturating_add(asked);
        tally.delivered = tally.delivered.saturating_add(delivered.min(asked));
        if record.ratio(now) == Verdict::LeftOut {
            // After its time it has another chance, and starts anew.
            *record = Record { left_out_until: Some(now + AVOID_FALSE), ..Record::new(now) };
        }
        Some(self.verdict(holder, now)).filter(|after| *after > before)
    }

    /// What is thought of a holder.
    #[must_use]
    pub fn verdict(&self, holder: MemberId, now: Instant) -> Verdict {
        let Some(record) = self.records.get(&holder) else { return Verdict::Trusted };
        if record.left_out_until.is_some_and(|until| now < until) {
            return Verdict::LeftOut;
        }
        record.ratio(now)
    }

    /// The holders that are to be asked last.
    pub fn doubted(&self, now: Instant) -> impl Iterator<Item = MemberId> + '_ {
        self.records.keys().copied().filter(move |holder| self.verdict(*holder, now) == Verdict::Doubted)
    }

    /// For how long a holder is still left out.
    #[must_use]
    pub fn left_out_for(&self, holder: MemberId, now: Instant) -> Duration {
        let until = self.records.get(&holder).and_then(|record| record.left_out_until);
        until.map_or(Duration::ZERO, |until| until.saturating_duration_since(now))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn member(n: u8) -> MemberId {
        MemberId::of_peer(&[n])
    }

    fn evidence(owner: Option<u8>, asked: u32, delivered: u32) -> Evidence {
        Evidence { holder: member(1), owner: owner.map(member), asked, delivered }
    }

    #[test]
    fn one_that_announces_falsely_is_left_out_for_a_while_and_has_another_chance() {
        let now = Instant::now();
        let mut trust = Trust::default();
        for _ in 0..TRUST_ASKED / 64 - 1 {
            assert_eq!(trust.note(evidence(None, 64, 0), now), None);
        }
        assert_eq!(trust.note(evidence(None, 64, 1), now), Some(Verdict::LeftOut));
        assert_eq!(trust.left_out_for(member(1), now), AVOID_FALSE);
        assert_eq!(trust.verdict(member(1), now + AVOID_FALSE), Verdict::Trusted);
        trust.note(evidence(None, TRUST_ASKED, TRUST_ASKED / 5), now + AVOID_FALSE);
        assert_eq!(trust.verdict(member(1), now + AVOID_FALSE), Verdict::Doubted);
        assert_eq!(trust.doubted(now + AVOID_FALSE).collect::<Vec<_>>(), [member(1)]);
        assert_eq!(
            trust.doubted(now + AVOID_FALSE + TRUST_HALF_LIFE).count(),
            0,
            "doubt fades without asking"
        );
    }

    #[test]
    fn stale_pages_of_a_busy_vm_are_forgiven() {
        let mut now = Instant::now();
        let mut trust = Trust::default();
        // A third is still there of what was asked; and once a minute a hundred were all gone.
        for n in 0..100 {
            trust.note(evidence(None, 90, 30), now);
            assert_eq!(trust.verdict(member(1), now), Verdict::Trusted, "{n}");
        }
        let mut trust = Trust::default();
        for _ in 0..100 {
            trust.note(evidence(None, 100, 0), now);
            assert_eq!(trust.verdict(member(1), now), Verdict::Trusted);
            now += TRUST_HALF_LIFE;
        }
    }

    #[test]
    fn the_records_are_bounded_and_old_ones_give_way() {
        let now = Instant::now();
        let mut trust = Trust::default();
        let holder = |n: usize| MemberId::of_peer(&n.to_be_bytes());
        for n in 0..TRUST_HOLDERS + 10 {
            trust.note(Evidence { holder: holder(n), ..evidence(None, 1, 1) }, now);
        }
        assert_eq!(trust.records.len(), TRUST_HOLDERS);
        trust.note(Evidence { holder: holder(0), ..evidence(None, 1, 1) }, now + TRUST_HALF_LIFE * 5);
        trust.note(
            Evidence { holder: holder(TRUST_HOLDERS), ..evidence(None, 1, 1) },
            now + TRUST_HALF_LIFE * 5,
        );
        assert_eq!(trust.records.len(), 2);
    }

    proptest! {
        /// A lying owner names an honest holder for pages that it never announced, as often as it likes.
        #[test]
        fn no_single_owner_puts_a_holder_in_doubt(
            asks in prop::collection::vec((0u8..4, 1u32..200), 1..200),
            liar in 0u8..4,
        ) {
            let now = Instant::now();
            let mut trust = Trust::default();
            for (owner, asked) in asks {
                trust.note(evidence(Some(owner), asked, if owner == liar { 0 } else { asked }), now);
                prop_assert_eq!(trust.verdict(member(1), now), Verdict::Trusted);
            }
        }

        #[test]
        fn one_that_delivers_nothing_is_found_out_by_the_word_of_any_two_owners(owners in 2u8..50) {
            let now = Instant::now();
            let mut trust = Trust::default();
            for n in 0..TRUST_ASKED {
                trust.note(evidence(Some(u8::try_from(n % u32::from(owners)).unwrap()), 2, 0), now);
            }
            prop_assert_eq!(trust.verdict(member(1), now), Verdict::LeftOut);
        }
    }
}
