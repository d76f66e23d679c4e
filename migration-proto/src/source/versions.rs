//! Versions of pages that the destination has and that the driver keeps, so that the next version can be sent as a delta.
//!
//! A version is kept when its literal is given out, within a budget of pages. Those of frames that are written again and again are worth
//! the most, so a version goes when a round has passed its frame by, never because a longer round comes than the budget holds: evicting by age
//! alone would then lose each version just before it is needed.
//!
//! A frame holds at the destination what was last sent there, until something else that was named for it comes. So a version serves as a
//! base when every name since was taken back (`Stale`), and no longer than that. If that is wrong for once, the destination's hash finds it out,
//! it asks again, and what is asked for again is sent plain: here, where the base of a literal is chosen, lies the end of that.

use std::collections::{BTreeMap, BTreeSet};

use page::{Gfn, PageHash, ShortId};

use super::Literal;

/// What is known of a kept version.
#[derive(Debug)]
struct Kept {
    name: PageHash,
    /// What the destination has if this one turns out not to have been sent.
    before: Option<PageHash>,
    /// The round that it was sent in.
    round: u32,
    /// The frame has been named anew, and that has been neither sent nor taken back.
    renamed: bool,
}

/// The kept versions. The driver has their bytes.
#[derive(Debug)]
pub(super) struct Versions {
    /// How many there may be.
    most: usize,
    kept: BTreeMap<Gfn, Kept>,
    ages: BTreeSet<(u32, Gfn)>,
    /// Frames whose version the driver is to drop.
    dropped: Vec<Gfn>,
}

impl Versions {
    pub(super) fn new(most: usize) -> Self {
        Self { most, kept: BTreeMap::new(), ages: BTreeSet::new(), dropped: Vec::new() }
    }

    /// The frame was given a name that it had not.
    pub(super) fn named(&mut self, gfn: Gfn) {
        let Some(kept) = self.kept.get_mut(&gfn) else { return };
        kept.before = None;
        if std::mem::replace(&mut kept.renamed, true) {
            // What it was named before has come there by another way.
            self.drop_version(gfn);
        }
    }

    /// The page could not be sent for this frame: it had changed.
    pub(super) fn stale(&mut self, gfn: Gfn, id: ShortId) {
        let Some(kept) = self.kept.get_mut(&gfn) else { return };
        kept.renamed = false;
        if kept.name.short() == id {
            match kept.before.take() {
                Some(before) => kept.name = before,
                None => self.drop_version(gfn),
            }
        }
    }

    /// The page is sent in `round`: against what, and whether the driver is to keep it.
    pub(super) fn send(&mut self, round: u32, gfn: Gfn, name: PageHash) -> Literal {
        if let Some(kept) = self.kept.get_mut(&gfn) {
            // What was sent before and is asked for again did not serve.
            let base = (kept.name != name).then_some(kept.name);
            self.ages.remove(&(kept.round, gfn));
            self.ages.insert((round, gfn));
            *kept = Kept { name, before: base, round, renamed: false };
            return Literal { gfn, name, base, keep: true };
        }
        let keep = self.has_room(round, gfn);
        if keep {
            self.kept.insert(gfn, Kept { name, before: None, round, renamed: false });
            self.ages.insert((round, gfn));
        }
        Literal { gfn, name, base: None, keep }
    }

    /// Makes room for a frame of `round`, if there is a version that this round has passed by or the one before did.
    fn has_room(&mut self, round: u32, gfn: Gfn) -> bool {
        if self.kept.len() < self.most {
            return true;
        }
        let passed = |(age, other): &(u32, Gfn)| *age < round && (*other < gfn || age + 1 < round);
        let Some((_, old)) = self.ages.first().copied().filter(passed) else { return false };
        self.drop_version(old);
        true
    }

    fn drop_version(&mut self, gfn: Gfn) {
        if let Some(kept) = self.kept.remove(&gfn) {
            self.ages.remove(&(kept.round, gfn));
            self.dropped.push(gfn);
        }
    }

    /// What was sent over a lost connection may not have come: it is no base.
    pub(super) fn forget(&mut self) {
        self.ages.clear();
        self.dropped.extend(std::mem::take(&mut self.kept).into_keys());
    }

    /// From here on nothing is sent as a delta.
    pub(super) fn end(&mut self) {
        self.most = 0;
        self.forget();
    }

    /// The frames whose version the driver is to drop.
    pub(super) fn take_dropped(&mut self) -> Vec<Gfn> {
        std::mem::take(&mut self.dropped)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name(n: u8) -> PageHash {
        PageHash([n; 32])
    }

    const HERE: Gfn = Gfn(7);

    /// Names the frame and sends that.
    fn moved(versions: &mut Versions, round: u32, gfn: Gfn, content: u8) -> Literal {
        versions.named(gfn);
        versions.send(round, gfn, name(content))
    }

    #[test]
    fn what_was_sent_is_the_base_of_what_comes_next() {
        let mut versions = Versions::new(4);
        let first = Literal { gfn: HERE, name: name(1), base: None, keep: true };
        assert_eq!(moved(&mut versions, 1, HERE, 1), first);
        assert_eq!(moved(&mut versions, 2, HERE, 2).base, Some(name(1)));
        assert_eq!(moved(&mut versions, 3, HERE, 3).base, Some(name(2)));
    }

    #[test]
    fn what_is_asked_for_again_is_sent_plain() {
        let mut versions = Versions::new(4);
        moved(&mut versions, 1, HERE, 1);
        assert_eq!(moved(&mut versions, 2, HERE, 2).base, Some(name(1)));
        assert_eq!(versions.send(2, HERE, name(2)).base, None);
        assert_eq!(versions.send(2, HERE, name(2)).base, None);
    }

    #[test]
    fn what_came_by_another_way_is_no_base_and_what_was_stale_changes_nothing() {
        let mut versions = Versions::new(4);
        moved(&mut versions, 1, HERE, 1);
        versions.named(HERE);
        versions.named(HERE);
        assert_eq!(versions.take_dropped(), [HERE], "the second page came from the site");
        assert_eq!(versions.send(3, HERE, name(3)).base, None);

        moved(&mut versions, 4, HERE, 4);
        versions.stale(HERE, name(4).short());
        assert_eq!(moved(&mut versions, 5, HERE, 5).base, Some(name(3)), "the fourth was never sent");
    }

    #[test]
    fn a_round_longer_than_the_budget_keeps_what_it_can_use() {
        let mut versions = Versions::new(10);
        for round in 1..5 {
            let content = u8::try_from(round).unwrap();
            let deltas =
                (0..100).filter(|gfn| moved(&mut versions, round, Gfn(*gfn), content).base.is_some());
            assert_eq!(deltas.count(), if round == 1 { 0 } else { 10 });
        }
        let other = (200..300).filter(|gfn| moved(&mut versions, 5, Gfn(*gfn), 5).keep);
        assert_eq!(other.count(), 10, "the round has passed all others by");
        assert_eq!(versions.take_dropped(), (0..10).map(Gfn).collect::<Vec<_>>());
    }

    proptest! {
        #[test]
        fn the_budget_holds_and_a_base_is_what_the_destination_has(
            most in 0usize..6,
            steps in prop::collection::vec((0u64..12, 0u8..4, 0u8..4), 0..300),
        ) {
            let mut versions = Versions::new(most);
            // What stands at the destination, and what the driver has kept.
            let (mut there, mut bytes) = (BTreeMap::new(), BTreeMap::new());
            for (at, (gfn, content, way)) in (0u32..).zip(steps) {
                let (gfn, round) = (Gfn(gfn), 1 + at / 12);
                // Each frame is named once a round, anew, and that comes by a literal, by another way, or not.
                let name = name(content + 4 * u8::try_from(at % 60).unwrap());
                versions.named(gfn);
                match way {
                    0 => versions.stale(gfn, name.short()),
                    1 => { there.insert(gfn, name); }
                    _ => {
                        let literal = versions.send(round, gfn, name);
                        for gone in versions.take_dropped() {
                            bytes.remove(&gone);
                        }
                        if let Some(base) = literal.base {
                            prop_assert_eq!(there.get(&gfn), Some(&base));
                            prop_assert_eq!(bytes.get(&gfn), Some(&base));
                        }
                        if way == 2 {
                            versions.stale(gfn, name.short());
                        } else {
                            there.insert(gfn, name);
                            if literal.keep { bytes.insert(gfn, name); }
                        }
                    }
                }
                for gone in versions.take_dropped() {
                    bytes.remove(&gone);
                }
                prop_assert!(bytes.len() <= most);
            }
            versions.end();
            prop_assert!(versions.take_dropped().len() >= bytes.len());
        }
    }
}
