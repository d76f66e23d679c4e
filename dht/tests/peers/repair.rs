//! The owners of a shard make good what one of them was not told.

use crate::common::{Peer, Site, ids, pages, ready, resolve, until};

#[tokio::test(flavor = "multi_thread")]
async fn a_new_owner_learns_from_the_other_owner_what_a_holder_does_not_tell_it() {
    let site = Site::new();
    // Who owns what hangs on the identities: with these the late one owns shards together with peers that were told.
    let keys: Vec<_> = (1..=5).map(|n| site.identity(&format!("key{n}"), [n; 32])).collect();
    let key = |at: usize| keys[at].to_str().unwrap();
    let first = site.peer("first", &[], &["--identity", key(0)]);
    let other = |(name, at)| site.peer(name, &[&first], &["--identity", key(at)]);
    let others: Vec<Peer> = [("second", 1), ("third", 2)].map(other).into();
    let holder = site.peer("holder", &[&first], &["--identity", key(3), "--fault", "old-owners"]);
    let old = || std::iter::once(&first).chain(&others);
    for peer in old().chain([&holder]) {
        ready(&peer.client().await, 3).await;
    }
    let held = pages(1, 2000);
    holder.run(&["add", site.file("image", &held).to_str().unwrap()]);
    ready(&holder.client().await, 3).await;

    // The holder never says a word to it.
    let late = site.peer("late", &[&first], &["--identity", key(4)]);
    let client = late.client().await;
    ready(&client, 4).await;
    let status = until("the late owner to learn from the others", || async {
        let status = client.status().await.unwrap();
        (status.counters.entries_learnt > 0).then_some(status)
    })
    .await;
    assert_eq!(status.counters.announced_ids_taken, 0, "nobody told it anything");
    assert!(status.index.owner_entries <= status.counters.entries_learnt);
    let mut passed_on = 0;
    for peer in old() {
        passed_on += peer.client().await.status().await.unwrap().counters.entries_passed_on;
    }
    assert!(passed_on >= status.counters.entries_learnt);
    assert!(late.run(&["status"]).contains("entries learnt from other owners"));

    // Some of what it owns it can answer now, and what it finds is right.
    let found = resolve(&client, ids(client.domain(), &held)).await;
    assert!(found.len() as u64 >= status.counters.entries_learnt, "{} found", found.len());
}
