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
