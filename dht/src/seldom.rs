//! Says something of each of a few once, and then seldom: what others can cause again and again must not fill the log. Pure.

use std::{collections::BTreeMap, time::Instant};

use crate::limits::{SAID, SAY_AGAIN};

/// Of whom it was said, and when.
#[derive(Debug)]
pub(crate) struct Seldom<K>(BTreeMap<K, Instant>);

impl<K> Default for Seldom<K> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<K: Ord + Clone> Seldom<K> {
    /// Whether it is to be said now; what was said longest ago is forgotten when there are too many.
    pub(crate) fn say(&mut self, of: K, now: Instant) -> bool {
        let lately = |said: &Instant| now.saturating_duration_since(*said) < SAY_AGAIN;
        if self.0.get(&of).is_some_and(lately) {
            return false;
        }
        self.0.insert(of, now);
        if self.0.len() > SAID {
            let oldest = self.0.iter().min_by_key(|(_, said)| **said).map(|(of, _)| of.clone());
            oldest.and_then(|oldest| self.0.remove(&oldest));
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn it_is_said_once_of_each_and_again_after_a_while() {
        let (mut seldom, now) = (Seldom::default(), Instant::now());
        assert!(seldom.say(1, now) && seldom.say(2, now) && !seldom.say(1, now));
        assert!(!seldom.say(1, now + SAY_AGAIN / 2));
        assert!(seldom.say(1, now + SAY_AGAIN));
        for n in 0..SAID {
            assert!(seldom.say(10 + n, now + SAY_AGAIN + Duration::from_secs(1)));
        }
        assert_eq!(seldom.0.len(), SAID);
    }
}
