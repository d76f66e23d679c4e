//! The demo as a user runs it: real processes, real KVM, a small VM.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

fn tern() -> Command {
    Command::new(env!("CARGO_BIN_EXE_tern"))
}

/// One demo at a time: each has ten processes that want all cores.
static ALONE: Mutex<()> = Mutex::new(());

fn demo(options: &[&str]) -> (Output, serde_json::Value) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let output = tern().args(["demo", "--json"]).args(options).output().unwrap();
    let stdout = String::from_utf8(output.stdout.clone()).unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    let last = stdout.lines().last().unwrap_or_else(|| panic!("no report; standard error:\n{stderr}"));
    let report = serde_json::from_str(last).unwrap();
    (output, report)
}

fn assert_good(output: &Output, report: &serde_json::Value) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{report:#}\n{stderr}");
    assert_eq!(report["outcome"], "completed");
    assert_eq!(report["verified"], true);
    assert_eq!(report["self_check_failures"], 0);
    assert_eq!(report["problems"], serde_json::json!([]));
}

/// Pages of a rung.
fn pages(report: &serde_json::Value, rung: &str) -> u64 {
    report["rungs"][rung]["pages"].as_u64().unwrap()
}

#[test]
fn a_small_vm_moves_by_every_rung_and_loses_nothing() {
    let (output, report) = demo(&["--memory", "64M", "--dirty", "200", "--rate", "200M", "--rtt", "10ms"]);
    assert_good(&output, &report);
    for rung in ["zero", "duplicate", "host", "site", "source"] {
        assert!(pages(&report, rung) > 0, "{rung}: {report:#}");
    }
    assert!(report["self_check_pages"].as_u64().unwrap() > 0);
    assert!(report["wan_bytes"].as_u64() < report["plain_bytes"].as_u64());
    assert!(report["downtime_ms"].as_f64().unwrap() > 0.0);
}

#[test]
fn images_that_the_site_holds_cost_little_more_than_their_names() {
    // Two memories of 16 MiB that share all but a quarter; noise, so that nothing but sharing makes it small.
    let dir = tempfile::tempdir().unwrap();
    let mut noise = vec![0; 16 << 20];
    std::fs::File::open("/dev/urandom").unwrap().read_exact(&mut noise).unwrap();
    let (vm, site) = (dir.path().join("vm.ram"), dir.path().join("site.ram"));
    std::fs::write(&vm, &noise).unwrap();
    noise[..4 << 20].fill(0);
    std::fs::write(&site, &noise).unwrap();
    let site = format!("site={}", site.display());
    let images = ["--memory-image", vm.to_str().unwrap(), "--memory-image", &site];
    let (output, report) = demo(&[&["--dirty", "0", "--rtt", "10ms"], &images[..]].concat());
    assert_good(&output, &report);
    assert_eq!(report["bound"]["missing_pages"], 1024);
    let (wan, bound) = (report["wan_bytes"].as_u64().unwrap(), report["bound_bytes"].as_u64().unwrap());
    assert!(wan * 2 <= bound * 3, "{wan} bytes against a bound of {bound}: {report:#}");
}

/// Starts a demo with its files in `dir`, for one that is killed leaves them there, and returns when its processes run.
fn start_until_indexing(dir: &Path) -> (Child, BufReader<ChildStderr>) {
    let mut child = tern()
        .args(["demo", "--memory", "64M"])
        .env("TMPDIR", dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut said = String::new();
    while !said.contains("both sites index") {
        assert!(stderr.read_line(&mut said).unwrap() > 0, "the demo ended early:\n{said}");
    }
    assert!(!children_of(child.id()).is_empty());
    (child, stderr)
}

/// Processes that were started to die with `parent`, by their command lines.
fn children_of(parent: u32) -> Vec<String> {
    let words = format!("--die-with-parent\0{parent}\0");
    std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| std::fs::read(entry.ok()?.path().join("cmdline")).ok())
        .map(|line| String::from_utf8_lossy(&line).into_owned())
        .filter(|line| line.contains(&words))
        .collect()
}

#[test]
fn no_process_is_left_behind_by_a_demo_that_is_interrupted_or_killed() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for signal in [Signal::INT, Signal::KILL] {
        let dir = tempfile::tempdir().unwrap();
        let (mut child, _stderr) = start_until_indexing(dir.path());
        let id = child.id();
        kill_process(Pid::from_raw(id.try_into().unwrap()).unwrap(), signal).unwrap();
        assert!(!child.wait().unwrap().success());
        let deadline = Instant::now() + Duration::from_secs(10);
        while !children_of(id).is_empty() {
            assert!(Instant::now() < deadline, "{signal:?} left {:?}", children_of(id));
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn what_does_not_go_together_is_said() {
    let output = tern().args(["demo", "--memory-image", "site=/nowhere"]).output().unwrap();
    assert!(!output.status.success());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("the memory that is to move"), "{stderr}");
}
