//! A VM's way from one process to another, as its operator sees it.

use std::fs;

use rustix::process::Signal;
use serde_json::Value;
use vmm::control::api::{MigrateRequest, VmState};
use vmm::control::client::ClientError;

use crate::harness::{Place, Vm};

/// One host's line in its own authorised keys: both processes of these tests are of one host.
fn trust_ourselves(place: &Place) {
    let line = place.client(&["identity"]).stdout;
    fs::write(place.path("config/tern/authorized_keys"), line).unwrap();
}

#[test]
fn migrate_returns_when_the_vm_runs_there_and_the_source_ends() {
    let place = Place::new();
    trust_ourselves(&place);
    let mut source = place.run("a.sock", "rate=200 ws=8M", &["--name", "storm"]);
    let (mut destination, ticket) = place.receive("b.sock");

    let output = place.client(&["migrate", "--control", "a.sock", "--to", &ticket, "--json"]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("WAN"), "progress is shown: {stderr}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["outcome"], &report["verified"]), (&Value::from("completed"), &Value::from(true)));
    assert!(source.wait().success());
    assert!(!source.control().exists());

    let output = place.client(&["status", "--control", "b.sock", "--json"]);
    let status: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&status["name"], &status["state"]), (&Value::from("storm"), &Value::from("running")));
    assert!(place.client(&["stop", "--control", "b.sock"]).status.success());
    assert!(destination.wait().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_migration_leaves_the_vm_running_here() {
    let place = Place::new();
    trust_ourselves(&place);
    let mut source = place.run("a.sock", "rate=200 ws=32M", &[]);
    let (mut destination, ticket) = place.receive("b.sock");
    let client = source.client();
    // A rate at which it would take minutes.
    let request =
        MigrateRequest { downtime_ms: 1, bandwidth_bits: Some(100_000), ..MigrateRequest::to(ticket) };
    let migrating = tokio::spawn({
        let client = client.clone();
        async move { client.migrate(&request).await }
    });
    source.wait_for_log("\"state\":\"migrating\"");
    let refused = client.operate("pause").await.unwrap_err();
    assert!(matches!(&refused, ClientError::Refused(_, error) if error.code == "wrong_state"), "{refused}");

    client.cancel().await.unwrap();
    let ended = migrating.await.unwrap().unwrap_err();
    assert!(matches!(&ended, ClientError::Refused(_, error) if error.code == "cancelled"), "{ended}");
    assert_eq!(client.status().await.unwrap().state, VmState::Running);
    assert_eq!(destination.client().status().await.unwrap().state, VmState::Receiving);

    source.signal(Signal::TERM);
    destination.signal(Signal::INT);
    assert!(source.wait().success());
    assert!(destination.wait().success());
}

#[test]
fn ctrl_c_on_migrate_cancels_it_and_the_vm_runs_on() {
    let place = Place::new();
    trust_ourselves(&place);
    let mut source = place.run("a.sock", "rate=200 ws=32M", &[]);
    let (_destination, ticket) = place.receive("b.sock");
    let arguments =
        ["migrate", "--control", "a.sock", "--to", &ticket, "--bandwidth", "100k", "--downtime", "1ms"];
    let mut migrate = Vm::spawn(place.command(&arguments), place.path("a.sock"));
    migrate.wait_for_log("WAN");
    migrate.signal(Signal::INT);
    assert_eq!(migrate.wait().code(), Some(4), "{}", migrate.log());
    assert!(migrate.log().contains("not migrated: cancelled"), "{}", migrate.log());

    let output = place.client(&["status", "--control", "a.sock", "--json"]);
    let status: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(status["state"], "running");
    assert!(place.client(&["stop", "--control", "a.sock"]).status.success());
    assert!(source.wait().success());
}
