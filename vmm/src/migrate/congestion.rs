//! CUBIC (RFC 9438) after a slow start that ends before the path's queue overflows: HyStart++ (RFC 9406).
//!
//! A migration is one long transfer that begins in slow start. Plain slow start ends by overflowing the queue: on 100 Mbit/s with
//! 50 ms and a queue of one bandwidth-delay product that loses 1.6 to 2.8 MB of 61 (measured; quinn's BBR lost 37), which crossed part
//! of the path for nothing and made everything behind it late.
//!
//! ```text
//!  slow start ──round trip grew by an eighth──► conservative slow start ──4 rounds──► CUBIC
//!   (window + acknowledged bytes)    ◄──round trip fell back──  (an eighth of that)     ▲
//!      └─────────────────────────────── loss ─────────────────────────────────────────┘
//! ```

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics, CubicConfig};
use quinn_proto::RttEstimator;

/// RFC 9406, 4.3: the bounds of what counts as growth of the round trip.
const MIN_RTT_THRESHOLD: Duration = Duration::from_millis(4);
const MAX_RTT_THRESHOLD: Duration = Duration::from_millis(16);
/// RFC 9406, 4.3: the samples that a round needs.
const RTT_SAMPLES: u32 = 8;
/// How much more slowly conservative slow start grows, and for how many rounds: 1.6 times in all. RFC 9406, 4.3, has 4 and 5, three
/// times in all, which overflows a queue of one bandwidth-delay product.
const CONSERVATIVE_DIVISOR: u64 = 8;
const CONSERVATIVE_ROUNDS: u32 = 4;
/// What CUBIC keeps of its window after a loss (RFC 9438, 4.6), in tenths.
const CUBIC_KEEPS_TENTHS: u64 = 7;

/// Builds the controller.
#[derive(Debug, Default)]
pub(super) struct GentleCubic {}

impl ControllerFactory for GentleCubic {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        let initial_window = Arc::new(CubicConfig::default()).build(now, current_mtu).initial_window();
        Box::new(Gentle {
            initial_window,
            mtu: current_mtu,
            phase: Phase::Start(SlowStart::new(now, initial_window)),
        })
    }
}

struct Gentle {
    initial_window: u64,
    mtu: u16,
    phase: Phase,
}

enum Phase {
    Start(SlowStart),
    Cubic(Box<dyn Controller>),
}

#[derive(Clone, Copy, Debug)]
struct SlowStart {
    window: u64,
    round: Round,
    /// The least round trip of the round before.
    last_least: Option<Duration>,
    conservative: Option<Conservative>,
}

/// The packets of one window, and their round trips.
#[derive(Clone, Copy, Debug)]
struct Round {
    began: Instant,
    least: Option<Duration>,
    samples: u32,
}

/// Conservative slow start.
#[derive(Clone, Copy, Debug)]
struct Conservative {
    /// The round trip that made it begin.
    baseline: Duration,
    rounds: u32,
}

impl Round {
    fn new(began: Instant) -> Self {
        Self { began, least: None, samples: 0 }
    }
}

impl SlowStart {
    fn new(now: Instant, window: u64) -> Self {
        Self { window, round: Round::new(now), last_least: None, conservative: None }
    }

    /// Packets were acknowledged; true when slow start is over.
    fn acknowledged(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool) -> bool {
        let mut over = false;
        if sent >= self.round.began {
            over = self.end_round();
            self.round = Round::new(now);
        }
        let sample = now.saturating_duration_since(sent);
        self.round.least = Some(self.round.least.map_or(sample, |least| least.min(sample)));
        self.round.samples += 1;
        if !app_limited {
            self.window += if self.conservative.is_some() { bytes / CONSERVATIVE_DIVISOR } else { bytes };
        }
        if self.round.samples >= RTT_SAMPLES {
            self.judge();
        }
        over
    }

    /// Looks whether the queue has begun to fill, or has not after all.
    fn judge(&mut self) {
        let (Some(least), Some(last)) = (self.round.least, self.last_least) else { return };
        match self.conservative {
            None if least >= last + (last / 8).clamp(MIN_RTT_THRESHOLD, MAX_RTT_THRESHOLD) => {
                self.conservative = Some(Conservative { baseline: least, rounds: 0 });
            }
            Some(Conservative { baseline, .. }) if least < baseline => self.conservative = None,
            None | Some(_) => {}
        }
    }

    fn end_round(&mut self) -> bool {
        // A round of too few samples says nothing.
        if self.round.samples >= RTT_SAMPLES {
            self.last_least = self.round.least;
        }
        match &mut self.conservative {
            Some(conservative) => {
                conservative.rounds += 1;
                conservative.rounds >= CONSERVATIVE_ROUNDS
            }
            None => false,
        }
    }
}

impl Gentle {
    /// CUBIC as it is after a loss at `window`.
    fn cubic_after_loss(&mut self, now: Instant, window: u64) {
        let mut config = CubicConfig::default();
        config.initial_window(window);
        let mut cubic = Arc::new(config).build(now, self.mtu);
        cubic.on_congestion_event(now, now, false, 0);
        self.phase = Phase::Cubic(cubic);
    }
}

impl Controller for Gentle {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        if let Phase::Cubic(cubic) = &mut self.phase {
            cubic.on_sent(now, bytes, last_packet_number);
        }
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        match &mut self.phase {
            Phase::Cubic(cubic) => cubic.on_ack(now, sent, bytes, app_limited, rtt),
            Phase::Start(start) => {
                if start.acknowledged(now, sent, bytes, app_limited) {
                    // The window stays, and CUBIC goes on as if it had come down to it: RFC 9406 sets ssthresh to the window.
                    let window = start.window * 10 / CUBIC_KEEPS_TENTHS;
                    self.cubic_after_loss(now, window);
                }
            }
        }
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        app_limited: bool,
        largest_packet_num_acked: Option<u64>,
    ) {
        if let Phase::Cubic(cubic) = &mut self.phase {
            cubic.on_end_acks(now, in_flight, app_limited, largest_packet_num_acked);
        }
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        match &mut self.phase {
            Phase::Cubic(cubic) => cubic.on_congestion_event(now, sent, is_persistent_congestion, lost_bytes),
            Phase::Start(start) => {
                let window = if is_persistent_congestion { self.initial_window } else { start.window };
                self.cubic_after_loss(now, window);
            }
        }
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.mtu = new_mtu;
        if let Phase::Cubic(cubic) = &mut self.phase {
            cubic.on_mtu_update(new_mtu);
        }
    }

    fn window(&self) -> u64 {
        match &self.phase {
            Phase::Start(start) => start.window,
            Phase::Cubic(cubic) => cubic.window(),
        }
    }

    fn metrics(&self) -> ControllerMetrics {
        match &self.phase {
            Phase::Start(start) => {
                let mut metrics = ControllerMetrics::default();
                metrics.congestion_window = start.window;
                metrics
            }
            Phase::Cubic(cubic) => cubic.metrics(),
        }
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        let phase = match &self.phase {
            Phase::Start(start) => Phase::Start(*start),
            Phase::Cubic(cubic) => Phase::Cubic(cubic.clone_box()),
        };
        Box::new(Self { initial_window: self.initial_window, mtu: self.mtu, phase })
    }

    fn initial_window(&self) -> u64 {
        self.initial_window
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Runs slow start over a path whose round trip depends on the window; gives the window at its end.
    fn run(round_trip: impl Fn(u32, u64) -> Duration) -> Option<u64> {
        let mut now = Instant::now();
        let mut start = SlowStart::new(now, 14_720);
        for round in 0..40 {
            let (sent, rtt) = (now, round_trip(round, start.window));
            now += rtt;
            for _ in 0..start.window / 1472 {
                if start.acknowledged(now, sent, 1472, false) {
                    return Some(start.window);
                }
            }
            // Packets that were sent before this round's first acknowledgement belong to the round before.
            now += MS / 10;
        }
        None
    }

    #[test]
    fn slow_start_ends_soon_after_the_queue_begins_to_fill() {
        // 100 Mbit/s and 50 ms: 625,000 bytes are under way before anything queues.
        let end =
            run(|_, window| 50 * MS + Duration::from_nanos(window.saturating_sub(625_000) * 80)).unwrap();
        assert!((625_000..2_500_000).contains(&end), "{end}");
    }

    #[test]
    fn one_late_round_does_not_end_it() {
        let end = run(|round, window| {
            let late = if round == 3 { 30 * MS } else { Duration::ZERO };
            50 * MS + late + Duration::from_nanos(window.saturating_sub(625_000) * 80)
        });
        assert!(end.unwrap() >= 625_000, "{end:?}");
    }
}
