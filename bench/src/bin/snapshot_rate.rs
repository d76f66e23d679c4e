//! Measures `vmm snapshot` and `vmm restore` against a plain copy of as many bytes to the same disk, in one run.
//!
//! `cargo build --release -p vmm && cargo run --release -p bench --bin snapshot-rate [-- --mib N --dir DIR]` prints one JSON object. The
//! guest is pagestorm, paused, with N MiB of pseudo-random content in its memory: the worst case, for nothing of it is zero or there already.
//! What is timed is what a user waits for, start of the process included; the copy is read from the page cache and synced, as a snapshot is.

use std::error::Error;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use bench::{Killed, random_pages};
use clap::Parser;
use page::PAGE_SIZE;

/// Snapshot and restore against a plain copy.
#[derive(Parser)]
struct Options {
    /// Content of the guest's memory, MiB.
    #[arg(long, default_value_t = 512)]
    mib: usize,
    /// Where to write.
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    dir: PathBuf,
}

const PATIENCE: Duration = Duration::from_secs(120);

struct Place {
    vmm: PathBuf,
    dir: tempfile::TempDir,
}

impl Place {
    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.vmm);
        command.args(words).current_dir(&self.dir).env("XDG_CONFIG_HOME", self.dir.path());
        command.stdin(Stdio::null());
        command
    }

    fn vm(&self, words: &[&str]) -> io::Result<Killed> {
        let log = File::create(self.dir.path().join("log"))?;
        self.command(words).args(["--serial", "off"]).stdout(Stdio::null()).stderr(log).spawn().map(Killed)
    }

    fn operate(&self, words: &[&str]) -> Result<Output, Box<dyn Error>> {
        let output = self.command(words).output()?;
        if output.status.success() {
            return Ok(output);
        }
        let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
        Err(format!("vmm {words:?}: {}{log}", String::from_utf8_lossy(&output.stderr)).into())
    }

    /// Asks again and again until the VM behind `control` is in `state`.
    fn wait_for(&self, control: &str, state: &str) -> Result<(), Box<dyn Error>> {
        let end = Instant::now() + PATIENCE;
        loop {
            let output = self.command(&["status", "--json", "--control", control]).output()?;
            let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
            if status["state"] == state {
                return Ok(());
            }
            if Instant::now() > end {
                return Err(self
                    .operate(&["status", "--control", control])
                    .err()
                    .unwrap_or("too slow".into()));
            }
        }
    }
}

fn timed<T>(work: impl FnOnce() -> Result<T, Box<dyn Error>>) -> Result<(f64, T), Box<dyn Error>> {
    let start = Instant::now();
    let done = work()?;
    Ok((start.elapsed().as_secs_f64(), done))
}

fn copy(from: &Path, to: &Path) -> Result<(), Box<dyn Error>> {
    fs::copy(from, to)?;
    Ok(File::open(to)?.sync_all()?)
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = Options::parse();
    let vmm = std::env::current_exe()?.with_file_name("vmm");
    if !vmm.exists() {
        return Err(format!("{} is missing: `cargo build --release -p vmm` first", vmm.display()).into());
    }
    let place = Place { vmm, dir: tempfile::tempdir_in(&options.dir)? };
    let path = |name: &str| place.dir.path().join(name);
    guest_images::write_pagestorm(&path("pagestorm"))?;
    let bytes = options.mib << 20;
    fs::write(path("content"), random_pages(bytes / PAGE_SIZE, 1).as_flattened())?;
    let (copy_s, ()) = timed(|| copy(&path("content"), &path("copy")))?;

    let memory = format!("{}M", (options.mib + 64).next_multiple_of(2));
    let load = ["--load", "file=content,addr=0x2000000", "--memory", &memory, "--control", "a.sock"];
    let run = ["run", "--kernel", "pagestorm", "--cmdline", "rate=1 ws=1M base=4M"];
    let vm = place.vm(&[&run[..], &load].concat())?;
    place.wait_for("a.sock", "running")?;
    place.operate(&["pause", "--control", "a.sock"])?;
    let snapshot = |name| ["snapshot", "--json", "--control", "a.sock", "--to", "snapshots", "--name", name];
    let (first_s, first) = timed(|| place.operate(&snapshot("first")))?;
    let (second_s, second) = timed(|| place.operate(&snapshot("second")))?;
    drop(vm);
    let (restore_s, _vm) = timed(|| {
        let words = ["restore", "--from", "snapshots", "--name", "first", "--paused", "--control", "b.sock"];
        let vm = place.vm(&words)?;
        place.wait_for("b.sock", "paused")?;
        Ok(vm)
    })?;
    let mb_per_s = |seconds: f64| bytes as f64 / seconds / 1e6;
    let report = serde_json::json!({
        "content_bytes": bytes,
        "copy": { "s": copy_s, "mb_per_s": mb_per_s(copy_s) },
        "snapshot": { "s": first_s, "mb_per_s": mb_per_s(first_s), "ratio_to_copy": copy_s / first_s },
        "second_snapshot": { "s": second_s, "mb_per_s": mb_per_s(second_s), "ratio_to_copy": copy_s / second_s },
        "restore": { "s": restore_s, "mb_per_s": mb_per_s(restore_s), "ratio_to_copy": copy_s / restore_s },
        "reports": [
            serde_json::from_slice::<serde_json::Value>(&first.stdout)?,
            serde_json::from_slice::<serde_json::Value>(&second.stdout)?,
        ],
    });
    println!("{report:#}");
    Ok(())
}
