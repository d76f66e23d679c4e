//! A peer that announces what it does not hold.

use crate::common::{Site, ids, pages, ready, resolve};

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_announces_what_it_does_not_hold_is_found_out_and_left_out() {
    let site = Site::new();
    let good = site.peer("good", &[], &[]);
    let bad = site.peer("false", &[&good], &["--fault", "announce-false"]);
    let third = site.peer("third", &[&good], &[]);
    let asking = site.peer("asking", &[&good], &[]);
    let held = pages(1, 4000);
    good.run(&["add", site.file("image", &held).to_str().unwrap()]);
    bad.run(&["add", site.file("copy", &held).to_str().unwrap()]);
    for peer in [&good, &bad, &third, &asking] {
        ready(&peer.client().await, 3).await;
    }
    let client = asking.client().await;
    let found = resolve(&client, ids(client.domain(), &held)).await;
    let state = || [&good, &bad, &third, &asking].map(|peer| peer.run(&["status"])).join("\n");
    assert_eq!(found.len(), 4000, "what the false one lacks comes from elsewhere: {}", state());
    let first = client.status().await.unwrap();
    let bad_id = bad.client().await.peer_id().to_owned();
    for peer in &first.peers {
        assert_eq!(peer.left_out_ms > 0, peer.peer_id == bad_id, "{peer:?}");
        assert!(!peer.doubted && !peer.avoided);
    }
    assert!(asking.run(&["status"]).contains("announced pages that it does not have: left out"));
    assert_eq!(first.counters.wrong_pages, 0);

    // It costs nothing more: all is asked of the one that has it, in as few requests as it takes.
    assert_eq!(resolve(&client, ids(client.domain(), &held)).await.len(), 4000);
    let second = client.status().await.unwrap();
    let fetches = second.counters.fetches_sent - first.counters.fetches_sent;
    assert!(
        fetches < first.counters.fetches_sent,
        "{fetches} requests, {} before",
        first.counters.fetches_sent
    );
}
