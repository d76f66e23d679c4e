//! What a peer is started with.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use libp2p::{Multiaddr, identity::Keypair, multiaddr::Protocol};
use page::Domain;

use crate::{
    error::NodeError,
    identity::SiteKey,
    limits::{CONNECTIONS, CONNECTIONS_SPARE, CPU_PERCENT, MESH},
};

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
    /// Files to serve from the start, by their absolute paths.
    pub files: Vec<PathBuf>,
    /// Where memories of VMs that left are kept, if they are.
    pub retention: Option<Retention>,
    /// What the peer may use for itself.
    pub budgets: Budgets,
    /// Where to serve metrics, if at all.
    pub metrics: Option<SocketAddr>,
    /// Names that it keeps as an owner at most: [`OWNER_ENTRIES`](crate::limits::OWNER_ENTRIES), or fewer to have a small site behave as a full one.
    pub owner_entries: usize,
    /// Which connections to other peers are kept.
    pub mesh: MeshLimits,
    /// How long what holders tell this peer as an owner lasts, and by which it renews what it tells others: the same in all of a site.
    pub lease: Duration,
    /// A misbehaviour, for testing a site's tolerance.
    pub fault: Option<Fault>,
}

/// Where checkpoints are retained.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Retention {
    /// The directory, made if absent (the one that it is in is not). One peer uses it at a time.
    pub dir: PathBuf,
    /// Bytes that the checkpoints in it may take, headers and tables included.
    pub budget_bytes: u64,
}

/// What a peer may use for keeping its content and the site's index current; answers to others are not part of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Budgets {
    /// CPU time of all scans, in percent of one core. Without it first scans take what is idle, and later ones a tenth of a core.
    pub cpu_percent: Option<u32>,
    /// Bytes a second that announcements to other peers may take. Without it there is no bound.
    pub lan_bytes_per_second: Option<u64>,
}

/// Reads a CPU budget: a percentage of one core, with or without `%`.
///
/// # Errors
/// A text that says what is allowed.
pub fn parse_percent(text: &str) -> Result<u32, String> {
    let number = text.strip_suffix('%').unwrap_or(text).parse();
    let allowed = number.ok().filter(|percent| (1..=CPU_PERCENT).contains(percent));
    allowed.ok_or_else(|| format!("give a percentage of one core from 1 to {CPU_PERCENT}; 200 are two cores"))
}

/// Reads a number of bytes, more than zero: digits, or digits and `K`, `M`, `G` or `T` (powers of 1024).
///
/// # Errors
/// A text that says what is allowed.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" => Some(0),
        "K" => Some(10),
        "M" => Some(20),
        "G" => Some(30),
        "T" => Some(40),
        _ => None,
    };
    let bytes = shift.and_then(|shift| digits.parse::<u64>().ok()?.checked_mul(1 << shift));
    bytes.filter(|bytes| *bytes > 0).ok_or_else(|| {
        "give a number of bytes more than zero, like 500000, 12M or 100G (K, M, G and T are powers of 1024)".to_owned()
    })
}

/// Where a site begins to be large, and how many connections a peer of a large one has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MeshLimits {
    /// Members, this peer included, up to which everyone is connected to everyone.
    pub mesh: usize,
    /// Connections beyond which those are let go that are not used and not to be kept.
    pub connections: usize,
}

impl Default for MeshLimits {
    fn default() -> Self {
        Self { mesh: MESH, connections: CONNECTIONS }
    }
}

impl MeshLimits {
    /// The members nearest to itself that a peer of a large site stays connected to.
    #[must_use]
    pub fn neighbours(&self) -> usize {
        (self.mesh / 4).max(1)
    }

    /// Connections beyond which further ones are refused: those being let go need a moment.
    #[must_use]
    pub fn most_connections(&self) -> u32 {
        let spare = (self.connections / 3).max(CONNECTIONS_SPARE);
        u32::try_from(self.connections.saturating_add(spare)).unwrap_or(u32::MAX)
    }
}

/// How a peer misbehaves towards others; its own host is served rightly.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// Serves wrong bytes for every page.
    WrongBytes,
    /// Takes requests for pages and never answers them.
    Silent,
    /// Answers requests for pages this much later.
    Slow(Duration),
    /// Once it holds something, tells no owner that comes later.
    OldOwners,
    /// Has none of the pages that it announces.
    AnnounceFalse,
    /// Sends requests as fast as it can.
    Flood,
}

/// Reads `wrong-bytes`, `silent`, `slow=MILLISECONDS`, `old-owners`, `announce-false` or `flood`.
///
/// # Errors
/// A text that says what is allowed.
pub fn parse_fault(text: &str) -> Result<Fault, String> {
    match (text, text.strip_prefix("slow=").map(str::parse)) {
        ("wrong-bytes", _) => Ok(Fault::WrongBytes),
        ("silent", _) => Ok(Fault::Silent),
        ("flood", _) => Ok(Fault::Flood),
        ("old-owners", _) => Ok(Fault::OldOwners),
        ("announce-false", _) => Ok(Fault::AnnounceFalse),
        (_, Some(Ok(ms))) => Ok(Fault::Slow(Duration::from_millis(ms))),
        (_, Some(Err(_)) | None) => {
            Err("give wrong-bytes, silent, slow=MILLISECONDS, old-owners, announce-false or flood".to_owned())
        }
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
    fn budgets_are_read() {
        assert_eq!((parse_percent("10"), parse_percent("250%")), (Ok(10), Ok(250)));
        for text in ["", "0", "-1", "1.5", "100001", "%", "10 %"] {
            assert!(parse_percent(text).unwrap_err().contains("percentage of one core"), "{text:?}");
        }
        assert_eq!(
            (parse_bytes("500000"), parse_bytes("12M"), parse_bytes("3t")),
            (Ok(500_000), Ok(12 << 20), Ok(3 << 40))
        );
        for text in ["", "0", "0G", "M", "-5", "12MB", "1.5G", "99999999T", "5é"] {
            assert!(parse_bytes(text).unwrap_err().contains("12M"), "{text:?}");
        }
    }

    #[test]
    fn faults_are_read() {
        assert_eq!(parse_fault("slow=5"), Ok(Fault::Slow(Duration::from_millis(5))));
        assert_eq!(parse_fault("wrong-bytes"), Ok(Fault::WrongBytes));
        assert!(parse_fault("slow=x").is_err() && parse_fault("fast").is_err());
    }
}
