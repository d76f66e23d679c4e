//! Congestion control for one long transfer: the window follows the queue that it makes, and not single losses.
//!
//! A migration is to fill its link from the first round trips to the last, over paths that lose packets at random, and its last act is the one
//! that must not be late. CUBIC does neither: one packet in 200 lost at random holds it far below the link's rate, and where nothing is lost it
//! grows until the queue overflows (docs/adr/0008-congestion-control.md). So the window is what the path delivers in its round trip and a little more, the
//! room, which stands in the queue:
//!
//! ```text
//!  window = rate x (round trip without a queue + room) + what the receiver has not acknowledged yet
//!
//!  Start ──the round trip grew, or much was lost──► Settle ──a round──► Steady ◄──10 s without an empty queue──► Look
//! ```
//!
//! While the link is not full, the rate follows the window and both grow, the faster where no queue shows; once it is, the rate stands still and so does the window. A loss counts only where more
//! is lost than chance would: then the queue is too short for the room. Where a smaller window makes for a lower rate, the delay was not this
//! connection's queue, and more room is taken. The round trip without a queue is the least one seen; every ten seconds in which none was as short, the window
//! is small for two rounds, so that it shows again.
//!
//! [`Window`] is the state machine; it is told the time. QUIC paces what the window allows, at 1.25 windows a round trip.

use std::time::{Duration, Instant};

use super::limits;

/// How much the round trip grows before Start believes in a queue: an eighth, within these bounds (RFC 9406, 4.3, has them for slow start).
const START_MIN_GROWTH: Duration = Duration::from_millis(4);
/// See [`START_MIN_GROWTH`].
const START_MAX_GROWTH: Duration = Duration::from_millis(16);
/// Samples of the round trip that a judgement needs: the last of each so many packets is acknowledged at once, the others may wait.
const SAMPLES: u32 = 2 * limits::ACK_EVERY_DATAGRAMS;
/// Glances in a row that must see a queue, for one may have been held up.
const START_GLANCES: u32 = 2;
/// The room: a quarter of the round trip, within these bounds. The lower covers for late threads.
const MIN_ROOM: Duration = Duration::from_millis(3);
/// See [`MIN_ROOM`].
const MAX_ROOM: Duration = Duration::from_millis(25);
/// The most delay of others that is borne.
const MAX_BORNE: Duration = Duration::from_millis(100);
/// A round lasts no shorter than this, once the window is known.
const MIN_ROUND: Duration = Duration::from_millis(5);
/// For so long a round trip is taken for the path's without having been seen again.
const RENEW: Duration = Duration::from_secs(10);
/// What chance loses: a fiftieth, and so many packets.
const CHANCE_DIVISOR: u64 = 50;
/// See [`CHANCE_DIVISOR`].
const CHANCE_PACKETS: u64 = 4;
/// Rounds whose greatest rate counts: one may have been held up.
const RATES: usize = 4;
/// Of so many rounds without a queue, one tries a larger window.
const STEP_ROUNDS: u32 = 3;

/// The window, and what it is judged by.
#[derive(Clone, Debug)]
pub(super) struct Window {
    initial: u64,
    mtu: u64,
    bytes: u64,
    phase: Phase,
    round: Round,
    glance: Glance,
    /// The round trip without a queue, and when it was last seen.
    base: Option<Duration>,
    seen: Instant,
    room: Duration,
    /// Of the last rounds, bytes a second.
    rates: [u64; RATES],
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    /// Doubles the window every round trip. `best`: the greatest rate of a round, bytes a second.
    Start { best: u64 },
    /// The window was too large: it stands for `rounds` more, and the last of them tells the rate.
    Settle { rounds: u32 },
    /// Follows the rate.
    Steady(Steady),
    /// Looks at the path without a queue, for `rounds` more; then the window is `back` again.
    Look { rounds: u32, back: u64 },
}

#[derive(Clone, Copy, Debug, Default)]
struct Steady {
    /// Rounds until what was lost was sent with this window.
    settling: u32,
    /// Rounds since the window was made much smaller: what was in flight then keeps new packets back.
    calm: u32,
    /// Rounds in a row that showed next to no queue.
    empty: u32,
    /// The window of the round before: what is acknowledged now was sent with it.
    before: u64,
    /// The greatest window that paid, and the rate it made.
    paid: (u64, u64),
}

/// The packets of one window.
#[derive(Clone, Copy, Debug)]
struct Round {
    began: Instant,
    least: Option<Duration>,
    samples: u32,
    acked: u64,
    lost: u64,
    /// Of `acked`, what was sent when there was no more to send.
    limited: u64,
}

/// A short while of Start, an eighth of a round trip: a round that began before the queue did would show it a round trip later, and its rate is that of a smaller window.
#[derive(Clone, Copy, Debug)]
struct Glance {
    began: Instant,
    least: Option<Duration>,
    samples: u32,
    acked: u64,
    /// When the one before began, and what was acknowledged in it.
    before: (Instant, u64),
    /// Glances in a row before this one that saw a queue.
    queued: u32,
}

impl Glance {
    fn new(began: Instant) -> Self {
        Self { began, least: None, samples: 0, acked: 0, before: (began, 0), queued: 0 }
    }

    /// The next one, and the rate of this one and the one before together: what was held up in one comes in the other.
    fn over(&self, now: Instant, queue: bool) -> (Self, u64) {
        let (began, acked) = self.before;
        let rate = Round { acked: acked + self.acked, ..Round::new(began) }.rate(now);
        let queued = if queue { self.queued + 1 } else { 0 };
        (Self { before: (self.began, self.acked), queued, ..Self::new(now) }, rate)
    }
}

impl Round {
    fn new(began: Instant) -> Self {
        Self { began, least: None, samples: 0, acked: 0, lost: 0, limited: 0 }
    }

    /// Bytes a second that were acknowledged.
    fn rate(&self, now: Instant) -> u64 {
        let micros = now.saturating_duration_since(self.began).as_micros().max(1);
        u64::try_from(u128::from(self.acked) * 1_000_000 / micros).unwrap_or(u64::MAX)
    }
}

/// What is to stand in the queue of such a path.
fn room(base: Duration) -> Duration {
    (base / 4).clamp(MIN_ROOM, MAX_ROOM)
}

/// What flows in `time` at `rate` bytes a second.
fn product(rate: u64, time: Duration) -> u64 {
    u64::try_from(u128::from(rate) * time.as_micros() / 1_000_000).unwrap_or(u64::MAX)
}

/// `value` times `by` over `of`.
fn scaled(value: u64, by: u64, of: u64) -> u64 {
    u64::try_from(u128::from(value) * u128::from(by) / u128::from(of).max(1)).unwrap_or(u64::MAX)
}

impl Window {
    pub(super) fn new(now: Instant, initial: u64, mtu: u64) -> Self {
        Self {
            initial,
            mtu,
            bytes: initial,
            phase: Phase::Start { best: 0 },
            round: Round::new(now),
            glance: Glance::new(now),
            base: None,
            seen: now,
            room: MIN_ROOM,
            rates: [0; RATES],
        }
    }

    /// What the receiver may have and not have acknowledged.
    fn unacknowledged(&self) -> u64 {
        u64::from(limits::ACK_EVERY_DATAGRAMS) * self.mtu
    }

    /// What is always allowed: the next packets must be on their way while an acknowledgement is waited for.
    fn least(&self) -> u64 {
        2 * self.unacknowledged()
    }

    /// How much later than its round trip a packet may be acknowledged at this rate: the receiver waits for more of them.
    fn held_back(&self, rate: u64) -> Duration {
        let waits = product(rate, limits::MAX_ACK_DELAY) < 2 * self.unacknowledged();
        if waits { limits::MAX_ACK_DELAY } else { Duration::ZERO }
    }

    /// The window for a rate.
    fn fitting(&self, rate: u64, base: Duration) -> u64 {
        product(rate, base + self.room) + self.unacknowledged()
    }

    /// Bytes that may be in flight.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What it was at first.
    pub(super) fn initial(&self) -> u64 {
        self.initial
    }

    /// What the largest packet carries has changed.
    pub(super) fn set_mtu(&mut self, mtu: u64) {
        self.mtu = mtu;
    }

    fn set(&mut self, bytes: u64) {
        self.bytes = bytes.clamp(self.least(), limits::WINDOW_MAX_BYTES);
    }

    /// A packet was acknowledged.
    pub(super) fn acknowledged(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool) {
        let sample = now.saturating_duration_since(sent);
        if self.base.is_none_or(|base| sample <= base + base / 16) {
            self.base = Some(self.base.map_or(sample, |base| base.min(sample)));
            self.seen = now;
        }
        let starts = matches!(self.phase, Phase::Start { .. });
        let long_enough = starts || now.saturating_duration_since(self.round.began) >= MIN_ROUND;
        if sent >= self.round.began && long_enough && self.round.samples >= SAMPLES {
            self.end_round(now);
            self.round = Round::new(now);
        }
        self.round.least = Some(self.round.least.map_or(sample, |least| least.min(sample)));
        self.round.samples += 1;
        self.glance.least = Some(self.glance.least.map_or(sample, |least| least.min(sample)));
        self.glance.samples += 1;
        self.glance.acked += bytes;
        self.round.acked += bytes;
        if app_limited {
            self.round.limited += bytes;
        } else if let Phase::Start { best } = self.phase {
            self.grow(best, bytes);
        }
        self.look_for_a_queue(now);
    }

    /// `acked` bytes were acknowledged in Start. The window runs ahead of the rate by a round, and by no more: a queue of one bandwidth-delay product takes what is
    /// too much before that shows.
    fn grow(&mut self, best: u64, acked: u64) {
        let ahead = 2 * product(best, self.base.unwrap_or_default());
        if best == 0 || self.bytes < ahead.max(self.least()) {
            self.bytes = (self.bytes + acked).min(limits::WINDOW_MAX_BYTES);
        }
    }

    /// Packets were lost.
    pub(super) fn lost(&mut self, now: Instant, bytes: u64, persistent: bool) {
        if persistent {
            *self = Self { base: self.base, ..Self::new(now, self.initial, self.mtu) };
            return;
        }
        self.round.lost += bytes;
        self.look_for_a_queue(now);
    }

    /// Whether more was lost in this round than chance loses.
    fn lost_much(&self) -> bool {
        self.round.lost > (self.round.acked + self.round.lost) / CHANCE_DIVISOR + CHANCE_PACKETS * self.mtu
    }

    /// Start ends within a round: at its end the window would be twice as large.
    fn look_for_a_queue(&mut self, now: Instant) {
        let (Phase::Start { best }, Some(base)) = (self.phase, self.base) else { return };
        let mut best = best;
        if self.glance.samples >= SAMPLES && now.saturating_duration_since(self.glance.began) >= base / 8 {
            let grown = base + (base / 8).clamp(START_MIN_GROWTH, START_MAX_GROWTH) + self.held_back(best);
            let queue = self.glance.least.is_some_and(|least| least >= grown);
            let (next, rate) = self.glance.over(now, queue);
            self.glance = next;
            best = best.max(rate);
            self.phase = Phase::Start { best };
        }
        if self.glance.queued >= START_GLANCES || self.lost_much() {
            self.set(self.bytes.min(product(best, base) / 2 * 3));
            self.room = room(base);
            self.phase = Phase::Settle { rounds: 2 };
        }
    }

    fn end_round(&mut self, now: Instant) {
        let (Some(base), Some(least)) = (self.base, self.round.least) else { return };
        let rate = self.round.rate(now);
        let limited = self.round.limited > self.round.acked / 4;
        tracing::trace!(phase = ?self.phase, window = self.bytes, round = ?self.round, rate, ?base, room = ?self.room, "a round");
        if !limited {
            self.rates.rotate_right(1);
            self.rates[0] = rate;
        }
        match self.phase {
            Phase::Start { .. } => {}
            Phase::Settle { rounds } if rounds > 1 => self.phase = Phase::Settle { rounds: rounds - 1 },
            Phase::Settle { .. } => {
                self.room = room(base);
                self.rates = [rate; RATES];
                if !limited {
                    self.set(self.bytes.min(self.fitting(rate, base)));
                }
                self.phase = Phase::Steady(Steady { settling: 2, before: self.bytes, ..Steady::default() });
            }
            Phase::Look { rounds, back } if rounds > 1 => {
                self.phase = Phase::Look { rounds: rounds - 1, back };
            }
            Phase::Look { back, .. } => {
                self.base = Some(least);
                self.seen = now;
                self.set(back);
                self.phase = Phase::Steady(Steady::default());
            }
            Phase::Steady(_) if limited => {}
            Phase::Steady(steady) => {
                self.phase = Phase::Steady(self.follow(steady, base, least, rate));
                if now.saturating_duration_since(self.seen) >= RENEW {
                    let back = self.bytes;
                    self.set(product(rate, base).min(back) / 4 * 3);
                    self.phase = Phase::Look { rounds: 2, back };
                }
            }
        }
    }

    /// A round of Steady is over.
    fn follow(&mut self, mut steady: Steady, base: Duration, least: Duration, rate: u64) -> Steady {
        let most = room(base);
        let (window, made) = steady.paid;
        let used = std::mem::replace(&mut steady.before, self.bytes);
        if used >= window || rate >= made / 16 * 15 {
            steady.paid = (used, rate);
        } else if steady.calm >= 2
            && used < window / 4 * 3
            && rate < made / 2 + scaled(made, used, window) / 2
        {
            // A full link's rate would have stayed: it was not this connection's queue that took the time.
            let borne = Duration::from_micros(scaled(1_000_000, used, rate)).saturating_sub(base);
            self.room = (borne + most).clamp(self.room, MAX_BORNE.max(self.room));
            steady.paid = (used, rate);
        }
        if steady.settling > 0 {
            steady.settling -= 1;
        } else if self.lost_much() {
            self.room /= 2;
            steady.settling = 1;
        } else if self.room < most {
            self.room = (self.room + most / 128).min(most);
        } else {
            self.room -= (self.room - most) / 64;
        }
        let best = self.rates.into_iter().max().unwrap_or(rate);
        let mut wanted = self.fitting(best, base);
        // Where much was lost not long ago, a queue that does not show says nothing.
        let shows_no_queue = least < base + most / 4 + self.held_back(rate) && self.room >= most;
        steady.empty = if shows_no_queue { steady.empty + 1 } else { 0 };
        if steady.empty > 0 {
            // The sender's own delays make the rate look lower than it is. A step takes two rounds to show.
            let tried =
                if steady.empty.is_multiple_of(STEP_ROUNDS) { self.bytes / 4 * 5 } else { self.bytes };
            wanted = wanted.max(tried.min(wanted / 2 * 3));
        }
        self.set(wanted);
        steady.calm = if self.bytes < used / 8 * 7 { 0 } else { steady.calm + 1 };
        steady
    }
}

#[cfg(test)]
mod tests;
