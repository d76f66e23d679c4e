//! The network task's care for its connections: whom to dial, whom to let go, and asking Kademlia who owns what.
//!
//! What is decided here stands in [`crate::mesh`]; this carries it out on the swarm.

use std::{num::NonZeroUsize, time::Instant};

use libp2p::{
    Multiaddr, PeerId,
    core::ConnectedPoint,
    kad,
    swarm::{DialError, dial_opts::DialOpts},
};

use crate::{
    limits::{
        BOOTSTRAP_EVERY, BOOTSTRAP_LARGE_EVERY, DIALS_PER_TICK, MEETING_TIMEOUT, MEETINGS, REFRESH_ABOVE,
        REFRESH_CLOSEST, REFRESH_PAUSE,
    },
    network::Driver,
    node::Peer,
    shard::{MemberId, ShardId},
    status::How,
    wire::HolderPeer,
};

/// A peer's key in Kademlia's key space.
pub(crate) fn member(peer: &PeerId) -> MemberId {
    MemberId::of_peer(&peer.to_bytes())
}

impl Peer {
    /// Gets to know those of an answer's holders that this peer has not met, as far as that is quickly done; the others are left for the
    /// next time.
    pub(crate) async fn meet(&self, named: &[HolderPeer]) {
        let strangers: Vec<(PeerId, Multiaddr)> = {
            let site = self.site();
            let strangers = named.iter().filter(|named| !site.contains(member(&named.peer)));
            let dialable = strangers.filter_map(|named| Some((named.peer, named.address.clone()?)));
            dialable.take(MEETINGS).collect()
        };
        if strangers.is_empty() {
            return;
        }
        let meetings = strangers.into_iter().map(|(peer, address)| self.network.meet(peer, address));
        // Who is not met in time is not asked this time.
        let _ = tokio::time::timeout(MEETING_TIMEOUT, futures::future::join_all(meetings)).await;
    }
}

impl Driver {
    /// Once a tick: connections that are to be there and are not, those to let go, and Kademlia's turns.
    pub(crate) fn keep_connections(&mut self) {
        let now = Instant::now();
        self.rejoin();
        self.look_at_members();
        self.dial_kept();
        for peer in self.mesh.to_close(&self.kept, now) {
            let Some(peer_id) = self.peer.directory().get(&peer).map(|known| known.peer_id) else { continue };
            tracing::debug!(%peer_id, "a connection is let go");
            self.closing.insert(peer);
            // An error says that it is closed already.
            let _ = self.swarm.disconnect_peer_id(peer_id);
        }
        let every = if self.full { BOOTSTRAP_EVERY } else { BOOTSTRAP_LARGE_EVERY };
        if now.saturating_duration_since(self.bootstrapped) >= every {
            self.bootstrapped = now;
            // An error says that no other peer is known yet.
            let _ = self.swarm.behaviour_mut().kad.bootstrap();
        }
        self.ask_kademlia();
    }

    /// Takes in a change of the members.
    pub(crate) fn look_at_members(&mut self) {
        let mut site = self.peer.site();
        if self.version == Some(site.version()) {
            return;
        }
        self.version = Some(site.version());
        self.kept = self.mesh.kept(site.members());
        self.full = self.mesh.is_full(site.members().len());
        site.estimated(if self.full { None } else { self.estimate.members() });
    }

    fn dial_kept(&mut self) {
        let missing: Vec<_> = {
            let directory = self.peer.directory();
            let missing = self.kept.iter().filter(|member| !self.mesh.is_connected(**member));
            let known = missing.filter_map(|member| directory.get(member).map(|known| known.peer_id));
            known.take(DIALS_PER_TICK).collect()
        };
        missing.into_iter().for_each(|peer| self.dial(peer));
    }

    /// Connects to a known peer; what comes of it is an event.
    pub(crate) fn dial(&mut self, peer: PeerId) {
        let addresses = self.addresses(&peer);
        if let Err(error) = self.swarm.dial(DialOpts::peer_id(peer).addresses(addresses).build()) {
            self.not_dialled(peer, &error);
        }
    }

    pub(crate) fn addresses(&self, peer: &PeerId) -> Vec<Multiaddr> {
        self.peer.directory().get(&member(peer)).map(|known| known.addresses.clone()).unwrap_or_default()
    }

    /// A peer that is not connected could not be reached.
    pub(crate) fn not_dialled(&mut self, peer: PeerId, error: &DialError) {
        match error {
            // A dial is under way, it is connected by now, or this end's own limits say no: that says nothing of the peer.
            DialError::DialPeerConditionFalse(_) => {}
            DialError::Denied { .. } | DialError::Aborted => {
                self.meetings.remove(&member(&peer));
            }
            DialError::Transport(_)
            | DialError::WrongPeerId { .. }
            | DialError::NoAddresses
            | DialError::LocalPeerId { .. } => {
                if !self.mesh.is_connected(member(&peer)) {
                    self.lose(peer, How::Unreachable);
                }
            }
        }
    }

    /// A peer cannot be reached: it is no member until it is heard of again.
    pub(crate) fn lose(&mut self, peer: PeerId, how: How) {
        let (lost, now) = (member(&peer), Instant::now());
        {
            let site = self.peer.site();
            let owned = ShardId::all().filter(|shard| site.shards().owners(*shard).contains(&lost));
            owned.for_each(|shard| self.refresh.hurry(shard, now));
        }
        self.meetings.remove(&lost);
        self.peer.left(peer, how);
        self.look_at_members();
    }

    pub(crate) fn on_connected(&mut self, peer: PeerId, endpoint: &ConnectedPoint) {
        self.mesh.connected(member(&peer), endpoint.is_dialer(), Instant::now());
        self.peer.connected(peer, endpoint);
    }

    /// The last connection to a peer is gone. Unless this end let it go, that may mean that the peer is gone: one to stay connected to is
    /// dialled once more, and lost if it does not answer; another one is found out when it is asked next.
    pub(crate) fn on_disconnected(&mut self, peer: PeerId, how: Option<How>) {
        let gone = member(&peer);
        self.mesh.disconnected(gone);
        let let_go = self.closing.remove(&gone);
        self.peer.disconnected(peer, how.filter(|_| !let_go));
        if !let_go && self.kept.contains(&gone) {
            self.dial(peer);
        }
    }

    /// Somebody waits until a peer that was heard of is known.
    pub(crate) fn meet(&mut self, peer: PeerId, address: Multiaddr, met: tokio::sync::oneshot::Sender<()>) {
        let id = member(&peer);
        if self.peer.site().contains(id) {
            // Nobody may be waiting any more.
            let _ = met.send(());
            return;
        }
        self.meetings.entry(id).or_default().push(met);
        let dial = DialOpts::peer_id(peer).addresses(vec![address]).build();
        match self.swarm.dial(dial) {
            // It is being dialled, or connected and not identified yet.
            Ok(()) | Err(DialError::DialPeerConditionFalse(_)) => {}
            Err(error) => {
                tracing::debug!(%peer, %error, "a holder that was heard of is not dialled");
                self.meetings.remove(&id);
            }
        }
    }

    /// A connected peer said that it is a member.
    pub(crate) fn met(&mut self, peer: PeerId) {
        self.peer.joined(peer);
        self.look_at_members();
        for met in self.meetings.remove(&member(&peer)).unwrap_or_default() {
            // Nobody may be waiting any more.
            let _ = met.send(());
        }
    }

    /// Kademlia knows of a peer that this one may not have met.
    pub(crate) fn heard_of(&mut self, peer: PeerId) {
        let id = member(&peer);
        let near = self.kept.iter().any(|kept| id.distance(&self.me.0) < kept.distance(&self.me.0));
        if !self.mesh.is_connected(id) && (self.full || near) {
            // Refused if it is being dialled; the rest is reported as an event.
            let _ = self.swarm.dial(peer);
        }
    }

    /// Asks who is closest to the shards that are due. A question makes connections: while there are as many as there should be, there
    /// is one question now and then.
    pub(crate) fn ask_kademlia(&mut self) {
        let few = self.peer.site().members().len() <= REFRESH_ABOVE;
        if self.full && few {
            return;
        }
        let now = Instant::now();
        let rested = now.saturating_duration_since(self.asked) >= REFRESH_PAUSE;
        let mut room = if self.mesh.has_room() { usize::MAX } else { usize::from(rested) };
        while room > 0 {
            let Some(shard) = self.refresh.next(now) else { return };
            (room, self.asked) = (room - 1, now);
            let count = NonZeroUsize::new(REFRESH_CLOSEST).expect("it is not 0");
            let query = self.swarm.behaviour_mut().kad.get_n_closest_peers(shard.preimage(), count);
            self.queries.insert(query, shard);
        }
    }

    pub(crate) fn on_kademlia(&mut self, event: kad::Event) {
        match event {
            kad::Event::RoutingUpdated { peer, is_new_peer: true, .. } => self.heard_of(peer),
            kad::Event::OutboundQueryProgressed {
                id,
                result: kad::QueryResult::GetClosestPeers(result),
                step,
                ..
            } => {
                let Some(shard) = self.queries.get(&id).copied() else { return };
                match result {
                    Ok(found) => {
                        let closest: Vec<_> = found.peers.iter().map(|info| member(&info.peer_id)).collect();
                        self.estimate.measured(shard, &closest);
                        if !self.full {
                            self.peer.site().estimated(self.estimate.members());
                        }
                    }
                    Err(error) => tracing::debug!(?shard, %error, "Kademlia did not find a shard's owners"),
                }
                if step.last {
                    self.queries.remove(&id);
                    self.refresh.done(shard, Instant::now());
                    self.ask_kademlia();
                }
            }
            other => tracing::trace!(?other, "kad"),
        }
    }
}
