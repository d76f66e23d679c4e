//! A bound on what a guest can make the monitor write to its log.

use std::sync::Mutex;
use std::time::Instant;

use crate::kvm::threads::lock;
use crate::limits::{LOG_BURST, LOG_PERIOD};

#[derive(Debug)]
struct Period {
    began: Instant,
    written: u32,
    dropped: u64,
}

/// Counts what is logged about one device.
#[derive(Debug, Default)]
pub(crate) struct Quiet(Mutex<Option<Period>>);

impl Quiet {
    /// Calls `write` with the number of messages that were dropped before this one, or drops this one as well.
    pub(crate) fn say(&self, write: impl FnOnce(u64)) {
        let now = Instant::now();
        let dropped = {
            let mut period = lock(&self.0);
            let fresh = period.as_ref().is_none_or(|p| now.duration_since(p.began) >= LOG_PERIOD);
            if fresh {
                let dropped = period.as_ref().map_or(0, |p| p.dropped);
                *period = Some(Period { began: now, written: 1, dropped: 0 });
                Some(dropped)
            } else {
                period.as_mut().and_then(|p| {
                    if p.written < LOG_BURST {
                        p.written += 1;
                        Some(0)
                    } else {
                        p.dropped += 1;
                        None
                    }
                })
            }
        };
        if let Some(dropped) = dropped {
            write(dropped);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_and_counted() {
        let quiet = Quiet::default();
        let mut said = 0;
        (0..1000).for_each(|_| quiet.say(|_| said += 1));
        assert_eq!(said, LOG_BURST);
        let earlier = Instant::now().checked_sub(LOG_PERIOD).unwrap();
        quiet.0.lock().unwrap().as_mut().unwrap().began = earlier;
        quiet.say(|dropped| assert_eq!(dropped, u64::from(1000 - LOG_BURST)));
    }
}
