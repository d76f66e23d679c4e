//! The demo's report: for programs one JSON object, for people a few lines.

use std::fmt;
use std::time::Duration;

use guest_images::pagestorm::report::Report as SelfCheck;
use serde::Serialize;
use vmm::migrate::report::{
    Forecast, Literals, Outcome, Postcopy, Report as MigrationReport, Rung, Rungs, WhyStopped,
};

use crate::demo::bound::Bound;
use crate::demo::content::MIX_IN_WORDS;
use crate::demo::options::Options;
use crate::demo::shaper::WanCounts;
use crate::limits;

/// What a demo found out.
#[derive(Debug)]
pub(crate) struct Findings {
    /// The source's report.
    pub(crate) migration: MigrationReport,
    /// What the link counted.
    pub(crate) wan: WanCounts,
    /// From the guest's last heartbeat at the source to its first at the destination, milliseconds.
    pub(crate) guest_downtime_ms: f64,
    /// What the guest says after the move.
    pub(crate) self_check: SelfCheck,
    /// The yardstick.
    pub(crate) bound: Bound,
    /// The VM's RAM, bytes.
    pub(crate) memory_bytes: u64,
    /// Whether every process ended as it should.
    pub(crate) ended_well: bool,
}

/// The report. Bytes on the WAN are those that crossed the link, IP and UDP headers included; what the full queue before it dropped
/// stands apart. Times are milliseconds.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    outcome: Outcome,
    verified: bool,
    self_check_failures: u64,
    self_check_pages: u64,
    guest_pages_written: u64,
    problems: Vec<String>,
    wan_bytes: u64,
    wan_bytes_to_destination: u64,
    wan_bytes_to_source: u64,
    wan_packets: u64,
    wan_dropped_packets: u64,
    wan_dropped_bytes: u64,
    vmm_wan_bytes: u64,
    plain_bytes: u64,
    bound_bytes: u64,
    bound: Bound,
    total_ms: u64,
    downtime_ms: f64,
    vmm_downtime_ms: f64,
    why_stopped: Option<WhyStopped>,
    /// What a dry run had said; none where there was none.
    forecast: Option<Forecast>,
    /// What came after the VM ran at site B; none where all of its memory went before it.
    postcopy: Option<Postcopy>,
    rounds: u32,
    rungs: Rungs,
    literals: Literals,
    wrong_pages: u64,
    site_timeouts: u64,
    memory_bytes: u64,
    content: String,
    rate_bits_per_second: u64,
    rtt_ms: f64,
    dirty_pages_per_second: u64,
}

impl Report {
    /// Puts the findings together and judges them.
    pub(crate) fn new(options: &Options, findings: Findings) -> Self {
        let Findings { migration, wan, guest_downtime_ms, self_check, bound, memory_bytes, ended_well } =
            findings;
        let content = match options.vm_image() {
            Ok(None) | Err(_) => format!("built in, seed {}: {MIX_IN_WORDS}", options.seed),
            Ok(Some(image)) => format!("the image {}", image.display()),
        };
        let mut report = Self {
            outcome: migration.outcome,
            verified: migration.verified,
            self_check_failures: self_check.failures,
            self_check_pages: self_check.pages_checked,
            guest_pages_written: self_check.pages_written,
            problems: Vec::new(),
            wan_bytes: wan.bytes(),
            wan_bytes_to_destination: wan.to_destination.bytes,
            wan_bytes_to_source: wan.to_source.bytes,
            wan_packets: wan.to_destination.packets + wan.to_source.packets,
            wan_dropped_bytes: wan.to_destination.dropped_bytes + wan.to_source.dropped_bytes,
            wan_dropped_packets: wan.to_destination.dropped_packets + wan.to_source.dropped_packets,
            vmm_wan_bytes: migration.wan_tx_bytes + migration.wan_rx_bytes,
            plain_bytes: migration.plain_bytes,
            bound_bytes: bound.bytes,
            bound,
            total_ms: migration.total_ms,
            downtime_ms: guest_downtime_ms,
            vmm_downtime_ms: migration.downtime_ms,
            why_stopped: migration.why_stopped,
            forecast: migration.forecast,
            postcopy: migration.postcopy,
            rounds: migration.rounds,
            rungs: migration.rungs,
            literals: migration.literals,
            wrong_pages: migration.wrong_pages,
            site_timeouts: migration.site_timeouts,
            memory_bytes,
            content,
            rate_bits_per_second: options.rate,
            rtt_ms: options.rtt.as_secs_f64() * 1e3,
            dirty_pages_per_second: options.dirty,
        };
        report.problems = report.judge(migration.reason, ended_well);
        report
    }

    /// Whether all is as it should be.
    pub(crate) fn is_good(&self) -> bool {
        self.problems.is_empty()
    }

    fn judge(&self, reason: Option<String>, ended_well: bool) -> Vec<String> {
        let mut problems = Vec::new();
        let mut unless = |good: bool, problem: String| {
            if !good {
                problems.push(problem);
            }
        };
        let reason = reason.unwrap_or_else(|| "for no reason that was given".into());
        unless(self.outcome == Outcome::Completed, format!("the migration did not complete: {reason}"));
        unless(self.verified, "the two ends did not compare roots over all of RAM".into());
        let failures = self.self_check_failures;
        unless(failures == 0, format!("the guest found {failures} of its pages lost or wrong"));
        let wrote = self.dirty_pages_per_second == 0 || self.self_check_pages > 0;
        unless(wrote, "the guest was to write pages and wrote none".into());
        let differ = self.wan_bytes.abs_diff(self.vmm_wan_bytes) * 100;
        unless(
            differ <= self.wan_bytes * limits::COUNTS_DIFFER_PERCENT,
            format!("the link counted {} bytes and the vmm {}", self.wan_bytes, self.vmm_wan_bytes),
        );
        unless(
            ended_well,
            "a process did not end well: run again with --keep-logs DIR and see its log".into(),
        );
        problems
    }
}

/// Bytes for people.
pub(crate) struct Bytes(pub(crate) u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        #[expect(clippy::cast_precision_loss, reason = "shown with four digits")]
        let bytes = self.0 as f64;
        match self.0 {
            0..1_000 => write!(f, "{} B", self.0),
            1_000..1_000_000 => write!(f, "{:.1} kB", bytes / 1e3),
            1_000_000..1_000_000_000 => write!(f, "{:.1} MB", bytes / 1e6),
            1_000_000_000.. => write!(f, "{:.2} GB", bytes / 1e9),
        }
    }
}

/// The rungs of the ladder by name, cheapest first.
pub(crate) fn named(rungs: &Rungs) -> [(&'static str, Rung); 6] {
    let Rungs { zero, duplicate, in_place, host, site, source } = *rungs;
    [
        ("zero", zero),
        ("duplicate", duplicate),
        ("in place", in_place),
        ("host", host),
        ("site", site),
        ("source", source),
    ]
}

#[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
fn ratio(part: u64, whole: u64) -> f64 {
    part as f64 / whole.max(1) as f64
}

fn show_postcopy(f: &mut fmt::Formatter<'_>, late: &Postcopy) -> fmt::Result {
    writeln!(
        f,
        "Post-copy           {} pages came after it ran; of {} that it waited for the longest took {:.1} ms",
        late.absent,
        late.faults,
        late.longest_wait_us as f64 / 1e3
    )?;
    for (who, faults, waited) in [
        ("its host", late.faults_host, late.waited_host),
        ("the site", late.faults_site, late.waited_site),
        ("the source", late.faults_source, late.waited_source),
    ] {
        if faults > 0 {
            let (median, p99) = (waited.median_us as f64 / 1e3, waited.p99_us as f64 / 1e3);
            writeln!(
                f,
                "                    {faults} from {who}: median {median:.2} ms, 99% within {p99:.2} ms"
            )?;
        }
    }
    Ok(())
}

impl Report {
    fn show_rungs(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const BAR: usize = 30;
        let rungs = named(&self.rungs);
        let all: u64 = rungs.iter().map(|(_, rung)| rung.pages).sum();
        writeln!(f, "Pages by rung of the ladder, cheapest first")?;
        for (name, rung) in rungs {
            let share = ratio(rung.pages, all);
            let filled = (0..BAR).filter(|&at| share * 30.0 > at as f64 + 0.5).count();
            let bar: String = "█".repeat(filled) + &"·".repeat(BAR - filled);
            writeln!(
                f,
                "  {name:<9} {bar} {:>5.1}% {:>8} pages {:>9}",
                share * 100.0,
                rung.pages,
                Bytes(rung.bytes)
            )?;
        }
        let Literals { plain_pages, plain_bytes, delta_pages, delta_bytes } = self.literals;
        let (plain, delta) = (Bytes(plain_bytes), Bytes(delta_bytes));
        writeln!(f, "  from the source   {plain_pages} pages in {plain}, {delta_pages} as deltas in {delta}")
    }

    fn show_forecast(&self, f: &mut fmt::Formatter<'_>, said: &Forecast) -> fmt::Result {
        writeln!(
            f,
            "Forecast            {} on the WAN (it was {:.2} times that), {:.2} s ({:.2} times), {} ms of downtime",
            Bytes(said.wan_bytes),
            ratio(self.wan_bytes, said.wan_bytes),
            Duration::from_millis(said.total_ms).as_secs_f64(),
            ratio(self.total_ms, said.total_ms),
            said.downtime_ms
        )
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.show_rungs(f)?;
        let time = Duration::from_millis(self.total_ms).as_secs_f64();
        writeln!(
            f,
            "WAN bytes           {} ({} to the destination, {} back; {} packets got through, {} did not)",
            Bytes(self.wan_bytes),
            Bytes(self.wan_bytes_to_destination),
            Bytes(self.wan_bytes_to_source),
            self.wan_packets,
            self.wan_dropped_packets,
        )?;
        if self.site_timeouts > 0 || self.wrong_pages > 0 {
            writeln!(
                f,
                "Site B              was too slow {} times and gave {} wrong pages: the source was asked instead",
                self.site_timeouts, self.wrong_pages
            )?;
        }
        writeln!(f, "  the vmm counted   {}", Bytes(self.vmm_wan_bytes))?;
        writeln!(
            f,
            "A plain migration   {} ({:.1} times as much)",
            Bytes(self.plain_bytes),
            ratio(self.plain_bytes, self.wan_bytes)
        )?;
        writeln!(
            f,
            "Bound               {} for the content at rest (the WAN carried {:.2} times that)",
            Bytes(self.bound_bytes),
            ratio(self.wan_bytes, self.bound_bytes)
        )?;
        writeln!(f, "Time                {time:.2} s in {} rounds", self.rounds)?;
        writeln!(
            f,
            "Downtime            {:.1} ms as the guest saw it ({:.1} ms as the vmm timed it)",
            self.downtime_ms, self.vmm_downtime_ms
        )?;
        self.postcopy.iter().try_for_each(|late| show_postcopy(f, late))?;
        self.forecast.iter().try_for_each(|said| self.show_forecast(f, said))?;
        writeln!(
            f,
            "Memory verified     {}",
            if self.verified { "both ends agree on one root" } else { "no" }
        )?;
        writeln!(
            f,
            "Guest's self-check  {} failures in {} pages that it wrote ({} writes)",
            self.self_check_failures, self.self_check_pages, self.guest_pages_written
        )?;
        self.problems.iter().try_for_each(|problem| writeln!(f, "NOT RIGHT           {problem}"))
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::demo::link::LinkCounts;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn findings() -> Findings {
        let one_way = |bytes| LinkCounts { packets: 10, bytes, ..LinkCounts::default() };
        Findings {
            migration: MigrationReport {
                outcome: Outcome::Completed,
                reason: None,
                verified: true,
                rounds: 3,
                total_ms: 1234,
                downtime_ms: 70.0,
                downtime_asked_ms: 300,
                why_stopped: Some(WhyStopped::Fits),
                postcopy: None,
                auto_converge: None,
                spill: None,
                breaks: 0,
                cut_off_ms: 0,
                rungs: Rungs { site: Rung { pages: 10, bytes: 40_960 }, ..Rungs::default() },
                literals: Literals::default(),
                wan_tx_bytes: 900,
                wan_rx_bytes: 100,
                plain_bytes: 50_000,
                wrong_pages: 0,
                site_timeouts: 0,
                forecast: None,
            },
            wan: WanCounts { to_destination: one_way(910), to_source: one_way(100) },
            guest_downtime_ms: 80.5,
            self_check: SelfCheck { check: 1, pages_checked: 5, ..SelfCheck::default() },
            bound: Bound { bytes: 800, ..Bound::default() },
            memory_bytes: 64 << 20,
            ended_well: true,
        }
    }

    fn report(change: impl FnOnce(&mut Findings)) -> Report {
        let options = Line::parse_from(["demo"]).options;
        let mut findings = findings();
        change(&mut findings);
        Report::new(&options, findings)
    }

    #[test]
    fn a_good_report_has_the_promised_fields() {
        let report = report(|_| ());
        assert!(report.is_good(), "{:?}", report.problems);
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["outcome"], "completed");
        assert_eq!(json["verified"], true);
        assert_eq!(json["self_check_failures"], 0);
        assert_eq!(json["wan_bytes"], 1010);
        assert_eq!(json["vmm_wan_bytes"], 1000);
        assert_eq!(json["downtime_ms"], 80.5);
        assert_eq!(json["rungs"]["site"]["pages"], 10);
        assert_eq!(json["bound_bytes"], 800);
    }

    #[test]
    fn whatever_is_wrong_makes_the_report_bad() {
        assert!(!report(|f| f.migration.outcome = Outcome::Aborted).is_good());
        assert!(!report(|f| f.migration.verified = false).is_good());
        assert!(!report(|f| f.self_check.failures = 1).is_good());
        assert!(!report(|f| f.self_check.pages_checked = 0).is_good());
        assert!(!report(|f| f.migration.wan_tx_bytes = 800).is_good());
        assert!(!report(|f| f.ended_well = false).is_good());
    }

    #[test]
    fn people_see_the_rungs_and_what_is_wrong() {
        let text = report(|f| f.migration.verified = false).to_string();
        assert!(text.contains("site      ██████████████████████████████ 100.0%"), "{text}");
        assert!(text.contains("NOT RIGHT"), "{text}");
    }
}
