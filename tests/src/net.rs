//! A model WAN link. Messages of one channel arrive in order; channels overtake each other. A connection can be lost
//! at any message, and each end learns of it in its own time; meanwhile it may go on sending into the void.

use std::collections::{BTreeMap, BTreeSet};

use migration_proto::Span;
use migration_proto::timer::{Link, Time};
use migration_proto::wire::Channel;

use crate::rng::Rng;

/// An end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Side {
    Source,
    Destination,
    /// Whoever serves a spill file in the source's place.
    Spill,
}

/// A connection, for all of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ConnId(pub(crate) u32);

#[derive(Debug)]
struct Conn {
    /// Who opened it: the end that is not the destination.
    caller: Side,
    /// Ends that do not know of a loss and have not closed it.
    open: BTreeSet<Side>,
    broken: bool,
    /// Whether its first control message has been handed to the destination, which reads no other channel before.
    greeted: bool,
    /// When the last message of each direction and channel arrives.
    arrivals: BTreeMap<(Side, Channel), Time>,
    /// Directions and channels whose messages under way are lost.
    cut: BTreeSet<(Side, Channel)>,
}

/// How the link behaves.
#[derive(Debug, Clone)]
pub(crate) struct Habits {
    /// One way, microseconds.
    pub(crate) delay: u64,
    /// On top of it, at most, each message anew.
    pub(crate) jitter: u64,
    pub(crate) bytes_per_s: u64,
}

impl Habits {
    pub(crate) fn draw(rng: &mut Rng) -> Self {
        let delay = rng.spread(50, 150_000);
        Self {
            delay,
            jitter: rng.pick(&[0, 100, delay, delay * 4]),
            bytes_per_s: rng.spread(200_000, 1_250_000_000),
        }
    }

    /// What the drivers measure.
    pub(crate) fn link(&self) -> Link {
        Link { rtt: Span(self.delay * 2 + self.jitter), bytes_per_s: self.bytes_per_s }
    }
}

/// The link with all its connections.
#[derive(Debug)]
pub(crate) struct Net {
    habits: Habits,
    conns: BTreeMap<ConnId, Conn>,
    /// Until when the link is taken, to each side.
    busy: BTreeMap<Side, Time>,
    /// No connection can be opened before.
    down_until: Time,
}

impl Net {
    pub(crate) fn new(habits: Habits) -> Self {
        Self { habits, conns: BTreeMap::new(), busy: BTreeMap::new(), down_until: Time(0) }
    }

    pub(crate) fn link(&self) -> Link {
        self.habits.link()
    }

    /// The longest that a small message takes one way.
    pub(crate) fn longest_trip(&self) -> Span {
        Span(self.habits.delay + self.habits.jitter)
    }

    /// How long to open a connection takes, and whether it comes about.
    pub(crate) fn dial(
        &mut self,
        rng: &mut Rng,
        now: Time,
        caller: Side,
        listening: bool,
    ) -> (Span, Option<ConnId>) {
        if now < self.down_until || !listening {
            return (Span(rng.spread(1_000, 5_000_000)), None);
        }
        let conn = ConnId(u32::try_from(self.conns.len()).expect("few connections in a run"));
        let open = BTreeSet::from([caller, Side::Destination]);
        let (arrivals, cut) = (BTreeMap::new(), BTreeSet::new());
        self.conns.insert(conn, Conn { caller, open, broken: false, greeted: false, arrivals, cut });
        (Span(self.habits.delay * 2 + rng.below(self.habits.jitter + 1)), Some(conn))
    }

    /// The other end.
    pub(crate) fn other(&self, conn: ConnId, side: Side) -> Side {
        match side {
            Side::Source | Side::Spill => Side::Destination,
            Side::Destination => self.conns.get(&conn).map_or(Side::Source, |conn| conn.caller),
        }
    }

    /// Sends `bytes`: when the last has left, and when they arrive; `None` if they never will.
    pub(crate) fn send(
        &mut self,
        rng: &mut Rng,
        now: Time,
        conn: ConnId,
        to: Side,
        channel: Channel,
        bytes: usize,
    ) -> (Time, Option<Time>) {
        let taken = Span(bytes as u64 * 1_000_000 / self.habits.bytes_per_s);
        let busy = self.busy.entry(to).or_default();
        // Small urgent messages go between bulk data.
        let urgent = matches!(channel, Channel::Control | Channel::Faults);
        let gone = if urgent { now } else { (*busy).max(now) } + taken;
        *busy = gone.max(*busy);
        let from = self.other(conn, to);
        let Some(conn) = self.conns.get_mut(&conn).filter(|conn| conn.open.contains(&from)) else {
            return (gone, None);
        };
        if conn.broken || !conn.open.contains(&to) {
            return (gone, None);
        }
        let mut arrives = gone + Span(self.habits.delay + rng.below(self.habits.jitter + 1));
        if to == Side::Destination && !conn.greeted {
            let greeting = conn.arrivals.get(&(to, Channel::Control)).copied();
            arrives = arrives.max(greeting.unwrap_or_default());
        }
        let last = conn.arrivals.entry((to, channel)).or_default();
        *last = arrives.max(*last);
        (gone, Some(*last))
    }

    /// Whether a message that arrives now is handed over.
    pub(crate) fn arrives(&mut self, conn: ConnId, to: Side, channel: Channel) -> bool {
        let Some(conn) = self.conns.get_mut(&conn) else { return false };
        let comes = conn.open.contains(&to) && !conn.cut.contains(&(to, channel));
        if to == Side::Source || to == Side::Spill {
            return comes;
        }
        conn.greeted |= comes && channel == Channel::Control;
        comes && conn.greeted
    }

    /// Whether this end takes the connection for alive.
    pub(crate) fn is_open(&self, conn: ConnId, side: Side) -> bool {
        self.conns.get(&conn).is_some_and(|conn| conn.open.contains(&side))
    }

    /// An end has noticed the loss. False if it had before, or had closed it itself.
    pub(crate) fn noticed(&mut self, conn: ConnId, side: Side) -> bool {
        self.conns.get_mut(&conn).is_some_and(|conn| conn.open.remove(&side))
    }

    /// The process of one end is gone, and its end of every connection with it.
    pub(crate) fn dies(&mut self, side: Side) {
        self.conns.values_mut().for_each(|conn| {
            conn.open.remove(&side);
        });
    }

    /// An end closes: when the other end notices, which may be before the last messages or after them.
    pub(crate) fn close(&mut self, rng: &mut Rng, now: Time, conn: ConnId, side: Side) -> Option<Time> {
        let conn = self.conns.get_mut(&conn)?;
        if !conn.open.remove(&side) || conn.broken {
            return None;
        }
        let delay = Span(self.habits.delay + rng.below(self.habits.jitter + 1));
        let last = conn.arrivals.iter().filter(|((to, _), _)| *to != side).map(|(_, at)| *at).max();
        let graceful = last.filter(|_| rng.chance(70));
        Some((now + delay).max(graceful.unwrap_or_default() + Span(1)))
    }

    /// The connection is lost. What is under way is lost too, or some of it arrives. When each end notices.
    pub(crate) fn cut(&mut self, rng: &mut Rng, now: Time, conn: ConnId) -> Vec<(Side, Time)> {
        let Some(conn) = self.conns.get_mut(&conn).filter(|conn| !conn.broken) else { return Vec::new() };
        conn.broken = true;
        for direction in conn.arrivals.keys() {
            if rng.chance(60) {
                conn.cut.insert(*direction);
            }
        }
        let ends: Vec<Side> = conn.open.iter().copied().collect();
        ends.into_iter().map(|side| (side, now + Span(rng.spread(100, 30_000_000)))).collect()
    }

    /// Cuts every connection, and lets none be opened for `outage`.
    pub(crate) fn outage(&mut self, rng: &mut Rng, now: Time, outage: Span) -> Vec<(ConnId, Side, Time)> {
        self.down_until = self.down_until.max(now + outage);
        let all: Vec<ConnId> = self.conns.keys().copied().collect();
        let mut ends = Vec::new();
        for conn in all {
            ends.extend(self.cut(rng, now, conn).into_iter().map(|(side, at)| (conn, side, at)));
        }
        ends
    }
}
