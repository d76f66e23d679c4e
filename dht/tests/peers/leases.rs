//! What holders told owners lasts while they renew it, and no longer.

use dht::{SiteClient, SiteStatus};
use page::Page;
use rustix::process::Signal;

use crate::common::{Peer, Site, ids, pages, ready, resolve, until};

/// A lease that a test can wait for, and that a loaded machine renews in time.
const LEASE: [&str; 2] = ["--lease", "15"];
/// One that may run out before it is renewed.
const SHORT_LEASE: [&str; 2] = ["--lease", "5"];

async fn counted(client: &SiteClient, what: &str, done: impl Fn(&SiteStatus) -> bool) -> SiteStatus {
    let done = &done;
    until(what, || async { Some(client.status().await.unwrap()).filter(done) }).await
}

/// An owner and a holder of `held`, which has told it all.
async fn told(site: &Site, lease: &[&str], held: &[Page]) -> (Peer, Peer) {
    let owner = site.peer("owner", &[], lease);
    let holder = site.peer("holder", &[&owner], lease);
    let client = holder.client().await;
    ready(&client, 1).await;
    client.add_file(&site.file("image", held)).await.unwrap();
    ready(&client, 1).await;
    (owner, holder)
}

#[tokio::test(flavor = "multi_thread")]
async fn renewals_keep_names_alive_beyond_a_lease_with_next_to_no_bytes() {
    const NAMES: u64 = 50_000;
    let site = Site::new();
    let held = pages(1, NAMES);
    let (owner, holder) = told(&site, &LEASE, &held).await;
    let client = holder.client().await;
    let first = client.status().await.unwrap().counters;
    assert_eq!(first.announced_ids, NAMES);
    assert_eq!(first.leases_renewed, 256, "each shard was told as a whole");
    // A lease is renewed after two fifths of it: with the third renewal it has outlasted itself.
    let three = |status: &SiteStatus| status.counters.leases_renewed >= 4 * 256;
    let last = counted(&client, "three renewals", three).await.counters;
    assert_eq!((last.announced_ids, last.leases_unlike), (NAMES, 0), "no name was told again");
    let bytes = last.announced_bytes - first.announced_bytes;
    assert!(bytes < NAMES / 2, "{bytes} bytes renewed what took {} to tell", first.announced_bytes);
    let client = owner.client().await;
    assert_eq!(client.status().await.unwrap().index.owner_entries, NAMES);
    let wanted = ids(client.domain(), &held[..500]);
    assert_eq!(resolve(&client, wanted).await.len(), 500);
    assert!(holder.run(&["status"]).contains("leases renewed"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_that_starts_anew_is_told_everything_again() {
    const NAMES: u64 = 5000;
    let site = Site::new();
    let held = pages(2, NAMES);
    let (mut owner, holder) = told(&site, &[], &held).await;
    owner.kill();
    let owner = site.peer("owner again", &[&holder], &[]);
    let client = owner.client().await;
    counted(&client, "the new owner to be told", |status| status.index.owner_entries == NAMES).await;
    assert_eq!(resolve(&client, ids(client.domain(), &held)).await.len() as u64, NAMES);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_holder_has_lost_vanishes_from_the_index_and_the_rest_stays() {
    const NAMES: u64 = 3000;
    let site = Site::new();
    let (kept, lost) = (pages(3, NAMES), pages(4, NAMES));
    let (owner, holder) = told(&site, &LEASE, &kept).await;
    let client = holder.client().await;
    let path = site.file("lost", &lost);
    client.add_file(&path).await.unwrap();
    ready(&client, 1).await;
    let client = owner.client().await;
    counted(&client, "both to be announced", |status| status.index.owner_entries == 2 * NAMES).await;
    std::fs::remove_file(path).unwrap();
    counted(&client, "the lost names to go", |status| status.index.owner_entries == NAMES).await;
    assert!(resolve(&client, ids(client.domain(), &lost)).await.is_empty());
    assert_eq!(resolve(&client, ids(client.domain(), &kept)).await.len() as u64, NAMES);
    let counters = holder.client().await.status().await.unwrap().counters;
    assert_eq!(counters.announced_ids, 2 * NAMES, "nothing was told again for it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_holder_that_was_frozen_beyond_its_lease_is_found_again() {
    const NAMES: u64 = 3000;
    let site = Site::new();
    let held = pages(5, NAMES);
    let (owner, holder) = told(&site, &SHORT_LEASE, &held).await;
    let client = owner.client().await;
    holder.signal(Signal::STOP);
    counted(&client, "the lease to run out", |status| status.index.owner_entries == 0).await;
    assert!(resolve(&client, ids(client.domain(), &held)).await.is_empty());
    holder.signal(Signal::CONT);
    until("the holder to be found again", || async {
        let found = resolve(&client, ids(client.domain(), &held)).await;
        (found.len() as u64 == NAMES).then_some(())
    })
    .await;
}
