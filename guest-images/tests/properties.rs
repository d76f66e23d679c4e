//! Properties of pagestorm's parts. A failing case is printed by proptest with its seed and kept beside this file.

use std::collections::HashSet;

use guest_images::pagestorm::content::{self, Found, Identity, Page};
use guest_images::pagestorm::counters::{self, Counter};
use guest_images::pagestorm::layout::{Layout, LayoutError};
use guest_images::pagestorm::limits;
use guest_images::pagestorm::options::{Content, Idle, Options, OptionsError};
use guest_images::pagestorm::pace::{Order, Pacer, Periodic};
use guest_images::pagestorm::report::Report;
use guest_images::pagestorm::rewrite;
use proptest::prelude::*;

const PAGE_BYTES: usize = limits::PAGE_BYTES;
const PAGE: u64 = PAGE_BYTES as u64;

fn any_content() -> impl Strategy<Value = Content> {
    prop_oneof![Just(Content::Random), Just(Content::Text), Just(Content::Rewrite)]
}

prop_compose! {
    fn any_options()(
        rate_pps in 0..=limits::RATE_MAX,
        ws_pages in 2..4096u64,
        base_pages in 0..4096u64,
        content in any_content(),
        seed: u64,
        heartbeat_us in limits::HEARTBEAT_US_MIN..=limits::HEARTBEAT_US_MAX,
        report_ms in 0..=limits::REPORT_MS_MAX,
        prefill: bool,
        spin: bool,
    ) -> Options {
        let (ws_bytes, base) = (ws_pages * PAGE, base_pages * PAGE);
        let idle = if spin { Idle::Spin } else { Idle::Halt };
        Options { rate_pps, ws_bytes, base, content, seed, heartbeat_us, report_ms, prefill, idle }
    }
}

#[test]
fn command_lines_mean_what_the_readme_says() {
    assert_eq!(Options::parse("").unwrap(), Options::default());
    let options = Options::parse(" rate=0 ws=2M\tbase=0x2000000 content=text prefill=1\n").unwrap();
    assert_eq!((options.rate_pps, options.ws_bytes, options.base), (0, 2 << 20, 32 << 20));
    assert!(options.prefill && options.content == Content::Text);
    assert_eq!(Options::parse("ws=1G base=64K").unwrap().ws_bytes, 1 << 30);
    // What monitors add for Linux is no reason to refuse.
    assert!(Options::parse("rate=1 virtio_mmio.device=512@0xfeb00e00:5").is_ok());
}

#[test]
fn bad_command_lines_say_what_is_wrong() {
    let error = |line: &'static str| Options::parse(line).unwrap_err();
    assert_eq!(error("speed=1"), OptionsError::Unknown { word: "speed=1" });
    assert_eq!(error("prefill"), OptionsError::Unknown { word: "prefill" });
    assert_eq!(error("rate=1 rate=1"), OptionsError::Repeated { key: "rate" });
    for line in ["rate=", "rate=-1", "rate=+1", "ws=M", "seed=0x", "ws=99999999999G", "rate=1e3", "ws=é"] {
        assert!(matches!(error(line), OptionsError::NotANumber { .. }), "{line}");
    }
    assert!(matches!(error("ws=4K"), OptionsError::OutOfRange { key: "ws", value: 4096, .. }));
    assert!(matches!(error("ws=10000"), OptionsError::NotWholePages { .. }));
    assert!(matches!(error("base=1"), OptionsError::NotWholePages { .. }));
    assert!(matches!(error("heartbeat_us=0"), OptionsError::OutOfRange { .. }));
    assert_eq!(
        error("content=zeros"),
        OptionsError::UnknownWord { key: "content", value: "zeros", words: "random, text or rewrite" }
    );
    assert!(matches!(error("idle=nap"), OptionsError::UnknownWord { key: "idle", .. }));
}

#[test]
fn a_working_set_must_be_ram_and_nobody_elses() {
    let options = Options { ws_bytes: 8 << 20, base: 16 << 20, ..Options::default() };
    let layout = Layout::new(&options);
    let image = 0x10_0000..0x13_0000;
    let check_all = |ram: &[std::ops::Range<u64>]| layout.check(&ram.iter().cloned(), &image);
    let low = 0..0x9_fc00u64;
    assert_eq!(check_all(&[low.clone(), 0x10_0000..64 << 20]), Ok(()));
    assert_eq!(
        check_all(&[20 << 20..64 << 20, low.clone(), 0x10_0000..20 << 20]),
        Ok(()),
        "ranges that abut"
    );
    let missing = |at: u64| Err(LayoutError::NotRam { range: 16 << 20..24 << 20, missing: at });
    assert_eq!(check_all(&[low, 0x10_0000..20 << 20]), missing(20 << 20));
    assert_eq!(check_all(&[]), missing(16 << 20));
    let over = Layout::new(&Options { base: 0x12_f000, ..options.clone() });
    let everything = 0..1u64 << 40;
    let ram = || std::iter::once(everything.clone());
    assert!(matches!(over.check(&ram(), &image), Err(LayoutError::OverlapsImage { .. })));
    let beside = Layout::new(&Options { base: 0x13_0000, ..options.clone() });
    assert_eq!(beside.check(&ram(), &image), Ok(()));
    let high = Layout::new(&Options { base: limits::MAPPED_BYTES - PAGE, ..options });
    assert!(matches!(high.check(&ram(), &image), Err(LayoutError::NotMapped { .. })));
}

proptest! {
    #[test]
    fn options_survive_their_own_command_line(options in any_options()) {
        let line = options.to_string();
        prop_assert_eq!(Options::parse(&line), Ok(options));
    }

    #[test]
    fn any_command_line_is_options_or_an_error(line in "\\PC*") {
        if let Err(error) = Options::parse(&line) {
            prop_assert!(!error.to_string().is_empty());
        }
    }

    #[test]
    fn counters_and_pages_fill_the_working_set(options in any_options()) {
        let layout = Layout::new(&options);
        prop_assert_eq!((layout.counter_pages + layout.data_pages) * PAGE, options.ws_bytes);
        prop_assert!(layout.counter_gpa(layout.data_pages + 1) <= layout.page_gpa(0));
        prop_assert_eq!(layout.page_gpa(layout.data_pages), layout.range.end);
        // No page of counters could be spared.
        prop_assert!((layout.counter_pages - 1) * 256 < layout.data_pages + 2);
    }

    #[test]
    fn a_sweep_meets_each_page_once(seed: u64, pages in 1..3000u64) {
        let order = Order::new(seed, pages);
        let met: HashSet<u64> = (0..pages).map(|slot| order.page_of(slot)).collect();
        prop_assert_eq!(met.len() as u64, pages);
        prop_assert!(met.iter().all(|page| *page < pages));
    }

    #[test]
    fn the_pace_is_kept_and_smooth(rate in 1..100_000u64, turns in prop::collection::vec(1..5_000_000u64, 1..400)) {
        let (mut pacer, mut now_ns, mut written) = (Pacer::new(rate, 0), 0, 0u64);
        for turn in turns {
            now_ns += turn;
            written += u64::from(pacer.take(now_ns, u32::MAX));
            let due = u128::from(now_ns) * u128::from(rate) / 1_000_000_000;
            prop_assert_eq!(u128::from(written), due, "after {} ns", now_ns);
            prop_assert!(pacer.next_ns().unwrap() > now_ns);
        }
    }

    #[test]
    fn a_stall_is_not_made_up_for(rate in 1..=limits::RATE_MAX, stall_ns in limits::CATCH_UP_NS..1 << 50) {
        let mut pacer = Pacer::new(rate, 0);
        let burst = u64::from(pacer.take(stall_ns, u32::MAX));
        prop_assert!(burst <= rate * limits::CATCH_UP_NS / 1_000_000_000 + 1);
        prop_assert_eq!(pacer.take(stall_ns, u32::MAX), 0);
        // A clock that goes back does no harm either.
        prop_assert_eq!(pacer.take(0, u32::MAX), 0);
    }

    #[test]
    fn beats_come_on_a_grid_and_never_in_bursts(steps in prop::collection::vec(1..3_000_000u64, 1..200)) {
        let (mut beat, mut now_ns, mut last_ns) = (Periodic::new(1_000_000, 0), 0, None::<u64>);
        for step in steps {
            now_ns += step;
            let due_ns = beat.next_ns();
            if beat.take(now_ns) {
                prop_assert!(now_ns >= due_ns);
                prop_assert!(!beat.take(now_ns), "once");
                prop_assert!(last_ns != Some(now_ns));
                last_ns = Some(now_ns);
            } else {
                prop_assert!(now_ns < due_ns);
            }
        }
    }

    #[test]
    fn whole_pages_tell_which_write_they_hold(
        seed: u64, index in 0..1u64 << 22, held: u32, expected: u32, text: bool, flip in 0..PAGE_BYTES, bit in 0..8u8,
    ) {
        let id = Identity { seed, index };
        let fill = if text { content::fill_text } else { content::fill_random };
        let examine = if text { content::examine_text } else { content::examine_random };
        let (mut page, mut scratch) = ([0; PAGE_BYTES], [0; PAGE_BYTES]);
        prop_assert_eq!(examine(id, expected, &page, &mut scratch), Found::Zeros);
        fill(id, held, &mut page);
        let found = examine(id, expected, &page, &mut scratch);
        prop_assert_eq!(found, if held == expected { Found::Expected } else { Found::Generation(held) });
        let elsewhere = Identity { index: index + 1, ..id };
        prop_assert_eq!(examine(elsewhere, held, &page, &mut scratch), Found::Unknown);
        page[flip] ^= 1 << bit;
        prop_assert_eq!(examine(id, held, &page, &mut scratch), Found::Unknown);
    }

    #[test]
    fn rewritten_pages_keep_the_rest_and_tell_a_lost_write(
        seed: u64, index in 0..1u64 << 22, before: u8, writes in 1..600u32, lost in 1..40u32,
        flip in 0..PAGE_BYTES, bit in 0..8u8,
    ) {
        let id = Identity { seed, index };
        let mut page = [before; PAGE_BYTES];
        let mut kept = rewrite::kept_sum(id, 0, &page);
        let mut older = page;
        for generation in 1..=writes {
            if generation + lost == writes + 1 {
                older = page;
            }
            let changed_from = page;
            kept = rewrite::rewrite(id, generation, &mut page, kept);
            let changed = page.iter().zip(&changed_from).filter(|(new, old)| new != old).count();
            prop_assert!(changed > 0 && changed <= rewrite::UNIT_BYTES);
            prop_assert_eq!(kept, rewrite::kept_sum(id, generation, &page));
        }
        prop_assert_eq!(rewrite::examine(id, writes, &page, kept), Found::Expected);
        if lost < writes {
            prop_assert_eq!(rewrite::examine(id, writes, &older, kept), Found::Generation(writes - lost));
        }
        page[flip] ^= 1 << bit;
        prop_assert!(rewrite::examine(id, writes, &page, kept) != Found::Expected);
    }

    #[test]
    fn a_counter_is_believed_only_in_its_place(seed: u64, number in 0..1u64 << 40, generation: u32, kept: u64, bit in 0..128u32) {
        let counter = Counter { generation, kept };
        let raw = counter.to_raw(seed, number);
        prop_assert_eq!(Counter::from_raw(seed, number, raw), Some(counter));
        prop_assert_eq!(Counter::from_raw(seed, number + 1, raw), None);
        let broken = (u128::from_le_bytes(raw) ^ 1 << bit).to_le_bytes();
        prop_assert_eq!(Counter::from_raw(seed, number, broken), None);
        let header = counters::header_to_raw(seed, kept);
        prop_assert_eq!(counters::header_from_raw(seed, header), Some(kept));
        let broken = (u128::from_le_bytes(header) ^ 1 << bit).to_le_bytes();
        prop_assert_eq!(counters::header_from_raw(seed, broken), None);
    }

    #[test]
    fn generations_add_up_to_the_writes(writes in 0..100_000u64, slots in 1..500u64) {
        let sum: u64 = (0..slots).map(|slot| u64::from(counters::expected_generation(writes, slots, slot))).sum();
        prop_assert_eq!(sum, writes);
    }

    #[test]
    fn reports_survive_their_line(
        check: u64, pages_written: u64, pages_checked: u64, failures: u64, first_bad: Option<u64>,
        uptime_ms: u64, heartbeats: u64, max_gap_us: u64, cut in 0..100usize,
    ) {
        let report = Report {
            check, pages_written, pages_checked, failures, first_bad, uptime_ms, heartbeats, max_gap_us,
        };
        let line = report.to_string();
        prop_assert!(line.len() < limits::LINE_BYTES);
        prop_assert_eq!(Report::parse(&format!("{line}\n")), Some(report));
        prop_assert_eq!(Report::parse(&line[..line.len() - 1 - cut]), None);
    }
}

#[test]
fn content_compresses_as_its_word_says() {
    // No compressor here: text is told from noise by how many of the 256 byte values it uses.
    let (mut text, mut noise) = ([0; PAGE_BYTES], [0; PAGE_BYTES]);
    let id = Identity { seed: 7, index: 9 };
    content::fill_text(id, 3, &mut text);
    content::fill_random(id, 3, &mut noise);
    let values = |page: &Page| page.iter().collect::<HashSet<_>>().len();
    assert!(values(&noise) == 256 && values(&text) < 48, "{} {}", values(&noise), values(&text));
    let text = std::str::from_utf8(&text).unwrap();
    assert!(text.lines().all(|line| line.len() <= 80) && text.ends_with('\n'), "{text}");
}

#[test]
fn the_image_has_a_pvh_note_and_stays_small() {
    let image = guest_images::PAGESTORM;
    let u64_at = |at: usize| u64::from_le_bytes(*image[at..].first_chunk().unwrap());
    let u32_at = |at: usize| u32::from_le_bytes(*image[at..].first_chunk().unwrap());
    let u16_at = |at: usize| u16::from_le_bytes(*image[at..].first_chunk().unwrap());
    assert_eq!(&image[..6], b"\x7fELF\x02\x01", "ELF64, little endian");
    assert_eq!((u16_at(16), u16_at(18)), (2, 62), "an executable for x86-64");
    let headers = (0..usize::from(u16_at(56))).map(|n| usize::try_from(u64_at(32)).unwrap() + n * 56);
    let mut entry = None;
    for header in headers {
        let (kind, offset) = (u32_at(header), usize::try_from(u64_at(header + 8)).unwrap());
        let (gpa, bytes) = (u64_at(header + 24), u64_at(header + 40));
        match kind {
            1 => assert!((0x10_0000..0x14_0000).contains(&gpa) && gpa + bytes <= 0x14_0000, "{gpa:#x}"),
            4 => {
                assert_eq!((u32_at(offset), u32_at(offset + 4), u32_at(offset + 8)), (4, 8, 18));
                assert_eq!(&image[offset + 12..offset + 16], b"Xen\0");
                entry = Some(u64_at(offset + 16));
            }
            other => panic!("a program header of type {other}: nothing else was asked for"),
        }
    }
    assert_eq!(entry, Some(u64_at(24)), "the note and the ELF header agree on the entry point");
}

#[test]
fn the_image_can_be_written_out() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pagestorm");
    guest_images::write_pagestorm(&path).unwrap();
    assert_eq!(std::fs::read(path).unwrap(), guest_images::PAGESTORM);
}
