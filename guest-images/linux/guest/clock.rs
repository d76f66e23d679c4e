//! Looks at the guest's clocks: none may go back, no timer may fire early.

use std::fs;
use std::io;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use crate::status::{Options, Status};

/// Between two looks. Each is also the test of a timer: the sleep must not end before its time.
const PAUSE: Duration = Duration::from_millis(50);
/// Readings in a row at each look: clocks of several CPUs that differ are found when the scheduler moves the process.
const BURST: u32 = 1000;

pub(crate) fn run(_: &Options) -> io::Result<()> {
    let mut status = Status::of("clock")?;
    let mut monotonic = Instant::now();
    let mut real = SystemTime::now();
    let mut uptime = uptime_centis()?;
    let mut longest = Duration::ZERO;
    loop {
        let before = Instant::now();
        thread::sleep(PAUSE);
        let now = Instant::now();
        match now.checked_duration_since(monotonic) {
            Some(step) => longest = longest.max(step),
            None => status.fail(format!("CLOCK_MONOTONIC went back by {:?}", monotonic - now)),
        }
        if now.saturating_duration_since(before) < PAUSE {
            status.fail(format!("a sleep of {PAUSE:?} took {:?}", now.saturating_duration_since(before)));
        }
        monotonic = burst(now, &mut status);
        let read = SystemTime::now();
        if let Err(error) = read.duration_since(real) {
            status.fail(format!("CLOCK_REALTIME went back by {:?}", error.duration()));
        }
        real = read;
        let read = uptime_centis()?;
        if read < uptime {
            status.fail(format!("/proc/uptime went back from {uptime} to {read} hundredths of a second"));
        }
        uptime = read;
        let longest_us = u64::try_from(longest.as_micros()).unwrap_or(u64::MAX);
        status.round(&[("longest_step_us", longest_us), ("uptime_centis", uptime)])?;
    }
}

/// Reads the clock many times in a row; the last reading.
fn burst(first: Instant, status: &mut Status) -> Instant {
    let mut last = first;
    for _ in 0..BURST {
        let now = Instant::now();
        if now.checked_duration_since(last).is_none() {
            status.fail(format!("CLOCK_MONOTONIC went back by {:?} between two readings", last - now));
        }
        last = now;
    }
    last
}

/// The first number of /proc/uptime, in hundredths of a second.
pub(crate) fn uptime_centis() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/uptime")?;
    centis(&text).ok_or_else(|| io::Error::other(format!("/proc/uptime says {text:?}")))
}

fn centis(text: &str) -> Option<u64> {
    let (seconds, rest) = text.split_once('.')?;
    let hundredths = rest.get(..2)?;
    Some(seconds.parse::<u64>().ok()? * 100 + hundredths.parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uptime_is_read_in_hundredths() {
        assert_eq!(centis("12.34 20.00\n"), Some(1234));
        assert_eq!(centis("0.05 0.00\n"), Some(5));
        assert_eq!(centis("soon"), None);
    }
}
