//! What an operator does with `dht` by hand, and what it answers to mistakes.

use std::{
    fs,
    os::unix::net::UnixListener,
    path::Path,
    process::{Command, Output},
};

use crate::common::{Site, dht, ids, pages, read, ready, resolve};
use page::PAGE_SIZE;

/// `dht`, which is expected to end by itself: one that serves instead is ended, and seen by its exit code.
fn brief() -> Command {
    let mut command = Command::new("timeout");
    command.arg("60").arg(dht().get_program());
    command
}

fn serve(site: &Site, local: &Path) -> Command {
    let mut command = brief();
    command
        .arg("serve")
        .arg("--site-key")
        .arg(&site.key)
        .args(["--listen", "127.0.0.1:0", "--local"])
        .arg(local);
    command
}

fn complaint(output: &Output) -> String {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(output.stdout.is_empty(), "it said that it serves");
    text
}

/// A copy of the site's key was given as `--local` by mistake: connecting to it was refused, as to a stale socket, and it was removed.
#[test]
fn what_stands_at_the_socket_s_path_and_is_no_socket_is_left_alone() {
    let site = Site::new();
    let key = site.path("k2.key");
    fs::copy(&site.key, &key).unwrap();
    let text = complaint(&serve(&site, &key).output().unwrap());
    assert!(text.contains("k2.key exists and is not a socket"), "{text}");
    assert_eq!(read(&key), read(&site.key));
    for path in [site.dir.path().to_owned(), site.path("link")] {
        if path.ends_with("link") {
            std::os::unix::fs::symlink(&key, &path).unwrap();
        }
        assert!(complaint(&serve(&site, &path).output().unwrap()).contains("is not a socket"));
    }
    assert_eq!(read(&key), read(&site.key));
}

#[test]
fn a_peer_that_ends_removes_its_own_socket_alone() {
    let site = Site::new();
    let mut peer = site.peer("a", &[], &[]);
    fs::remove_file(&peer.socket).unwrap();
    let _successor = UnixListener::bind(&peer.socket).unwrap();
    assert!(peer.terminate().success());
    assert!(peer.socket.exists());
}

#[test]
fn a_socket_s_path_that_is_too_long_is_refused_with_the_limit() {
    let site = Site::new();
    let path = site.path(&"x".repeat(150));
    let length = format!("{} bytes", path.as_os_str().len());
    let served = complaint(&serve(&site, &path).output().unwrap());
    let asked = complaint(&brief().arg("status").arg("--local").arg(&path).output().unwrap());
    for text in [served, asked] {
        assert!(text.contains("107 bytes") && text.contains(&length), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_named_at_the_start_are_served_after_every_start() {
    let site = Site::new();
    let (one, two) = (site.file("one", &pages(1, 20)), site.file("two", &pages(2, 30)));
    let more = ["--add", one.to_str().unwrap(), "--add", two.to_str().unwrap()];
    for _ in 0..2 {
        let mut peer = site.peer("a", &[], &more);
        let client = peer.client().await;
        assert_eq!(ready(&client, 0).await.contents.len(), 2);
        let asked = ids(client.domain(), &[pages(1, 20), pages(2, 30)].concat());
        assert_eq!(resolve(&client, asked).await.len(), 50);
        assert!(peer.terminate().success());
    }
    let socket = site.path("b.sock");
    let text = complaint(&serve(&site, &socket).arg("--add").arg(site.path("missing")).output().unwrap());
    assert!(text.contains("--add") && text.contains("missing") && text.contains("No such file"), "{text}");
    assert_eq!(text.matches("No such file").count(), 1, "{text}");
    assert!(!socket.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_is_json_and_filtered_as_the_monitor_s_is() {
    let site = Site::new();
    let mut peer = site.peer("a", &[], &["--log-format", "json"]);
    assert!(peer.terminate().success());
    let log = read(&peer.log);
    assert!(!log.is_empty());
    for line in log.lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(line["level"].is_string() && line["timestamp"].is_string(), "{line}");
    }
    assert!(log.contains(r#""message":"serving""#), "{log}");
    let mut quiet = site.peer_within(&["env", "TERN_LOG=error"], "b", "127.0.0.1", &[], &[]);
    assert!(quiet.terminate().success());
    assert_eq!(read(&quiet.log), "");
    let mut loud = site.peer_within(&["env", "TERN_LOG=dht=debug"], "c", "127.0.0.1", &[], &[]);
    drop(loud.client().await);
    assert!(loud.terminate().success());
    let log = read(&loud.log);
    assert!(log.contains("INFO dht::node") && !log.contains("libp2p"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_is_located_by_its_file_and_one_that_nobody_has_is_told_by_the_exit_code() {
    let site = Site::new();
    let peer = site.peer("a", &[], &[]);
    let client = peer.client().await;
    let held = [pages(1, 3), vec![[0; PAGE_SIZE]]].concat();
    let (image, other) = (site.file("image", &held), site.file("other", &pages(2, 2)));
    client.add_file(&image).await.unwrap();
    ready(&client, 0).await;
    let locate = |file: &Path, more: &[&str]| {
        let mut command = dht();
        command.arg("locate").arg("--local").arg(&peer.socket).arg("--file").arg(file).args(more);
        let output = command.output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code().unwrap(), String::from_utf8(text).unwrap())
    };
    let name = client.domain().name(&held[2]).to_string();
    let (code, text) = locate(&image, &["--page", "2"]);
    assert!(code == 0 && text.contains(&name) && text.contains("image, block 2"), "{text}");
    // The name that it prints is what it takes.
    assert!(peer.run(&["locate", &name]).contains("image, block 2"));
    let (code, text) = locate(&image, &["--json"]);
    assert!(code == 0 && serde_json::from_str::<serde_json::Value>(&text).unwrap().is_array(), "{text}");

    let (code, text) = locate(&other, &[]);
    assert!(code == 1 && text.contains("no holder known"), "{text}");
    let (code, text) = locate(&other, &["--page", "2"]);
    assert!(code == 1 && text.contains("2 pages"), "{text}");
    let (code, text) = locate(&image, &["--page", "3"]);
    assert!(code == 1 && text.contains("zeroes"), "{text}");
    let unknown = dht().args(["locate", "0123456789abcdef", "--local"]).arg(&peer.socket).output().unwrap();
    assert_eq!((unknown.status.code(), unknown.stdout), (Some(1), b"no holder known\n".to_vec()));
    let neither = dht().args(["locate", "--local"]).arg(&peer.socket).output().unwrap();
    assert_eq!(neither.status.code(), Some(2));
}

#[test]
fn mistakes_in_the_options_are_told_once_and_rightly() {
    let site = Site::new();
    let socket = site.path("a.sock");
    let mut elsewhere = brief();
    elsewhere.arg("serve").arg("--site-key").arg(&site.key).args(["--listen", "192.0.2.9:4193", "--local"]);
    let text = complaint(&elsewhere.arg(&socket).output().unwrap());
    assert!(text.contains("cannot listen on 192.0.2.9:4193") && text.contains("no such address"), "{text}");
    assert!(!text.contains(": :") && !text.contains("no connection"), "{text}");

    let nowhere = site.path("nodir/x.id");
    let text = complaint(&serve(&site, &socket).arg("--identity").arg(&nowhere).output().unwrap());
    assert!(text.contains("nodir/x.id") && text.contains("No such file"), "{text}");
    assert!(!text.contains("overwritten"), "{text}");
    let text = complaint(&dht().arg("keygen").arg("--out").arg(&site.key).output().unwrap());
    assert!(text.contains("site.key exists") && text.contains("never overwritten"), "{text}");

    let unmounted = site.path("volume/kept");
    let retain = |dir: &Path| {
        serve(&site, &socket).arg("--retain").arg(dir).args(["--retain-budget", "64M"]).output().unwrap()
    };
    let text = complaint(&retain(&unmounted));
    assert!(text.contains("volume does not exist"), "{text}");
    assert!(!site.path("volume").exists());
    assert!(complaint(&retain(&site.key)).contains("cannot keep checkpoints in"));
}
