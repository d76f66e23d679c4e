//! Snapshots of a Linux guest under load, through the commands that an operator types: what they cost, and what goes on after a restore. The
//! guest's own view decides: its clocks, sums, open files and timers, the kernel's warnings, and a TCP connection from outside.
//!
//! Each test begins with `vmm restore` of a guest that was booted once ([`Booted`]), from a copy of the directory that was written then.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use tern_tests::real::{Booted, Host, Journey, Lab, LinuxGuest, LinuxVm, Net, Site, Terms, Verdict, copy};
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
        for (number, page) in bytes.chunks(4096).enumerate() {
            let new = pages.insert(page.to_vec());
            assert!(new, "page {number} of {} is in another place as well", pack.display());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_snapshot_costs_what_is_new_and_is_restored_twice_from_a_copy() {
    let lab = Lab::new().await;
    let host = lab.host("a").await;
    let net = Net::if_root().await;
    let net = net.as_ref();
    let (dir, verdict) = ready(&lab, &host, net).await;
    let mut source = LinuxVm::restore(&lab, &host, "source", &dir, READY, net).await;
    let mut connection = match net {
        Some(net) => Some(net.connect(&lab).await),
        None => None,
    };
    let before = source.works(Some(&verdict)).await;
    save(&source, &dir, "second").await;
    assert_no_page_twice(&dir);
    source.works(Some(&before)).await;
    if let Some(connection) = &mut connection {
        connection.count().await;
    }
    source.vm.process().kill().await;

    let elsewhere = lab.fresh("elsewhere");
    copy(&dir, &elsewhere).await;
    fs::remove_dir_all(&dir).expect("the original goes");
    // One after the other: both have the address of the first, and each is to have a processor's time.
    for name in ["one", "other"] {
        let mut vm = LinuxVm::restore(&lab, &host, name, &elsewhere, "second", net).await;
        vm.works(Some(&before)).await;
        vm.reboot().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_outlives_its_guests_process_and_a_siblings_snapshot_costs_what_is_new() {
    let lab = Lab::new().await;
    let host = lab.host("a").await;
    let net = Net::if_root().await;
    let net = net.as_ref();
    let (dir, verdict) = ready(&lab, &host, net).await;
    let mut source = LinuxVm::restore(&lab, &host, "source", &dir, READY, net).await;
    let mut connection = match net {
        Some(net) => Some(net.connect(&lab).await),
        None => None,
    };
    let before = source.works(Some(&verdict)).await;
    if let Some(connection) = &mut connection {
        connection.count().await;
    }
    // Paused, so that the guest hears nothing that its copy would not know of.
    source.vm.client().operate("pause").await.expect("it pauses");
    save(&source, &dir, "connected").await;
    source.vm.client().operate("stop").await.expect("it stops");
    source.vm.assert_ends_well().await;
    let mut again = LinuxVm::restore(&lab, &host, "again", &dir, "connected", net).await;
    if let Some(connection) = &mut connection {
        connection.count().await;
    }
    again.works(Some(&before)).await;
    again.vm.process().kill().await;

    let mut sibling = LinuxVm::restore(&lab, &host, "sibling", &dir, READY, net).await;
    let worked = sibling.works(Some(&verdict)).await;
    save(&sibling, &dir, "sibling").await;
    assert_no_page_twice(&dir);
    sibling.vm.process().kill().await;
    LinuxVm::restore(&lab, &host, "of the sibling", &dir, "sibling", net).await.works(Some(&worked)).await;
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
    let peer = |site: &Site| site.peers[0].socket().to_owned();
    let mut source = LinuxVm::restore_at(&lab, &a, "source", &dir, READY, net, Some(&peer(&site_a))).await;
    let before = source.works(Some(&verdict)).await;
    let mut destination = LinuxVm::receive_at(&lab, &b, "destination", net, Some(&peer(&site_b))).await;
    let ticket = destination.vm.ticket().await;
    let moved = Journey::whole(&source.vm, &ticket, Terms::default()).await.expect("it moves");
    source.vm.assert_ends_well().await;
    destination.works(Some(&before)).await;
    let rungs = moved.rungs;
    eprintln!("{rungs:?}");
    let near = rungs.host.pages + rungs.site.pages;
    assert!(near > 2 * rungs.source.pages, "the site has what the snapshot had: {moved:#?}");
}
