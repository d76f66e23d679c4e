//! The threads that scan. They have the lowest priority, so that VMs come first, and they keep to the CPU budget, which is counted
//! in the CPU time that they themselves have used.

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use rustix::time::{ClockId, clock_gettime};
use tokio::sync::{mpsc, oneshot};

use crate::{
    limits::{CPU_BURST_DIVISOR, NICEST, RESCAN_PERCENT, SCAN_COST_FIRST, SCAN_THREADS},
    pace::Budget,
};

type Job = Box<dyn FnOnce() + Send>;

/// Whether work is urgent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Urgency {
    /// The first scan of a content: until it is done the content is of no use.
    First,
    /// A look at what is indexed already.
    Again,
}

/// A host's scanning threads.
#[derive(Debug)]
pub(crate) struct Workers {
    jobs: mpsc::Sender<Job>,
    threads: usize,
    first: Arc<Budget>,
    again: Arc<Budget>,
    /// What a piece of work cost last, in nanoseconds: what the next one is expected to cost.
    cost_ns: Arc<AtomicU64>,
}

/// A share of one core as nanoseconds of CPU time a second.
fn share(percent: u32) -> Arc<Budget> {
    let per_second = u64::from(percent) * 10_000_000;
    Arc::new(Budget::new(per_second, per_second / CPU_BURST_DIVISOR))
}

impl Workers {
    /// Starts the threads. With a budget, in percent of one core, all scanning shares it; without one, first scans take what is idle and
    /// later ones share a tenth of a core.
    pub(crate) fn start(budget: Option<u32>) -> io::Result<Self> {
        let threads = thread::available_parallelism().map_or(1, usize::from).min(SCAN_THREADS);
        let (jobs, receiver) = mpsc::channel::<Job>(threads);
        let receiver = Arc::new(Mutex::new(receiver));
        for number in 0..threads {
            let receiver = Arc::clone(&receiver);
            thread::Builder::new().name(format!("scan-{number}")).spawn(move || work(&receiver))?;
        }
        let again = share(budget.unwrap_or(RESCAN_PERCENT));
        let first = if budget.is_some() { Arc::clone(&again) } else { Arc::default() };
        let cost_ns = Arc::new(AtomicU64::new(SCAN_COST_FIRST.as_nanos().try_into().unwrap_or(u64::MAX)));
        Ok(Self { jobs, threads, first, again, cost_ns })
    }

    /// How many pieces of work can be under way at once.
    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    /// Runs a piece of work when the budget and a thread allow it.
    ///
    /// # Panics
    /// If the work does.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        urgency: Urgency,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        let budget = match urgency {
            Urgency::First => Arc::clone(&self.first),
            Urgency::Again => Arc::clone(&self.again),
        };
        let expected = self.cost_ns.load(Ordering::Relaxed);
        budget.take(expected).await;
        let (cost_ns, (done, result)) = (Arc::clone(&self.cost_ns), oneshot::channel());
        let job = move || {
            let before = thread_cpu_ns();
            let value = work();
            let used = thread_cpu_ns().saturating_sub(before);
            cost_ns.store(used, Ordering::Relaxed);
            budget.settle(expected, used);
            // Whoever asked may have gone, its content with it.
            let _ = done.send(value);
        };
        self.jobs.send(Box::new(job)).await.expect("the threads wait for as long as there are senders");
        result.await.expect("a scanning thread does not panic")
    }
}

/// CPU time of the calling thread.
fn thread_cpu_ns() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let part = |value: i64| u64::try_from(value).unwrap_or(0);
    part(time.tv_sec) * 1_000_000_000 + part(time.tv_nsec)
}

fn work(jobs: &Mutex<mpsc::Receiver<Job>>) {
    // On Linux this is the calling thread's own priority.
    if let Err(error) = rustix::process::setpriority_process(None, NICEST) {
        tracing::warn!(%error, "scans run at the usual priority");
    }
    loop {
        let job = jobs.lock().expect("nothing panics while it holds this lock").blocking_recv();
        match job {
            Some(job) => job(),
            None => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_runs_at_the_lowest_priority_and_its_cpu_time_is_counted() {
        let workers = Workers::start(Some(1000)).unwrap();
        let spin = || {
            let start = thread_cpu_ns();
            while thread_cpu_ns() - start < 1_000_000 {}
            rustix::process::getpriority_process(None).unwrap()
        };
        assert_eq!(workers.run(Urgency::First, spin).await, NICEST);
        assert!(workers.cost_ns.load(Ordering::Relaxed) >= 1_000_000);
    }
}
