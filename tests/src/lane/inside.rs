//! The stories, as they are played in the first level.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::time::Instant;

use futures::FutureExt as _;

use super::debian::{self, Debian};
use super::limits;
use super::verdict::{Step, Verdict};
use crate::real::{Guest, Journey, Lab, Terms, Vm, binaries};

/// Plays every story, and prints a verdict for each step. A story whose step fails ends there; the next begins.
/// # Panics
/// If this program has no file, which no verdict could be printed about.
pub async fn run() {
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
    let stories = [pagestorm(&lab).await, cloud(&lab).await, generic(&lab).await];
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
    println!("{}", Verdict { step, ok, seconds, said }.line());
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
        let to = destination.ticket().await;
        let report = Journey::whole(&source, &to, Terms::default()).await;
        let report = report.unwrap_or_else(|error| panic!("it still runs at the source: {error}"));
        assert!(report.verified, "{report:#?}");
        source.assert_ends_well().await;
        let check = destination.assert_lives().await;
        (
            (),
            format!(
                "{} pages crossed, downtime {:.0} ms; {check}",
                report.rungs.source.pages, report.downtime_ms
            ),
        )
    })
    .await
}

/// A stock kernel as its package has it, on two virtual CPUs.
async fn cloud(lab: &Lab) -> Option<()> {
    let host = lab.host("cloud").await;
    let mut guest = step(Step::CloudBoots, async {
        let guest =
            Debian { kernel: "cloud.bzimage", initramfs: "cloud.cpio", cpus: 2, workloads: "checksum,clock" };
        let mut vm = guest.launch(lab, &host, "cloud").await;
        let check = debian::check(&mut vm).await;
        (vm, check.to_string())
    })
    .await?;
    step(Step::CloudPowersOff, async { ((), debian::power_off(&mut guest).await) }).await
}

/// A stock kernel moves while it works.
async fn generic(lab: &Lab) -> Option<()> {
    let (a, b) = (lab.host("generic-a").await, lab.host("generic-b").await);
    a.let_in(&b);
    b.let_in(&a);
    let mut source = step(Step::GenericBoots, async {
        let workloads = "files,checksum,journal,clock";
        let guest = Debian { kernel: "generic", initramfs: "generic.cpio", cpus: 1, workloads };
        let mut vm = guest.launch(lab, &a, "generic").await;
        let check = debian::check(&mut vm).await;
        ((vm, check.clone()), check.to_string())
    })
    .await?;
    let mut destination = step(Step::GenericMoves, async {
        let (source, before) = &mut source;
        let mut destination = Vm::receive(lab, &b, "generic-there", None).await;
        let to = destination.ticket().await;
        let report = Journey::whole(source, &to, Terms::default()).await;
        let report = report.unwrap_or_else(|error| panic!("it still runs at the source: {error}"));
        assert!(report.verified, "{report:#?}");
        source.assert_ends_well().await;
        let after = debian::check(&mut destination).await;
        after.assert_goes_on_from(before);
        (
            destination,
            format!(
                "{} pages crossed, downtime {:.0} ms; {after}",
                report.rungs.source.pages, report.downtime_ms
            ),
        )
    })
    .await?;
    step(Step::GenericPowersOff, async { ((), debian::power_off(&mut destination).await) }).await
}

/// It writes as much as a CPU emulated twice can send on.
fn quiet_pagestorm() -> Guest {
    let mut guest = Guest::default();
    guest.options.rate_pps = 100;
    guest.options.ws_bytes = 4 << 20;
    guest
}
