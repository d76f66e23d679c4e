//! What the peer says of itself, gathered from its parts.

use std::{sync::atomic::Ordering, time::Instant};

use crate::{
    known::Known,
    limits::STATUS_PEERS,
    membership::{Membership, Role},
    node::Peer,
    shard::MemberId,
    status::{IndexStatus, Members, PeerStatus, SiteStatus, Waiting},
    trust::Verdict,
};

impl Peer {
    /// The peer's state now.
    pub(crate) fn status(&self) -> SiteStatus {
        let backlog = self.announcer().backlog();
        let contents = self.contents.status(backlog.owners == 0);
        let waiting = Waiting {
            scans: contents.iter().filter(|content| !content.scanned).count() as u64,
            owners: backlog.owners as u64,
            names: backlog.names as u64,
            shards_rehoming: backlog.shards_behind as u64,
        };
        let host_names = self.contents.index().len() as u64;
        let now = Instant::now();
        let (joins_silent, gone) = (self.joins().silent(now), self.gone().list(now));
        let (members, peers, shards_owned) = self.peers();
        let owned = self.owned();
        let index = IndexStatus {
            host_names,
            shards_owned: shards_owned as u64,
            owner_entries: owned.len() as u64,
            owner_bytes: owned.bytes() as u64,
        };
        drop(owned);
        SiteStatus {
            peer_id: self.peer_id().to_owned(),
            listen: self.listen_addresses(),
            domain: hex::encode(self.domain().id().0),
            ready: waiting == Waiting::default(),
            waiting,
            members,
            peers,
            joins_silent,
            gone,
            contents,
            index,
            counters: self.counters.show(self.contents.stale_misses.load(Ordering::Relaxed)),
        }
    }

    /// The other members, and how many shards this one owns.
    fn peers(&self) -> (Members, Vec<PeerStatus>, usize) {
        let now = Instant::now();
        let directory = self.directory().clone();
        let site = self.site();
        let members = directory.iter().filter(|(member, _)| site.contains(**member));
        let mut peers: Vec<_> = members.map(|(member, known)| peer(&site, *member, known, now)).collect();
        let count = |which: fn(&PeerStatus) -> bool| peers.iter().filter(|peer| which(peer)).count() as u64;
        let members = Members {
            known: peers.len() as u64,
            connected: count(|peer| peer.connected),
            skipped: count(|peer| !peer.answering),
            avoided: count(|peer| peer.avoided),
            doubted: count(|peer| peer.doubted),
            left_out: count(|peer| peer.left_out_ms > 0),
            site_size: site.size() as u64,
        };
        let well =
            |peer: &PeerStatus| peer.answering && !peer.avoided && !peer.doubted && peer.left_out_ms == 0;
        peers.sort_by_key(|peer| (well(peer), !peer.connected));
        peers.truncate(STATUS_PEERS);
        (members, peers, site.shards().owned_by(site.me()))
    }
}

fn peer(site: &Membership, member: MemberId, known: &Known, now: Instant) -> PeerStatus {
    let left_ms = |until: Option<Instant>| {
        let left = until.map_or(0, |until| until.saturating_duration_since(now).as_millis());
        u64::try_from(left).unwrap_or(u64::MAX)
    };
    PeerStatus {
        peer_id: known.peer_id.to_string(),
        address: known.address().into_owned(),
        connected: known.connected,
        answering: site.answering(member, Role::Owner, now) && site.answering(member, Role::Holder, now),
        skipped_as_owner_ms: left_ms(site.skipped_until(member, Role::Owner)),
        skipped_as_holder_ms: left_ms(site.skipped_until(member, Role::Holder)),
        avoided: site.avoided(member, now),
        avoided_ms: left_ms(site.avoided_until(member)),
        doubted: site.trust().verdict(member, now) == Verdict::Doubted,
        left_out_ms: u64::try_from(site.trust().left_out_for(member, now).as_millis()).unwrap_or(u64::MAX),
        wrong_pages: site.wrong_pages(member),
    }
}
