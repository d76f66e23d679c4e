//! A machine: assembled, run, paused, saved, and stopped.

use std::sync::{Arc, Mutex, OnceLock, Weak};

use page::PageSet;
use tokio::sync::watch;

use crate::boot::{self, BootError};
use crate::config::{BalloonOptions, DeviceOptions, Serial, VmConfig};
use crate::devices::input::InputPort;
use crate::devices::serial::INTERRUPT_LINE;
use crate::devices::virtio::assemble::{self, DeviceMismatch, Opened};
use crate::devices::virtio::{self, DeviceDescription};
use crate::devices::{DeviceError, Devices};
use crate::kvm::cpu::{self, CpuModel};
use crate::kvm::state::{ChipState, MachineState, VcpuState};
use crate::kvm::threads::{End, Threads, lock};
use crate::kvm::time::{self, Moment};
use crate::kvm::vcpu::Vcpu;
use crate::kvm::vm::{self, Vm};
use crate::kvm::{KvmError, STATE_VERSION, STATE_VERSION_OLDEST, StateError, state_bytes};
use crate::limits::CPUS_MAX;
use crate::memory::{Extent, Memory, MemoryError, layout};

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
    /// The CPU that the guest sees; absent in version 1.
    #[serde(default)]
    pub cpu: Option<CpuModel>,
    /// Its virtio devices, in the order in which they are placed; a description of version 1 has none.
    #[serde(default)]
    pub devices: Vec<DeviceDescription>,
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

/// A VM's memory balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct BalloonStatus {
    /// How much of its memory the guest is asked for.
    pub target_bytes: u64,
    /// How much it says that it has given; 0 while no driver serves the balloon.
    pub actual_bytes: u64,
}

/// Errors of a machine.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The kernel, and what is loaded with it.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The options give other devices than the VM has.
    #[error(transparent)]
    Devices(#[from] DeviceMismatch),
    /// A saved state that this build cannot load.
    #[error(transparent)]
    State(#[from] StateError),
    /// A number of virtual CPUs that no VM can have.
    #[error("{0} virtual CPUs: it must be 1 to {CPUS_MAX}; change --cpus")]
    Cpus(u8),
    /// A description from a build with another format.
    #[error(
        "the VM's description has version {0}, and this build reads versions {STATE_VERSION_OLDEST} to {STATE_VERSION}: upgrade the older host"
    )]
    DescriptionVersion(u32),
    /// The saved VM has another number of devices.
    #[error("the saved state has {saved} devices and this machine {built}")]
    DeviceCount {
        /// In the state.
        saved: usize,
        /// Here.
        built: usize,
    },
    /// It has ended.
    #[error("the VM has stopped ({0:?}) and cannot go on")]
    Stopped(StopReason),
    /// Something that needs a VM that stands still.
    #[error("the VM runs: pause it first")]
    Running,
    /// Saved state for a VM that has run.
    #[error("saved state can only be put into a machine that has not run")]
    HasRun,
    /// The host gives no random numbers.
    #[error("could not get random bytes for the VM's identity")]
    Random(#[source] getrandom::Error),
    /// The dirty log is off.
    #[error("dirty logging has not been started")]
    NotLogging,
}

/// What is kept from pause to resume.
#[derive(Debug, Default)]
struct Still {
    /// What guest time is to go on from.
    time: Option<Moment>,
}

/// A VM with its threads. Shared as `Arc<Machine>`; every method may be called from any thread.
///
/// ```text
/// Created ──resume──► Running ◄──pause/resume──► Paused
///    └───────────────────┴──── stop, guest, failure ────┴──► Stopped
/// ```
#[derive(Debug)]
pub struct Machine {
    // The order is that in which they are dropped: threads before what they use.
    threads: Threads,
    devices: Arc<Devices>,
    vm: Vm,
    memory: Arc<Memory>,
    description: MachineDescription,
    run_state: Arc<watch::Sender<RunState>>,
    /// Held while the machine goes from one run state to another, or its state is read or written.
    still: Mutex<Still>,
    /// Whether the dirty log is on.
    logging: Mutex<bool>,
    ownership: Mutex<Ownership>,
}

impl Machine {
    /// Builds the machine and loads its kernel; the virtual CPUs stand still until [`Machine::resume`].
    /// # Errors
    /// What is missing or wrong, and what to do about it.
    pub fn launch(config: &VmConfig) -> Result<Arc<Self>, MachineError> {
        let virtio = assemble::open(&config.devices, None)?;
        let places = virtio::placements(virtio.devices.len());
        let description = MachineDescription {
            version: STATE_VERSION,
            name: config.name.clone(),
            cpus: config.cpus,
            extents: layout(config.memory_bytes)?,
            cpu: None,
            devices: virtio.devices.iter().map(|device| device.describe()).collect(),
        };
        let machine = Self::assemble(description, &config.serial, virtio, |vm, memory, vcpus| {
            let registers = boot::load(config, &places, memory)?;
            let shown = cpu::give(vm.kvm(), vcpus, &config.cpu)?;
            vcpus.iter().try_for_each(Vcpu::set_virtual_wire)?;
            vcpus.iter().take(1).try_for_each(|first| first.set_boot_registers(&registers))?;
            Ok(Some(shown))
        })?;
        if let Some(BalloonOptions::On { bytes }) = config.devices.balloon {
            machine.set_balloon(bytes)?;
        }
        Ok(machine)
    }

    /// Builds an empty machine that a migration will fill. Its devices are opened by `devices`, never by what the description says.
    /// # Errors
    /// As [`Machine::launch`]; [`MachineError::Devices`] if the devices opened are not those described; and if this host lacks a feature
    /// of the VM's CPU.
    pub fn prepare(
        description: &MachineDescription,
        serial: &Serial,
        devices: &DeviceOptions,
    ) -> Result<Arc<Self>, MachineError> {
        if !(STATE_VERSION_OLDEST..=STATE_VERSION).contains(&description.version) {
            return Err(MachineError::DescriptionVersion(description.version));
        }
        let virtio = assemble::open(devices, Some(&description.devices))?;
        let here: Vec<_> = virtio.devices.iter().map(|device| device.describe()).collect();
        assemble::compare(&description.devices, &here)?;
        let new = MachineDescription { version: STATE_VERSION, ..description.clone() };
        Self::assemble(new, serial, virtio, |vm, _, vcpus| {
            if let (Some(guest), Some(first)) = (&description.cpu, vcpus.first()) {
                cpu::check_host(vm.kvm(), first.fd(), guest)?;
            }
            Ok(description.cpu.clone())
        })
    }

    fn assemble(
        mut description: MachineDescription,
        serial: &Serial,
        virtio: Opened,
        fill: impl FnOnce(&Vm, &Memory, &[Vcpu]) -> Result<Option<CpuModel>, MachineError>,
    ) -> Result<Arc<Self>, MachineError> {
        if !(1..=CPUS_MAX).contains(&description.cpus) {
            return Err(MachineError::Cpus(description.cpus));
        }
        let kvm = vm::open(vm::KVM_PATH)?;
        let memory = Arc::new(Memory::new(&description.extents)?);
        let vm = Vm::new(kvm, Arc::clone(&memory))?;
        let vcpus = vm.create_vcpus(description.cpus)?;
        description.cpu = fill(&vm, &memory, &vcpus)?;

        let run_state = Arc::new(watch::Sender::new(RunState::Created));
        let this: Arc<OnceLock<Weak<Self>>> = Arc::default();
        let quit_target = Arc::clone(&this);
        let on_quit = move || {
            if let Some(machine) = quit_target.get().and_then(Weak::upgrade) {
                machine.stop(StopReason::Requested);
            }
        };
        let Opened { devices: virtio, ends } = virtio;
        let virtio = assemble::connect(virtio, &vm, &memory)?;
        let devices = Arc::new(Devices::new(serial, vm.interrupt(INTERRUPT_LINE)?, on_quit, virtio, ends)?);
        let (ended_devices, ended_state) = (Arc::clone(&devices), Arc::clone(&run_state));
        let on_end = move |end| {
            // First: who sees that the VM has stopped finds its console complete, and the terminal as it was.
            ended_devices.end_output();
            ended_devices.release_terminal();
            let reason = match end {
                End::PowerOff => StopReason::Guest,
                End::Failed(what) => StopReason::Failed(what),
            };
            set_stopped(&ended_state, reason);
        };
        let threads = Threads::start(vcpus, Arc::clone(&devices), Arc::clone(&memory), on_end)?;
        let machine = Arc::new(Self {
            threads,
            devices,
            vm,
            memory,
            description,
            run_state,
            still: Mutex::default(),
            logging: Mutex::new(false),
            ownership: Mutex::new(new_ownership()?),
        });
        this.set(Arc::downgrade(&machine)).expect("set once");
        Ok(machine)
    }

    /// What a destination needs to build the same.
    pub fn description(&self) -> MachineDescription {
        self.description.clone()
    }

    /// Which VM it is: random and of epoch 0 at launch.
    pub fn ownership(&self) -> Ownership {
        *lock(&self.ownership)
    }

    /// Written by a migration: at the destination before the VM runs.
    pub fn set_ownership(&self, ownership: Ownership) {
        *lock(&self.ownership) = ownership;
    }

    /// Its RAM.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Lets the virtual CPUs run. Idempotent.
    /// # Errors
    /// If it has stopped.
    pub fn resume(&self) -> Result<(), MachineError> {
        let mut still = lock(&self.still);
        match self.run_state() {
            RunState::Stopped(reason) => return Err(MachineError::Stopped(reason)),
            RunState::Running => return Ok(()),
            RunState::Created | RunState::Paused => {}
        }
        self.devices.claim()?;
        if let Some(from) = still.time {
            time::go_on(self.vm.fd(), self.threads.vcpus(), from)?;
            for vcpu in self.threads.vcpus() {
                lock(vcpu).tell_guest_it_stood_still()?;
            }
            still.time = None;
        }
        // Before they run: if the guest ends at once, that must come after.
        self.leave_for(RunState::Running)?;
        self.devices.set_running(true);
        self.threads.run();
        Ok(())
    }

    /// Returns when every virtual CPU stands still outside KVM_RUN with its pending exits completed. Idempotent. The guest's
    /// paravirtual clock stands still as well.
    /// # Errors
    /// If it has stopped.
    pub fn pause(&self) -> Result<(), MachineError> {
        let mut still = lock(&self.still);
        match self.run_state() {
            RunState::Stopped(reason) => return Err(MachineError::Stopped(reason)),
            RunState::Created | RunState::Paused => return Ok(()),
            RunState::Running => {}
        }
        self.threads.park();
        self.devices.set_running(false);
        still.time = Some(time::now(self.vm.fd(), self.threads.vcpus())?);
        self.leave_for(RunState::Paused)
    }

    /// As [`Machine::pause`], for a VM that may run elsewhere afterwards: its disks are written down, and what only a VM that runs may hold
    /// is given up. [`Machine::resume`] takes it again.
    /// # Errors
    /// If it has stopped, or a disk cannot be written down: then it may run on or stand still.
    pub fn pause_for_hand_over(&self) -> Result<(), MachineError> {
        self.devices.write_down()?;
        self.pause()?;
        let _still = lock(&self.still);
        self.must_stand_still()?;
        Ok(self.devices.let_go()?)
    }

    /// Has the virtual CPUs rest for so many percent of the time, whenever they run; 0 lets them run at full speed, at once.
    /// # Errors
    /// If there is no thread for it.
    pub fn throttle(&self, percent: u8) -> Result<(), MachineError> {
        Ok(self.threads.throttle(percent)?)
    }

    /// A paused VM that was to run elsewhere stays here, paused: takes back what [`Machine::pause_for_hand_over`] gave up. Idempotent.
    /// # Errors
    /// If another VM has it by now.
    pub fn stay(&self) -> Result<(), MachineError> {
        let _still = lock(&self.still);
        Ok(self.devices.claim()?)
    }

    /// Ends the VM; the first reason stays. Returns when its virtual CPUs run no more.
    pub fn stop(&self, reason: StopReason) {
        // First: who sees that the VM has stopped may end the process at once.
        self.devices.release_terminal();
        set_stopped(&self.run_state, reason);
        self.threads.quit();
        self.devices.shut_down();
    }

    fn run_state(&self) -> RunState {
        self.run_state.borrow().clone()
    }

    /// Goes to `next`, unless the VM has stopped.
    fn leave_for(&self, next: RunState) -> Result<(), MachineError> {
        let mut stopped = None;
        self.run_state.send_if_modified(|now| match now {
            RunState::Stopped(reason) => {
                stopped = Some(reason.clone());
                false
            }
            RunState::Created | RunState::Running | RunState::Paused => {
                *now = next;
                true
            }
        });
        stopped.map_or(Ok(()), |reason| Err(MachineError::Stopped(reason)))
    }

    /// Starts dirty logging, with an empty log.
    /// # Errors
    /// If KVM refuses.
    pub fn start_dirty_log(&self) -> Result<(), MachineError> {
        let mut logging = lock(&self.logging);
        self.vm.log_dirty(true)?;
        *logging = true;
        self.collect_dirty().map(drop)
    }

    /// The pages written since logging started or since the last call, by the guest (KVM's log) or the monitor; clears both.
    /// # Errors
    /// [`MachineError::NotLogging`], or if KVM refuses.
    pub fn take_dirty(&self) -> Result<PageSet, MachineError> {
        let logging = lock(&self.logging);
        if *logging { self.collect_dirty() } else { Err(MachineError::NotLogging) }
    }

    fn collect_dirty(&self) -> Result<PageSet, MachineError> {
        let mut set = PageSet::empty(self.memory.bound());
        self.vm.take_log(&mut set)?;
        self.memory.take_monitor_writes(&mut set);
        Ok(set)
    }

    /// Ends dirty logging.
    /// # Errors
    /// If KVM refuses.
    pub fn stop_dirty_log(&self) -> Result<(), MachineError> {
        let mut logging = lock(&self.logging);
        self.vm.log_dirty(false)?;
        *logging = false;
        Ok(())
    }

    /// All vCPU, interrupt controller, timer, clock and device state, versioned. The VM must be paused.
    ///
    /// KVM may write guest memory while its state is read: take the dirty log after this, not before.
    /// # Errors
    /// If it runs, or KVM refuses.
    pub fn save_state(&self) -> Result<Vec<u8>, MachineError> {
        let still = lock(&self.still);
        self.must_stand_still()?;
        let vcpus = self
            .threads
            .vcpus()
            .iter()
            .map(|vcpu| VcpuState::save(self.vm.kvm(), lock(vcpu).fd()))
            .collect::<Result<_, _>>()?;
        let Moment { clock_ns, tsc } =
            still.time.map_or_else(|| time::now(self.vm.fd(), self.threads.vcpus()), Ok)?;
        let chips = ChipState::save(self.vm.fd())?;
        let serial = self.devices.serial().state();
        let mut state = MachineState { clock_ns, chips, serial, devices: self.devices.save_virtio(), vcpus };
        if let Some(tsc) = tsc {
            state.set_back_tsc(tsc);
        }
        Ok(state_bytes::encode(&state))
    }

    /// Puts saved state into a machine that has not run here; it is paused then.
    ///
    /// KVM may write guest memory as it takes the state (the guest's wall clock): compare memory before this, not after.
    /// # Errors
    /// A state of another version or shape, truncated or corrupt; or KVM refuses. The machine is then of no further use.
    pub fn load_state(&self, bytes: &[u8]) -> Result<(), MachineError> {
        let mut still = lock(&self.still);
        match self.run_state() {
            RunState::Created => {}
            RunState::Stopped(reason) => return Err(MachineError::Stopped(reason)),
            RunState::Running | RunState::Paused => return Err(MachineError::HasRun),
        }
        let saved = state_bytes::decode(bytes)?;
        let vcpus = self.threads.vcpus();
        if saved.vcpus.len() != vcpus.len() {
            return Err(KvmError::CpuCount { saved: saved.vcpus.len(), built: vcpus.len() }.into());
        }
        let built = self.devices.virtio().len();
        if saved.devices.len() != built {
            return Err(MachineError::DeviceCount { saved: saved.devices.len(), built });
        }
        for (saved, vcpu) in saved.vcpus.iter().zip(vcpus) {
            saved.load(self.vm.kvm(), lock(vcpu).fd())?;
        }
        saved.chips.load(self.vm.fd())?;
        self.devices
            .serial()
            .set_state(&saved.serial)
            .map_err(|source| DeviceError::SerialSetup { step: "its saved state", source })?;
        self.devices.load_virtio(&saved.devices)?;
        // Not now but when it runs: until then no guest time passes.
        still.time = Some(saved.time());
        self.leave_for(RunState::Paused)
    }

    fn must_stand_still(&self) -> Result<(), MachineError> {
        match self.run_state() {
            RunState::Created | RunState::Paused => Ok(()),
            RunState::Running => Err(MachineError::Running),
            RunState::Stopped(reason) => Err(MachineError::Stopped(reason)),
        }
    }

    /// Follows the run state.
    pub fn watch(&self) -> watch::Receiver<RunState> {
        self.run_state.subscribe()
    }

    /// The guest's heartbeat so far.
    pub fn heartbeat(&self) -> Heartbeat {
        self.devices.debug_console().heartbeat()
    }

    /// Its memory balloon, if it has one.
    pub fn balloon(&self) -> Option<BalloonStatus> {
        let (target_bytes, actual_bytes) = self.devices.balloon()?;
        Some(BalloonStatus { target_bytes, actual_bytes })
    }

    /// Asks the guest to give so much of its memory, bytes: more than it has given, or less. It does so in its own time.
    /// # Errors
    /// [`DeviceError::NoBalloon`], [`DeviceError::BalloonSize`].
    pub fn set_balloon(&self, bytes: u64) -> Result<(), DeviceError> {
        let pages: u64 = self.description.extents.iter().map(|extent| extent.pages).sum();
        self.devices.set_balloon(bytes, pages * page::PAGE_SIZE as u64)
    }

    /// Sends bytes to the guest's serial port, besides what it is connected to, and says how many its port took: none
    /// while the VM stands still, and no more than its buffer of 64 has room for.
    pub fn serial_input(&self, bytes: &[u8]) -> usize {
        InputPort::give(self.devices.serial(), bytes)
    }
}

/// The dirty log, on for as long as this lives.
#[derive(Debug)]
pub struct DirtyLog<'a>(&'a Machine);

impl<'a> DirtyLog<'a> {
    /// Turns it on, empty.
    /// # Errors
    /// If KVM refuses.
    pub fn start(machine: &'a Machine) -> Result<Self, MachineError> {
        machine.start_dirty_log()?;
        Ok(Self(machine))
    }
}

impl Drop for DirtyLog<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.stop_dirty_log() {
            tracing::warn!(%error, "the dirty log goes on, though nobody reads it any more");
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop(StopReason::Requested);
    }
}

fn new_ownership() -> Result<Ownership, MachineError> {
    let mut id = [0; 16];
    getrandom::fill(&mut id).map_err(MachineError::Random)?;
    Ok(Ownership { vm: migration_proto::VmId(id), epoch: migration_proto::Epoch(0) })
}

fn set_stopped(run_state: &watch::Sender<RunState>, reason: StopReason) {
    run_state.send_if_modified(|now| match now {
        RunState::Stopped(_) => false,
        RunState::Created | RunState::Running | RunState::Paused => {
            tracing::info!(?reason, "the VM has stopped");
            *now = RunState::Stopped(reason);
            true
        }
    });
}
