//! What a peer is started with.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use libp2p::{Multiaddr, identity::Keypair, multiaddr::Protocol};
use page::Domain;

use crate::{error::NodeError, identity::SiteKey};

/// The configuration of a peer.
#[derive(Debug)]
pub struct NodeConfig {
    /// The site's key.
    pub site_key: SiteKey,
    /// The dedup domain.
    pub domain: Domain,
    /// The peer's own key.
    pub identity: Keypair,
    /// Where to listen for the site's other peers.
    pub listen: Multiaddr,
    /// Peers to join the site by.
    pub join: Vec<Multiaddr>,
    /// The local socket.
    pub local: PathBuf,
    /// A misbehaviour, for testing a site's tolerance.
    pub fault: Option<Fault>,
}

/// How a peer misbehaves towards others that ask it for pages; its own host is served rightly.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// Serves wrong bytes for every page.
    WrongBytes,
    /// Takes requests for pages and never answers them.
    Silent,
    /// Answers requests for pages this much later.
    Slow(Duration),
}

/// Reads `wrong-bytes`, `silent` or `slow=MILLISECONDS`.
///
/// # Errors
/// A text that says what is allowed.
pub fn parse_fault(text: &str) -> Result<Fault, String> {
    match (text, text.strip_prefix("slow=").map(str::parse)) {
        ("wrong-bytes", _) => Ok(Fault::WrongBytes),
        ("silent", _) => Ok(Fault::Silent),
        (_, Some(Ok(ms))) => Ok(Fault::Slow(Duration::from_millis(ms))),
        (_, Some(Err(_)) | None) => Err("give wrong-bytes, silent or slow=MILLISECONDS".to_owned()),
    }
}

/// Reads IP:PORT or a multiaddr over TCP, with or without the peer's identity at the end.
///
/// # Errors
/// [`NodeError::Address`].
pub fn parse_address(text: &str) -> Result<Multiaddr, NodeError> {
    let bad = || NodeError::Address { text: text.to_owned() };
    if let Ok(address) = text.parse::<SocketAddr>() {
        let host = match address.ip() {
            IpAddr::V4(ip) => Protocol::Ip4(ip),
            IpAddr::V6(ip) => Protocol::Ip6(ip),
        };
        return Ok(Multiaddr::empty().with(host).with(Protocol::Tcp(address.port())));
    }
    let address: Multiaddr = text.parse().map_err(|_| bad())?;
    let mut parts = address.iter();
    let over_tcp = matches!(
        (parts.next(), parts.next(), parts.next(), parts.next()),
        (
            Some(Protocol::Ip4(_) | Protocol::Ip6(_)),
            Some(Protocol::Tcp(_)),
            None | Some(Protocol::P2p(_)),
            None
        )
    );
    if over_tcp { Ok(address) } else { Err(bad()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_come_as_socket_addresses_and_multiaddrs() {
        assert_eq!(parse_address("127.0.0.1:4160").unwrap().to_string(), "/ip4/127.0.0.1/tcp/4160");
        assert_eq!(parse_address("[::1]:0").unwrap().to_string(), "/ip6/::1/tcp/0");
        let full = "/ip4/10.0.0.1/tcp/4160/p2p/12D3KooWPjceQrSwdWXPyLLeABRXmuqt69Rg3sBYbU1Nft9HyQ6X";
        assert_eq!(parse_address(full).unwrap().to_string(), full);
        for text in ["", "4160", "host:1", "/ip4/1.2.3.4", "/ip4/1.2.3.4/udp/1", "/ip4/1.2.3.4/tcp/1/ws"] {
            assert!(matches!(parse_address(text), Err(NodeError::Address { .. })), "{text:?}");
        }
    }

    #[test]
    fn faults_are_read() {
        assert_eq!(parse_fault("slow=5"), Ok(Fault::Slow(Duration::from_millis(5))));
        assert_eq!(parse_fault("wrong-bytes"), Ok(Fault::WrongBytes));
        assert!(parse_fault("slow=x").is_err() && parse_fault("fast").is_err());
    }
}
