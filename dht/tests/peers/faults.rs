//! What happens to a site while VMs ask it: peers die, freeze and come, the network is cut and mended, a clock is another one.
//!
//! In each story every page that comes is hashed by the test, every search ends, what was held all along is found again once the site has
//! settled, and `dht status` says what is going on. (Beside these: `site.rs` has holders that lie, are silent or slow, and a peer with
//! another key; whole VMs arrive at a site of twelve in the workspace's own tests.)

use std::{
    collections::BTreeSet,
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use dht::shard::{MemberId, ShardId, ShardMap};
use dht::{SiteClient, SiteStatus};
use libp2p::PeerId;
use page::{Page, ShortId};
use rustix::process::Signal;

use crate::common::{DOZENS, Peer, Site, ids, pages, ready, resolve, resolve_while, until};

const PEERS: usize = 12;

/// Starts twelve peers on loopback; the first holds nothing, of the others each holds its own part and its neighbour's.
fn site_of_twelve(site: &Site, part: u64) -> Vec<Peer> {
    let mut peers: Vec<Peer> = Vec::new();
    for n in 0..PEERS {
        let join: Vec<&Peer> = peers.first().into_iter().collect();
        peers.push(site.peer(&format!("p{n}"), &join, &[]));
    }
    let parts: Vec<_> = (1..PEERS as u64).map(|n| site.file(&format!("part{n}"), &pages(n, part))).collect();
    for (n, peer) in peers[1..].iter().enumerate() {
        let [own, next] = [&parts[n], &parts[(n + 1) % parts.len()]].map(|path| path.to_str().unwrap());
        peer.run(&["add", own, next]);
    }
    peers
}

fn everything(part: u64) -> Vec<Page> {
    (1..PEERS as u64).flat_map(|n| pages(n, part)).collect()
}

async fn all_ready(peers: &[Peer], others: usize) {
    for peer in peers {
        ready(&peer.client().await, others).await;
    }
}

/// Looks until a status is as it should be.
async fn status_until(
    client: &SiteClient,
    what: &str,
    as_expected: impl Fn(&SiteStatus) -> bool,
) -> SiteStatus {
    until(what, || async { Some(client.status().await.unwrap()).filter(|status| as_expected(status)) }).await
}

fn known(status: &SiteStatus) -> usize {
    usize::try_from(status.members.known).unwrap()
}

/// A peer as the index knows it.
fn member(peer: &Peer) -> MemberId {
    let id: PeerId = peer.address.rsplit_once("/p2p/").unwrap().1.parse().unwrap();
    MemberId::of_peer(&id.to_bytes())
}

async fn finds_all(client: &SiteClient, asked: &[ShortId]) {
    until("all pages to be found again", || async {
        (resolve(client, asked.to_vec()).await.len() == asked.len()).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn owners_killed_and_frozen_in_the_middle_of_a_lookup_cost_no_page_that_others_index_and_hold() {
    const PART: u64 = 700;
    let _turn = DOZENS.acquire().await.unwrap();
    let site = Site::new();
    let mut peers = site_of_twelve(&site, PART);
    all_ready(&peers, PEERS - 1).await;
    let client = peers[0].client().await;
    let asked = ids(client.domain(), &everything(PART));

    // Not neighbours, so that no part loses both of its holders. All of them own some shards.
    let (killed, frozen) = (3, 7);
    let found = resolve_while(&client, asked.clone(), || {
        peers[frozen].signal(Signal::STOP);
        peers[killed].kill();
    })
    .await;
    // What was on its way from a holder that died is asked of the other one. Only what no other peer has in its part of the index may be missing.
    let missing = asked.iter().filter(|id| found.iter().all(|page| page.id != **id));
    let both = [killed, frozen].map(|n| member(&peers[n]));
    let site: BTreeSet<MemberId> = peers.iter().map(member).collect();
    let map = ShardMap::new(&site);
    let lost: Vec<_> =
        missing.filter(|id| !map.owners(ShardId::of(**id)).iter().all(|at| both.contains(at))).collect();
    assert!(lost.is_empty(), "{} of {} have another owner: {lost:?}", lost.len(), asked.len());
    let status =
        status_until(&client, "the killed peer to be gone", |status| known(status) <= PEERS - 2).await;
    assert!(status.counters.failed_requests > 0 && status.counters.wrong_pages == 0, "{status:#?}");

    // The frozen one is skipped or gone: it costs no search anything any more, and the index moves to those that are left.
    status_until(&client, "the frozen peer to be gone", |status| status.ready && known(status) == PEERS - 3)
        .await;
    finds_all(&client, &asked).await;
    peers[frozen].signal(Signal::CONT);
    status_until(&client, "the thawed peer to be back", |status| status.ready && known(status) == PEERS - 2)
        .await;
    finds_all(&client, &asked).await;
    let counters = client.status().await.unwrap().counters;
    assert_eq!(counters.refused_connections, 0, "the frozen and the killed one are of this site");
    let alive: Vec<&Peer> = (0..PEERS).filter(|n| *n != killed).map(|n| &peers[n]).collect();
    every_address_is_one_that_was_printed(&alive).await;
}

/// Whoever dialled whom: a peer is shown where it listens, and not where it dials from.
async fn every_address_is_one_that_was_printed(alive: &[&Peer]) {
    for at in alive {
        let status = ready(&at.client().await, alive.len() - 1).await;
        let shown: BTreeSet<&str> = status.peers.iter().map(|peer| peer.address.as_str()).collect();
        let others = alive.iter().filter(|peer| peer.pid() != at.pid());
        assert_eq!(shown, others.map(|peer| peer.listens()).collect());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_comes_back_is_known_by_where_it_listens_now() {
    let site = Site::new();
    let a = site.peer("a", &[], &[]);
    let c = site.peer("c", &[&a], &[]);
    let identity = site.identity("b.key", [7; 32]);
    let more = ["--identity", identity.to_str().unwrap()];
    for _ in 0..3 {
        let mut b = site.peer("b", &[&a, &c], &more);
        every_address_is_one_that_was_printed(&[&a, &b, &c]).await;
        b.kill();
        for left in [&a, &c] {
            ready(&left.client().await, 1).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn peers_that_come_while_others_ask_take_their_shards_and_nobody_errs() {
    let _turn = DOZENS.acquire().await.unwrap();
    let site = Site::new();
    let a = site.peer("a", &[], &[]);
    let b = site.peer("b", &[&a], &[]);
    let held = pages(1, 2000);
    b.run(&["add", site.file("held", &held).to_str().unwrap()]);
    ready(&b.client().await, 1).await;
    let client = a.client().await;
    ready(&client, 1).await;
    let asked = ids(client.domain(), &held);
    let mut later: Vec<Peer> = Vec::new();
    for n in 0..6u64 {
        let mut joined = None;
        let search = resolve_while(&client, asked.clone(), || {
            joined = Some(site.peer(&format!("late{n}"), &[&a], &[]));
        });
        // A name whose shard moves at this moment may be a miss; what comes is right, and the search ends.
        assert!(search.await.len() <= asked.len());
        later.extend(joined);
        assert!(resolve(&client, asked.clone()).await.len() <= asked.len());
    }
    for peer in [&a, &b].into_iter().chain(&later) {
        ready(&peer.client().await, 1 + later.len()).await;
    }
    for peer in [&a].into_iter().chain(&later) {
        let client = peer.client().await;
        assert_eq!(resolve(&client, asked.clone()).await.len(), asked.len());
        let status = client.status().await.unwrap();
        assert!(status.index.shards_owned > 0 && status.counters.wrong_pages == 0, "{status:#?}");
    }
}

/// Two network namespaces and the one link between them.
struct TwoHalves {
    names: [String; 2],
}

const HALVES: [&str; 2] = ["10.98.0.1", "10.98.0.2"];

impl TwoHalves {
    /// None if this process may not make them.
    fn if_root() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let halves = Self { names: ["a", "b"].map(|half| format!("tern-half-{half}-{id}")) };
        let [a, b] = &halves.names;
        ip(&format!("netns add {a}"));
        ip(&format!("netns add {b}"));
        ip(&format!("-n {a} link add lan type veth peer name lan netns {b}"));
        for (name, address) in halves.names.iter().zip(HALVES) {
            ip(&format!("-n {name} addr add {address}/24 dev lan"));
            ip(&format!("-n {name} link set lo up"));
            ip(&format!("-n {name} link set lan up"));
        }
        Some(halves)
    }

    fn link(&self, state: &str) {
        ip(&format!("-n {} link set lan {state}", self.names[0]));
    }
}

impl Drop for TwoHalves {
    fn drop(&mut self) {
        for name in &self.names {
            // One that was not made need not be removed.
            let _ = Command::new("ip").args(["netns", "del", name]).stderr(Stdio::null()).status();
        }
    }
}

fn ip(args: &str) {
    let output = Command::new("ip").args(args.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_site_that_is_split_in_two_serves_what_each_half_has_and_heals() {
    const HELD: u64 = 150;
    let _turn = DOZENS.acquire().await.unwrap();
    let Some(halves) = TwoHalves::if_root() else {
        eprintln!("not root: no site is split");
        return;
    };
    let site = Site::new();
    let mut peers: Vec<Peer> = Vec::new();
    for n in 0..PEERS {
        let half = n % 2;
        let join: Vec<&Peer> = peers.first().into_iter().collect();
        let within = ["ip", "netns", "exec", &halves.names[half]];
        let peer = site.peer_within(&within, &format!("p{n}"), HALVES[half], &join, &[]);
        peer.run(&["add", site.file(&format!("f{n}"), &pages(n as u64, HELD)).to_str().unwrap()]);
        peers.push(peer);
    }
    all_ready(&peers, PEERS - 1).await;
    let of = |half: usize| -> Vec<Page> {
        (0..PEERS).filter(|n| n % 2 == half).flat_map(|n| pages(n as u64, HELD)).collect()
    };
    let (client_a, client_b) = (peers[2].client().await, peers[3].client().await);
    let domain = client_a.domain().clone();
    let asked = ids(&domain, &[of(0), of(1)].concat());
    assert_eq!(resolve(&client_a, asked.clone()).await.len(), asked.len());

    halves.link("down");
    // At once, while nobody has noticed: it ends, and what it finds is right.
    assert!(resolve(&client_a, asked.clone()).await.len() >= of(0).len() / 2);
    for (client, half) in [(&client_a, 0), (&client_b, 1)] {
        status_until(client, "a half to see that the other is gone", |status| {
            status.ready && known(status) == PEERS / 2 - 1
        })
        .await;
        finds_all(client, &ids(&domain, &of(half))).await;
    }

    halves.link("up");
    for client in [&client_a, &client_b] {
        status_until(client, "the halves to find each other", |status| {
            status.ready && known(status) == PEERS - 1
        })
        .await;
        finds_all(client, &asked).await;
        assert_eq!(client.status().await.unwrap().counters.wrong_pages, 0);
    }
}

/// Leases and all deadlines are relative, so that no clock is compared with another host's: a host whose monotonic clocks stand ten days ahead is a
/// peer like any other. (What it does with the wall clock is nothing but to write down when a retained checkpoint was used. A clock that
/// jumps while a peer runs cannot be made here: Linux fixes a time namespace's offsets before the first process.)
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_whose_clocks_are_days_ahead_announces_and_finds_like_any_other() {
    let ahead = ["unshare", "--time", "--kill-child", "--monotonic", "864000", "--boottime", "864000"];
    let allowed = Command::new(ahead[0]).args(&ahead[1..]).arg("true").stderr(Stdio::null()).status();
    if !allowed.is_ok_and(|status| status.success()) {
        eprintln!("no time namespaces here: no clock is shifted");
        return;
    }
    let site = Site::new();
    let a = site.peer("a", &[], &[]);
    let skewed = site.peer_within(&ahead, "skewed", "127.0.0.1", &[&a], &[]);
    let (at_a, at_skewed) = (pages(1, 800), pages(2, 800));
    a.run(&["add", site.file("here", &at_a).to_str().unwrap()]);
    skewed.run(&["add", site.file("there", &at_skewed).to_str().unwrap()]);
    for peer in [&a, &skewed] {
        ready(&peer.client().await, 1).await;
    }
    for (peer, other) in [(&a, &at_skewed), (&skewed, &at_a)] {
        let client = peer.client().await;
        let status = client.status().await.unwrap();
        assert_eq!(status.index.shards_owned, 256);
        assert_eq!(resolve(&client, ids(client.domain(), other)).await.len(), other.len());
        assert_eq!(client.status().await.unwrap().counters.failed_requests, 0);
    }
}
