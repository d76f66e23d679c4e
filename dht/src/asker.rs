//! A node that asks a site's peers without being one of them, over the same transport.
//!
//! It is there to compare: the page index on one side, Kademlia's provider records, one query or record a name, on the other, asked of the same
//! peers by the same process (`bench`, `lookup-rate`). It announces no protocol that would make it a member.

use std::sync::Arc;

use libp2p::{
    PeerId, StreamProtocol, Swarm, identify,
    identity::Keypair,
    kad, ping,
    request_response::{self, ProtocolSupport},
    swarm,
};
use page::DomainId;

pub use self::protocols::{Asker, AskerEvent};
use crate::{
    behaviour::{Index, Protocols, transport},
    error::NodeError,
    identity::SiteKey,
    limits::{IDLE_CONNECTION, REQUEST_TIMEOUT},
    secure::Secure,
};

mod protocols {
    #![expect(
        missing_docs,
        missing_debug_implementations,
        reason = "libp2p's derive makes an enum without docs, and its behaviours have no Debug"
    )]

    use libp2p::{identify, kad, ping, request_response, swarm::NetworkBehaviour};

    use crate::wire::{IndexRequest, IndexResponse, MessageCodec};

    /// What an asking node speaks.
    #[derive(NetworkBehaviour)]
    pub struct Asker {
        pub(super) identify: identify::Behaviour,
        pub(super) ping: ping::Behaviour,
        /// Kademlia, as a client.
        pub kad: kad::Behaviour<kad::store::MemoryStore>,
        /// The page index.
        pub index: request_response::Behaviour<MessageCodec<IndexRequest, IndexResponse>>,
    }
}

/// A swarm that asks the peers of `site` in `domain` and keeps up to `records` provider records of its own. Dial peers, or give Kademlia
/// their addresses.
///
/// # Errors
/// [`NodeError`] if the identity cannot be used.
pub fn asker(
    identity: &Keypair,
    site: &SiteKey,
    domain: DomainId,
    records: usize,
) -> Result<Swarm<Asker>, NodeError> {
    let protocols = Protocols::new(site, domain);
    let me = PeerId::from(identity.public());
    let store = kad::store::MemoryStoreConfig {
        max_provided_keys: records,
        ..kad::store::MemoryStoreConfig::default()
    };
    let mut config = kad::Config::new(protocols.kad.clone());
    config.set_periodic_bootstrap_interval(None);
    let mut kad = kad::Behaviour::with_config(me, kad::store::MemoryStore::with_config(me, store), config);
    kad.set_mode(Some(kad::Mode::Client));
    let asks = |protocol: &StreamProtocol| [(protocol.clone(), ProtocolSupport::Outbound)];
    let requests = request_response::Config::default().with_request_timeout(REQUEST_TIMEOUT);
    let behaviour = Asker {
        identify: identify::Behaviour::new(identify::Config::new("tern/1".to_owned(), identity.public())),
        ping: ping::Behaviour::default(),
        kad,
        index: Index::new(asks(&protocols.index), requests),
    };
    let limits = swarm::Config::with_tokio_executor().with_idle_connection_timeout(IDLE_CONNECTION);
    let secure = Arc::new(Secure::new(identity, site, None)?);
    Ok(Swarm::new(transport(secure), behaviour, me, limits))
}
