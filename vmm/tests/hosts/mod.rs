//! Two hosts in one process, a guest, and what a test asks of them.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use guest_images::pagestorm::report::Report as Check;
use tempfile::TempDir;
use tokio::time::{Instant, sleep, timeout};
use vmm::config::{BootProtocol, CpuChoice, DeviceOptions, Serial, VmConfig};
use vmm::machine::{Machine, RunState};
use vmm::migrate::{HostIdentity, Incoming, MigrateOptions, Mode, Outgoing};

const MEMORY_BYTES: u64 = 64 << 20;

pub(crate) struct Host {
    folder: TempDir,
    pub(crate) identity: Arc<HostIdentity>,
}

impl Host {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let identity = HostIdentity::load_or_create(&path("host.key"), &path("authorized_keys")).unwrap();
        Self { folder, identity: Arc::new(identity) }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn trusts(&self, other: &Self) {
        std::fs::write(self.path("authorized_keys"), other.identity.line()).unwrap();
    }

    pub(crate) fn launch(&self, cmdline: &str) -> Arc<Machine> {
        let kernel = self.path("pagestorm");
        guest_images::write_pagestorm(&kernel).unwrap();
        let machine = Machine::launch(&VmConfig {
            name: "storm".to_owned(),
            kernel,
            boot: BootProtocol::Auto,
            acpi: true,
            initramfs: None,
            cmdline: cmdline.to_owned(),
            memory_bytes: MEMORY_BYTES,
            cpus: 1,
            loads: Vec::new(),
            serial: Serial::File(self.path("console")),
            cpu: CpuChoice::Host,
            devices: DeviceOptions::default(),
        });
        let machine = machine.unwrap_or_else(|e| panic!("these tests need a working /dev/kvm: {e}"));
        machine.resume().unwrap();
        machine
    }

    pub(crate) async fn listen(&self) -> Incoming {
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        Incoming::listen(
            any,
            Arc::clone(&self.identity),
            None,
            Serial::File(self.path("console")),
            DeviceOptions::default(),
        )
        .await
        .unwrap()
    }

    pub(crate) fn migrate(&self, machine: &Arc<Machine>, to: &str) -> Outgoing {
        let options = MigrateOptions {
            to: to.to_owned(),
            downtime_ms: 300,
            mode: Mode::Hybrid,
            bandwidth_bits: None,
            delta_cache_bytes: None,
            auto_converge: false,
            spill: None,
            resume_for_ms: 0,
        };
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

    pub(crate) async fn ready(&self) {
        self.line("ready", |line| line.contains("pagestorm: ready").then_some(())).await;
    }

    /// Has the guest check every page that it wrote, and waits for its verdict.
    pub(crate) async fn check(&self, machine: &Machine, number: u64) -> Check {
        while machine.serial_input(b"c") == 0 {
            assert_eq!(*machine.watch().borrow(), RunState::Running);
            sleep(Duration::from_millis(5)).await;
        }
        self.line("check", |line| Check::parse(line).filter(|report| report.check >= number)).await
    }
}

pub(crate) fn read(path: &Path) -> String {
    std::fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

pub(crate) async fn in_time<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(120), future).await.unwrap_or_else(|_| panic!("{what} took too long"))
}

/// Two hosts of which the second lets the first in.
pub(crate) fn hosts() -> (Host, Host) {
    let (a, b) = (Host::new(), Host::new());
    b.trusts(&a);
    a.trusts(&b);
    (a, b)
}
