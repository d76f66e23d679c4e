//! A guest that writes faster than the link carries, and pre-copy alone: it is slowed down until the rest fits, and runs at full speed wherever it goes on.

use std::time::Duration;

use guest_images::pagestorm::options::Options;
use tern_tests::real::{Guest, Journey, Lab, Terms, Vm, Wan};
use vmm::migrate::Mode;
use vmm::migrate::report::{Outcome, WhyStopped};

const MBIT: u64 = 1_000_000;

/// Rewrites 4 MiB with random bytes, 20 MB of them a second.
fn stormy() -> Guest {
    let options = Options { rate_pps: 5000, ws_bytes: 4 << 20, base: 4 << 20, ..Options::default() };
    Guest { memory_bytes: 16 << 20, options, ..Guest::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_faster_than_the_link_is_slowed_down_until_the_rest_fits() {
    let lab = Lab::new().await;
    let (a, b) = lab.two_hosts().await;
    let mut source = Vm::launch(&lab, &a, "source", &stormy()).await;
    let mut destination = Vm::receive(&lab, &b, "destination", None).await;
    let wan = Wan::to(&destination.ticket().await, 50 * MBIT, Duration::from_millis(20));
    let terms = || Terms { mode: Mode::Precopy, auto_converge: true, ..Terms::default() };

    // Cancelled while it is slowed down it goes on as it was.
    let mut journey = Journey::start(&source, wan.ticket(), terms()).await;
    journey.until("a round that did not help", |progress| progress.round >= 4).await;
    journey.cancel().await;
    journey.end().await.expect_err("it was cancelled");
    let before = source.assert_lives().await;

    let report = Journey::whole(&source, wan.ticket(), terms()).await.expect("it moves");
    assert_eq!((report.outcome, report.verified), (Outcome::Completed, true), "{report:#?}");
    assert_eq!((report.why_stopped, report.postcopy), (Some(WhyStopped::Fits), None), "{report:#?}");
    let slowed = report.auto_converge.expect("it was slowed down");
    assert!((20..=99).contains(&slowed.highest_percent) && slowed.throttled_ms > 0, "{report:#?}");
    source.assert_ends_well().await;
    let after = destination.assert_lives().await;
    assert!(after.pages_written > before.pages_written, "{before} {after}");
}
