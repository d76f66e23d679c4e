//! A guest that writes faster than the link carries: the VM goes first and its memory follows, also over a broken link and from a source that dies.

use std::cell::Cell;
use std::time::Duration;

use guest_images::pagestorm::options::Options;
use tern_tests::real::{Cut, Guest, Journey, Lab, Site, Terms, Vm, Wan, limits};
use vmm::control::api::{VmState, VmStatus};
use vmm::control::client::ClientError;
use vmm::migrate::Mode;
use vmm::migrate::report::{IncomingPhase, Outcome, Phase, Postcopy, Report, WhyStopped};

const MBIT: u64 = 1_000_000;

/// A guest that rewrites 24 MiB with random bytes, 20 MB of them a second.
fn stormy() -> Guest {
    let options = Options { rate_pps: 5000, ws_bytes: 24 << 20, prefill: true, ..Options::default() };
    Guest { memory_bytes: 48 << 20, options, ..Guest::default() }
}

fn terms(mode: Mode) -> Terms {
    Terms { mode, ..Terms::default() }
}

/// A source that runs, a destination that waits, and a link between them.
struct Scene {
    lab: Lab,
    source: Vm,
    destination: Vm,
    wan: Wan,
}

impl Scene {
    async fn new(rate_bits: u64, rtt: Duration) -> Self {
        let lab = Lab::new().await;
        let (a, b) = lab.two_hosts().await;
        let source = Vm::launch(&lab, &a, "source", &stormy()).await;
        let destination = Vm::receive(&lab, &b, "destination", None).await;
        let wan = Wan::to(&destination.ticket().await, rate_bits, rtt);
        Self { lab, source, destination, wan }
    }

    async fn all_of_memory_is_there(&mut self) {
        let whole = |status: &VmStatus| {
            status.incoming.as_ref().is_some_and(|incoming| incoming.phase == IncomingPhase::Running)
        };
        let status = self.destination.wait_for("all of its memory", limits::SETTLED, whole).await;
        assert_eq!(status.incoming.map(|incoming| incoming.absent_pages), Some(0));
    }
}

fn assert_sound(report: &Report) -> Postcopy {
    assert_eq!((report.outcome, report.verified), (Outcome::Completed, true), "{report:#?}");
    let late = report.postcopy.unwrap_or_else(|| panic!("pages came after the VM ran: {report:#?}"));
    assert!(late.absent > 0 && late.faults > 0, "{report:#?}");
    assert_eq!(late.absent, late.zero + late.host + late.site + late.source, "each came once: {report:#?}");
    assert!(late.faults <= late.absent, "{report:#?}");
    late
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_faster_than_the_link_goes_first_and_its_memory_follows() {
    let mut scene = Scene::new(50 * MBIT, Duration::from_millis(20)).await;
    let before = scene.source.self_check().await;
    let report =
        Journey::whole(&scene.source, scene.wan.ticket(), terms(Mode::Hybrid)).await.expect("it moves");
    let late = assert_sound(&report);
    let why = report.why_stopped.expect("it was stopped");
    assert!(!matches!(why, WhyStopped::Fits | WhyStopped::DoesNotConverge), "{report:#?}");
    assert_eq!(late.source, late.absent - late.zero, "there is no site: {report:#?}");
    scene.source.assert_ends_well().await;
    scene.all_of_memory_is_there().await;
    let after = scene.destination.assert_lives().await;
    assert!(after.pages_written > before.pages_written, "{before} {after}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn asked_for_it_goes_after_one_round_and_pre_copy_alone_stops_it_for_longer() {
    let mut scene = Scene::new(50 * MBIT, Duration::from_millis(20)).await;
    let asked = terms(Mode::Postcopy);
    let report = Journey::whole(&scene.source, scene.wan.ticket(), asked).await.expect("it moves");
    assert_sound(&report);
    assert_eq!((report.why_stopped, report.rounds), (Some(WhyStopped::PostcopyAsked), 2), "{report:#?}");
    scene.source.assert_ends_well().await;
    scene.all_of_memory_is_there().await;
    scene.destination.assert_lives().await;

    let mut scene = Scene::new(50 * MBIT, Duration::from_millis(20)).await;
    let asked = terms(Mode::Precopy);
    let report = Journey::whole(&scene.source, scene.wan.ticket(), asked).await.expect("it moves");
    assert_eq!(
        (report.why_stopped, report.postcopy),
        (Some(WhyStopped::DoesNotConverge), None),
        "{report:#?}"
    );
    scene.source.assert_ends_well().await;
    scene.destination.assert_lives().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_site_holds_is_not_sent_after_it_ran_either() {
    let lab = Lab::new().await;
    let (a, b) = lab.two_hosts().await;
    let mut site_a = Site::new(&lab, "a").await;
    site_a.join(&lab, None).await;
    let mut site_b = Site::new(&lab, "b").await;
    site_b.join(&lab, None).await;
    // Two guests of one seed write the same bytes in the same order: the sibling is a little ahead.
    let sibling = Guest { site: Some(site_b.peers[0].socket().into()), ..stormy() };
    let mut sibling = Vm::launch(&lab, &b, "sibling", &sibling).await;
    let guest = Guest { site: Some(site_a.peers[0].socket().into()), ..stormy() };
    let mut source = Vm::launch(&lab, &a, "source", &guest).await;
    site_b.ready(1).await;
    site_a.ready(1).await;
    let mut destination = Vm::receive(&lab, &b, "destination", Some(site_b.peers[0].socket())).await;
    let wan = Wan::to(&destination.ticket().await, 50 * MBIT, Duration::from_millis(50));
    let report = Journey::whole(&source, wan.ticket(), terms(Mode::Postcopy)).await.expect("it moves");
    assert_sound(&report);
    source.assert_ends_well().await;
    destination.assert_lives().await;
    sibling.assert_lives().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_link_in_post_copy_goes_on_where_it_stopped() {
    let mut scene = Scene::new(50 * MBIT, Duration::from_millis(50)).await;
    let mut journey = Journey::start(&scene.source, scene.wan.ticket(), terms(Mode::Postcopy)).await;
    journey.until_phase(Phase::Postcopy).await;
    scene.wan.cut(Cut::BOTH);
    journey.until_phase(Phase::PostcopyCut).await;
    // It lives there, and the source can neither take it back nor forget it by a slip.
    let refused = scene.source.client().cancel().await.expect_err("nobody can take it back");
    assert!(matches!(&refused, ClientError::Refused(_, error) if error.code == "too_late"), "{refused:?}");
    scene.wan.cut(Cut::NONE);
    let report = journey.end().await.expect("it moves");
    let late = assert_sound(&report);
    assert!(late.reconnects > 0, "{report:#?}");
    scene.source.assert_ends_well().await;
    scene.all_of_memory_is_there().await;
    scene.destination.assert_lives().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_dies_in_post_copy_leaves_a_vm_that_stands_still_and_says_why() {
    let mut scene = Scene::new(50 * MBIT, Duration::from_millis(50)).await;
    let mut journey = Journey::start(&scene.source, scene.wan.ticket(), terms(Mode::Postcopy)).await;
    journey.until_phase(Phase::Postcopy).await;
    scene.source.process().kill().await;
    let starved = |status: &VmStatus| {
        status.incoming.as_ref().is_some_and(|incoming| incoming.phase == IncomingPhase::Starved)
    };
    let status = scene.destination.wait_for("a page that nobody has", limits::SETTLED, starved).await;
    let incoming = status.incoming.expect("it came from somewhere");
    assert!(incoming.absent_pages > 0);
    assert!(incoming.last_failure.is_some_and(|why| why.contains("nobody gives the page of frame")));
    // It can be looked at and ended, and nothing that would read all of memory begins.
    let lab = &scene.lab;
    let said = scene.destination.snapshot(&lab.dir().join("snapshots"), None).await;
    assert!(!said.ok && said.stderr.contains("on their way"), "{said:#?}");
    scene.destination.client().operate("stop").await.expect("it can be ended");
    let ended = scene.destination.process().end().await;
    assert!(ended.success(), "{ended}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_operator_paused_stays_paused_when_the_missing_page_comes() {
    let mut scene = Scene::new(50 * MBIT, Duration::from_millis(50)).await;
    let mut journey = Journey::start(&scene.source, scene.wan.ticket(), terms(Mode::Postcopy)).await;
    journey.until_phase(Phase::Postcopy).await;
    scene.wan.cut(Cut::BOTH);
    // Its virtual CPU has come to a page that is not here: the heart stands still.
    let (last, looks) = (Cell::new(0), Cell::new(0));
    let stands = |status: &VmStatus| {
        let beats = status.heartbeat.map_or(0, |heartbeat| heartbeat.count);
        looks.set(if last.replace(beats) == beats { looks.get() + 1 } else { 0 });
        // A guest that stands at its first page here has not beaten at all; one that is only slow to begin beats before that many looks.
        looks.get() >= if beats > 0 { 10 } else { 200 }
    };
    scene.destination.wait_for("a fault", limits::SETTLED, stands).await;
    scene.destination.client().operate("pause").await.expect("a VM that waits can be paused");
    let starved = |status: &VmStatus| {
        status.incoming.as_ref().is_some_and(|incoming| incoming.phase == IncomingPhase::Starved)
    };
    scene.destination.wait_for("a page that nobody gives", limits::SETTLED, starved).await;
    scene.wan.cut(Cut::NONE);
    let report = journey.end().await.expect("it moves");
    assert!(assert_sound(&report).pauses > 0, "{report:#?}");
    scene.all_of_memory_is_there().await;
    assert_eq!(scene.destination.status().await.state, VmState::Paused);
    scene.destination.client().operate("resume").await.expect("all of it is here");
    scene.source.assert_ends_well().await;
    scene.destination.assert_lives().await;
}
