//! The hardware lane: `vmm` on a KVM with hardware virtualisation that QEMU's TCG emulates.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use tern_tests::lane::{inputs, inside, limits, outside};
use tern_tests::real::binaries;

/// Runs `vmm` in a Debian kernel under QEMU's TCG, whose SVM makes a real kvm_amd, with guests that a KVM without hardware
/// virtualisation cannot run. Needs qemu-system-x86_64, the
/// test Linux (guest-images/linux/build) and about 2 GiB of memory; no /dev/kvm.
#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    command: Option<Role>,
    /// Keep the first level's files and the console's log here [default: a directory that is removed]
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// What runs in the first level
    #[command(hide = true)]
    Inside,
}

fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    match cli.command {
        Some(Role::Inside) => {
            tokio::runtime::Runtime::new().context("a runtime")?.block_on(inside::run());
            Ok(ExitCode::SUCCESS)
        }
        None => outside(cli.keep),
    }
}

fn outside(keep: Option<PathBuf>) -> anyhow::Result<ExitCode> {
    let temporary = tempfile::tempdir().context("a directory for the first level's files")?;
    let work = keep.unwrap_or_else(|| temporary.path().to_owned());
    std::fs::create_dir_all(&work).with_context(|| work.display().to_string())?;
    let first_level = inputs::prepare(&binaries::folder(), &work)?;
    for attempt in 1..=limits::ATTEMPTS {
        let log = work.join("console.log");
        let tell = |verdict: &tern_tests::lane::verdict::Verdict| {
            let word = if verdict.ok { "ok    " } else { "FAILED" };
            println!("{word} {:?} ({:.0} s): {}", verdict.step, verdict.seconds, verdict.said);
        };
        match outside::run(&first_level, &log, tell) {
            Ok(()) => return Ok(ExitCode::SUCCESS),
            Err(error) => {
                print_tail(&log);
                eprintln!("{error}");
                if attempt == limits::ATTEMPTS {
                    return Ok(ExitCode::FAILURE);
                }
                eprintln!("once more: under TCG a kernel, of either level, sleeps for ever now and then");
            }
        }
    }
    unreachable!("the last attempt returns")
}

/// The end of the console, for whoever has to find out.
fn print_tail(log: &std::path::Path) {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    eprintln!("---- the end of the first level's console");
    lines[lines.len().saturating_sub(limits::TAIL_LINES)..].iter().for_each(|line| eprintln!("{line}"));
}
