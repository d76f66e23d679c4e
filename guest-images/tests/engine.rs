//! The guest's whole life on a model machine: a clock that the test moves, ports that it reads, RAM in a vector.

use guest_images::image::{DumpError, RamImage, check_dump};
use guest_images::pagestorm::console::Ports;
use guest_images::pagestorm::engine::Engine;
use guest_images::pagestorm::layout::Layout;
use guest_images::pagestorm::limits;
use guest_images::pagestorm::options::Options;
use guest_images::pagestorm::report::Report;
use guest_images::pagestorm::storm::Storm;

const MS: u64 = 1_000_000;

/// Ports that remember.
#[derive(Default)]
struct ModelPorts {
    beats: Vec<u8>,
    typed: Vec<u8>,
    serial: String,
}

impl Ports for ModelPorts {
    fn heartbeat(&mut self, byte: u8) {
        self.beats.push(byte);
    }
    fn serial_can_write(&mut self) -> bool {
        true
    }
    fn serial_write(&mut self, byte: u8) {
        self.serial.push(char::from(byte));
    }
    fn serial_read(&mut self) -> Option<u8> {
        (!self.typed.is_empty()).then(|| self.typed.remove(0))
    }
}

struct Machine {
    engine: Engine<RamImage<Vec<u8>>>,
    ports: ModelPorts,
    now_ns: u64,
    options: Options,
}

impl Machine {
    fn new(command_line: &str) -> Self {
        let options = Options::parse(command_line).expect("a good command line");
        let layout = Layout::new(&options);
        let mut ram = vec![0xa5; usize::try_from(layout.range.end).expect("64 bits")];
        ram[..16].copy_from_slice(b"not the guest's.");
        let storm = Storm::create(RamImage::new(ram, &layout).expect("large enough"), &options, layout);
        let engine = Engine::new(options.clone(), storm, "model", 0);
        Self { engine, ports: ModelPorts::default(), now_ns: 0, options }
    }

    /// Runs for a time in turns of `turn_ns`.
    fn run(&mut self, for_ns: u64, turn_ns: u64) {
        let end_ns = self.now_ns + for_ns;
        while self.now_ns < end_ns {
            self.engine.turn(self.now_ns, &mut self.ports);
            self.now_ns += turn_ns;
        }
    }

    /// Types a letter and returns the JSON line that answers it, with the lines before it.
    fn ask(&mut self, letter: u8) -> (Report, Vec<String>) {
        let before = self.ports.serial.len();
        self.ports.typed.push(letter);
        self.run(2000 * MS, 50_000);
        let mut lines: Vec<String> = self.ports.serial[before..].lines().map(str::to_owned).collect();
        if letter == b'c' {
            let is_answer = |line: &String| Report::parse(line).is_some_and(|report| report.check > 0);
            lines.truncate(lines.iter().position(is_answer).map_or(0, |at| at + 1));
        }
        let report = lines.pop().and_then(|line| Report::parse(&line)).expect("an answer within two seconds");
        (report, lines)
    }

    fn ram(&mut self) -> &mut Vec<u8> {
        self.engine.storm_mut().ram_mut().bytes_mut()
    }

    fn page_of_slot(&self, slot: u64) -> std::ops::Range<usize> {
        let start = usize::try_from(self.engine.storm().page_gpa(slot)).expect("64 bits");
        start..start + limits::PAGE_BYTES
    }
}

#[test]
fn it_beats_and_writes_at_its_pace_and_says_so() {
    let mut machine = Machine::new("rate=3000 ws=1M base=64K report_ms=1000");
    machine.run(5000 * MS, 20_000);
    assert!((4998..=5000).contains(&machine.ports.beats.len()), "{}", machine.ports.beats.len());
    assert!(machine.ports.beats.windows(2).all(|two| two[1] == two[0].wrapping_add(1)));
    assert!((14_990..=15_000).contains(&machine.engine.storm().writes()));
    let lines: Vec<&str> = machine.ports.serial.lines().collect();
    assert!(lines[0].starts_with("pagestorm: ready ws=1048576 rate=3000 "), "{}", lines[0]);
    assert_eq!(lines[1..].iter().filter_map(|line| Report::parse(line)).count(), 4);
    let (report, lines) = machine.ask(b'c');
    assert_eq!((report.check, report.failures, report.first_bad), (1, 0, None));
    assert_eq!(report.pages_checked, machine.engine.storm().slots());
    assert!(report.max_gap_us <= 1100, "the check held up the heartbeat: {report}");
    assert!(lines.iter().all(|line| Report::parse(line).is_some_and(|status| status.check == 0)));
}

#[test]
fn it_touches_nothing_outside_its_working_set() {
    let mut machine = Machine::new("rate=10000 ws=64K base=32K prefill=1");
    machine.run(100 * MS, 50_000);
    assert_eq!(&machine.ram()[..16], b"not the guest's.");
    assert!(machine.ram()[16..32 << 10].iter().all(|byte| *byte == 0xa5));
}

#[test]
fn prefill_writes_every_page_before_ready() {
    let mut machine = Machine::new("rate=0 ws=4M base=0 prefill=1");
    while !machine.ports.serial.contains("ready") {
        machine.run(MS, 20_000);
    }
    assert_eq!(machine.engine.storm().writes(), machine.engine.storm().slots());
    machine.run(100 * MS, 50_000);
    assert_eq!(machine.engine.storm().writes(), machine.engine.storm().slots(), "rate=0 writes no more");
    assert_eq!(machine.ask(b'c').0.pages_checked, machine.engine.storm().slots());
}

#[test]
fn after_a_stall_it_goes_on_at_its_pace() {
    let mut machine = Machine::new("rate=1000 ws=1M base=0");
    machine.run(1000 * MS, 20_000);
    let (beats, writes) = (machine.ports.beats.len(), machine.engine.storm().writes());
    machine.now_ns += 30_000 * MS;
    machine.run(MS, 20_000);
    assert!(machine.ports.beats.len() - beats <= 2, "beats are not made up for");
    let burst = machine.engine.storm().writes() - writes;
    assert!(burst <= 1000 * limits::CATCH_UP_NS / 1_000_000_000 + 2, "{burst} writes at once");
    let (report, _) = machine.ask(b's');
    assert!((30_000_000..30_002_000).contains(&report.max_gap_us), "{report}");
    assert!(machine.ask(b'r').0.max_gap_us < 2000, "r forgets the longest gap");
    // A clock that goes back (a TSC on another host) stops it until it is back where it was, and does not end it.
    machine.engine.turn(5, &mut machine.ports);
    assert_eq!(machine.ask(b'c').0.failures, 0);
}

#[test]
fn a_lost_a_wrong_and_a_zeroed_page_are_found() {
    for content in ["random", "text", "rewrite"] {
        let mut machine = Machine::new(&format!("rate=4000 ws=256K base=64K content={content}"));
        machine.run(100 * MS, 50_000);
        let older = machine.ram().clone();
        machine.run(100 * MS, 50_000);
        let (lost, wrong, zeroed) =
            (machine.page_of_slot(3), machine.page_of_slot(5), machine.page_of_slot(7));
        machine.engine.storm_mut().ram_mut().bytes_mut()[lost.clone()].copy_from_slice(&older[lost.clone()]);
        machine.ram()[wrong.start + 1000] ^= 4;
        machine.ram()[zeroed.clone()].fill(0);
        // No write may come between the damage and the check, or it would mend a page.
        let options = machine.options.clone();
        let result = check_dump(machine.ram(), &options).unwrap();
        let text: Vec<String> = result.failures.iter().map(ToString::to_string).collect();
        assert_eq!(text.len(), 3, "{content}: {text:?}");
        assert!(text[0].contains(&format!("{:#x} is lost: expected generation", lost.start)), "{text:?}");
        assert!(text[1].contains(&format!("{:#x} is wrong: ", wrong.start)), "{text:?}");
        assert!(text[2].contains(&format!("{:#x} is lost: ", zeroed.start)), "{text:?}");
        assert!(text[2].ends_with("found zeros"), "{text:?}");
    }
}

#[test]
fn the_guest_itself_reports_a_bad_page_and_many() {
    let mut machine = Machine::new("rate=0 ws=1M base=64K prefill=1");
    machine.run(100 * MS, 50_000);
    let bad = machine.page_of_slot(40);
    machine.ram()[bad.end - 1] ^= 1;
    let (report, lines) = machine.ask(b'c');
    assert_eq!((report.failures, report.first_bad), (1, Some(bad.start as u64)));
    assert_eq!(
        lines,
        [format!("pagestorm: page {:#x} is wrong: expected generation 1, found other bytes", bad.start)]
    );
    machine.ram()[0x2_0000..0x8_0000].fill(0);
    let (report, lines) = machine.ask(b'c');
    assert_eq!((report.check, report.failures >= 96), (2, true), "{report}");
    assert_eq!(lines.len(), limits::BAD_PAGE_LINES_MAX as usize);
}

#[test]
fn lost_counters_are_found() {
    let mut machine = Machine::new("rate=4000 ws=4M base=64K");
    machine.run(300 * MS, 50_000);
    let older = machine.ram()[64 << 10..68 << 10].to_vec();
    machine.run(100 * MS, 50_000);
    // The first page of counters, with the header in it, as it was 100 ms ago: each counter in it is right in
    // itself, only not what the number of writes demands.
    machine.ram()[64 << 10..68 << 10].copy_from_slice(&older);
    let (report, lines) = machine.ask(b'c');
    assert!(report.failures > 0, "{report}");
    assert!(lines[0].starts_with("pagestorm: counter"), "{lines:?}");
}

#[test]
fn pages_give_away_counters_that_are_all_old() {
    let mut machine = Machine::new("rate=4000 ws=256K base=64K");
    machine.run(300 * MS, 50_000);
    let older = machine.ram()[64 << 10..68 << 10].to_vec();
    machine.run(100 * MS, 50_000);
    machine.ram()[64 << 10..68 << 10].copy_from_slice(&older);
    let options = machine.options.clone();
    let result = check_dump(machine.ram(), &options).unwrap();
    assert_eq!(result.failures.len(), 63, "each page was written again since");
}

#[test]
fn a_dump_that_cannot_be_checked_says_why() {
    let options = Options::parse("ws=1M base=64K").unwrap();
    let short = check_dump(&mut [0; 4096], &options);
    assert_eq!(short, Err(DumpError::Short { have: 4096, need: 0x11_0000 }));
    let empty = check_dump(&mut vec![0; 0x11_0000], &options);
    assert_eq!(empty, Err(DumpError::NoCounters { gpa: 0x1_0000 }));
}
