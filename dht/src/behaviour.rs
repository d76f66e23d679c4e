//! What this peer speaks with the other peers of its site, and the transport below it.
//!
//! TCP, then TLS with the peers' own keys, then a proof of the site's key, then Yamux: see [`crate::secure`].

use std::{io, num::NonZeroUsize, sync::Arc};

use libp2p::{
    PeerId, StreamProtocol, Swarm, Transport,
    connection_limits::{self, ConnectionLimits},
    core::{
        muxing::StreamMuxerBox,
        transport::{Boxed, timeout::TransportTimeout},
        upgrade::Version,
    },
    identify,
    identity::Keypair,
    kad, ping,
    request_response::{self, ProtocolSupport},
    swarm::{self, NetworkBehaviour},
    tcp,
};
use page::DomainId;

use crate::{
    config::NodeConfig,
    error::NodeError,
    identity::SiteKey,
    limits::{
        CONNECTIONS_PER_PEER, IDLE_CONNECTION, INBOUND_STREAMS, KAD_RECORDS, PENDING_CONNECTIONS, PING_EVERY,
        PING_TIMEOUT, REQUEST_TIMEOUT, UPGRADE_TIMEOUT,
    },
    proof::End,
    secure::Secure,
    wire::{IndexRequest, IndexResponse, MessageCodec, PagesRequest, PagesResponse},
};

pub(crate) type Index = request_response::Behaviour<MessageCodec<IndexRequest, IndexResponse>>;
pub(crate) type Pages = request_response::Behaviour<MessageCodec<PagesRequest, PagesResponse>>;

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
    pub(crate) pages: Pages,
}

/// The site's protocol names.
#[derive(Clone, Debug)]
pub(crate) struct Protocols {
    pub(crate) kad: StreamProtocol,
    pub(crate) index: StreamProtocol,
    pub(crate) pages: StreamProtocol,
}

impl Protocols {
    pub(crate) fn new(site: &SiteKey, domain: DomainId) -> Self {
        let (site, domain) = (site.fingerprint(), hex::encode(domain.0));
        let name = |rest: String| {
            StreamProtocol::try_from_owned(format!("/tern/{site}/{rest}")).expect("it starts with a slash")
        };
        Self {
            kad: name("kad/1".to_owned()),
            index: name(format!("{domain}/index/3")),
            pages: name(format!("{domain}/pages/1")),
        }
    }
}

/// A swarm that does not listen yet.
pub(crate) fn swarm(config: &NodeConfig) -> Result<(Swarm<Behaviour>, Protocols), NodeError> {
    let protocols = Protocols::new(&config.site_key, config.domain.id());
    let transport = transport(&config.identity, &config.site_key)?;
    let behaviour = behaviour(config, &protocols);
    let me = PeerId::from(config.identity.public());
    let limits = swarm::Config::with_tokio_executor()
        .with_idle_connection_timeout(IDLE_CONNECTION)
        // Each stream has one protocol on offer: the request goes along with its name and does not wait for the echo.
        .with_substream_upgrade_protocol_override(Version::V1Lazy);
    let swarm = Swarm::new(transport, behaviour, me, limits);
    Ok((swarm, protocols))
}

/// No TCP connection. libp2p's wrappers show the sources of an error and hide the error itself, so the cause is a source here.
#[derive(Debug, thiserror::Error)]
#[error("no connection")]
struct Unreachable(#[source] io::Error);

pub(crate) fn transport(
    identity: &Keypair,
    site: &SiteKey,
) -> Result<Boxed<(PeerId, StreamMuxerBox)>, NodeError> {
    let secure = Arc::new(Secure::new(identity, site)?);
    let tcp = tcp::tokio::Transport::new(tcp::Config::default().nodelay(true));
    let secured = tcp.map_err(Unreachable).and_then(move |socket, point| {
        let end = if point.is_dialer() { End::Dialer } else { End::Listener };
        secure.upgrade(socket, end)
    });
    Ok(TransportTimeout::new(secured, UPGRADE_TIMEOUT).boxed())
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
    let requests = || {
        request_response::Config::default()
            .with_request_timeout(REQUEST_TIMEOUT)
            .with_max_concurrent_streams(INBOUND_STREAMS)
    };
    let full = |protocol: &StreamProtocol| [(protocol.clone(), ProtocolSupport::Full)];
    Behaviour {
        limits: connection_limits::Behaviour::new(limits),
        identify: identify::Behaviour::new(identify),
        ping: ping::Behaviour::new(ping::Config::new().with_interval(PING_EVERY).with_timeout(PING_TIMEOUT)),
        kad,
        index: Index::new(full(&protocols.index), requests()),
        pages: Pages::new(full(&protocols.pages), requests()),
    }
}
