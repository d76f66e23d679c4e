//! pagestorm on QEMU's machines. Ignored by default: they need qemu-system-x86_64, and /dev/kvm where they say so. Run them with
//! `cargo test -p guest-images --test qemu -- --ignored`.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use guest_images::pagestorm::layout::Layout;
use guest_images::pagestorm::options::Options;
use guest_images::pagestorm::pace::Order;
use guest_images::pagestorm::report::Report;

const KVM: &str =
    "-accel kvm -M microvm,rtc=on,acpi=off,isa-serial=on -cpu host,-cx16,-xsave,-avx,-arch-capabilities";
const TCG_PC: &str = "-accel tcg -M pc";
const TCG_MICROVM: &str = "-accel tcg -M microvm,rtc=on,acpi=off,isa-serial=on";
/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(60);

struct Qemu {
    child: Child,
    lines: Receiver<String>,
    folder: tempfile::TempDir,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended by itself; either way it is gone after this.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Qemu {
    fn start(machine: &str, command_line: &str, more: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let image = folder.path().join("pagestorm");
        guest_images::write_pagestorm(&image).expect("room for the image");
        let at = |name: &str| folder.path().join(name).display().to_string();
        let mut child = Command::new("qemu-system-x86_64")
            .args(machine.split_whitespace())
            .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-m", "128"])
            .arg("-kernel")
            .arg(&image)
            .args(["-append", command_line, "-serial", "stdio"])
            .args(["-device", "isa-debugcon,iobase=0xe9,chardev=beat"])
            .args(["-chardev", &format!("file,id=beat,path={}", at("beats"))])
            .args(["-monitor", &format!("unix:{},server=on,wait=off", at("monitor"))])
            .args(["-chardev", &format!("socket,id=gdb,path={},server=on,wait=off", at("gdb"))])
            .args(["-gdb", "chardev:gdb"])
            .args(more)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-system-x86_64 is installed");
        let (sender, lines) = sync_channel(1000);
        let serial = BufReader::new(child.stdout.take().expect("piped"));
        thread::spawn(move || {
            for line in serial.lines() {
                let Ok(line) = line else { return };
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self { child, lines, folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The next line that `wanted` takes; lines before it are dropped.
    fn line(&self, wanted: impl Fn(&str) -> bool) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left).expect("a line from the guest in time");
            if wanted(&line) {
                return line;
            }
        }
    }

    fn ready(&self) -> String {
        self.line(|line| line.starts_with("pagestorm:"))
    }

    fn ask(&mut self, letter: u8) -> Report {
        self.child.stdin.as_mut().expect("piped").write_all(&[letter]).expect("QEMU reads");
        let line = self.line(|line| line.starts_with('{'));
        Report::parse(&line).unwrap_or_else(|| panic!("not a report: {line}"))
    }

    /// Asks for the status until the guest has lived `uptime_ms`.
    fn live_until(&mut self, uptime_ms: u64) -> Report {
        let end = Instant::now() + PATIENCE;
        loop {
            let report = self.ask(b's');
            if report.uptime_ms >= uptime_ms {
                return report;
            }
            assert!(Instant::now() < end, "the guest's clock stands still: {report}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn beats(&self) -> u64 {
        fs::metadata(self.path("beats")).expect("the file that QEMU writes").len()
    }

    /// Gives QEMU's monitor a command and returns what it prints up to the next prompt.
    fn monitor(&self, command: &str) -> String {
        let mut socket = connect(&self.path("monitor"));
        until(&mut socket, "(qemu) ");
        writeln!(socket, "{command}").expect("QEMU reads");
        until(&mut socket, "(qemu) ")
    }

    /// Writes bytes into guest memory through QEMU's debugger port; the guest stands still meanwhile.
    fn poke(&self, gpa: u64, bytes: &[u8]) {
        let mut socket = connect(&self.path("gdb"));
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        for packet in [format!("M{gpa:x},{:x}:{hex}", bytes.len()), "D".to_owned()] {
            let sum = packet.bytes().fold(0u8, u8::wrapping_add);
            write!(socket, "${packet}#{sum:02x}").expect("QEMU reads");
            until(&mut socket, "$OK#9a");
            socket.write_all(b"+").expect("QEMU reads");
        }
    }
}

fn connect(path: &Path) -> UnixStream {
    let end = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(path) {
            Ok(socket) => {
                socket.set_read_timeout(Some(PATIENCE)).expect("not zero");
                return socket;
            }
            Err(error) => assert!(Instant::now() < end, "{}: {error}", path.display()),
        }
        thread::sleep(Duration::from_millis(10));
    }
}

fn until(socket: &mut UnixStream, end: &str) -> String {
    let mut text = Vec::new();
    let mut byte = [0];
    while !text.ends_with(end.as_bytes()) {
        socket.read_exact(&mut byte).expect("QEMU answers");
        text.push(byte[0]);
    }
    String::from_utf8_lossy(&text).into_owned()
}

fn lives_on(machine: &str, clock: &str) {
    for content in ["random", "text", "rewrite"] {
        for idle in ["halt", "spin"] {
            let mut qemu =
                Qemu::start(machine, &format!("rate=1000 ws=8M content={content} idle={idle}"), &[]);
            let ready = qemu.ready();
            assert!(ready.starts_with("pagestorm: ready ws=8388608 rate=1000"), "{ready}");
            assert!(ready.ends_with(&format!("clock={clock}")), "{ready}");
            let report = qemu.live_until(2000);
            // Lower bounds for a machine that builds and tests at the same time; on a quiet one both are within a percent.
            let due = report.uptime_ms;
            assert!(report.pages_written <= due + 2 && report.pages_written > due / 10, "{report}");
            assert!(report.heartbeats <= due + 2 && report.heartbeats > due / 10, "{report}");
            assert!(qemu.beats() >= report.heartbeats);
            let report = qemu.ask(b'c');
            assert_eq!((report.check, report.failures, report.first_bad), (1, 0, None), "{report}");
            assert!(report.pages_checked > due / 10, "{report}");
        }
    }
}

#[test]
#[ignore = "needs qemu-system-x86_64 and /dev/kvm"]
fn it_lives_on_kvm() {
    lives_on(KVM, "kvmclock");
}

#[test]
#[ignore = "needs qemu-system-x86_64"]
fn it_lives_on_an_emulated_pc() {
    lives_on(TCG_PC, "tsc");
}

#[test]
#[ignore = "needs qemu-system-x86_64"]
fn it_lives_on_an_emulated_microvm() {
    lives_on(TCG_MICROVM, "tsc");
}

#[test]
#[ignore = "needs qemu-system-x86_64 and /dev/kvm"]
fn a_bad_command_line_is_told_and_ends_the_machine() {
    for (command_line, why) in [
        ("rate=fast", "rate=fast is not a number"),
        ("ws=1G", "is not RAM at 0x8000000"),
        ("base=1M", "overlaps the guest's image"),
    ] {
        let mut qemu = Qemu::start(KVM, command_line, &[]);
        let line = qemu.ready();
        assert!(line.starts_with("pagestorm: cannot start: ") && line.contains(why), "{line}");
        assert!(qemu.child.wait().expect("a child").success());
    }
}

#[test]
#[ignore = "needs qemu-system-x86_64 and /dev/kvm"]
fn a_page_damaged_from_outside_is_found() {
    let command_line = "rate=0 ws=8M prefill=1 seed=5";
    let options = Options::parse(command_line).expect("a good command line");
    let layout = Layout::new(&options);
    let mut qemu = Qemu::start(KVM, command_line, &[]);
    qemu.ready();
    assert_eq!(qemu.ask(b'c').failures, 0);
    let gpa = layout.page_gpa(Order::new(options.seed, layout.data_pages).page_of(1000));
    qemu.poke(gpa + 4000, &[0xde, 0xad]);
    let report = qemu.ask(b'c');
    assert_eq!((report.check, report.failures, report.first_bad), (2, 1, Some(gpa)), "{report}");
    qemu.poke(layout.counter_gpa(1), &[0; 16]);
    assert_eq!(qemu.ask(b'c').failures, 2);
}

#[test]
#[ignore = "needs qemu-system-x86_64 and /dev/kvm"]
fn it_survives_a_migration() {
    let command_line = "rate=2000 ws=16M content=rewrite";
    let mut source = Qemu::start(KVM, command_line, &[]);
    source.ready();
    source.live_until(500);
    let address = format!("unix:{}", source.path("migration").display());
    let mut destination = Qemu::start(KVM, command_line, &["-incoming", &address]);
    // Its monitor answers once it listens.
    destination.monitor("info status");
    source.monitor(&format!("migrate {address}"));
    let before = destination.ask(b'r');
    assert!(before.pages_written > 200, "{before}");
    let after = destination.live_until(before.uptime_ms + 1000);
    assert!(after.pages_written > before.pages_written + 200, "{before} {after}");
    assert!(after.heartbeats > before.heartbeats + 50, "{before} {after}");
    let report = destination.ask(b'c');
    assert_eq!((report.failures, report.first_bad), (0, None), "{report}");
}
