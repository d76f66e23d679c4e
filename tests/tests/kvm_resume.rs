//! The WAN breaks while memory is on its way: the VM runs on at its source, and when the link is mended the migration goes on where it was.

use std::time::Duration;

use guest_images::pagestorm::options::Options;
use tern_tests::real::{Cut, Guest, Journey, Lab, Terms, Vm, Wan, limits};
use vmm::control::api::{VmState, VmStatus};
use vmm::control::client::ClientError;
use vmm::migrate::report::{IncomingPhase, Outcome, Phase};

/// A guest that holds 24 MiB of random bytes, and now and then writes a page.
fn full() -> Guest {
    let options = Options { rate_pps: 20, ws_bytes: 24 << 20, prefill: true, ..Options::default() };
    Guest { memory_bytes: 48 << 20, options, ..Guest::default() }
}

fn is(phase: IncomingPhase) -> impl Fn(&VmStatus) -> bool {
    move |status| status.incoming.as_ref().is_some_and(|incoming| incoming.phase == phase)
}

/// A source, a destination, and a link that carries the guest's memory in some seconds.
async fn scene(lab: &Lab) -> (Vm, Vm, Wan) {
    let (a, b) = lab.two_hosts().await;
    let source = Vm::launch(lab, &a, "source", &full()).await;
    let destination = Vm::receive(lab, &b, "destination", None).await;
    let wan = Wan::to(&destination.ticket().await, 50_000_000, Duration::from_millis(20));
    (source, destination, wan)
}

/// The journey is in the middle of the first round, and the link is cut.
async fn cut_in_the_middle(source: &Vm, wan: &Wan, resume_for_ms: u64) -> Journey {
    let terms = Terms { resume_for_ms, ..Terms::default() };
    let mut journey = Journey::start(source, wan.ticket(), terms).await;
    journey.until("half of its memory", |progress| progress.wan_tx_bytes > 12 << 20).await;
    wan.cut(Cut::BOTH);
    journey.until_phase(Phase::PrecopyCut).await;
    journey
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_link_in_the_first_round_goes_on_and_sends_nothing_again() {
    let lab = Lab::new().await;
    let (mut source, mut destination, wan) = scene(&lab).await;
    let before = source.self_check().await;
    let journey = cut_in_the_middle(&source, &wan, 300_000).await;
    destination.wait_for("it keeps what it has", limits::SETTLED, is(IncomingPhase::ReceivingCut)).await;
    assert_eq!(source.status().await.state, VmState::Migrating, "the VM runs on at the source");
    wan.cut(Cut::NONE);
    let report = journey.end().await.expect("it moves");
    assert_eq!(
        (report.outcome, report.verified, report.breaks),
        (Outcome::Completed, true, 1),
        "{report:#?}"
    );
    assert!(report.cut_off_ms > 0, "{report:#?}");
    // 24 MiB that nothing compresses, what the guest wrote since, and what was on the link: less than the half that had arrived.
    let once = 24 << 20;
    let crossed = report.rungs.source.bytes;
    assert!(crossed >= once && report.wan_tx_bytes < once + (8 << 20), "{report:#?}");
    source.assert_ends_well().await;
    let after = destination.assert_lives().await;
    assert!(after.pages_written >= before.pages_written, "{before} {after}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_stays_broken_leaves_the_vm_at_its_source_and_a_cancel_does_not_wait_for_it() {
    let lab = Lab::new().await;
    let (mut source, mut destination, wan) = scene(&lab).await;
    let journey = cut_in_the_middle(&source, &wan, 1_000).await;
    let ended = journey.end().await.expect_err("nobody can be reached");
    assert!(matches!(&ended, ClientError::Refused(_, error) if error.code != "bug"), "{ended:?}");
    assert_eq!(source.status().await.state, VmState::Running);
    // The destination hears of it as soon as it can be reached, and is free again.
    wan.cut(Cut::NONE);
    destination.wait_for("it is free again", limits::SETTLED, is(IncomingPhase::Listening)).await;

    let journey = cut_in_the_middle(&source, &wan, 300_000).await;
    journey.cancel().await;
    assert_eq!(source.status().await.state, VmState::Running);
    assert!(journey.end().await.is_err());
    wan.cut(Cut::NONE);
    destination.wait_for("it is free again", limits::SETTLED, is(IncomingPhase::Listening)).await;
    let report = Journey::whole(&source, wan.ticket(), Terms::default()).await.expect("it moves");
    assert_eq!(report.breaks, 0);
    source.assert_ends_well().await;
    destination.assert_lives().await;
}
