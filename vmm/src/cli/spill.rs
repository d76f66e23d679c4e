//! `vmm spill`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, Subcommand};

use super::{CliError, Identity, LogFormat, print_line, start_logging};
use crate::migrate::ticket::Ticket;
use crate::migrate::{HostIdentity, MigrateError, serve_spill};
use crate::spill::SpillFile;

#[derive(Debug, Subcommand)]
pub(super) enum Spill {
    /// Serve a spill file to the destination that its VM runs at, until the VM has all of its memory; then remove the file. It starts no VM
    Send(Send),
}

#[derive(Debug, Args)]
pub(super) struct Send {
    /// The file that `vmm migrate --spill DIR` left in DIR
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The destination's ticket, as `vmm migrate --to` had it
    #[arg(long, value_name = "TICKET", value_parser = ticket)]
    to: Ticket,
    #[command(flatten)]
    identity: Identity,
    /// The keys of the hosts that this one talks to [default: authorized_keys beside the identity]
    #[arg(long, value_name = "FILE")]
    authorized_keys: Option<PathBuf>,
    /// Leave the file there
    #[arg(long)]
    keep: bool,
    /// Print what was given as one line of JSON
    #[arg(long)]
    json: bool,
    /// How to log, on standard error
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

fn ticket(given: &str) -> Result<Ticket, MigrateError> {
    given.parse()
}

pub(super) async fn send(options: Send) -> Result<ExitCode, CliError> {
    start_logging(options.log_format);
    let key = options.identity.key()?;
    let authorized = options.authorized_keys.unwrap_or_else(|| key.with_file_name("authorized_keys"));
    let host = Arc::new(HostIdentity::load_or_create(&key, &authorized)?);
    let path = options.file;
    // All of it is read and checked.
    let opened = tokio::task::spawn_blocking(move || SpillFile::open(&path)).await;
    let file = Arc::new(opened.map_err(|_| MigrateError::Died)??);
    let served = serve_spill(&file, &options.to, &host).await?;
    if !options.keep {
        file.remove()?;
    }
    if options.json {
        print_line(&serde_json::to_string(&served)?)?;
    } else {
        print_line(&format!(
            "the VM has all of its memory: {} pages were sent from the file, {} of them while it waited, in {} ms",
            served.pages, served.faults, served.total_ms
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}
