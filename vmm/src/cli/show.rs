//! Answers as text for people.

use std::fmt::Write;

use crate::control::api::VmStatus;
use crate::machine::BalloonStatus;
use crate::migrate::report::{Forecast, IncomingPhase, Literals, Phase, Progress, Report, Rungs, WhyStopped};
use crate::snapshot::SnapshotReport;

/// Lines of `name  value`.
struct Table(String);

impl Table {
    fn row(&mut self, name: &str, value: impl std::fmt::Display) {
        writeln!(self.0, "{name:<12}{value}").expect("writing to a String cannot fail");
    }
}

pub(super) fn status(status: &VmStatus) -> String {
    let mut table = Table(String::new());
    table.row("name", status.name.as_deref().unwrap_or("-"));
    table.row("state", status.state);
    if let Some(reason) = &status.reason {
        table.row("", reason);
    }
    table.row("pid", status.pid);
    if let Some(bytes_) = status.memory_bytes {
        table.row("memory", bytes(bytes_));
    }
    if let Some(cpus) = status.cpus {
        table.row("cpus", cpus);
    }
    if let Some(BalloonStatus { target_bytes, actual_bytes }) = status.balloon {
        let (target, actual) = (bytes(target_bytes), bytes(actual_bytes));
        table.row("balloon", format_args!("{actual} of the {target} asked for"));
    }
    if let Some(beat) = status.heartbeat.filter(|beat| beat.count > 0) {
        let gap = beat.longest_gap_ns / 1000;
        table.row(
            "heartbeat",
            format_args!("{} beats, longest gap {}.{:03} ms", beat.count, gap / 1000, gap % 1000),
        );
    }
    if let Some(ticket) = &status.ticket {
        table.row("ticket", ticket);
    }
    if let Some(migration) = &status.migration {
        let how = match (&migration.report, &migration.error) {
            (Some(_), _) => "completed".to_owned(),
            (None, Some(error)) => error.message.clone(),
            (None, None) => progress(&migration.progress),
        };
        table.row("migration", format_args!("to {}: {how}", migration.to));
    }
    if let Some(incoming) = &status.incoming {
        let from = incoming.source.as_deref().unwrap_or("nobody yet");
        table.row("incoming", format_args!("from {from}, round {}", incoming.round));
        if incoming.absent_pages > 0 {
            table.row("on their way", format_args!("{} pages", incoming.absent_pages));
        }
        if let (IncomingPhase::Starved, Some(lack)) = (incoming.phase, &incoming.last_failure) {
            table.row("starved", lack);
        }
    }
    table.0
}

pub(super) fn progress(progress: &Progress) -> String {
    let phase = match progress.phase {
        Phase::Offering => "offering",
        Phase::Precopy => "pre-copy",
        Phase::PrecopyCut => "connection lost, dialling; the VM runs on here",
        Phase::StopAndCopy => "stop-and-copy",
        Phase::Handover => "hand-over",
        Phase::Committing => "committing",
        Phase::InDoubt => "in doubt",
        Phase::Postcopy => "post-copy",
        Phase::PostcopyCut => "post-copy, connection lost",
        Phase::Ended => "ended",
    };
    let Rungs { zero, duplicate, in_place, host, site, source } = &progress.rungs;
    format!(
        "{phase}, round {}: {}/{} pages named; zero {}, duplicate {}, in place {}, host {}, site {}, source {}; WAN {} out, {} in; {}.{} s",
        progress.round,
        progress.named_pages,
        progress.round_pages,
        zero.pages,
        duplicate.pages,
        in_place.pages,
        host.pages,
        site.pages,
        source.pages,
        bytes(progress.wan_tx_bytes),
        bytes(progress.wan_rx_bytes),
        progress.elapsed_ms / 1000,
        progress.elapsed_ms % 1000 / 100,
    )
}

pub(super) fn report(report: &Report) -> String {
    let mut table = Table(String::new());
    table.row("outcome", format_args!("{:?}", report.outcome).to_string().to_lowercase());
    if let Some(reason) = &report.reason {
        table.row("reason", reason);
    }
    table.row("verified", report.verified);
    table.row("rounds", report.rounds);
    table.row("total", format_args!("{} ms", report.total_ms));
    table.row(
        "downtime",
        format_args!("{:.1} ms, {} ms asked for", report.downtime_ms, report.downtime_asked_ms),
    );
    if let Some(why) = report.why_stopped {
        table.row("stopped", why_stopped(why));
    }
    cost(&mut table, report);
    let Rungs { zero, duplicate, in_place, host, site, source } = &report.rungs;
    for (name, rung) in [
        ("zero", zero),
        ("duplicate", duplicate),
        ("in place", in_place),
        ("host", host),
        ("site", site),
        ("source", source),
    ] {
        table.row(name, format_args!("{} pages, {}", rung.pages, bytes(rung.bytes)));
    }
    let Literals { plain_pages, plain_bytes, delta_pages, delta_bytes } = report.literals;
    table.row(
        "literals",
        format_args!(
            "{plain_pages} pages in {}, {delta_pages} as deltas in {}",
            bytes(plain_bytes),
            bytes(delta_bytes)
        ),
    );
    if let Some(late) = &report.postcopy {
        table.row(
            "after it ran",
            format_args!(
                "{} pages: zero {}, host {}, site {}, source {}",
                late.absent, late.zero, late.host, late.site, late.source
            ),
        );
        table.row(
            "faults",
            format_args!(
                "{}: host {}, site {}, source {}; the longest waited {}.{:03} ms",
                late.faults,
                late.faults_host,
                late.faults_site,
                late.faults_source,
                late.longest_wait_us / 1000,
                late.longest_wait_us % 1000
            ),
        );
    }
    faults(&mut table, report);
    table.row("WAN", format_args!("{} out, {} in", bytes(report.wan_tx_bytes), bytes(report.wan_rx_bytes)));
    table.row("plain", format_args!("{} would have crossed without names", bytes(report.plain_bytes)));
    if let Some(forecast) = &report.forecast {
        table.row("forecast", right(forecast, report));
    }
    if report.wrong_pages > 0 {
        table.row("wrong pages", report.wrong_pages);
    }
    if report.site_timeouts > 0 {
        table.row("time-outs", report.site_timeouts);
    }
    table.0
}

/// What the guest was made to bear, what a spill file took, and how often the link broke.
fn cost(table: &mut Table, report: &Report) {
    if report.breaks > 0 {
        let seconds = report.cut_off_ms / 1000;
        table.row("breaks", format_args!("{}, {seconds} s without a connection in all", report.breaks));
    }
    if let Some(slowed) = &report.auto_converge {
        let row = format!("by up to {}%, for {} ms", slowed.highest_percent, slowed.throttled_ms);
        table.row("slowed down", row);
    }
    if let Some(spill) = &report.spill {
        let row = format!(
            "{} pages, {}, in {} ms, of which the VM stood still for {}",
            spill.pages,
            bytes(spill.bytes),
            spill.spill_ms,
            spill.paused_ms
        );
        table.row("spilled", row);
    }
}

/// How long virtual CPUs waited for what, by who gave it.
fn faults(table: &mut Table, report: &Report) {
    if let Some(late) = &report.postcopy {
        for (who, faults, waited) in [
            ("host's faults", late.faults_host, late.waited_host),
            ("site's faults", late.faults_site, late.waited_site),
            ("source's", late.faults_source, late.waited_source),
        ] {
            if faults > 0 {
                table.row(who, format_args!("median {} us, 99% in {} us", waited.median_us, waited.p99_us));
            }
        }
    }
}

/// What a dry run had said, beside what came of it.
fn right(forecast: &Forecast, report: &Report) -> String {
    let percent = |real: u64, said: u64| u128::from(real) * 100 / u128::from(said.max(1));
    let wan = report.wan_tx_bytes + report.wan_rx_bytes;
    format!(
        "{} on the WAN ({}% of that crossed), {} ms ({}%), {} ms of downtime",
        bytes(forecast.wan_bytes),
        percent(wan, forecast.wan_bytes),
        forecast.total_ms,
        percent(report.total_ms, forecast.total_ms),
        forecast.downtime_ms,
    )
}

pub(super) fn forecast(forecast: &Forecast) -> String {
    let Forecast { sampled_pages, sampled_named, sampled_missing, .. } = forecast;
    let mut table = Table(String::new());
    table.row(
        "WAN",
        format_args!("{}, give or take {}", bytes(forecast.wan_bytes), bytes(forecast.wan_bytes_error)),
    );
    table.row("total", format_args!("{} ms", forecast.total_ms));
    table.row(
        "downtime",
        format_args!("{} ms, {} ms asked for", forecast.downtime_ms, forecast.downtime_asked_ms),
    );
    table.row("rounds", forecast.rounds);
    table.row("stopped", why_stopped(forecast.why_stopped));
    table.row(
        "sampled",
        format_args!(
            "{sampled_pages} of {} pages: {sampled_named} named, {} of them in the site there, {sampled_missing} missing",
            forecast.pages,
            sampled_named - sampled_missing.min(sampled_named)
        ),
    );
    table.row("guest writes", format_args!("{} pages a second", forecast.written_pages_per_s));
    table.row(
        "link",
        format_args!(
            "{}.{} Mbit/s, round trip {}.{:03} ms",
            forecast.link_bits_per_s / 1_000_000,
            forecast.link_bits_per_s / 100_000 % 10,
            forecast.round_trip_us / 1000,
            forecast.round_trip_us % 1000
        ),
    );
    table.0
}

fn why_stopped(why: WhyStopped) -> &'static str {
    match why {
        WhyStopped::Fits => "when the rest fitted the downtime",
        WhyStopped::DoesNotConverge => {
            "though the rest did not fit: the guest writes as fast as the link carries"
        }
        WhyStopped::PostcopyAsked => "after the first round, as asked: post-copy",
        WhyStopped::PostcopyStalled => "since rounds did not leave less: post-copy",
        WhyStopped::PostcopyRounds => "after the last round that may be: post-copy",
        WhyStopped::PostcopyPredicted => "since no round to come would have fitted: post-copy",
        WhyStopped::PostcopyGrew => "when the rest fitted, but it grew meanwhile: post-copy",
    }
}

pub(super) fn snapshot(report: &SnapshotReport) -> String {
    let SnapshotReport { to, name, pages_total, pages_zero, pages_present, pages_written, .. } = report;
    let mut table = Table(String::new());
    table.row("snapshot", format_args!("{name} in {to}"));
    table.row("pages", pages_total);
    table.row("zero", pages_zero);
    table.row("present", pages_present);
    table.row("written", format_args!("{pages_written}, {} in all", bytes(report.bytes_written)));
    table.row("rounds", report.rounds);
    table.row("pause", format_args!("{:.1} ms", report.pause_ms));
    table.row("total", format_args!("{:.0} ms", report.total_ms));
    table.0
}

/// Bytes with one digit after the point, in binary units.
fn bytes(count: u64) -> String {
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match units.into_iter().find(|(_, shift)| count >= 1 << shift) {
        None => format!("{count} B"),
        Some((unit, shift)) => {
            let tenths = (u128::from(count) * 10) >> shift;
            match tenths % 10 {
                0 => format!("{} {unit}", tenths / 10),
                tenth => format!("{}.{tenth} {unit}", tenths / 10),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_readable() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (512 << 20, "512 MiB"),
            (u64::MAX, "17179869183.9 GiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
    }
}
