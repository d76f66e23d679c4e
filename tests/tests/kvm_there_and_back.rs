//! Migrations there and back: twenty in a row of a guest that keeps writing lose nothing, and what a VM leaves behind is found when it comes back.

use std::time::Duration;

use tern_tests::real::{Guest, Journey, Lab, Load, Site, Terms, Vm, Wan};

const JOURNEYS: u32 = 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_migrations_there_and_back_lose_nothing() {
    let lab = Lab::new().await;
    let (a, b) = lab.two_hosts().await;
    let (mut site_a, mut site_b) = (Site::new(&lab, "a").await, Site::new(&lab, "b").await);
    site_a.join(&lab, None).await;
    site_b.join(&lab, None).await;
    let sites = [site_a.peers[0].socket(), site_b.peers[0].socket()];

    let guest = Guest { site: Some(sites[0].into()), ..Guest::default() };
    let mut here = Vm::launch(&lab, &a, "0", &guest).await;
    let mut last = here.self_check().await;
    for journey in 1..=JOURNEYS {
        let (host, site) = if journey % 2 == 1 { (&b, sites[1]) } else { (&a, sites[0]) };
        let mut there = Vm::receive(&lab, host, &journey.to_string(), Some(site)).await;
        let report = Journey::whole(&here, &there.ticket().await, Terms::default())
            .await
            .unwrap_or_else(|error| panic!("migration {journey}: {error:?}"));
        assert!(report.verified, "migration {journey}: {report:#?}");
        here.assert_ends_well().await;

        let check = there.assert_lives().await;
        // The guest's own counts: a state older than the last one seen would show.
        assert!(
            check.pages_written > last.pages_written
                && check.heartbeats > last.heartbeats
                && check.uptime_ms >= last.uptime_ms
                && check.check == last.check + 1,
            "migration {journey}: {last} and then {check}"
        );
        (here, last) = (there, check);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_that_comes_back_finds_the_memory_that_it_left_behind() {
    /// Pages that the guest never writes, each different.
    const STILL: u64 = 1000;
    let lab = Lab::new().await;
    let (a, b) = lab.two_hosts().await;
    let (mut site_a, mut site_b) = (Site::new(&lab, "a").await, Site::new(&lab, "b").await);
    site_a.join_retaining(&lab, "1G").await;
    site_b.join(&lab, None).await;
    let sites = [site_a.peers[0].socket().to_owned(), site_b.peers[0].socket().to_owned()];

    let file = lab.dir().join("still");
    let pages = (1..=STILL).flat_map(|page| page.to_le_bytes().repeat(512)).collect::<Vec<u8>>();
    std::fs::write(&file, pages).expect("a file");
    let load = Load { file, addr: 16 << 20 };
    let guest = Guest { loads: vec![load], site: Some(sites[0].clone()), ..Guest::default() };
    let mut first = Vm::launch(&lab, &a, "first", &guest).await;
    site_a.ready(1).await;
    let mut there = Vm::receive(&lab, &b, "there", Some(&sites[1])).await;
    let wan = async |vm: &Vm| Wan::to(&vm.ticket().await, 100_000_000, Duration::from_millis(50));
    let to_b = wan(&there).await;
    let report = Journey::whole(&first, to_b.ticket(), Terms::default()).await.expect("it completes");
    assert_eq!(report.rungs.host.pages, 0, "nobody at b has anything: {report:#?}");
    first.assert_ends_well().await;
    there.assert_lives().await;
    // The process that had it is gone; the copy was made before.
    let contents = site_a.peers[0].status().await.contents;
    let kept = contents.iter().find(|content| content.kind == "checkpoint").expect("a checkpoint");
    assert!(kept.kind == "checkpoint" && kept.pages >= STILL && kept.last_use.is_some(), "{kept:#?}");

    site_a.ready(0).await;
    site_b.ready(1).await;
    let mut back = Vm::receive(&lab, &a, "back", Some(&sites[0])).await;
    let to_a = wan(&back).await;
    let report = Journey::whole(&there, to_a.ticket(), Terms::default()).await.expect("it completes");
    there.assert_ends_well().await;
    back.assert_lives().await;
    assert!(report.rungs.host.pages >= STILL, "{report:#?}");
}
