//! The link is cut at the hand-over and nobody dies: the source says that it is in doubt, asks again when the link is back, and ends
//! the matter by itself.

use std::time::Duration;

use tern_tests::real::{Cut, Guest, Journey, Lab, Terms, Vm, Wan, limits};
use vmm::control::api::VmState;
use vmm::control::client::ClientError;
use vmm::migrate::report::{Outcome, Phase};

struct Scene {
    _lab: Lab,
    source: Vm,
    destination: Vm,
    wan: Wan,
    journey: Journey,
}

impl Scene {
    /// Commit has just been sent, and is on the link for 300 ms yet.
    async fn committed() -> Self {
        let lab = Lab::new().await;
        let (a, b) = lab.two_hosts().await;
        let mut source = Vm::launch(&lab, &a, "source", &Guest::default()).await;
        let destination = Vm::receive(&lab, &b, "destination", None).await;
        let wan = Wan::to(&destination.ticket().await, 100_000_000, Duration::from_millis(600));
        source.self_check().await;
        let mut journey = Journey::start(&source, wan.ticket(), Terms::default()).await;
        let progress = journey.until_phase(Phase::Committing).await;
        assert_eq!(progress.phase, Phase::Committing);
        Self { _lab: lab, source, destination, wan, journey }
    }

    /// The source stands still and says why; the link comes back, and the VM lives at the destination.
    async fn ends_by_itself(mut self) {
        let status = self.source.wait_for_state(VmState::InDoubt, limits::SETTLED).await;
        let reason = status.reason.as_deref().unwrap_or_default();
        assert!(
            reason.contains("`vmm resolve --run-here`") && reason.contains("`vmm resolve --let-go`"),
            "{status:#?}"
        );
        assert_eq!(self.source.status().await.heartbeat, status.heartbeat, "it stands still");
        self.wan.cut(Cut::NONE);
        match self.journey.end().await {
            Ok(report) => {
                assert_eq!((report.outcome, report.verified), (Outcome::Completed, true), "{report:#?}")
            }
            // So long in doubt that the question was answered so.
            Err(ClientError::Refused(_, error)) => assert_eq!(error.code, "in_doubt", "{error:?}"),
            Err(error) => panic!("{error:?}"),
        }
        self.source.assert_ends_well().await;
        self.destination.assert_lives().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commit_is_lost_and_comes_again_when_the_link_is_back() {
    let mut scene = Scene::committed().await;
    scene.wan.cut(Cut::BOTH);
    // Nobody said Commit to it: it holds the VM and says so.
    let held = scene.destination.wait_for_state(VmState::InDoubt, limits::SETTLED).await;
    let reason = held.reason.as_deref().unwrap_or_default();
    assert!(reason.contains("`vmm resolve --run-here`"), "{held:#?}");
    scene.ends_by_itself().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_answer_to_commit_is_lost_and_the_question_asked_again_when_the_link_is_back() {
    let mut scene = Scene::committed().await;
    scene.wan.cut(Cut { to_destination: false, to_source: true });
    scene.destination.assert_lives().await;
    scene.ends_by_itself().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_lets_the_vm_go_that_runs_at_the_destination() {
    let mut scene = Scene::committed().await;
    scene.wan.cut(Cut { to_destination: false, to_source: true });
    scene.destination.assert_lives().await;
    scene.source.wait_for_state(VmState::InDoubt, limits::SETTLED).await;
    scene.source.client().resolve(false).await.expect("it is in doubt");
    let report = scene.journey.end().await.expect("it is reported");
    assert_eq!(report.outcome, Outcome::InDoubt, "{report:#?}");
    scene.source.assert_ends_well().await;
    scene.destination.assert_lives().await;
}
