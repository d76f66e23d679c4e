//! The options of virtio devices: the same wherever a VM is launched, received or restored.

use clap::{Args, ValueEnum};

use super::parse::{ParseError, fields, serial, size};
use crate::config::{BalloonOptions, DeviceOptions, DiskOptions, NetOptions, Serial};
use crate::devices::virtio::net::NoMac;
use crate::limits::{DISK_ID_BYTES, NET_ID_BYTES};

/// Virtio devices.
#[derive(Debug, Args)]
#[command(next_help_heading = "Devices")]
pub(super) struct DeviceArgs {
    /// A source of random numbers [default: on; for a VM that arrives: as it was]
    #[arg(long, value_enum, value_name = "on|off")]
    rng: Option<Switch>,
    /// A raw file or block device as a disk (repeatable; the order counts): path=PATH[,readonly=on|off][,id=NAME][,direct=on|off]
    #[arg(long = "disk", value_name = "path=PATH,…", value_parser = disk)]
    disks: Vec<DiskOptions>,
    /// A network interface on a TAP of the host (repeatable; the order counts): tap=NAME[,mac=MAC][,id=NAME]
    #[arg(long = "net", value_name = "tap=NAME,…", value_parser = net)]
    nets: Vec<NetOptions>,
    /// A virtio console (hvc0): stdio, file=PATH or off; on stdio the serial port must be elsewhere (--serial off) [default: none; for a VM
    /// that arrives: as it was, without a reader]
    #[arg(long, value_name = "WHERE", value_parser = serial)]
    console: Option<Serial>,
    /// A memory balloon that also gives the host back what the guest has free: on, off, or size=SIZE to ask the guest for so much [default:
    /// off; for a VM that arrives: as it was]
    #[arg(long, value_name = "on|off|size=SIZE", value_parser = balloon)]
    balloon: Option<BalloonOptions>,
}

/// On, or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Switch {
    /// On.
    On,
    /// Off.
    Off,
}

impl DeviceArgs {
    /// As the rest of the monitor knows them.
    pub(super) fn options(self) -> DeviceOptions {
        DeviceOptions {
            rng: self.rng.map(|switch| switch == Switch::On),
            disks: self.disks,
            nets: self.nets,
            console: self.console,
            balloon: self.balloon,
        }
    }
}

/// `path=PATH[,readonly=on|off][,id=NAME][,direct=on|off]`; in a value a comma is written twice.
fn disk(given: &str) -> Result<DiskOptions, ParseError> {
    let keys = ["path", "readonly", "id", "direct"];
    let [path, read_only, id, direct] = fields(given, &keys, "path=PATH,readonly=on")?;
    let path = path.filter(|path| !path.is_empty());
    let path = path.ok_or_else(|| ParseError::Fields("path=PATH is missing".to_owned()))?;
    if let Some(id) = &id
        && (id.is_empty() || id.len() > DISK_ID_BYTES || !id.bytes().all(|b| b.is_ascii_graphic()))
    {
        let bound = format!("1 to {DISK_ID_BYTES} printable ASCII characters");
        return Err(ParseError::Bound { what: "a disk's id", bound });
    }
    Ok(DiskOptions {
        path: path.into(),
        read_only: on_off(read_only.as_deref())?,
        id,
        direct: on_off(direct.as_deref())?,
    })
}

/// `tap=NAME[,mac=MAC][,id=NAME]`.
fn net(given: &str) -> Result<NetOptions, ParseError> {
    let [tap, mac, id] = fields(given, &["tap", "mac", "id"], "tap=NAME,mac=52:54:00:12:34:56")?;
    let tap = tap.filter(|tap| !tap.is_empty());
    let tap = tap.ok_or_else(|| ParseError::Fields("tap=NAME is missing".to_owned()))?;
    let mac = mac.map(|mac| mac.parse()).transpose();
    let mac = mac.map_err(|error: NoMac| ParseError::Fields(error.to_string()))?;
    if let Some(id) = &id
        && (id.is_empty() || id.len() > NET_ID_BYTES || !id.bytes().all(|b| b.is_ascii_graphic()))
    {
        let bound = format!("1 to {NET_ID_BYTES} printable ASCII characters");
        return Err(ParseError::Bound { what: "a network interface's id", bound });
    }
    Ok(NetOptions { tap, mac, id })
}

/// `on`, `off`, or `size=SIZE`.
fn balloon(given: &str) -> Result<BalloonOptions, ParseError> {
    match (given, given.strip_prefix("size=")) {
        ("on", _) => Ok(BalloonOptions::On { bytes: 0 }),
        ("off", _) => Ok(BalloonOptions::Off),
        (_, Some(bytes)) => Ok(BalloonOptions::On { bytes: size(bytes)? }),
        (_, None) => Err(ParseError::Fields(format!("`{given}` is neither on, off nor size=SIZE"))),
    }
}

/// Off where nothing is said.
fn on_off(given: Option<&str>) -> Result<bool, ParseError> {
    match given {
        None | Some("off") => Ok(false),
        Some("on") => Ok(true),
        Some(other) => Err(ParseError::Fields(format!("`{other}` is neither on nor off"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_has_a_path_and_what_is_said_of_it() {
        let plain = DiskOptions { path: "a,b".into(), read_only: false, id: None, direct: false };
        assert_eq!(disk("path=a,,b"), Ok(plain.clone()));
        let full = DiskOptions { read_only: true, id: Some("root".to_owned()), direct: true, ..plain };
        assert_eq!(disk("id=root,direct=on,path=a,,b,readonly=on"), Ok(full));
        for wrong in ["", "path=", "a", "path=a,readonly=yes", "path=a,path=b", "path=a,id=", "path=a,size=1"]
        {
            assert!(disk(wrong).is_err(), "{wrong}");
        }
        assert!(disk(&format!("path=a,id={}", "x".repeat(21))).is_err());
    }

    #[test]
    fn a_balloon_is_on_off_or_of_a_size() {
        assert_eq!(balloon("on"), Ok(BalloonOptions::On { bytes: 0 }));
        assert_eq!(balloon("off"), Ok(BalloonOptions::Off));
        assert_eq!(balloon("size=64M"), Ok(BalloonOptions::On { bytes: 64 << 20 }));
        for wrong in ["", "size=", "64M", "size=M"] {
            assert!(balloon(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_network_interface_has_a_tap_and_what_is_said_of_it() {
        let plain = NetOptions { tap: "t0".to_owned(), mac: None, id: None };
        assert_eq!(net("tap=t0"), Ok(plain.clone()));
        let mac = "52:54:00:00:00:01".parse().unwrap();
        let full = NetOptions { mac: Some(mac), id: Some("lan".to_owned()), ..plain };
        assert_eq!(net("tap=t0,mac=52:54:00:00:00:01,id=lan"), Ok(full));
        for wrong in ["", "tap=", "t0", "tap=t0,mac=1", "tap=t0,tap=t1", "tap=t0,id=", "tap=t0,queues=2"] {
            assert!(net(wrong).is_err(), "{wrong}");
        }
    }
}
