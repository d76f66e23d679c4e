//! A source that dies in post-copy with pages that nobody else has: its spill file gives them, and starts nothing. And a directory that takes no file.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use guest_images::pagestorm::options::Options;
use tern_tests::real::{Guest, Host, Journey, Lab, Said, Terms, Vm, Wan, finish, limits, run};
use tokio::process::Command;
use vmm::control::api::{VmState, VmStatus};
use vmm::control::client::ClientError;
use vmm::migrate::Mode;
use vmm::migrate::report::{IncomingPhase, Outcome, Phase};

const MBIT: u64 = 1_000_000;

/// A guest that rewrites 24 MiB with random bytes, 20 MB of them a second.
fn stormy() -> Guest {
    let options = Options { rate_pps: 5000, ws_bytes: 24 << 20, prefill: true, ..Options::default() };
    Guest { memory_bytes: 48 << 20, options, ..Guest::default() }
}

fn terms(spill: &Path) -> Terms {
    Terms { mode: Mode::Postcopy, spill: Some(spill.to_owned()), ..Terms::default() }
}

/// `vmm spill send` on `host`.
async fn send(host: &Host, file: &Path, to: &str) -> Said {
    let mut args: Vec<OsString> = vec!["spill".into(), "send".into(), file.into(), "--to".into(), to.into()];
    args.extend(host.options());
    args.push("--json".into());
    run("vmm", &args).await
}

/// What stands in `dir`.
fn files(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).expect("the directory is there").map(|entry| entry.expect("a file").path()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spill_file_gives_what_a_lost_source_had_and_starts_nothing() {
    let lab = Lab::new().await;
    let (a, b) = lab.two_hosts().await;
    let other = lab.host("other").await;
    other.let_in(&b);
    b.let_in(&other);
    let spill = lab.dir().join("spill");
    fs::create_dir(&spill).expect("a directory");
    let mut source = Vm::launch(&lab, &a, "source", &stormy()).await;
    let before = source.self_check().await;
    let mut destination = Vm::receive(&lab, &b, "destination", None).await;
    let ticket = destination.ticket().await;
    let wan = Wan::to(&ticket, 50 * MBIT, Duration::from_millis(50));
    let mut journey = Journey::start(&source, wan.ticket(), terms(&spill)).await;
    journey.until_phase(Phase::Postcopy).await;
    source.process().kill().await;

    let left = files(&spill);
    let [file] = &left[..] else { panic!("one file and nothing half: {left:?}") };
    assert!(file.extension().is_some_and(|extension| extension == "spill"), "{left:?}");
    let mode = fs::metadata(file).expect("it is there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "it holds guest memory");

    // A process that the VM did not go to starts nothing, and a torn file is not served.
    let stranger = Vm::receive(&lab, &b, "stranger", None).await;
    let said = send(&other, file, &stranger.ticket().await).await;
    assert!(!said.ok && said.stderr.contains("does not run this VM"), "{said:#?}");
    assert_eq!(stranger.status().await.state, VmState::Receiving);
    let torn = lab.dir().join("torn.spill");
    let whole = fs::read(file).expect("it can be read by its owner");
    fs::write(&torn, &whole[..whole.len() / 2]).expect("a copy");
    let said = send(&other, &torn, &ticket).await;
    assert!(!said.ok && said.stderr.contains("not a whole spill file"), "{said:#?}");

    let starved = |status: &VmStatus| {
        status.incoming.as_ref().is_some_and(|incoming| incoming.phase == IncomingPhase::Starved)
    };
    destination.wait_for("a page that nobody has", limits::SETTLED, starved).await;
    let said = send(&other, file, &ticket).await;
    assert!(said.ok, "{said:#?}");
    assert_eq!(files(&spill), Vec::<PathBuf>::new(), "nobody needs it any more");
    let whole = |status: &VmStatus| {
        status.incoming.as_ref().is_some_and(|incoming| incoming.phase == IncomingPhase::Running)
    };
    destination.wait_for("all of its memory", limits::SETTLED, whole).await;
    let after = destination.assert_lives().await;
    assert!(after.pages_written >= before.pages_written, "{before} {after}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_lives_removes_its_spill_file_and_without_one_nothing_moves() {
    let lab = Lab::new().await;
    let (a, b) = lab.two_hosts().await;
    let spill = lab.dir().join("spill");
    let mut source = Vm::launch(&lab, &a, "source", &stormy()).await;
    let mut destination = Vm::receive(&lab, &b, "destination", None).await;
    let wan = Wan::to(&destination.ticket().await, 200 * MBIT, Duration::from_millis(10));
    let refused = |answer| match answer {
        Err(ClientError::Refused(_, error)) => error,
        other => panic!("it cannot move: {other:?}"),
    };

    let error = refused(Journey::whole(&source, wan.ticket(), terms(&spill)).await);
    assert_eq!(error.code, "spill_failed", "{error:?}");
    assert!(error.message.contains("No such file"), "{error:?}");
    source.assert_lives().await;

    // No file may grow beyond 1 MiB (RLIMIT_FSIZE, by prlimit of util-linux).
    fs::create_dir(&spill).expect("a directory");
    let pid = source.status().await.pid.to_string();
    let limit = async |bytes: &str| {
        let limited =
            finish(Command::new("prlimit").args([&format!("--fsize={bytes}:unlimited"), "--pid", &pid]))
                .await;
        assert!(limited.ok, "prlimit: {}", limited.stderr);
    };
    limit("1048576").await;
    let error = refused(Journey::whole(&source, wan.ticket(), terms(&spill)).await);
    assert_eq!(error.code, "spill_failed", "{error:?}");
    assert_eq!(files(&spill), Vec::<PathBuf>::new(), "nothing half is left");
    source.assert_lives().await;

    limit("unlimited").await;
    let report = Journey::whole(&source, wan.ticket(), terms(&spill)).await.expect("it moves");
    assert_eq!((report.outcome, report.verified), (Outcome::Completed, true), "{report:#?}");
    let (spilled, late) = (report.spill.expect("a file was written"), report.postcopy.expect("post-copy"));
    assert!(spilled.pages >= late.absent && spilled.paused_ms <= spilled.spill_ms, "{report:#?}");
    assert_eq!(files(&spill), Vec::<PathBuf>::new(), "nobody needs it any more");
    source.assert_ends_well().await;
    destination.assert_lives().await;
}
