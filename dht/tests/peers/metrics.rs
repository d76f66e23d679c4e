//! `dht status` in its three forms, and the metrics over HTTP.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

use dht::SiteStatus;

use crate::common::{Site, ids, pages, read, ready, resolve, until};

/// Samples by their name and labels, as they are written.
type Samples = BTreeMap<String, f64>;

/// Reads Prometheus' text format 0.0.4 and accepts nothing that the format or its naming conventions do not ask for: each family is one
/// HELP line, one TYPE line and its samples together; counters end in `_total` and nothing else does; no sample comes twice.
fn parse(text: &str) -> Samples {
    let (mut samples, mut families) = (Samples::new(), BTreeSet::new());
    let mut lines = text.strip_suffix('\n').expect("the last line ends").split('\n').peekable();
    while let Some(line) = lines.next() {
        let (name, help) = line.strip_prefix("# HELP ").expect(line).split_once(' ').expect(line);
        assert!(is_name(name) && name.starts_with("tern_dht_") && help.ends_with('.'), "{line}");
        assert!(families.insert(name.to_owned()), "{name} comes twice");
        let kind = lines.next().unwrap().strip_prefix(&format!("# TYPE {name} ")).expect(line);
        assert!(matches!(kind, "counter" | "gauge"), "{line}");
        assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
        let before = samples.len();
        while let Some(line) = lines.next_if(|line| !line.starts_with('#')) {
            let (series, value) = line.rsplit_once(' ').expect(line);
            let (of, labels) = series.split_once('{').map_or((series, None), |(n, rest)| (n, Some(rest)));
            assert_eq!(of, name, "a sample of another family");
            if let Some(labels) = labels {
                let mut seen = BTreeSet::new();
                for label in labels.strip_suffix('}').expect(line).split(',') {
                    let (key, text) = label.split_once('=').expect(line);
                    let text = text.strip_prefix('"').and_then(|t| t.strip_suffix('"')).expect(line);
                    assert!(is_name(key) && !text.contains(['"', '\\']) && seen.insert(key), "{line}");
                }
            }
            let value: f64 = value.parse().expect(line);
            assert!(value.is_finite() && value >= 0.0, "{line}");
            assert!(samples.insert(series.to_owned(), value).is_none(), "{series} comes twice");
        }
        assert!(samples.len() > before, "{name} has no sample");
    }
    samples
}

fn is_name(text: &str) -> bool {
    let mut chars = text.chars();
    chars.next().is_some_and(|c| c.is_ascii_lowercase())
        && chars.all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

/// What the metrics must say of a status. The counters are compared by their JSON, so that none can be left out.
fn expected(status: &SiteStatus) -> Samples {
    let counters = serde_json::to_value(&status.counters).unwrap();
    let names = [
        ("resolves", "tern_dht_questions_total"),
        ("resolve_ids", "tern_dht_names_asked_total"),
        ("host_hits", "tern_dht_names_found_total{rung=\"host\"}"),
        ("site_hits", "tern_dht_names_found_total{rung=\"site\"}"),
        ("missing", "tern_dht_names_missing_total"),
        ("lookups_sent", "tern_dht_lookups_total{role=\"asker\"}"),
        ("lookups_answered", "tern_dht_lookups_total{role=\"owner\"}"),
        ("lookup_ids_sent", "tern_dht_lookup_names_total{role=\"asker\"}"),
        ("lookup_ids_answered", "tern_dht_lookup_names_total{role=\"owner\"}"),
        ("lookup_ids_found", "tern_dht_lookup_names_found_total{role=\"asker\"}"),
        ("lookup_ids_answered_found", "tern_dht_lookup_names_found_total{role=\"owner\"}"),
        ("announced_ids", "tern_dht_announced_names_total{role=\"holder\"}"),
        ("announced_ids_taken", "tern_dht_announced_names_total{role=\"owner\"}"),
        ("announced_bytes", "tern_dht_announced_bytes_total"),
        ("leases_renewed", "tern_dht_lease_renewals_total{answer=\"renewed\"}"),
        ("leases_unlike", "tern_dht_lease_renewals_total{answer=\"told_anew\"}"),
        ("entries_learnt", "tern_dht_repaired_entries_total{direction=\"learnt\"}"),
        ("entries_passed_on", "tern_dht_repaired_entries_total{direction=\"passed_on\"}"),
        ("fetches_sent", "tern_dht_fetches_total"),
        ("bytes_fetched", "tern_dht_fetched_bytes_total"),
        ("bytes_served", "tern_dht_served_bytes_total"),
        ("stale_misses", "tern_dht_stale_pages_total"),
        ("wrong_pages", "tern_dht_wrong_pages_total"),
        ("failed_requests", "tern_dht_failed_requests_total"),
        ("refused_requests", "tern_dht_refused_requests_total{reason=\"busy\"}"),
        ("refused_over_share", "tern_dht_refused_requests_total{reason=\"share\"}"),
        ("malformed_requests", "tern_dht_refused_requests_total{reason=\"malformed\"}"),
        ("refused_connections", "tern_dht_refused_connections_total{reason=\"unauthenticated\"}"),
        ("broken_connections", "tern_dht_refused_connections_total{reason=\"broken\"}"),
        ("connections_over_limit", "tern_dht_refused_connections_total{reason=\"limit\"}"),
    ];
    let counters = counters.as_object().unwrap();
    for name in counters.keys() {
        assert!(names.iter().any(|(field, _)| field == name), "this test knows no metric of {name}");
    }
    let mut samples: Samples =
        names.iter().map(|(field, name)| ((*name).to_owned(), counters[*field].as_f64().unwrap())).collect();
    let gauges = [
        ("tern_dht_ready", u64::from(status.ready)),
        ("tern_dht_peers", status.peers.len() as u64),
        ("tern_dht_peers_connected", status.members.connected),
        ("tern_dht_peers_skipped", status.members.skipped),
        ("tern_dht_site_peers", status.members.site_size),
        ("tern_dht_contents{kind=\"file\"}", status.contents.len() as u64),
        ("tern_dht_content_pages{kind=\"file\"}", status.contents.iter().map(|c| c.pages).sum()),
        ("tern_dht_host_names", status.index.host_names),
        ("tern_dht_owned_shards", status.index.shards_owned),
        ("tern_dht_owned_entries", status.index.owner_entries),
        ("tern_dht_owned_entries_bytes", status.index.owner_bytes),
    ];
    #[expect(clippy::cast_precision_loss, reason = "the test's numbers are small")]
    samples.extend(gauges.map(|(name, value)| (name.to_owned(), value as f64)));
    samples
}

fn http(address: &str, request: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_well_formed_and_say_what_the_status_says() {
    let site = Site::new();
    let a = site.peer("a", &[], &["--metrics", "127.0.0.1:0"]);
    let b = site.peer("b", &[&a], &[]);
    let (at_a, at_b) = (pages(1, 300), pages(2, 200));
    a.run(&["add", site.file("here", &at_a).to_str().unwrap()]);
    b.run(&["add", site.file("there", &at_b).to_str().unwrap()]);
    let client = a.client().await;
    ready(&client, 1).await;
    ready(&b.client().await, 1).await;
    let asked = [at_a, at_b, pages(3, 100)].concat();
    assert_eq!(resolve(&client, ids(client.domain(), &asked)).await.len(), 500);

    let status: SiteStatus = serde_json::from_str(&a.run(&["status", "--json"])).unwrap();
    let count = &status.counters;
    assert_eq!(
        (count.resolves, count.resolve_ids, count.host_hits, count.site_hits, count.missing),
        (1, 600, 300, 200, 100)
    );
    assert!(count.lookup_ids_found <= count.lookup_ids_sent && count.bytes_fetched == 200 * 4096);
    let samples = parse(&a.run(&["status", "--metrics"]));
    for (name, value) in expected(&status) {
        assert_eq!(samples.get(&name), Some(&value), "{name}");
    }

    let address = until("the address to be in the log", || async {
        let log = read(&a.log);
        let (_, rest) = log.split_once("http://")?;
        Some(rest.split_once("/metrics")?.0.to_owned())
    })
    .await;
    let get = http(&address, "GET /metrics HTTP/1.1\r\nHost: peer\r\n\r\n");
    let (head, body) = get.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    assert!(head.to_lowercase().contains("content-type: text/plain; version=0.0.4; charset=utf-8"), "{head}");
    assert_eq!(parse(body).keys().collect::<Vec<_>>(), samples.keys().collect::<Vec<_>>());
    let refused = |request: &str, code: &str| {
        let answer = http(&address, request);
        assert!(answer.starts_with(&format!("HTTP/1.1 {code} ")), "{answer}");
    };
    refused("GET /secrets HTTP/1.1\r\nHost: peer\r\n\r\n", "404");
    refused("POST /metrics HTTP/1.1\r\nHost: peer\r\nContent-Length: 0\r\n\r\n", "405");
    refused("no request at all\r\n\r\n", "400");
    let shown = a.run(&["status"]);
    assert!(shown.contains("all indexed and announced"), "{shown}");
    assert!(shown.contains("200 on the site (33%), 100 missing"), "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_say_nothing_do_not_keep_others_from_the_metrics() {
    let site = Site::new();
    let a = site.peer("a", &[], &["--metrics", "127.0.0.1:0"]);
    let address = until("the address to be in the log", || async {
        let log = read(&a.log);
        let (_, rest) = log.split_once("http://")?;
        Some(rest.split_once("/metrics")?.0.to_owned())
    })
    .await;
    let silent: Vec<_> =
        (0..2 * dht::limits::METRICS_CONNECTIONS).map(|_| TcpStream::connect(&address).unwrap()).collect();
    // Waits until the silent ones have run into their deadline.
    let get = http(&address, "GET /metrics HTTP/1.1\r\nHost: peer\r\n\r\n");
    assert!(get.starts_with("HTTP/1.1 200 "), "{get}");
    drop(silent);
}
