//! The guest's whole life after boot, one short turn after another.
//!
//! A turn does what is due, the heartbeat first, and never more than a bounded piece of anything else: so neither a
//! check nor a long line on the serial port holds up the heartbeat or the writes.

use super::console::{Console, Ports};
use super::limits;
use super::options::Options;
use super::pace::{Pacer, Periodic};
use super::report::Report;
use super::storm::{Failure, Ram, Storm, Verdict};

/// A check under way.
#[derive(Debug, Default)]
struct Pass {
    next_slot: u64,
    checked: u64,
    failures: u64,
    first_bad: Option<u64>,
    lines: u32,
}

/// Everything pagestorm does, driven by [`Engine::turn`].
#[derive(Debug)]
pub struct Engine<R> {
    options: Options,
    storm: Storm<R>,
    console: Console,
    clock: &'static str,
    start_ns: u64,
    last_ns: u64,
    pacer: Pacer,
    beat: Periodic,
    beats: u64,
    last_beat_ns: u64,
    max_gap_ns: u64,
    input: Periodic,
    report: Option<Periodic>,
    ready: bool,
    status_due: bool,
    check_due: bool,
    checks: u64,
    pass: Option<Pass>,
}

impl<R: Ram> Engine<R> {
    /// Starts at `now_ns` of the guest's clock, whose name is for the line "ready".
    pub fn new(options: Options, storm: Storm<R>, clock: &'static str, now_ns: u64) -> Self {
        Self {
            console: Console::default(),
            clock,
            start_ns: now_ns,
            last_ns: now_ns,
            pacer: Pacer::new(options.rate_pps, now_ns),
            beat: Periodic::new(options.heartbeat_us * 1000, now_ns),
            beats: 0,
            last_beat_ns: now_ns,
            max_gap_ns: 0,
            input: Periodic::new(limits::INPUT_POLL_NS, now_ns),
            report: (options.report_ms > 0).then(|| Periodic::new(options.report_ms * 1_000_000, now_ns)),
            ready: false,
            status_due: false,
            check_due: false,
            checks: 0,
            pass: None,
            options,
            storm,
        }
    }

    /// Does what is due at `clock_ns`. A clock that went back (a TSC on another host) stands still until it has caught
    /// up. Returns when the next thing is due: until then a turn would do nothing.
    pub fn turn(&mut self, clock_ns: u64, ports: &mut impl Ports) -> u64 {
        let now_ns = self.last_ns.max(clock_ns);
        self.last_ns = now_ns;
        self.heartbeat(now_ns, ports);
        self.write(now_ns);
        self.listen(now_ns, ports);
        self.check();
        self.answer(now_ns);
        self.console.drain(ports);
        self.next_ns()
    }

    fn heartbeat(&mut self, now_ns: u64, ports: &mut impl Ports) {
        if self.beat.take(now_ns) {
            // The low byte is meant: the host sees each beat differ from the one before.
            ports.heartbeat((self.beats & 0xff) as u8);
            self.beats += 1;
            self.max_gap_ns = self.max_gap_ns.max(now_ns - self.last_beat_ns);
            self.last_beat_ns = now_ns;
        }
    }

    fn write(&mut self, now_ns: u64) {
        let unfilled =
            if self.options.prefill { self.storm.slots().saturating_sub(self.storm.writes()) } else { 0 };
        let due = if unfilled > 0 {
            self.pacer = Pacer::new(self.options.rate_pps, now_ns);
            u32::try_from(unfilled).unwrap_or(u32::MAX).min(limits::WRITES_PER_TURN)
        } else {
            self.pacer.take(now_ns, limits::WRITES_PER_TURN)
        };
        for _ in 0..due {
            self.storm.write_next();
        }
        if !self.ready && unfilled == 0 {
            self.ready = true;
            self.console.line(format_args!(
                "pagestorm: ready ws={} rate={} base={:#x} content={} seed={} pages={} clock={}",
                self.options.ws_bytes,
                self.options.rate_pps,
                self.options.base,
                self.options.content.word(),
                self.options.seed,
                self.storm.slots(),
                self.clock,
            ));
        }
    }

    fn listen(&mut self, now_ns: u64, ports: &mut impl Ports) {
        if self.report.as_mut().is_some_and(|report| report.take(now_ns)) {
            self.status_due = true;
        }
        if !self.input.take(now_ns) {
            return;
        }
        match ports.serial_read() {
            Some(b'c') => self.check_due = true,
            Some(b's') => self.status_due = true,
            Some(b'r') => {
                self.status_due = true;
                self.max_gap_ns = 0;
            }
            // Line ends and whatever else a terminal sends mean nothing here.
            Some(_) | None => {}
        }
    }

    fn check(&mut self) {
        if self.pass.is_none() && self.check_due && self.console.is_empty() {
            self.check_due = false;
            self.checks += 1;
            self.pass = Some(Pass::default());
            if let Some(failure) = self.storm.check_header() {
                self.record(failure);
            }
        }
        for _ in 0..limits::CHECKS_PER_TURN {
            let Some(pass) = self.pass.as_mut().filter(|pass| pass.next_slot < self.storm.slots()) else {
                return;
            };
            let slot = pass.next_slot;
            pass.next_slot += 1;
            match self.storm.check(slot) {
                Verdict::Unwritten => {}
                Verdict::Good => pass.checked += 1,
                Verdict::Bad(failure) => {
                    pass.checked += 1;
                    self.record(failure);
                }
            }
        }
    }

    fn record(&mut self, failure: Failure) {
        let Some(pass) = &mut self.pass else { return };
        pass.failures += 1;
        pass.first_bad = pass.first_bad.or(Some(failure.gpa()));
        if pass.lines < limits::BAD_PAGE_LINES_MAX && self.console.has_room(2) {
            pass.lines += 1;
            self.console.line(format_args!("pagestorm: {failure}"));
        }
    }

    fn answer(&mut self, now_ns: u64) {
        if !self.console.has_room(1) {
            return;
        }
        if let Some(pass) = self.pass.take_if(|pass| pass.next_slot >= self.storm.slots()) {
            let report = Report {
                check: self.checks,
                pages_checked: pass.checked,
                failures: pass.failures,
                first_bad: pass.first_bad,
                ..self.status(now_ns)
            };
            self.console.line(format_args!("{report}"));
        } else if self.status_due {
            self.status_due = false;
            let report = self.status(now_ns);
            self.console.line(format_args!("{report}"));
        }
    }

    fn status(&self, now_ns: u64) -> Report {
        Report {
            pages_written: self.storm.writes(),
            uptime_ms: (now_ns - self.start_ns) / 1_000_000,
            heartbeats: self.beats,
            max_gap_us: self.max_gap_ns / 1000,
            ..Report::default()
        }
    }

    fn next_ns(&self) -> u64 {
        let busy = !self.ready || self.pass.is_some() || self.status_due || !self.console.is_empty();
        if busy {
            return self.last_ns;
        }
        let mut next_ns = self.beat.next_ns().min(self.input.next_ns());
        if let Some(write_ns) = self.pacer.next_ns() {
            next_ns = next_ns.min(write_ns);
        }
        next_ns
    }

    /// The working set.
    pub const fn storm(&self) -> &Storm<R> {
        &self.storm
    }

    /// The working set, for a test that plays a lost page.
    pub const fn storm_mut(&mut self) -> &mut Storm<R> {
        &mut self.storm
    }
}
