//! Migrations of a real guest on the real /dev/kvm, both ends in this process. Where there is no KVM, these tests fail and say so.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail the test")]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use guest_images::pagestorm::report::Report as Check;
use tempfile::TempDir;
use tokio::time::{Instant, sleep, timeout};
use vmm::config::{CpuTemplate, Serial, VmConfig};
use vmm::machine::{Machine, RunState, StopReason};
use vmm::migrate::report::{IncomingPhase, Outcome, Phase};
use vmm::migrate::{HostIdentity, Incoming, MigrateError, MigrateOptions, Outgoing};

const MEMORY_BYTES: u64 = 64 << 20;

struct Host {
    folder: TempDir,
    identity: Arc<HostIdentity>,
}

impl Host {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let identity = HostIdentity::load_or_create(&path("host.key"), &path("authorized_keys")).unwrap();
        Self { folder, identity: Arc::new(identity) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn trusts(&self, other: &Self) {
        std::fs::write(self.path("authorized_keys"), other.identity.line()).unwrap();
    }

    fn launch(&self, cmdline: &str) -> Arc<Machine> {
        let kernel = self.path("pagestorm");
        guest_images::write_pagestorm(&kernel).unwrap();
        let machine = Machine::launch(&VmConfig {
            name: "storm".to_owned(),
            kernel,
            initramfs: None,
            cmdline: cmdline.to_owned(),
            memory_bytes: MEMORY_BYTES,
            cpus: 1,
            loads: Vec::new(),
            serial: Serial::File(self.path("console")),
            cpu_template: CpuTemplate::Host,
        });
        let machine = machine.unwrap_or_else(|e| panic!("these tests need a working /dev/kvm: {e}"));
        machine.resume().unwrap();
        machine
    }

    async fn listen(&self) -> Incoming {
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        Incoming::listen(any, Arc::clone(&self.identity), None, Serial::File(self.path("console")))
            .await
            .unwrap()
    }

    fn migrate(&self, machine: &Arc<Machine>, to: &str) -> Outgoing {
        let options = MigrateOptions { to: to.to_owned(), downtime_ms: 300, bandwidth_bits: None };
        Outgoing::start(Arc::clone(machine), None, Arc::clone(&self.identity), options)
    }

    /// Waits for a line of the console that `accepts` takes.
    async fn line<T>(&self, what: &str, accepts: impl Fn(&str) -> Option<T>) -> T {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let text = read(&self.path("console"));
            if let Some(found) = text.lines().find_map(&accepts) {
                return found;
            }
            assert!(Instant::now() < deadline, "no {what} in time; the console says:\n{text}");
            sleep(Duration::from_millis(20)).await;
        }
    }

    async fn ready(&self) {
        self.line("ready", |line| line.contains("pagestorm: ready").then_some(())).await;
    }

    /// Has the guest check every page that it wrote, and waits for its verdict.
    async fn check(&self, machine: &Machine, number: u64) -> Check {
        while machine.serial_input(b"c") == 0 {
            assert_eq!(*machine.watch().borrow(), RunState::Running);
            sleep(Duration::from_millis(5)).await;
        }
        self.line("check", |line| Check::parse(line).filter(|report| report.check >= number)).await
    }
}

fn read(path: &Path) -> String {
    std::fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

async fn in_time<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(120), future).await.unwrap_or_else(|_| panic!("{what} took too long"))
}

/// Two hosts of which the second lets the first in.
fn hosts() -> (Host, Host) {
    let (a, b) = (Host::new(), Host::new());
    b.trusts(&a);
    a.trusts(&b);
    (a, b)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_guest_moves_and_has_lost_nothing() {
    let (a, b) = hosts();
    let machine = a.launch("rate=2000 ws=16M prefill=1 content=text");
    a.ready().await;
    let incoming = b.listen().await;
    let outgoing = a.migrate(&machine, &incoming.ticket());
    let report = in_time("the migration", outgoing.finished()).await.unwrap();
    let arrived = in_time("the arrival", incoming.machine()).await.unwrap();
    assert_eq!(report.outcome, Outcome::Completed);
    assert!(report.verified && report.rounds >= 2, "{report:?}");
    assert_eq!(*machine.watch().borrow(), RunState::Stopped(StopReason::Migrated));
    assert_eq!(arrived.ownership().vm, machine.ownership().vm);
    assert_eq!(arrived.ownership().epoch, machine.ownership().epoch.next());
    let check = b.check(&arrived, 1).await;
    assert_eq!(check.failures, 0, "{check:?}\n{}", read(&b.path("console")));
    assert!(check.pages_checked > 3000, "{check:?}");
    let mut status = incoming.status();
    let status =
        in_time("a heartbeat", status.wait_for(|s| s.guest_downtime_ms.is_some())).await.unwrap().clone();
    assert_eq!(status.phase, IncomingPhase::Running);
    println!("{report:#?}\n{status:#?}\n{check:?}");
    assert!(report.wan_tx_bytes < report.plain_bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_moves_there_and_back_again_and_again() {
    let (a, b) = hosts();
    let mut machine = a.launch("rate=500 ws=8M prefill=1 content=rewrite");
    a.ready().await;
    for round in 0..6 {
        let (here, there) = if round % 2 == 0 { (&a, &b) } else { (&b, &a) };
        let incoming = there.listen().await;
        let outgoing = here.migrate(&machine, &incoming.ticket());
        let report = in_time("the migration", outgoing.finished()).await.unwrap();
        assert!(report.verified);
        machine = in_time("the arrival", incoming.machine()).await.unwrap();
        assert_eq!(machine.ownership().epoch.0, round + 1);
        std::fs::write(there.path("console"), b"").unwrap();
        let check = there.check(&machine, round + 1).await;
        assert_eq!(check.failures, 0, "round {round}: {check:?}\n{}", read(&there.path("console")));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_or_refused_migration_leaves_the_guest_running() {
    let (a, b) = hosts();
    let stranger = Host::new();
    let machine = a.launch("rate=1000 ws=16M prefill=1");
    a.ready().await;
    let incoming = b.listen().await;
    // Slow enough to be cancelled in the middle.
    let options = MigrateOptions { to: incoming.ticket(), downtime_ms: 1, bandwidth_bits: Some(8_000_000) };
    let outgoing = Outgoing::start(Arc::clone(&machine), None, Arc::clone(&a.identity), options);
    let mut progress = outgoing.progress();
    in_time("names", progress.wait_for(|p| p.phase == Phase::Precopy && p.wan_tx_bytes > 100_000))
        .await
        .unwrap();
    outgoing.cancel();
    let error = in_time("the cancellation", outgoing.finished()).await.unwrap_err();
    assert!(matches!(error, MigrateError::Cancelled), "{error}");
    assert!(outgoing.resolve(true).is_err(), "nothing is in doubt");
    assert_eq!(*machine.watch().borrow(), RunState::Running);
    // A host that does not know this one.
    let elsewhere = stranger.listen().await;
    let error =
        in_time("the refusal", a.migrate(&machine, &elsewhere.ticket()).finished()).await.unwrap_err();
    assert!(matches!(error, MigrateError::RefusedByPeer { .. }), "{error}");
    assert!(elsewhere.status().borrow().last_failure.as_ref().unwrap().contains(&a.identity.fingerprint()));
    // The first endpoint still takes it.
    let mut status = incoming.status();
    in_time("listening again", status.wait_for(|s| s.phase == IncomingPhase::Listening)).await.unwrap();
    in_time("the migration", a.migrate(&machine, &incoming.ticket()).finished()).await.unwrap();
    let arrived = in_time("the arrival", incoming.machine()).await.unwrap();
    let check = b.check(&arrived, 1).await;
    assert_eq!(check.failures, 0, "{check:?}");
}
