//! What an operator does with `dht` by hand, and what it answers to mistakes.

use std::{
    fs,
    os::unix::net::UnixListener,
    path::Path,
    process::{Command, Output},
};

use crate::common::{Site, dht, read};

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
