//! Any one process is killed (SIGKILL) at any phase of a migration: then exactly one VM lives, or the source stands still, says that it
//! is in doubt and how to resolve that, and the one command that it names does.

use std::time::Duration;

use guest_images::pagestorm::options::Options;
use guest_images::pagestorm::report::Report as SelfCheck;
use tern_tests::real::lab::run;
use tern_tests::real::{Guest, Host, Journey, Lab, Site, Terms, Vm, Wan, limits, until};
use vmm::control::api::{VmState, VmStatus};
use vmm::control::client::ClientError;
use vmm::migrate::report::{IncomingPhase, Outcome, Phase, Report};

/// When the process is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    Offering,
    FirstRound,
    LaterRound,
    StopAndCopy,
    Handover,
    Committing,
    /// The VM runs at the destination; whether the source has heard of it yet is open.
    Running,
}

/// Two hosts with a site each, a VM that is on its way between them, and a link on which every phase takes its time.
struct Scene {
    lab: Lab,
    a: Host,
    site_a: Site,
    site_b: Site,
    source: Vm,
    destination: Vm,
    // Held for its life.
    _wan: Wan,
    journey: Journey,
    /// What the guest said before it set out.
    before: SelfCheck,
}

impl Scene {
    /// The journey has begun.
    async fn begin() -> Self {
        let lab = Lab::new().await;
        let (a, b) = lab.two_hosts().await;
        let (mut site_a, mut site_b) = (Site::new(&lab, "a").await, Site::new(&lab, "b").await);
        site_a.join(&lab, None).await;
        for _ in 0..2 {
            site_b.join(&lab, None).await;
        }
        site_b.ready(0).await;
        // Every round leaves some hundred pages to the next, which never fit the downtime asked for.
        let options = Options { rate_pps: 500, ws_bytes: 2 << 20, base: 4 << 20, ..Options::default() };
        let guest = Guest {
            memory_bytes: 8 << 20,
            options,
            site: Some(site_a.peers[0].socket().into()),
            ..Guest::default()
        };
        let mut source = Vm::launch(&lab, &a, "source", &guest).await;
        let destination = Vm::receive(&lab, &b, "destination", Some(site_b.peers[0].socket())).await;
        let wan = Wan::to(&destination.ticket().await, 40_000_000, Duration::from_millis(400));
        let before = source.self_check().await;
        let terms = Terms { downtime_ms: 1, ..Terms::default() };
        let journey = Journey::start(&source, wan.ticket(), terms).await;
        Self { lab, a, site_a, site_b, source, destination, _wan: wan, journey, before }
    }

    /// The journey has come to `moment`.
    async fn at(moment: Moment) -> Self {
        let mut scene = Self::begin().await;
        let journey = &mut scene.journey;
        let phase = match moment {
            Moment::Offering => journey.until_phase(Phase::Offering).await.phase,
            Moment::FirstRound => journey.until_phase(Phase::Precopy).await.phase,
            Moment::LaterRound => journey.until("a later round", |progress| progress.round > 0).await.phase,
            Moment::StopAndCopy => journey.until_phase(Phase::StopAndCopy).await.phase,
            Moment::Handover => journey.until_phase(Phase::Handover).await.phase,
            Moment::Committing => journey.until_phase(Phase::Committing).await.phase,
            Moment::Running => {
                scene.destination.wait_for_state(VmState::Running, limits::MIGRATION).await;
                Phase::Committing
            }
        };
        eprintln!("{moment:?}: the source was last seen {phase:?}");
        scene
    }
}

/// `vmm resolve --run-here`, as the status told the operator to.
async fn run_here(vm: &Vm, status: &VmStatus) {
    let reason = status.reason.as_deref().unwrap_or_default();
    assert!(reason.contains("in doubt") && reason.contains("`vmm resolve --run-here`"), "{status:#?}");
    let said =
        run("vmm", &["resolve".into(), "--run-here".into(), "--control".into(), vm.control().into()]).await;
    assert!(said.ok, "{said:#?}");
}

/// Panics unless the guest lives on in `vm`, and is no younger than it was.
async fn assert_lives_on(vm: &mut Vm, before: &SelfCheck) {
    let after = vm.assert_lives().await;
    assert!(
        after.pages_written >= before.pages_written && after.check > before.check,
        "{before}, then {after}"
    );
}

async fn the_source_dies(moment: Moment) {
    let mut scene = Scene::at(moment).await;
    scene.source.process().kill().await;
    let destination = &mut scene.destination;
    let settled = destination
        .wait_for("it says what became of the VM", limits::SETTLED, |status| {
            let incoming = status.incoming.as_ref().expect("it receives");
            match incoming.phase {
                // Of a source that died before its first word it knows nothing.
                IncomingPhase::Listening => moment == Moment::Offering || incoming.last_failure.is_some(),
                IncomingPhase::Receiving | IncomingPhase::ReceivingCut | IncomingPhase::Closed => false,
                IncomingPhase::Held
                | IncomingPhase::Postcopy
                | IncomingPhase::Starved
                | IncomingPhase::Running => true,
            }
        })
        .await;
    match settled.state {
        // The VM died with its process: half of a VM is none.
        VmState::Receiving => {
            assert!(
                moment != Moment::Committing && moment != Moment::Running,
                "Ready was said: {settled:#?}"
            );
            assert_eq!(settled.name, None, "no VM is here: {settled:#?}");
            another_can_come(&scene.lab, &scene.a, destination).await;
        }
        VmState::InDoubt => {
            assert!(
                settled.heartbeat.is_none_or(|heartbeat| heartbeat.count == 0),
                "it stands still: {settled:#?}"
            );
            run_here(destination, &settled).await;
            assert_lives_on(destination, &scene.before).await;
        }
        VmState::Running => {
            assert!(
                moment == Moment::Committing || moment == Moment::Running,
                "nobody said Commit: {settled:#?}"
            );
            assert_lives_on(destination, &scene.before).await;
        }
        VmState::Created | VmState::Paused | VmState::Migrating | VmState::Stopped => panic!("{settled:#?}"),
    }
}

/// Panics unless a destination whose source died takes another VM, once it has given the first one up.
async fn another_can_come(lab: &Lab, host: &Host, destination: &mut Vm) {
    let mut other = Vm::launch(lab, host, "other", &Guest::default()).await;
    until("another VM comes here", limits::SETTLED, async || {
        Journey::whole(&other, &destination.ticket().await, Terms::default()).await.ok()
    })
    .await;
    other.assert_ends_well().await;
    destination.assert_lives().await;
}

async fn the_destination_dies(moment: Moment) {
    let Scene { lab: _lab, mut source, mut destination, journey, before, .. } = Scene::at(moment).await;
    destination.process().kill().await;
    let settled = until("the source says what became of the VM", limits::SETTLED, async || {
        if !source.process().is_alive() {
            return Some(None);
        }
        match source.client().status().await {
            Ok(status) => matches!(status.state, VmState::Running | VmState::InDoubt).then_some(Some(status)),
            // It ends while it is asked.
            Err(_) => None,
        }
    })
    .await;
    match settled {
        Some(status) if status.state == VmState::InDoubt => {
            assert!(
                moment == Moment::Committing || moment == Moment::Running,
                "Commit was not sent: {status:#?}"
            );
            let still = source.status().await;
            assert_eq!(still.heartbeat, status.heartbeat, "it stands still");
            run_here(&source, &status).await;
            refused(journey.end().await);
            assert_lives_on(&mut source, &before).await;
        }
        Some(_) => {
            assert!(moment != Moment::Running, "the destination said that the VM runs there");
            refused(journey.end().await);
            assert_lives_on(&mut source, &before).await;
        }
        // The source had heard that the VM runs there, and let it go: it died with its process.
        None => {
            assert_eq!(moment, Moment::Running, "the source ended, and the VM runs nowhere");
            source.assert_ends_well().await;
        }
    }
}

/// Panics unless the answer is a reason why the VM runs on at the source.
fn refused(end: Result<Report, ClientError>) {
    match end {
        Err(ClientError::Refused(_, error)) => {
            assert!(!error.message.is_empty() && error.code != "bug", "{error:?}")
        }
        other => panic!("the destination is dead, and the migration ends with {other:?}"),
    }
}

/// Whose peer dies.
#[derive(Clone, Copy, Debug)]
enum Whose {
    Source,
    DestinationsHost,
    DestinationsSite,
}

async fn a_peer_dies(whose: Whose, moment: Moment) {
    let mut scene = Scene::at(moment).await;
    let peer = match whose {
        Whose::Source => &mut scene.site_a.peers[0],
        Whose::DestinationsHost => &mut scene.site_b.peers[0],
        Whose::DestinationsSite => &mut scene.site_b.peers[1],
    };
    peer.process().kill().await;
    let report =
        scene.journey.end().await.unwrap_or_else(|error| panic!("it fails for a peer's death: {error:?}"));
    assert_eq!((report.outcome, report.verified), (Outcome::Completed, true), "{report:#?}");
    scene.source.assert_ends_well().await;
    assert_lives_on(&mut scene.destination, &scene.before).await;
}

/// Tells a story once for every moment, all of them side by side: they wait for the link more than they work.
fn at_every_moment(story: impl AsyncFn(Moment) + Sync) {
    const ALL: [Moment; 7] = [
        Moment::Offering,
        Moment::FirstRound,
        Moment::LaterRound,
        Moment::StopAndCopy,
        Moment::Handover,
        Moment::Committing,
        Moment::Running,
    ];
    let tell = &|moment| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(story(moment));
    };
    let failed: Vec<Moment> = std::thread::scope(|scope| {
        let stories = ALL.map(|moment| (moment, scope.spawn(move || tell(moment))));
        stories.into_iter().filter_map(|(moment, story)| story.join().is_err().then_some(moment)).collect()
    });
    assert!(failed.is_empty(), "killed at these moments it went wrong, as told above: {failed:?}");
}

#[test]
fn the_source_dies_at_every_moment() {
    at_every_moment(the_source_dies);
}

#[test]
fn the_destination_dies_at_every_moment() {
    at_every_moment(the_destination_dies);
}

#[test]
fn the_sources_peer_dies_at_every_moment() {
    at_every_moment(async |moment| a_peer_dies(Whose::Source, moment).await);
}

#[test]
fn the_destinations_peer_dies_at_every_moment() {
    at_every_moment(async |moment| a_peer_dies(Whose::DestinationsHost, moment).await);
}

#[test]
fn a_peer_of_the_destinations_site_dies_at_every_moment() {
    at_every_moment(async |moment| a_peer_dies(Whose::DestinationsSite, moment).await);
}
