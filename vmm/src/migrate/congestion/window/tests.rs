//! The window on a path of packets: a transmitter with a drop-tail queue, a delay, and losses by chance.

use std::collections::VecDeque;

use super::*;

const MTU: u64 = 1472;
const MS: Duration = Duration::from_millis(1);
/// Packets that QUIC sends at once, at the least.
const BURST: u64 = 10;

struct Path {
    bits: u64,
    rtt: Duration,
    /// Queue before the transmitter, bytes.
    queue: u64,
    /// Packets of a million that are lost by chance.
    loss_ppm: u64,
}

struct Outcome {
    /// Delivered bytes, of what the path could have carried from the beginning on.
    share: f64,
    /// The mean of the window's last half, of the bandwidth-delay product.
    window: f64,
    /// Share of the packets that found the queue full.
    dropped: f64,
}

impl Path {
    fn new(megabits: u64, rtt: Duration, loss_ppm: u64) -> Self {
        let bits = megabits * 1_000_000;
        Self { bits, rtt, queue: (product(bits / 8, rtt)).max(64 * 1024), loss_ppm }
    }

    /// A sender that always has something to send, paced as QUIC does it. Acknowledgements come back for every 16 packets or after 20 ms.
    fn run(&self, time: Duration) -> Outcome {
        let start = Instant::now();
        let mut window = Window::new(start, limits::FIRST_WINDOW_DATAGRAMS * MTU, MTU);
        let mut chance = 0x9e37_79b9_7f4a_7c15_u64;
        let (mut now, mut free_at) = (start, start);
        let (mut in_flight, mut delivered, mut sent_packets, mut dropped) = (0, 0u64, 0u64, 0u64);
        // When the sender hears of it, when it was sent, and whether it came.
        let mut heard: VecDeque<(Instant, Instant, bool)> = VecDeque::new();
        let mut batch: Vec<(Instant, bool)> = Vec::new();
        let (mut windows, mut judged) = (0u128, 0u128);
        let mut next_send = start;
        let mut batch_began = start;
        while now < start + time {
            while in_flight + MTU <= window.bytes && next_send <= now {
                chance ^= chance << 13;
                chance ^= chance >> 7;
                chance ^= chance << 17;
                sent_packets += 1;
                in_flight += MTU;
                let gap = u64::try_from(self.rtt.as_nanos()).unwrap() * MTU / window.bytes * 4 / 5;
                if sent_packets.is_multiple_of(BURST) {
                    let least = now.checked_sub(2 * MS).unwrap_or(now);
                    next_send = next_send.max(least) + Duration::from_nanos(BURST * gap);
                }
                let waiting = product(self.bits / 8, free_at.saturating_duration_since(now));
                let full = waiting + MTU > self.queue;
                let by_chance = chance % 1_000_000 < self.loss_ppm;
                dropped += u64::from(full);
                let arrives = if full || by_chance {
                    free_at.max(now) + self.rtt / 2
                } else {
                    free_at = free_at.max(now) + Duration::from_nanos(MTU * 8_000_000_000 / self.bits);
                    delivered += MTU;
                    free_at + self.rtt / 2
                };
                if batch.is_empty() {
                    batch_began = arrives;
                }
                batch.push((now, !(full || by_chance)));
                if batch.len() >= 16 || arrives > batch_began + 20 * MS {
                    heard.extend(batch.drain(..).map(|(sent, came)| (arrives + self.rtt / 2, sent, came)));
                }
            }
            let alarm = batch_began + 20 * MS + self.rtt / 2;
            if heard.is_empty() && !batch.is_empty() {
                heard.extend(batch.drain(..).map(|(sent, came)| (alarm, sent, came)));
            }
            let blocked = in_flight + MTU > window.bytes;
            let next =
                heard.front().map_or(next_send, |(at, ..)| if blocked { *at } else { next_send.min(*at) });
            now = now.max(next);
            while let Some((_, sent, came)) = heard.pop_front_if(|(at, ..)| *at <= now) {
                in_flight -= MTU;
                if came {
                    window.acknowledged(now, sent, MTU, false);
                } else {
                    window.lost(now, MTU, false);
                }
            }
            if now > start + time / 2 {
                windows += u128::from(window.bytes);
                judged += 1;
            }
        }
        let could = product(self.bits / 8, time) as f64;
        let bdp = product(self.bits / 8, self.rtt) as f64;
        Outcome {
            share: delivered as f64 / could,
            window: (windows / judged.max(1)) as f64 / bdp,
            dropped: dropped as f64 / sent_packets as f64,
        }
    }
}

#[test]
fn it_fills_links_from_slow_to_fast_with_and_without_loss() {
    for (megabits, rtt_ms) in
        [(10, 1), (10, 50), (10, 200), (100, 1), (100, 50), (100, 200), (1000, 1), (1000, 50), (1000, 200)]
    {
        for loss_ppm in [0, 5000] {
            let rtt = rtt_ms * MS;
            let time = (rtt * 60).clamp(Duration::from_secs(1), Duration::from_secs(6));
            let Outcome { share, window, dropped } = Path::new(megabits, rtt, loss_ppm).run(time);
            // The start takes some round trips.
            let floor = 0.95 - rtt.as_secs_f64() * 6.5 / time.as_secs_f64();
            println!(
                "{megabits} Mbit/s, {rtt_ms} ms, {loss_ppm} ppm: {share:.3} of the link, window {window:.2}, dropped {dropped:.4}"
            );
            assert!(
                share >= floor,
                "{megabits} Mbit/s, {rtt_ms} ms, {loss_ppm} ppm: {share:.3} of the link, at least {floor:.3}"
            );
        }
    }
}

#[test]
fn it_leaves_little_in_the_queue_and_drops_next_to_nothing() {
    let Outcome { window, dropped, .. } = Path::new(100, 50 * MS, 0).run(Duration::from_secs(8));
    assert!(window < 1.6, "{window:.2} bandwidth-delay products");
    assert!(dropped < 0.001, "{dropped:.4} of the packets");
}

#[test]
fn a_path_without_a_queue_is_not_flooded() {
    let path = Path { queue: 32 * MTU, ..Path::new(100, 50 * MS, 0) };
    let Outcome { share, dropped, .. } = path.run(Duration::from_secs(8));
    assert!(share > 0.8, "{share:.3} of the link");
    assert!(dropped < 0.05, "{dropped:.4} of the packets");
}

/// `count` rounds whose round trip is `rtt` of the window.
fn rounds(window: &mut Window, now: &mut Instant, count: u32, rtt: impl Fn(u64) -> Duration) {
    for _ in 0..count {
        let sent = *now;
        *now += rtt(window.bytes);
        for _ in 0..window.bytes / MTU {
            window.acknowledged(*now, sent, MTU, false);
        }
        *now += MS / 10;
    }
}

#[test]
fn a_delay_that_a_smaller_window_does_not_shorten_is_borne() {
    let mut now = Instant::now();
    let mut window = Window::new(now, 14_720, MTU);
    rounds(&mut window, &mut now, 1, |_| 10 * MS);
    window.phase = Phase::Steady(Steady::default());
    window.set(1_000_000);
    rounds(&mut window, &mut now, 40, |_| 30 * MS);
    assert!(window.bytes >= 400_000, "{}", window.bytes);
    assert!(window.room > room(10 * MS));
}

#[test]
fn acknowledgements_that_the_receiver_holds_back_are_not_a_queue() {
    let mut now = Instant::now();
    let mut window = Window::new(now, 32 * MTU, MTU);
    rounds(&mut window, &mut now, 1, |_| 200 * MS);
    rounds(&mut window, &mut now, 2, |_| 200 * MS + limits::MAX_ACK_DELAY);
    assert!(matches!(window.phase, Phase::Start { .. }), "{:?}", window.phase);
    assert!(window.bytes >= 60 * MTU, "{}", window.bytes);
}

#[test]
fn a_longer_path_is_found_out() {
    let mut now = Instant::now();
    let mut window = Window::new(now, 14_720, MTU);
    rounds(&mut window, &mut now, 1, |_| 10 * MS);
    window.phase = Phase::Steady(Steady::default());
    rounds(&mut window, &mut now, 400, |_| 80 * MS);
    assert_eq!(window.base, Some(80 * MS));
}

#[test]
fn nothing_grows_while_there_is_nothing_to_send() {
    let now = Instant::now();
    let mut window = Window::new(now, 14_720, MTU);
    for round in 0..50 {
        let sent = now + 10 * MS * round;
        (0..32).for_each(|_| window.acknowledged(sent + 10 * MS, sent, MTU, true));
    }
    assert!(window.bytes <= window.least(), "{}", window.bytes);
}

#[test]
fn after_a_break_it_starts_anew() {
    let now = Instant::now();
    let mut window = Window::new(now, 14_720, MTU);
    window.phase = Phase::Steady(Steady::default());
    window.set(1_000_000);
    window.lost(now, 100_000, true);
    assert_eq!(window.bytes, 14_720);
    assert!(matches!(window.phase, Phase::Start { .. }));
}
