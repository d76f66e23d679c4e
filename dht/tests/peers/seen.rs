//! What a peer's log, status and metrics say of others that are missing, unreachable or strange.

use std::net::TcpListener;

use crate::common::{Site, dht, read, ready, until};

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_to_join_by_that_does_not_answer_is_told_of() {
    let site = Site::new();
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let a = site.peer("a", &[], &["--join", &nobody]);
    let client = a.client().await;
    let status = until("the silence to be noticed", || async {
        Some(client.status().await.unwrap()).filter(|status| !status.joins_silent.is_empty())
    })
    .await;
    let join = &status.joins_silent[0];
    assert_eq!((join.address.as_str(), join.error.as_str()), (nobody.as_str(), "connection refused"));
    assert!(status.ready, "it stays what it is");
    let text = a.run(&["status"]);
    let line = format!("joined nobody: --join {nobody} does not answer (connection refused)");
    assert!(text.contains(&line) && !text.contains("all indexed and announced"), "{text}");
    assert!(a.run(&["status", "--metrics"]).contains("\ntern_dht_joins_silent 1\n"));
    until("the log to say so", || async {
        read(&a.log).contains("a peer to join by does not answer").then_some(())
    })
    .await;
    // Another peer makes a site of it all the same; the address is still silent.
    let _b = site.peer("b", &[&a], &[]);
    assert_eq!(ready(&client, 1).await.joins_silent.len(), 1);
    let text = a.run(&["status"]);
    assert!(text.contains("all indexed and announced") && text.contains("has not answered"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_gone_is_listed_until_it_is_back() {
    let site = Site::new();
    let a = site.peer("a", &[], &[]);
    let identity = site.identity("b.key", [9; 32]);
    let more = ["--identity", identity.to_str().unwrap()];
    let mut b = site.peer("b", &[&a], &more);
    let client = a.client().await;
    assert!(ready(&client, 1).await.gone.is_empty());
    let id = b.client().await.peer_id().to_owned();
    b.kill();
    let status = ready(&client, 0).await;
    let gone = &status.gone[0];
    assert_eq!((&gone.peer_id, gone.address.as_str()), (&id, b.listens()));
    let text = a.run(&["status"]);
    assert!(text.contains(&format!("gone      {id} {}", b.listens())), "{text}");
    assert!(a.run(&["status", "--metrics"]).contains("\ntern_dht_peers_gone 1\n"));
    let log = read(&a.log);
    let line = log.lines().find(|line| line.contains("a peer is gone")).unwrap();
    assert!(line.contains(b.listens()), "{line}");
    let _b = site.peer("b", &[&a], &more);
    assert!(ready(&client, 1).await.gone.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_of_another_domain_is_told_of_with_both_domains_and_what_to_do() {
    let site = Site::new();
    let a = site.peer("a", &[], &[]);
    let key = site.path("domain.key");
    assert!(dht().arg("keygen").arg("--out").arg(&key).status().unwrap().success());
    let b = site.peer("b", &[&a], &["--domain-key", key.to_str().unwrap()]);
    let domains = [&a, &b].map(|peer| {
        let text = peer.run(&["status"]);
        let (_, rest) = text.split_once("domain    ").unwrap();
        rest.lines().next().unwrap().to_owned()
    });
    for (at, other) in [(&a, &b), (&b, &a)] {
        let line = until("the other one to be told of", || async {
            let log = read(&at.log);
            let told = |line: &&str| line.contains("in another dedup domain");
            log.lines().find(told).map(str::to_owned)
        })
        .await;
        assert!(line.contains("start it with the same --domain-key"), "{line}");
        assert!(domains.iter().all(|domain| line.contains(&domain[..8])), "{line}");
        assert!(line.contains(other.listens()), "{line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_joins_by_its_own_address_says_so_and_does_not_miss_it() {
    let site = Site::new();
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let a = site.peer_at(&free, "a", &["--join", &free]);
    until("the log to say so", || async {
        read(&a.log).contains("--join names this very peer's address").then_some(())
    })
    .await;
    assert!(ready(&a.client().await, 0).await.joins_silent.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn two_peers_with_one_identity_are_found_out() {
    let site = Site::new();
    let a = site.peer("a", &[], &[]);
    let identity = site.identity("copied.key", [3; 32]);
    let more = ["--identity", identity.to_str().unwrap()];
    let _b = site.peer("b", &[&a], &more);
    ready(&a.client().await, 1).await;
    let _copy = site.peer("copy", &[&a], &more);
    until("the copy to be noticed", || async {
        read(&a.log).contains("two hosts use the same --identity file").then_some(())
    })
    .await;
}
