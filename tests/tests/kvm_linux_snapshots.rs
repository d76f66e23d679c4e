//! Snapshots of a Linux guest under load, through the commands that an operator types: what they cost, and what goes on after a restore. The
//! guest's own view decides: its clocks, sums, open files and timers, the kernel's warnings, and a TCP connection from outside.
//!
//! Each test begins with `vmm restore` of a guest that was booted once ([`Booted`]), from a copy of the directory that was written then.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use page::PAGE_SIZE;
use tern_tests::real::{
    Booted, Counter, Host, Journey, Lab, Links, LinuxGuest, LinuxVm, Net, Site, Terms, Verdict, copy,
};
use vmm::snapshot::SnapshotReport;

/// The snapshot with which a test begins, in a directory of its own.
const READY: &str = "ready";

/// A snapshot directory of the test's own, and the verdict of the guest in it.
async fn ready(lab: &Lab, host: &Host, net: Option<&Net>) -> (PathBuf, Verdict) {
    let booted = Booted::of(lab, host, &LinuxGuest::default(), net).await;
    (booted.copy(lab).await, booted.verdict().clone())
}

/// Has `vm` write the snapshot `name`, and checks what the report says against what the directory has become.
async fn save(vm: &LinuxVm, dir: &Path, name: &str) -> SnapshotReport {
    let before = bytes_of(dir);
    let said = vm.vm.snapshot(dir, Some(name)).await;
    assert!(said.ok, "{said:#?}");
    let report: SnapshotReport = serde_json::from_str(said.stdout.trim()).expect("--json prints the report");
    eprintln!("{report:?}");
    let SnapshotReport { pages_total, pages_zero, pages_present, pages_written, bytes_written, .. } = report;
    assert_eq!(pages_total, pages_zero + pages_present + pages_written, "{report:#?}");
    assert_eq!(bytes_of(dir) - before, bytes_written, "the report says what was written: {report:#?}");
    assert!(pages_present > 2 * pages_written, "most of it was there already: {report:#?}");
    report
}

/// The lengths of all files below `dir`.
fn bytes_of(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).expect("a folder").map(|entry| entry.expect("an entry"));
    entries
        .map(|entry| {
            let about = entry.metadata().expect("it is there");
            if about.is_dir() { bytes_of(&entry.path()) } else { about.size() }
        })
        .sum()
}

fn packs(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir.join("packs")).expect("a snapshot directory has packs");
    let paths = entries.map(|entry| entry.expect("an entry").path());
    paths.filter(|path| path.extension().is_some_and(|extension| extension == "pages")).collect()
}

/// Panics if a page is in the packs of `dir` twice.
fn assert_no_page_twice(dir: &Path) {
    let mut pages = HashSet::new();
    for pack in packs(dir) {
        let bytes = fs::read(&pack).expect("a pack");
        for (number, page) in bytes.chunks(PAGE_SIZE).enumerate() {
            let new = pages.insert(page.to_vec());
            assert!(new, "page {number} of {} is in another place as well", pack.display());
        }
    }
}

/// A guest under load, restored from a snapshot directory of the test's own.
struct Scene {
    source: LinuxVm,
    /// From outside, if there can be one.
    connection: Option<Counter>,
    /// What the snapshot's guest said of itself when it was saved, and what `source` has said since.
    saved: Verdict,
    before: Verdict,
    dir: PathBuf,
    net: Option<Net>,
    host: Host,
    lab: Lab,
}

impl Scene {
    async fn begin() -> Self {
        let lab = Lab::new().await;
        let host = lab.host("a").await;
        let net = Net::if_root().await;
        let (dir, saved) = ready(&lab, &host, net.as_ref()).await;
        let mut source = LinuxVm::restore(&lab, &host, "source", &dir, READY, net.as_ref()).await;
        let connection = match &net {
            Some(net) => Some(net.connect(&lab).await),
            None => None,
        };
        let before = source.works(Some(&saved)).await;
        Self { source, connection, saved, before, dir, net, host, lab }
    }

    async fn restore(&self, name: &str, from: &Path, of: &str) -> LinuxVm {
        LinuxVm::restore(&self.lab, &self.host, name, from, of, self.net.as_ref()).await
    }

    async fn count(&mut self) {
        if let Some(connection) = &mut self.connection {
            connection.count().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_snapshot_costs_what_is_new_and_is_restored_twice_from_a_copy() {
    let mut scene = Scene::begin().await;
    save(&scene.source, &scene.dir, "second").await;
    assert_no_page_twice(&scene.dir);
    scene.source.works(Some(&scene.before)).await;
    scene.count().await;
    scene.source.vm.process().kill().await;

    let elsewhere = scene.lab.fresh("elsewhere");
    copy(&scene.dir, &elsewhere).await;
    fs::remove_dir_all(&scene.dir).expect("the original goes");
    // One after the other: both have the address of the first, and each is to have a processor's time.
    for name in ["one", "other"] {
        let mut vm = scene.restore(name, &elsewhere, "second").await;
        vm.works(Some(&scene.before)).await;
        vm.reboot().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_outlives_its_guests_process_and_a_siblings_snapshot_costs_what_is_new() {
    let mut scene = Scene::begin().await;
    scene.count().await;
    // Paused, so that the guest hears nothing that its copy would not know of.
    scene.source.vm.client().operate("pause").await.expect("it pauses");
    save(&scene.source, &scene.dir, "connected").await;
    scene.source.vm.client().operate("stop").await.expect("it stops");
    scene.source.vm.assert_ends_well().await;
    let mut again = scene.restore("again", &scene.dir, "connected").await;
    scene.count().await;
    again.works(Some(&scene.before)).await;
    again.vm.process().kill().await;

    let mut sibling = scene.restore("sibling", &scene.dir, READY).await;
    let worked = sibling.works(Some(&scene.saved)).await;
    save(&sibling, &scene.dir, "sibling").await;
    assert_no_page_twice(&scene.dir);
    sibling.vm.process().kill().await;
    scene.restore("of the sibling", &scene.dir, "sibling").await.works(Some(&worked)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_site_that_has_the_packs_gives_most_of_a_restored_guest() {
    let lab = Lab::new().await;
    let (a, b) = lab.two_hosts().await;
    let net = Net::if_root().await;
    let net = net.as_ref();
    let (dir, verdict) = ready(&lab, &a, net).await;
    let (mut site_a, mut site_b) = (Site::new(&lab, "a").await, Site::new(&lab, "b").await);
    site_a.join(&lab, None).await;
    // The destination's own peer has nothing; the packs are on another host of its site.
    site_b.join(&lab, None).await;
    let holder = site_b.join(&lab, None).await;
    for pack in packs(&dir) {
        holder.add(&pack).await;
    }
    site_b.ready(0).await;
    let [at_a, at_b] = [&site_a, &site_b].map(|site| Links { net, site: Some(site.peers[0].socket()) });
    let mut source = LinuxVm::restore(&lab, &a, "source", &dir, READY, at_a).await;
    let before = source.works(Some(&verdict)).await;
    let mut destination = LinuxVm::receive(&lab, &b, "destination", at_b).await;
    let ticket = destination.vm.ticket().await;
    let moved = Journey::whole(&source.vm, &ticket, Terms::default()).await.expect("it moves");
    source.vm.assert_ends_well().await;
    destination.works(Some(&before)).await;
    let rungs = moved.rungs;
    eprintln!("{rungs:?}");
    let near = rungs.host.pages + rungs.site.pages;
    assert!(near > 2 * rungs.source.pages, "the site has what the snapshot had: {moved:#?}");
}
