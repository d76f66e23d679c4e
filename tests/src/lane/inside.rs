//! The stories, as they are played in the first level.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::time::Instant;

use futures::FutureExt as _;
use guest_images::pagestorm::options::Idle;
use tokio::time::timeout;
use vmm::control::api::{MigrateRequest, SnapshotRequest};
use vmm::migrate::report::Report;

use super::debian::{self, Debian};
use super::limits;
use super::verdict::{Part, Step, Verdict};
use crate::real::{Guest, Lab, TIMED_OUT, Vm, binaries, timed_out};

/// Plays the stories of `part`, and prints a verdict for each step. A story whose step fails ends there; the next begins.
/// # Panics
/// If this program has no file, which no verdict could be printed about.
pub async fn run(part: Part) {
    let here = std::env::current_exe().expect("the program's own file");
    binaries::stand_in(here.parent().expect("a file stands in a folder"));
    let alive = tokio::spawn(async {
        let mut tick = tokio::time::interval(limits::ALIVE_EVERY);
        loop {
            tick.tick().await;
            println!("lane: alive");
        }
    });
    let Some(lab) = step(Step::Kvm, async { (Lab::new().await, "it can be opened".to_owned()) }).await else {
        return;
    };
    let stories = match part {
        Part::Boots => vec![pagestorm(&lab).await, generic(&lab).await],
        Part::Moves => vec![cloud(&lab).await],
    };
    if stories.contains(&None) {
        lab.print_logs();
    }
    alive.abort();
}

/// Does `work` and prints the verdict; none if it failed.
async fn step<T>(step: Step, work: impl Future<Output = (T, String)>) -> Option<T> {
    let began = Instant::now();
    let done = AssertUnwindSafe(work).catch_unwind().await;
    let seconds = began.elapsed().as_secs_f64();
    let (kept, ok, said) = match done {
        Ok((kept, said)) => (Some(kept), true, said),
        Err(panic) => (None, false, message(&*panic)),
    };
    let timed_out = !ok && said.starts_with(TIMED_OUT);
    println!("{}", Verdict { step, ok, timed_out, seconds, said }.line());
    kept
}

/// What a test of the harness panicked with.
fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked without a word").to_owned()
}

/// A guest without an operating system boots, and moves while it writes.
async fn pagestorm(lab: &Lab) -> Option<()> {
    let (a, b) = lab.two_hosts().await;
    let mut source = step(Step::PagestormBoots, async {
        let mut vm = Vm::launch(lab, &a, "pagestorm", &quiet_pagestorm()).await;
        let check = vm.self_check().await;
        (vm, check.to_string())
    })
    .await?;
    step(Step::PagestormMoves, async {
        let mut destination = Vm::receive(lab, &b, "destination", None).await;
        let report = moves(&source, &destination).await;
        source.assert_ends_well().await;
        let check = destination.assert_lives().await;
        ((), format!("{report}; {check}"))
    })
    .await
}

/// A stock kernel that its devices are found by through ACPI alone.
async fn generic(lab: &Lab) -> Option<()> {
    let host = lab.host("generic").await;
    let disk = debian::make_disk(lab, "generic.img");
    let mut guest = step(Step::GenericBoots, async {
        let (kernel, initramfs, workloads) = ("generic", "generic.cpio", "files,clock");
        let memory_mib = limits::BIG_GUEST_MIB;
        let guest = Debian { kernel, initramfs, memory_mib, workloads, disk: &disk };
        let mut vm = guest.launch(lab, &host, "generic").await;
        let random = debian::random_source(&mut vm).await;
        assert!(random.starts_with("virtio_rng"), "its random numbers come from {random}");
        debian::assert_quiet_log(&mut vm).await;
        let found_mib = debian::memory_mib(&mut vm).await;
        assert!((limits::BIG_GUEST_FOUND_MIB..memory_mib).contains(&found_mib), "it finds {found_mib} MiB");
        let check = debian::check(&mut vm).await;
        (vm, format!("{found_mib} MiB, {random} and a mounted disk, {check}"))
    })
    .await?;
    step(Step::GenericRestarts, async { ((), debian::end_by("reboot -f", &mut guest).await) }).await
}

/// A stock kernel as its package has it moves while it works, and is saved and restored.
async fn cloud(lab: &Lab) -> Option<()> {
    let (a, b) = (lab.host("cloud-a").await, lab.host("cloud-b").await);
    a.let_in(&b);
    b.let_in(&a);
    let disk = debian::make_disk(lab, "cloud.img");
    let (mut source, before) = step(Step::CloudBoots, async {
        let (kernel, initramfs, workloads) = ("cloud", "cloud.cpio", "files,checksum,journal,clock");
        let memory_mib = limits::GUEST_MIB;
        let guest = Debian { kernel, initramfs, memory_mib, workloads, disk: &disk };
        let mut vm = guest.launch(lab, &a, "cloud").await;
        let check = debian::check(&mut vm).await;
        ((vm, check.clone()), check.to_string())
    })
    .await?;
    let (mut moved, before) = step(Step::CloudMoves, async {
        let name = "cloud-there";
        let mut destination = Vm::receive_with(lab, &b, name, None, &debian::disk_option(&disk)).await;
        let report = moves(&source, &destination).await;
        source.assert_ends_well().await;
        let after = debian::check(&mut destination).await;
        after.assert_goes_on_from(&before);
        let said = format!("{report}; {after}");
        ((destination, after), said)
    })
    .await?;
    let mut restored = step(Step::CloudRestored, async {
        let snapshot = saved(lab, &mut moved).await;
        let mut restored = debian::restore(lab, &b, "cloud-again", &snapshot, &disk).await;
        debian::assert_quiet_log(&mut restored).await;
        let after = debian::check(&mut restored).await;
        after.assert_goes_on_from(&before);
        (restored, after.to_string())
    })
    .await?;
    step(Step::CloudPowersOff, async { ((), debian::end_by("poweroff -f", &mut restored).await) }).await
}

/// Saves `vm` and ends it; where to. It stands still from before the snapshot on: its disk has no snapshots.
async fn saved(lab: &Lab, vm: &mut Vm) -> PathBuf {
    let to = lab.dir().join("snapshots");
    let directory = to.to_str().expect("the lab's paths are text").to_owned();
    vm.client().operate("pause").await.expect("a running VM can be paused");
    let request = SnapshotRequest { to: directory, name: None };
    let report = timeout(limits::SNAPSHOT, vm.client().snapshot(&request)).await;
    let report = report.unwrap_or_else(|_| timed_out("the snapshot did not end"));
    report.unwrap_or_else(|error| panic!("there is no snapshot: {error}"));
    vm.client().operate("stop").await.expect("a paused VM can be stopped");
    vm.assert_ends_well().await;
    to
}

/// Has `source`'s VM move to `destination`, and says what that took.
async fn moves(source: &Vm, destination: &Vm) -> String {
    let to = destination.ticket().await;
    let request = MigrateRequest::to(to);
    let report = timeout(limits::MIGRATION, source.client().migrate(&request)).await;
    let report = report.unwrap_or_else(|_| timed_out("the migration did not end"));
    let report = report.unwrap_or_else(|error| panic!("it still runs at the source: {error}"));
    assert!(report.verified, "{report:#?}");
    let Report { rungs, downtime_ms, rounds, .. } = &report;
    format!("{rounds} rounds, {} pages crossed, downtime {downtime_ms:.0} ms", rungs.source.pages)
}

/// It writes as much as a CPU emulated twice can send on, and never halts: under TCG a halt can last for ever (see the module above).
fn quiet_pagestorm() -> Guest {
    let mut guest = Guest::default();
    guest.options.rate_pps = 20;
    guest.options.ws_bytes = 2 << 20;
    guest.options.idle = Idle::Spin;
    guest
}
