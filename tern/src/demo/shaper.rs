//! A user-space WAN link: a UDP relay of finite rate, delay and queue, with a count of what passed each way.
//!
//! The source of a migration is told the relay's address in place of the destination's. Each of its sockets becomes a flow
//! with a socket of its own towards the destination, so that answers find their way back; all flows share the one link. One
//! thread does it all: it waits in `ppoll` until a datagram comes or the next one is due, by absolute deadlines, so a late
//! wake-up delays one burst and does not add up.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::sockopt;

use crate::demo::link::{Link, LinkConfig, LinkCounts};
use crate::limits;

/// What passed the link, both ways.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WanCounts {
    /// From the source to the destination.
    pub to_destination: LinkCounts,
    /// From the destination to the source.
    pub to_source: LinkCounts,
}

impl WanCounts {
    /// What came after these were `earlier`.
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            to_destination: self.to_destination.since(&earlier.to_destination),
            to_source: self.to_source.since(&earlier.to_source),
        }
    }

    /// Bytes that crossed the link both ways, headers included; what a full queue dropped did not cross it.
    pub fn bytes(&self) -> u64 {
        self.to_destination.bytes + self.to_source.bytes
    }
}

/// Directions in which a link is cut: whatever would arrive there is lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cut {
    /// From the source to the destination.
    pub to_destination: bool,
    /// From the destination to the source.
    pub to_source: bool,
}

impl Cut {
    /// The link is whole.
    pub const NONE: Self = Self { to_destination: false, to_source: false };
    /// Nothing passes.
    pub const BOTH: Self = Self { to_destination: true, to_source: true };
}

/// A running relay. Dropping it ends it.
#[derive(Debug)]
pub struct Shaper {
    address: SocketAddr,
    cut: Arc<Mutex<Cut>>,
    counts: Arc<Mutex<WanCounts>>,
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Shaper {
    /// Starts a relay on a free loopback port towards `destination`, with a link like `link` each way.
    ///
    /// # Errors
    /// If the sockets or the thread cannot be had.
    pub fn start(destination: SocketAddr, link: LinkConfig) -> io::Result<Self> {
        let listener = open_socket()?;
        let address = listener.local_addr()?;
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let counts = Arc::new(Mutex::new(WanCounts::default()));
        let cut = Arc::new(Mutex::new(Cut::NONE));
        let relay = Relay {
            listener,
            cut: Arc::clone(&cut),
            destination,
            flows: Vec::new(),
            to_destination: Link::new(link),
            // Chance is to take others of the answers than of the questions.
            to_source: Link::new(LinkConfig { seed: link.seed.wrapping_add(1), ..link }),
            started: Instant::now(),
            buffer: vec![0; limits::DATAGRAM_BYTES].into_boxed_slice(),
        };
        let (thread_wake, thread_counts) = (Arc::clone(&wake), Arc::clone(&counts));
        let thread = std::thread::Builder::new()
            .name("wan-link".into())
            .spawn(move || relay.run(&thread_wake, &thread_counts))?;
        Ok(Self { address, cut, counts, wake, thread: Some(thread) })
    }

    /// Where the source must send to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What passed so far.
    pub fn counts(&self) -> WanCounts {
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cuts the link in these directions and makes it whole in the others. What is on it already is lost, too, if it would arrive
    /// while the cut lasts; what is lost counts as passed.
    pub fn cut(&self, cut: Cut) {
        *self.cut.lock().unwrap_or_else(PoisonError::into_inner) = cut;
    }
}

impl Drop for Shaper {
    fn drop(&mut self) {
        if let Err(error) = rustix::io::write(&*self.wake, &1u64.to_ne_bytes()) {
            tracing::warn!(%error, "the WAN link's thread cannot be told to end");
            return;
        }
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::warn!("the WAN link's thread had panicked");
        }
    }
}

fn open_socket() -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    socket.set_nonblocking(true)?;
    // The kernel caps these at its own limits, which is fine: they only cover for the thread's being scheduled late.
    sockopt::set_socket_recv_buffer_size(&socket, limits::SOCKET_BUFFER_BYTES)?;
    sockopt::set_socket_send_buffer_size(&socket, limits::SOCKET_BUFFER_BYTES)?;
    Ok(socket)
}

/// A socket of the source, and the one that stands for it towards the destination.
#[derive(Debug)]
struct Flow {
    source: SocketAddr,
    socket: UdpSocket,
}

/// A datagram on the link, and the flow (by index) that it belongs to.
#[derive(Debug)]
struct Datagram {
    flow: usize,
    payload: Box<[u8]>,
}

/// What the thread owns.
struct Relay {
    listener: UdpSocket,
    cut: Arc<Mutex<Cut>>,
    destination: SocketAddr,
    flows: Vec<Flow>,
    to_destination: Link<Datagram>,
    to_source: Link<Datagram>,
    started: Instant,
    buffer: Box<[u8]>,
}

impl Relay {
    fn run(mut self, wake: &OwnedFd, counts: &Mutex<WanCounts>) {
        loop {
            match self.wait(wake) {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    tracing::error!(%error, "the WAN link cannot wait for datagrams and ends");
                    return;
                }
            }
            self.deliver();
            self.accept();
            self.collect();
            *counts.lock().unwrap_or_else(PoisonError::into_inner) = WanCounts {
                to_destination: self.to_destination.counts(),
                to_source: self.to_source.counts(),
            };
        }
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Waits until a datagram has come or one is due; false when the owner wants the thread to end.
    fn wait(&self, wake: &OwnedFd) -> io::Result<bool> {
        let due =
            [self.to_destination.next_arrival(), self.to_source.next_arrival()].into_iter().flatten().min();
        let timeout = due.map(|at| {
            let left = at.saturating_sub(self.now());
            Timespec {
                tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            }
        });
        let sockets = std::iter::once(&self.listener).chain(self.flows.iter().map(|flow| &flow.socket));
        let mut fds: Vec<_> = std::iter::once(wake.as_fd())
            .chain(sockets.map(AsFd::as_fd))
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => Ok(!fds[0].revents().contains(PollFlags::IN)),
            Err(rustix::io::Errno::INTR) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }

    /// Sends on what has arrived at either end of the link.
    fn deliver(&mut self) {
        let now = self.now();
        let cut = *self.cut.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(datagram) = self.to_destination.take_arrived(now) {
            if !cut.to_destination {
                note_loss(self.flows[datagram.flow].socket.send(&datagram.payload));
            }
        }
        while let Some(datagram) = self.to_source.take_arrived(now) {
            if !cut.to_source {
                note_loss(self.listener.send_to(&datagram.payload, self.flows[datagram.flow].source));
            }
        }
    }

    /// Puts what the source sent onto the link.
    fn accept(&mut self) {
        for _ in 0..limits::DATAGRAMS_PER_TURN {
            let (length, source) = match self.listener.recv_from(&mut self.buffer) {
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => return note_loss(Err(error)),
            };
            match self.flow_of(source) {
                Ok(flow) => {
                    let datagram = Datagram { flow, payload: self.buffer[..length].into() };
                    self.to_destination.offer(self.started.elapsed(), length as u64, datagram);
                }
                Err(error) => note_loss(Err(error)),
            }
        }
    }

    /// Puts what the destination sent onto the link.
    fn collect(&mut self) {
        for (flow, socket) in self.flows.iter().map(|flow| &flow.socket).enumerate() {
            for _ in 0..limits::DATAGRAMS_PER_TURN {
                match socket.recv(&mut self.buffer) {
                    Ok(length) => {
                        let datagram = Datagram { flow, payload: self.buffer[..length].into() };
                        self.to_source.offer(self.started.elapsed(), length as u64, datagram);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => {
                        note_loss(Err(error));
                        break;
                    }
                }
            }
        }
    }

    /// The flow of the source's socket `source`, made when it is new.
    fn flow_of(&mut self, source: SocketAddr) -> io::Result<usize> {
        if let Some(known) = self.flows.iter().position(|flow| flow.source == source) {
            return Ok(known);
        }
        if self.flows.len() >= limits::FLOWS {
            return Err(io::Error::other("more sockets of the source than the WAN link takes"));
        }
        let socket = open_socket()?;
        socket.connect(self.destination)?;
        self.flows.push(Flow { source, socket });
        Ok(self.flows.len() - 1)
    }
}

/// A datagram that could not be sent on or received is a loss, as on any link; the transport above recovers from it.
fn note_loss(result: io::Result<usize>) {
    if let Err(error) = result {
        tracing::debug!(%error, "a datagram was lost at an end of the WAN link");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::link::HEADER_BYTES;

    const MS: Duration = Duration::from_millis(1);

    fn ends(link: LinkConfig) -> (UdpSocket, UdpSocket, Shaper) {
        let bind = || UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let (source, destination) = (bind(), bind());
        for socket in [&source, &destination] {
            socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        }
        let shaper = Shaper::start(destination.local_addr().unwrap(), link).unwrap();
        source.connect(shaper.address()).unwrap();
        (source, destination, shaper)
    }

    #[test]
    fn datagrams_take_the_delay_each_way_and_are_counted() {
        let (source, destination, shaper) = ends(LinkConfig::half_of(100_000_000, 40 * MS));
        let mut buffer = [0; 2048];
        let begun = Instant::now();
        source.send(b"to the destination").unwrap();
        let (length, relay) = destination.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"to the destination");
        assert!(begun.elapsed() >= 20 * MS, "{:?}", begun.elapsed());
        destination.send_to(b"and back", relay).unwrap();
        let length = source.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"and back");
        assert!(begun.elapsed() >= 40 * MS, "{:?}", begun.elapsed());
        let counts = shaper.counts();
        assert_eq!((counts.to_destination.packets, counts.to_destination.bytes), (1, 18 + HEADER_BYTES));
        assert_eq!((counts.to_source.packets, counts.to_source.bytes), (1, 8 + HEADER_BYTES));
    }

    #[test]
    fn a_burst_arrives_in_order_at_the_rate_of_the_link() {
        // 64 datagrams of 1000 bytes fit the queue and the sockets' buffers; at 8 Mbit/s each takes a millisecond.
        let (source, destination, shaper) = ends(LinkConfig::half_of(8_000_000, 20 * MS));
        let begun = Instant::now();
        for n in 0..64u8 {
            source.send(&[n; 1000 - 28]).unwrap();
        }
        let mut buffer = [0; 2048];
        for n in 0..64u8 {
            destination.recv(&mut buffer).unwrap();
            assert_eq!(buffer[0], n);
            assert!(begun.elapsed() >= (u32::from(n) + 1 + 10) * MS, "datagram {n} at {:?}", begun.elapsed());
        }
        assert_eq!(shaper.counts().to_destination.bytes, 64_000);
        assert_eq!(shaper.counts().bytes(), 64_000);
    }

    #[test]
    fn what_would_arrive_during_a_cut_is_lost() {
        let (source, destination, shaper) = ends(LinkConfig::half_of(100_000_000, MS));
        shaper.cut(Cut { to_destination: false, to_source: true });
        let mut buffer = [0; 16];
        source.send(b"there").unwrap();
        let (_, relay) = destination.recv_from(&mut buffer).unwrap();
        destination.send_to(b"lost", relay).unwrap();
        source.set_read_timeout(Some(100 * MS)).unwrap();
        assert_eq!(source.recv(&mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        shaper.cut(Cut::NONE);
        source.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        destination.send_to(b"back", relay).unwrap();
        let length = source.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"back");
    }

    #[test]
    fn two_sockets_of_the_source_are_two_flows_with_answers_of_their_own() {
        let (source, destination, shaper) = ends(LinkConfig::half_of(100_000_000, MS));
        let other = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        other.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        other.connect(shaper.address()).unwrap();
        source.send(b"a").unwrap();
        other.send(b"b").unwrap();
        let mut buffer = [0; 16];
        for _ in 0..2 {
            let (length, from) = destination.recv_from(&mut buffer).unwrap();
            destination.send_to(&buffer[..length], from).unwrap();
        }
        for (socket, expected) in [(source, b"a"), (other, b"b")] {
            let length = socket.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], expected);
        }
    }

    /// How close a saturated relay comes to its rate here: `cargo test -p tern -- --ignored --nocapture relay_that`.
    #[test]
    #[ignore = "a measurement: it depends on the machine's load"]
    fn a_relay_that_is_flooded_carries_its_rate() {
        for (rate_bps, rtt) in [(100_000_000, 50 * MS), (1_000_000_000, MS), (1_000_000_000, 200 * MS)] {
            let (source, destination, shaper) = ends(LinkConfig::half_of(rate_bps, rtt));
            let time = Duration::from_secs(2);
            let begun = Instant::now();
            let flood = std::thread::spawn(move || {
                while begun.elapsed() < time {
                    source.send(&[0; 1400]).unwrap();
                }
            });
            let (mut buffer, mut received) = ([0; 2048], 0u64);
            while begun.elapsed() < time + rtt / 2 {
                received += destination.recv(&mut buffer).unwrap() as u64 + HEADER_BYTES;
            }
            flood.join().unwrap();
            let rate = received as f64 * 8.0 / time.as_secs_f64();
            println!(
                "{rate_bps} bit/s, {rtt:?}: {:.3} of the rate, {:?}",
                rate / rate_bps as f64,
                shaper.counts()
            );
        }
    }
}
