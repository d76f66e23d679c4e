//! One peer's demands, and what they may not cost the others.

use std::time::Instant;

use dht::Told;
use dht::limits::FETCH_TIMEOUT;

use crate::common::{Site, ids, pages, ready, resolve, until};

/// The flooder holds a part of what the holder has, and asks for it without end; the asker wants the rest. The holder takes its time, so that
/// the flood is one however fast the machine is.
#[tokio::test(flavor = "multi_thread")]
async fn a_flooding_peer_keeps_nobody_from_their_pages() {
    let site = Site::new();
    let holder = site.peer("holder", &[], &["--fault", "slow=100"]);
    let flooder = site.peer("flooder", &[&holder], &["--fault", "flood"]);
    let asker = site.peer("asker", &[&holder], &[]);
    let (wanted, bait) = (pages(1, 3000), pages(2, 2000));
    holder.run(&["add", site.file("wanted", &wanted).to_str().unwrap()]);
    holder.run(&["add", site.file("bait", &bait).to_str().unwrap()]);
    flooder.run(&["add", site.file("copy", &bait).to_str().unwrap()]);
    let (at_holder, at_asker) = (holder.client().await, asker.client().await);
    ready(&at_holder, 2).await;
    ready(&at_asker, 2).await;
    until("the flood to go beyond the flooder's share", || async {
        (at_holder.status().await.unwrap().counters.refused_over_share > 0).then_some(())
    })
    .await;
    let asked = ids(at_asker.domain(), &wanted);
    // On a machine that is slow enough an answer may come too late, and the page is asked for again.
    until("all pages to come", || async {
        (resolve(&at_asker, asked.clone()).await.len() == wanted.len()).then_some(())
    })
    .await;
}

/// Both clients ask while the holder, which takes its time, has answered neither.
#[tokio::test(flavor = "multi_thread")]
async fn what_two_clients_of_a_host_want_at_once_comes_once() {
    let site = Site::new();
    let holder = site.peer("holder", &[], &["--fault", "slow=1500"]);
    let asker = site.peer("asker", &[&holder], &[]);
    let held = pages(1, 300);
    holder.run(&["add", site.file("image", &held).to_str().unwrap()]);
    let (at_holder, at_asker) = (holder.client().await, asker.client().await);
    ready(&at_holder, 1).await;
    ready(&at_asker, 1).await;
    let asked = ids(at_asker.domain(), &held);
    let (one, other) = tokio::join!(resolve(&at_asker, asked.clone()), resolve(&at_asker, asked.clone()));
    assert_eq!([one.len(), other.len()], [held.len(); 2]);
    let counters = at_holder.status().await.unwrap().counters;
    assert_eq!(counters.bytes_served, held.concat().len() as u64, "one copy of each page");
}

/// What the holders sent had long come, and waited for the client; it was taken for late, asked for again of others, and the holders were skipped.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_takes_its_time_makes_no_holder_late() {
    let site = Site::new();
    let first = site.peer("first", &[], &[]);
    let second = site.peer("second", &[&first], &[]);
    let asker = site.peer("asker", &[&first], &[]);
    let held = pages(1, 12_000);
    let image = site.file("image", &held);
    for peer in [&first, &second] {
        peer.run(&["add", image.to_str().unwrap()]);
    }
    for peer in [&first, &second, &asker] {
        ready(&peer.client().await, 2).await;
    }
    let client = asker.client().await;
    let mut found = client.resolve(ids(client.domain(), &held));
    let is_page = |told: &Told| matches!(told, Told::Found(_));
    let mut came = usize::from(found.recv().await.as_ref().is_some_and(is_page));
    let stopped = Instant::now();
    until("a holder's time to be over", || async { (stopped.elapsed() > FETCH_TIMEOUT).then_some(()) }).await;
    while let Some(told) = found.recv().await {
        came += usize::from(is_page(&told));
    }
    assert_eq!(came, held.len());
    let status = client.status().await.unwrap();
    assert_eq!(status.counters.failed_requests, 0, "{status:#?}");
    let mut served = 0;
    for peer in [&first, &second] {
        served += peer.client().await.status().await.unwrap().counters.bytes_served;
    }
    assert_eq!(served, held.concat().len() as u64, "one copy of each page");
}
