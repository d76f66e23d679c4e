//! Runs simulated migrations, seed after seed, on all cores, and prints the first that breaks a rule.

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use tern_tests::world::{Options, Story, run_many};

/// Simulated migrations: one seed is one run, with its own guest, link, site and faults.
#[derive(Debug, Parser)]
struct Cli {
    /// How many seeds to run.
    #[arg(long, default_value_t = 10_000)]
    seeds: u64,
    /// The first.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Run this seed alone.
    #[arg(long)]
    seed: Option<u64>,
    /// Tell this story with every seed; otherwise they take turns.
    #[arg(long)]
    story: Option<Story>,
    /// Print every step of the seed.
    #[arg(long, requires = "seed")]
    trace: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let (from, seeds) = cli.seed.map_or((cli.from, cli.seeds), |seed| (seed, 1));
    let began = Instant::now();
    match run_many(cli.story, from, seeds, Options { mutation: None, trace: cli.trace }) {
        Ok(total) => {
            let seconds = began.elapsed().as_secs_f64();
            println!(
                "{} seeds from {from} ran clean in {seconds:.1} s ({:.0} a second): {} attempts, {} VMs moved, {} new connections before Commit, {} \
                 by post-copy with {} faults, {} pauses and {} new connections, {} steps",
                total.runs,
                total.runs as f64 / seconds,
                total.attempts,
                total.moved,
                total.resumes,
                total.postcopies,
                total.faults,
                total.starved,
                total.reconnects,
                total.steps
            );
            ExitCode::SUCCESS
        }
        Err(violation) => {
            println!("{violation}");
            ExitCode::FAILURE
        }
    }
}
