//! From options to devices: which ones a VM has, in which order, and where they are.

use std::fmt;
use std::sync::Arc;

use super::balloon::{Balloon, Level};
use super::block::{Block, Disk};
use super::console::Console;
use super::mmio::{QUEUE_NOTIFY, VirtioMmio};
use super::net::{Mac, Net, Station, Tap};
use super::rng::Rng;
use super::{DeviceDescription, Placement, VirtioDevice};
use crate::config::{BalloonOptions, DeviceOptions, DiskOptions, NetOptions, Serial};
use crate::devices::line::Line;
use crate::devices::wake::Wake;
use crate::devices::{DeviceError, mmio::MmioBus};
use crate::kvm::vm::Vm;
use crate::limits::DEVICES_MAX;
use crate::machine::MachineError;
use crate::memory::Memory;

/// The devices that an operator's options open here are not those that the VM has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "device {number} of the VM is {theirs}, and here it is {here}: give the devices that the VM was launched with, in the same order"
)]
pub struct DeviceMismatch {
    /// Which, counted from 1.
    pub number: usize,
    /// What the VM has.
    pub theirs: Presence,
    /// What the options give.
    pub here: Presence,
}

/// A device, or none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Presence(pub Option<DeviceDescription>);

impl fmt::Display for Presence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(description) => description.fmt(f),
            None => f.write_str("absent"),
        }
    }
}

/// Devices that are open and have no place yet.
#[derive(Debug)]
pub(crate) struct Opened {
    /// The devices, in their order.
    pub(crate) devices: Vec<Box<dyn VirtioDevice>>,
    /// Their other ends.
    pub(crate) ends: Ends,
}

/// What of the devices is the monitor's business beside serving their drivers.
#[derive(Debug, Default)]
pub(crate) struct Ends {
    /// What connects the console, if there is one.
    pub(crate) console: Option<Line>,
    /// The balloon's level, if there is one.
    pub(crate) balloon: Option<Arc<Level>>,
    /// The disks: only a VM that runs may hold their locks.
    pub(crate) disks: Vec<Arc<Disk>>,
    /// The network's interfaces: the network must learn where a VM runs.
    pub(crate) stations: Vec<Arc<Station>>,
}

/// Opens what the options say, in the order in which the devices are placed. What they leave open is as in `described`, where the VM
/// comes from elsewhere.
/// # Errors
/// [`DeviceError`]: more than there is room for, or something that cannot be opened.
pub(crate) fn open(
    options: &DeviceOptions,
    described: Option<&[DeviceDescription]>,
) -> Result<Opened, DeviceError> {
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
    let mut ends = Ends::default();
    let rng = described.is_none_or(|described| described.contains(&DeviceDescription::Rng));
    if options.rng.unwrap_or(rng) {
        devices.push(Box::new(Rng::default()));
    }
    let mut ids = described.into_iter().flatten().filter_map(|description| match description {
        DeviceDescription::Block { id, .. } => Some(id.clone()),
        DeviceDescription::Rng
        | DeviceDescription::Net { .. }
        | DeviceDescription::Console
        | DeviceDescription::Balloon => None,
    });
    for (index, disk) in options.disks.iter().enumerate() {
        let (theirs, own) = (ids.next(), disk.id.clone());
        let id = own.or(theirs).unwrap_or_else(|| format!("disk{index}"));
        let block = Block::open(&DiskOptions { id: Some(id), ..disk.clone() })?;
        ends.disks.push(block.disk());
        devices.push(Box::new(block));
    }
    for net in open_nets(&options.nets, described)? {
        ends.stations.push(net.station());
        devices.push(Box::new(net));
    }
    let theirs = |kind| described.is_some_and(|described| described.contains(&kind));
    let nobody = theirs(DeviceDescription::Console).then_some(Serial::Off);
    if let Some(to) = options.console.as_ref().or(nobody.as_ref()) {
        let (device, line) = Console::open(to)?;
        devices.push(Box::new(device));
        ends.console = Some(line);
    }
    let theirs = theirs(DeviceDescription::Balloon);
    let balloon = options.balloon.map_or(theirs, |options| options != BalloonOptions::Off);
    let balloon = balloon.then(Balloon::default);
    ends.balloon = balloon.as_ref().map(Balloon::level);
    devices.extend(balloon.map(|device| Box::new(device) as Box<dyn VirtioDevice>));
    if devices.len() > DEVICES_MAX {
        return Err(DeviceError::TooMany(devices.len()));
    }
    Ok(Opened { devices, ends })
}

fn open_nets(
    options: &[NetOptions],
    described: Option<&[DeviceDescription]>,
) -> Result<Vec<Net>, DeviceError> {
    let mut theirs = described.into_iter().flatten().filter_map(|description| match description {
        DeviceDescription::Net { id, mac } => Some((id.clone(), *mac)),
        DeviceDescription::Rng
        | DeviceDescription::Block { .. }
        | DeviceDescription::Console
        | DeviceDescription::Balloon => None,
    });
    let open = |(index, net): (usize, &NetOptions)| {
        let (their_id, their_mac) = theirs.next().unzip();
        let id = net.id.clone().or(their_id).unwrap_or_else(|| format!("net{index}"));
        let mac = net.mac.or(their_mac).map_or_else(Mac::random, Ok).map_err(DeviceError::Random)?;
        Ok(Net::new(id, mac, Tap::open(&net.tap)?))
    };
    options.iter().enumerate().map(open).collect()
}

/// Whether the options' devices can be had on this host, before a VM comes for them.
/// # Errors
/// What cannot, and why.
pub fn check(options: &DeviceOptions) -> Result<(), DeviceError> {
    open(options, None).map(drop)
}

/// Whether the devices opened here are those of a VM from elsewhere.
/// # Errors
/// The first that is not.
pub(crate) fn compare(
    theirs: &[DeviceDescription],
    here: &[DeviceDescription],
) -> Result<(), DeviceMismatch> {
    for index in 0..theirs.len().max(here.len()) {
        let (theirs, here) = (theirs.get(index), here.get(index));
        if theirs != here {
            let [theirs, here] = [theirs, here].map(|device| Presence(device.cloned()));
            return Err(DeviceMismatch { number: index + 1, theirs, here });
        }
    }
    Ok(())
}

/// Puts the devices at their places: registers, interrupts, notifications, threads.
/// # Errors
/// KVM's, or the host's when it has no more descriptors or threads.
pub(crate) fn connect(
    devices: Vec<Box<dyn VirtioDevice>>,
    vm: &Vm,
    memory: &Arc<Memory>,
) -> Result<Vec<(Placement, Arc<VirtioMmio>)>, MachineError> {
    let places = super::placements(devices.len());
    let connect = |(place, device): (Placement, Box<dyn VirtioDevice>)| {
        let queues = u32::try_from(device.queue_sizes().len()).expect("a few queues");
        let notifications = (0..queues)
            .map(|queue| Ok(Arc::new(Wake::from(vm.notification(place.base + QUEUE_NOTIFY, queue)?))))
            .collect::<Result<Vec<_>, MachineError>>()?;
        let name = device.describe().name();
        let device = VirtioMmio::start(device, Arc::clone(memory), vm.interrupt(place.gsi)?, notifications)
            .map_err(|source| DeviceError::Start { device: name, source })?;
        Ok((place, Arc::new(device)))
    };
    places.into_iter().zip(devices).map(connect).collect()
}

/// The bus with the devices on it.
pub(crate) fn bus(devices: &[(Placement, Arc<VirtioMmio>)]) -> MmioBus {
    let mut bus = MmioBus::default();
    for (place, device) in devices {
        bus.claim(place.base, place.bytes, Arc::clone(device) as _);
    }
    bus
}
