//! The hardware lane: `vmm` on a KVM with hardware virtualisation that QEMU's TCG emulates.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::Instant;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use tern_tests::lane::inputs::{self, FirstLevel};
use tern_tests::lane::outside::LaneError;
use tern_tests::lane::verdict::Part;
use tern_tests::lane::{inside, limits, outside};
use tern_tests::real::binaries;

/// Runs `vmm` in Debian kernels under QEMU's TCG, whose SVM makes a real kvm_amd, with guests that a KVM without hardware
/// virtualisation cannot run. Needs qemu-system-x86_64, the test Linux (guest-images/linux/build) and about 2.5 GiB of memory; no
/// /dev/kvm.
#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    command: Option<Role>,
    /// Run this part alone
    #[arg(long)]
    part: Option<Part>,
    /// Keep the first levels' files and their consoles' logs here [default: a directory that is removed]
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// What runs in a first level
    #[command(hide = true)]
    Inside {
        /// Which steps
        part: Part,
    },
}

fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    match cli.command {
        Some(Role::Inside { part }) => {
            tokio::runtime::Runtime::new().context("a runtime")?.block_on(inside::run(part));
            Ok(ExitCode::SUCCESS)
        }
        None => outside(cli.part, cli.keep),
    }
}

fn outside(part: Option<Part>, keep: Option<PathBuf>) -> anyhow::Result<ExitCode> {
    let began = Instant::now();
    let temporary = tempfile::tempdir().context("a directory for the first levels' files")?;
    let work = keep.unwrap_or_else(|| temporary.path().to_owned());
    std::fs::create_dir_all(&work).with_context(|| work.display().to_string())?;
    let binaries = binaries::folder();
    let mut parts = Vec::new();
    for part in part.map_or_else(|| Part::ALL.to_vec(), |part| vec![part]) {
        parts.push((part, inputs::prepare(part, &binaries, &work)?));
    }
    // One CPU each, and side by side.
    let results: Vec<_> = thread::scope(|scope| {
        let work = &work;
        let running: Vec<_> = parts
            .iter()
            .map(|(part, first_level)| scope.spawn(move || run(*part, first_level, work)))
            .collect();
        running.into_iter().map(|part| part.join().expect("a part does not panic")).collect()
    });
    let ok = results.iter().all(Result::is_ok);
    println!(
        "the lane took {} s, and {}",
        began.elapsed().as_secs(),
        if ok { "all is well" } else { "failed" }
    );
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs `part`, and once more if it froze.
fn run(part: Part, first_level: &FirstLevel, work: &Path) -> Result<(), LaneError> {
    let name = part.name();
    let log = work.join(format!("{name}.log"));
    let mut attempt = 1;
    loop {
        let result = outside::run(first_level, part, &log, |verdict| {
            let word = if verdict.ok { "ok    " } else { "FAILED" };
            println!("{name} {word} {:?} ({:.0} s): {}", verdict.step, verdict.seconds, verdict.said);
        });
        let Err(error) = result else { return result };
        print_tail(name, &log);
        eprintln!("{name}: {error}");
        if attempt == limits::ATTEMPTS || !error.may_be_a_freeze() {
            return Err(error);
        }
        eprintln!(
            "{name}: once more, because under TCG a kernel, of either level, sleeps for ever now and then"
        );
        attempt += 1;
    }
}

/// The end of the console, for whoever has to find out.
fn print_tail(name: &str, log: &Path) {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let tail = &lines[lines.len().saturating_sub(limits::TAIL_LINES)..];
    eprintln!("---- {name}: the end of the first level's console\n{}", tail.join("\n"));
}
