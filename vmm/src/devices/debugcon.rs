//! The debug console at port 0xe9, as QEMU's isa-debugcon: a byte written there is a heartbeat.

use std::sync::Mutex;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use super::{Effect, PortDevice};
use crate::kvm::threads::lock;
use crate::machine::Heartbeat;

/// The port, and what a read from it gives, by which guests find it.
pub(crate) const PORT: u16 = 0xe9;
const PRESENT: u8 = 0xe9;

#[derive(Debug, Default)]
struct Beats {
    seen: Heartbeat,
    last: Option<Instant>,
}

/// Counts and times the bytes that the guest writes.
#[derive(Debug, Default)]
pub(crate) struct DebugConsole(Mutex<Beats>);

impl DebugConsole {
    /// What came so far.
    pub(crate) fn heartbeat(&self) -> Heartbeat {
        lock(&self.0).seen
    }
}

impl PortDevice for DebugConsole {
    fn read(&self, _offset: u16, data: &mut [u8]) {
        data[0] = PRESENT;
    }

    fn write(&self, _offset: u16, data: &[u8]) -> Effect {
        let (now, wall) = (Instant::now(), SystemTime::now());
        let unix_ns =
            wall.duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX));
        let mut beats = lock(&self.0);
        let beats = &mut *beats;
        let gap = beats.last.map_or(0, |last| u64::try_from((now - last).as_nanos()).unwrap_or(u64::MAX));
        beats.seen.longest_gap_ns = beats.seen.longest_gap_ns.max(gap);
        if beats.seen.count == 0 {
            beats.seen.first_unix_ns = unix_ns;
        }
        beats.seen.count += data.len() as u64;
        beats.seen.last_unix_ns = unix_ns;
        beats.last = Some(now);
        Effect::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beats_are_counted_and_timed() {
        let console = DebugConsole::default();
        assert_eq!(console.heartbeat(), Heartbeat::default());
        console.write(0, b"a");
        let one = console.heartbeat();
        assert_eq!((one.count, one.longest_gap_ns, one.first_unix_ns), (1, 0, one.last_unix_ns));
        console.write(0, b"b");
        let two = console.heartbeat();
        assert_eq!(two.count, 2);
        assert!(two.first_unix_ns > 0 && two.last_unix_ns >= two.first_unix_ns);
    }
}
