//! Two endpoints of one process over loopback UDP.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tempfile::TempDir;
use tokio::net::UdpSocket;

use super::*;
use crate::migrate::identity::{HostIdentity, HostKey};
use crate::migrate::transport::{Close, Endpoint, WanBytes};

struct Host {
    folder: TempDir,
    identity: Arc<HostIdentity>,
}

impl Host {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let identity = HostIdentity::load_or_create(
            &folder.path().join("host.key"),
            &folder.path().join("authorized_keys"),
        )
        .unwrap();
        Self { folder, identity: Arc::new(identity) }
    }

    fn trusts(&self, other: &Self) {
        let path = self.folder.path().join("authorized_keys");
        fs::write(&path, other.identity.line()).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    }

    fn endpoint(&self) -> (Endpoint, SocketAddr) {
        let endpoint = Endpoint::listen("127.0.0.1:0".parse().unwrap(), &self.identity).unwrap();
        let address = endpoint.local_address().unwrap();
        (endpoint, address)
    }
}

/// What the source has of a link.
type Here = (Link, SourceChannels, FrameReader);

/// The outcome at both ends of one attempt, to the opening of the channels.
async fn attempt(
    source: &Host,
    destination: &Host,
    key: Option<HostKey>,
) -> (Result<Here, MigrateError>, Result<(Link, DestinationChannels), MigrateError>) {
    let (listening, address) = destination.endpoint();
    let (calling, _) = source.endpoint();
    let there = tokio::spawn(async move {
        let link = listening.accept().await.unwrap().finish().await?;
        let channels = open_destination(&link).await?;
        Ok((link, channels))
    });
    let here = async {
        let link = calling.connect(address, key).await?;
        let channels = open_source(&link).await?;
        let wants = accept_wants(link.clone()).await?;
        Ok((link, channels, wants))
    };
    let here = here.await;
    (here, there.await.unwrap())
}

async fn pair() -> (Here, (Link, DestinationChannels)) {
    let (a, b) = (Host::new(), Host::new());
    b.trusts(&a);
    let (here, there) = attempt(&a, &b, Some(b.identity.key())).await;
    (here.unwrap(), there.unwrap())
}

#[tokio::test]
async fn frames_arrive_whole_and_in_order_on_every_channel() {
    let ((here, mut source, mut wants), (there, mut destination)) = pair().await;
    let frames: Vec<Bytes> = (0..20u8).map(|i| vec![i; usize::from(i) * 5000].into()).collect();
    let sending = async {
        for frame in &frames {
            source.literals.send(frame.clone()).await.unwrap();
            source.names.send(frame.slice(..frame.len() / 2)).await.unwrap();
        }
        source.control.send(Bytes::from_static(b"offer")).await.unwrap();
        source.literals.finish().unwrap();
    };
    let receiving = async {
        assert_eq!(destination.control_in.next().await.unwrap().unwrap(), "offer");
        for frame in &frames {
            assert_eq!(destination.literals.next().await.unwrap().as_ref(), Some(frame));
            assert_eq!(destination.names.next().await.unwrap().unwrap().len(), frame.len() / 2);
        }
        assert_eq!(destination.literals.next().await.unwrap(), None);
        destination.wants.send(Bytes::from_static(b"want")).await.unwrap();
        destination.control.send(Bytes::from_static(b"ready")).await.unwrap();
    };
    tokio::join!(sending, receiving);
    assert_eq!(wants.next().await.unwrap().unwrap(), "want");
    assert_eq!(source.control_in.next().await.unwrap().unwrap(), "ready");
    let (WanBytes { tx, .. }, WanBytes { rx, .. }) = (here.wan_bytes(), there.wan_bytes());
    let payload = 20 * 19 / 2 * 5000 * 3 / 2;
    assert!(rx > payload && tx > payload * 9 / 10, "{rx} bytes received of {tx} sent for {payload}");
}

/// Forwards datagrams between one caller and `server` and counts them, headers included, to the server and back.
async fn counting_path(server: SocketAddr, counts: Arc<[AtomicU64; 2]>) -> SocketAddr {
    let outside = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let inside = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    inside.connect(server).await.unwrap();
    let address = outside.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut up, mut down) = (vec![0; 65536], vec![0; 65536]);
        let mut caller = None;
        loop {
            tokio::select! {
                got = outside.recv_from(&mut up) => {
                    let (length, from) = got.unwrap();
                    caller = Some(from);
                    counts[0].fetch_add(28 + length as u64, Ordering::Relaxed);
                    inside.send(&up[..length]).await.unwrap();
                }
                got = inside.recv(&mut down) => {
                    let length = got.unwrap();
                    counts[1].fetch_add(28 + length as u64, Ordering::Relaxed);
                    outside.send_to(&down[..length], caller.unwrap()).await.unwrap();
                }
            }
        }
    });
    address
}

#[tokio::test]
async fn bytes_counted_here_agree_with_those_counted_on_the_path() {
    let (a, b) = (Host::new(), Host::new());
    b.trusts(&a);
    let (listening, server) = b.endpoint();
    let counts = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
    let path = counting_path(server, Arc::clone(&counts)).await;
    let there = tokio::spawn(async move {
        let link = listening.accept().await.unwrap().finish().await.unwrap();
        let mut channels = open_destination(&link).await.unwrap();
        while channels.literals.next().await.unwrap().is_some() {}
        channels.control.send(Bytes::from_static(b"all here")).await.unwrap();
        link.closed().await
    });
    let (calling, _) = a.endpoint();
    let link = calling.connect(path, Some(b.identity.key())).await.unwrap();
    let mut channels = open_source(&link).await.unwrap();
    for i in 0..200u8 {
        channels.literals.send(vec![i; 20_000].into()).await.unwrap();
        // Paced: the path drops nothing, so that both ends of it have seen the same.
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    channels.literals.finish().unwrap();
    assert_eq!(channels.control_in.next().await.unwrap().unwrap(), "all here");
    link.close(Close::Done, "done");
    there.await.unwrap();
    let (ours, theirs) = (link.wan_bytes(), counts.each_ref().map(|c| c.load(Ordering::Relaxed)));
    for (counted, seen) in [(ours.tx, theirs[0]), (ours.rx, theirs[1])] {
        let apart = counted.abs_diff(seen);
        assert!(apart * 100 <= seen * 3, "counted {counted} here and {seen} on the path");
    }
    assert!(ours.rx * 50 < ours.tx, "acknowledgements cost {} bytes for {}", ours.rx, ours.tx);
}

#[tokio::test]
async fn a_source_that_the_destination_does_not_know_is_refused_and_both_say_which_key() {
    let (a, b) = (Host::new(), Host::new());
    let (here, there) = attempt(&a, &b, Some(b.identity.key())).await;
    let key = a.identity.fingerprint();
    let (here, there) = (here.unwrap_err(), there.unwrap_err());
    assert!(matches!(here, MigrateError::RefusedByPeer { .. }), "{here:?}");
    assert!(here.to_string().contains(&format!("tern-ed25519 {key}")), "{here}");
    assert!(matches!(there, MigrateError::UnknownPeer { .. }), "{there:?}");
    assert!(there.to_string().contains(&format!("tern-ed25519 {key}")), "{there}");
    assert!(there.to_string().contains("authorized_keys"), "{there}");
}

#[tokio::test]
async fn a_destination_without_a_ticket_must_be_known() {
    let (a, b) = (Host::new(), Host::new());
    b.trusts(&a);
    let (here, there) = attempt(&a, &b, None).await;
    let here = here.unwrap_err();
    assert!(matches!(here, MigrateError::UnknownPeer { .. }), "{here:?}");
    assert!(here.to_string().contains(&b.identity.fingerprint()), "{here}");
    let there = there.unwrap_err();
    assert!(matches!(there, MigrateError::RefusedByPeer { .. }), "{there:?}");
    assert!(there.to_string().contains(&b.identity.fingerprint()), "{there}");
    a.trusts(&b);
    let (here, there) = attempt(&a, &b, None).await;
    assert_eq!(here.unwrap().0.peer(), b.identity.key());
    assert_eq!(there.unwrap().0.peer(), a.identity.key());
}

#[tokio::test]
async fn a_ticket_for_another_key_is_refused_even_if_the_host_is_known() {
    let (a, b, other) = (Host::new(), Host::new(), Host::new());
    b.trusts(&a);
    a.trusts(&b);
    let (here, _) = attempt(&a, &b, Some(other.identity.key())).await;
    let error = here.unwrap_err();
    assert!(matches!(error, MigrateError::WrongPeer { .. }), "{error:?}");
    assert!(error.to_string().contains(&other.identity.fingerprint()), "{error}");
}

#[tokio::test]
async fn a_frame_beyond_the_bound_is_refused_by_both_ends() {
    let ((_here, mut source, _wants), (_there, mut destination)) = pair().await;
    let long = Bytes::from(vec![0; limits::MAX_NAMES_FRAME_BYTES + 1]);
    let error = source.names.send(long).await.unwrap_err();
    assert!(matches!(error, MigrateError::Frame { channel: "names", .. }), "{error:?}");
    // The same from an end that does not keep to the bound.
    let length = u32::try_from(limits::MAX_NAMES_FRAME_BYTES + 1).unwrap();
    source.names.stream.write_all(&length.to_le_bytes()).await.unwrap();
    let error = destination.names.next().await.unwrap_err();
    assert!(error.to_string().contains("at most"), "{error}");
}

#[tokio::test]
async fn a_frame_cut_short_is_an_error_and_an_end_between_frames_is_not() {
    let ((_here, mut source, _wants), (_there, mut destination)) = pair().await;
    source.names.stream.write_all(&[9, 0, 0, 0, 1]).await.unwrap();
    source.names.finish().unwrap();
    assert!(destination.names.next().await.unwrap_err().to_string().contains("within a frame"));
    source.literals.stream.write_all(&[0, 0]).await.unwrap();
    source.literals.finish().unwrap();
    assert!(destination.literals.next().await.unwrap_err().to_string().contains("within a frame's length"));
}

#[tokio::test]
async fn a_closed_connection_says_why_at_the_other_end() {
    let ((here, mut source, _wants), (there, _channels)) = pair().await;
    there.close(Close::Failed, "the root does not match");
    let error = source.control_in.next().await.unwrap_err();
    assert!(matches!(error, MigrateError::ConnectionLost { .. }), "{error:?}");
    assert!(error.to_string().contains("the root does not match"), "{error}");
    assert!(here.failure().is_some());
}

#[tokio::test]
async fn nobody_there_is_a_connection_error_within_the_deadline() {
    let host = Host::new();
    let (endpoint, _) = host.endpoint();
    // A bound socket that never answers.
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let started = std::time::Instant::now();
    let error = endpoint.connect(silent.local_addr().unwrap(), Some(HostKey([1; 32]))).await.unwrap_err();
    assert!(matches!(error, MigrateError::Connect { .. }), "{error:?}");
    assert!(started.elapsed() < limits::CONNECT_TIMEOUT + Duration::from_secs(5));
}
