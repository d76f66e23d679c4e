//! A machine: assembled, run, paused, saved, and stopped.

use std::sync::Arc;

use page::PageSet;
use tokio::sync::watch;

use crate::config::{Serial, VmConfig};
use crate::memory::{Extent, Memory};

/// What another host needs to build the same machine before its state arrives.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct MachineDescription {
    /// Format of this description and of the saved state.
    pub version: u32,
    /// The VM's name, for people.
    pub name: String,
    /// Virtual CPUs.
    pub cpus: u8,
    /// RAM.
    pub extents: Vec<Extent>,
    /// The CPUID filter that it was launched with.
    pub cpu_template: crate::config::CpuTemplate,
}

/// Whether the VM runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunState {
    /// Built; its virtual CPUs have not run here yet.
    Created,
    /// Its virtual CPUs run.
    Running,
    /// Its virtual CPUs stand still.
    Paused,
    /// It has ended and cannot be resumed.
    Stopped(StopReason),
}

/// Why a VM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// An operator's `stop`.
    Requested,
    /// The guest asked for power-off or reset.
    Guest,
    /// The guest or KVM failed; registers and instruction bytes are in the log.
    Failed(String),
    /// It runs at the destination of a migration now.
    Migrated,
}

/// Which VM this is, and the epoch as whose owner this process may run it (see [`migration_proto::switchover`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ownership {
    /// Random, given at launch, the same for the VM's whole life.
    pub vm: migration_proto::VmId,
    /// How many owners it had before.
    pub epoch: migration_proto::Epoch,
}

/// The guest's heartbeat: bytes it wrote to the debug-console port 0xe9, as timed by this host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Heartbeat {
    /// Bytes seen.
    pub count: u64,
    /// When the first came in this process, nanoseconds of CLOCK_REALTIME; 0 before it.
    pub first_unix_ns: u64,
    /// When the last came, nanoseconds of CLOCK_REALTIME; 0 before the first.
    pub last_unix_ns: u64,
    /// The longest time between two in this process, nanoseconds of CLOCK_MONOTONIC.
    pub longest_gap_ns: u64,
}

/// Errors of a machine.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {}

/// A VM with its threads. Shared as `Arc<Machine>`; every method may be called from any thread.
#[derive(Debug)]
pub struct Machine {}

impl Machine {
    /// Builds the machine and loads its kernel; the virtual CPUs stand still until [`Machine::resume`].
    /// # Errors
    /// What is missing or wrong, and what to do about it.
    pub fn launch(_config: &VmConfig) -> Result<Arc<Self>, MachineError> {
        todo!()
    }
    /// Builds an empty machine that a migration will fill.
    /// # Errors
    /// As [`Machine::launch`].
    pub fn prepare(_description: &MachineDescription, _serial: Serial) -> Result<Arc<Self>, MachineError> {
        todo!()
    }
    /// What a destination needs to build the same.
    pub fn description(&self) -> MachineDescription {
        todo!()
    }
    /// Which VM it is: random and of epoch 0 at launch.
    pub fn ownership(&self) -> Ownership {
        todo!()
    }
    /// Written by a migration: at the destination before the VM runs.
    pub fn set_ownership(&self, _ownership: Ownership) {
        todo!()
    }
    /// Its RAM.
    pub fn memory(&self) -> &Arc<Memory> {
        todo!()
    }
    /// Lets the virtual CPUs run. Idempotent.
    /// # Errors
    /// If it has stopped.
    pub fn resume(&self) -> Result<(), MachineError> {
        todo!()
    }
    /// Returns when every virtual CPU stands still outside KVM_RUN with its pending exits completed. Idempotent.
    /// # Errors
    /// If it has stopped.
    pub fn pause(&self) -> Result<(), MachineError> {
        todo!()
    }
    /// Ends the VM.
    pub fn stop(&self, _reason: StopReason) {
        todo!()
    }
    /// Starts dirty logging, with an empty log.
    /// # Errors
    /// If KVM refuses.
    pub fn start_dirty_log(&self) -> Result<(), MachineError> {
        todo!()
    }
    /// The pages written since logging started or since the last call, by the guest (KVM's log) or the monitor; clears both.
    /// # Errors
    /// If KVM refuses.
    pub fn take_dirty(&self) -> Result<PageSet, MachineError> {
        todo!()
    }
    /// Ends dirty logging.
    /// # Errors
    /// If KVM refuses.
    pub fn stop_dirty_log(&self) -> Result<(), MachineError> {
        todo!()
    }
    /// All vCPU, interrupt controller, timer, clock and device state, versioned. The VM must be paused.
    /// # Errors
    /// If it runs, or KVM refuses.
    pub fn save_state(&self) -> Result<Vec<u8>, MachineError> {
        todo!()
    }
    /// Puts saved state into a machine that has not run here.
    /// # Errors
    /// A state of another version or shape, truncated or corrupt; or KVM refuses.
    pub fn load_state(&self, _bytes: &[u8]) -> Result<(), MachineError> {
        todo!()
    }
    /// Follows the run state.
    pub fn watch(&self) -> watch::Receiver<RunState> {
        todo!()
    }
    /// The guest's heartbeat so far.
    pub fn heartbeat(&self) -> Heartbeat {
        todo!()
    }
}
