//! `vmm snapshot` and `vmm restore`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::devices::DeviceArgs;
use super::{CliError, Common, Control, commands, ended, parse, show};
use crate::config::Serial;
use crate::control::api::SnapshotRequest;
use crate::control::client::Client;
use crate::process::{self, RestoreOptions};

#[derive(Debug, Args)]
pub(super) struct Take {
    #[command(flatten)]
    control: Control,
    /// The directory; made if it is not there. What snapshots there hold already is not written again
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// The snapshot's name [default: the next number]
    #[arg(long, value_parser = parse::snapshot_name)]
    name: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct Restore {
    /// The directory that `vmm snapshot --to` wrote into
    #[arg(long, value_name = "DIR")]
    from: PathBuf,
    /// The snapshot [default: the newest]
    #[arg(long, value_parser = parse::snapshot_name)]
    name: Option<String>,
    /// Leave the VM paused
    #[arg(long)]
    paused: bool,
    /// Where the serial port goes: stdio, file=PATH or off
    #[arg(long, value_name = "WHERE", default_value = "stdio", value_parser = parse::serial)]
    serial: Serial,
    #[command(flatten)]
    devices: DeviceArgs,
    #[command(flatten)]
    common: Common,
}

pub(super) async fn take(options: Take) -> Result<ExitCode, CliError> {
    let to = commands::absolute(options.to)?;
    let request = SnapshotRequest { to, name: options.name };
    let report = Client::new(&options.control.control)?.snapshot(&request).await?;
    commands::print_answer(&options.control, &report, || show::snapshot(&report))?;
    Ok(ExitCode::SUCCESS)
}

pub(super) async fn restore(options: Restore) -> Result<ExitCode, CliError> {
    let Restore { from, name, paused, serial, devices, common } = options;
    let common = common.prepare()?;
    let options = RestoreOptions { from, name, paused, serial, devices: devices.options() };
    Ok(ended(&process::restore(&common, options).await?))
}
