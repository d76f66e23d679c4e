//! A site of several real peers on loopback.

use std::{io::Write, net::TcpStream};

use crate::common::{Site, dht, ids, memory, pages, read, ready, resolve, until, whole};
use dht::FoundOn;

#[tokio::test(flavor = "multi_thread")]
async fn memory_and_files_of_two_hosts_are_found_from_a_third() {
    let site = Site::new();
    let a = site.peer("a", &[], &[]);
    let b = site.peer("b", &[&a], &[]);
    let c = site.peer("c", &[&a], &[]);
    let (in_memory, in_file) = (pages(1, 3000), pages(2, 2000));
    let (at_a, at_c) = (a.client().await, c.client().await);
    let (_vm, fd) = memory(&in_memory);
    let registration = at_a.register_memory("vm", fd, &whole(3000)).await.unwrap();
    b.run(&["add", site.file("image", &in_file).to_str().unwrap()]);
    for peer in [&a, &b, &c] {
        ready(&peer.client().await, 2).await;
    }

    let mut asked = ids(at_c.domain(), &in_memory);
    asked.extend(ids(at_c.domain(), &in_file));
    asked.extend(ids(at_c.domain(), &pages(3, 500)));
    let found = resolve(&at_c, asked.clone()).await;
    assert_eq!(found.len(), 5000, "what somebody holds is found, what nobody holds is not");
    assert!(found.iter().all(|page| page.rung == FoundOn::Site));

    let found = resolve(&at_a, asked).await;
    assert_eq!(found.iter().filter(|page| page.rung == FoundOn::Host).count(), 3000);
    assert_eq!(found.iter().filter(|page| page.rung == FoundOn::Site).count(), 2000);

    let name = at_c.domain().name(&in_file[7]).to_string();
    assert!(c.run(&["locate", &name]).contains(b.client().await.peer_id()));
    assert!(b.run(&["locate", &name[..16], "--json"]).contains("block 7"));

    let status = at_c.status().await.unwrap();
    assert_eq!(status.counters.site_hits, 5000);
    assert!(status.counters.lookups_sent <= 8, "{} lookups for 5500 names", status.counters.lookups_sent);
    assert_eq!(status.counters.wrong_pages, 0);

    drop(registration);
    until("the memory to be let go", || async {
        at_a.status().await.unwrap().contents.is_empty().then_some(())
    })
    .await;
    let found = resolve(&at_c, ids(at_c.domain(), &in_memory)).await;
    assert!(found.is_empty(), "a memory that was taken back is not served");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_holder_costs_its_own_pages_and_no_others() {
    let site = Site::new();
    let mut a = site.peer("a", &[], &[]);
    let b = site.peer("b", &[&a], &[]);
    let c = site.peer("c", &[&a], &[]);
    let (shared, only_a) = (pages(1, 1000), pages(2, 200));
    a.run(&["add", site.file("shared", &shared).to_str().unwrap()]);
    a.run(&["add", site.file("only", &only_a).to_str().unwrap()]);
    b.run(&["add", site.file("copy", &shared).to_str().unwrap()]);
    for peer in [&a, &b, &c] {
        ready(&peer.client().await, 2).await;
    }
    let at_c = c.client().await;
    a.kill();
    // At once: c may or may not have noticed.
    let mut asked = ids(at_c.domain(), &shared);
    asked.extend(ids(at_c.domain(), &only_a));
    let found = resolve(&at_c, asked.clone()).await.len();
    assert!(found <= 1000, "nobody serves what only the dead held");
    // After the index has been handed to the two that are left, all of theirs is found.
    for peer in [&b, &c] {
        ready(&peer.client().await, 1).await;
    }
    assert_eq!(resolve(&at_c, asked).await.len(), 1000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_with_another_key_never_gets_in() {
    let (site, other) = (Site::new(), Site::new());
    let a = site.peer("a", &[], &[]);
    let stranger = site.peer_with_key("stranger", &other.key, &[&a], &[]);
    let held = pages(1, 100);
    a.run(&["add", site.file("image", &held).to_str().unwrap()]);
    stranger.run(&["add", site.file("other", &pages(2, 100)).to_str().unwrap()]);
    until("both ends to say why", || async {
        let told = |log: &std::path::Path| read(log).contains("different site key");
        (told(&a.log) && told(&stranger.log)).then_some(())
    })
    .await;
    let b = site.peer("b", &[&a], &[]);
    ready(&a.client().await, 1).await;
    let at_stranger = stranger.client().await;
    ready(&at_stranger, 0).await;
    // Even by the names of the site's own domain.
    let at_b = b.client().await;
    ready(&at_b, 1).await;
    assert!(resolve(&at_stranger, ids(at_b.domain(), &held)).await.is_empty());
    assert_eq!(resolve(&at_b, ids(at_b.domain(), &held)).await.len(), 100);
    assert!(at_stranger.status().await.unwrap().counters.refused_connections > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_breaks_is_not_called_a_strangers() {
    let site = Site::new();
    let a = site.peer("a", &[], &[]);
    let port: u16 = a.address.split('/').nth(4).unwrap().parse().unwrap();
    let client = a.client().await;
    drop(TcpStream::connect(("127.0.0.1", port)).unwrap());
    let broken = until("the connection to be counted", || async {
        let counters = client.status().await.unwrap().counters;
        (counters.broken_connections > 0).then_some(counters)
    })
    .await;
    assert_eq!((broken.broken_connections, broken.refused_connections), (1, 0));
    assert!(!read(&a.log).contains("different site key"));
    // Somebody who speaks something else is one.
    let mut stranger = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    until("the stranger to be counted and told of", || async {
        let counters = client.status().await.unwrap().counters;
        let told = read(&a.log).contains("different site key");
        (told && counters.refused_connections == 1 && counters.broken_connections == 1).then_some(())
    })
    .await;
}

/// A holder that misbehaves as `fault` says, beside one that does not: everything is found, and nothing wrong.
async fn beside_a_bad_holder(fault: &str) -> dht::SiteStatus {
    let site = Site::new();
    let good = site.peer("good", &[], &[]);
    let bad = site.peer("bad", &[&good], &["--fault", fault]);
    let asking = site.peer("asking", &[&good], &[]);
    let held = pages(1, 600);
    good.run(&["add", site.file("image", &held).to_str().unwrap()]);
    bad.run(&["add", site.file("copy", &held).to_str().unwrap()]);
    for peer in [&good, &bad, &asking] {
        ready(&peer.client().await, 2).await;
    }
    let client = asking.client().await;
    let found = resolve(&client, ids(client.domain(), &held)).await;
    assert_eq!(found.len(), 600);
    let mut status = client.status().await.unwrap();
    let bad_id = bad.client().await.peer_id().to_owned();
    status.peers.retain(|peer| peer.peer_id == bad_id);
    status
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lying_holder_is_found_out_and_avoided() {
    let status = beside_a_bad_holder("wrong-bytes").await;
    assert!(status.counters.wrong_pages > 0);
    assert!(status.peers[0].avoided && status.peers[0].wrong_pages > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_holder_costs_time_and_no_page() {
    let status = beside_a_bad_holder("silent").await;
    assert_eq!(status.counters.site_hits, 600);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_holder_costs_time_and_no_page() {
    let status = beside_a_bad_holder("slow=700").await;
    assert_eq!(status.counters.wrong_pages, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_joins_later_is_told_what_the_others_hold() {
    let site = Site::new();
    let mut a = site.peer("a", &[], &[]);
    let b = site.peer("b", &[&a], &[]);
    let held = pages(1, 800);
    b.run(&["add", site.file("image", &held).to_str().unwrap()]);
    for peer in [&a, &b] {
        ready(&peer.client().await, 1).await;
    }
    // The one that both were joined by goes; a newcomer joins by the other, and the index moves to it.
    let c = site.peer("c", &[&b], &[]);
    let at_b = b.client().await;
    ready(&at_b, 2).await;
    assert!(a.terminate().success());
    ready(&at_b, 1).await;
    let at_c = c.client().await;
    let status = ready(&at_c, 1).await;
    assert_eq!(status.index.shards_owned, 256);
    assert_eq!(resolve(&at_c, ids(at_c.domain(), &held)).await.len(), 800);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_peer_at_one_address_is_refused_and_the_first_goes_on() {
    let site = Site::new();
    let a = site.peer("a", &[], &[]);
    let port = a.address.split('/').nth(4).unwrap();
    for ip in ["127.0.0.1", "0.0.0.0"] {
        let mut second = dht();
        second.arg("serve").arg("--site-key").arg(&site.key).arg("--listen").arg(format!("{ip}:{port}"));
        let refused = second.arg("--local").arg(site.path("second.sock")).output().unwrap();
        assert!(!refused.status.success());
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(said.contains("another process listens on") && said.contains(port), "{said}");
    }
    let b = site.peer("b", &[&a], &[]);
    ready(&b.client().await, 1).await;
}
