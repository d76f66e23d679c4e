//! A site that is large for its peers: each is connected to few of the others, and connects to others as it needs them.

use crate::common::{DOZENS, Peer, Site, ids, pages, ready, resolve, until};
use dht::SiteStatus;

const PEERS: u64 = 12;
/// A site of more than four is large, and of more than six connections those go that are not used.
const LIMITS: [&str; 4] = ["--mesh", "4", "--connections", "6"];

/// Starts the peers, each joined by the one before it, each with pages of its own.
fn site_of_twelve(site: &Site, held: u64) -> Vec<Peer> {
    let mut peers: Vec<Peer> = Vec::new();
    for n in 0..PEERS {
        let join: Vec<&Peer> = peers.last().into_iter().collect();
        let peer = site.peer(&format!("p{n}"), &join, &LIMITS);
        peer.run(&["add", site.file(&format!("f{n}"), &pages(n, held)).to_str().unwrap()]);
        peers.push(peer);
    }
    peers
}

async fn all_know_all(peers: &[Peer]) -> Vec<SiteStatus> {
    let mut all = Vec::new();
    for peer in peers {
        let client = peer.client().await;
        let status = until("a peer to know all others and to have announced", || async {
            let status = client.status().await.unwrap();
            (status.ready && status.members.known == PEERS - 1).then_some(status)
        });
        all.push(status.await);
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn every_peer_finds_what_any_other_holds_though_it_is_connected_to_few() {
    const HELD: u64 = 200;
    let _turn = DOZENS.acquire().await.unwrap();
    let site = Site::new();
    let peers = site_of_twelve(&site, HELD);
    all_know_all(&peers).await;
    // The index is all there: what a shard's owners keep is what all hold in it.
    let everything: Vec<_> = (0..PEERS).flat_map(|n| pages(n, HELD)).collect();
    for peer in &peers {
        let client = peer.client().await;
        let asked = ids(client.domain(), &everything);
        until("all pages to be found", || async {
            (resolve(&client, asked.clone()).await.len() == everything.len()).then_some(())
        })
        .await;
    }
    // Nobody asks any more: connections come down to the limit, and nobody is forgotten.
    for peer in &peers {
        let client = peer.client().await;
        let status = until("unused connections to be let go", || async {
            let status = client.status().await.unwrap();
            (status.members.connected <= 6).then_some(status)
        })
        .await;
        assert_eq!(status.members.known, PEERS - 1, "{status:#?}");
        assert_eq!(status.counters.wrong_pages, 0);
        assert!(status.counters.connections_over_limit == 0, "{status:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_full_owners_do_not_keep_is_found_beside_what_they_keep() {
    const HELD: u64 = 4096;
    const HOLDERS: u64 = 4;
    const ENTRIES: u64 = 1500;
    let _turn = DOZENS.acquire().await.unwrap();
    let site = Site::new();
    let limits = ["--owner-entries", &ENTRIES.to_string()];
    let asker = site.peer("asker", &[], &limits);
    let mut peers = Vec::new();
    for n in 0..HOLDERS {
        let peer = site.peer(&format!("h{n}"), &[&asker], &limits);
        peer.run(&["add", site.file(&format!("f{n}"), &pages(n, HELD)).to_str().unwrap()]);
        peers.push(peer);
    }
    for peer in &peers {
        let status = ready(&peer.client().await, peers.len()).await;
        assert!(status.index.owner_entries <= ENTRIES, "{status:#?}");
    }
    let client = asker.client().await;
    let held: Vec<_> = (0..HOLDERS).flat_map(|n| pages(n, HELD)).collect();
    let asked = ids(client.domain(), &held);
    let status = ready(&client, peers.len()).await;
    assert!(status.index.owner_entries <= ENTRIES && status.index.owner_entries > ENTRIES / 4, "{status:#?}");
    until("nearly all pages to be found", || async {
        (resolve(&client, asked.clone()).await.len() >= held.len() * 99 / 100).then_some(())
    })
    .await;
    // A page alone has none beside it: those who served the others are asked.
    for id in asked.iter().step_by(700) {
        until("a page alone to be found", || async {
            (resolve(&client, vec![*id]).await.len() == 1).then_some(())
        })
        .await;
    }
}
