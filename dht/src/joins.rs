//! The peers to join by: which of them answers, and what was last heard of those that do not. Pure.

use std::{net::IpAddr, time::Instant};

use libp2p::{Multiaddr, PeerId, multiaddr::Protocol};

use crate::{known::bare, limits::JOIN_LOG_EVERY, status::JoinStatus};

/// A peer to join by.
#[derive(Debug)]
struct Join {
    address: Multiaddr,
    /// The address names its peer.
    named: bool,
    peer: Option<PeerId>,
    /// It turned out to be this very peer.
    myself: bool,
    silent: Option<Silent>,
}

/// It does not answer.
#[derive(Debug)]
struct Silent {
    since: Instant,
    logged: Instant,
    error: String,
}

/// All of them, as `--join` gives them.
#[derive(Debug)]
pub(crate) struct Joins(Vec<Join>);

impl Joins {
    pub(crate) fn new(addresses: &[Multiaddr]) -> Self {
        let join = |address: &Multiaddr| {
            let peer = address.iter().find_map(|part| match part {
                Protocol::P2p(peer) => Some(peer),
                _ => None,
            });
            Join { address: address.clone(), named: peer.is_some(), peer, myself: false, silent: None }
        };
        Self(addresses.iter().map(join).collect())
    }

    /// Those to dial, and who is there if that is known; `present` says who is a member or connected, and by that answers.
    pub(crate) fn due(&mut self, present: impl Fn(&PeerId) -> bool) -> Vec<(Multiaddr, Option<PeerId>)> {
        let mut due = Vec::new();
        for join in self.0.iter_mut().filter(|join| !join.myself) {
            if join.peer.as_ref().is_some_and(&present) {
                join.silent = None;
            } else {
                due.push((join.address.clone(), join.peer));
            }
        }
        due
    }

    /// A dialled address answered. Returns whether it is one to join by that had not answered before.
    pub(crate) fn answered(&mut self, address: &Multiaddr, peer: PeerId) -> bool {
        let mut again = false;
        for join in self.at(address) {
            // A peer that restarted may have another identity by now.
            join.peer = Some(peer);
            again |= join.silent.take().is_some();
        }
        again
    }

    /// A dialled address did not answer. Returns whether that is to be said: of an address to join by, at first, and seldom after that.
    pub(crate) fn failed(&mut self, address: &Multiaddr, error: &str, now: Instant) -> bool {
        let mut say = false;
        for join in self.at(address) {
            let silent = join.silent.get_or_insert_with(|| {
                say = true;
                Silent { since: now, logged: now, error: String::new() }
            });
            error.clone_into(&mut silent.error);
            if now.saturating_duration_since(silent.logged) >= JOIN_LOG_EVERY {
                (silent.logged, say) = (now, true);
            }
        }
        say
    }

    /// This very peer answers at an address. Returns whether it is one to join by, and that was not known.
    pub(crate) fn myself(&mut self, address: &Multiaddr) -> bool {
        let mut new = false;
        for join in self.at(address) {
            new |= !std::mem::replace(&mut join.myself, true);
            join.silent = None;
        }
        new
    }

    /// A peer could not be reached: where it was may be another one by now.
    pub(crate) fn lost(&mut self, peer: PeerId) {
        for join in self.0.iter_mut().filter(|join| join.peer == Some(peer) && !join.named) {
            join.peer = None;
        }
    }

    /// Those that do not answer.
    pub(crate) fn silent(&self, now: Instant) -> Vec<JoinStatus> {
        let show = |join: &Join| {
            let silent = join.silent.as_ref()?;
            Some(JoinStatus {
                address: plain(&join.address),
                silent_s: now.saturating_duration_since(silent.since).as_secs(),
                error: silent.error.clone(),
            })
        };
        self.0.iter().filter_map(show).collect()
    }

    fn at(&mut self, address: &Multiaddr) -> impl Iterator<Item = &mut Join> {
        let address = bare(address);
        self.0.iter_mut().filter(move |join| bare(&join.address) == address)
    }
}

/// An address as `--join` takes it, in its short form if it has one.
pub(crate) fn plain(address: &Multiaddr) -> String {
    let mut parts = address.iter();
    let ip: IpAddr = match parts.next() {
        Some(Protocol::Ip4(ip)) => ip.into(),
        Some(Protocol::Ip6(ip)) => ip.into(),
        Some(_) | None => return address.to_string(),
    };
    match parts.next() {
        Some(Protocol::Tcp(port)) => std::net::SocketAddr::from((ip, port)).to_string(),
        Some(_) | None => address.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joins() -> (Joins, Multiaddr, Multiaddr) {
        let [one, two] =
            ["/ip4/127.0.0.1/tcp/416", "/ip4/127.0.0.1/tcp/4160"].map(|text| text.parse().unwrap());
        (Joins::new(&[one, two.clone()]), "/ip4/127.0.0.1/tcp/416".parse().unwrap(), two)
    }

    #[test]
    fn one_that_does_not_answer_is_told_of_at_first_and_then_seldom() {
        let ((mut joins, one, other), now) = (joins(), Instant::now());
        assert!(joins.failed(&one, "refused", now), "at first");
        assert!(!joins.failed(&one, "late", now + JOIN_LOG_EVERY / 2));
        assert!(joins.failed(&one, "late", now + JOIN_LOG_EVERY));
        assert!(
            !joins.failed(&"/ip4/10.0.0.1/tcp/1".parse().unwrap(), "refused", now),
            "it is not joined by"
        );
        let shown = joins.silent(now + JOIN_LOG_EVERY);
        assert_eq!(shown.len(), 1, "of the other one nothing is known: {other}");
        assert_eq!((shown[0].address.as_str(), shown[0].error.as_str()), ("127.0.0.1:416", "late"));
        assert_eq!(shown[0].silent_s, JOIN_LOG_EVERY.as_secs());
        let peer = PeerId::random();
        assert!(joins.answered(&one.clone().with(Protocol::P2p(peer)), peer));
        assert!(joins.silent(now).is_empty() && !joins.answered(&one, peer));
        assert!(joins.failed(&one, "refused", now), "it is another silence");
        assert_eq!(joins.due(|present| *present == peer).len(), 1);
        assert!(joins.silent(now).is_empty(), "it has come by itself");
    }

    /// An own address was taken for one that only begins like it.
    #[test]
    fn the_own_address_is_told_of_once_and_not_dialled_again() {
        let (mut joins, one, other) = joins();
        assert!(joins.myself(&other.clone().with(Protocol::P2p(PeerId::random()))));
        assert!(!joins.myself(&other));
        assert_eq!(joins.due(|_| false), [(one, None)]);
    }

    #[test]
    fn whoever_is_there_may_have_a_new_identity_unless_it_was_named() {
        let (old, address): (_, Multiaddr) = (PeerId::random(), "/ip4/127.0.0.1/tcp/1".parse().unwrap());
        let mut joins = Joins::new(std::slice::from_ref(&address));
        joins.answered(&address, old);
        joins.lost(old);
        assert_eq!(joins.due(|_| false), [(address.clone(), None)]);
        let named = address.with(Protocol::P2p(old));
        let mut joins = Joins::new(std::slice::from_ref(&named));
        joins.lost(old);
        assert_eq!(joins.due(|_| false), [(named, Some(old))]);
    }
}
