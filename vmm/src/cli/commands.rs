//! What an operator asks of a running VM over its control socket.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::{CliError, Control, Migrate, print_line, show};
use crate::control::api::{ErrorBody, EventKind, MigrateRequest, VmState, VmStatus};
use crate::control::client::{Client, ClientError, EventStream};
use crate::migrate::report::{Phase, Report};

/// The VM still runs here.
const EXIT_HERE: u8 = 4;
/// Nobody knows yet where it runs.
const EXIT_IN_DOUBT: u8 = 5;
/// How often progress is told where standard error is not a terminal.
const LOG_EVERY: Duration = Duration::from_secs(1);

pub(super) async fn status(control: &Control) -> Result<ExitCode, CliError> {
    print_status(control, &Client::new(&control.control)?.status().await?)
}

pub(super) async fn operate(control: &Control, operation: &str) -> Result<ExitCode, CliError> {
    print_status(control, &Client::new(&control.control)?.operate(operation).await?)
}

pub(super) async fn resolve(control: &Control, run_here: bool) -> Result<ExitCode, CliError> {
    print_status(control, &Client::new(&control.control)?.resolve(run_here).await?)
}

pub(super) async fn balloon(control: &Control, size_bytes: u64) -> Result<ExitCode, CliError> {
    print_status(control, &Client::new(&control.control)?.balloon(size_bytes).await?)
}

/// A path for the VM's process, which may stand in another directory than we do.
pub(super) fn absolute(path: PathBuf) -> Result<String, CliError> {
    let path = std::path::absolute(&path).map_err(|error| CliError::Path(path, error))?;
    path.into_os_string().into_string().map_err(|path| CliError::NotText(path.into()))
}

fn print_status(control: &Control, status: &VmStatus) -> Result<ExitCode, CliError> {
    print_answer(control, status, || show::status(status))?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn print_answer(
    control: &Control,
    answer: &impl Serialize,
    text: impl FnOnce() -> String,
) -> Result<(), CliError> {
    if control.json { print_line(&serde_json::to_string(answer)?) } else { print_line(text().trim_end()) }
}

/// Asks for the migration, and until it is answered shows its events and turns Ctrl-C into a cancel.
pub(super) async fn migrate(options: &Migrate) -> Result<ExitCode, CliError> {
    let client = Client::new(&options.control.control)?;
    let spill = options.spill.clone().map(absolute).transpose()?;
    let request = MigrateRequest {
        to: options.to.clone(),
        downtime_ms: options.downtime,
        mode: options.mode,
        bandwidth_bits: options.bandwidth,
        delta_cache_bytes: options.delta_cache,
        auto_converge: options.auto_converge,
        spill,
        resume_for_ms: options.resume_for,
    };
    if options.dry_run {
        let forecast = client.dry_run(&request).await?;
        print_answer(&options.control, &forecast, || show::forecast(&forecast))?;
        return Ok(ExitCode::SUCCESS);
    }
    // Followed before the migration begins, so that nothing of it is missed.
    let follower = Follower::new(client.events().await?);
    let follower = tokio::spawn(follower.follow());
    let interrupts = tokio::spawn(cancel_on_interrupt(client.clone()));
    let answer = client.migrate(&request).await;
    interrupts.abort();
    follower.abort();
    // A follower that was ended in the middle of a line leaves it to us to end the line.
    if follower.await.is_err() && std::io::stderr().is_terminal() {
        eprintln!();
    }
    finish(&options.control, answer)
}

fn finish(control: &Control, answer: Result<Report, ClientError>) -> Result<ExitCode, CliError> {
    match answer {
        Ok(report) => {
            print_answer(control, &report, || show::report(&report))?;
            Ok(ExitCode::SUCCESS)
        }
        Err(ClientError::Refused(_, error)) => {
            eprintln!("not migrated: {}", error.message);
            let in_doubt = error.code == "in_doubt";
            if control.json {
                print_line(&serde_json::to_string(&ErrorBody { error })?)?;
            }
            Ok(ExitCode::from(if in_doubt { EXIT_IN_DOUBT } else { EXIT_HERE }))
        }
        Err(error) => Err(error.into()),
    }
}

/// The first Ctrl-C cancels the migration; its answer then says how it ended.
async fn cancel_on_interrupt(client: Client) {
    loop {
        if tokio::signal::ctrl_c().await.is_err() {
            return;
        }
        eprintln!("\ncancelling; the VM goes on here");
        if let Err(error) = client.cancel().await {
            eprintln!("not cancelled: {error}");
        }
    }
}

/// Shows events on standard error.
struct Follower {
    events: EventStream,
    terminal: bool,
    last: Option<(Phase, Instant)>,
}

impl Follower {
    fn new(events: EventStream) -> Self {
        Self { events, terminal: std::io::stderr().is_terminal(), last: None }
    }

    async fn follow(mut self) {
        loop {
            match self.events.next().await {
                Ok(Some(event)) => self.show(event.kind),
                Ok(None) => return,
                Err(error) => {
                    eprintln!("progress cannot be followed any more: {error}");
                    return;
                }
            }
        }
    }

    fn show(&mut self, event: EventKind) {
        match event {
            EventKind::Progress { progress } => {
                let due = self.last.is_none_or(|(phase, at)| {
                    self.terminal || phase != progress.phase || at.elapsed() >= LOG_EVERY
                });
                if due {
                    self.last = Some((progress.phase, Instant::now()));
                    let line = show::progress(&progress);
                    if self.terminal {
                        eprint!("\r\x1b[K{line}")
                    } else {
                        eprintln!("{line}")
                    }
                    // Standard error that is gone takes the display with it, not the migration.
                    let _shown = std::io::stderr().flush();
                }
            }
            EventKind::State { state: VmState::InDoubt, reason } => {
                eprintln!("\n{}", reason.unwrap_or_else(|| "in doubt".to_owned()));
            }
            EventKind::State { .. }
            | EventKind::Incoming { .. }
            | EventKind::Report { .. }
            | EventKind::MigrationFailed { .. }
            | EventKind::Lagged { .. } => {}
        }
    }
}
