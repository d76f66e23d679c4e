//! The endpoint at which a VM can arrive: lets connections in, and routes each to what it is about.

use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};

use migration_proto::stats::DestinationStats;
use migration_proto::switchover::Fate;
use migration_proto::wire::{self, Message, Offer, Probe};
use migration_proto::{MigrationId, VmId};
use page::ShortId;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::arrival::{Arrival, Mail, Shared};
use super::channel::{self, DestinationChannels};
use super::identity::HostKey;
use super::report::{IncomingPhase, IncomingStatus};
use super::transport::{Close, Endpoint, Handshake, Link};
use super::{MigrateError, limits, probe};

/// A connection that has said what it is about.
pub(super) struct Greeting {
    pub(super) link: Link,
    pub(super) channels: DestinationChannels,
    /// Its first message.
    pub(super) first: Message,
    /// An offer that has waited for an earlier attempt to end.
    pub(super) waited: bool,
}

/// The arrival that is under way or was the last.
struct Current {
    migration: MigrationId,
    vm: VmId,
    source: HostKey,
    mail: mpsc::Sender<Mail>,
    task: JoinHandle<()>,
}

/// Serves an endpoint until it is told to stop.
pub(super) struct Server {
    endpoint: Endpoint,
    shared: Shared,
    current: Option<Current>,
    /// Greetings, last words, and other things that nobody waits for.
    errands: JoinSet<()>,
    greetings: (mpsc::Sender<Greeting>, mpsc::Receiver<Greeting>),
    resolve: mpsc::Receiver<bool>,
    /// Places for dry runs.
    probes: Arc<Semaphore>,
}

impl Server {
    pub(super) fn new(endpoint: Endpoint, shared: Shared, resolve: mpsc::Receiver<bool>) -> Self {
        let greetings = mpsc::channel(limits::GREETINGS_BOUND);
        let probes = Arc::new(Semaphore::new(limits::PROBES));
        Self { endpoint, shared, current: None, errands: JoinSet::new(), greetings, resolve, probes }
    }

    pub(super) async fn serve(mut self, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                handshake = self.endpoint.accept() => match handshake {
                    Some(handshake) => {
                        let (greetings, status) = (self.greetings.0.clone(), self.shared.status.clone());
                        self.errands.spawn(greet(handshake, greetings, status));
                    }
                    None => break,
                },
                Some(greeting) = self.greetings.1.recv() => self.route(greeting),
                Some(run_here) = self.resolve.recv() => {
                    if let Some(current) = &self.current
                        && current.mail.send(Mail::Resolve { run_here }).await.is_err()
                    {
                        tracing::warn!("an operator's command came after the migration's end");
                    }
                }
                Some(_) = self.errands.join_next() => {}
            }
        }
        if let Some(Current { mail, task, .. }) = self.current.take() {
            drop(mail);
            if timeout(limits::CLOSE_TIMEOUT * 2, task).await.is_err() {
                tracing::warn!("the last arrival did not end in time");
            }
        }
        self.endpoint.close("this host takes no VM any more");
        self.endpoint.settle().await;
        self.shared.status.send_modify(|status| status.phase = IncomingPhase::Closed);
    }

    fn route(&mut self, greeting: Greeting) {
        match greeting.first.clone() {
            Message::Offer(offer) => self.offered(offer, greeting),
            Message::Commit { migration, .. }
            | Message::Serve { migration, .. }
            | Message::Resume { migration, .. } => {
                self.asked(migration, greeting, true);
            }
            Message::Abort { migration, .. } => self.asked(migration, greeting, false),
            Message::Probe(Probe::Ask { offer, ids }) => self.probed(offer, ids, greeting),
            Message::Accept { .. }
            | Message::Refuse(_)
            | Message::Region(_)
            | Message::FullNames { .. }
            | Message::RoundEnd { .. }
            | Message::State(_)
            | Message::Final { .. }
            | Message::Absent { .. }
            | Message::PageNames { .. }
            | Message::Fault(_)
            | Message::FaultPage { .. }
            | Message::Complete { .. }
            | Message::Literals(_)
            | Message::Stale(_)
            | Message::Want(_)
            | Message::WantNames(_)
            | Message::RoundDone { .. }
            | Message::Ready { .. }
            | Message::Running { .. }
            | Message::NotRunning { .. }
            | Message::Unknown { .. }
            | Message::Held { .. }
            | Message::Released { .. }
            | Message::Probe(Probe::Answer { .. } | Probe::Burst(_) | Probe::Carried { .. }) => {
                greeting.link.close(
                    Close::Failed,
                    "a connection begins with Offer, Resume, Commit, Abort or a dry run",
                );
            }
        }
    }

    fn offered(&mut self, offer: Offer, greeting: Greeting) {
        if let Some(earlier) = self.earlier_attempt(&offer, &greeting) {
            let mail = earlier.mail.clone();
            return self.supersede(mail, greeting);
        }
        let refusal = self.refusal(&offer);
        if let Some(reason) = refusal {
            tracing::warn!(source = %greeting.link.address(), reason, "a VM was offered and refused");
            return self.answer(greeting, Some(Message::Refuse(reason.to_owned())));
        }
        let (mail, receiver) = mpsc::channel(limits::COMMANDS_BOUND);
        match Arrival::new(offer, greeting, self.shared.clone(), receiver) {
            Ok(arrival) => {
                let (migration, vm, source) = (arrival.migration(), arrival.vm(), arrival.source());
                tracing::info!(?migration, %source, "a VM is arriving");
                self.current =
                    Some(Current { migration, vm, source, mail, task: tokio::spawn(arrival.run()) });
            }
            Err(error) => {
                self.shared.status.send_modify(|status| status.last_failure = Some(error.to_string()))
            }
        }
    }

    /// An attempt of the same source to move the same VM, which ends with a new offer: its source owns the VM.
    fn earlier_attempt(&self, offer: &Offer, greeting: &Greeting) -> Option<&Current> {
        let same = |current: &&Current| current.vm == offer.vm && current.source == greeting.link.peer();
        let alive = self.current.as_ref().filter(same).filter(|current| !current.mail.is_closed());
        alive.filter(|_| !greeting.waited && self.shared.machine.borrow().is_none())
    }

    /// Ends an earlier attempt, and looks at the offer again when that is over.
    fn supersede(&mut self, mail: mpsc::Sender<Mail>, mut greeting: Greeting) {
        greeting.waited = true;
        let greetings = self.greetings.0.clone();
        self.errands.spawn(async move {
            let ending = async {
                if mail.send(Mail::Superseded).await.is_ok() {
                    mail.closed().await;
                }
            };
            if timeout(limits::SUPERSEDE_TIMEOUT, ending).await.is_err() {
                tracing::warn!("an earlier attempt to move this VM here does not end");
            }
            if greetings.send(greeting).await.is_err() {
                tracing::debug!("the endpoint was closed before the offer was looked at");
            }
        });
    }

    fn refusal(&self, offer: &Offer) -> Option<&'static str> {
        if self.shared.machine.borrow().is_some() {
            return Some("a VM runs here already: one process takes one VM");
        }
        if self.current.as_ref().is_some_and(|current| !current.mail.is_closed()) {
            if self.shared.status.borrow().phase == IncomingPhase::ReceivingCut {
                return Some(
                    "a VM is arriving here whose source is lost and may come back; cancel its migration there, or wait",
                );
            }
            return Some(
                "a VM is arriving here already; if that attempt has failed, try again in a few seconds",
            );
        }
        let ledger = self.shared.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        ledger
            .is_fenced(offer.vm, offer.epoch)
            .then_some("this VM has had a later owner: the source's copy is stale")
    }

    /// A source asks what it would be like to move a VM here.
    fn probed(&mut self, offer: Offer, ids: Vec<ShortId>, greeting: Greeting) {
        let place = Arc::clone(&self.probes).try_acquire_owned();
        match (self.refusal(&offer), place) {
            (Some(reason), _) => self.answer(greeting, Some(Message::Refuse(reason.to_owned()))),
            (None, Err(_)) => {
                let busy = "another dry run is under way there; try again in a few seconds";
                self.answer(greeting, Some(Message::Refuse(busy.to_owned())));
            }
            (None, Ok(place)) => {
                self.errands.spawn(probe::answer(greeting, offer, ids, self.shared.clone(), place));
            }
        }
    }

    /// A source asks what became of a migration, or says that it has given it up.
    fn asked(&mut self, migration: MigrationId, greeting: Greeting, wants_answer: bool) {
        let current = self.current.as_ref().filter(|current| current.migration == migration);
        let greeting = match current {
            Some(current) if current.source != greeting.link.peer() && !is_server(&greeting.first) => {
                tracing::warn!(key = %greeting.link.peer(), "another host speaks of this migration: refused");
                return greeting.link.close(Close::Failed, "this migration is another host's");
            }
            Some(current) => match current.mail.try_send(Mail::Connection(Box::new(greeting))) {
                Ok(()) => return,
                Err(mpsc::error::TrySendError::Full(_)) => {
                    // Dropping the connection makes the source ask again.
                    return tracing::warn!("the arrival has too much mail: the source will ask again");
                }
                Err(mpsc::error::TrySendError::Closed(Mail::Connection(greeting))) => *greeting,
                Err(mpsc::error::TrySendError::Closed(Mail::Superseded | Mail::Resolve { .. })) => return,
            },
            None => greeting,
        };
        if is_server(&greeting.first) {
            let fate = self.shared.ledger.lock().unwrap_or_else(PoisonError::into_inner).look_up(migration);
            let never = fate == Fate::Refused;
            let answer =
                if never { Message::NotRunning { migration } } else { Message::Unknown { migration } };
            return self.answer(greeting, Some(answer));
        }
        let answer = wants_answer.then(|| {
            let fate = self.shared.ledger.lock().unwrap_or_else(PoisonError::into_inner).answer(migration);
            match fate {
                Fate::Ran(_) => Message::Running { migration, stats: DestinationStats::default() },
                Fate::Refused => Message::NotRunning { migration },
                Fate::Unknown => Message::Unknown { migration },
            }
        });
        self.answer(greeting, answer);
    }

    /// Says one thing, or nothing, and closes.
    fn answer(&mut self, greeting: Greeting, message: Option<Message>) {
        self.errands.spawn(say(greeting, message));
    }
}

/// Says one thing, or nothing, and closes.
pub(super) async fn say(greeting: Greeting, message: Option<Message>) {
    let Greeting { link, mut channels, .. } = greeting;
    if let Some(message) = message {
        let saying = async {
            channels.control.send(wire::encode(&message).into()).await?;
            channels.control.flush().await
        };
        match timeout(limits::CLOSE_TIMEOUT, saying).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "the answer was not heard"),
            Err(_) => tracing::debug!("the answer was not acknowledged in time"),
        }
    }
    link.close(Close::Done, "answered");
}

/// Whether somebody brings a spill file: any host whose key is authorised may.
pub(super) fn is_server(first: &Message) -> bool {
    matches!(first, Message::Serve { .. })
}

/// Finishes a handshake and waits for the first message.
async fn greet(
    handshake: Handshake,
    greetings: mpsc::Sender<Greeting>,
    status: watch::Sender<IncomingStatus>,
) {
    let greeting = async {
        let link = handshake.finish().await?;
        let mut channels = channel::open_destination(&link).await?;
        let silent = || MigrateError::ConnectionLost {
            address: link.address(),
            why: "it did not say what it is about".into(),
        };
        let first =
            timeout(limits::CONNECT_TIMEOUT, channels.control_in.next()).await.map_err(|_| silent())??;
        let first = wire::decode(&first.ok_or_else(silent)?)
            .map_err(|e| MigrateError::Frame { channel: "control", why: e.to_string().into() })?;
        Ok::<_, MigrateError>(Greeting { link, channels, first, waited: false })
    };
    match greeting.await {
        Ok(greeting) => {
            if greetings.send(greeting).await.is_err() {
                tracing::debug!("the endpoint was closed before the connection was looked at");
            }
        }
        Err(error) => {
            tracing::warn!(%error, "a connection came to nothing");
            status.send_modify(|status| {
                if status.phase == IncomingPhase::Listening {
                    status.last_failure = Some(error.to_string());
                }
            });
        }
    }
}

/// The address that a ticket names: the one listened on, or, where that is any, the one that this host's default route leaves from.
pub(super) fn reachable(bound: SocketAddr) -> SocketAddr {
    if !bound.ip().is_unspecified() {
        return bound;
    }
    // TEST-NET-1 (RFC 5737) and the documentation prefix (RFC 3849): connecting a UDP socket looks up a route and sends nothing.
    let (any, far) =
        if bound.is_ipv4() { ("0.0.0.0:0", "192.0.2.1:9") } else { ("[::]:0", "[2001:db8::1]:9") };
    let local = UdpSocket::bind(any).and_then(|socket| {
        socket.connect(far)?;
        socket.local_addr()
    });
    match local {
        Ok(local) => SocketAddr::new(local.ip(), bound.port()),
        Err(error) => {
            tracing::warn!(%error, "this host has no default route: put a reachable address into the ticket by hand");
            bound
        }
    }
}

/// What [`Shared`] begins with.
pub(super) fn ledger() -> Arc<Mutex<migration_proto::switchover::Ledger>> {
    Arc::default()
}
