//! One direction of a link, as a pure state machine: a transmitter of finite rate with a drop-tail queue before it, and a delay
//! behind it. It reads no clock: `now` is the time since any fixed instant, and must not go back.

use std::collections::VecDeque;
use std::time::Duration;

/// IPv4 and UDP headers of a datagram, bytes: what a link carries beyond the payload (RFC 791, RFC 768).
pub const HEADER_BYTES: u64 = 28;

/// What a link is like, one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkConfig {
    /// Bits a second, headers included; above 0.
    pub rate_bps: u64,
    /// From the end of a datagram's transmission to its arrival.
    pub delay: Duration,
    /// Bytes that may wait before the transmitter, the one in transmission included.
    pub queue_bytes: u64,
    /// Datagrams of a million that are lost by chance.
    pub loss_ppm: u32,
    /// Chooses which.
    pub seed: u64,
}

impl LinkConfig {
    /// The smallest queue of a link, bytes.
    const MIN_QUEUE_BYTES: u64 = 64 * 1024;

    /// Half of a symmetric path: `rtt` is split evenly; the queue holds one bandwidth-delay product of the whole path.
    pub fn half_of(rate_bps: u64, rtt: Duration) -> Self {
        let product = u128::from(rate_bps) * rtt.as_nanos() / 8_000_000_000;
        let queue_bytes = u64::try_from(product).unwrap_or(u64::MAX).max(Self::MIN_QUEUE_BYTES);
        Self { rate_bps, delay: rtt / 2, queue_bytes, loss_ppm: 0, seed: 0 }
    }
}

/// What passed and what did not; bytes include [`HEADER_BYTES`] a datagram.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkCounts {
    /// Datagrams put onto the link.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Datagrams that found the queue full, or that chance took before they were transmitted.
    pub dropped_packets: u64,
    /// Their bytes.
    pub dropped_bytes: u64,
}

impl LinkCounts {
    /// What came after these were `earlier`.
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            packets: self.packets - earlier.packets,
            bytes: self.bytes - earlier.bytes,
            dropped_packets: self.dropped_packets - earlier.dropped_packets,
            dropped_bytes: self.dropped_bytes - earlier.dropped_bytes,
        }
    }
}

/// One direction of a link that carries items of type `T`.
#[derive(Debug)]
pub struct Link<T> {
    config: LinkConfig,
    /// When the transmitter will have sent all that it accepted.
    free_at: Duration,
    /// What rounding to nanoseconds has left out so far, in nanosecond-bits; below `rate_bps`.
    remainder: u128,
    in_flight: VecDeque<(Duration, T)>,
    chance: Chance,
    counts: LinkCounts,
}

/// Random numbers that a seed decides: `SplitMix64`.
#[derive(Debug)]
struct Chance(u64);

impl Chance {
    /// True in `ppm` of a million cases.
    fn takes(&mut self, ppm: u32) -> bool {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % 1_000_000 < u64::from(ppm)
    }
}

impl<T> Link<T> {
    /// An idle link.
    pub fn new(config: LinkConfig) -> Self {
        Self {
            config,
            free_at: Duration::ZERO,
            remainder: 0,
            in_flight: VecDeque::new(),
            chance: Chance(config.seed),
            counts: LinkCounts::default(),
        }
    }

    /// Offers a datagram of `payload_bytes`; says whether the link took it (false: dropped, the queue is full, or by chance).
    pub fn offer(&mut self, now: Duration, payload_bytes: u64, item: T) -> bool {
        let bytes = payload_bytes + HEADER_BYTES;
        let rate = u128::from(self.config.rate_bps);
        let waiting = self.free_at.saturating_sub(now).as_nanos() * rate / 8_000_000_000;
        let full = waiting + u128::from(bytes) > u128::from(self.config.queue_bytes);
        if full || self.chance.takes(self.config.loss_ppm) {
            self.counts.dropped_packets += 1;
            self.counts.dropped_bytes += bytes;
            return false;
        }
        if self.free_at < now {
            self.free_at = now;
            self.remainder = 0;
        }
        let nanosecond_bits = u128::from(bytes) * 8_000_000_000 + self.remainder;
        self.remainder = nanosecond_bits % rate;
        self.free_at += Duration::from_nanos(u64::try_from(nanosecond_bits / rate).unwrap_or(u64::MAX));
        self.in_flight.push_back((self.free_at + self.config.delay, item));
        self.counts.packets += 1;
        self.counts.bytes += bytes;
        true
    }

    /// When the next datagram arrives at the far end.
    pub fn next_arrival(&self) -> Option<Duration> {
        self.in_flight.front().map(|(at, _)| *at)
    }

    /// Takes the next datagram that has arrived by `now`.
    pub fn take_arrived(&mut self, now: Duration) -> Option<T> {
        self.in_flight.pop_front_if(|(at, _)| *at <= now).map(|(_, item)| item)
    }

    /// What passed so far.
    pub fn counts(&self) -> LinkCounts {
        self.counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Keeps the queue of `link` full for `time` and gives the bytes that arrived in it.
    fn saturate(config: LinkConfig, payload: u64, time: Duration) -> u64 {
        let mut link = Link::new(config);
        let (mut now, mut arrived) = (Duration::ZERO, 0);
        while now < time {
            while link.offer(now, payload, ()) {}
            now = link.next_arrival().unwrap();
            while link.take_arrived(now).is_some() {
                arrived += payload + HEADER_BYTES;
            }
        }
        arrived
    }

    #[test]
    fn a_saturated_link_carries_its_rate() {
        for (rate_bps, rtt_ms, payload) in [
            (100_000_000, 50, 1452),
            (1_000_000_000, 1, 1200),
            (1_000_000_000, 200, 1452),
            (9_999_991, 7, 333),
        ] {
            let config = LinkConfig::half_of(rate_bps, rtt_ms * MS);
            let time = Duration::from_secs(4);
            let expected = u128::from(rate_bps) * (time - config.delay).as_nanos() / 8_000_000_000;
            let arrived = u128::from(saturate(config, payload, time));
            let slack = 2 * u128::from(payload + HEADER_BYTES);
            assert!(arrived.abs_diff(expected) <= slack, "{rate_bps}: {arrived} against {expected}");
        }
    }

    #[test]
    fn a_lone_datagram_takes_its_transmission_and_the_delay() {
        let mut link = Link::new(LinkConfig::half_of(8_000_000, 50 * MS));
        assert!(link.offer(3 * MS, 1000 - HEADER_BYTES, 'a'));
        let at = (3 + 1 + 25) * MS;
        assert_eq!(link.next_arrival(), Some(at));
        assert_eq!(link.take_arrived(at - Duration::from_nanos(1)), None);
        assert_eq!(link.take_arrived(at), Some('a'));
        assert_eq!(link.next_arrival(), None);
    }

    #[test]
    fn what_exceeds_the_queue_is_dropped_and_counted_apart() {
        let config = LinkConfig { rate_bps: 8_000_000, delay: MS, queue_bytes: 10_000, loss_ppm: 0, seed: 0 };
        let mut link = Link::new(config);
        let taken = (0..15).filter(|n| link.offer(Duration::ZERO, 1000 - HEADER_BYTES, *n)).count();
        assert_eq!(taken, 10);
        let full = LinkCounts { packets: 10, bytes: 10_000, dropped_packets: 5, dropped_bytes: 5000 };
        assert_eq!(link.counts(), full);
        // A millisecond later one datagram has left: there is room for exactly one more.
        assert!(link.offer(MS, 1000 - HEADER_BYTES, 15));
        assert!(!link.offer(MS, 1000 - HEADER_BYTES, 16));
        let order: Vec<_> = std::iter::from_fn(|| link.take_arrived(Duration::from_secs(1))).collect();
        assert_eq!(order, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 15]);
    }

    #[test]
    fn chance_takes_its_share_and_the_seed_says_which() {
        let taken = |seed| {
            let config = LinkConfig { loss_ppm: 5000, seed, ..LinkConfig::half_of(8_000_000_000, MS) };
            let mut link = Link::new(config);
            (0..20_000).map(|n| link.offer(n * MS, 1000, ())).collect::<Vec<_>>()
        };
        let lost = taken(1).into_iter().filter(|taken| !taken).count();
        assert!((60..140).contains(&lost), "{lost} of 20000 lost");
        assert_eq!(taken(1), taken(1));
        assert_ne!(taken(1), taken(2));
    }

    #[test]
    fn the_queue_is_a_bandwidth_delay_product_and_never_tiny() {
        let at = |rate, rtt_ms| LinkConfig::half_of(rate, rtt_ms * MS).queue_bytes;
        assert_eq!(at(100_000_000, 50), 625_000);
        assert_eq!(at(1_000_000, 1), 64 * 1024);
    }
}
