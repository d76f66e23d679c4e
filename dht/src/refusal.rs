//! What became of a connection that was not made, by its error: the other end is not of this site, or nothing is known of it. Pure.

use std::{error::Error, io};

use crate::secure::SecureError;

/// Why there is no connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Refusal {
    /// There is one: it is for pages, and in the hands of whoever serves them (or closed, when too many are new).
    ForPages,
    /// Nobody answers there.
    Unreachable,
    /// The other end spoke, and it was not what a peer of this site says.
    Stranger,
    /// The connection was reset, or took too long: the other end may be of the site, and frozen, killed or slow.
    Broken,
}

impl Refusal {
    pub(crate) fn of(error: &(dyn Error + 'static)) -> Self {
        let mut cause = Some(error);
        while let Some(error) = cause {
            if let Some(error) = error.downcast_ref::<SecureError>() {
                return Self::of_handshake(error);
            }
            let io = error.downcast_ref::<io::Error>();
            if io.is_some_and(|io| nobody(io.kind())) {
                return Self::Unreachable;
            }
            let inner = io.and_then(io::Error::get_ref);
            cause = inner.map(|inner| inner as &(dyn Error + 'static)).or_else(|| error.source());
        }
        // It never came to the handshake, or to an end of it in time.
        Self::Broken
    }

    fn of_handshake(error: &SecureError) -> Self {
        match error {
            SecureError::ForPages { .. } | SecureError::TooManyForPages { .. } => Self::ForPages,
            // TLS speaks of what it cannot read, or will not take, as invalid data; all else is the socket's.
            SecureError::Handshake(error) if error.kind() == io::ErrorKind::InvalidData => Self::Stranger,
            SecureError::Protocol | SecureError::Stranger { .. } | SecureError::Identity(_) => Self::Stranger,
            // Whoever has another key sends a proof too, and then it is the proof that is wrong.
            SecureError::NoProof { source, .. } if source.kind() == io::ErrorKind::InvalidData => {
                Self::Stranger
            }
            SecureError::Handshake(_)
            | SecureError::NoProof { .. }
            | SecureError::Export(_)
            | SecureError::Socket(_) => Self::Broken,
        }
    }
}

fn nobody(kind: io::ErrorKind) -> bool {
    matches!(
        kind,
        io::ErrorKind::ConnectionRefused
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::AddrNotAvailable
    )
}

/// An error and its sources in one line; libp2p's wrappers repeat each other, or say nothing.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut texts = Vec::new();
    let mut cause = Some(error);
    while let Some(error) = cause {
        texts.push(error.to_string());
        cause = error.source();
    }
    texts.retain(|text| !text.is_empty());
    texts.dedup();
    texts.join(": ")
}

/// What is at the bottom of an error, in few words.
pub(crate) fn root(error: &(dyn Error + 'static)) -> String {
    let mut last = error;
    loop {
        let inner = last.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        match inner.map(|inner| inner as &(dyn Error + 'static)).or_else(|| last.source()) {
            Some(cause) => last = cause,
            None => break,
        }
    }
    match last.downcast_ref::<io::Error>() {
        Some(io) if io.raw_os_error().is_some() => io.kind().to_string(),
        Some(_) | None => last.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use libp2p::PeerId;

    use super::*;
    use crate::proof::ProofError;

    fn refusal(error: SecureError) -> Refusal {
        // As the transport wraps it.
        Refusal::of(&io::Error::other(error))
    }

    /// Peers of the own site that froze or were killed in a handshake were reported, and counted, as having another site key.
    #[test]
    fn a_time_out_or_a_reset_says_nothing_of_the_other_ends_key() {
        let peer = PeerId::random();
        for kind in [
            io::ErrorKind::UnexpectedEof,
            io::ErrorKind::ConnectionReset,
            io::ErrorKind::BrokenPipe,
            io::ErrorKind::TimedOut,
        ] {
            assert_eq!(refusal(SecureError::Handshake(kind.into())), Refusal::Broken);
            assert_eq!(refusal(SecureError::NoProof { peer, source: kind.into() }), Refusal::Broken);
        }
        let late = libp2p::core::transport::timeout::TransportTimeoutError::<io::Error>::Timeout;
        assert_eq!(Refusal::of(&io::Error::other(late)), Refusal::Broken);
        assert_eq!(Refusal::of(&io::Error::from(io::ErrorKind::TimedOut)), Refusal::Broken);
    }

    #[test]
    fn whoever_has_another_key_or_speaks_another_tongue_is_a_stranger() {
        let peer = PeerId::random();
        let wrong = SecureError::Stranger { peer, source: ProofError::WrongKey };
        assert_eq!(refusal(wrong), Refusal::Stranger);
        assert_eq!(refusal(SecureError::Identity(ProofError::NotEd25519)), Refusal::Stranger);
        assert_eq!(refusal(SecureError::Protocol), Refusal::Stranger);
        assert_eq!(refusal(SecureError::Handshake(io::ErrorKind::InvalidData.into())), Refusal::Stranger);
    }

    #[test]
    fn nobody_there_and_connections_for_pages_are_no_refusals() {
        let refused = io::Error::from(io::ErrorKind::ConnectionRefused);
        assert_eq!(Refusal::of(&io::Error::other(refused)), Refusal::Unreachable);
        assert_eq!(refusal(SecureError::ForPages { peer: PeerId::random() }), Refusal::ForPages);
    }
}
