//! zstd's level for literals, by what the link and the host's processors leave: a level that costs more is worth it while batches wait for the link
//! and cores are idle, and one that costs less where batches come slower than the link takes them.
//!
//! The guest's virtual CPUs are not to be robbed: without an idle core the level is no more than the usual one. What each level brings on real
//! guest memory stands in docs/adr/0007-deltas-and-levels.md.

use migration_proto::limits::{LITERAL_WINDOW_BATCHES, LITERAL_ZSTD_LEVEL};

/// The levels, cheapest first. Between them there is nothing that is worth its CPU time.
const LEVELS: [i32; 5] = [1, 3, 6, 9, 15];
/// From here on a batch keeps a core busy for tens of milliseconds: one at once, whatever is idle, so that a guest which begins to work finds its cores.
const DEAR: i32 = 15;
/// Where a migration begins.
const USUAL: usize = 1;
const _: () = assert!(LEVELS[USUAL] == LITERAL_ZSTD_LEVEL && LEVELS[LEVELS.len() - 1] == DEAR);

/// A level is raised after so many measurements in a row in which every batch found others waiting.
const CALM: u32 = 3;
/// Below the usual level only on links that carry so much, bytes a second: a slower one that waits has a host with no time for it, and its bytes are dear.
const FAST_BYTES_PER_S: u64 = 25_000_000;
/// Idle cores without which no level above the usual one is taken.
const SPARE_CORES: f64 = 0.75;

/// Chooses the level.
#[derive(Debug)]
pub struct LevelControl {
    at: usize,
    /// Measurements in a row for which the link was the bottleneck.
    calm: u32,
    /// Since the last measurement: batches that found others waiting for the link, and those that the link had waited for.
    behind_link: u32,
    behind_workers: u32,
    batches: u32,
}

impl Default for LevelControl {
    fn default() -> Self {
        Self { at: USUAL, calm: 0, behind_link: 0, behind_workers: 0, batches: 0 }
    }
}

impl LevelControl {
    /// For the next batch.
    #[must_use]
    pub fn level(&self) -> i32 {
        LEVELS[self.at]
    }

    /// A batch is encoded. `waiting`: those before it that the link has not taken; `encoding`: those that workers have yet to finish.
    pub fn batch(&mut self, waiting: usize, encoding: usize) {
        self.batches += 1;
        self.behind_link += u32::from(waiting >= LITERAL_WINDOW_BATCHES / 2);
        // With little to encode the link may as well wait for the destination's wants.
        self.behind_workers += u32::from(waiting == 0 && encoding >= LITERAL_WINDOW_BATCHES / 2);
    }

    /// Time for a decision; `idle_cores`: since the last one, if that is known. `link`: what it carries, bytes a second.
    pub fn measured(&mut self, idle_cores: Option<f64>, link: u64) {
        let (batches, behind, workers) = (self.batches, self.behind_link, self.behind_workers);
        let least = if link >= FAST_BYTES_PER_S { 0 } else { USUAL };
        (self.batches, self.behind_link, self.behind_workers) = (0, 0, 0);
        let spare = idle_cores.is_some_and(|cores| cores >= SPARE_CORES);
        if workers > 0 {
            self.calm = 0;
            self.at = self.at.saturating_sub(1).max(least.min(self.at));
        } else if !spare && self.at > USUAL {
            self.calm = 0;
            self.at -= 1;
        } else if batches > 0 && behind == batches && (spare || self.at < USUAL) {
            self.calm += 1;
            if self.calm >= CALM && self.at + 1 < LEVELS.len() {
                self.calm = 0;
                self.at += 1;
            }
        } else if batches > 0 {
            self.calm = 0;
        }
    }
}

/// How many cores of the host were idle between two looks at `/proc/stat` (proc(5)).
#[derive(Debug, Default)]
pub struct IdleCores {
    /// Ticks of all cores, and idle ones among them, at the last look.
    before: Option<(u64, u64)>,
}

impl IdleCores {
    /// Looks, given what `/proc/stat` says now.
    pub fn look(&mut self, stat: &str) -> Option<f64> {
        let line = stat.lines().next()?.strip_prefix("cpu ")?;
        // user, nice, system, idle, iowait, irq, softirq, steal; guest time is within user.
        let ticks: Vec<u64> = line.split_whitespace().take(8).map_while(|word| word.parse().ok()).collect();
        let now = (ticks.iter().sum::<u64>(), ticks.get(3..5)?.iter().sum::<u64>());
        let (all, idle) = self.before.replace(now)?;
        let (all, idle) = (now.0.checked_sub(all)?, now.1.checked_sub(idle)?);
        #[expect(clippy::cast_precision_loss, reason = "ticks of a hundred milliseconds")]
        let share = (all > 0).then(|| idle as f64 / all as f64)?;
        #[expect(clippy::cast_precision_loss, reason = "cores are few")]
        let cores = stat.lines().skip(1).take_while(|line| line.starts_with("cpu")).count() as f64;
        Some(share * cores)
    }
}

/// The controller, fed by the driver.
#[derive(Debug, Default)]
pub struct Levels {
    control: LevelControl,
    idle: IdleCores,
    encoding: usize,
}

impl Levels {
    /// A batch goes to the workers: at this level.
    pub fn begin(&mut self) -> i32 {
        self.encoding += 1;
        match self.control.level() {
            DEAR if self.encoding > 1 => LEVELS[LEVELS.len() - 2],
            level => level,
        }
    }

    /// A batch is encoded, and so many before it wait for the link.
    pub fn encoded(&mut self, waiting: usize) {
        self.encoding = self.encoding.saturating_sub(1);
        self.control.batch(waiting, self.encoding);
    }

    /// Looks at the host's processors and decides.
    pub fn measure(&mut self, link_bytes_per_s: u64) {
        let before = self.control.level();
        // Where it cannot be read no core counts as idle.
        let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
        self.control.measured(self.idle.look(&stat), link_bytes_per_s);
        if self.control.level() != before {
            tracing::debug!(before, now = self.control.level(), "zstd's level for literals");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: usize = LITERAL_WINDOW_BATCHES;

    fn ticks(
        control: &mut LevelControl,
        count: u32,
        waiting: usize,
        encoding: usize,
        idle: Option<f64>,
    ) -> i32 {
        for _ in 0..count {
            control.batch(waiting, encoding);
            control.measured(idle, 100_000_000);
        }
        control.level()
    }

    #[test]
    fn a_slow_link_with_idle_cores_gets_the_best_level_and_no_better() {
        let mut control = LevelControl::default();
        assert_eq!(control.level(), 3);
        assert_eq!(ticks(&mut control, CALM, WINDOW - 1, 1, Some(1.5)), 6);
        assert_eq!(ticks(&mut control, 100, WINDOW - 1, 1, Some(1.5)), 15);
    }

    #[test]
    fn workers_that_cannot_keep_up_bring_it_down_at_once() {
        let mut control = LevelControl::default();
        ticks(&mut control, 100, WINDOW - 1, 1, Some(1.5));
        assert_eq!(ticks(&mut control, 1, 0, WINDOW - 1, Some(1.5)), 9);
        assert_eq!(ticks(&mut control, 9, 0, WINDOW - 1, Some(0.0)), 1);
        assert_eq!(ticks(&mut control, 100, WINDOW - 1, 1, Some(0.0)), 3, "the usual level robs nobody");
    }

    #[test]
    fn a_slow_link_never_gets_less_than_the_usual_level() {
        let mut control = LevelControl::default();
        for _ in 0..100 {
            control.batch(0, WINDOW - 1);
            control.measured(Some(0.0), 12_500_000);
        }
        assert_eq!(control.level(), 3);
    }

    #[test]
    fn busy_cores_keep_it_at_the_usual_level() {
        let mut control = LevelControl::default();
        assert_eq!(ticks(&mut control, 100, WINDOW - 1, 1, Some(0.2)), 3);
        assert_eq!(ticks(&mut control, 100, WINDOW - 1, 1, None), 3);
        ticks(&mut control, 100, WINDOW - 1, 1, Some(2.0));
        assert_eq!(ticks(&mut control, 3, WINDOW - 1, 1, Some(0.2)), 3, "the guest has begun to work");
    }

    #[test]
    fn the_dearest_level_is_for_one_batch_at_once() {
        let mut levels = Levels::default();
        ticks(&mut levels.control, 100, WINDOW - 1, 1, Some(1.5));
        assert_eq!([levels.begin(), levels.begin()], [15, 9]);
        levels.encoded(0);
        levels.encoded(0);
        assert_eq!(levels.begin(), 15);
    }

    #[test]
    fn a_link_that_waits_for_wants_says_nothing() {
        let mut control = LevelControl::default();
        assert_eq!(ticks(&mut control, 100, 0, 0, Some(2.0)), 3);
        for _ in 0..100 {
            control.measured(Some(2.0), 100_000_000);
        }
        assert_eq!(control.level(), 3);
    }

    #[test]
    fn idle_cores_are_read_from_the_first_line() {
        let mut idle = IdleCores::default();
        let stat = |all: &str| format!("cpu  {all}\ncpu0 1 2\ncpu1 1 2\ncpu2 1 2\ncpu3 1 2\nintr 7\n");
        assert_eq!(idle.look(&stat("100 0 100 700 100 0 0 0 50 0")), None, "nothing to compare with");
        assert_eq!(idle.look(&stat("150 0 100 740 110 0 0 0 60 0")), Some(2.0));
        assert_eq!(idle.look("intr 5"), None);
        assert_eq!(idle.look(&stat("150 0 100 740 110 0 0 0")), None, "no time has passed");
        assert_eq!(idle.look(&stat("1 0 0 0")), None, "too short");
    }
}
