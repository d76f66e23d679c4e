//! What goes wrong in a run, and when.

use migration_proto::Span;
use migration_proto::timer::Time;

use crate::rng::Rng;

/// The moment of a message's life at which a fault strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moment {
    /// Before it is sent: it never is, if its sender or connection dies.
    Sending,
    /// It is on its way.
    Sent,
    /// Before the other side gets it.
    Arriving,
    /// The other side has acted upon it.
    Handled,
}

/// A local action of a driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Local {
    Collect,
    Hash,
    Literals,
    Pause,
    RunOn,
    Save,
    Prepare,
    Load,
    Run,
    Spill,
}

/// A fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Every connection is lost, and none can be opened for a time.
    Outage(Span),
    /// The source's process is killed, and the VM with it, if it is there.
    KillSource,
    /// Somebody serves a spill file, whether it is needed or not; `stray`: one of a migration that was given up.
    ServeSpill { stray: bool },
    /// The destination's process is killed; a new one with an empty ledger takes its place, or none does.
    KillDestination { restart: Option<Span> },
    /// An operator cancels at the source.
    Cancel,
    /// The next local action of this kind fails.
    Fail(Local),
    /// The next local action of this kind takes so long.
    Stall(Local, Span),
}

/// When it strikes.
#[derive(Debug, Clone, Copy)]
enum Trigger {
    /// At the n-th message of the run, whatever it is.
    Message(u64, Moment),
    /// At the n-th message of this name.
    Named(&'static str, u64, Moment),
    /// At this time.
    At(Time),
}

/// What goes wrong in one run.
#[derive(Debug, Clone, Default)]
pub(crate) struct Faults {
    armed: Vec<(Trigger, Fault)>,
    seen: Vec<(&'static str, Moment, u64)>,
    messages: u64,
}

const NAMES: [&str; 26] = [
    "Offer",
    "Accept",
    "Region",
    "FullNames",
    "RoundEnd",
    "State",
    "Final",
    "Literals",
    "Stale",
    "Want",
    "RoundDone",
    "Ready",
    "Commit",
    "Running",
    "NotRunning",
    "Released",
    "Abort",
    "Refuse",
    "Absent",
    "PageNames",
    "Fault",
    "FaultPage",
    "Complete",
    "Serve",
    "Resume",
    "Held",
];

/// Messages of post-copy, those of the hand-over to it included.
const LATE_NAMES: [&str; 13] = [
    "Absent",
    "Ready",
    "Serve",
    "Final",
    "Commit",
    "Running",
    "PageNames",
    "Want",
    "WantNames",
    "Literals",
    "Fault",
    "FaultPage",
    "Complete",
];

fn draw_trigger(rng: &mut Rng) -> Trigger {
    let moment = rng.pick(&[Moment::Sending, Moment::Sent, Moment::Arriving, Moment::Handled]);
    match rng.below(15) {
        0..3 => Trigger::Message(rng.spread(1, 150), moment),
        // A third of all at the hand-over, where it matters most.
        3..7 => Trigger::Named(
            rng.pick(&["State", "Final", "Ready", "Commit", "Running", "NotRunning", "Released"]),
            rng.spread(1, 3),
            moment,
        ),
        7..9 => Trigger::Named(rng.pick(&NAMES), rng.spread(1, 6), moment),
        9..11 => Trigger::Named(rng.pick(&LATE_NAMES), rng.spread(1, 20), moment),
        // In the middle of rounds, the first and later ones.
        11..14 => Trigger::Named(
            rng.pick(&["Region", "Want", "Literals", "RoundEnd", "RoundDone"]),
            rng.spread(1, 12),
            moment,
        ),
        _ => Trigger::At(Time(rng.spread(1_000, 20_000_000))),
    }
}

fn draw_outage(rng: &mut Rng) -> Span {
    Span(if rng.chance(50) { 0 } else { rng.spread(10_000, 200_000_000) })
}

const LOCALS: [Local; 10] = [
    Local::Collect,
    Local::Hash,
    Local::Literals,
    Local::Pause,
    Local::RunOn,
    Local::Save,
    Local::Prepare,
    Local::Load,
    Local::Run,
    Local::Spill,
];

impl Faults {
    /// Connections are lost.
    pub(crate) fn lossy(rng: &mut Rng) -> Self {
        let count = rng.between(1, 3);
        Self::of(rng, count, |rng| Fault::Outage(draw_outage(rng)))
    }

    /// Processes are killed, operators interfere, local actions fail, and connections are lost.
    pub(crate) fn crashes(rng: &mut Rng) -> Self {
        let count = rng.between(1, 3);
        Self::of(rng, count, |rng| match rng.below(9) {
            0 => Fault::KillSource,
            1 | 2 => {
                let restart = rng.chance(60).then(|| Span(rng.spread(100_000, 60_000_000)));
                Fault::KillDestination { restart }
            }
            3 => Fault::Cancel,
            4 => Fault::Fail(rng.pick(&LOCALS)),
            5 => Fault::Stall(rng.pick(&LOCALS), Span(rng.spread(100_000, 100_000_000))),
            6 => Fault::ServeSpill { stray: rng.chance(20) },
            _ => Fault::Outage(draw_outage(rng)),
        })
    }

    /// As `crashes`, while memory follows the VM.
    pub(crate) fn postcopy(rng: &mut Rng) -> Self {
        let count = rng.between(1, 4);
        let armed = (0..count).map(|_| {
            let moment = rng.pick(&[Moment::Sending, Moment::Sent, Moment::Arriving, Moment::Handled]);
            let name = rng.pick(&LATE_NAMES);
            let fault = match rng.below(15) {
                0 | 1 => Fault::KillSource,
                2 => Fault::KillDestination {
                    restart: rng.chance(60).then(|| Span(rng.spread(100_000, 60_000_000))),
                },
                3 => Fault::Fail(rng.pick(&[Local::Hash, Local::Literals, Local::Spill])),
                12..15 => Fault::ServeSpill { stray: rng.chance(30) },
                4 => Fault::Stall(
                    rng.pick(&[Local::Hash, Local::Literals, Local::Spill]),
                    Span(rng.spread(100_000, 100_000_000)),
                ),
                _ => Fault::Outage(draw_outage(rng)),
            };
            (Trigger::Named(name, rng.spread(1, 20), moment), fault)
        });
        Self { armed: armed.collect(), ..Self::default() }
    }

    fn of(rng: &mut Rng, count: u64, draw: impl Fn(&mut Rng) -> Fault) -> Self {
        let armed = (0..count).map(|_| (draw_trigger(rng), draw(rng))).collect();
        Self { armed, ..Self::default() }
    }

    /// No fault, ever.
    pub(crate) fn none() -> Self {
        Self::default()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.armed.is_empty()
    }

    /// The faults that strike at a time, with it.
    pub(crate) fn timed(&self) -> Vec<(Time, Fault)> {
        let at = |(trigger, fault): &(Trigger, Fault)| match trigger {
            Trigger::At(time) => Some((*time, *fault)),
            Trigger::Message(..) | Trigger::Named(..) => None,
        };
        self.armed.iter().filter_map(at).collect()
    }

    /// A message is at this moment of its life: the faults that strike.
    pub(crate) fn at_message(&mut self, name: &'static str, moment: Moment) -> Vec<Fault> {
        if self.armed.is_empty() {
            return Vec::new();
        }
        self.messages += u64::from(moment == Moment::Sending);
        let count = match self.seen.iter_mut().find(|(n, m, _)| (*n, *m) == (name, moment)) {
            Some((_, _, count)) => count,
            None => &mut self.seen.push_mut((name, moment, 0)).2,
        };
        *count += 1;
        let (count, messages) = (*count, self.messages);
        let strikes = |trigger: &Trigger| match trigger {
            Trigger::Message(n, m) => (*n, *m) == (messages, moment),
            Trigger::Named(n, nth, m) => (*n, *nth, *m) == (name, count, moment),
            Trigger::At(_) => false,
        };
        self.armed.iter().filter(|(trigger, _)| strikes(trigger)).map(|(_, fault)| *fault).collect()
    }
}
