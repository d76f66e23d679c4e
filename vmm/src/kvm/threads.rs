//! The threads that virtual CPUs run on: one each, parked or running together.
//!
//! ```text
//! parked ──run──► running ──park──► parked        (either) ──quit──► gone
//!                    └── power-off, failure ──► gone, and the others with it
//! ```
//! A kick is `immediate_exit` set, then a signal: KVM_RUN, whether the thread is before it, in it or after it, completes
//! pending I/O and returns EINTR, and only there does a thread look at what is wanted of it. So a parked virtual CPU has
//! nothing pending, and its state can be saved.
//!
//! Throttled, all of them run for a slice and then rest together, by a kick as well, for so long that they run for the rest of the percentage. Who parks them
//! need not wait for the end of a rest.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::signal::{Killable as _, SIGRTMIN, register_signal_handler, unblock_signal};

use super::run_page::RunPage;
use super::vcpu::{Turn, Vcpu};
use super::{KvmError, call};
use crate::devices::Devices;
use crate::limits;
use crate::memory::Memory;

/// What is wanted of the threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Park,
    Run,
    Quit,
}

/// Why the threads ended without having been told to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The guest asked for power-off or reset.
    PowerOff,
    /// The guest or KVM failed.
    Failed(String),
}

#[derive(Debug)]
struct Gate {
    wanted: Wanted,
    running: usize,
    /// Percent of the time that they rest; 0 for none.
    throttle: u8,
    /// They rest until then.
    rest_until: Option<Instant>,
}

struct Shared {
    gate: Mutex<Gate>,
    changed: Condvar,
    pages: Vec<Arc<RunPage>>,
    devices: Arc<Devices>,
    memory: Arc<Memory>,
    on_end: Box<dyn Fn(End) + Send + Sync>,
    handles: Mutex<Vec<JoinHandle<()>>>,
    /// The thread that has them rest, while they are throttled.
    throttler: Mutex<Option<JoinHandle<()>>>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("gate", &self.gate).finish_non_exhaustive()
    }
}

/// A panic in a virtual CPU's thread has been reported by then; what the lock guards are plain values.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The virtual CPUs of a machine with their threads.
#[derive(Debug)]
pub(crate) struct Threads {
    vcpus: Vec<Arc<Mutex<Vcpu>>>,
    shared: Arc<Shared>,
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // Its arrival alone is what ends KVM_RUN.
}

impl Threads {
    /// Starts the threads, parked. `on_end` is called on the thread that saw the end, before the others are told.
    pub(crate) fn start(
        vcpus: Vec<Vcpu>,
        devices: Arc<Devices>,
        memory: Arc<Memory>,
        on_end: impl Fn(End) + Send + Sync + 'static,
    ) -> Result<Self, KvmError> {
        register_signal_handler(SIGRTMIN(), on_kick).map_err(call("sigaction"))?;
        let shared = Arc::new(Shared {
            gate: Mutex::new(Gate { wanted: Wanted::Park, running: 0, throttle: 0, rest_until: None }),
            changed: Condvar::new(),
            pages: vcpus.iter().map(|v| Arc::clone(v.page())).collect(),
            devices,
            memory,
            on_end: Box::new(on_end),
            handles: Mutex::new(Vec::new()),
            throttler: Mutex::new(None),
        });
        let threads = Self { vcpus: vcpus.into_iter().map(|v| Arc::new(Mutex::new(v))).collect(), shared };
        for (index, vcpu) in threads.vcpus.iter().enumerate() {
            let (vcpu, shared) = (Arc::clone(vcpu), Arc::clone(&threads.shared));
            let spawned = std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || shared.serve(index, &vcpu))
                .map_err(|source| KvmError::Call { call: "the creation of a thread", source })?;
            lock(&threads.shared.handles).push(spawned);
        }
        Ok(threads)
    }

    /// Lets them run.
    pub(crate) fn run(&self) {
        let mut gate = lock(&self.shared.gate);
        if gate.wanted == Wanted::Park {
            gate.wanted = Wanted::Run;
            self.shared.changed.notify_all();
        }
    }

    /// Returns when all are parked or gone.
    pub(crate) fn park(&self) {
        {
            let mut gate = lock(&self.shared.gate);
            if gate.wanted == Wanted::Run {
                gate.wanted = Wanted::Park;
                // One that rests does not wait for a kick.
                self.shared.changed.notify_all();
            }
        }
        self.shared.kick();
        let gate = lock(&self.shared.gate);
        drop(
            self.shared
                .changed
                .wait_while(gate, |gate| gate.running > 0)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }

    /// Has them rest for so many percent of the time, at most [`limits::THROTTLE_PERCENT`]; 0 lets them run at full speed, at once.
    pub(crate) fn throttle(&self, percent: u8) -> Result<(), KvmError> {
        let mut throttler = lock(&self.shared.throttler);
        let before = {
            let mut gate = lock(&self.shared.gate);
            if percent == 0 {
                gate.rest_until = None;
            }
            self.shared.changed.notify_all();
            std::mem::replace(&mut gate.throttle, percent.min(limits::THROTTLE_PERCENT))
        };
        if percent == 0 {
            join(throttler.take());
        } else if before == 0 {
            let shared = Arc::clone(&self.shared);
            let spawned = std::thread::Builder::new()
                .name("throttle".to_owned())
                .spawn(move || shared.have_rests())
                .map_err(|source| KvmError::Call { call: "the creation of a thread", source })?;
            *throttler = Some(spawned);
        }
        Ok(())
    }

    /// Ends them, and returns when they have ended. Not to be called from one of them.
    pub(crate) fn quit(&self) {
        self.shared.want_quit();
        self.shared.kick();
        // The lock must be free again before the joins: a thread that ends by itself kicks the others.
        let handles = std::mem::take(&mut *lock(&self.shared.handles));
        handles.into_iter().for_each(|handle| join(Some(handle)));
        join(lock(&self.shared.throttler).take());
    }

    /// The virtual CPUs. Their locks are held while they run.
    pub(crate) fn vcpus(&self) -> &[Arc<Mutex<Vcpu>>] {
        &self.vcpus
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.quit();
    }
}

impl Shared {
    fn want_quit(&self) {
        lock(&self.gate).wanted = Wanted::Quit;
        self.changed.notify_all();
    }

    fn kick(&self) {
        for page in &self.pages {
            page.set_immediate_exit(true);
        }
        for handle in lock(&self.handles).iter() {
            if let Err(error) = handle.kill(SIGRTMIN()) {
                tracing::error!(%error, "could not signal a virtual CPU's thread");
            }
        }
    }

    /// Waits until the virtual CPU may run; false when it is to quit.
    fn enter(&self, page: &RunPage) -> bool {
        let gate = lock(&self.gate);
        let mut gate = self
            .changed
            .wait_while(gate, |gate| gate.wanted == Wanted::Park)
            .unwrap_or_else(PoisonError::into_inner);
        if gate.wanted == Wanted::Quit {
            return false;
        }
        gate.running += 1;
        // Under the lock: a kick that follows a new wish comes after this and is not lost.
        page.set_immediate_exit(false);
        true
    }

    fn leave(&self) {
        lock(&self.gate).running -= 1;
        self.changed.notify_all();
    }

    fn serve(&self, index: usize, vcpu: &Mutex<Vcpu>) {
        if let Err(error) = unblock_signal(SIGRTMIN()) {
            tracing::error!(?error, "could not unblock the signal that kicks virtual CPUs");
        }
        while self.enter(&self.pages[index]) {
            // Also on a panic, or whoever pauses would wait for ever.
            let left = Left(self);
            let end = self.run_until_unwanted(&mut lock(vcpu));
            drop(left);
            if let Some(end) = end {
                (self.on_end)(end);
                self.want_quit();
                self.kick();
                return;
            }
        }
    }

    fn run_until_unwanted(&self, vcpu: &mut Vcpu) -> Option<End> {
        loop {
            match vcpu.turn(&self.devices) {
                Turn::Handled => {}
                Turn::Kicked => {
                    if !self.rest(vcpu.page()) {
                        return None;
                    }
                }
                Turn::PowerOff => return Some(End::PowerOff),
                Turn::Failed(what) => {
                    vcpu.log_failure(&what, &self.memory);
                    return Some(End::Failed(format!("virtual CPU {}: {what}", vcpu.index())));
                }
            }
        }
    }
}

impl Shared {
    /// A virtual CPU was kicked: it rests, if all do. False if it is to leave.
    fn rest(&self, page: &RunPage) -> bool {
        let mut gate = lock(&self.gate);
        loop {
            if gate.wanted != Wanted::Run {
                return false;
            }
            let left = gate.rest_until.and_then(|until| until.checked_duration_since(Instant::now()));
            let Some(left) = left.filter(|left| !left.is_zero()) else {
                // As in `enter`: a kick that follows a new wish comes after this.
                page.set_immediate_exit(false);
                return true;
            };
            gate = self.changed.wait_timeout(gate, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Has the virtual CPUs rest after each slice, until they are not throttled any more.
    fn have_rests(&self) {
        let throttled = |gate: &mut Gate| gate.throttle > 0 && gate.wanted != Wanted::Quit;
        let wait = |span: Duration| {
            let gate = lock(&self.gate);
            let waited = self.changed.wait_timeout_while(gate, span, throttled);
            waited.unwrap_or_else(PoisonError::into_inner).0
        };
        loop {
            let mut gate = wait(limits::THROTTLE_SLICE);
            if !throttled(&mut gate) {
                return;
            }
            let percent = u32::from(gate.throttle);
            let rest = limits::THROTTLE_SLICE * percent / (100 - percent);
            gate.rest_until = Some(Instant::now() + rest);
            drop(gate);
            self.kick();
            drop(wait(rest));
        }
    }
}

fn join(handle: Option<JoinHandle<()>>) {
    if handle.is_some_and(|handle| handle.join().is_err()) {
        tracing::error!("a thread of the virtual CPUs panicked");
    }
}

struct Left<'a>(&'a Shared);

impl Drop for Left<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}
