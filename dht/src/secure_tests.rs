//! Two ends of a connection over a pipe.

use tokio_util::compat::{Compat, TokioAsyncReadCompatExt};

use super::*;

fn secure(site: &SiteKey) -> Secure {
    Secure::new(&Keypair::generate_ed25519(), site, Some(mpsc::channel(1).0)).unwrap()
}

type Pipe = Compat<tokio::io::DuplexStream>;

fn pipe() -> (Pipe, Pipe) {
    let (a, b) = tokio::io::duplex(1 << 16);
    (a.compat(), b.compat())
}

#[tokio::test]
async fn peers_of_one_site_learn_who_the_other_is_and_talk() {
    let site = SiteKey::generate().unwrap();
    let (a, b) = (secure(&site), secure(&site));
    let (at_a, at_b) = pipe();
    let (dialed, accepted) = tokio::join!(a.dial(at_a, Purpose::Swarm), b.accept(at_b));
    let (Authenticated { peer: peer_b, stream: mut at_a, .. }, accepted) =
        (dialed.unwrap(), accepted.unwrap());
    let Authenticated { peer: peer_a, purpose, stream: mut at_b } = accepted;
    assert_eq!((peer_a, peer_b, purpose), (a.me.peer_id(), b.me.peer_id(), Purpose::Swarm));
    let mut heard = [0; 5];
    let (sent, got) = tokio::join!(
        async {
            at_a.write_all(b"hello").await?;
            at_a.flush().await
        },
        at_b.read_exact(&mut heard)
    );
    sent.and(got).unwrap();
    assert_eq!(&heard, b"hello");
}

#[tokio::test]
async fn another_sites_key_is_refused_by_both_ends_for_pages_as_for_the_swarm() {
    for purpose in [Purpose::Swarm, Purpose::Pages] {
        let (a, b) = (secure(&SiteKey::generate().unwrap()), secure(&SiteKey::generate().unwrap()));
        let (at_a, at_b) = pipe();
        let (dialed, accepted) = tokio::join!(a.dial(at_a, purpose), b.accept(at_b));
        for refused in [dialed.err(), accepted.err()] {
            assert!(matches!(refused, Some(SecureError::Stranger { source: ProofError::WrongKey, .. })));
        }
    }
}

#[tokio::test]
async fn an_end_that_serves_no_pages_refuses_a_connection_for_them() {
    let site = SiteKey::generate().unwrap();
    let a = secure(&site);
    let b = Secure::new(&Keypair::generate_ed25519(), &site, None).unwrap();
    let (at_a, at_b) = pipe();
    let (dialed, accepted) = tokio::join!(a.dial(at_a, Purpose::Pages), b.accept(at_b));
    for refused in [dialed.err(), accepted.err()] {
        assert!(matches!(refused, Some(SecureError::Handshake(_))));
    }
}

/// An end that does TLS as it should and then says what it likes, or nothing.
async fn says_instead_of_a_proof(bytes: impl FnOnce(&[u8; PROOF_BYTES]) -> Vec<u8>) -> SecureError {
    let site = SiteKey::generate().unwrap();
    let (honest, other) = (secure(&site), secure(&SiteKey::generate().unwrap()));
    let (at_honest, at_other) = pipe();
    let stranger = async {
        let nobody = ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into());
        let mut stream = other.swarm.connect(nobody, at_other).await.unwrap();
        let mut theirs = [0; PROOF_BYTES];
        stream.read_exact(&mut theirs).await.unwrap();
        stream.write_all(&bytes(&theirs)).await.unwrap();
        stream.close().await.unwrap();
    };
    let (refused, ()) = tokio::join!(honest.accept(at_honest), stranger);
    refused.err().expect("refused")
}

#[tokio::test]
async fn a_reflected_proof_is_refused() {
    let error = says_instead_of_a_proof(|theirs| theirs.to_vec()).await;
    assert!(matches!(error, SecureError::Stranger { source: ProofError::WrongKey, .. }), "{error:?}");
}

#[tokio::test]
async fn a_truncated_proof_is_refused() {
    for length in [0, 1, 31] {
        let error = says_instead_of_a_proof(|theirs| theirs[..length].to_vec()).await;
        assert!(matches!(error, SecureError::NoProof { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn a_proof_of_another_session_is_refused() {
    // Two sessions of the same two peers: what one end proved in the first is worth nothing in the second.
    let site = SiteKey::generate().unwrap();
    let (a, b) = (secure(&site), secure(&site));
    let mut exports = Vec::new();
    for _ in 0..2 {
        let (at_a, at_b) = pipe();
        let (dialed, accepted) = tokio::join!(a.dial(at_a, Purpose::Swarm), b.accept(at_b));
        let (dialed, accepted) =
            (exported(&dialed.unwrap().stream).unwrap(), exported(&accepted.unwrap().stream).unwrap());
        assert_eq!(dialed, accepted);
        exports.push(dialed);
    }
    let session = |exported| Session { exported, dialer: &a.me, listener: &b.me };
    let recorded = session(exports[0]).prove(&a.key, End::Dialer);
    assert_eq!(session(exports[1]).check(&a.key, End::Dialer, &recorded), Err(ProofError::WrongKey));
}

#[tokio::test]
async fn an_end_that_does_not_speak_tls_is_refused() {
    let (at_a, mut at_b) = pipe();
    let a = secure(&SiteKey::generate().unwrap());
    at_b.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let error = a.accept(at_a).await.err().expect("refused");
    assert!(matches!(error, SecureError::Handshake(_)), "{error:?}");
}
