//! Who is missing: the peers that were members within the last hour and are none now. Pure.

use std::{collections::BTreeMap, error::Error, io, time::Instant};

use libp2p::{PeerId, swarm::ConnectionError};

use crate::{
    limits::{GONE_KEPT, GONE_PEERS},
    shard::MemberId,
    status::{GonePeer, How},
};

/// A peer that is gone.
#[derive(Clone, Debug)]
struct Departed {
    peer_id: PeerId,
    address: String,
    at: Instant,
    how: How,
}

/// The latest of those that are gone.
#[derive(Debug, Default)]
pub(crate) struct Gone(BTreeMap<MemberId, Departed>);

impl Gone {
    /// A member is gone; whoever has been gone for longest is forgotten for it when there are too many.
    pub(crate) fn left(&mut self, member: MemberId, peer_id: PeerId, address: String, how: How, at: Instant) {
        self.0.insert(member, Departed { peer_id, address, at, how });
        if self.0.len() > GONE_PEERS {
            let oldest = self.0.iter().min_by_key(|(_, gone)| gone.at).map(|(member, _)| *member);
            oldest.and_then(|oldest| self.0.remove(&oldest));
        }
    }

    /// A peer is a member, at an address at which another one may have been: that one has a new identity, and is not missing.
    pub(crate) fn back(&mut self, member: MemberId, address: &str) {
        self.0.remove(&member);
        self.0.retain(|_, gone| gone.address.is_empty() || gone.address != address);
    }

    /// Those of the last [`GONE_KEPT`], the latest first.
    pub(crate) fn list(&mut self, now: Instant) -> Vec<GonePeer> {
        let since = |gone: &Departed| now.saturating_duration_since(gone.at);
        self.0.retain(|_, gone| since(gone) < GONE_KEPT);
        let mut gone: Vec<_> = self.0.values().collect();
        gone.sort_by_key(|gone| std::cmp::Reverse(gone.at));
        let show = |gone: &Departed| GonePeer {
            peer_id: gone.peer_id.to_string(),
            address: gone.address.clone(),
            gone_s: since(gone).as_secs(),
            how: gone.how,
        };
        gone.into_iter().map(show).collect()
    }
}

/// How a connection ended; `None` if this end closed it.
pub(crate) fn how(cause: Option<&ConnectionError>) -> Option<How> {
    match cause? {
        ConnectionError::KeepAliveTimeout => None,
        ConnectionError::IO(error) => Some(of_io(error)),
    }
}

fn of_io(error: &(dyn Error + 'static)) -> How {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let io = error.downcast_ref::<io::Error>();
        match io.map(io::Error::kind) {
            Some(
                io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted | io::ErrorKind::BrokenPipe,
            ) => return How::Reset,
            Some(io::ErrorKind::TimedOut) => return How::TimedOut,
            Some(_) | None => {}
        }
        let inner = io.and_then(io::Error::get_ref);
        cause = inner.map(|inner| inner as &(dyn Error + 'static)).or_else(|| error.source());
    }
    How::Left
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::connections::member;

    #[test]
    fn who_is_gone_is_kept_for_an_hour_and_until_it_is_back() {
        let (mut gone, start) = (Gone::default(), Instant::now());
        let peers: Vec<PeerId> = (0..3).map(|_| PeerId::random()).collect();
        for (n, peer) in (0u64..).zip(&peers) {
            let at = start + Duration::from_secs(n);
            gone.left(member(peer), *peer, format!("address {n}"), How::TimedOut, at);
        }
        let ids = |gone: &mut Gone, after: Duration| -> Vec<String> {
            gone.list(start + after).into_iter().map(|gone| gone.peer_id).collect()
        };
        let second = Duration::from_secs(1);
        assert_eq!(ids(&mut gone, 2 * second), [&peers[2], &peers[1], &peers[0]].map(ToString::to_string));
        gone.back(member(&peers[0]), "somewhere else");
        gone.back(member(&PeerId::random()), "address 1");
        assert_eq!(ids(&mut gone, 2 * second), [peers[2].to_string()]);
        assert_eq!(gone.list(start + 12 * second)[0].gone_s, 10);
        assert!(ids(&mut gone, GONE_KEPT + 2 * second).is_empty());
    }

    #[test]
    fn no_more_are_kept_than_may_be_and_the_latest_are() {
        let (mut gone, start) = (Gone::default(), Instant::now());
        let first = PeerId::random();
        gone.left(member(&first), first, String::new(), How::Left, start);
        for _ in 0..GONE_PEERS {
            let peer = PeerId::random();
            gone.left(member(&peer), peer, String::new(), How::Left, start + Duration::from_secs(1));
        }
        let listed = gone.list(start + Duration::from_secs(1));
        assert_eq!(listed.len(), GONE_PEERS);
        assert!(listed.iter().all(|gone| gone.peer_id != first.to_string()));
    }

    #[test]
    fn a_connection_was_closed_was_reset_or_timed_out() {
        let ended =
            |kind: io::ErrorKind| how(Some(&ConnectionError::IO(io::Error::other(io::Error::from(kind)))));
        assert_eq!(ended(io::ErrorKind::UnexpectedEof), Some(How::Left));
        assert_eq!(ended(io::ErrorKind::ConnectionReset), Some(How::Reset));
        assert_eq!(ended(io::ErrorKind::TimedOut), Some(How::TimedOut));
        assert_eq!(how(None), None);
    }
}
