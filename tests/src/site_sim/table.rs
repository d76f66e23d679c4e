//! The figures as tables of Markdown.

use std::fmt::Write as _;

use super::Figures;

/// A column: its head, and its text for a row.
type Column = (&'static str, fn(&Figures) -> String);

const LOOKUPS: &[Column] = &[
    ("peers", |f| f.peers.to_string()),
    ("scenario", |f| f.scenario.name().to_owned()),
    ("hits, %", |f| format!("{:.2}", f.hit_percent)),
    ("worst, %", |f| format!("{:.1}", f.worst_hit_percent)),
    ("requests", |f| format!("{:.0}", f.requests)),
    ("owners asked", |f| format!("{:.0}", f.owners_asked)),
    ("index bytes", |f| bytes(f.index_bytes)),
    ("index, ms", |f| format!("{:.1}", f.index_ms)),
    ("last page, ms", |f| format!("{:.0}", f.answer_ms)),
    ("page requests", |f| format!("{:.0}", f.fetches)),
    ("connections made", |f| format!("{:.0}", f.connections)),
    ("time-outs", |f| format!("{:.1}", f.timeouts)),
    ("wrong pages refused", |f| format!("{:.0}", f.wrong_pages)),
    ("accepted", |f| f.wrong_accepted.to_string()),
    ("unended", |f| f.unended.to_string()),
];

const HOSTS: &[Column] = &[
    ("peers", |f| f.peers.to_string()),
    ("scenario", |f| f.scenario.name().to_owned()),
    ("sampled bits", |f| format!("{:.2}", f.sampled_bits)),
    ("most", |f| format!("{:.0}", f.most_sampled_bits)),
    ("owners", |f| f.owners.to_string()),
    ("index bytes a host", |f| bytes(f.index_bytes_per_host)),
    ("worst host", |f| bytes(f.index_bytes_worst_host)),
    ("its entries", |f| count(f.entries_worst_host)),
    ("announced, B/s", |f| bytes(f.announce_bytes_per_s)),
    ("messages/s", |f| format!("{:.2}", f.announce_messages_per_s)),
    ("heard by an owner/s", |f| format!("{:.1}", f.heard_per_s)),
    ("re-homed, B/min", |f| bytes(f.rehomed_bytes_per_min)),
    ("Kademlia messages/s", |f| format!("{:.1}", f.kademlia_messages_per_s)),
    ("Kademlia, B/s", |f| bytes(f.kademlia_bytes_per_s)),
];

/// What lookups of a 1 GiB VM come to.
#[must_use]
pub fn lookups(all: &[Figures]) -> String {
    table(LOOKUPS, all)
}

/// What the index costs a host.
#[must_use]
pub fn hosts(all: &[Figures]) -> String {
    table(HOSTS, all)
}

fn table(columns: &[Column], all: &[Figures]) -> String {
    let mut text = String::new();
    let mut line =
        |cells: Vec<String>| writeln!(text, "| {} |", cells.join(" | ")).expect("a String takes all");
    line(columns.iter().map(|(head, _)| (*head).to_owned()).collect());
    line(columns.iter().map(|_| "---".to_owned()).collect());
    for figures in all {
        line(columns.iter().map(|(_, cell)| cell(figures)).collect());
    }
    text
}

fn scaled(value: f64, units: &[&str]) -> String {
    let mut value = value;
    for unit in units {
        if value < 1000.0 {
            return if value < 10.0 && value > 0.0 {
                format!("{value:.1}{unit}")
            } else {
                format!("{value:.0}{unit}")
            };
        }
        value /= 1000.0;
    }
    format!("{value:.1}e12")
}

pub(super) fn bytes(value: f64) -> String {
    scaled(value, &["", " kB", " MB", " GB"])
}

fn count(value: f64) -> String {
    scaled(value, &["", "k", "M", "G"])
}
