//! Who served this host pages lately.
//!
//! A page that a VM waits for comes alone: nothing in its request says who holds the pages beside it. Where no owner keeps its name either, it is asked of
//! those who served most of what this host asked for lately, for it is likely to belong to the same VM. Pages lose half of their weight each
//! [`RECENT_HALF_LIFE`]. Pure: time comes in as `now`.

use std::time::Instant;

use crate::{
    limits::{RECENT_HALF_LIFE, RECENT_HOLDERS},
    shard::MemberId,
};

#[derive(Clone, Copy, Debug)]
struct Served {
    holder: MemberId,
    pages: u64,
    /// When `pages` last lost half of its weight.
    halved: Instant,
}

impl Served {
    /// What its pages weigh now, and since when.
    fn faded(&self, now: Instant) -> (u64, Instant) {
        let times = now.saturating_duration_since(self.halved).as_secs() / RECENT_HALF_LIFE.as_secs();
        let times = u32::try_from(times).unwrap_or(u32::MAX);
        let pages = self.pages.checked_shr(times).unwrap_or(0);
        (pages, if times > 0 { now } else { self.halved })
    }
}

/// The holders that served most of late.
#[derive(Debug, Default)]
pub struct RecentHolders {
    served: Vec<Served>,
}

impl RecentHolders {
    /// A holder served so many pages. Where there is no room it takes the place of the one that served least.
    pub fn note(&mut self, holder: MemberId, pages: u64, now: Instant) {
        if pages == 0 {
            return;
        }
        if let Some(served) = self.served.iter_mut().find(|served| served.holder == holder) {
            let (before, halved) = served.faded(now);
            (served.pages, served.halved) = (before.saturating_add(pages), halved);
            return;
        }
        if self.served.len() >= RECENT_HOLDERS {
            let least = (0..self.served.len()).min_by_key(|at| self.served[*at].faded(now).0);
            least.map(|at| self.served.swap_remove(at));
        }
        self.served.push(Served { holder, pages, halved: now });
    }

    /// Those that served something of late, the most useful first.
    #[must_use]
    pub fn best(&self, now: Instant) -> Vec<MemberId> {
        let weighed = self.served.iter().map(|served| (served.faded(now).0, served.holder));
        let mut weighed: Vec<_> = weighed.filter(|(pages, _)| *pages > 0).collect();
        weighed.sort_unstable_by_key(|(pages, holder)| (std::cmp::Reverse(*pages), *holder));
        weighed.into_iter().map(|(_, holder)| holder).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn member(n: usize) -> MemberId {
        MemberId::of_peer(&n.to_be_bytes())
    }

    #[test]
    fn the_most_useful_comes_first_and_is_forgotten_in_time() {
        let now = Instant::now();
        let mut recent = RecentHolders::default();
        recent.note(member(1), 100, now);
        recent.note(member(2), 60, now);
        assert_eq!(recent.best(now), [member(1), member(2)]);
        let later = now + RECENT_HALF_LIFE;
        recent.note(member(2), 30, later);
        assert_eq!(recent.best(later), [member(2), member(1)]);
        assert_eq!(recent.best(later + RECENT_HALF_LIFE * 7), [] as [MemberId; 0]);
        recent.note(member(3), 0, later);
        assert_eq!(recent.best(later).len(), 2);
    }

    proptest! {
        #[test]
        fn it_is_bounded_and_whoever_serves_most_stays(notes in prop::collection::vec((1usize..100, 1u64..50), 0..300)) {
            let now = Instant::now();
            let mut recent = RecentHolders::default();
            recent.note(member(0), 300 * 50, now);
            for (holder, pages) in notes {
                recent.note(member(holder), pages, now);
                let best = recent.best(now);
                prop_assert!(best.len() <= RECENT_HOLDERS && best.contains(&member(0)));
            }
        }
    }
}
