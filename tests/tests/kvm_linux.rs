//! A Linux guest under load moves to another vmm and back: its own view decides whether that went well.
//!
//! The guest writes files, sums memory, keeps files open and watches its clocks; as root there is also a TCP connection
//! from outside that stays open and counts. The test Linux must have been built: guest-images/linux/build.

use tern_tests::real::{Counter, Journey, Lab, LinuxGuest, LinuxVm, Net, Terms, Verdict, limits, until};

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
    let mut here = LinuxVm::launch(&lab, &a, "0", &guest, net.as_ref()).await;
    let mut connection = match &net {
        Some(net) => Some(net.connect(&lab).await),
        None => None,
    };
    let mut last = works(&mut here, None).await;
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
        last = works(&mut there, Some(&last)).await;
        here = there;
    }
    here.reboot().await;
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

/// Waits until every workload has done a round since `earlier`, all checks good; the last verdict.
async fn works(vm: &mut LinuxVm, earlier: Option<&Verdict>) -> Verdict {
    let first = vm.check().await;
    if let Some(earlier) = earlier {
        first.follows(earlier);
    }
    until("every workload goes on", limits::LINUX_CHECK, async || {
        let now = vm.check().await;
        now.follows(&first);
        now.all_went_on(&first).then_some(now)
    })
    .await
}
