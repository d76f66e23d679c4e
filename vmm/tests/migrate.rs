//! Migrations of a real guest on the real /dev/kvm, both ends in this process. Where there is no KVM, these tests fail and say so.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail the test")]

mod hosts;

use std::net::SocketAddr;
use std::sync::Arc;

use hosts::{Host, hosts, in_time, read};
use migration_proto::wire::{self, Message, Offer};
use migration_proto::{Layout, MigrationId};
use vmm::kvm::cpu::FeatureSet;
use vmm::machine::{Machine, RunState, StopReason};
use vmm::migrate::channel;
use vmm::migrate::report::{IncomingPhase, Outcome, Phase};
use vmm::migrate::ticket::Ticket;
use vmm::migrate::transport::Endpoint;
use vmm::migrate::{MigrateError, MigrateOptions, Mode, Outgoing};

#[tokio::test(flavor = "multi_thread")]
async fn a_running_guest_moves_and_has_lost_nothing() {
    let (a, b) = hosts();
    let machine = a.launch("rate=2000 ws=16M prefill=1 content=text");
    a.ready().await;
    let incoming = b.listen().await;
    let outgoing = a.migrate(&machine, &incoming.ticket());
    let report = in_time("the migration", outgoing.finished()).await.unwrap();
    let arrived = in_time("the arrival", incoming.machine()).await.unwrap();
    assert_eq!(report.outcome, Outcome::Completed);
    assert!(report.verified && report.rounds >= 2, "{report:?}");
    assert_eq!(*machine.watch().borrow(), RunState::Stopped(StopReason::Migrated));
    assert_eq!(arrived.ownership().vm, machine.ownership().vm);
    assert_eq!(arrived.ownership().epoch, machine.ownership().epoch.next());
    let check = b.check(&arrived, 1).await;
    assert_eq!(check.failures, 0, "{check:?}\n{}", read(&b.path("console")));
    assert!(check.pages_checked > 3000, "{check:?}");
    let mut status = incoming.status();
    let status =
        in_time("a heartbeat", status.wait_for(|s| s.guest_downtime_ms.is_some())).await.unwrap().clone();
    assert_eq!(status.phase, IncomingPhase::Running);
    println!("{report:#?}\n{status:#?}\n{check:?}");
    assert!(report.wan_tx_bytes < report.plain_bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_moves_there_and_back_again_and_again() {
    let (a, b) = hosts();
    let mut machine = a.launch("rate=500 ws=8M prefill=1 content=rewrite");
    a.ready().await;
    for round in 0..6 {
        let (here, there) = if round % 2 == 0 { (&a, &b) } else { (&b, &a) };
        let incoming = there.listen().await;
        let outgoing = here.migrate(&machine, &incoming.ticket());
        let report = in_time("the migration", outgoing.finished()).await.unwrap();
        assert!(report.verified);
        machine = in_time("the arrival", incoming.machine()).await.unwrap();
        assert_eq!(machine.ownership().epoch.0, round + 1);
        std::fs::write(there.path("console"), b"").unwrap();
        let check = there.check(&machine, round + 1).await;
        assert_eq!(check.failures, 0, "round {round}: {check:?}\n{}", read(&there.path("console")));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_or_refused_migration_leaves_the_guest_running() {
    let (a, b) = hosts();
    let stranger = Host::new();
    let machine = a.launch("rate=1000 ws=16M prefill=1");
    a.ready().await;
    let incoming = b.listen().await;
    // Slow enough to be cancelled in the middle.
    let options = MigrateOptions {
        to: incoming.ticket(),
        downtime_ms: 1,
        mode: Mode::Precopy,
        bandwidth_bits: Some(8_000_000),
        delta_cache_bytes: None,
        auto_converge: false,
        spill: None,
        resume_for_ms: 300_000,
    };
    let outgoing = Outgoing::start(Arc::clone(&machine), None, Arc::clone(&a.identity), options);
    let mut progress = outgoing.progress();
    in_time("names", progress.wait_for(|p| p.phase == Phase::Precopy && p.wan_tx_bytes > 100_000))
        .await
        .unwrap();
    outgoing.cancel();
    let error = in_time("the cancellation", outgoing.finished()).await.unwrap_err();
    assert!(matches!(error, MigrateError::Cancelled), "{error}");
    assert!(outgoing.resolve(true).is_err(), "nothing is in doubt");
    assert_eq!(*machine.watch().borrow(), RunState::Running);
    // A host that does not know this one.
    let elsewhere = stranger.listen().await;
    let error =
        in_time("the refusal", a.migrate(&machine, &elsewhere.ticket()).finished()).await.unwrap_err();
    assert!(matches!(error, MigrateError::RefusedByPeer { .. }), "{error}");
    assert!(elsewhere.status().borrow().last_failure.as_ref().unwrap().contains(&a.identity.fingerprint()));
    // The first endpoint still takes it.
    let mut status = incoming.status();
    in_time("listening again", status.wait_for(|s| s.phase == IncomingPhase::Listening)).await.unwrap();
    in_time("the migration", a.migrate(&machine, &incoming.ticket()).finished()).await.unwrap();
    let arrived = in_time("the arrival", incoming.machine()).await.unwrap();
    let check = b.check(&arrived, 1).await;
    assert_eq!(check.failures, 0, "{check:?}");
}

/// A source that offers a VM whose CPU has `feature` besides what it has; what the destination answers.
async fn offer_with_feature(a: &Host, machine: &Machine, ticket: &str, feature: &str) -> Message {
    let mut description = machine.description();
    let features = &mut description.cpu.as_mut().unwrap().features;
    *features = features.or(&FeatureSet::named([feature]).unwrap());
    let pages = description.extents.iter().map(|extent| extent.pages).sum::<u64>();
    let regions = pages / page::REGION_PAGES as u64;
    let extent = migration_proto::Extent { first: page::RegionId(0), regions };
    let offer = Message::Offer(Offer {
        migration: MigrationId([7; 16]),
        vm: machine.ownership().vm,
        epoch: machine.ownership().epoch,
        domain: page::Domain::unkeyed().id(),
        mode: migration_proto::Mode::Precopy,
        resume_for: migration_proto::Span(0),
        layout: Layout::new(vec![extent]).unwrap(),
        machine: serde_json::to_vec(&description).unwrap(),
        deltas: false,
    });
    let ticket: Ticket = ticket.parse().unwrap();
    let address: SocketAddr = ticket.address.parse().unwrap();
    let endpoint = Endpoint::outgoing(address, &a.identity).unwrap();
    let link = endpoint.connect(address, ticket.key).await.unwrap();
    let mut channels = channel::open_source(&link).await.unwrap();
    channels.control.send(wire::encode(&offer).into()).await.unwrap();
    let answer = channels.control_in.next().await.unwrap().unwrap();
    wire::decode(&answer).unwrap()
}

/// No host has a feature that no manual names: the refusal must come before any page, and say the name.
#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_lacks_a_feature_refuses_before_any_page_moves() {
    let (a, b) = hosts();
    let machine = a.launch("rate=0 ws=4M");
    let incoming = b.listen().await;
    let unknown = "cpuid_7_1_ecx_31";
    let answer = in_time("the refusal", offer_with_feature(&a, &machine, &incoming.ticket(), unknown)).await;
    let (Message::Refuse(reason) | Message::Abort { reason, .. }) = &answer else { panic!("{answer:?}") };
    assert!(reason.contains(unknown) && reason.contains("vmm cpu-baseline"), "{reason}");
    let mut status = incoming.status();
    let refused = status.wait_for(|status| status.last_failure.is_some());
    let refused = in_time("the destination's word", refused).await.unwrap().clone();
    assert!(refused.last_failure.unwrap().contains(unknown));
    // What it has itself is no reason.
    in_time("listening again", status.wait_for(|s| s.phase == IncomingPhase::Listening)).await.unwrap();
    in_time("the migration", a.migrate(&machine, &incoming.ticket()).finished()).await.unwrap();
}
