//! What this peer knows of another one: who it is, and where it listens. Pure.
//!
//! An address is what the other peer says it listens on, or one at which it was dialled and answered. The far end of a connection that it made is
//! neither: its port may be any, and is nobody's once the connection is gone. Of that end only the IP address is kept, to choose among the peer's addresses.

use std::{borrow::Cow, collections::BTreeSet};

use libp2p::{Multiaddr, PeerId, core::ConnectedPoint, multiaddr::Protocol, swarm::ConnectionId};

use crate::{
    limits::{KNOWN_ADDRESSES, LISTEN_ADDRESSES},
    status::How,
    wire::HolderPeer,
};

/// A member that this peer has met, or a connected peer that may become one.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    pub(crate) peer_id: PeerId,
    /// Where to dial it, the best first.
    pub(crate) addresses: Vec<Multiaddr>,
    pub(crate) connected: bool,
    /// The address that this end dialled for the connection there is, without the peer's id.
    dialled: Option<Multiaddr>,
    /// How its last connection ended, unless there is one, or this end closed it.
    pub(crate) ended: Option<How>,
    /// On which of the connections there are it said where it listens, and where.
    said: Option<(ConnectionId, Vec<Multiaddr>)>,
    /// The IP address at the other end of its latest connection.
    met_ip: Option<Protocol<'static>>,
}

impl Known {
    pub(crate) fn new(peer_id: PeerId) -> Self {
        Self {
            peer_id,
            addresses: Vec::new(),
            connected: false,
            dialled: None,
            ended: None,
            said: None,
            met_ip: None,
        }
    }

    /// There is a connection to it, or one more.
    pub(crate) fn connect(&mut self, endpoint: &ConnectedPoint) {
        if !self.connected {
            (self.dialled, self.said) = (None, None);
        }
        (self.connected, self.ended) = (true, None);
        self.met_ip = ip(endpoint.get_remote_address()).map(Protocol::acquire);
        if let ConnectedPoint::Dialer { address, .. } = endpoint {
            let address = bare(address);
            if self.addresses.is_empty() {
                self.addresses.push(address.clone());
            }
            self.dialled = Some(address);
        }
    }

    /// It said where it listens.
    pub(crate) fn listens(&mut self, listen: &[Multiaddr]) {
        let mut addresses = dialable(listen, self.met_ip.as_ref());
        // Where it answered, though it does not know of that address itself (there is a translation of addresses between).
        if let Some(dialled) = self.dialled.iter().find(|dialled| !addresses.contains(dialled)) {
            addresses.insert(0, dialled.clone());
            addresses.truncate(KNOWN_ADDRESSES);
        }
        self.addresses = addresses;
    }

    /// It says on a connection where it listens. Returns what it said on another one that there still is, if no address of that is the same:
    /// they are two processes with one identity.
    pub(crate) fn said_otherwise(
        &mut self,
        connection: ConnectionId,
        listen: &[Multiaddr],
    ) -> Option<Vec<Multiaddr>> {
        let (first, said) = self.said.get_or_insert_with(|| (connection, Vec::new()));
        if *first == connection {
            *said = listen.iter().take(LISTEN_ADDRESSES).map(bare).collect();
            return None;
        }
        let same = listen.iter().any(|address| said.contains(&bare(address)));
        (!same && !listen.is_empty() && !said.is_empty()).then(|| said.clone())
    }

    /// One of several connections is gone.
    pub(crate) fn closed_one(&mut self, connection: ConnectionId) {
        self.said.take_if(|(said, _)| *said == connection);
    }

    /// Its first address, for people; empty if none is known.
    pub(crate) fn address(&self) -> Cow<'static, str> {
        self.addresses.first().map_or(Cow::Borrowed(""), |address| Cow::Owned(address.to_string()))
    }

    /// As an owner names it to others.
    pub(crate) fn as_holder(&self) -> HolderPeer {
        HolderPeer { peer: self.peer_id, address: self.addresses.first().cloned() }
    }
}

/// An address without the id of the peer that is there.
pub(crate) fn bare(address: &Multiaddr) -> Multiaddr {
    address.iter().filter(|part| !matches!(part, Protocol::P2p(_))).collect()
}

/// The addresses to dial a peer at: of those that it listens on, the ones at the IP address that it was met at, if there are any (others may be
/// of networks that it shares with somebody else, or its loopback, where this host listens too).
fn dialable(listen: &[Multiaddr], met_ip: Option<&Protocol<'_>>) -> Vec<Multiaddr> {
    let loopback = |address: &Multiaddr| match ip(address) {
        Some(Protocol::Ip4(ip)) => ip.is_loopback(),
        Some(Protocol::Ip6(ip)) => ip.is_loopback(),
        Some(_) | None => false,
    };
    let distinct: BTreeSet<Multiaddr> = listen.iter().map(bare).collect();
    let (there, elsewhere): (Vec<_>, Vec<_>) =
        distinct.into_iter().partition(|address| ip(address).as_ref() == met_ip);
    let some = if there.is_empty() {
        elsewhere.into_iter().filter(|address| !loopback(address)).collect()
    } else {
        there
    };
    some.into_iter().take(KNOWN_ADDRESSES).collect()
}

fn ip(address: &Multiaddr) -> Option<Protocol<'_>> {
    address.iter().next()
}

#[cfg(test)]
mod tests {
    use libp2p::core::{Endpoint, transport::PortUse};

    use super::*;

    fn address(text: &str) -> Multiaddr {
        text.parse().unwrap()
    }

    fn incoming(from: &str) -> ConnectedPoint {
        ConnectedPoint::Listener {
            local_addr: address("/ip4/127.0.0.1/tcp/4160"),
            send_back_addr: address(from),
        }
    }

    fn dialled(to: &str) -> ConnectedPoint {
        ConnectedPoint::Dialer {
            address: address(to),
            role_override: Endpoint::Dialer,
            port_use: PortUse::Reuse,
        }
    }

    #[test]
    fn a_peer_is_dialled_where_it_was_met_and_never_at_somebody_elses_loopback() {
        let listen = ["/ip4/127.0.0.1/tcp/1", "/ip4/10.0.0.2/tcp/1", "/ip4/192.168.0.2/tcp/1"].map(address);
        let at = |met: &str| dialable(&listen, ip(&address(met)).as_ref());
        assert_eq!(at("/ip4/10.0.0.2/tcp/999"), [listen[1].clone()]);
        assert_eq!(at("/ip4/127.0.0.1/tcp/999"), [listen[0].clone()]);
        assert_eq!(at("/ip6/fe80::1/tcp/9"), [listen[1].clone(), listen[2].clone()]);
    }

    /// A peer that dials with another port than it listens on was shown, for as long as it stayed, at that port.
    #[test]
    fn the_port_that_a_peer_dials_from_is_never_its_address() {
        let peer = PeerId::random();
        let listens = address("/ip4/127.0.0.1/tcp/4170");
        let said = [listens.clone().with(Protocol::P2p(peer))];
        let mut known = Known::new(peer);
        known.connect(&incoming("/ip4/127.0.0.1/tcp/37692"));
        assert_eq!(known.address(), "", "it has not said yet where it listens");
        known.listens(&said);
        assert_eq!(known.addresses, std::slice::from_ref(&listens));
        known.connected = false;
        known.connect(&incoming("/ip4/127.0.0.1/tcp/37700"));
        assert_eq!(
            known.as_holder().address,
            Some(listens),
            "it is known still, and not where it dials from"
        );
    }

    #[test]
    fn two_processes_with_one_identity_are_found_out_while_both_are_connected() {
        let mut known = Known::new(PeerId::random());
        let [one, two] = [1, 2].map(ConnectionId::new_unchecked);
        let [here, there] = ["/ip4/10.0.0.1/tcp/4160", "/ip4/10.0.0.2/tcp/4160"].map(|text| [address(text)]);
        assert_eq!(known.said_otherwise(one, &here), None);
        assert_eq!(known.said_otherwise(two, &here), None, "a second connection of one process");
        assert_eq!(known.said_otherwise(two, &there), Some(here.to_vec()));
        assert_eq!(known.said_otherwise(one, &there), None, "it has moved: both say the same now");
        assert_eq!(known.said_otherwise(two, &there), None);
        known.closed_one(one);
        assert_eq!(
            known.said_otherwise(two, &here),
            None,
            "it was restarted, and the first connection is gone"
        );
    }

    #[test]
    fn where_a_peer_answered_is_its_address_until_it_comes_by_itself() {
        let mut known = Known::new(PeerId::random());
        known.connect(&dialled("/ip4/203.0.113.1/tcp/4160"));
        known.listens(&[address("/ip4/10.0.0.2/tcp/4170")]);
        let both = ["/ip4/203.0.113.1/tcp/4160", "/ip4/10.0.0.2/tcp/4170"].map(address);
        assert_eq!(known.addresses, both);
        known.connected = false;
        known.connect(&incoming("/ip4/203.0.113.1/tcp/999"));
        known.listens(&[address("/ip4/10.0.0.2/tcp/4180")]);
        assert_eq!(known.addresses, [address("/ip4/10.0.0.2/tcp/4180")], "another process of the same peer");
    }
}
