//! `GET /v1/metrics`: Prometheus' text format, version 0.0.4 (prometheus.io, "Exposition formats").
//!
//! Every number is one that this process counts anyway, so nothing is kept twice and no registry is needed.

use std::fmt::Write;

use crate::control::api::{VmState, VmStatus};
use crate::migrate::report::{Progress, Rungs};
use crate::process::{MigrationCounts, Process};

/// The format's media type.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// All metrics of the process.
#[must_use]
pub fn text(process: &Process) -> String {
    render(&process.status(), process.migration_counts())
}

fn render(status: &VmStatus, counts: MigrationCounts) -> String {
    let mut page = Page(String::with_capacity(4096));
    let name = status.name.as_deref().unwrap_or("");
    page.family("tern_vm_info", "gauge", "The VM and the build of its monitor.");
    page.sample("tern_vm_info", &[("name", name), ("version", env!("CARGO_PKG_VERSION"))], 1.0);
    page.family("tern_vm_state", "gauge", "1 for the state that the VM is in.");
    for state in VmState::ALL {
        let now = if state == status.state { 1.0 } else { 0.0 };
        page.sample("tern_vm_state", &[("state", state.as_str())], now);
    }
    if let Some(bytes) = status.memory_bytes {
        page.gauge("tern_vm_memory_bytes", "The VM's RAM.", float(bytes));
    }
    if let Some(cpus) = status.cpus {
        page.gauge("tern_vm_cpus", "The VM's virtual CPUs.", f64::from(cpus));
    }
    if let Some(balloon) = status.balloon {
        let (target, actual) = (float(balloon.target_bytes), float(balloon.actual_bytes));
        page.gauge("tern_vm_balloon_target_bytes", "What the guest is asked to give of its memory.", target);
        page.gauge("tern_vm_balloon_actual_bytes", "What the guest says that it has given.", actual);
    }
    if let Some(beat) = status.heartbeat {
        page.counter("tern_guest_heartbeats_total", "Heartbeats of the guest.", float(beat.count));
        page.gauge(
            "tern_guest_last_heartbeat_timestamp_seconds",
            "When the guest's last heartbeat came; 0 before the first.",
            seconds(beat.last_unix_ns),
        );
        page.gauge(
            "tern_guest_heartbeat_longest_gap_seconds",
            "The longest time between two heartbeats.",
            seconds(beat.longest_gap_ns),
        );
    }
    page.family("tern_migrations_total", "counter", "Migrations away from here that have ended.");
    for (outcome, count) in
        [("completed", counts.completed), ("failed", counts.failed), ("cancelled", counts.cancelled)]
    {
        page.sample("tern_migrations_total", &[("outcome", outcome)], float(count));
    }
    let active = status.migration.as_ref().is_some_and(|m| m.active);
    page.gauge("tern_migration_active", "1 while a migration runs.", if active { 1.0 } else { 0.0 });
    if let Some(migration) = &status.migration {
        page.progress(&migration.progress);
    }
    if let Some(incoming) = &status.incoming {
        page.family("tern_incoming_pages", "gauge", "Pages of the arriving VM, by rung of the ladder.");
        page.rungs("tern_incoming_pages", &incoming.rungs);
        page.wan("tern_incoming_wan_bytes", incoming.wan_tx_bytes, incoming.wan_rx_bytes);
    }
    page.0
}

/// Text that grows by lines.
struct Page(String);

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.family(name, "gauge", help);
        self.sample(name, &[], value);
    }

    fn counter(&mut self, name: &str, help: &str, value: f64) {
        self.family(name, "counter", help);
        self.sample(name, &[], value);
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        self.0.push_str(name);
        for (n, (label, text)) in labels.iter().enumerate() {
            self.line(format_args!("{}{label}=\"{}\"", if n == 0 { '{' } else { ',' }, escaped(text)));
        }
        if !labels.is_empty() {
            self.0.push('}');
        }
        self.line(format_args!(" {value}\n"));
    }

    fn progress(&mut self, progress: &Progress) {
        self.gauge("tern_migration_round", "The round; 0 walks all of RAM.", f64::from(progress.round));
        self.gauge("tern_migration_round_pages", "Pages of this round.", float(progress.round_pages));
        self.gauge(
            "tern_migration_named_pages",
            "Pages of this round whose names have been sent.",
            float(progress.named_pages),
        );
        self.gauge(
            "tern_migration_elapsed_seconds",
            "Since the migration's start.",
            float(progress.elapsed_ms) / 1e3,
        );
        self.family("tern_migration_pages", "gauge", "Pages of the migration, by rung of the ladder.");
        self.rungs("tern_migration_pages", &progress.rungs);
        self.wan("tern_migration_wan_bytes", progress.wan_tx_bytes, progress.wan_rx_bytes);
    }

    fn rungs(&mut self, name: &str, rungs: &Rungs) {
        let Rungs { zero, duplicate, in_place, host, site, source } = rungs;
        let named = [
            ("zero", zero),
            ("duplicate", duplicate),
            ("in_place", in_place),
            ("host", host),
            ("site", site),
            ("source", source),
        ];
        for (rung, counted) in named {
            self.sample(name, &[("rung", rung)], float(counted.pages));
        }
    }

    fn wan(&mut self, name: &str, tx_bytes: u64, rx_bytes: u64) {
        self.family(name, "gauge", "Bytes on the WAN, IP and UDP headers included.");
        self.sample(name, &[("direction", "tx")], float(tx_bytes));
        self.sample(name, &[("direction", "rx")], float(rx_bytes));
    }

    fn line(&mut self, text: std::fmt::Arguments<'_>) {
        self.0.write_fmt(text).expect("writing to a String cannot fail");
    }
}

/// A label's value: `\`, `"` and line ends are escaped.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// Prometheus' numbers are doubles: beyond 2^53 they lose their last digits, which a graph does not show.
#[expect(clippy::cast_precision_loss, reason = "Prometheus' numbers are doubles")]
fn float(value: u64) -> f64 {
    value as f64
}

fn seconds(ns: u64) -> f64 {
    float(ns) / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{BalloonStatus, Heartbeat};

    #[test]
    fn every_sample_has_its_family_and_odd_names_are_escaped() {
        let status = VmStatus {
            name: Some("a \"b\" \\ \n".to_owned()),
            state: VmState::Running,
            reason: None,
            pid: 1,
            memory_bytes: Some(1 << 29),
            cpus: Some(2),
            heartbeat: Some(Heartbeat { count: 7, ..Heartbeat::default() }),
            balloon: Some(BalloonStatus { target_bytes: 8192, actual_bytes: 4096 }),
            ticket: None,
            migration: None,
            incoming: None,
        };
        let text = render(&status, MigrationCounts::default());
        assert!(text.contains("tern_vm_info{name=\"a \\\"b\\\" \\\\ \\n\",version="), "{text}");
        assert!(text.contains("\ntern_vm_state{state=\"running\"} 1\n"));
        assert!(text.contains("\ntern_vm_state{state=\"paused\"} 0\n"));
        assert!(text.contains("\ntern_guest_heartbeats_total 7\n"));
        assert!(text.contains("\ntern_vm_balloon_actual_bytes 4096\n"));
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let name = line.split(['{', ' ']).next().unwrap();
            assert!(text.contains(&format!("# TYPE {name} ")), "{line}");
        }
    }
}
