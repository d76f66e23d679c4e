//! The one task that owns the swarm: it makes connections, keeps the membership, and carries requests and responses.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    error::Error,
    io,
    sync::Arc,
    time::Instant,
};

use futures::StreamExt;
use libp2p::{
    Multiaddr, PeerId, Swarm,
    core::ConnectedPoint,
    identify, kad,
    multiaddr::Protocol,
    ping,
    request_response::{self, InboundFailure, Message, OutboundRequestId, ResponseChannel},
    swarm::{ConnectionId, DialError, ListenError, SwarmEvent, dial_opts::DialOpts},
};
use thiserror::Error;
use tokio::sync::{mpsc, oneshot};

use crate::{
    behaviour::{Behaviour, BehaviourEvent, Protocols},
    config::NodeConfig,
    connections::member,
    error::NodeError,
    estimate::SizeEstimate,
    gone,
    joins::plain,
    known::bare,
    limits::{DOMAIN_SHORT, HANDSHAKE_LOG_EVERY, REJOIN_EVERY},
    mesh::{Mesh, Refresh},
    node::Peer,
    page_client::socket_address,
    refusal::{Refusal, chain, root},
    requests::{Ask, RequestId},
    seldom::Seldom,
    shard::{MemberId, ShardId},
    status::How,
    wire::{IndexRequest, IndexResponse},
};

/// Why a request to another peer brought no answer.
#[derive(Debug, Error)]
pub(crate) enum RequestError {
    #[error("the request failed")]
    Failed(#[from] request_response::OutboundFailure),
    #[error("the peer is shutting down")]
    Stopping,
}

type Reply<R> = oneshot::Sender<Result<R, RequestError>>;

/// What the network task is asked to do.
pub(crate) enum Command {
    Index {
        peer: PeerId,
        request: IndexRequest,
        reply: Reply<IndexResponse>,
    },
    /// A connection for pages could not be made: see whether the peer is still there.
    LookAfter {
        peer: PeerId,
    },
    /// Get to know a peer that was heard of; the reply comes when it is a member, and is dropped if it cannot be reached.
    Meet {
        peer: PeerId,
        address: Multiaddr,
        reply: oneshot::Sender<()>,
    },
    RespondIndex {
        channel: ResponseChannel<IndexResponse>,
        response: IndexResponse,
    },
}

/// A handle to the network task.
#[derive(Clone, Debug)]
pub(crate) struct Network {
    pub(crate) commands: mpsc::Sender<Command>,
}

impl Network {
    pub(crate) async fn index(
        &self,
        peer: PeerId,
        request: IndexRequest,
    ) -> Result<IndexResponse, RequestError> {
        let (reply, answer) = oneshot::channel();
        let sent = self.commands.send(Command::Index { peer, request, reply }).await;
        sent.map_err(|_| RequestError::Stopping)?;
        answer.await.map_err(|_| RequestError::Stopping)?
    }

    /// A peer could not be reached, though the network task may be connected to it: one that is not is dialled, and is no member any more if it
    /// does not answer.
    pub(crate) async fn look_after(&self, peer: PeerId) {
        if self.commands.send(Command::LookAfter { peer }).await.is_err() {
            tracing::debug!(%peer, "a peer could not be reached after the network task had ended");
        }
    }

    /// Waits until a peer that was heard of is a member; `false` if it cannot be reached.
    pub(crate) async fn meet(&self, peer: PeerId, address: Multiaddr) -> bool {
        let (reply, met) = oneshot::channel();
        self.commands.send(Command::Meet { peer, address, reply }).await.is_ok() && met.await.is_ok()
    }

    /// Sends a response; one that cannot be sent any more is the asker's time-out.
    pub(crate) async fn respond(&self, channel: ResponseChannel<IndexResponse>, response: IndexResponse) {
        if self.commands.send(Command::RespondIndex { channel, response }).await.is_err() {
            tracing::debug!("a response was ready after the network task had ended");
        }
    }
}

/// The network task's state.
pub(crate) struct Driver {
    pub(crate) swarm: Swarm<Behaviour>,
    protocols: Protocols,
    pub(crate) peer: Arc<Peer>,
    pub(crate) me: MemberId,
    index_replies: HashMap<OutboundRequestId, Reply<IndexResponse>>,
    /// Peers of other domains that were told of.
    foreign: Seldom<MemberId>,
    /// Peers in two places that were told of.
    doubled: Seldom<MemberId>,
    /// New identities that were told of.
    renamed: Seldom<(Multiaddr, PeerId)>,
    last_refusal_logged: Option<Instant>,
    pub(crate) mesh: Mesh,
    /// The members to stay connected to, by the membership's version.
    pub(crate) kept: BTreeSet<MemberId>,
    pub(crate) version: Option<u64>,
    /// Everyone is to be connected to everyone.
    pub(crate) full: bool,
    /// Connections that this end is letting go.
    pub(crate) closing: BTreeSet<MemberId>,
    /// Who waits for which peer to be known.
    pub(crate) meetings: BTreeMap<MemberId, Vec<oneshot::Sender<()>>>,
    pub(crate) refresh: Refresh,
    pub(crate) estimate: SizeEstimate,
    /// Kademlia's searches for the closest peers to shards.
    pub(crate) queries: HashMap<kad::QueryId, ShardId>,
    /// When the last of them began.
    pub(crate) asked: Instant,
    pub(crate) bootstrapped: Instant,
}

impl Driver {
    pub(crate) fn new(
        swarm: Swarm<Behaviour>,
        protocols: Protocols,
        peer: Arc<Peer>,
        config: &NodeConfig,
    ) -> Self {
        let (me, now) = (member(swarm.local_peer_id()), Instant::now());
        Self {
            swarm,
            protocols,
            peer,
            me,
            index_replies: HashMap::new(),
            foreign: Seldom::default(),
            doubled: Seldom::default(),
            renamed: Seldom::default(),
            last_refusal_logged: None,
            mesh: Mesh::new(me, config.mesh),
            kept: BTreeSet::new(),
            version: None,
            full: true,
            closing: BTreeSet::new(),
            meetings: BTreeMap::new(),
            refresh: Refresh::new(me, now),
            estimate: SizeEstimate::default(),
            queries: HashMap::new(),
            asked: now,
            bootstrapped: now,
        }
    }

    /// Listens; returns the first address, with this peer's identity, as `--join` takes it.
    pub(crate) async fn listen(&mut self, address: Multiaddr) -> Result<Multiaddr, NodeError> {
        not_in_use(&address)?;
        let listener =
            self.swarm.listen_on(address.clone()).map_err(|error| cannot_listen(&address, &error))?;
        loop {
            match self.swarm.select_next_some().await {
                SwarmEvent::NewListenAddr { listener_id, address } if listener_id == listener => {
                    self.peer.listening(self.full(&address).to_string());
                    return Ok(self.full(&address));
                }
                SwarmEvent::ListenerClosed { listener_id, reason, .. } if listener_id == listener => {
                    return Err(NodeError::ListenerEnded { source: reason.err() });
                }
                event => self.on_event(event),
            }
        }
    }

    fn full(&self, address: &Multiaddr) -> Multiaddr {
        address.clone().with(Protocol::P2p(*self.swarm.local_peer_id()))
    }

    /// Runs until all handles are gone or the listener ends.
    pub(crate) async fn run(mut self, mut commands: mpsc::Receiver<Command>) -> Result<(), NodeError> {
        let mut ticks = tokio::time::interval(REJOIN_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                event = self.swarm.select_next_some() => match event {
                    SwarmEvent::ListenerClosed { reason, .. } => {
                        return Err(NodeError::ListenerEnded { source: reason.err() });
                    }
                    event => self.on_event(event),
                },
                command = commands.recv() => match command {
                    Some(command) => self.on_command(command),
                    None => return Ok(()),
                },
                _ = ticks.tick() => self.keep_connections(),
            }
        }
    }

    /// Dials the peers to join by that are not members.
    pub(crate) fn rejoin(&mut self) {
        let present =
            |peer: &PeerId| self.swarm.is_connected(peer) || self.peer.site().contains(member(peer));
        let due = self.peer.joins().due(present);
        for (address, peer) in due {
            // The swarm does not dial what it listens on itself, and does not say so.
            if self.swarm.listeners().any(|own| *own == bare(&address)) {
                self.own(&address);
                continue;
            }
            let dial = match peer {
                Some(peer) => DialOpts::peer_id(peer).addresses(vec![bare(&address)]).build(),
                None => DialOpts::unknown_peer_id().address(address.clone()).build(),
            };
            if let Err(error) = self.swarm.dial(dial) {
                // A dial is under way already, or the limits say no: both pass.
                tracing::debug!(%address, %error, "not dialled");
            }
        }
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Index { peer, request, reply } => {
                let addresses = self.about_to_ask(&peer);
                let index = &mut self.swarm.behaviour_mut().index;
                let id = index.send_request_with_addresses(&peer, request, addresses);
                self.index_replies.insert(id, reply);
            }
            Command::LookAfter { peer } => {
                if !self.mesh.is_connected(member(&peer)) {
                    self.dial(peer);
                }
            }
            Command::Meet { peer, address, reply } => self.meet(peer, address, reply),
            // A response that comes too late was the asker's time-out already.
            Command::RespondIndex { channel, response } => {
                if self.swarm.behaviour_mut().index.send_response(channel, response).is_err() {
                    tracing::debug!("an index response came too late");
                }
            }
        }
    }

    fn on_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::Behaviour(event) => self.on_behaviour(event),
            SwarmEvent::NewListenAddr { address, .. } => {
                self.peer.listening(self.full(&address).to_string());
            }
            SwarmEvent::ConnectionEstablished { peer_id, endpoint, .. } => {
                tracing::debug!(%peer_id, ?endpoint, "connected");
                if let ConnectedPoint::Dialer { address, .. } = &endpoint {
                    self.answered(address, peer_id);
                }
                self.on_connected(peer_id, &endpoint);
            }
            SwarmEvent::ConnectionClosed { peer_id, connection_id, num_established: 1.., .. } => {
                self.peer.closed_one(&peer_id, connection_id);
            }
            SwarmEvent::ConnectionClosed { peer_id, num_established: 0, cause, .. } => {
                tracing::debug!(%peer_id, ?cause, "disconnected");
                self.on_disconnected(peer_id, gone::how(cause.as_ref()));
            }
            SwarmEvent::IncomingConnectionError { error: ListenError::Denied { cause }, .. } => {
                self.peer.counters.connection_over_limit();
                tracing::debug!(%cause, "a connection was refused");
            }
            // This very peer, which joins by its own address: the dial says so.
            SwarmEvent::IncomingConnectionError { error: ListenError::LocalPeerId { .. }, .. } => {}
            SwarmEvent::IncomingConnectionError { send_back_addr, error, .. } => {
                self.not_made("incoming", &send_back_addr, &error);
            }
            SwarmEvent::OutgoingConnectionError { peer_id, error, .. } => self.on_dial_error(peer_id, &error),
            SwarmEvent::ListenerError { error, .. } => {
                tracing::warn!(%error, "the listener had an error");
            }
            other => tracing::trace!(?other, "swarm"),
        }
    }

    /// A dialled address answered.
    fn answered(&mut self, address: &Multiaddr, peer: PeerId) {
        if self.peer.joins().answered(address, peer) {
            tracing::info!(address = plain(address), %peer, "a peer to join by answers now");
        }
    }

    /// A dialled address is this very peer's.
    fn own(&mut self, address: &Multiaddr) {
        if self.peer.joins().myself(address) {
            let address = plain(address);
            tracing::info!(address, "--join names this very peer's address; it is not dialled");
        }
    }

    /// A dialled address did not answer, or not as a peer of this site.
    fn not_answered(&mut self, address: &Multiaddr, error: &(dyn Error + 'static)) {
        self.not_made("outgoing", address, error);
        let error = root(error);
        if self.peer.joins().failed(address, &error, Instant::now()) {
            let address = plain(address);
            tracing::warn!(
                address,
                error,
                "a peer to join by does not answer; it is dialled again and again"
            );
        }
    }

    fn on_dial_error(&mut self, peer: Option<PeerId>, error: &DialError) {
        match error {
            DialError::LocalPeerId { address } => self.own(address),
            DialError::WrongPeerId { obtained, address } => {
                if self.renamed.say((bare(address), *obtained), Instant::now()) {
                    tracing::info!(address = plain(address), %obtained, "a peer has a new identity");
                }
                self.answered(address, *obtained);
            }
            DialError::Transport(failures) => {
                for (address, failure) in failures {
                    self.not_answered(address, failure);
                }
            }
            other => tracing::debug!(?peer, error = %other, "not connected"),
        }
        if let Some(peer) = peer {
            self.not_dialled(peer, error);
        }
        // A dead peer that was joined by under an identity may come back under another one.
        if let Some(peer) = peer {
            self.peer.joins().lost(peer);
        }
    }

    /// A connection failed before both ends were authenticated, if it is a failure.
    fn not_made(&mut self, direction: &str, address: &Multiaddr, error: &(dyn Error + 'static)) {
        match Refusal::of(error) {
            Refusal::ForPages => {}
            Refusal::Unreachable => tracing::debug!(%address, error = chain(error), "nobody answers there"),
            Refusal::Stranger => self.refused(direction, address, error),
            Refusal::Broken => {
                self.peer.counters.broken_connection();
                tracing::debug!(
                    direction,
                    %address,
                    error = chain(error),
                    "a connection broke, or took too long, before it was authenticated: the other end is frozen, gone or slow"
                );
            }
        }
    }

    /// The other end is not of this site.
    fn refused(&mut self, direction: &str, address: &Multiaddr, error: &(dyn Error + 'static)) {
        self.peer.counters.refused_connection();
        let now = Instant::now();
        let quiet = |at: Instant| now.saturating_duration_since(at) < HANDSHAKE_LOG_EVERY;
        if self.last_refusal_logged.is_some_and(quiet) {
            return;
        }
        self.last_refusal_logged = Some(now);
        tracing::warn!(
            direction,
            %address,
            error = chain(error),
            "a connection failed before it was authenticated: the other end has a different site key, or is not a peer of a site"
        );
    }

    fn on_behaviour(&mut self, event: BehaviourEvent) {
        match event {
            BehaviourEvent::Identify(identify::Event::Received { connection_id, peer_id, info }) => {
                self.identified(peer_id, connection_id, &info);
            }
            BehaviourEvent::Identify(other) => tracing::trace!(?other, "identify"),
            BehaviourEvent::Ping(ping::Event { peer, result: Err(error), .. }) => {
                tracing::info!(%peer, address = %self.peer.address_of(&peer), %error, "a peer does not answer its ping; closing the connection");
                let late = matches!(error, ping::Failure::Timeout);
                self.lose(peer, if late { How::TimedOut } else { How::Reset });
                // An error says that it is closed already.
                let _ = self.swarm.disconnect_peer_id(peer);
            }
            BehaviourEvent::Ping(ping::Event { result: Ok(_), .. }) => {}
            BehaviourEvent::Kad(event) => self.on_kademlia(event),
            BehaviourEvent::Index(event) => self.on_index(event),
        }
    }

    /// A peer said what it speaks: if that is this site's index in this domain, it is a member.
    fn identified(&mut self, peer: PeerId, connection: ConnectionId, info: &identify::Info) {
        if let Some(other) = self.peer.said_otherwise(&peer, connection, &info.listen_addrs)
            && self.doubled.say(member(&peer), Instant::now())
        {
            tracing::warn!(
                %peer,
                listens = ?info.listen_addrs,
                and = ?other,
                "a peer is in two places at once: two hosts use the same --identity file; give each its own"
            );
        }
        let speaks: HashSet<_> = info.protocols.iter().collect();
        let addresses = self.peer.listens(peer, &info.listen_addrs);
        if speaks.contains(&self.protocols.kad) {
            for address in addresses {
                self.swarm.behaviour_mut().kad.add_address(&peer, address);
            }
        }
        if speaks.contains(&self.protocols.index) {
            self.met(peer);
        } else {
            self.meetings.remove(&member(&peer));
            self.not_a_member(peer, info);
        }
    }

    /// A peer of this site does not speak this peer's index.
    fn not_a_member(&mut self, peer: PeerId, info: &identify::Info) {
        if !self.foreign.say(member(&peer), Instant::now()) {
            return;
        }
        let address = self.peer.address_of(&peer);
        let short = |domain: &str| domain.chars().take(DOMAIN_SHORT).collect::<String>();
        let ours = hex::encode(self.peer.domain().id().0);
        match self.protocols.domain(&info.protocols) {
            Some(theirs) if theirs != ours => tracing::warn!(
                %peer,
                %address,
                its_domain = short(theirs),
                this_domain = short(&ours),
                "a peer of this site is in another dedup domain, and no pages are shared with it: start it with the same --domain-key"
            ),
            Some(_) | None => tracing::warn!(
                %peer,
                %address,
                its_version = info.agent_version,
                "a peer of this site speaks another version of the index, and no pages are shared with it: update it or this one"
            ),
        }
    }

    fn on_index(&mut self, event: request_response::Event<IndexRequest, IndexResponse>) {
        use request_response::Event;
        match event {
            Event::Message { peer, message: Message::Request { request_id, request, channel }, .. } => {
                self.mesh.began(member(&peer), Instant::now());
                let ask = Ask::Index { request, channel };
                self.peer.requested(peer, RequestId::Index(request_id), ask);
            }
            Event::Message { peer, message: Message::Response { request_id, response }, .. } => {
                self.mesh.ended(member(&peer), Instant::now());
                reply(&mut self.index_replies, request_id, Ok(response));
            }
            Event::OutboundFailure { peer, request_id, error, .. } => {
                self.mesh.ended(member(&peer), Instant::now());
                reply(&mut self.index_replies, request_id, Err(error.into()));
            }
            Event::InboundFailure { peer, request_id, error, .. } => {
                self.inbound_failed(peer, &error);
                self.peer.request_ended(RequestId::Index(request_id));
            }
            Event::ResponseSent { peer, request_id, .. } => {
                self.mesh.ended(member(&peer), Instant::now());
                self.peer.request_ended(RequestId::Index(request_id));
            }
        }
    }

    /// A request is about to be made, on a connection that may have to be made first: the addresses for that.
    fn about_to_ask(&mut self, peer: &PeerId) -> Vec<Multiaddr> {
        self.mesh.began(member(peer), Instant::now());
        self.addresses(peer)
    }

    fn inbound_failed(&mut self, peer: PeerId, error: &InboundFailure) {
        self.mesh.ended(member(&peer), Instant::now());
        if matches!(error, InboundFailure::Io(error) if error.kind() == io::ErrorKind::InvalidData) {
            self.peer.counters.malformed_request();
        }
        tracing::debug!(%peer, %error, "a request of another peer failed");
    }
}

/// Says why in one sentence: libp2p's error is a chain of wrappers without words around the system's.
fn cannot_listen(address: &Multiaddr, error: &(dyn std::error::Error + 'static)) -> NodeError {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    let code = cause.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
    let source = code.map_or_else(|| io::Error::other(cause.to_string()), io::Error::from_raw_os_error);
    let address = socket_address(address).map_or_else(|| address.to_string(), |address| address.to_string());
    match source.kind() {
        io::ErrorKind::AddrNotAvailable => NodeError::ListenElsewhere { address },
        _ => NodeError::Listen { address, source },
    }
}

/// libp2p's listeners share their port (SO_REUSEPORT), so a second peer at one address would take half of the first one's connections.
/// A listener that does not share finds out.
fn not_in_use(address: &Multiaddr) -> Result<(), NodeError> {
    // Not an address over TCP: libp2p says so.
    let Some(over_tcp) = socket_address(address) else { return Ok(()) };
    match std::net::TcpListener::bind(over_tcp) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            Err(NodeError::ListenInUse { address: address.clone() })
        }
        // Any other error libp2p will have as well, and say.
        Ok(_) | Err(_) => Ok(()),
    }
}

fn reply<R>(
    replies: &mut HashMap<OutboundRequestId, Reply<R>>,
    id: OutboundRequestId,
    result: Result<R, RequestError>,
) {
    // Whoever asked may have given up meanwhile; then there is nobody to tell.
    let _ = replies.remove(&id).map(|reply| reply.send(result));
}
