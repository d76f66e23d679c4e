//! A VM's life on one host, as its operator sees it.

use std::os::unix::fs::PermissionsExt;
use std::process::Output;

use rustix::process::Signal;
use serde_json::Value;
use vmm::control::api::{EventKind, VmState};
use vmm::control::client::Client;

use crate::harness::{DEADLINE, Place};

fn text(output: &Output) -> (String, String) {
    (
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

/// Follows the heartbeat until it has grown: the guest runs.
async fn beats(client: &Client) -> u64 {
    let before = client.status().await.unwrap().heartbeat.unwrap().count;
    let grown = async {
        loop {
            let count = client.status().await.unwrap().heartbeat.unwrap().count;
            if count > before + 10 {
                return count;
            }
        }
    };
    tokio::time::timeout(DEADLINE, grown).await.expect("the heartbeat does not grow")
}

#[tokio::test(flavor = "multi_thread")]
async fn it_runs_stands_still_runs_again_and_ends() {
    let place = Place::new();
    let mut vm = place.run("vm.sock", "rate=100 ws=8M", &["--name", "storm"]);
    let mode = std::fs::metadata(vm.control()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let client = vm.client();
    let mut events = client.events().await.unwrap();

    let status = client.status().await.unwrap();
    assert_eq!((status.name.as_deref(), status.state), (Some("storm"), VmState::Running));
    assert_eq!((status.memory_bytes, status.cpus, status.pid), (Some(64 << 20), Some(1), vm.pid()));
    beats(&client).await;

    assert_eq!(client.operate("pause").await.unwrap().state, VmState::Paused);
    let still = client.status().await.unwrap().heartbeat.unwrap().count;
    assert_eq!(
        client.operate("pause").await.unwrap().state,
        VmState::Paused,
        "pausing twice is pausing once"
    );
    assert_eq!(
        client.status().await.unwrap().heartbeat.unwrap().count,
        still,
        "a paused guest does not beat"
    );

    assert_eq!(client.operate("resume").await.unwrap().state, VmState::Running);
    beats(&client).await;

    assert_eq!(client.operate("stop").await.unwrap().state, VmState::Stopped);
    assert!(vm.wait().success());
    assert!(!vm.control().exists(), "the socket is removed");

    let mut states = Vec::new();
    while let Some(event) = events.next().await.unwrap() {
        if let EventKind::State { state, .. } = event.kind {
            states.push(state);
        }
    }
    assert_eq!(states, [VmState::Running, VmState::Paused, VmState::Running, VmState::Stopped]);
}

#[test]
fn the_command_line_does_the_same() {
    let place = Place::new();
    let mut vm = place.run("vm.sock", "rate=0 ws=8M", &["--name", "storm"]);
    let ask = |command: &str| {
        let output = place.client(&[command, "--control", "vm.sock", "--json"]);
        let (stdout, stderr) = text(&output);
        assert!(output.status.success(), "{command}: {stderr}");
        serde_json::from_str::<Value>(&stdout).unwrap()["state"].clone()
    };
    assert_eq!(ask("status"), "running");
    assert_eq!(ask("pause"), "paused");
    assert_eq!(ask("resume"), "running");

    let (people, _) = text(&place.client(&["status", "--control", "vm.sock"]));
    assert!(people.contains("name        storm\n") && people.contains("memory      64 MiB\n"), "{people}");

    // Nothing listens on port 9 of this host: the reason comes with exit code 4, and the VM runs on.
    let output = place.client(&["migrate", "--control", "vm.sock", "--to", "nowhere", "--json"]);
    let (stdout, stderr) = text(&output);
    assert_eq!(output.status.code(), Some(4), "{stderr}");
    assert!(stderr.contains("nowhere"), "{stderr}");
    assert_eq!(serde_json::from_str::<Value>(&stdout).unwrap()["error"]["code"], "bad_ticket");
    assert_eq!(ask("status"), "running");

    let output = place.client(&["resolve", "--control", "vm.sock", "--run-here"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).1.contains("nothing to resolve"), "{}", text(&output).1);

    let output = place.client(&["balloon", "--control", "vm.sock", "--size", "16M"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).1.contains("launched with --balloon on"), "{}", text(&output).1);

    assert_eq!(ask("stop"), "stopped");
    assert!(vm.wait().success());
    let output = place.client(&["status", "--control", "vm.sock"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).1.contains("cannot connect to the VM's control socket"), "{}", text(&output).1);
}

#[test]
fn a_balloon_is_at_most_all_of_memory() {
    let place = Place::new();
    guest_images::write_pagestorm(&place.path("pagestorm")).unwrap();
    let launch =
        ["run", "--kernel", "pagestorm", "--memory", "64M", "--serial", "off", "--control", "vm.sock"];
    let output = place.command(&launch).args(["--balloon", "size=65M"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).1.contains("at most the VM's memory of 67108864 bytes"), "{}", text(&output).1);
}

#[test]
fn a_second_process_on_the_same_socket_is_refused_and_the_first_lives_on() {
    let place = Place::new();
    let mut vm = place.run("vm.sock", "rate=0 ws=8M", &[]);
    let output = place.client(&["run", "--kernel", "pagestorm", "--control", "vm.sock", "--serial", "off"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).1.contains("another process listens on vm.sock"), "{}", text(&output).1);
    assert!(place.client(&["status", "--control", "vm.sock"]).status.success());
    vm.signal(Signal::TERM);
    assert!(vm.wait().success());
    assert!(!vm.control().exists());
}

#[test]
fn a_killed_process_leaves_a_socket_that_the_next_replaces() {
    let place = Place::new();
    let mut vm = place.run("vm.sock", "rate=0 ws=8M", &[]);
    vm.signal(Signal::KILL);
    assert!(!vm.wait().success());
    assert!(vm.control().exists());
    let mut next = place.run("vm.sock", "rate=0 ws=8M", &[]);
    assert!(place.client(&["stop", "--control", "vm.sock"]).status.success());
    assert!(next.wait().success());
}

#[test]
fn what_is_missing_at_launch_is_said() {
    let place = Place::new();
    let kernel = place.path("pagestorm");
    guest_images::write_pagestorm(&kernel).unwrap();
    let launch = |more: &[&str]| {
        let mut arguments = vec!["run", "--control", "vm.sock", "--serial", "off"];
        arguments.extend(more);
        let output = place.client(&arguments);
        assert_eq!(output.status.code(), Some(1));
        assert!(!place.path("vm.sock").exists(), "the socket is removed after a failed launch");
        text(&output).1
    };
    let error = launch(&["--kernel", "absent"]);
    assert!(error.contains("absent") && error.contains("No such file"), "{error}");
    let error = launch(&["--kernel", "pagestorm", "--site", "site.sock"]);
    assert!(error.contains("site.sock") && error.contains("dht serve"), "{error}");
}

#[test]
fn an_identity_is_made_once() {
    let place = Place::new();
    let (first, _) = text(&place.client(&["identity"]));
    let (second, _) = text(&place.client(&["identity"]));
    assert_eq!(first, second);
    assert!(first.starts_with("tern-ed25519 ") && first.trim().len() >= 13 + 64, "{first}");
    let key = place.path("config/tern/host.key");
    assert_eq!(std::fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
}
