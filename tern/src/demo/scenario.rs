//! The demo's story, in order: contents, keys, peers, VMs, the link, the move, the guest's word, the end.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use vmm::control::api::{EventKind, MigrateRequest};
use vmm::control::client::Client;
use vmm::migrate::HostIdentity;
use vmm::migrate::report::Report as MigrationReport;

use crate::demo::error::DemoError;
use crate::demo::guest::Guests;
use crate::demo::link::LinkConfig;
use crate::demo::options::Options;
use crate::demo::process::{Args, Stage};
use crate::demo::progress::Display;
use crate::demo::report::{Bytes, Findings, Report};
use crate::demo::shaper::{Shaper, WanCounts};
use crate::demo::sites::{Site, SiteKeys};
use crate::demo::vm::{Host, Vm};
use crate::limits;

/// Plays the demo with files in `dir` and logs in `logs`. Every process that it starts is dead when it returns or is dropped.
///
/// # Errors
/// The first thing that went wrong.
pub(crate) async fn play(options: &Options, dir: &Path, logs: &Path) -> Result<Report, DemoError> {
    let mut display = Display::new();
    display.step("making guest memory and keys");
    let guests = {
        let (options, dir) = (options.clone(), dir.to_owned());
        tokio::task::spawn_blocking(move || Guests::prepare(&options, &dir)).await??
    };
    let bound = {
        let guests = guests.clone();
        tokio::task::spawn_blocking(move || guests.bound())
    };
    let stage = Stage::new(logs)?;
    let mut world = World::build(&stage, dir, &guests, &mut display).await?;
    let bound = bound.await??;
    let (memory_bytes, rate, rtt) = (guests.vm.memory_bytes(), options.rate, options.rtt);
    let mebibytes = memory_bytes >> 20;
    display.step(&format!(
        "moving a VM of {mebibytes} MiB from site A to site B: {} each way, {rtt:?} round trip",
        Rate(rate)
    ));
    let (migration, shaper, before) = world.migrate(options, &mut display).await?;
    display.step("asking the guest whether all is there");
    let source_ended_well = world.source.finish().await?;
    let arrived = world
        .destination
        .wait_for("the guest's heart beats at the destination", limits::START, |status| {
            status.incoming.and_then(|incoming| incoming.guest_downtime_ms)
        })
        .await?;
    let self_check = world.destination.self_check().await?;
    let wan = shaper.counts().since(&before);
    let ended_well = world.end().await? && source_ended_well;
    let bytes = Bytes(wan.bytes());
    display.step(&format!("done: {bytes} crossed the WAN"));
    let findings =
        Findings { migration, wan, guest_downtime_ms: arrived, self_check, bound, memory_bytes, ended_well };
    Ok(Report::new(options, findings))
}

/// All that runs.
#[derive(Debug)]
struct World {
    site_a: Site<1>,
    site_b: Site<3>,
    source: Vm,
    sibling: Vm,
    destination: Vm,
    ticket: String,
}

impl World {
    async fn build(
        stage: &Stage,
        dir: &Path,
        guests: &Guests,
        display: &mut Display,
    ) -> Result<Self, DemoError> {
        let [keys_a, keys_b] = make_site_keys(stage, dir).await?;
        let hosts = HostKeys::make(dir).await?;
        display.step("starting site A (host a1) and site B (hosts b1, b2, b3)");
        let mut site_a = Site::start(stage, dir, &keys_a, ["a1"]).await?;
        let mut site_b = Site::start(stage, dir, &keys_b, ["b1", "b2", "b3"]).await?;
        let [a1] = &mut site_a.peers;
        let [b1, b2, b3] = &mut site_b.peers;
        for file in std::iter::once(&guests.kernel).chain(&guests.destination_files) {
            b1.add_file(file).await?;
        }
        for file in &guests.site_files {
            b3.add_file(file).await?;
        }
        let a1_host = hosts.host(dir, 0, a1.socket());
        let source = Vm::launch(stage, "a1-vm", a1_host, &guests.vm, &guests.kernel).await?;
        a1.expect_memory();
        let b2_host = hosts.host(dir, 2, b2.socket());
        let sibling = Vm::launch(stage, "b2-sibling", b2_host, &guests.sibling, &guests.kernel).await?;
        b2.expect_memory();
        let b1_host = hosts.host(dir, 1, b1.socket());
        let (destination, ticket) = Vm::receive(stage, "b1-receive", b1_host).await?;
        display.step("both sites index what they hold");
        site_a.wait_until_ready().await?;
        site_b.wait_until_ready().await?;
        Ok(Self { site_a, site_b, source, sibling, destination, ticket })
    }

    /// Moves the VM over a link as `options` want it; gives the source's report, and the link with what it had counted before.
    async fn migrate(
        &mut self,
        options: &Options,
        display: &mut Display,
    ) -> Result<(MigrationReport, Shaper, WanCounts), DemoError> {
        let unclear =
            || DemoError::Answer(format!("`{}` is no ticket of the form ADDR:PORT#KEY", self.ticket));
        let (address, key) = self.ticket.split_once('#').ok_or_else(unclear)?;
        let address: SocketAddr = address.parse().map_err(|_| unclear())?;
        let link = LinkConfig {
            loss_ppm: options.loss,
            seed: options.seed,
            ..LinkConfig::half_of(options.rate, options.rtt)
        };
        let shaper = Shaper::start(address, link).map_err(DemoError::Link)?;
        let request = MigrateRequest {
            downtime_ms: options.downtime_ms,
            mode: options.mode,
            delta_cache_bytes: options.delta_cache,
            ..MigrateRequest::to(format!("{}#{key}", shaper.address()))
        };
        let client = self.source.client().clone();
        if options.dry_run {
            let said = client.dry_run(&request).await;
            let said =
                said.map_err(|source| DemoError::Vmm { what: "try to move its VM", vm: "a1-vm", source })?;
            display.step(&format!(
                "a dry run says: {} on the WAN, give or take {}; {:.1} s; {} ms of downtime",
                Bytes(said.wan_bytes),
                Bytes(said.wan_bytes_error),
                Duration::from_millis(said.total_ms).as_secs_f64(),
                said.downtime_ms
            ));
        }
        let before = shaper.counts();
        let migration = async { client.migrate(&request).await };
        let report = tokio::select! {
            report = migration => report,
            // Never the first to end: after the last event it waits.
            never = follow(&client, &shaper, display) => match never {},
        };
        display.end_line();
        let report = report.map_err(|source| DemoError::Vmm { what: "move its VM", vm: "a1-vm", source })?;
        Ok((report, shaper, before))
    }

    /// Ends all that still runs; says whether all ended well.
    async fn end(&mut self) -> Result<bool, DemoError> {
        let mut well = self.destination.stop().await?;
        well &= self.sibling.stop().await?;
        well &= self.site_b.stop().await?;
        well &= self.site_a.stop().await?;
        Ok(well)
    }
}

/// Shows the source's progress for as long as it is polled.
async fn follow(client: &Client, shaper: &Shaper, display: &mut Display) -> std::convert::Infallible {
    let shown = async {
        let mut events = client.events().await?;
        while let Some(event) = events.next().await? {
            match event.kind {
                EventKind::Progress { progress } => display.progress(&progress, shaper.counts()),
                EventKind::State { .. }
                | EventKind::Incoming { .. }
                | EventKind::Report { .. }
                | EventKind::MigrationFailed { .. }
                | EventKind::Lagged { .. } => {}
            }
        }
        Ok::<_, vmm::control::client::ClientError>(())
    };
    if let Err(error) = shown.await {
        tracing::warn!(error = &error as &dyn std::error::Error, "progress cannot be followed any further");
    }
    std::future::pending().await
}

/// A key for each site, and one for the dedup domain that both are in.
async fn make_site_keys(stage: &Stage, dir: &Path) -> Result<[SiteKeys; 2], DemoError> {
    let path = |name: &str| dir.join(name);
    for name in ["a-site.key", "b-site.key", "domain.key"] {
        let args = Args::new(&["dht", "keygen"]).with("--out", path(name));
        let mut keygen = stage.spawn(&format!("keygen-{name}"), &args)?;
        if !keygen.finish().await? {
            return Err(DemoError::Answer(format!("the key {name} could not be made: see its log")));
        }
    }
    let keys = |site| SiteKeys { site: path(site), domain: path("domain.key") };
    Ok([keys("a-site.key"), keys("b-site.key")])
}

/// Every host's key, and the list of all of them.
#[derive(Debug)]
struct HostKeys {
    identities: [PathBuf; 3],
    authorized: PathBuf,
}

impl HostKeys {
    async fn make(dir: &Path) -> Result<Self, DemoError> {
        let identities = ["a1", "b1", "b2"].map(|host| dir.join(host).with_extension("key"));
        let authorized = dir.join("authorized_keys");
        let keys = Self { identities, authorized };
        tokio::task::spawn_blocking(move || {
            let mut lines = String::new();
            for identity in &keys.identities {
                lines += &HostIdentity::load_or_create(identity, &keys.authorized)?.line();
                lines.push('\n');
            }
            std::fs::write(&keys.authorized, lines).map_err(DemoError::file("write", &keys.authorized))?;
            Ok(keys)
        })
        .await?
    }

    fn host<'a>(&'a self, dir: &'a Path, at: usize, site: &'a Path) -> Host<'a> {
        Host { dir, identity: &self.identities[at], authorized_keys: &self.authorized, site }
    }
}

/// Bits a second for people.
struct Rate(u64);

impl std::fmt::Display for Rate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        #[expect(clippy::cast_precision_loss, reason = "for people")]
        let megabits = self.0 as f64 / 1e6;
        write!(f, "{megabits} Mbit/s")
    }
}
