//! One real peer, and the processes of its host.

use std::{
    io::{Read, Write},
    os::unix::{fs::FileExt, fs::PermissionsExt, net::UnixStream},
};

use crate::common::{Site, dht, ids, memory, pages, ready, resolve, until, whole};
use dht::{FoundOn, MemoryExtent, SiteError};
use page::PAGE_SIZE;

#[tokio::test(flavor = "multi_thread")]
async fn a_page_that_changed_since_the_scan_is_a_miss_and_never_a_wrong_page() {
    let site = Site::new();
    let peer = site.peer("a", &[], &[]);
    let client = peer.client().await;
    let held = pages(1, 1500);
    let (vm, fd) = memory(&held);
    // Two extents with a gap between them, out of the file's order.
    let extents = [
        MemoryExtent { first_gfn: 0, pages: 500, file_offset: 1000 * PAGE_SIZE as u64 },
        MemoryExtent { first_gfn: 0x10_0000, pages: 500, file_offset: 0 },
    ];
    let _registration = client.register_memory("vm", fd, &extents).await.unwrap();
    ready(&client, 0).await;
    let asked = ids(client.domain(), &held);
    let found = resolve(&client, asked.clone()).await;
    assert_eq!(found.len(), 1000);
    assert!(found.iter().all(|page| page.rung == FoundOn::Host));
    let name = client.domain().name(&held[3]).to_string();
    assert!(peer.run(&["locate", &name]).contains("memory vm, gfn 0x100003"));

    vm.write_all_at(&pages(2, 100).concat(), 0).unwrap();
    assert_eq!(resolve(&client, asked.clone()).await.len(), 900);
    // A memory that shrank under the peer is short reads, not a crash.
    vm.set_len(500 * PAGE_SIZE as u64).unwrap();
    assert_eq!(resolve(&client, asked).await.len(), 400);
    let status = client.status().await.unwrap();
    assert_eq!(status.counters.stale_misses, 600);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_served_to_its_padded_end_and_again_after_it_changed() {
    let site = Site::new();
    let peer = site.peer("a", &[], &[]);
    let client = peer.client().await;
    let mut bytes = pages(1, 10).concat();
    bytes.truncate(9 * PAGE_SIZE + 100);
    let path = site.path("image");
    std::fs::write(&path, &bytes).unwrap();
    assert_eq!(client.add_file(&path).await.unwrap(), 10);
    ready(&client, 0).await;
    bytes.resize(10 * PAGE_SIZE, 0);
    let last = *bytes.last_chunk::<PAGE_SIZE>().unwrap();
    assert_eq!(resolve(&client, ids(client.domain(), &[last])).await.len(), 1);

    let changed = pages(2, 10);
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().write_all_at(&changed.concat(), 0).unwrap();
    assert!(resolve(&client, ids(client.domain(), &pages(1, 9))).await.is_empty());
    let asked = ids(client.domain(), &changed);
    until("the changed file to be read again", || async {
        (resolve(&client, asked.clone()).await.len() == 10).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_served_is_refused_with_the_reason() {
    let site = Site::new();
    let peer = site.peer("a", &[], &[]);
    let client = peer.client().await;
    let refused = |result: Result<_, SiteError>| match result {
        Err(SiteError::Refused { message, .. }) => message,
        Err(other) => panic!("{other}"),
        Ok(()) => panic!("taken"),
    };
    let missing = client.add_file(&site.path("missing")).await.map(drop);
    assert!(refused(missing).contains("missing: No such file"));
    assert!(refused(client.add_file(site.dir.path()).await.map(drop)).contains("not a regular file"));
    let (vm, fd) = memory(&pages(1, 2));
    assert!(refused(client.register_memory("vm", fd, &whole(3)).await.map(drop)).contains("does not fit"));
    let writable = client.register_memory("vm", vm.into(), &whole(2)).await;
    assert!(matches!(writable, Err(SiteError::WritableMemory)));
    let nobody = dht::SiteClient::connect(&site.path("nobody.sock")).await;
    assert!(matches!(nobody, Err(SiteError::Connect { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_babbles_is_cut_off_and_others_are_served() {
    let site = Site::new();
    let peer = site.peer("a", &[], &[]);
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 64], &[0, 0, 0, 1, 5], &[0, 0, 0, 0]] {
        let mut stream = UnixStream::connect(&peer.socket).unwrap();
        stream.write_all(bytes).unwrap();
        let mut answer = Vec::new();
        // Closed with or without what was not read: both are an end.
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.is_empty());
    }
    ready(&peer.client().await, 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_searches_at_once_each_get_their_pages() {
    let site = Site::new();
    let peer = site.peer("a", &[], &[]);
    let client = peer.client().await;
    let held = pages(1, 2000);
    client.add_file(&site.file("image", &held)).await.unwrap();
    ready(&client, 0).await;
    let asked = ids(client.domain(), &held);
    let searches = asked.chunks(100).map(|ids| {
        let (client, ids) = (client.clone(), ids.to_vec());
        tokio::spawn(async move { resolve(&client, ids).await.len() })
    });
    for search in searches.collect::<Vec<_>>() {
        assert_eq!(search.await.unwrap(), 100);
    }
    // One that is dropped in the middle cancels, and the peer goes on.
    drop(client.resolve(asked.clone()));
    assert_eq!(resolve(&client, asked).await.len(), 2000);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_socket_is_private_refused_while_live_and_taken_over_when_stale() {
    let site = Site::new();
    let mut peer = site.peer("a", &[], &[]);
    let client = peer.client().await;
    let (_vm, fd) = memory(&pages(1, 10));
    let _registration = client.register_memory("vm", fd, &whole(10)).await.unwrap();
    let mode = std::fs::metadata(&peer.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut second = dht();
    second.arg("serve").arg("--site-key").arg(&site.key).args(["--listen", "127.0.0.1:0", "--local"]);
    let refused = second.arg(&peer.socket).output().unwrap();
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("another process serves"));

    peer.kill();
    assert!(peer.socket.exists());
    // The next peer takes the socket over, and the VM's memory comes back to it by itself.
    let mut again = site.peer("a", &[], &[]);
    until("the memory to be offered again", || async {
        (client.status().await.ok()?.contents.len() == 1).then_some(())
    })
    .await;
    assert!(again.terminate().success());
    assert!(!again.socket.exists(), "a peer that ends takes its socket along");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_replaced_is_served_anew_and_a_deleted_one_is_let_go() {
    let site = Site::new();
    let peer = site.peer("a", &[], &[]);
    let client = peer.client().await;
    let path = site.file("image", &pages(1, 20));
    client.add_file(&path).await.unwrap();
    ready(&client, 0).await;
    let found = |pages: Vec<page::Page>| {
        let (client, asked) = (client.clone(), ids(client.domain(), &pages));
        async move { resolve(&client, asked).await.len() }
    };
    std::fs::rename(site.file("longer", &pages(2, 30)), &path).unwrap();
    until("the file that replaced it", || async { (found(pages(2, 30)).await == 30).then_some(()) }).await;
    until("the other one to be forgotten", || async { (found(pages(1, 20)).await == 0).then_some(()) }).await;
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(7 * PAGE_SIZE as u64).unwrap();
    until("the file that was cut", || async {
        let contents = client.status().await.unwrap().contents;
        (contents.len() == 1 && contents[0].pages == 7 && contents[0].scanned).then_some(())
    })
    .await;
    until("its pages", || async { (found(pages(2, 30)).await == 7).then_some(()) }).await;

    let open = || peer.descriptors().iter().any(|target| target.starts_with(path.to_str().unwrap()));
    assert!(open());
    std::fs::remove_file(&path).unwrap();
    until("its room on the disk to be given back", || async { (!open()).then_some(()) }).await;
    assert!(client.status().await.unwrap().contents.is_empty());
}

/// A VM's memory must not live on because the peer has its descriptor: not in the middle of its first scan, and not while it is served.
#[tokio::test(flavor = "multi_thread")]
async fn a_memory_is_let_go_with_its_connection_whatever_the_peer_does_with_it() {
    let site = Site::new();
    // So slow that the scan is never done.
    let peer = site.peer("a", &[], &["--cpu-budget", "1"]);
    let client = peer.client().await;
    let held = pages(1, 4 * 512);
    let (vm, _) = memory(&held);
    let bytes = 1u64 << 30;
    vm.set_len(bytes).unwrap();
    for place in (0..bytes).step_by(held.len() * PAGE_SIZE) {
        // Most of it is a hole; what is written is spread over it.
        vm.write_all_at(&held[..512].concat(), place).unwrap();
    }
    let read_only = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&vm));
    let fd = std::fs::File::open(read_only).unwrap().into();
    let registration = client.register_memory("vm", fd, &whole(bytes / PAGE_SIZE as u64)).await.unwrap();
    until("the scan to be under way", || async {
        (client.status().await.unwrap().index.host_names > 0).then_some(())
    })
    .await;
    let asked = ids(client.domain(), &held);
    let searches: Vec<_> = (0..8)
        .map(|_| {
            let (client, asked) = (client.clone(), asked.clone());
            tokio::spawn(async move { resolve(&client, asked).await.len() })
        })
        .collect();
    let has_it = || peer.descriptors().iter().any(|target| target.contains("memfd:"));
    assert!(has_it());
    let status = client.status().await.unwrap();
    assert!(!status.contents[0].scanned, "the scan was to take longer than this test");
    drop(registration);
    until("the descriptor to be closed", || async { (!has_it()).then_some(()) }).await;
    let mapped = std::fs::read_to_string(format!("/proc/{}/smaps", peer.pid())).unwrap();
    assert!(!mapped.contains("memfd:"));
    for search in searches {
        assert!(search.await.unwrap() <= 512);
    }
}
