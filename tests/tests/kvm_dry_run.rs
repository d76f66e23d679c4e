//! A dry run says what a migration will cost: nothing moves by it, and the migration after it costs about that.

use std::fs;
use std::time::Duration;

use guest_images::pagestorm::options::Options;
use tern_tests::real::{Guest, Journey, Lab, Load, Site, Terms, Vm, Wan};
use vmm::control::api::{MigrateRequest, VmState};
use vmm::control::client::ClientError;
use vmm::migrate::report::Outcome;

/// Pages of the guest's content, half of which the destination's site holds. Nothing makes any of them smaller.
const PAGES: u64 = 8192;

fn content(first: u64, count: u64) -> Vec<u8> {
    // SplitMix64's output function (Steele, Lea, Flood, 2014): zstd finds nothing in it.
    let noise = |n: u64| {
        let mut z = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    (first * 512 + 1..=(first + count) * 512).flat_map(|n| noise(n).to_le_bytes()).collect()
}

fn request(to: &str) -> MigrateRequest {
    Terms::default().request(to)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dry_run_moves_nothing_and_says_what_the_migration_then_costs() {
    let lab = Lab::new().await;
    let (a, b) = lab.two_hosts().await;
    let (file, held) = (lab.dir().join("content"), lab.dir().join("held"));
    fs::write(&file, content(0, PAGES)).expect("a file");
    fs::write(&held, content(0, PAGES / 2)).expect("a file");
    let mut site_a = Site::new(&lab, "a").await;
    site_a.join(&lab, None).await;
    let mut site_b = Site::new(&lab, "b").await;
    site_b.join(&lab, None).await;
    site_b.join(&lab, None).await.add(&held).await;
    site_b.ready(0).await;

    // It writes next to nothing: what it writes meanwhile hangs on how fast everything is, and the content does not.
    let options = Options { rate_pps: 50, ..Guest::default().options };
    let guest = Guest {
        memory_bytes: 64 << 20,
        options,
        loads: vec![Load { file, addr: 24 << 20 }],
        site: Some(site_a.peers[0].socket().into()),
    };
    let mut source = Vm::launch(&lab, &a, "source", &guest).await;
    let mut destination = Vm::receive(&lab, &b, "destination", Some(site_b.peers[0].socket())).await;
    let wan = Wan::to(&destination.ticket().await, 100_000_000, Duration::from_millis(20));

    let said = source.client().dry_run(&request(wan.ticket())).await.expect("the destination would take it");
    assert!(said.sampled_missing > 0 && said.sampled_missing < said.sampled_named, "{said:#?}");
    let spent = wan.counts().bytes();
    // It went on where it was, and the destination still waits for a VM.
    assert_eq!(source.client().status().await.expect("it answers").state, VmState::Running);
    assert_eq!(destination.client().status().await.expect("it answers").state, VmState::Receiving);
    source.assert_lives().await;

    let report = Journey::whole(&source, wan.ticket(), Terms::default()).await.expect("it completes");
    source.assert_ends_well().await;
    destination.assert_lives().await;
    assert_eq!((report.outcome, report.verified), (Outcome::Completed, true), "{report:#?}");
    assert_eq!(report.forecast, Some(said), "the report says how right the dry run was");
    let content = PAGES / 2 * 4096;
    assert!(said.wan_bytes.abs_diff(content) < content / 4, "{said:#?}");
    let crossed = wan.counts().bytes() - spent;
    assert!(said.wan_bytes.abs_diff(crossed) < crossed / 4, "{crossed} crossed, and it was {said:#?}");

    // Where a VM runs already no other is taken, and a dry run says so as a migration would.
    let other = Vm::launch(&lab, &a, "other", &Guest::default()).await;
    let refused = other.client().dry_run(&request(wan.ticket())).await;
    let Err(ClientError::Refused(_, error)) = refused else { panic!("{refused:?}") };
    assert!(error.message.contains("a VM runs here already"), "{error:?}");
}
