//! Snapshots, as an operation of a process and as what a process begins with.

use std::path::PathBuf;
use std::sync::Arc;

use super::run::{self, Common, Signals};
use super::{Ending, Process, ProcessError, wrong_state};
use crate::config::{DeviceOptions, Serial};
use crate::control::api::{SnapshotRequest, VmState};
use crate::machine::Machine;
use crate::snapshot::{self, Snapshot, SnapshotError, SnapshotReport, is_name};

/// What `vmm restore` is asked for.
#[derive(Clone, Debug)]
pub struct RestoreOptions {
    /// The directory.
    pub from: PathBuf,
    /// The snapshot's name; none takes the newest.
    pub name: Option<String>,
    /// Whether the VM is to stand still at first.
    pub paused: bool,
    /// Where the serial port goes.
    pub serial: Serial,
    /// The virtio devices.
    pub devices: DeviceOptions,
}

/// Makes a VM of a snapshot, and stays until it has ended or runs elsewhere.
/// # Errors
/// What is missing, damaged or wrong, before the VM has run. Later failures are in [`Ending`].
pub async fn restore(common: &Common, options: RestoreOptions) -> Result<Ending, ProcessError> {
    let signals = Signals::new()?;
    let (socket, process) = run::start(common).await?;
    let RestoreOptions { from, name, paused, serial, devices } = options;
    let build = move || -> Result<Arc<Machine>, SnapshotError> {
        Snapshot::open(&from, name.as_deref())?.restore(&serial, &devices)
    };
    let machine = tokio::task::spawn_blocking(build).await?.map_err(ProcessError::Restore)?;
    process.take_over(common, machine, !paused).await?;
    process.serve(socket, signals).await
}

impl Process {
    /// Writes a snapshot; a VM that runs goes on running. The snapshot goes on if the caller stops waiting.
    /// # Errors
    /// If the VM is neither running nor paused, or the snapshot fails; the VM is as it was.
    pub async fn snapshot(
        self: &Arc<Self>,
        request: SnapshotRequest,
    ) -> Result<SnapshotReport, ProcessError> {
        let SnapshotRequest { to, name } = request;
        let to = PathBuf::from(to);
        if !to.is_absolute() {
            return Err(ProcessError::Snapshot(SnapshotError::Relative(to)));
        }
        if let Some(name) = name.as_ref().filter(|name| !is_name(name)) {
            return Err(ProcessError::Snapshot(SnapshotError::Name(name.clone())));
        }
        let (machine, busy) = {
            let _step = self.steps.lock().await;
            let machine = self.machine_complete("take a snapshot")?;
            let (state, _) = self.state();
            if state == VmState::Created {
                return Err(wrong_state("take a snapshot", state));
            }
            (machine, self.busy_with("a snapshot of it is being written"))
        };
        let saving = tokio::task::spawn_blocking(move || {
            let _busy = busy;
            snapshot::save(&machine, &to, name.as_deref())
        });
        saving.await?.map_err(|error| {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "a snapshot failed; the VM is as it was"
            );
            ProcessError::Snapshot(error)
        })
    }
}
