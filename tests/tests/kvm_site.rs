//! A VM arrives at a site of twelve peers while some of them die: what they held comes from others or from the source, no page is wrong, and a
//! second VM finds the site in working order.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use tern_tests::real::{Guest, Host, Journey, Lab, Load, Site, Terms, Vm, Wan, limits, until};
use vmm::migrate::report::{Outcome, Report};

/// Peers of the destination's site. The VMs arrive at the first one's host, which holds none of their pages.
const PEERS: usize = 12;
/// Pages of the guest that the others hold; each of them is held by two.
const PAGES: u64 = 8192;
/// How many of them have come from the site when the killing begins: it is in the middle.
const UNTIL_THE_KILLING: u64 = PAGES / 16;

/// Pages `first..first + count` of the guest's content. Each page is another one, and no two halves of a page are the same.
fn content(first: u64, count: u64) -> Vec<u8> {
    let words =
        (first * 512..(first + count) * 512).map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29));
    words.flat_map(u64::to_le_bytes).collect()
}

/// The site, its content spread so that each peer but the first holds one part, and the part of its neighbour.
async fn site_of_twelve(lab: &Lab) -> Site {
    let holders = PEERS as u64 - 1;
    let parts: Vec<PathBuf> = (0..holders)
        .map(|part| {
            let (first, end) = (PAGES * part / holders, PAGES * (part + 1) / holders);
            let file = lab.dir().join(format!("part{part}"));
            fs::write(&file, content(first, end - first)).expect("a file");
            file
        })
        .collect();
    let mut site = Site::new(lab, "b").await;
    site.join(lab, None).await;
    for part in 0..parts.len() {
        let peer = site.join(lab, None).await;
        peer.add(&parts[part]).await;
        peer.add(&parts[(part + 1) % parts.len()]).await;
    }
    site.ready(0).await;
    site
}

/// Moves a guest with the content to the host of the site's first peer, and has `meanwhile` happen once it is under way.
async fn arrival(
    lab: &Lab,
    hosts: (&Host, &Host),
    name: &str,
    sites: (&Site, &mut Site),
    meanwhile: impl AsyncFnOnce(&mut Site),
) -> (Report, Vm) {
    let (here, there) = sites;
    let file = lab.dir().join("content");
    let guest = Guest {
        memory_bytes: 64 << 20,
        loads: vec![Load { file, addr: 24 << 20 }],
        site: Some(here.peers[0].socket().into()),
        ..Guest::default()
    };
    let mut source = Vm::launch(lab, hosts.0, name, &guest).await;
    let destination =
        Vm::receive(lab, hosts.1, &format!("{name}-there"), Some(there.peers[0].socket())).await;
    let wan = Wan::to(&destination.ticket().await, 100_000_000, Duration::from_millis(20));
    let journey = Journey::start(&source, wan.ticket(), Terms::default()).await;
    meanwhile(there).await;
    let report = journey.end().await.expect("it completes all the same");
    source.assert_ends_well().await;
    assert_eq!((report.outcome, report.verified), (Outcome::Completed, true), "{report:#?}");
    (report, destination)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn peers_die_while_a_vm_arrives_at_a_site_of_twelve() {
    let lab = Lab::new().await;
    let (a, b) = lab.two_hosts().await;
    fs::write(lab.dir().join("content"), content(0, PAGES)).expect("a file");
    let mut site_a = Site::new(&lab, "a").await;
    site_a.join(&lab, None).await;
    let mut site_b = site_of_twelve(&lab).await;

    let (report, mut first) =
        arrival(&lab, (&a, &b), "first", (&site_a, &mut site_b), async |site: &mut Site| {
            until("pages come from the site", limits::MIGRATION, async || {
                let hits = site.peers[0].status().await.counters.site_hits;
                (hits >= UNTIL_THE_KILLING).then_some(())
            })
            .await;
            // Two that are not neighbours die, and a third one stops without a word: its connections stay open.
            site.peers[3].process().kill().await;
            site.peers[6].process().kill().await;
            site.peers[9].process().freeze();
        })
        .await;
    first.assert_lives().await;
    let rungs = &report.rungs;
    assert!(rungs.site.pages >= UNTIL_THE_KILLING, "{report:#?}");
    assert!(rungs.site.pages + rungs.source.pages >= PAGES, "{report:#?}");

    // The next one finds what is left, and what the first one brought: its host needs no peer for that.
    let (report, mut second) =
        arrival(&lab, (&a, &b), "second", (&site_a, &mut site_b), async |_: &mut Site| {}).await;
    second.assert_lives().await;
    first.assert_lives().await;
    let near = report.rungs.host.pages + report.rungs.site.pages;
    assert!(near >= PAGES / 2, "the site serves on: {report:#?}");

    let status = site_b.peers[0].status().await;
    assert_eq!(status.counters.wrong_pages, 0, "{status:#?}");
    assert_eq!(status.peers.iter().filter(|peer| peer.answering).count(), PEERS - 4, "{status:#?}");
}
