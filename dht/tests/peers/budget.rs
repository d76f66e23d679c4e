//! What a peer takes of its host for itself.

use std::time::{Duration, Instant};

use crate::common::{Site, dht, ids, pages, read, ready, resolve};

/// CPU time that the threads of a process whose names begin with `scan-` have used, and how nice each is.
fn scanning(pid: u32) -> (Duration, Vec<i32>) {
    let (mut used, mut nice) = (0, Vec::new());
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let path = task.unwrap().path();
        if !read(&path.join("comm")).starts_with("scan-") {
            continue;
        }
        // proc(5): the first field is the time on a processor in nanoseconds.
        used += read(&path.join("schedstat")).split(' ').next().unwrap().parse::<u64>().unwrap();
        // proc(5): the 19th field, counted from behind the name in parentheses.
        let stat = read(&path.join("stat"));
        nice.push(stat.rsplit_once(") ").unwrap().1.split(' ').nth(16).unwrap().parse().unwrap());
    }
    (Duration::from_nanos(used), nice)
}

/// The ratio of two quantities of one run. A slower machine makes the run longer and the share no larger, so this does not depend on
/// how loaded it is.
#[tokio::test(flavor = "multi_thread")]
async fn scans_keep_to_their_share_of_a_core() {
    let site = Site::new();
    let peer = site.peer("a", &[], &["--cpu-budget", "10"]);
    let client = peer.client().await;
    // Hashing costs the same for repeated pages.
    let few = pages(1, 512);
    let path = site.path("image");
    std::fs::write(&path, few.concat().repeat(128)).unwrap();
    let start = Instant::now();
    client.add_file(&path).await.unwrap();
    ready(&client, 0).await;
    // CPU time is read before the clock, so that the share is rather too large.
    let (used, nice) = scanning(peer.pid());
    let elapsed = start.elapsed();
    assert!(!nice.is_empty() && nice.iter().all(|nice| *nice == 19), "{nice:?}");
    // Beyond the share: the burst (a twentieth of a second's worth), and per thread one piece that cost more than expected and its start.
    let beyond = Duration::from_millis(5) + Duration::from_millis(10) * u32::try_from(nice.len()).unwrap();
    assert!(used <= elapsed / 10 + beyond, "{used:?} of CPU time in {elapsed:?}");
    assert!(used > Duration::from_millis(25), "{used:?} of CPU time say nothing: scan more");
    assert_eq!(resolve(&client, ids(client.domain(), &few)).await.len(), 512);
}

/// As above: what was announced against the time it took.
#[tokio::test(flavor = "multi_thread")]
async fn announcements_keep_to_their_share_of_the_lan() {
    const RATE: u64 = 50_000;
    const NAMES: u64 = 20_000;
    let site = Site::new();
    let owner = site.peer("a", &[], &[]);
    let holder = site.peer("b", &[&owner], &["--lan-budget", &RATE.to_string()]);
    let client = holder.client().await;
    ready(&client, 1).await;
    let start = Instant::now();
    client.add_file(&site.file("image", &pages(1, NAMES))).await.unwrap();
    let status = ready(&client, 1).await;
    let elapsed = start.elapsed().as_secs_f64();
    assert_eq!(status.counters.announced_ids, NAMES, "everything is announced all the same");
    // Beyond the share: the burst, and one message, which is sent when anything is left.
    let bytes = (NAMES * 8) as f64;
    assert!(bytes <= RATE as f64 * (elapsed + 0.25) + 36_000.0, "{bytes} bytes in {elapsed} s");
}

#[test]
fn budgets_that_make_no_sense_are_refused_with_what_would() {
    let refused = |option: &str, value: &str| {
        let mut serve = dht();
        serve.args([
            "serve",
            "--site-key",
            "key",
            "--listen",
            "127.0.0.1:0",
            "--local",
            "socket",
            option,
            value,
        ]);
        let output = serve.output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(refused("--cpu-budget", "0").contains("percentage of one core"));
    assert!(refused("--lan-budget", "12Mb").contains("12M"));
}
