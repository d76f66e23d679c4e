//! The options of virtio devices: the same wherever a VM is launched, received or restored.

use clap::{Args, ValueEnum};

use super::parse::{ParseError, fields};
use crate::config::{DeviceOptions, DiskOptions};
use crate::limits::DISK_ID_BYTES;

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
        DeviceOptions { rng: self.rng.map(|switch| switch == Switch::On), disks: self.disks }
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
}
