//! `tern demo`: two sites on loopback, a VM that moves between them over a shaped link, and a report.
//!
//! `scenario` tells the story. `content` and `guest` make the memories, `bound` the yardstick; [`link`] and [`shaper`] are
//! the WAN; `process`, `sites` and `vm` are the processes; `progress` and `report` are what is shown.

mod bound;
mod content;
mod error;
mod guest;
pub mod link;
mod options;
mod process;
mod progress;
mod report;
mod scenario;
pub mod shaper;
mod sites;
mod vm;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use error::DemoError;
pub use options::Options;
use report::Report;
use tokio::signal::unix::{SignalKind, signal};

/// Plays the demo and shows its report; the exit code says whether all was right.
pub fn run(options: &Options) -> ExitCode {
    match start(options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let mut text = format!("tern demo: {error}");
            let mut source = std::error::Error::source(&error);
            while let Some(error) = source {
                text.push_str(&format!(": {error}"));
                source = error.source();
            }
            eprintln!("{text}");
            ExitCode::FAILURE
        }
    }
}

fn start(options: &Options) -> Result<bool, DemoError> {
    let logs = Logs::new(options.keep_logs.as_deref())?;
    let dir = tempfile::Builder::new()
        .prefix("tern-demo-")
        .tempdir()
        .map_err(DemoError::file("make a directory in", std::env::temp_dir()))?;
    // One thread: a child asks to be killed with the thread that started it, which must therefore be the main thread.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| DemoError::Process { what: "start", process: "demo".into(), source })?;
    let outcome = runtime.block_on(interruptible(options, dir.path(), logs.path()));
    // Work on content or bound that an error has made pointless is left behind.
    runtime.shutdown_background();
    let good = outcome.as_ref().is_ok_and(Report::is_good);
    let wanted = !good && !matches!(outcome, Err(DemoError::Interrupted | DemoError::Options(_)));
    if let Some(path) = logs.settle(wanted) {
        eprintln!("The logs of all processes are in {}", path.display());
    }
    let report = outcome?;
    show(options, &report)?;
    Ok(good)
}

/// Plays until the end or a signal. Dropping the play kills its processes.
async fn interruptible(options: &Options, dir: &Path, logs: &Path) -> Result<Report, DemoError> {
    let watch = |kind| {
        signal(kind).map_err(|source| DemoError::Process {
            what: "watch signals of",
            process: "demo".into(),
            source,
        })
    };
    let (mut interrupt, mut terminate) = (watch(SignalKind::interrupt())?, watch(SignalKind::terminate())?);
    tokio::select! {
        report = scenario::play(options, dir, logs) => report,
        _ = interrupt.recv() => Err(DemoError::Interrupted),
        _ = terminate.recv() => Err(DemoError::Interrupted),
    }
}

fn show(options: &Options, report: &Report) -> Result<(), DemoError> {
    if !options.json {
        print!("{report}");
        return Ok(());
    }
    eprint!("{report}");
    let json = serde_json::to_string(report)
        .map_err(|error| DemoError::Answer(format!("the report cannot be written as JSON: {error}")))?;
    println!("{json}");
    Ok(())
}

/// Where the processes log to.
#[derive(Debug)]
enum Logs {
    /// Where the user wanted them.
    Given(PathBuf),
    /// A directory that goes when all went well.
    Temporary(tempfile::TempDir),
}

impl Logs {
    fn new(given: Option<&Path>) -> Result<Self, DemoError> {
        match given {
            Some(path) => {
                std::fs::create_dir_all(path).map_err(DemoError::file("create", path))?;
                Ok(Self::Given(path.to_owned()))
            }
            None => tempfile::Builder::new()
                .prefix("tern-demo-logs-")
                .tempdir()
                .map(Self::Temporary)
                .map_err(DemoError::file("make a directory in", std::env::temp_dir())),
        }
    }

    fn path(&self) -> &Path {
        match self {
            Self::Given(path) => path,
            Self::Temporary(dir) => dir.path(),
        }
    }

    /// Drops temporary logs unless something went wrong; says where the others are.
    fn settle(self, wanted: bool) -> Option<PathBuf> {
        match self {
            Self::Given(path) => Some(path),
            Self::Temporary(dir) => wanted.then(|| dir.keep()),
        }
    }
}
