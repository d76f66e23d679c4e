//! What this peer speaks with the other peers of its site, and the transport below it.
//!
//! TCP, then TLS with the peers' own keys, then a proof of the site's key, then Yamux: see [`crate::secure`]. Pages do not travel here but on connections
//! of their own ([`crate::page_connection`]), made to the same address.

use std::{io, num::NonZeroUsize, sync::Arc};

use futures::TryFutureExt;
use libp2p::{
    PeerId, StreamProtocol, Swarm, Transport,
    connection_limits::{self, ConnectionLimits},
    core::{
        muxing::StreamMuxerBox,
        transport::{Boxed, timeout::TransportTimeout},
        upgrade::Version,
    },
    identify, kad, ping,
    request_response::{self, ProtocolSupport},
    swarm::{self, NetworkBehaviour},
    tcp,
};
use page::DomainId;

use crate::{
    config::NodeConfig,
    identity::SiteKey,
    limits::{
        CONNECTIONS_PER_PEER, IDLE_CONNECTION, INBOUND_STREAMS, KAD_RECORDS, PENDING_CONNECTIONS, PING_EVERY,
        PING_TIMEOUT, REQUEST_TIMEOUT, UPGRADE_TIMEOUT,
    },
    proof::End,
    secure::{Secure, SecureError},
    wire::{IndexRequest, IndexResponse, MessageCodec},
};

pub(crate) type Index = request_response::Behaviour<MessageCodec<IndexRequest, IndexResponse>>;

/// All protocols of a peer.
#[derive(NetworkBehaviour)]
pub(crate) struct Behaviour {
    /// First, so that it refuses a connection before the others hear of it.
    pub(crate) limits: connection_limits::Behaviour,
    pub(crate) identify: identify::Behaviour,
    pub(crate) ping: ping::Behaviour,
    /// Membership and routing. It holds no page's record.
    pub(crate) kad: kad::Behaviour<kad::store::MemoryStore>,
    pub(crate) index: Index,
}

/// The site's protocol names.
#[derive(Clone, Debug)]
pub(crate) struct Protocols {
    pub(crate) kad: StreamProtocol,
    pub(crate) index: StreamProtocol,
}

impl Protocols {
    pub(crate) fn new(site: &SiteKey, domain: DomainId) -> Self {
        let (site, domain) = (site.fingerprint(), hex::encode(domain.0));
        let name = |rest: String| {
            StreamProtocol::try_from_owned(format!("/tern/{site}/{rest}")).expect("it starts with a slash")
        };
        Self { kad: name("kad/1".to_owned()), index: name(format!("{domain}/index/3")) }
    }
}

impl Protocols {
    /// The dedup domain of a peer of this site, in hex, by what it speaks.
    pub(crate) fn domain<'a>(&self, spoken: &'a [StreamProtocol]) -> Option<&'a str> {
        let site = self.kad.as_ref().strip_suffix("kad/1")?;
        let domain = |name: &'a StreamProtocol| {
            let (domain, _version) = name.as_ref().strip_prefix(site)?.split_once("/index/")?;
            Some(domain)
        };
        spoken.iter().find_map(domain)
    }
}

/// A swarm that does not listen yet.
pub(crate) fn swarm(config: &NodeConfig, secure: Arc<Secure>) -> (Swarm<Behaviour>, Protocols) {
    let protocols = Protocols::new(&config.site_key, config.domain.id());
    let transport = transport(secure);
    let behaviour = behaviour(config, &protocols);
    let me = PeerId::from(config.identity.public());
    let limits = swarm::Config::with_tokio_executor()
        .with_idle_connection_timeout(IDLE_CONNECTION)
        // Each stream has one protocol on offer: the request goes along with its name and does not wait for the echo.
        .with_substream_upgrade_protocol_override(Version::V1Lazy);
    (Swarm::new(transport, behaviour, me, limits), protocols)
}

/// No TCP connection. libp2p's wrappers show the sources of an error and hide the error itself, so the cause is a source here.
#[derive(Debug, thiserror::Error)]
#[error("no connection")]
struct Unreachable(#[source] io::Error);

/// No secured connection for the swarm; as [`Unreachable`].
#[derive(Debug, thiserror::Error)]
#[error("not for the swarm")]
struct Unsecured(#[source] SecureError);

pub(crate) fn transport(secure: Arc<Secure>) -> Boxed<(PeerId, StreamMuxerBox)> {
    let tcp = tcp::tokio::Transport::new(tcp::Config::default().nodelay(true));
    let secured = tcp.map_err(Unreachable).and_then(move |socket, point| {
        let end = if point.is_dialer() { End::Dialer } else { End::Listener };
        Arc::clone(&secure).upgrade(socket, end).map_err(Unsecured)
    });
    TransportTimeout::new(secured, UPGRADE_TIMEOUT).boxed()
}

fn behaviour(config: &NodeConfig, protocols: &Protocols) -> Behaviour {
    let identity = &config.identity;
    let me = PeerId::from(identity.public());
    let limits = ConnectionLimits::default()
        .with_max_pending_incoming(Some(PENDING_CONNECTIONS))
        .with_max_pending_outgoing(Some(PENDING_CONNECTIONS))
        .with_max_established(Some(config.mesh.most_connections()))
        .with_max_established_per_peer(Some(CONNECTIONS_PER_PEER));
    let identify = identify::Config::new("tern/1".to_owned(), identity.public())
        .with_agent_version(concat!("tern/", env!("CARGO_PKG_VERSION")).to_owned());
    let store = kad::store::MemoryStoreConfig {
        max_records: KAD_RECORDS,
        max_provided_keys: KAD_RECORDS,
        ..kad::store::MemoryStoreConfig::default()
    };
    let mut kad_config = kad::Config::new(protocols.kad.clone());
    kad_config
        // The network task asks for it, more seldom in a large site.
        .set_periodic_bootstrap_interval(None)
        .set_parallelism(NonZeroUsize::new(3).expect("3 is not 0"));
    let mut kad =
        kad::Behaviour::with_config(me, kad::store::MemoryStore::with_config(me, store), kad_config);
    kad.set_mode(Some(kad::Mode::Server));
    let requests = request_response::Config::default()
        .with_request_timeout(REQUEST_TIMEOUT)
        .with_max_concurrent_streams(INBOUND_STREAMS);
    Behaviour {
        limits: connection_limits::Behaviour::new(limits),
        identify: identify::Behaviour::new(identify),
        ping: ping::Behaviour::new(ping::Config::new().with_interval(PING_EVERY).with_timeout(PING_TIMEOUT)),
        kad,
        index: Index::new([(protocols.index.clone(), ProtocolSupport::Full)], requests),
    }
}
