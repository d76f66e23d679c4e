//! How full a migration keeps its link: real migrations by `tern demo` over its shaped link, for each rate, round trip and loss.
//!
//! A row is met when the whole migration took at most 1.15 times what the link needs for the bytes that crossed it, and four round trips. The memory that moves is
//! chosen so that a row takes about as long as was asked for; an eighth of it crosses the link.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use clap::Parser;
use serde_json::Value;

/// What a migration may take beyond the time that the link needs for its bytes.
const SHARE: f64 = 1.15;
const ROUND_TRIPS: u32 = 4;
/// Of the demo's built-in memory crosses the link.
const CROSSES: f64 = 0.12;
const MIB: u64 = 1 << 20;
/// The least and the most memory that the demo's VM can have, MiB.
const MEMORY_MIB: std::ops::RangeInclusive<u64> = 32..=3072;

#[derive(Parser)]
struct Options {
    /// The `tern` program. Needs /dev/kvm.
    #[arg(long)]
    tern: PathBuf,
    /// Rates of the link, Mbit/s.
    #[arg(long, value_delimiter = ',', default_value = "10,100,500,1000")]
    rates: Vec<u32>,
    /// Round trips, ms.
    #[arg(long, value_delimiter = ',', default_value = "1,50,200")]
    round_trips: Vec<u32>,
    /// Packets lost by chance, percent.
    #[arg(long, value_delimiter = ',', default_value = "0,0.5")]
    losses: Vec<f64>,
    /// How long a row is to take, seconds, as far as memory allows.
    #[arg(long, default_value_t = 8.0)]
    seconds: f64,
    /// The most memory that moves, MiB.
    #[arg(long, default_value_t = 1024)]
    memory_most: u64,
}

/// One migration.
struct Row {
    wan_bytes: u64,
    total: Duration,
    dropped_bytes: u64,
    downtime_ms: f64,
}

fn main() -> ExitCode {
    let options = Options::parse();
    println!(
        "| rate | round trip | loss | WAN bytes | at the link's rate | time | ratio | allowed | met | dropped | downtime |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    for &rate in &options.rates {
        for &rtt in &options.round_trips {
            for &loss in &options.losses {
                match run(&options, rate, rtt, loss) {
                    Ok(row) => println!("{}", line(&row, rate, rtt, loss)),
                    Err(why) => {
                        eprintln!("{rate} Mbit/s, {rtt} ms, {loss}%: {why}");
                        return ExitCode::FAILURE;
                    }
                }
            }
        }
    }
    ExitCode::SUCCESS
}

fn line(row: &Row, rate: u32, rtt: u32, loss: f64) -> String {
    let megabytes = |bytes: u64| Duration::from_micros(bytes).as_secs_f64();
    let needed = megabytes(row.wan_bytes) * 8.0 / f64::from(rate);
    let allowed = SHARE * needed + (ROUND_TRIPS * Duration::from_millis(rtt.into())).as_secs_f64();
    let total = row.total.as_secs_f64();
    format!(
        "| {rate} Mbit/s | {rtt} ms | {loss}% | {:.1} MB | {needed:.2} s | {total:.2} s | {:.2} | {allowed:.2} s | {} | {:.2} MB | {:.0} ms |",
        megabytes(row.wan_bytes),
        total / needed,
        if total <= allowed { "yes" } else { "no" },
        megabytes(row.dropped_bytes),
        row.downtime_ms
    )
}

/// Memory of which about so much crosses the link as it carries in the time asked for.
fn memory_mib(options: &Options, rate: u32) -> u64 {
    let seconds = Duration::try_from_secs_f64(options.seconds * f64::from(rate) / 8.0 / CROSSES)
        .unwrap_or(Duration::MAX);
    let bytes = u64::try_from(seconds.as_micros()).unwrap_or(u64::MAX);
    let mebibytes = (bytes / MIB).min(options.memory_most);
    mebibytes.clamp(*MEMORY_MIB.start(), *MEMORY_MIB.end()) / 2 * 2
}

fn run(options: &Options, rate: u32, rtt: u32, loss: f64) -> Result<Row, String> {
    let output = Command::new(Path::new(&options.tern))
        .args(["demo", "--json", "--rate", &format!("{rate}M"), "--rtt", &format!("{rtt}ms")])
        .args(["--loss", &loss.to_string(), "--memory", &format!("{}M", memory_mib(options, rate))])
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{} cannot be run: {error}", options.tern.display()))?;
    let report: Value = serde_json::from_slice(&output.stdout).map_err(|error| {
        format!("no report ({error}): {}", String::from_utf8_lossy(&output.stderr).trim_end())
    })?;
    let number = |name: &str| report[name].as_u64().ok_or_else(|| format!("the report has no {name}"));
    if report["outcome"] != "completed" {
        return Err(format!("it did not complete: {report}"));
    }
    Ok(Row {
        wan_bytes: number("wan_bytes")?,
        total: Duration::from_millis(number("total_ms")?),
        dropped_bytes: number("wan_dropped_bytes")?,
        downtime_ms: report["downtime_ms"].as_f64().ok_or("the report has no downtime_ms")?,
    })
}
