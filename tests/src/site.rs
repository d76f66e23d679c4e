//! A model site: what its peers hold, and all the ways in which they answer badly.

use page::ShortId;

use crate::palette::{CONTENTS, Content, Names};
use crate::rng::Rng;

/// How a site answers.
#[derive(Debug, Clone)]
pub(crate) struct Site {
    /// Whether it is in the same domain as the source's.
    pub(crate) shared: bool,
    /// Percent of contents that some peer holds.
    pub(crate) holds: u64,
    /// Percent of pages whose entry is stale: found in the index, gone at the holder.
    pub(crate) stale: u64,
    /// Percent of pages that come as another page.
    pub(crate) lies: u64,
    /// Percent of questions that are never answered.
    pub(crate) dead: u64,
    /// Percent of questions that are answered late, mostly after the deadline.
    pub(crate) late: u64,
    /// Percent of pages that come twice.
    pub(crate) twice: u64,
    /// Percent of answers in which what is missing is not said, or twice, or after the end, or of pages that come or were never asked for.
    pub(crate) misstates: u64,
    /// Microseconds that a page takes, at most.
    pub(crate) latency: u64,
}

/// Part of an answer, and how long after the question it comes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Part {
    /// `content` as the page for `id`.
    Page { id: ShortId, content: Content },
    /// Nobody has this one.
    Missing { id: ShortId },
    /// All is said.
    Done,
}

impl Site {
    pub(crate) fn good(rng: &mut Rng) -> Self {
        Self {
            shared: rng.chance(85),
            holds: rng.pick(&[0, 30, 70, 95, 100]),
            stale: 0,
            lies: 0,
            dead: 0,
            late: 0,
            twice: 0,
            misstates: 0,
            latency: rng.spread(100, 50_000),
        }
    }

    pub(crate) fn bad(rng: &mut Rng) -> Self {
        Self {
            shared: true,
            stale: rng.pick(&[0, 0, 10, 50]),
            lies: rng.pick(&[0, 0, 2, 20, 100]),
            dead: rng.pick(&[0, 0, 30, 100]),
            late: rng.pick(&[0, 0, 30, 100]),
            twice: rng.pick(&[0, 10]),
            misstates: rng.pick(&[0, 0, 30, 100]),
            latency: rng.spread(100, 2_000_000),
            ..Self::good(rng)
        }
    }

    fn holds(&self, content: Content) -> bool {
        // A content is held or not for the whole run, whoever asks.
        u64::from(content).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32 < (self.holds << 32) / 100
    }

    /// The parts of the answer to `ids`, with microseconds until each.
    pub(crate) fn answer(&self, rng: &mut Rng, names: &Names, ids: &[ShortId]) -> Vec<(u64, Part)> {
        if rng.chance(self.dead) {
            return Vec::new();
        }
        let held_up = if rng.chance(self.late) { rng.spread(100_000, 30_000_000) } else { 0 };
        let misstates = rng.chance(self.misstates);
        let mut parts = Vec::new();
        let mut last = held_up;
        for id in ids {
            let held = names.find(*id).filter(|content| self.holds(*content) && !rng.chance(self.stale));
            let mut says = usize::from(held.is_none());
            if misstates {
                says = rng.pick(&[0, 0, 1, 1, 2]);
            }
            for _ in 0..says {
                let at = held_up + rng.below(self.latency + 1);
                if !misstates {
                    last = last.max(at);
                }
                let other = misstates && rng.chance(10);
                let id = if other { names.name(any_content(rng)).short() } else { *id };
                parts.push((at, Part::Missing { id }));
            }
            let Some(content) = held else { continue };
            let lie = rng.chance(self.lies);
            let content = if lie { any_content(rng) } else { content };
            let copies = if rng.chance(self.twice) { 2 } else { 1 };
            for _ in 0..copies {
                let at = held_up + rng.below(self.latency + 1);
                last = last.max(at);
                parts.push((at, Part::Page { id: *id, content }));
            }
        }
        // The driver says that all is said when the last peer has answered.
        parts.push((last + rng.below(self.latency + 1), Part::Done));
        parts
    }
}

fn any_content(rng: &mut Rng) -> Content {
    Content::try_from(rng.below(u64::from(CONTENTS))).unwrap_or(0)
}
