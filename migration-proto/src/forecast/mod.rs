//! A dry run: what a migration would cost, found out from a sample of the VM's pages, what the destination's site holds of those, what the
//! guest writes meanwhile, and what the link carries.
//!
//! [`sample::frames`] says which pages to look at, [`rate::LinkRate`] what the link carries, and [`forecast`] what that comes to. The rounds are
//! judged by the code that judges a migration's.

pub mod rate;
pub mod sample;

use crate::limits;
use crate::postcopy::Mode;
use crate::source::{Converge, StopWhy};
use crate::timer::{Link, Span};

/// What was found out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Findings {
    /// How the VM is to move.
    pub mode: Mode,
    /// How long it may stand still.
    pub downtime: Span,
    /// Whether a guest that writes too fast for pre-copy may be slowed down.
    pub auto_converge: bool,
    /// Pages of RAM.
    pub pages: u64,
    /// The sample, run by run.
    pub sample: Vec<Run>,
    /// What a missing page takes as a literal, bytes.
    pub literal_bytes_a_page: u64,
    /// How many different pages the guest wrote within how long, ascending; the first entry is not at nothing.
    pub written: Vec<(Span, u64)>,
    /// What a page that the guest has written takes as a literal, bytes; none if it has written nothing.
    pub written_bytes_a_page: Option<u64>,
    /// The link.
    pub link: Link,
    /// Pages that the source names in a second.
    pub named_per_s: u64,
}

/// Pages of the sample that lie beside each other, in thousandths of a page: of a page that stands in three frames each counts for a third.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Run {
    /// All of them.
    pub pages: u64,
    /// Those that are named: not zero, and each content once.
    pub named: u64,
    /// Those that are equal to one that is named.
    pub duplicate: u64,
    /// Of the named ones, those that the destination's site does not hold.
    pub missing: u64,
}

/// What a migration would cost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Forecast {
    /// Bytes on the link, both ways, all overhead included.
    pub wan_bytes: u64,
    /// Two standard errors of that, for the sample alone.
    pub wan_bytes_error: u64,
    /// From the call to the VM with all of its memory at the destination.
    pub total: Span,
    /// How long the VM would stand still.
    pub downtime: Span,
    /// Rounds, the last one included.
    pub rounds: u32,
    /// Why it would be stopped when it would.
    pub why_stopped: StopWhy,
}

/// Bytes of a name with its share of the region's message.
const NAME_BYTES: u64 = 8;
/// Bytes of a region's message without its names: its length, kind, number and root, and the runs of zero pages.
const REGION_BYTES: u64 = 64;
/// Bytes of a duplicate's frame.
const DUPLICATE_BYTES: u64 = 3;
/// Bytes of an absent page's full name, and of its frame in a want.
const ABSENT_NAME_BYTES: u64 = 36;
/// What crosses the link for each thousand bytes of messages: datagrams of 1,452 bytes, their headers, and an acknowledgement for every sixteen.
const WIRE_BYTES_A_THOUSAND: u64 = 1040;
/// Round trips before names flow and after the last literal: the connection, the offer, the first want; Ready and Commit.
const ROUND_TRIPS: u64 = 5;

/// What these findings come to.
#[must_use]
pub fn forecast(findings: &Findings) -> Forecast {
    let Findings { mode, downtime, pages, link, .. } = findings;
    let (first, error) = first_round(findings);
    let on_wire = |bytes: u64| share(bytes, WIRE_BYTES_A_THOUSAND, 1000);
    let a_page = findings.written_bytes_a_page;
    let later = |written: u64| written.saturating_mul(a_page.unwrap_or_default() + NAME_BYTES);

    let mut converge = Converge::new(*downtime, findings.auto_converge);
    let mut bytes = first;
    let mut took = Span(link.time_for(on_wire(first)).0.max(naming_time(findings).0));
    let mut total = Span(took.0 + link.rtt.0 * ROUND_TRIPS);
    let mut rounds = 1;
    loop {
        let written = written_in(&findings.written, took).min(*pages);
        let written = share(written, 100 - u64::from(converge.throttle().min(100)), 100);
        let why = converge.stop(rounds, written, *link, a_page, *mode);
        let rest = later(written);
        rounds += 1;
        if let Some(why) = why {
            let (downtime, rest) = match why {
                StopWhy::Fits | StopWhy::DoesNotConverge => {
                    (Converge::estimate(*link, written, a_page), rest)
                }
                StopWhy::Postcopy(_) => {
                    let regions = written.min(pages / page::REGION_PAGES as u64);
                    let names = written.saturating_mul(ABSENT_NAME_BYTES);
                    (Converge::estimate_postcopy(*link, regions), rest.saturating_add(names))
                }
            };
            let (rest, bytes) = (link.time_for(on_wire(rest)), bytes.saturating_add(rest));
            return Forecast {
                wan_bytes: on_wire(bytes),
                wan_bytes_error: on_wire(error),
                total: Span(total.0.saturating_add(rest.0.max(downtime.0))),
                downtime,
                rounds,
                why_stopped: why,
            };
        }
        took = Span(link.time_for(on_wire(rest)).0 + link.rtt.0);
        total = Span(total.0.saturating_add(took.0));
        bytes = bytes.saturating_add(rest);
    }
}

/// Bytes of messages of the first round, and two standard errors.
fn first_round(findings: &Findings) -> (u64, u64) {
    let all = findings.sample.iter().fold(Run::default(), |all, run| Run {
        pages: all.pages + run.pages,
        named: all.named + run.named,
        duplicate: all.duplicate + run.duplicate,
        missing: all.missing + run.missing,
    });
    let of_all = |sampled: u64| share(sampled, findings.pages, all.pages.max(1));
    let literal = findings.literal_bytes_a_page;
    let regions = findings.pages.div_ceil(page::REGION_PAGES as u64);
    let bytes = of_all(all.missing) * literal
        + of_all(all.named) * NAME_BYTES
        + of_all(all.duplicate) * DUPLICATE_BYTES
        + regions * REGION_BYTES;
    // Runs are the units that were drawn: pages within one are alike. Taken as drawn without strata, which errs to the large side.
    let runs = findings.sample.len().max(1) as u64;
    let squares: u128 =
        findings.sample.iter().map(|run| u128::from((run.missing * runs).abs_diff(all.missing)).pow(2)).sum();
    // `squares` is runs² times the sum of the squared deviations from the mean; the sum's variance is that times runs / (runs - 1).
    let variance = squares / u128::from(runs) / u128::from(runs.saturating_sub(1).max(1));
    let unseen = findings.pages.saturating_mul(1000).saturating_sub(all.pages);
    let error =
        share(2 * u64::try_from(variance.isqrt()).unwrap_or(u64::MAX), findings.pages, all.pages.max(1));
    (bytes, if unseen == 0 { 0 } else { error.saturating_mul(literal) })
}

/// How long naming every page takes: the link waits for it where it is faster.
fn naming_time(findings: &Findings) -> Span {
    Span(share(findings.pages, 1_000_000, findings.named_per_s.max(1)))
}

/// Different pages that the guest writes within `time`: as was seen, and beyond that growing as between the last two times looked.
fn written_in(seen: &[(Span, u64)], time: Span) -> u64 {
    let mut before = (Span(0), 0);
    let mut pace = (0, 1);
    for (at, pages) in seen {
        let (took, grew) = (at.0.saturating_sub(before.0.0).max(1), pages.saturating_sub(before.1));
        if *at >= time {
            return before.1 + share(grew, time.0.saturating_sub(before.0.0), took);
        }
        (before, pace) = ((*at, *pages), (grew, took));
    }
    before.1.saturating_add(share(pace.0, time.0 - before.0.0, pace.1))
}

/// `value` × `of` / `whole`, rounded down, at most `u64::MAX`.
fn share(value: u64, of: u64, whole: u64) -> u64 {
    u64::try_from(u128::from(value) * u128::from(of) / u128::from(whole.max(1))).unwrap_or(u64::MAX)
}

/// Pages that a dry run of a VM of `pages` looks at, at most.
#[must_use]
pub fn sample_size(pages: u64) -> u64 {
    let most = limits::PROBE_IDS as u64;
    (pages / limits::PROBE_SHARE).clamp(limits::PROBE_IDS_MIN, most).min(pages)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::source::WhyPostcopy;

    fn idle() -> Findings {
        Findings {
            mode: Mode::Hybrid,
            downtime: Span::from_millis(300),
            auto_converge: false,
            pages: 131_072,
            sample: vec![Run { pages: 16_000, named: 12_000, duplicate: 0, missing: 6000 }; 512],
            literal_bytes_a_page: 1000,
            written: vec![(Span::from_millis(500), 0), (Span::from_secs(1), 0)],
            written_bytes_a_page: None,
            link: Link { rtt: Span::from_millis(50), bytes_per_s: 12_500_000 },
            named_per_s: 1_000_000,
        }
    }

    #[test]
    fn an_idle_vm_takes_its_names_and_what_is_missing_and_no_round_more() {
        let forecast = forecast(&idle());
        // 98,304 names, 49,152 literals of 1000 bytes, 256 regions.
        let bytes = (98_304 * NAME_BYTES + 49_152_000 + 256 * REGION_BYTES) * WIRE_BYTES_A_THOUSAND / 1000;
        assert_eq!(forecast.wan_bytes, bytes);
        assert_eq!(forecast.wan_bytes_error, 0, "every run was alike");
        assert_eq!((forecast.rounds, forecast.why_stopped), (2, StopWhy::Fits));
        assert!(
            forecast.total.0 > bytes * 1_000_000 / 12_500_000 && forecast.total < Span::from_millis(4700)
        );
    }

    #[test]
    fn a_guest_that_writes_faster_than_the_link_goes_by_post_copy_or_stands_still_long() {
        let mut busy = idle();
        busy.written = vec![(Span::from_millis(500), 10_000), (Span::from_secs(1), 20_000)];
        busy.written_bytes_a_page = Some(4000);
        let hybrid = forecast(&busy);
        assert_eq!(hybrid.why_stopped, StopWhy::Postcopy(WhyPostcopy::Stalled));
        assert!(hybrid.downtime < Span::from_millis(150));
        busy.mode = Mode::Precopy;
        let precopy = forecast(&busy);
        assert_eq!(precopy.why_stopped, StopWhy::DoesNotConverge);
        assert!(precopy.downtime > Span::from_secs(5));
        assert!(precopy.wan_bytes >= hybrid.wan_bytes - hybrid.wan_bytes / 10);
        busy.auto_converge = true;
        let slowed = forecast(&busy);
        assert_eq!(slowed.why_stopped, StopWhy::Fits);
    }

    #[test]
    fn uneven_runs_leave_doubt() {
        let mut uneven = idle();
        for run in uneven.sample.iter_mut().step_by(2) {
            run.missing = 12_000;
        }
        let forecast = forecast(&uneven);
        // The deviation of a run is 3 pages, of the sum of 512 runs 3 × √512 = 68, twice that, 16 times that for all of RAM, 1000 bytes each.
        let error = 2 * 68 * 16 * 1000;
        assert!(forecast.wan_bytes_error.abs_diff(error) < error / 10, "{}", forecast.wan_bytes_error);
    }

    #[test]
    fn what_is_written_is_read_off_the_curve_and_continued() {
        let seen = [(Span(100), 50), (Span(200), 70)];
        for (time, pages) in [(0, 0), (50, 25), (100, 50), (150, 60), (200, 70), (300, 90)] {
            assert_eq!(written_in(&seen, Span(time)), pages, "{time}");
        }
        assert_eq!(written_in(&[], Span(5)), 0);
    }

    proptest! {
        #[test]
        fn any_findings_come_to_an_end(
            pages in 0..limits::REGIONS * 512, literal_bytes_a_page in 0u64..5000, rate: u64, rtt in 0..1u64 << 40,
            written in prop::collection::vec((0..1u64 << 40, any::<u64>()), 0..5), a_page in prop::option::of(0u64..5000),
            named_per_s: u64, missing in prop::collection::vec(0u64..=16_000, 0..20),
        ) {
            let sample = missing.into_iter().map(|missing| Run { pages: 16_000, named: 16_000, duplicate: 0, missing }).collect();
            let written = written.into_iter().map(|(at, pages)| (Span(at), pages)).collect();
            for mode in [Mode::Precopy, Mode::Hybrid, Mode::Postcopy] {
                let forecast = forecast(&Findings {
                    mode, pages, sample: Vec::clone(&sample), literal_bytes_a_page, written: Vec::clone(&written),
                    written_bytes_a_page: a_page, link: Link { rtt: Span(rtt), bytes_per_s: rate }, named_per_s,
                    ..idle()
                });
                prop_assert!(forecast.rounds <= limits::ROUNDS + 1);
            }
        }
    }
}
