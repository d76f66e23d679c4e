//! One VM moves, under load: without a site and with one, cancelled, refused, and to where nobody is.

use std::ffi::OsString;
use std::fs;
use std::net::UdpSocket;
use std::path::PathBuf;
use std::time::Duration;

use tern_tests::real::lab::{Said, run};
use tern_tests::real::{Guest, Journey, Lab, Load, Site, Terms, Vm, Wan};
use vmm::control::api::{ErrorBody, VmState};
use vmm::control::client::ClientError;
use vmm::migrate::report::{IncomingPhase, Outcome, Phase, Report};

const PAGE: u64 = 4096;
const MBIT: u64 = 1_000_000;

/// `vmm migrate --json`, as an operator types it.
async fn migrate(source: &Vm, to: &str) -> Said {
    let mut args: Vec<OsString> = ["migrate", "--json", "--to", to, "--control"].map(Into::into).into();
    args.push(source.control().into());
    run("vmm", &args).await
}

/// The code of a refusal.
fn code(end: Result<Report, ClientError>) -> String {
    match end {
        Err(ClientError::Refused(_, error)) => error.code,
        other => panic!("this is no reason why the VM still runs here: {other:?}"),
    }
}

/// What holds of every report of a migration that completed.
fn assert_sound(report: &Report, memory_bytes: u64) {
    assert_eq!((report.outcome, report.verified), (Outcome::Completed, true), "{report:#?}");
    let rungs = &report.rungs;
    let all = [rungs.zero, rungs.duplicate, rungs.in_place, rungs.host, rungs.site, rungs.source];
    for rung in all {
        assert_eq!(rung.bytes, rung.pages * PAGE, "{report:#?}");
    }
    let pages: u64 = all.iter().map(|rung| rung.pages).sum();
    assert!(pages >= memory_bytes / PAGE, "round 0 alone is all of RAM: {report:#?}");
    assert!(report.rounds >= 2, "one round while it runs and one while it stands still: {report:#?}");
    assert!(report.downtime_ms > 0.0 && report.downtime_ms <= report.total_ms as f64, "{report:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_load_without_a_site_everything_comes_from_the_source() {
    let lab = Lab::new().await;
    let (a, b) = lab.two_hosts().await;
    let guest = Guest::default();
    let mut source = Vm::launch(&lab, &a, "source", &guest).await;
    let mut destination = Vm::receive(&lab, &b, "destination", None).await;
    let wan = Wan::to(&destination.ticket().await, 100 * MBIT, Duration::from_millis(20));
    let before = source.self_check().await;

    let said = migrate(&source, wan.ticket()).await;
    assert!(said.ok, "{said:#?}");
    let report: Report = serde_json::from_str(said.stdout.trim()).expect("--json prints the report");
    source.assert_ends_well().await;
    let after = destination.assert_lives().await;
    assert!(after.pages_written > before.pages_written && after.heartbeats > before.heartbeats, "{after}");
    assert!(after.uptime_ms >= before.uptime_ms, "the guest's clock goes on: {before} {after}");

    assert_sound(&report, guest.memory_bytes);
    assert_eq!((report.rungs.host.pages, report.rungs.site.pages), (0, 0), "{report:#?}");
    assert!(report.rungs.source.pages > 0 && report.rungs.zero.pages > 0, "{report:#?}");
    let wan = wan.counts();
    for (reported, counted) in [
        (report.wan_tx_bytes, wan.to_destination.bytes),
        (report.wan_rx_bytes, wan.to_source.bytes),
        (report.wan_tx_bytes + report.wan_rx_bytes, wan.bytes()),
    ] {
        assert!(reported.abs_diff(counted) * 100 <= counted * 3, "{report:#?} against {wan:#?}");
    }
    let status = destination.status().await;
    assert_eq!((status.name.as_deref(), status.memory_bytes), (Some("source"), Some(guest.memory_bytes)));
    let incoming = status.incoming.expect("it came from somewhere");
    assert_eq!(incoming.phase, IncomingPhase::Running);
}

/// A file that nothing compresses and no other file resembles.
fn content(lab: &Lab, name: &str, bytes: usize) -> PathBuf {
    let path = lab.dir().join(name);
    let mut state =
        name.bytes().fold(0x9e37_79b9_7f4a_7c15_u64, |state, byte| state.rotate_left(8) ^ u64::from(byte));
    // xorshift64*
    let words = std::iter::repeat_with(|| {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    });
    let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).take(bytes).collect();
    fs::write(&path, bytes).expect("a file");
    path
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_destinations_host_and_site_hold_is_not_sent() {
    const SHARE: usize = 3 << 20;
    let lab = Lab::new().await;
    let (a, b) = lab.two_hosts().await;
    let (shared, filed) = (content(&lab, "shared", SHARE), content(&lab, "filed", SHARE));

    let mut site_a = Site::new(&lab, "a").await;
    site_a.join(&lab, None).await;
    let mut site_b = Site::new(&lab, "b").await;
    site_b.join(&lab, None).await;
    site_b.join(&lab, None).await.add(&filed).await;
    let load = |file: &PathBuf, addr| Load { file: file.clone(), addr };
    let sibling = Guest {
        loads: vec![load(&shared, 16 << 20)],
        site: Some(site_b.peers[0].socket().into()),
        ..Guest::default()
    };
    let mut sibling = Vm::launch(&lab, &b, "sibling", &sibling).await;
    site_b.ready(1).await;

    let guest = Guest {
        loads: vec![load(&filed, 16 << 20), load(&shared, 24 << 20)],
        site: Some(site_a.peers[0].socket().into()),
        ..Guest::default()
    };
    let mut source = Vm::launch(&lab, &a, "source", &guest).await;
    site_a.ready(1).await;
    let mut destination = Vm::receive(&lab, &b, "destination", Some(site_b.peers[0].socket())).await;
    let wan = Wan::to(&destination.ticket().await, 100 * MBIT, Duration::from_millis(50));
    let report = Journey::whole(&source, wan.ticket(), Terms::default()).await.expect("it completes");
    source.assert_ends_well().await;
    destination.assert_lives().await;
    sibling.assert_lives().await;

    assert_sound(&report, guest.memory_bytes);
    let share = SHARE as u64 / PAGE;
    assert!(report.rungs.host.pages >= share, "the sibling holds {share} pages: {report:#?}");
    assert!(report.rungs.site.pages >= share, "the file holds {share} pages: {report:#?}");
    assert_eq!(report.wrong_pages, 0, "{report:#?}");
    // The VM that arrived is offered to its new site.
    site_b.ready(2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancelled_it_runs_on_and_can_be_migrated_again() {
    let lab = Lab::new().await;
    let (a, b) = lab.two_hosts().await;
    let mut source = Vm::launch(&lab, &a, "source", &Guest::default()).await;
    let mut destination = Vm::receive(&lab, &b, "destination", None).await;
    let wan = Wan::to(&destination.ticket().await, 20 * MBIT, Duration::from_millis(200));

    let mut journey = Journey::start(&source, wan.ticket(), Terms::default()).await;
    journey.until_phase(Phase::Precopy).await;
    assert_eq!(source.status().await.state, VmState::Migrating);
    assert_eq!(code(Journey::whole(&source, wan.ticket(), Terms::default()).await), "wrong_state");
    journey.cancel().await;
    assert_eq!(code(journey.end().await), "cancelled");
    source.assert_lives().await;
    destination
        .wait_for("it waits again", Duration::from_secs(60), |status| {
            status
                .incoming
                .as_ref()
                .is_some_and(|i| i.phase == IncomingPhase::Listening && i.last_failure.is_some())
        })
        .await;

    let report = Journey::whole(&source, wan.ticket(), Terms::default()).await.expect("it completes");
    assert_sound(&report, Guest::default().memory_bytes);
    source.assert_ends_well().await;
    destination.assert_lives().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hosts_that_do_not_know_each_other_refuse_and_the_vm_runs_on() {
    let lab = Lab::new().await;
    let (a, b, c) = (lab.host("a").await, lab.host("b").await, lab.host("c").await);
    let mut source = Vm::launch(&lab, &a, "source", &Guest::default()).await;
    let mut destination = Vm::receive(&lab, &b, "destination", None).await;
    let ticket = destination.ticket().await;
    let (address, _) = ticket.split_once('#').expect("a ticket names a key");

    // The destination does not know the source.
    let said = migrate(&source, &ticket).await;
    let error: ErrorBody = serde_json::from_str(said.stdout.trim()).expect("--json prints the error");
    assert_eq!((said.code, error.error.code.as_str()), (Some(4), "refused_by_peer"), "{said:#?}");
    assert!(said.stderr.contains(a.line().trim()), "it says which line to add: {said:#?}");
    // The source does not know the destination, and has no ticket that vouches for it.
    b.let_in(&a);
    let bare = Journey::whole(&source, address, Terms::default()).await;
    assert_eq!(code(bare), "unknown_peer");
    // The ticket names another host.
    let key = c.line().split_whitespace().nth(1).expect("a line names a key");
    let wrong = Journey::whole(&source, &format!("{address}#{key}"), Terms::default()).await;
    assert_eq!(code(wrong), "wrong_peer");
    assert_eq!(code(Journey::whole(&source, "nowhere", Terms::default()).await), "bad_ticket");

    source.assert_lives().await;
    assert_eq!(destination.status().await.state, VmState::Receiving);
    // Once both know each other, a bare address does.
    a.let_in(&b);
    Journey::whole(&source, address, Terms::default()).await.expect("it completes");
    source.assert_ends_well().await;
    destination.assert_lives().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_nobody_is_it_does_not_go() {
    let lab = Lab::new().await;
    let (a, b) = lab.two_hosts().await;
    let mut source = Vm::launch(&lab, &a, "source", &Guest::default()).await;
    // A port that was free a moment ago.
    let nobody = UdpSocket::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port");
    assert_eq!(code(Journey::whole(&source, &nobody.to_string(), Terms::default()).await), "no_connection");
    source.assert_lives().await;
    // A VM that stands still is not moved behind its operator's back.
    source.client().operate("pause").await.expect("it pauses");
    let mut destination = Vm::receive(&lab, &b, "destination", None).await;
    let ticket = destination.ticket().await;
    assert_eq!(code(Journey::whole(&source, &ticket, Terms::default()).await), "wrong_state");
    source.client().operate("resume").await.expect("it resumes");
    Journey::whole(&source, &ticket, Terms::default()).await.expect("it completes");
    destination.assert_lives().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_without_room_refuses() {
    let lab = Lab::new().await;
    let (a, b) = lab.two_hosts().await;
    let guest = Guest { memory_bytes: 12 << 30, ..Guest::default() };
    let mut source = Vm::launch(&lab, &a, "source", &guest).await;
    let mut destination = Vm::receive_within(&lab, &b, "destination", 8 << 30).await;
    let ticket = destination.ticket().await;
    let said = migrate(&source, &ticket).await;
    let error: ErrorBody = serde_json::from_str(said.stdout.trim()).expect("--json prints the error");
    assert_eq!((said.code, error.error.code.as_str()), (Some(4), "peer_gave_up"), "{said:#?}");
    assert!(said.stderr.contains("guest memory"), "it says of what there is too little: {said:#?}");
    source.assert_lives().await;
    let status = destination.wait_for_state(VmState::Receiving, Duration::from_secs(60)).await;
    assert!(status.reason.is_some(), "it says why the last attempt failed: {status:#?}");
}
