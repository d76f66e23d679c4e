//! The devices that the guest sees, and the bus of their ports.

use std::sync::Arc;

use crate::config::Serial;
use crate::kvm::StateError;
use crate::kvm::state::DeviceState;
use crate::limits::DEVICES_MAX;
use page::PAGE_SIZE;

pub(crate) mod debugcon;
pub(crate) mod input;
pub(crate) mod line;
pub(crate) mod mmio;
pub(crate) mod output;
pub(crate) mod power;
pub(crate) mod quiet;
pub(crate) mod reset;
pub(crate) mod serial;
pub mod terminal;
pub mod virtio;
pub(crate) mod wake;

use crate::boot::MmioDevice as Placement;
use debugcon::DebugConsole;
use line::Line;
use mmio::MmioBus;
use power::PowerPorts;
use reset::ResetPort;
pub(crate) use serial::SerialPort;
use virtio::DeviceDescription;
use virtio::assemble::Ends;
use virtio::balloon::Level;
use virtio::block::Disk;
use virtio::engine::Signals;
use virtio::mmio::VirtioMmio;
use virtio::net::Station;
use virtio::state::VirtioState;

/// What a write did beyond its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Nothing.
    None,
    /// The guest asked for power-off or reset.
    PowerOff,
}

/// A device behind ports. Virtual CPUs call it concurrently.
pub(crate) trait PortDevice: Send + Sync + std::fmt::Debug {
    /// One read at `offset` from the device's first port; `data` is 1, 2 or 4 bytes long and holds ones.
    fn read(&self, offset: u16, data: &mut [u8]);
    /// One write at `offset` from the device's first port.
    fn write(&self, offset: u16, data: &[u8]) -> Effect;
}

#[derive(Debug)]
struct Claim {
    first: u16,
    ports: u16,
    device: Arc<dyn PortDevice>,
}

/// Errors of devices.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The serial port's file cannot be used.
    #[error("could not open {path} for the serial port's output")]
    SerialFile {
        /// The file.
        path: std::path::PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The serial port's thread or descriptors could not be had.
    #[error("could not set up the serial port ({step})")]
    SerialSetup {
        /// What failed.
        step: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// More virtio devices than there are interrupts for.
    #[error("{0} virtio devices: a VM has room for {DEVICES_MAX}")]
    TooMany(usize),
    /// A disk cannot be used.
    #[error("could not use {path} as a disk")]
    Disk {
        /// Its file.
        path: std::path::PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A disk of a length that no disk has.
    #[error(
        "{path} is {bytes} bytes long, and a disk has a whole number of blocks of {block} bytes: make it longer (truncate -s)"
    )]
    DiskSize {
        /// Its file.
        path: std::path::PathBuf,
        /// Its length.
        bytes: u64,
        /// Its unit.
        block: u32,
    },
    /// A disk that another VM writes, or that another one reads and this one would write.
    #[error("the disk {path} is in use by another VM: stop that one, or give both readonly=on")]
    DiskInUse {
        /// Its file.
        path: std::path::PathBuf,
    },
    /// A TAP interface cannot be used.
    #[error("could not use the TAP interface {tap}: {advice}")]
    Tap {
        /// Its name.
        tap: String,
        /// What to do.
        advice: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// Two owners of standard input and output.
    #[error(
        "the serial port and the console cannot both be on standard input and output: give one of them `file=PATH` or `off`"
    )]
    StdioTwice,
    /// A balloon that no guest could fill.
    #[error(
        "a balloon of {bytes} bytes: it must be a multiple of 4096, and at most the VM's memory of {memory_bytes} bytes"
    )]
    BalloonSize {
        /// What was asked for.
        bytes: u64,
        /// The VM's RAM.
        memory_bytes: u64,
    },
    /// A VM without a balloon.
    #[error("the VM has no memory balloon: it must be launched with --balloon on")]
    NoBalloon,
    /// The host gives no random numbers.
    #[error("could not get random bytes for a network address")]
    Random(#[source] getrandom::Error),
    /// What the guest has stored is not safe: the VM cannot be handed over.
    #[error("what the guest wrote to the disk {path} could not be written down")]
    WriteDown {
        /// Its file.
        path: std::path::PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A virtio device's thread or descriptors could not be had.
    #[error("could not start the device `{device}`")]
    Start {
        /// Which.
        device: String,
        /// Why.
        source: std::io::Error,
    },
}

/// The devices of a machine.
#[derive(Debug)]
pub(crate) struct Devices {
    serial: Arc<SerialPort>,
    /// The serial port's, and the console's.
    lines: Vec<Line>,
    debug_console: Arc<DebugConsole>,
    claims: Vec<Claim>,
    bus: MmioBus,
    virtio: Vec<Arc<VirtioMmio>>,
    balloon: Option<(Arc<Level>, Arc<Signals>)>,
    disks: Vec<Arc<Disk>>,
    stations: Vec<Arc<Station>>,
}

impl Devices {
    /// Builds them. `interrupt` raises the serial port's line; `on_quit` is called when a user at the terminal asks for the end.
    pub(crate) fn new(
        serial: &Serial,
        interrupt: vmm_sys_util::eventfd::EventFd,
        on_quit: impl Fn() + Clone + Send + 'static,
        virtio: Vec<(Placement, Arc<VirtioMmio>)>,
        ends: Ends,
    ) -> Result<Self, DeviceError> {
        let Ends { mut console, balloon, disks, stations } = ends;
        if *serial == Serial::Stdio && console.as_ref().is_some_and(Line::is_stdio) {
            return Err(DeviceError::StdioTwice);
        }
        let (port, line) = serial::connect(serial, interrupt, on_quit.clone())?;
        console.as_mut().map_or(Ok(()), |console| console.start(on_quit))?;
        let debug_console = Arc::new(DebugConsole::default());
        let claims = vec![
            Claim { first: serial::PORT, ports: serial::PORTS, device: Arc::clone(&port) as _ },
            Claim { first: debugcon::PORT, ports: 1, device: Arc::clone(&debug_console) as _ },
            Claim { first: reset::PORT, ports: 1, device: Arc::new(ResetPort) },
            Claim { first: power::CONTROL, ports: power::PORTS, device: Arc::new(PowerPorts) },
        ];
        let bus = virtio::assemble::bus(&virtio);
        let virtio: Vec<_> = virtio.into_iter().map(|(_, device)| device).collect();
        let its = virtio.iter().find(|device| *device.description() == DeviceDescription::Balloon);
        let balloon = balloon.zip(its.map(|device| Arc::clone(device.engine().signals())));
        let lines = std::iter::once(line).chain(console).collect();
        Ok(Self { serial: port, lines, debug_console, claims, bus, virtio, balloon, disks, stations })
    }

    fn find(&self, port: u16) -> Option<(&dyn PortDevice, u16)> {
        self.claims.iter().find_map(|c| {
            let offset = port.checked_sub(c.first)?;
            (offset < c.ports).then(|| (c.device.as_ref(), offset))
        })
    }

    /// Answers reads from `port`, `access` bytes each (a string instruction makes many); unclaimed ports read as ones.
    pub(crate) fn read(&self, port: u16, access: usize, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((device, offset)) = self.find(port) {
            data.chunks_mut(access).for_each(|one| device.read(offset, one));
        }
    }

    /// Carries out writes to `port`, `access` bytes each; unclaimed ports swallow them.
    pub(crate) fn write(&self, port: u16, access: usize, data: &[u8]) -> Effect {
        let Some((device, offset)) = self.find(port) else { return Effect::None };
        data.chunks(access).map(|one| device.write(offset, one)).fold(Effect::None, |all, one| match one {
            Effect::None => all,
            Effect::PowerOff => Effect::PowerOff,
        })
    }

    /// Device registers in memory.
    pub(crate) fn bus(&self) -> &MmioBus {
        &self.bus
    }

    /// The virtio devices, in the order in which they are placed.
    pub(crate) fn virtio(&self) -> &[Arc<VirtioMmio>] {
        &self.virtio
    }

    /// The virtio devices' states, in their order. They must be parked.
    pub(crate) fn save_virtio(&self) -> Vec<DeviceState> {
        let save = |device: &Arc<VirtioMmio>| {
            let state = device.save();
            DeviceState { kind: state.kind, bytes: state.encode() }
        };
        self.virtio.iter().map(save).collect()
    }

    /// Puts saved states into the virtio devices, one each.
    pub(crate) fn load_virtio(&self, states: &[DeviceState]) -> Result<(), StateError> {
        self.virtio
            .iter()
            .zip(states)
            .try_for_each(|(device, state)| device.load(&VirtioState::decode(&state.bytes)?))
    }

    /// Takes what only a VM that runs may hold.
    pub(crate) fn claim(&self) -> Result<(), DeviceError> {
        self.disks.iter().try_for_each(|disk| disk.lock())?;
        self.stations.iter().for_each(|station| station.announce());
        Ok(())
    }

    /// Writes down what the guest has stored so far; it goes on meanwhile.
    pub(crate) fn write_down(&self) -> Result<(), DeviceError> {
        self.disks.iter().try_for_each(|disk| disk.write_down())
    }

    /// Writes down what disks hold back, and gives up what [`Devices::claim`] took.
    pub(crate) fn let_go(&self) -> Result<(), DeviceError> {
        self.disks.iter().try_for_each(|disk| disk.unlock())
    }

    /// What the guest is asked for and what it has given, bytes; none without a balloon.
    pub(crate) fn balloon(&self) -> Option<(u64, u64)> {
        let bytes = |pages| u64::from(pages) * PAGE_SIZE as u64;
        self.balloon.as_ref().map(|(level, _)| (bytes(level.target()), bytes(level.actual())))
    }

    /// Asks the guest for so much of its memory.
    pub(crate) fn set_balloon(&self, bytes: u64, memory_bytes: u64) -> Result<(), DeviceError> {
        let (level, signals) = self.balloon.as_ref().ok_or(DeviceError::NoBalloon)?;
        let wrong = || DeviceError::BalloonSize { bytes, memory_bytes };
        if !bytes.is_multiple_of(PAGE_SIZE as u64) || bytes > memory_bytes {
            return Err(wrong());
        }
        level.set_target(u32::try_from(bytes / PAGE_SIZE as u64).map_err(|_| wrong())?);
        signals.config_changed();
        Ok(())
    }

    /// The serial port.
    pub(crate) fn serial(&self) -> &SerialPort {
        &self.serial
    }

    /// The debug console.
    pub(crate) fn debug_console(&self) -> &DebugConsole {
        &self.debug_console
    }

    /// Lets input in and the devices' threads serve, or holds them back so that the devices' state stands still.
    pub(crate) fn set_running(&self, running: bool) {
        self.lines.iter().for_each(|line| line.set_open(running));
        for device in &self.virtio {
            if running { device.run() } else { device.park() }
        }
    }

    /// Gives the user's terminal back, if this machine has it.
    pub(crate) fn release_terminal(&self) {
        self.lines.iter().for_each(Line::release_terminal);
    }

    /// Writes what output can be written; called on the thread that saw the VM end.
    pub(crate) fn end_output(&self) {
        self.lines.iter().for_each(Line::end_output);
    }

    /// Ends the threads behind the devices; output that can be written is written first.
    pub(crate) fn shut_down(&self) {
        self.virtio.iter().for_each(|device| device.quit());
        self.lines.iter().for_each(Line::shut_down);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn devices() -> Devices {
        Devices::new(
            &Serial::Off,
            vmm_sys_util::eventfd::EventFd::new(0).unwrap(),
            || {},
            Vec::new(),
            Ends::default(),
        )
        .unwrap()
    }

    #[test]
    fn an_empty_port_reads_as_ones_and_swallows_writes() {
        let devices = devices();
        let mut data = [0; 4];
        devices.read(0x70, 4, &mut data);
        assert_eq!(data, [0xff; 4]);
        assert_eq!(devices.write(0x70, 1, &[1, 2, 3]), Effect::None);
    }

    #[test]
    fn a_string_write_counts_each_byte() {
        let devices = devices();
        devices.write(debugcon::PORT, 1, &[1, 2, 3]);
        assert_eq!(devices.debug_console().heartbeat().count, 3);
    }

    #[test]
    fn only_the_reset_command_ends_the_vm() {
        let devices = devices();
        assert_eq!(devices.write(reset::PORT, 1, &[0xd1]), Effect::None);
        assert_eq!(devices.write(reset::PORT, 1, &[0xfe]), Effect::PowerOff);
    }

    #[test]
    fn only_soft_off_powers_off() {
        let devices = devices();
        let soft_off = power::SOFT_OFF << 2;
        for (port, value) in [(power::CONTROL, soft_off), (power::CONTROL, 1 << 5), (power::STATUS, 0x34)] {
            assert_eq!(devices.write(port, 1, &[value]), Effect::None, "{port:#x} {value:#x}");
        }
        let mut status = [0xff];
        devices.read(power::STATUS, 1, &mut status);
        assert_eq!(status, [0], "it has not woken up");
        assert_eq!(devices.write(power::CONTROL, 1, &[soft_off | 1 << 5]), Effect::PowerOff);
    }
}
