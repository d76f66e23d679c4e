//! Linux guests under load: they boot, and move to another vmm and back. Their own view decides whether that went well.
//!
//! The guest writes files, sums memory, keeps files open and watches its clocks; as root there is also a TCP connection
//! from outside that stays open and counts. Each test but the first two begins with `vmm restore` of a guest that was booted
//! once ([`Booted`]); those two have names that come first, so that the harness boots one and two CPUs side by side. The test
//! Linux must have been built: guest-images/linux/build.

use tern_tests::real::{Booted, Counter, Journey, Lab, LinuxGuest, LinuxVm, Net, Terms, limits};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn linux_boots_to_user_space() {
    boots(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn linux_boots_with_two_cpus_to_user_space() {
    boots(2).await;
}

/// The boot that the other tests share is this one, where it is new; where it is not, the guest is booted all the same.
async fn boots(cpus: u8) {
    let lab = Lab::new().await;
    let host = lab.host("a").await;
    let net = Net::if_root().await;
    let guest = LinuxGuest { cpus, ..LinuxGuest::default() };
    let booted = Booted::of(&lab, &host, &guest, net.as_ref()).await;
    let (mut vm, ready) = if booted.here() {
        (booted.restore(&lab, &host, "restored", net.as_ref()).await, booted.ready().to_owned())
    } else {
        LinuxVm::launch(&lab, &host, "booted", &guest, net.as_ref()).await
    };
    eprintln!("{ready}");
    let verdict = vm.works(None).await;
    if booted.here() {
        verdict.assert_follows(booted.verdict());
    }
    vm.reboot().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn linux_under_load_moves_there_and_back() {
    there_and_back(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn linux_with_two_cpus_under_load_moves_there_and_back() {
    there_and_back(2).await;
}

async fn there_and_back(cpus: u8) {
    let lab = Lab::new().await;
    let (a, b) = lab.two_hosts().await;
    let net = Net::if_root().await;
    let guest = LinuxGuest { cpus, ..LinuxGuest::default() };
    let booted = Booted::of(&lab, &a, &guest, net.as_ref()).await;
    let mut here = booted.restore(&lab, &a, "0", net.as_ref()).await;
    let mut connection = match &net {
        Some(net) => Some(net.connect(&lab).await),
        None => None,
    };
    let mut last = here.works(Some(booted.verdict())).await;
    for (journey, host) in [(1, &b), (2, &a)] {
        let mut there = LinuxVm::receive(&lab, host, &journey.to_string(), net.as_ref()).await;
        let ticket = there.vm.ticket().await;
        let moving = Journey::whole(&here.vm, &ticket, Terms::default());
        let report = match &mut connection {
            Some(connection) => counted_during(connection, moving).await,
            None => moving.await,
        };
        let report = report.unwrap_or_else(|error| panic!("migration {journey}: {error:?}"));
        assert!(report.verified, "migration {journey}: {report:#?}");
        here.vm.assert_ends_well().await;
        if let Some(connection) = &mut connection {
            connection.count().await;
        }
        last = there.works(Some(&last)).await;
        here = there;
    }
    here.reboot().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn linux_with_a_database_a_compressor_and_a_web_server_moves() {
    let lab = Lab::new().await;
    let (a, b) = lab.two_hosts().await;
    let net = Net::if_root().await;
    let booted = Booted::of(&lab, &a, &LinuxGuest::default(), net.as_ref()).await;
    let mut source = booted.restore(&lab, &a, "source", net.as_ref()).await;
    source.begin(&["sqlite", "gzip", "http"]).await;
    let before = source.works(Some(booted.verdict())).await;
    let page = match &net {
        Some(net) => Some(net.fetch("/page").await),
        None => None,
    };
    let mut destination = LinuxVm::receive(&lab, &b, "destination", net.as_ref()).await;
    let ticket = destination.vm.ticket().await;
    Journey::whole(&source.vm, &ticket, Terms::default()).await.expect("it moves");
    source.vm.assert_ends_well().await;
    destination.works(Some(&before)).await;
    if let Some(net) = &net {
        assert_eq!(Some(net.fetch("/page").await), page, "the web server's page, to a client outside");
    }
    destination.reboot().await;
}

/// Counts over TCP for as long as `moving` takes.
async fn counted_during<T>(connection: &mut Counter, moving: impl Future<Output = T>) -> T {
    tokio::pin!(moving);
    loop {
        // Only whole exchanges: a count that is cut off would be answered to the next one.
        tokio::select! {
            biased;
            outcome = &mut moving => return outcome,
            () = tokio::time::sleep(limits::BETWEEN_COUNTS) => connection.count().await,
        }
    }
}
