//! Connections that break at the worst moments, with a real guest on the real /dev/kvm: at most one side runs it, and nothing is lost.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail the test")]

mod hosts;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hosts::{Host, hosts, in_time};
use tokio::net::UdpSocket;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};
use vmm::machine::{Machine, RunState, StopReason};
use vmm::migrate::report::{IncomingPhase, Outcome, Phase};
use vmm::migrate::ticket::Ticket;
use vmm::migrate::{Incoming, MigrateError, Outgoing};

/// One way: long enough for a test to act while a message is on its way.
const DELAY: Duration = Duration::from_millis(200);

/// Datagrams under way in one direction.
const QUEUE: usize = 8192;

/// A path with a delay, which can be cut and healed.
struct Path {
    address: SocketAddr,
    open: watch::Sender<bool>,
}

impl Path {
    async fn to(server: SocketAddr) -> Self {
        let outside = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let inside = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        inside.connect(server).await.unwrap();
        let address = outside.local_addr().unwrap();
        let (open, is_open) = watch::channel(true);
        let (caller, known) = watch::channel(None::<SocketAddr>);
        let (up, mut to_server) = mpsc::channel::<(Instant, Vec<u8>)>(QUEUE);
        let (down, mut to_caller) = mpsc::channel::<(Instant, Vec<u8>)>(QUEUE);
        let (from_caller, into_server) = (Arc::clone(&outside), Arc::clone(&inside));
        tokio::spawn(async move {
            let mut buffer = vec![0; 65536];
            while let Ok((length, from)) = from_caller.recv_from(&mut buffer).await {
                caller.send_replace(Some(from));
                // A full queue drops, as a router's does.
                up.try_send((Instant::now() + DELAY, buffer[..length].to_vec())).ok();
            }
        });
        let gate = is_open.clone();
        tokio::spawn(async move {
            while let Some((due, datagram)) = to_server.recv().await {
                sleep_until(due).await;
                let open = *gate.borrow();
                if open {
                    into_server.send(&datagram).await.ok();
                }
            }
        });
        tokio::spawn(async move {
            let mut buffer = vec![0; 65536];
            while let Ok(length) = inside.recv(&mut buffer).await {
                down.try_send((Instant::now() + DELAY, buffer[..length].to_vec())).ok();
            }
        });
        tokio::spawn(async move {
            while let Some((due, datagram)) = to_caller.recv().await {
                sleep_until(due).await;
                let caller = known.borrow().filter(|_| *is_open.borrow());
                if let Some(caller) = caller {
                    outside.send_to(&datagram, caller).await.ok();
                }
            }
        });
        Self { address, open }
    }

    fn cut(&self) {
        self.open.send_replace(false);
    }

    fn heal(&self) {
        self.open.send_replace(true);
    }
}

/// A guest at the first host, on its way to the second over a path that can be cut.
struct Scene {
    a: Host,
    b: Host,
    machine: Arc<Machine>,
    incoming: Incoming,
    outgoing: Outgoing,
    path: Path,
}

impl Scene {
    async fn begin() -> Self {
        let (a, b) = hosts();
        let machine = a.launch("rate=200 ws=4M prefill=1 content=text");
        a.ready().await;
        let incoming = b.listen().await;
        let ticket: Ticket = incoming.ticket().parse().unwrap();
        let path = Path::to(ticket.resolve().unwrap()).await;
        let to = Ticket { address: path.address.to_string(), key: ticket.key }.to_string();
        let outgoing = a.migrate(&machine, &to);
        Self { a, b, machine, incoming, outgoing, path }
    }

    /// Commit is lost: the source does not know whether it came, and the destination holds what it was sent.
    async fn begin_in_doubt() -> Self {
        let scene = Self::begin().await;
        scene.source_reaches(Phase::Committing).await;
        scene.path.cut();
        scene.source_reaches(Phase::InDoubt).await;
        assert_eq!(scene.source_state(), RunState::Paused, "it may run at the destination");
        scene.destination_reaches(IncomingPhase::Held).await;
        scene
    }

    async fn source_reaches(&self, phase: Phase) {
        let mut progress = self.outgoing.progress();
        in_time("the source's phase", progress.wait_for(|p| p.phase == phase)).await.unwrap();
    }

    async fn destination_reaches(&self, phase: IncomingPhase) {
        self.destination_reaches_one_of(&[phase]).await;
    }

    async fn destination_reaches_one_of(&self, phases: &[IncomingPhase]) {
        let mut status = self.incoming.status();
        in_time("the destination's phase", status.wait_for(|s| phases.contains(&s.phase))).await.unwrap();
    }

    fn source_state(&self) -> RunState {
        self.machine.watch().borrow().clone()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_answer_to_commit_is_lost_and_asked_for_again() {
    let scene = Scene::begin().await;
    // As soon as it runs, with all of its memory or not: its answer to Commit is on its way.
    scene.destination_reaches_one_of(&[IncomingPhase::Postcopy, IncomingPhase::Running]).await;
    scene.path.cut();
    scene.source_reaches(Phase::InDoubt).await;
    assert_eq!(scene.source_state(), RunState::Paused, "it may run at the destination, and does");
    let arrived = scene.incoming.machine().await.unwrap();
    assert_eq!(*arrived.watch().borrow(), RunState::Running);
    scene.path.heal();
    let report = in_time("the answer", scene.outgoing.finished()).await.unwrap();
    assert_eq!(report.outcome, Outcome::Completed);
    assert_eq!(scene.source_state(), RunState::Stopped(StopReason::Migrated));
    assert_eq!(scene.b.check(&arrived, 1).await.failures, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn commit_is_lost_and_said_again() {
    let scene = Scene::begin_in_doubt().await;
    scene.path.heal();
    let report = in_time("the hand-over", scene.outgoing.finished()).await.unwrap();
    assert!(report.verified);
    let arrived = in_time("the arrival", scene.incoming.machine()).await.unwrap();
    assert_eq!(scene.b.check(&arrived, 1).await.failures, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_settles_a_doubt_at_the_source() {
    let scene = Scene::begin_in_doubt().await;
    scene.outgoing.resolve(true).unwrap();
    let error = in_time("the end", scene.outgoing.finished()).await.unwrap_err();
    assert!(matches!(error, MigrateError::Aborted { .. }), "{error}");
    assert_eq!(scene.source_state(), RunState::Running);
    // The destination hears of it as soon as it can be reached.
    scene.path.heal();
    scene.destination_reaches(IncomingPhase::Listening).await;
    assert_eq!(scene.a.check(&scene.machine, 1).await.failures, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_went_on_can_offer_its_vm_again_to_a_host_that_holds_it() {
    let scene = Scene::begin_in_doubt().await;
    scene.outgoing.resolve(true).unwrap();
    in_time("the end", scene.outgoing.finished()).await.unwrap_err();
    // Past the cut path, so that the destination has not heard how the first attempt ended.
    let again = scene.a.migrate(&scene.machine, &scene.incoming.ticket());
    let report = in_time("the second attempt", again.finished()).await.unwrap();
    assert!(report.verified);
    let arrived = in_time("the arrival", scene.incoming.machine()).await.unwrap();
    assert_eq!(scene.b.check(&arrived, 1).await.failures, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_lost_before_commit_leaves_the_guest_where_it_was() {
    let scene = Scene::begin().await;
    scene.source_reaches(Phase::Precopy).await;
    scene.path.cut();
    let error = in_time("the end", scene.outgoing.finished()).await.unwrap_err();
    assert!(matches!(error, MigrateError::ConnectionLost { .. }), "{error}");
    assert_eq!(scene.source_state(), RunState::Running);
    scene.destination_reaches(IncomingPhase::Listening).await;
    assert_eq!(scene.a.check(&scene.machine, 1).await.failures, 0);
}
