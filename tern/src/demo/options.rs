//! The demo's command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use vmm::migrate::Mode;

use crate::demo::content::MIX_IN_WORDS;
use crate::demo::error::DemoError;
use crate::limits;

/// Shows a running VM move from one site to another, with real processes on this machine: needs /dev/kvm and loopback, no
/// root.
#[derive(Args, Clone, Debug)]
#[command(after_help = format!("Built-in memory: {MIX_IN_WORDS}."))]
pub struct Options {
    /// Guest memory to move instead of the built-in content, or (site=FILE) memory that a VM or a file of site B holds.
    /// The first site=FILE is the sibling VM's memory, further ones are files.
    #[arg(long = "memory-image", value_name = "[site=]FILE", value_parser = parse_image)]
    pub(crate) images: Vec<Image>,
    /// The VM's memory, where the content is built in: a multiple of 2 MiB.
    #[arg(long, default_value = "512M", value_parser = parse_size, conflicts_with = "images")]
    pub(crate) memory: u64,
    /// Pages that the guest writes every second while it moves.
    #[arg(long, value_name = "RATE", default_value_t = 500, value_parser = clap::value_parser!(u64).range(..=limits::DIRTY_RATE))]
    pub(crate) dirty: u64,
    /// A write replaces 16 bytes of its page, as a database does, in the place of the whole page.
    #[arg(long)]
    pub(crate) small_writes: bool,
    /// The WAN link's rate each way, bits a second: 100M, 1G.
    #[arg(long, default_value = "100M", value_parser = parse_rate)]
    pub(crate) rate: u64,
    /// The WAN link's round trip: 50ms, 0.2s.
    #[arg(long, default_value = "50ms", value_parser = parse_time)]
    pub(crate) rtt: Duration,
    /// Packets that the WAN link loses by chance, each way, percent: 0.5. Which ones, the seed says.
    #[arg(long, value_name = "PERCENT", default_value = "0", value_parser = parse_loss)]
    pub(crate) loss: u32,
    /// How long the guest may stand still at the switchover, milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 300)]
    pub(crate) downtime_ms: u64,
    /// Whether the VM may run there before its memory is complete.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) mode: Mode,
    /// The most memory that old versions of pages may take at the source, so that pages written again go as deltas: 64M, 0 for none.
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub(crate) delta_cache: Option<u64>,
    /// Ask what it will cost before it moves, and show how right that was (`vmm migrate --dry-run`).
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Chooses the built-in content: the same seed gives the same bytes.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Print the report as one JSON object, the last line of standard output.
    #[arg(long)]
    pub(crate) json: bool,
    /// Leave the logs of all processes in this directory. Without it they are kept only when something goes wrong.
    #[arg(long, value_name = "DIR")]
    pub(crate) keep_logs: Option<PathBuf>,
}

/// A `--memory-image`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Image {
    /// The memory that moves.
    Vm(PathBuf),
    /// Memory that site B holds.
    Site(PathBuf),
}

impl Options {
    /// The memory that moves, if it is not built in.
    ///
    /// # Errors
    /// If there are several, or only such of site B.
    pub(crate) fn vm_image(&self) -> Result<Option<&PathBuf>, DemoError> {
        let images: Vec<_> = self
            .images
            .iter()
            .filter_map(|image| match image {
                Image::Vm(path) => Some(path),
                Image::Site(_) => None,
            })
            .collect();
        match images[..] {
            [] if self.images.is_empty() => Ok(None),
            [image] => Ok(Some(image)),
            [] => Err(DemoError::Options(
                "only site=FILE images are given: add --memory-image FILE, the memory that is to move".into(),
            )),
            [..] => Err(DemoError::Options(
                "two images for the VM that moves: give one without and the others with site=".into(),
            )),
        }
    }

    /// The memories that site B holds.
    pub(crate) fn site_images(&self) -> impl Iterator<Item = &PathBuf> {
        self.images.iter().filter_map(|image| match image {
            Image::Vm(_) => None,
            Image::Site(path) => Some(path),
        })
    }
}

fn parse_image(text: &str) -> Result<Image, String> {
    match text.strip_prefix("site=") {
        Some("") => Err("site= wants a file behind it".into()),
        Some(path) => Ok(Image::Site(path.into())),
        None => Ok(Image::Vm(text.into())),
    }
}

/// A number with one of the given units behind it, as a whole multiple of `1`.
fn parse_unit(text: &str, units: &[(&str, f64)]) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let known =
        || units.iter().map(|(unit, _)| *unit).filter(|u| !u.is_empty()).collect::<Vec<_>>().join(", ");
    let (_, factor) = units
        .iter()
        .find(|(known, _)| known.eq_ignore_ascii_case(unit))
        .ok_or_else(|| format!("unknown unit `{unit}`: use {}", known()))?;
    let value = number.parse::<f64>().map_err(|_| format!("`{number}` is not a number"))? * factor;
    if !(value.is_finite() && value < 9e15) {
        return Err(format!("{text} is too much"));
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "checked to be in range; digits only"
    )]
    let whole = value.round() as u64;
    Ok(whole)
}

fn parse_bytes(text: &str) -> Result<u64, String> {
    let mib = 1_048_576.0;
    parse_unit(text, &[("", 1.0), ("K", 1024.0), ("M", mib), ("G", 1024.0 * mib)])
}

fn parse_size(text: &str) -> Result<u64, String> {
    const MIB: u64 = 1 << 20;
    let bytes = parse_bytes(text)?;
    if !bytes.is_multiple_of(2 * MIB) || !(limits::MEMORY_MIN..=limits::MEMORY_MAX).contains(&bytes) {
        let (min, max) = (limits::MEMORY_MIN / MIB, limits::MEMORY_MAX / MIB);
        return Err(format!("use a multiple of 2 MiB from {min}M to {max}M"));
    }
    Ok(bytes)
}

fn parse_rate(text: &str) -> Result<u64, String> {
    let rate = parse_unit(text, &[("", 1.0), ("k", 1e3), ("M", 1e6), ("G", 1e9)])?;
    if (limits::RATE_MIN..=limits::RATE_MAX).contains(&rate) {
        Ok(rate)
    } else {
        Err(format!("use {}k to {}G", limits::RATE_MIN / 1000, limits::RATE_MAX / 1_000_000_000))
    }
}

fn parse_time(text: &str) -> Result<Duration, String> {
    let time = Duration::from_micros(parse_unit(text, &[("us", 1.0), ("ms", 1e3), ("s", 1e6)])?);
    if time <= limits::RTT_MAX { Ok(time) } else { Err(format!("use at most {:?}", limits::RTT_MAX)) }
}

/// Percent, as parts of a million.
fn parse_loss(text: &str) -> Result<u32, String> {
    let ppm = parse_unit(text, &[("", 1e4), ("%", 1e4)])?;
    u32::try_from(ppm)
        .ok()
        .filter(|ppm| *ppm <= limits::LOSS_MAX_PPM)
        .ok_or_else(|| format!("use at most {} percent", limits::LOSS_MAX_PPM / 10_000))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser, Debug)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn options(line: &str) -> Result<Options, String> {
        let words = std::iter::once("demo").chain(line.split_whitespace());
        Line::try_parse_from(words).map(|line| line.options).map_err(|error| error.to_string())
    }

    #[test]
    fn the_defaults_are_the_stated_scenario() {
        let options = options("").unwrap();
        assert_eq!((options.memory, options.dirty, options.rate), (512 << 20, 500, 100_000_000));
        assert_eq!(options.rtt, Duration::from_millis(50));
        assert_eq!(options.vm_image().unwrap(), None);
    }

    #[test]
    fn units_are_understood_and_nonsense_is_refused() {
        assert_eq!(options("--rate 1.5G --rtt 0.2s").unwrap().rate, 1_500_000_000);
        assert_eq!(options("--rtt 0.2s").unwrap().rtt, Duration::from_millis(200));
        assert_eq!(options("--loss 0.5").unwrap().loss, 5000);
        assert_eq!(options("--memory 64M --dirty 0").unwrap().memory, 64 << 20);
        for bad in [
            "--rate 100X",
            "--rate 0",
            "--rtt 50",
            "--rtt -1ms",
            "--loss 60",
            "--memory 63M",
            "--memory 2M",
            "--rate G",
        ] {
            assert!(options(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn one_image_moves_and_the_others_are_the_sites() {
        let line = "--memory-image vm.ram --memory-image site=a.ram --memory-image site=b.ram";
        let given = options(line).unwrap();
        assert_eq!(given.vm_image().unwrap(), Some(&"vm.ram".into()));
        assert_eq!(given.site_images().collect::<Vec<_>>(), ["a.ram", "b.ram"]);
        assert!(options("--memory-image site=a.ram").unwrap().vm_image().is_err());
        assert!(options("--memory-image a.ram --memory-image b.ram").unwrap().vm_image().is_err());
        assert!(options("--memory-image site=").is_err());
    }
}
