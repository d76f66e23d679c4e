//! Waiting for a budget, in the order of asking.

use std::{
    sync::{Mutex, MutexGuard},
    time::Instant,
};

use crate::budget::Bucket;

/// A budget that several tasks share; without a bound nobody waits.
#[derive(Debug, Default)]
pub(crate) struct Budget(Option<Shared>);

#[derive(Debug)]
struct Shared {
    bucket: Mutex<Bucket>,
    /// Whoever waits holds this, so that the others wait behind: it is fair.
    turn: tokio::sync::Mutex<()>,
}

impl Shared {
    fn bucket(&self) -> MutexGuard<'_, Bucket> {
        self.bucket.lock().expect("nothing panics while it holds this lock")
    }
}

impl Budget {
    pub(crate) fn new(per_second: u64, burst: u64) -> Self {
        let bucket = Mutex::new(Bucket::new(per_second, burst, Instant::now()));
        Self(Some(Shared { bucket, turn: tokio::sync::Mutex::new(()) }))
    }

    /// Waits until `amount` may be used, and takes it. Safe to cancel: nothing is taken before it returns.
    pub(crate) async fn take(&self, amount: u64) {
        let Some(shared) = &self.0 else { return };
        let _turn = shared.turn.lock().await;
        loop {
            let wait = shared.bucket().wait(Instant::now());
            if wait.is_zero() {
                break;
            }
            tokio::time::sleep(wait).await;
        }
        shared.bucket().take(amount, Instant::now());
    }

    /// Says what work that was begun for `taken` has used in the end.
    pub(crate) fn settle(&self, taken: u64, used: u64) {
        let Some(shared) = &self.0 else { return };
        let (mut bucket, now) = (shared.bucket(), Instant::now());
        if used > taken {
            bucket.take(used - taken, now);
        } else {
            bucket.give_back(taken - used, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn without_a_bound_nobody_waits_and_whoever_gives_up_has_taken_nothing() {
        Budget::default().take(u64::MAX).await;
        let budget = Budget::new(1, 0);
        budget.take(1 << 40).await;
        let gave_up = tokio::time::timeout(std::time::Duration::from_millis(1), budget.take(1)).await;
        assert!(gave_up.is_err());
        // What was taken and not used is there again, for the next in turn.
        budget.settle(1 << 40, 0);
        budget.take(1).await;
    }
}
