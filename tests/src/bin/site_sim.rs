//! Simulates sites of several sizes through all scenarios, and writes the figures as a table and a picture.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use clap::Parser;
use tern_tests::site_sim::{Options, Scenario, filters, plot, run_all, table};

/// Simulated sites: the real index code of `dht` in virtual time; one seed replays a run.
#[derive(Debug, Parser)]
struct Cli {
    /// Sizes of sites, peers.
    #[arg(long, value_delimiter = ',', default_values_t = [3, 100, 1000, 10_000])]
    peers: Vec<usize>,
    /// Run this scenario alone.
    #[arg(long)]
    scenario: Option<Scenario>,
    /// Replays a run.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Simulate little: seconds a site.
    #[arg(long)]
    quick: bool,
    /// Write site-simulation.svg here, and the tables into site-simulation.md.
    #[arg(long, value_name = "DIR")]
    docs: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Between these lines of site-simulation.md stand the tables; the text around them is kept.
const BEGIN: &str = "<!-- site-sim: tables begin -->";
const END: &str = "<!-- site-sim: tables end -->";

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    ensure!(
        cli.peers.iter().all(|peers| *peers >= 3),
        "a site needs three peers: one asks, one holds, one owns"
    );
    let options = if cli.quick { Options::quick(cli.seed) } else { Options::full(cli.seed) };
    let scenarios = cli.scenario.map_or_else(|| Scenario::ALL.to_vec(), |scenario| vec![scenario]);
    let began = Instant::now();
    let all = run_all(&cli.peers, &scenarios, options);
    let command = format!(
        "cargo run --release -p tern-tests --bin site-sim --{} --seed {} --docs docs",
        if cli.quick { " --quick" } else { "" },
        cli.seed
    );
    let tables = format!(
        "Made by `{command}`.\n\n### A lookup of a 1 GiB VM\n\n{}\n### The index, a host\n\n{}\n### Holder filters in its place, or besides it (computed)\n\n{}",
        table::lookups(&all),
        table::hosts(&all),
        filters::table(&all)
    );
    if cli.json {
        println!("{}", serde_json::to_string_pretty(&all)?);
    } else {
        println!("seed {}\n\n{tables}", cli.seed);
    }
    eprintln!("{} runs in {:.0} s", all.len(), began.elapsed().as_secs_f64());
    if let Some(docs) = cli.docs {
        let page = docs.join("site-simulation.md");
        let text = std::fs::read_to_string(&page).with_context(|| page.display().to_string())?;
        let (before, rest) = text.split_once(BEGIN).with_context(|| format!("{BEGIN} is missing"))?;
        let (_, after) = rest.split_once(END).with_context(|| format!("{END} is missing"))?;
        std::fs::write(&page, format!("{before}{BEGIN}\n{tables}\n{END}{after}"))?;
        std::fs::write(docs.join("site-simulation.svg"), plot::svg(&all))?;
    }
    for figures in &all {
        let (peers, what) = (figures.peers, figures.scenario.name());
        ensure!(figures.wrong_accepted == 0, "{peers} peers, {what}: wrong pages were accepted");
        ensure!(figures.unended == 0, "{peers} peers, {what}: {} lookups did not end", figures.unended);
    }
    Ok(())
}
