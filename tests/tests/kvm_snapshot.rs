//! Snapshots of VMs under load, restored in fresh processes; what happens to them when a process is killed, a disk is full, or a byte is
//! damaged.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use guest_images::pagestorm::options::Options;
use tern_tests::real::lab::{Said, finish};
use tern_tests::real::{Guest, Journey, Lab, Load, Site, Terms, Vm, limits, until};
use tokio::process::Command;
use vmm::control::api::{SnapshotRequest, VmState};
use vmm::control::client::ClientError;
use vmm::snapshot::SnapshotReport;

fn report(said: &Said) -> SnapshotReport {
    assert!(said.ok, "{said:#?}");
    let report: SnapshotReport = serde_json::from_str(said.stdout.trim()).expect("--json prints the report");
    let SnapshotReport { pages_total, pages_zero, pages_present, pages_written, bytes_written, .. } = &report;
    assert_eq!(*pages_total, pages_zero + pages_present + pages_written, "{report:#?}");
    assert!(*bytes_written > pages_written * 4096, "{report:#?}");
    report
}

/// A VM with so much that its snapshot takes a while: `bytes` that nothing else has.
fn heavy(lab: &Lab, bytes: usize) -> Guest {
    let path = lab.dir().join("heavy");
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    // xorshift64 (Marsaglia, 2003)
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    });
    let content: Vec<u8> = words.flat_map(u64::to_le_bytes).take(bytes).collect();
    fs::write(&path, content).expect("a file");
    Guest {
        memory_bytes: (bytes as u64 + (32 << 20)).next_multiple_of(2 << 20),
        loads: vec![Load { file: path, addr: 16 << 20 }],
        ..Guest::default()
    }
}

fn code(error: ClientError) -> String {
    match error {
        ClientError::Refused(_, error) => error.code,
        other => panic!("not a refusal: {other}"),
    }
}

/// Files of a folder, whole paths, sorted.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    paths
}

fn packs(dir: &Path) -> Vec<PathBuf> {
    files(&dir.join("packs"))
        .into_iter()
        .filter(|path| path.extension().is_some_and(|e| e == "pages"))
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_snapshots_under_load_are_restored_in_fresh_processes() {
    let lab = Lab::new().await;
    let host = lab.host("a").await;
    let dir = lab.dir().join("snapshots");
    let guest = Guest::default();
    let mut source = Vm::launch(&lab, &host, "source", &guest).await;
    let early = source.self_check().await;
    let first = report(&source.snapshot(&dir, Some("first")).await);
    assert_eq!((first.name.as_str(), first.pages_total), ("first", guest.memory_bytes / 4096));
    assert!(first.pages_written > 0 && first.pages_zero > 0 && first.pause_ms > 0.0, "{first:#?}");
    assert_eq!(source.status().await.state, VmState::Running, "it runs on");
    let late = source.self_check().await;
    assert!(late.pages_written > early.pages_written, "it ran on");
    let second = report(&source.snapshot(&dir, None).await);
    assert_eq!(second.name, "1");
    assert!(second.pages_present > 0, "what has not changed is not written again: {second:#?}");
    source.process().kill().await;

    // Each twice, side by side, and the second one again and again.
    for name in ["first", "1", "1"] {
        let mut one = Vm::restore(&lab, &host, "one", &dir, &["--name", name]).await;
        let mut other = Vm::restore(&lab, &host, "other", &dir, &["--name", name]).await;
        for vm in [&mut one, &mut other] {
            let after = vm.assert_lives().await;
            let then = if name == "first" { &early } else { &late };
            assert!(after.pages_written >= then.pages_written, "{after} after {then}");
            assert!(after.uptime_ms >= then.uptime_ms, "the guest's clock goes on: {then} {after}");
            assert_eq!(vm.status().await.name.as_deref(), Some("source"));
        }
    }
    // A snapshot of a restored VM is a snapshot like any other, and knows what its ancestor had.
    let again = Vm::restore(&lab, &host, "again", &dir, &[]).await;
    again.client().operate("pause").await.expect("it pauses");
    let third = report(&again.snapshot(&dir, Some("third")).await);
    assert_eq!((third.pause_ms, again.status().await.state), (0.0, VmState::Paused), "{third:#?}");
    assert!(third.pages_present > 0, "{third:#?}");
    let mut last = Vm::restore(&lab, &host, "last", &dir, &["--name", "third", "--paused"]).await;
    assert_eq!(last.status().await.state, VmState::Paused);
    last.client().operate("resume").await.expect("it resumes");
    last.assert_lives().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restored_vm_migrates_on_and_a_peer_serves_from_the_snapshot() {
    let lab = Lab::new().await;
    let (a, b) = lab.two_hosts().await;
    let dir = lab.dir().join("snapshots");
    let mut source = Vm::launch(&lab, &a, "source", &heavy(&lab, 8 << 20)).await;
    report(&source.snapshot(&dir, None).await);
    let mut restored = Vm::restore(&lab, &a, "restored", &dir, &[]).await;

    // The destination's site has the snapshot's packs, added as files, and nothing else.
    let mut site = Site::new(&lab, "b").await;
    let peer = site.join(&lab, None).await;
    for pack in packs(&dir) {
        peer.add(&pack).await;
    }
    site.ready(0).await;
    let mut site_a = Site::new(&lab, "a").await;
    site_a.join(&lab, None).await;
    let domain_a = site_a.peers[0].socket().to_owned();
    restored.process().kill().await;
    let mut restored = Vm::restore_at(&lab, &a, "restored", &dir, &[], &domain_a).await;
    let mut destination = Vm::receive(&lab, &b, "destination", Some(site.peers[0].socket())).await;
    let ticket = destination.ticket().await;
    let moved = Journey::whole(&restored, &ticket, Terms::default()).await.expect("it completes");
    restored.assert_ends_well().await;
    destination.assert_lives().await;
    let held = (8 << 20) / 4096;
    assert!(moved.rungs.host.pages >= held, "the packs hold {held} pages and more: {moved:#?}");
    // The original knows nothing of its copy.
    source.assert_lives().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_killed_in_the_middle_leaves_the_earlier_snapshots_and_no_half_one() {
    let lab = Lab::new().await;
    let host = lab.host("a").await;
    let dir = lab.dir().join("snapshots");
    let small = Guest {
        memory_bytes: 16 << 20,
        options: Options { ws_bytes: 2 << 20, ..Guest::default().options },
        ..Guest::default()
    };
    let earlier = Vm::launch(&lab, &host, "earlier", &small).await;
    report(&earlier.snapshot(&dir, Some("earlier")).await);
    let guest = heavy(&lab, 256 << 20);
    for _ in 0..3 {
        let mut victim = Vm::launch(&lab, &host, "victim", &guest).await;
        let client = victim.client().clone();
        let request = SnapshotRequest { to: dir.display().to_string(), name: Some("victim".to_owned()) };
        let saving = tokio::spawn(async move { client.snapshot(&request).await });
        until("pages are being written", limits::START, async || {
            let written = |path: &PathBuf| fs::metadata(path).is_ok_and(|about| about.len() > 1 << 20);
            files(&dir.join("tmp")).iter().any(written).then_some(())
        })
        .await;
        victim.process().kill().await;
        assert!(saving.await.expect("asking does not panic").is_err());
        assert_eq!(files(&dir.join("snapshots")), [dir.join("snapshots/earlier")], "no half snapshot");
        assert!(!files(&dir.join("tmp")).is_empty(), "it was killed in the middle");
        let mut restored = Vm::restore(&lab, &host, "restored", &dir, &[]).await;
        restored.assert_lives().await;
    }
    // The next one removes what they left.
    report(&earlier.snapshot(&dir, Some("later")).await);
    assert!(files(&dir.join("tmp")).is_empty());
    for name in ["earlier", "later"] {
        Vm::restore(&lab, &host, name, &dir, &["--name", name]).await.assert_lives().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_room_there_is_no_snapshot_and_the_vm_runs_on() {
    let lab = Lab::new().await;
    let host = lab.host("a").await;
    let dir = lab.dir().join("snapshots");
    let guest = heavy(&lab, 64 << 20);
    let mut source = Vm::launch(&lab, &host, "source", &guest).await;
    // No file may grow beyond 8 MiB (RLIMIT_FSIZE, by prlimit of util-linux). Not before: the guest's memory is a file as well.
    let pid = source.status().await.pid.to_string();
    let limited = finish(Command::new("prlimit").args(["--fsize=8388608", "--pid", &pid])).await;
    assert!(limited.ok, "{limited:#?}");
    let said = source.snapshot(&dir, Some("big")).await;
    assert!(!said.ok && said.stderr.contains("no room"), "{said:#?}");
    let request = SnapshotRequest { to: dir.display().to_string(), name: None };
    assert_eq!(code(source.client().snapshot(&request).await.expect_err("there is no room")), "no_space");
    assert!(files(&dir.join("tmp")).is_empty() && files(&dir.join("snapshots")).is_empty());
    assert!(packs(&dir).is_empty());
    source.assert_lives().await;
    // Where it may not write at all.
    let request = SnapshotRequest { to: "/proc/snapshots".to_owned(), name: None };
    assert_eq!(code(source.client().snapshot(&request).await.expect_err("no directory can be there")), "io");
    source.assert_lives().await;
}

/// Restores where something is wrong: says what `vmm restore` said.
async fn refused(lab: &Lab, dir: &Path) -> String {
    let said = Vm::refused_restore(lab, dir).await;
    assert_eq!(said.code, Some(1), "{said:#?}");
    said.stderr
}

fn flip(path: &Path, at: u64) {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).expect("a file of the snapshot");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("a byte");
    file.write_all_at(&[byte[0] ^ 1], at).expect("a byte");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_damaged_is_named_and_nothing_runs() {
    let lab = Lab::new().await;
    let host = lab.host("a").await;
    let dir = lab.dir().join("snapshots");
    let source = Vm::launch(&lab, &host, "source", &Guest::default()).await;
    report(&source.snapshot(&dir, Some("s")).await);
    let [pack] = &packs(&dir)[..] else { panic!("one snapshot of a small VM makes one pack") };
    let pages = fs::metadata(pack).expect("a pack").len() / 4096;

    for (at, page) in [(0, 0), (5 * 4096 + 17, 5), (pages * 4096 - 1, pages - 1)] {
        flip(pack, at);
        let said = refused(&lab, &dir).await;
        // A page that the guest overwrote while it was saved belongs to nothing, and nobody reads it.
        assert!(said.contains(&format!("page {page} of {}", pack.display())), "{said}");
        flip(pack, at);
    }
    let parts = ["manifest", "state", "machine.json"].map(|part| dir.join("snapshots/s").join(part));
    for part in &parts {
        let length = fs::metadata(part).expect("a part").len();
        for at in [length / 2, length - 1] {
            flip(part, at);
            let said = refused(&lab, &dir).await;
            assert!(said.contains(&part.display().to_string()), "{said}");
            flip(part, at);
        }
        let whole = fs::read(part).expect("a part");
        fs::write(part, &whole[..whole.len() / 2]).expect("it can be cut");
        assert!(refused(&lab, &dir).await.contains(&part.display().to_string()));
        fs::write(part, whole).expect("it can be mended");
    }
    let whole = fs::read(pack).expect("a pack");
    fs::write(pack, &whole[..4096]).expect("it can be cut");
    let said = refused(&lab, &dir).await;
    assert!(said.contains("cut short") && said.contains(&pack.display().to_string()), "{said}");
    // A pack that is damaged is not trusted by the next snapshot either.
    let mut damaged = whole.clone();
    damaged.iter_mut().for_each(|byte| *byte ^= 0x55);
    fs::write(pack, &damaged).expect("it can be damaged");
    source.client().operate("pause").await.expect("it pauses");
    let second = report(&source.snapshot(&dir, Some("t")).await);
    assert!(second.pages_written > 0, "{second:#?}");
    let mut restored = Vm::restore(&lab, &host, "restored", &dir, &["--name", "t"]).await;
    restored.assert_lives().await;
    fs::write(pack, whole).expect("it can be mended");
    Vm::restore(&lab, &host, "mended", &dir, &["--name", "s"]).await.assert_lives().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_and_whatever_else_steers_the_vm_exclude_each_other() {
    let lab = Lab::new().await;
    let (a, b) = lab.two_hosts().await;
    let dir = lab.dir().join("snapshots");
    let mut source = Vm::launch(&lab, &a, "source", &heavy(&lab, 512 << 20)).await;
    let client = source.client().clone();
    let request = SnapshotRequest { to: dir.display().to_string(), name: None };
    let mut saving = tokio::spawn({
        let (client, request) = (client.clone(), request.clone());
        async move { client.snapshot(&request).await }
    });
    // To resume a VM that runs changes nothing.
    until("the snapshot has begun", limits::START, async || {
        assert!(!saving.is_finished(), "it ended before anybody saw it begin: {:?}", (&mut saving).await);
        client.operate("resume").await.err().map(|error| assert_eq!(code(error), "busy"))
    })
    .await;
    for operation in ["pause", "stop"] {
        assert_eq!(code(client.operate(operation).await.expect_err("a snapshot is being written")), "busy");
    }
    assert_eq!(code(client.snapshot(&request).await.expect_err("one at a time")), "busy");
    let mut destination = Vm::receive(&lab, &b, "destination", None).await;
    let ticket = destination.ticket().await;
    if !saving.is_finished() {
        let refused = Journey::whole(&source, &ticket, Terms::default()).await;
        // It may have ended in between; then the VM has moved.
        if let Err(error) = refused {
            assert_eq!(code(error), "busy");
        }
    }
    report_of(&saving.await.expect("asking does not panic").expect("it completes"));
    if source.process().is_alive() {
        let slow = Terms { bandwidth_bits: Some(1_000_000), ..Terms::default() };
        let journey = Journey::start(&source, &ticket, slow).await;
        source.wait_for_state(VmState::Migrating, Duration::from_secs(60)).await;
        assert_eq!(code(client.snapshot(&request).await.expect_err("it migrates")), "wrong_state");
        journey.cancel().await;
        assert!(journey.end().await.is_err());
        source.assert_lives().await;
    } else {
        destination.assert_lives().await;
    }
}

fn report_of(report: &SnapshotReport) {
    assert!(report.pages_written > 0, "{report:#?}");
}
