//! Memories of VMs that left, on a real peer.

use std::{
    fs,
    os::unix::fs::FileExt,
    path::Path,
    process::{Command, Stdio},
};

use crate::common::{Peer, Site, dht, ids, memory, pages, ready, resolve, until, whole};
use dht::{FoundOn, Registration, SiteClient, SiteError, local::protocol::FailureCode};
use page::{PAGE_SIZE, Page};

fn retaining(site: &Site, budget: &str) -> Peer {
    let dir = site.path("retained");
    site.peer("a", &[], &["--retain", dir.to_str().unwrap(), "--retain-budget", budget])
}

/// Registers a memory of `held`, and waits until it is indexed.
async fn registered(client: &SiteClient, name: &str, held: &[Page]) -> Registration {
    let (_vm, fd) = memory(held);
    let registration = client.register_memory(name, fd, &whole(held.len() as u64)).await.unwrap();
    ready(client, 0).await;
    registration
}

/// Waits until no memory is registered.
async fn gone(client: &SiteClient) {
    until("the memory to be let go", || async {
        let contents = client.status().await.unwrap().contents;
        contents.iter().all(|content| content.kind != "memory").then_some(())
    })
    .await;
}

fn files(dir: &Path) -> Vec<String> {
    let mut files: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    files.sort();
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_vm_leaves_is_served_over_a_restart_and_only_what_was_not_there_is_copied() {
    let site = Site::new();
    let mut peer = retaining(&site, "64M");
    let client = peer.client().await;
    let (in_file, own) = (pages(1, 300), pages(2, 700));
    client.add_file(&site.file("image", &in_file)).await.unwrap();
    ready(&client, 0).await;
    // Zero pages and repetitions are not copied either.
    let held = [&in_file[..], &own, &own, &[[0; PAGE_SIZE]; 50]].concat();
    let registration = registered(&client, "vm", &held).await;
    assert_eq!(
        client.status().await.unwrap().index.host_names,
        1000,
        "each name once, and none of a zero page"
    );
    let kept = registration.retain().await.unwrap();
    assert_eq!((kept.pages, kept.bytes), (700, (1 + 2 + 700) * PAGE_SIZE as u64));
    drop(registration);
    gone(&client).await;
    let asked = ids(client.domain(), &own);
    let found = resolve(&client, asked.clone()).await;
    assert!(found.len() == 700 && found.iter().all(|page| page.rung == FoundOn::Host));
    let name = client.domain().name(&own[5]).to_string();
    assert!(peer.run(&["locate", &name]).contains("checkpoint vm, page "));
    assert!(peer.run(&["status"]).contains("checkpoint vm: 700 pages, 700 indexed, last of use "));

    // A second time nothing is new, and there is no second file.
    let registration = registered(&client, "vm", &held).await;
    assert_eq!(registration.retain().await.unwrap(), dht::Retained { pages: 0, bytes: 0 });
    drop(registration);
    assert!(peer.terminate().success());
    // What a killed peer left unfinished is cleared away; what is damaged is left, and not taken.
    let dir = site.path("retained");
    let [first] = &files(&dir)[..] else { panic!("one checkpoint") };
    fs::copy(dir.join(first), dir.join("half.new")).unwrap();
    fs::write(dir.join("cut.checkpoint"), &fs::read(dir.join(first)).unwrap()[..5 * PAGE_SIZE]).unwrap();
    let mut peer = retaining(&site, "64M");
    let client = peer.client().await;
    assert_eq!(ready(&client, 0).await.contents.len(), 1);
    assert_eq!(resolve(&client, asked.clone()).await.len(), 700);
    assert_eq!(files(&dir), [first, "cut.checkpoint"]);

    // A page that rotted on the disk is a miss.
    let file = fs::OpenOptions::new().write(true).open(dir.join(first)).unwrap();
    file.write_all_at(b"rot", 3 * PAGE_SIZE as u64).unwrap();
    assert_eq!(resolve(&client, asked).await.len(), 699);
    assert!(peer.terminate().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_longest_unused_gives_way_and_what_never_fits_costs_nothing() {
    let site = Site::new();
    let peer = retaining(&site, "5M");
    let client = peer.client().await;
    let (one, two, three) = (pages(1, 500), pages(2, 500), pages(3, 500));
    for (name, held) in [("one", &one), ("two", &two)] {
        assert_eq!(registered(&client, name, held).await.retain().await.unwrap().pages, 500);
        gone(&client).await;
    }
    let registration = registered(&client, "huge", &pages(4, 2000)).await;
    let refused = registration.retain().await.unwrap_err();
    assert!(
        matches!(&refused, SiteError::Refused { code: FailureCode::Full, message } if message.contains("--retain-budget")),
        "{refused}"
    );
    drop(registration);
    gone(&client).await;
    // Times are whole seconds: the one made first is made older.
    let dir = site.path("retained");
    assert_eq!(files(&dir).len(), 2);
    drop((client, peer));
    for (name, age) in files(&dir).iter().zip([3600, 7200]) {
        let file = fs::OpenOptions::new().write(true).open(dir.join(name)).unwrap();
        file.set_modified(std::time::SystemTime::now() - std::time::Duration::from_secs(age)).unwrap();
    }
    let peer = retaining(&site, "5M");
    let client = peer.client().await;
    ready(&client, 0).await;
    assert_eq!(registered(&client, "three", &three).await.retain().await.unwrap().pages, 500);
    let found = |pages| {
        let asked = ids(client.domain(), pages);
        let client = &client;
        async move { resolve(client, asked).await.len() }
    };
    assert_eq!((found(&one).await, found(&two).await, found(&three).await), (500, 0, 500));
    assert_eq!(files(&dir).len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_keeps_nothing_loses_nothing_and_the_peer_goes_on() {
    let site = Site::new();
    let dir = site.path("retained");
    fs::create_dir(&dir).unwrap();
    let dir = dir.to_str().unwrap();
    // A disk of 3 MiB in a mount namespace of the peer's own; its budget is more than that.
    let mount = format!("mount -t tmpfs -o size=3M none '{dir}' && exec \"$@\"");
    let within = ["unshare", "--mount", "sh", "-c", &mount, "sh"];
    let allowed = Command::new(within[0]).args(&within[1..]).arg("true").stderr(Stdio::null()).status();
    if !allowed.is_ok_and(|status| status.success()) {
        eprintln!("no mount namespaces here: no disk is filled");
        return;
    }
    let more = ["--retain", dir, "--retain-budget", "64M"];
    let peer = site.peer_within(&within, "a", "127.0.0.1", &[], &more);
    let client = peer.client().await;
    let (fits, too_much, fits_too) = (pages(1, 300), pages(2, 700), pages(3, 100));
    assert_eq!(registered(&client, "fits", &fits).await.retain().await.unwrap().pages, 300);
    gone(&client).await;
    let refused = registered(&client, "too much", &too_much).await.retain().await.unwrap_err();
    assert!(
        matches!(&refused, SiteError::Refused { code: FailureCode::NotWritten, message } if message.contains(dir)),
        "{refused}"
    );
    gone(&client).await;
    // What had been written of it has made room again.
    let seen = Path::new("/proc").join(peer.pid().to_string()).join("root").join(dir.trim_start_matches('/'));
    assert_eq!(files(&seen).len(), 1, "{:?}", files(&seen));
    assert_eq!(registered(&client, "fits too", &fits_too).await.retain().await.unwrap().pages, 100);
    gone(&client).await;
    for (held, count) in [(&fits, 300), (&too_much, 0), (&fits_too, 100)] {
        assert_eq!(resolve(&client, ids(client.domain(), held)).await.len(), count);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_without_a_directory_says_so_and_two_never_share_one() {
    let site = Site::new();
    let peer = site.peer("plain", &[], &[]);
    let client = peer.client().await;
    let registration = registered(&client, "vm", &pages(1, 10)).await;
    let refused = registration.retain().await.unwrap_err();
    assert!(matches!(refused, SiteError::Refused { code: FailureCode::RetainsNothing, .. }), "{refused}");

    let _first = retaining(&site, "1M");
    let mut second = dht();
    second.arg("serve").arg("--site-key").arg(&site.key).args(["--listen", "127.0.0.1:0", "--local"]);
    second
        .arg(site.path("b.sock"))
        .arg("--retain")
        .arg(site.path("retained"))
        .args(["--retain-budget", "1M"]);
    let output = second.output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("give each its own directory"));
}
