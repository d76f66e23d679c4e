//! tests
//! Twenty migrations in a row, there and back, of a guest that keeps writing: nothing is lost.

use tern_tests::real::{Guest, Journey, Lab, Site, Terms, Vm};

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
