//! Both ends of a connection for pages over loopback, and ends that do not keep to the protocol.

use std::time::Duration;

use libp2p::{identity::Keypair, tcp::tokio::TcpStream as PeerStream};
use tokio::{net::TcpListener, sync::mpsc};

use super::*;
use crate::{
    identity::SiteKey,
    limits::FETCH_BATCH,
    proof::End,
    secure::{Secure, SecureError},
};

const DOMAIN: DomainId = DomainId([7; 16]);

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// An asker's and a holder's end.
async fn pair() -> (PageConnection, PageConnection) {
    let site = SiteKey::generate().unwrap();
    let (arrivals, mut arrived) = mpsc::channel(1);
    let secure = |arrivals| Arc::new(Secure::new(&Keypair::generate_ed25519(), &site, arrivals).unwrap());
    let (asker, holder) = (secure(None), secure(Some(arrivals)));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let socket = tokio::net::TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (accepted, _) = listener.accept().await.unwrap();
    let (dialled, handed_over) =
        tokio::join!(asker.dial_for_pages(socket), holder.upgrade(PeerStream(accepted), End::Listener));
    assert!(matches!(handed_over, Err(SecureError::ForPages { .. })));
    (dialled.unwrap(), arrived.recv().await.unwrap())
}

/// The page of a small id.
fn page(id: u64) -> Page {
    [u8::try_from(id).unwrap(); PAGE_SIZE]
}

/// Runs the holder's end on a thread of its own.
fn holder(
    mut connection: PageConnection,
    does: impl FnOnce(&mut PageConnection) -> Result<(), PageError> + Send + 'static,
) -> std::thread::JoinHandle<Result<(), PageError>> {
    std::thread::spawn(move || does(&mut connection))
}

fn ids(range: std::ops::Range<u64>) -> Vec<ShortId> {
    range.map(ShortId).collect()
}

#[tokio::test]
async fn pages_come_as_they_were_sent_and_what_was_not_asked_for_or_is_wrong_counts_as_wrong() {
    let (mut asker, other) = pair().await;
    let holder = holder(other, |holder| {
        holder.greeted(DOMAIN, soon())?;
        assert!(holder.asked()?);
        assert_eq!(holder.request(soon())?, ids(0..100));
        // Every third is not there, so that the rest lies in many pieces.
        let mut pages: PageBatch = (0..100).map(|id| (ShortId(id), page(id))).collect();
        pages.retain(|id, _| id.0 % 3 != 0);
        holder.answer(&pages, soon())?;
        assert_eq!(holder.request(soon())?, ids(0..3));
        // One that was not asked for, and one twice.
        let pages = [1, 9, 1, 2].map(|id| (ShortId(id), page(id)));
        holder.answer(&pages.into_iter().collect(), soon())?;
        assert_eq!(holder.request(soon())?, ids(0..1));
        holder.refuse(soon())?;
        holder.request(soon()).map(drop)
    });
    asker.greet(DOMAIN).unwrap();
    let came = asker.fetch(&ids(0..100), soon(), |id, bytes| bytes == &page(id.0)).unwrap();
    let expected: PageBatch = (0..100).filter(|id| id % 3 != 0).map(|id| (ShortId(id), page(id))).collect();
    assert_eq!((came.pages, came.wrong), (expected, 0));
    let came = asker.fetch(&ids(0..3), soon(), |id, _| id.0 != 2).unwrap();
    assert_eq!((came.pages, came.wrong), ([(ShortId(1), page(1))].into_iter().collect(), 3));
    assert!(matches!(asker.fetch(&ids(0..1), soon(), |_, _| true), Err(PageError::Busy)));
    drop(asker);
    assert!(matches!(holder.join().unwrap(), Err(PageError::Closed)));
}

#[tokio::test]
async fn a_member_of_another_domain_is_told_nothing() {
    let (mut asker, other) = pair().await;
    let holder = holder(other, |holder| holder.greeted(DomainId([8; 16]), soon()));
    asker.greet(DOMAIN).unwrap();
    let refused = asker.fetch(&ids(0..1), soon(), |_, _| true);
    assert!(matches!(refused, Err(PageError::Closed | PageError::Io(_))));
    assert!(matches!(holder.join().unwrap(), Err(PageError::Domain { theirs: DOMAIN })));
}

/// What an asker makes of a holder that answers with `bytes` and closes.
async fn answered_with(bytes: Vec<u8>) -> PageError {
    let (mut asker, other) = pair().await;
    let holder = holder(other, move |holder| {
        holder.request(soon())?;
        holder.tls.writer().write_all(&bytes).map_err(PageError::Io)?;
        holder.flush(soon())
    });
    let failed = asker.fetch(&ids(0..2), soon(), |_, _| true).err().expect("it fails");
    holder.join().unwrap().unwrap();
    failed
}

#[tokio::test]
async fn an_answer_that_ends_too_soon_or_claims_too_much_fails() {
    let count = |count: usize| u32::try_from(count).unwrap().to_be_bytes().to_vec();
    let too_many = answered_with(count(FETCH_BATCH + 1)).await;
    assert!(matches!(too_many, PageError::Malformed(CodecError::TooLarge { field: "ids", .. })));
    let id = 1u64.to_be_bytes();
    for cut in [vec![0; 3], count(1), [&count(1)[..], &id, &page(1)[..4000]].concat()] {
        assert!(matches!(answered_with(cut).await, PageError::Closed));
    }
}

#[tokio::test]
async fn a_request_that_claims_too_much_or_a_broken_record_ends_the_connection() {
    let (mut asker, mut other) = pair().await;
    asker.tls.writer().write_all(&u32::MAX.to_be_bytes()).unwrap();
    asker.flush(soon()).unwrap();
    assert!(matches!(other.request(soon()), Err(PageError::Malformed(_))));
    // A record of application data whose seal is wrong.
    (&*asker.socket).write_all(&[&[0x17, 3, 3, 0, 32][..], &[0; 32]].concat()).unwrap();
    assert!(matches!(other.request(soon()), Err(PageError::Tls(_))));
}

#[tokio::test]
async fn a_holder_that_says_nothing_is_late_and_one_that_was_cancelled_ends() {
    let (mut asker, other) = pair().await;
    let late = asker.fetch(&ids(0..1), Instant::now() + PAGE_CONNECTION_LOOK, |_, _| true);
    assert!(matches!(late, Err(PageError::Late)));
    let cancel = asker.cancel();
    let waits = holder(asker, |asker| asker.fetch(&ids(0..1), soon(), |_, _| true).map(drop));
    drop(cancel);
    assert!(matches!(waits.join().unwrap(), Err(PageError::Closed | PageError::Io(_))));
    drop(other);
}

#[tokio::test]
async fn an_asker_that_does_not_read_is_late_and_takes_no_more_than_one_write() {
    let (asker, mut other) = pair().await;
    let pages: PageBatch = (0..FETCH_BATCH as u64).map(|id| (ShortId(id), page(1))).collect();
    // The kernel's buffers take some.
    let stuck = (0..1000).find_map(|_| other.answer(&pages, Instant::now() + PAGE_CONNECTION_LOOK).err());
    assert!(matches!(stuck, Some(PageError::Late)));
    assert!(other.tls.wants_write());
    drop(asker);
}
