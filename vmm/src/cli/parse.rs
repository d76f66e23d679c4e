//! The values that the command line takes: sizes, rates, times, loads, serial ports.

use std::path::PathBuf;

use crate::config::{BootProtocol, CpuChoice, Level, Load, Serial};
use crate::limits;
use crate::snapshot::is_name;

/// Why a value was refused. Clap puts the option's name in front.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ParseError {
    /// Not a number with a suffix.
    #[error("`{given}` is not {what}: write {example}")]
    Form {
        /// What was given.
        given: String,
        /// What was expected.
        what: &'static str,
        /// An example.
        example: &'static str,
    },
    /// Beyond a bound.
    #[error("{what} must be {bound}")]
    Bound {
        /// What.
        what: &'static str,
        /// The bound.
        bound: String,
    },
    /// `key=value,…` with a fault.
    #[error("{0}")]
    Fields(String),
}

/// RAM: as [`size`], a multiple of 2 MiB.
pub(super) fn memory(given: &str) -> Result<u64, ParseError> {
    let bytes = size(given)?;
    if bytes == 0 || !bytes.is_multiple_of(limits::MEMORY_GRANULE_BYTES) {
        let bound = "a multiple of 2M, and not zero".to_owned();
        return Err(ParseError::Bound { what: "memory", bound });
    }
    Ok(bytes)
}

/// A part of memory: bytes, or with `K`, `M`, `G`, `T` (powers of 1024).
pub(super) fn size(given: &str) -> Result<u64, ParseError> {
    let form =
        || ParseError::Form { given: given.to_owned(), what: "a size of memory", example: "512M or 4G" };
    let (digits, unit) = split_number(given);
    let shift = match unit.to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KIB" => 10,
        "M" | "MIB" => 20,
        "G" | "GIB" => 30,
        "T" | "TIB" => 40,
        _ => return Err(form()),
    };
    digits.parse::<u64>().ok().and_then(|n| n.checked_mul(1u64 << shift)).ok_or_else(form)
}

/// A rate: bits a second, or with `K`, `M`, `G` (powers of 1000), `bit` and `bit/s` allowed after it.
pub(super) fn bandwidth(given: &str) -> Result<u64, ParseError> {
    let form = || ParseError::Form {
        given: given.to_owned(),
        what: "a rate in bits a second",
        example: "100M or 1G",
    };
    let (digits, unit) = split_number(given);
    let unit = unit.to_ascii_lowercase();
    let unit = unit.strip_suffix("/s").unwrap_or(&unit);
    let unit = unit.strip_suffix("bit").unwrap_or(unit);
    let factor: u64 = match unit {
        "" => 1,
        "k" => 1_000,
        "m" => 1_000_000,
        "g" => 1_000_000_000,
        _ => return Err(form()),
    };
    match digits.parse::<u64>().ok().and_then(|n| n.checked_mul(factor)) {
        Some(0) => Err(ParseError::Bound { what: "the rate", bound: "more than zero".to_owned() }),
        Some(bits) => Ok(bits),
        None => Err(form()),
    }
}

/// A time in milliseconds, from `300ms`, `2s`, or a number of milliseconds alone.
pub(super) fn downtime(given: &str) -> Result<u64, ParseError> {
    let form = || ParseError::Form { given: given.to_owned(), what: "a time", example: "300ms or 2s" };
    let (digits, unit) = split_number(given);
    let factor: u64 = match unit {
        "" | "ms" => 1,
        "s" => 1000,
        _ => return Err(form()),
    };
    match digits.parse::<u64>().ok().and_then(|n| n.checked_mul(factor)) {
        None => Err(form()),
        Some(0) => Err(ParseError::Bound { what: "the downtime", bound: "at least 1ms".to_owned() }),
        Some(ms) if ms > limits::DOWNTIME_MS => {
            Err(ParseError::Bound { what: "the downtime", bound: "at most an hour".to_owned() })
        }
        Some(ms) => Ok(ms),
    }
}

/// A time in milliseconds, from `30s`, `5m`, or 0.
pub(super) fn resume_for(given: &str) -> Result<u64, ParseError> {
    let form = || ParseError::Form { given: given.to_owned(), what: "a time", example: "30s, 5m or 0" };
    let (digits, unit) = split_number(given);
    let factor: u64 = match unit {
        "" if digits == "0" => 1,
        "s" => 1000,
        "m" => 60_000,
        _ => return Err(form()),
    };
    match digits.parse::<u64>().ok().and_then(|n| n.checked_mul(factor)) {
        None => Err(form()),
        Some(ms) if ms > limits::RESUME_FOR_MS => {
            Err(ParseError::Bound { what: "the time to dial again", bound: "at most an hour".to_owned() })
        }
        Some(ms) => Ok(ms),
    }
}

fn split_number(given: &str) -> (&str, &str) {
    given.split_at(given.find(|c: char| !c.is_ascii_digit()).unwrap_or(given.len()))
}

/// `file=PATH,addr=GPA`; in PATH a comma is written twice, as QEMU has it. GPA is hexadecimal after `0x`, else decimal.
pub(super) fn load(given: &str) -> Result<Load, ParseError> {
    let [file, addr] = fields(given, &["file", "addr"], "file=PATH,addr=GPA")?;
    let file = file.filter(|file| !file.is_empty());
    let file = file.ok_or_else(|| ParseError::Fields("file=PATH is missing".to_owned()))?;
    let addr = addr.ok_or_else(|| ParseError::Fields("addr=GPA is missing".to_owned()))?;
    Ok(Load { file: PathBuf::from(file), addr: address(&addr)? })
}

/// The values of `keys` in `KEY=VALUE,…`, in their order; a comma within a value is written twice.
pub(super) fn fields<const N: usize>(
    given: &str,
    keys: &[&str; N],
    example: &str,
) -> Result<[Option<String>; N], ParseError> {
    let mut values = [const { None }; N];
    for field in split_fields(given) {
        let Some((key, value)) = field.split_once('=') else {
            return Err(ParseError::Fields(format!(
                "`{field}` is not KEY=VALUE: write {example}, and `,,` for a comma within a value"
            )));
        };
        let Some(at) = keys.iter().position(|known| *known == key) else {
            let known = keys.map(|key| format!("{key}=")).join(", ");
            return Err(ParseError::Fields(format!("unknown key `{key}`: there are {known}")));
        };
        if values[at].replace(value.to_owned()).is_some() {
            return Err(ParseError::Fields(format!("`{key}=` stands there twice")));
        }
    }
    Ok(values)
}

fn address(given: &str) -> Result<u64, ParseError> {
    let hex = given.strip_prefix("0x").or_else(|| given.strip_prefix("0X"));
    let (digits, radix) = hex.map_or((given, 10), |hex| (hex, 16));
    // from_str_radix takes a sign, an address has none.
    let parsed = if digits.starts_with('+') { None } else { u64::from_str_radix(digits, radix).ok() };
    parsed.ok_or_else(|| ParseError::Form {
        given: given.to_owned(),
        what: "a guest-physical address",
        example: "0x4000000 or 67108864",
    })
}

/// Splits at single commas; two commas are one that belongs to the value.
fn split_fields(given: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut chars = given.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            fields.push(String::new());
        } else if let Some(field) = fields.last_mut() {
            field.push(c);
        }
    }
    fields
}

/// `stdio`, `file=PATH` or `off`.
pub(super) fn serial(given: &str) -> Result<Serial, ParseError> {
    match given {
        "stdio" => Ok(Serial::Stdio),
        "off" => Ok(Serial::Off),
        _ => match given.strip_prefix("file=") {
            Some(path) if !path.is_empty() => Ok(Serial::File(PathBuf::from(path))),
            Some(_) | None => Err(ParseError::Form {
                given: given.to_owned(),
                what: "a place for the serial port",
                example: "stdio, file=PATH or off",
            }),
        },
    }
}

/// `host`, `v2`, `v3`, `v4`, or else a baseline's path.
pub(super) fn cpu(given: &str) -> Result<CpuChoice, ParseError> {
    match given {
        "host" => Ok(CpuChoice::Host),
        "v2" => Ok(CpuChoice::Level(Level::V2)),
        "v3" => Ok(CpuChoice::Level(Level::V3)),
        "v4" => Ok(CpuChoice::Level(Level::V4)),
        "" => Err(ParseError::Form {
            given: String::new(),
            what: "a CPU",
            example: "host, v2, v3, v4 or a file of `vmm cpu-baseline`",
        }),
        path => Ok(CpuChoice::Baseline(PathBuf::from(path))),
    }
}

/// `auto`, `pvh` or `linux64`.
pub(super) fn boot_protocol(given: &str) -> Result<BootProtocol, ParseError> {
    match given {
        "auto" => Ok(BootProtocol::Auto),
        "pvh" => Ok(BootProtocol::Pvh),
        "linux64" => Ok(BootProtocol::Linux64),
        _ => Err(ParseError::Form {
            given: given.to_owned(),
            what: "a boot protocol",
            example: "auto, pvh or linux64",
        }),
    }
}

/// `on` or `off`.
pub(super) fn on_off(given: &str) -> Result<bool, ParseError> {
    match given {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(ParseError::Form { given: given.to_owned(), what: "a switch", example: "on or off" }),
    }
}

/// A VM's name.
pub(super) fn name(given: &str) -> Result<String, ParseError> {
    if given.is_empty() || given.len() > limits::NAME_BYTES || given.chars().any(char::is_control) {
        let bound = format!("1 to {} bytes without control characters", limits::NAME_BYTES);
        return Err(ParseError::Bound { what: "the name", bound });
    }
    Ok(given.to_owned())
}

/// A snapshot's name.
pub(super) fn snapshot_name(given: &str) -> Result<String, ParseError> {
    if is_name(given) {
        return Ok(given.to_owned());
    }
    let most = limits::SNAPSHOT_NAME_BYTES;
    let bound = format!("1 to {most} letters, digits, `.`, `_` and `-`, no `.` in front");
    Err(ParseError::Bound { what: "the name", bound })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn memory_takes_binary_suffixes() {
        for (given, bytes) in [
            ("512M", 512 << 20),
            ("512m", 512 << 20),
            ("1G", 1 << 30),
            ("2048K", 2 << 20),
            ("2097152", 2 << 20),
            ("4GiB", 4 << 30),
            ("1T", 1 << 40),
        ] {
            assert_eq!(memory(given), Ok(bytes), "{given}");
        }
        for given in
            ["", "M", "0", "0M", "1M", "3M", "-2M", "+2M", "2.5G", "2 M", "2P", "99999999999T", "0x2M"]
        {
            assert!(memory(given).is_err(), "{given}");
        }
    }

    #[test]
    fn bandwidth_takes_decimal_suffixes() {
        for (given, bits) in [
            ("100M", 100_000_000),
            ("1g", 1_000_000_000),
            ("64kbit", 64_000),
            ("10Mbit/s", 10_000_000),
            ("7", 7),
        ] {
            assert_eq!(bandwidth(given), Ok(bits), "{given}");
        }
        for given in ["", "0", "M", "1T", "1.5G", "-1", "10MB", "18446744073709551615G"] {
            assert!(bandwidth(given).is_err(), "{given}");
        }
    }

    #[test]
    fn the_time_to_dial_again_takes_s_and_m_and_0() {
        for (given, ms) in [("0", 0), ("0s", 0), ("30s", 30_000), ("5m", 300_000), ("60m", 3_600_000)] {
            assert_eq!(resume_for(given), Ok(ms), "{given}");
        }
        for given in ["", "5", "300ms", "m", "-1s", "61m", "99999999999999999999m", "1h"] {
            assert!(resume_for(given).is_err(), "{given}");
        }
    }

    #[test]
    fn downtime_takes_ms_and_s() {
        for (given, ms) in [("300ms", 300), ("300", 300), ("2s", 2000), ("3600s", 3_600_000)] {
            assert_eq!(downtime(given), Ok(ms), "{given}");
        }
        for given in ["", "0", "0s", "1m", "1.5s", "-1", "3601s", "ms"] {
            assert!(downtime(given).is_err(), "{given}");
        }
    }

    #[test]
    fn load_takes_hex_and_decimal_addresses_and_doubled_commas() {
        let expect = |file: &str, addr| Ok(Load { file: PathBuf::from(file), addr });
        assert_eq!(load("file=/a,addr=0x4000000"), expect("/a", 0x400_0000));
        assert_eq!(load("addr=4096,file=b c"), expect("b c", 4096));
        assert_eq!(load("file=a,,b,addr=0X10"), expect("a,b", 16));
        assert_eq!(load("file=a=b,addr=1"), expect("a=b", 1));
        for (given, part) in [
            ("", "KEY=VALUE"),
            ("file=/a", "addr=GPA is missing"),
            ("addr=1", "file=PATH is missing"),
            ("file=,addr=1", "file=PATH is missing"),
            ("file=a,b,addr=1", "`,,` for a comma"),
            ("file=a,addr=1,addr=2", "twice"),
            ("file=a,file=b,addr=2", "twice"),
            ("file=a,address=1", "unknown key `address`"),
            ("file=a,addr=", "guest-physical address"),
            ("file=a,addr=0x", "guest-physical address"),
            ("file=a,addr=0x+1", "guest-physical address"),
            ("file=a,addr=-1", "guest-physical address"),
            ("file=a,addr=0x10000000000000000", "guest-physical address"),
            ("file=a,addr=12ab", "guest-physical address"),
        ] {
            let error = load(given).unwrap_err().to_string();
            assert!(error.contains(part), "{given}: {error}");
        }
    }

    #[test]
    fn serial_and_cpus() {
        assert_eq!(serial("stdio"), Ok(Serial::Stdio));
        assert_eq!(serial("off"), Ok(Serial::Off));
        assert_eq!(serial("file=/x,y=z"), Ok(Serial::File(PathBuf::from("/x,y=z"))));
        for given in ["", "file=", "file", "tty", "STDIO"] {
            assert!(serial(given).is_err(), "{given}");
        }
        assert_eq!(cpu("host"), Ok(CpuChoice::Host));
        assert_eq!(cpu("v4"), Ok(CpuChoice::Level(Level::V4)));
        assert_eq!(cpu("./v2"), Ok(CpuChoice::Baseline(PathBuf::from("./v2"))));
        assert!(cpu("").is_err());
        assert_eq!(boot_protocol("auto"), Ok(BootProtocol::Auto));
        assert_eq!(boot_protocol("pvh"), Ok(BootProtocol::Pvh));
        assert_eq!(boot_protocol("linux64"), Ok(BootProtocol::Linux64));
        assert!(boot_protocol("linux").is_err());
        assert_eq!((on_off("on"), on_off("off")), (Ok(true), Ok(false)));
        assert!(on_off("1").is_err());
    }

    #[test]
    fn names_are_bounded() {
        assert_eq!(name("web-1"), Ok("web-1".to_owned()));
        for given in ["", "a\nb", &"x".repeat(limits::NAME_BYTES + 1)] {
            assert!(name(given).is_err(), "{given}");
        }
        assert_eq!(snapshot_name("before-upgrade_1.2"), Ok("before-upgrade_1.2".to_owned()));
        for given in ["", ".", "..", ".a", "a/b", "a b", "ä", &"x".repeat(limits::SNAPSHOT_NAME_BYTES + 1)] {
            assert!(snapshot_name(given).is_err(), "{given}");
        }
    }

    proptest! {
        #[test]
        fn any_path_survives_when_its_commas_are_doubled(path in "[ -~]{1,40}", addr: u64) {
            let given = format!("file={},addr={addr:#x}", path.replace(',', ",,"));
            prop_assert_eq!(load(&given), Ok(Load { file: PathBuf::from(path), addr }));
        }

        #[test]
        fn nothing_panics(given in ".{0,60}") {
            let _ = (memory(&given), bandwidth(&given), downtime(&given), resume_for(&given), load(&given), serial(&given));
        }
    }
}
