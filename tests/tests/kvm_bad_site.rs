//! Peers at the destination that serve wrong bytes, nothing, or slowly change the report and not the result.

use std::fs;
use std::time::Duration;

use dht::SiteStatus;
use tern_tests::real::{Fault, Guest, Journey, Lab, Load, Site, Terms, Vm, Wan};
use vmm::migrate::report::{Outcome, Report};

/// Pages of the guest that the faulty peer holds.
const PAGES: u64 = 1024;

/// Moves a guest, part of which a peer with `fault` holds, next door to the destination. Gives the report, and what the peer of the
/// destination's host says afterwards.
async fn story(fault: Fault) -> (Report, SiteStatus) {
    let lab = Lab::new().await;
    let (a, b) = lab.two_hosts().await;
    let file = lab.dir().join("content");
    // Each page is another one, and no two halves of a page are the same.
    let words = (0..PAGES * 512).map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29));
    fs::write(&file, words.flat_map(u64::to_le_bytes).collect::<Vec<u8>>()).expect("a file");

    let mut site = Site::new(&lab, "b").await;
    site.join(&lab, None).await;
    site.join(&lab, Some(fault)).await.add(&file).await;
    site.ready(0).await;
    // The source's site has a peer, too: without a domain of its own nothing would be asked of the destination's.
    let mut site_a = Site::new(&lab, "a").await;
    site_a.join(&lab, None).await;
    let guest = Guest {
        loads: vec![Load { file, addr: 16 << 20 }],
        site: Some(site_a.peers[0].socket().into()),
        ..Guest::default()
    };
    let mut source = Vm::launch(&lab, &a, "source", &guest).await;
    let mut destination = Vm::receive(&lab, &b, "destination", Some(site.peers[0].socket())).await;
    let wan = Wan::to(&destination.ticket().await, 100_000_000, Duration::from_millis(20));
    let report =
        Journey::whole(&source, wan.ticket(), Terms::default()).await.expect("it completes all the same");
    source.assert_ends_well().await;
    destination.assert_lives().await;
    assert_eq!((report.outcome, report.verified), (Outcome::Completed, true), "{report:#?}");
    assert!(
        report.rungs.source.pages >= PAGES && report.rungs.site.pages == 0,
        "the source gave it all: {report:#?}"
    );
    (report, site.peers[0].status().await)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_serves_wrong_bytes_is_found_out_and_the_source_asked() {
    let (_, status) = story(Fault::WrongBytes).await;
    assert!(status.counters.wrong_pages > 0, "{status:#?}");
    assert!(
        status.peers.iter().any(|peer| peer.avoided && peer.wrong_pages > 0),
        "the liar is named: {status:#?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_never_answers_is_not_waited_for() {
    let (report, status) = story(Fault::Silent).await;
    assert!(report.site_timeouts > 0 || status.counters.failed_requests > 0, "{report:#?} {status:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_slower_than_the_source_is_not_waited_for() {
    let (report, status) = story(Fault::SlowMs(5000)).await;
    assert!(report.site_timeouts > 0 || status.counters.failed_requests > 0, "{report:#?} {status:#?}");
}
