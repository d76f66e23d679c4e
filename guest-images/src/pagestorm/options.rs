//! The command line.

use core::fmt;

use super::limits;

/// What a write puts into a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// A whole page of pseudo-random bytes: nothing compresses it.
    Random,
    /// A whole page of words and lines: compresses as text does.
    Text,
    /// Sixteen bytes; the rest of the page stays as it was, whoever wrote it.
    Rewrite,
}

impl Content {
    /// Its word on the command line.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::Text => "text",
            Self::Rewrite => "rewrite",
        }
    }
}

/// What the CPU does while nothing is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Idle {
    /// It halts until a timer interrupt: the host's CPU is free for others.
    Halt,
    /// It looks at the clock all the time: times are exact to a few microseconds.
    Spin,
}

impl Idle {
    /// Its word on the command line.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Halt => "halt",
            Self::Spin => "spin",
        }
    }
}

/// What the command line asks for. `Display` writes a command line that parses back to the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// `rate`: pages written a second; 0 writes none.
    pub rate_pps: u64,
    /// `ws`: bytes of the working set, counters included; whole pages.
    pub ws_bytes: u64,
    /// `base`: guest-physical address of the working set, a page's first byte.
    pub base: u64,
    /// `content`.
    pub content: Content,
    /// `seed`: two guests with the same seed write the same bytes.
    pub seed: u64,
    /// `heartbeat_us`: time between two heartbeats.
    pub heartbeat_us: u64,
    /// `report_ms`: time between two status lines nobody asked for; 0 for none.
    pub report_ms: u64,
    /// `prefill`: write every page of the working set once before the line "ready"; with
    /// [`Content::Rewrite`] the first rewrite of a page then comes on top of a page of text.
    pub prefill: bool,
    /// `idle`.
    pub idle: Idle,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            rate_pps: 500,
            ws_bytes: 64 << 20,
            base: 16 << 20,
            content: Content::Random,
            seed: 1,
            heartbeat_us: 1000,
            report_ms: 0,
            prefill: false,
            idle: Idle::Halt,
        }
    }
}

impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "rate={} ws={} base={:#x} content={} seed={} heartbeat_us={} report_ms={} prefill={} idle={}",
            self.rate_pps,
            self.ws_bytes,
            self.base,
            self.content.word(),
            self.seed,
            self.heartbeat_us,
            self.report_ms,
            u8::from(self.prefill),
            self.idle.word(),
        )
    }
}

/// What is wrong with a command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OptionsError<'a> {
    /// No such key, or no `=`.
    Unknown {
        /// The whole word.
        word: &'a str,
    },
    /// A key given twice.
    Repeated {
        /// The key.
        key: &'a str,
    },
    /// Not a number, or one above 2^64.
    NotANumber {
        /// The key.
        key: &'a str,
        /// What stands behind the `=`.
        value: &'a str,
    },
    /// A number that cannot be served.
    OutOfRange {
        /// The key.
        key: &'a str,
        /// The number.
        value: u64,
        /// Smallest allowed.
        min: u64,
        /// Largest allowed.
        max: u64,
    },
    /// An address or size that is not a multiple of 4096.
    NotWholePages {
        /// The key.
        key: &'a str,
        /// The number.
        value: u64,
    },
    /// Not one of the words that a key takes.
    UnknownWord {
        /// The key.
        key: &'a str,
        /// What stands behind the `=`.
        value: &'a str,
        /// The words that it takes.
        words: &'static str,
    },
}

impl fmt::Display for OptionsError<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown { word } => write!(
                f,
                "unknown word \"{word}\" on the command line: use rate= ws= base= content= seed= heartbeat_us= \
                 report_ms= prefill= idle="
            ),
            Self::Repeated { key } => write!(f, "{key}= is given twice: give it once"),
            Self::NotANumber { key, value } => write!(
                f,
                "{key}={value} is not a number: use decimal or 0x hexadecimal digits, and K, M or G for sizes"
            ),
            Self::OutOfRange { key, value, min, max } => {
                write!(f, "{key}={value} is out of range: use {min} to {max}")
            }
            Self::NotWholePages { key, value } => {
                write!(f, "{key}={value:#x} is not a multiple of 4096: use whole pages")
            }
            Self::UnknownWord { key, value, words } => write!(f, "{key}={value} is unknown: use {words}"),
        }
    }
}

impl core::error::Error for OptionsError<'_> {}

/// The keys, in the order of the bits that remember which were given.
const KEYS: [&str; 9] =
    ["rate", "ws", "base", "content", "seed", "heartbeat_us", "report_ms", "prefill", "idle"];

impl Options {
    /// Reads a command line: words `key=value` between blanks, in any order, each key at most once. A word whose
    /// key has a dot in it (`virtio_mmio.device=…`) is a monitor's hint to another kernel and is passed over.
    /// # Errors
    /// The first word that cannot be served.
    pub fn parse(line: &str) -> Result<Self, OptionsError<'_>> {
        let mut options = Self::default();
        let mut given = 0u16;
        for word in line.split_ascii_whitespace() {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            if key.contains('.') {
                continue;
            }
            let at = KEYS.iter().position(|known| *known == key).filter(|_| word.contains('='));
            let bit = 1u16 << at.ok_or(OptionsError::Unknown { word })?;
            if given & bit != 0 {
                return Err(OptionsError::Repeated { key });
            }
            given |= bit;
            options.set(key, value)?;
        }
        Ok(options)
    }

    fn set<'a>(&mut self, key: &'a str, value: &'a str) -> Result<(), OptionsError<'a>> {
        let number = |min, max| number(key, value, min, max);
        match key {
            "rate" => self.rate_pps = number(0, limits::RATE_MAX)?,
            "ws" => self.ws_bytes = whole_pages(key, number(limits::WS_BYTES_MIN, limits::MAPPED_BYTES)?)?,
            "base" => self.base = whole_pages(key, number(0, limits::MAPPED_BYTES)?)?,
            "content" => {
                self.content = [Content::Random, Content::Text, Content::Rewrite]
                    .into_iter()
                    .find(|content| content.word() == value)
                    .ok_or(OptionsError::UnknownWord { key, value, words: "random, text or rewrite" })?;
            }
            "seed" => self.seed = number(0, u64::MAX)?,
            "heartbeat_us" => {
                self.heartbeat_us = number(limits::HEARTBEAT_US_MIN, limits::HEARTBEAT_US_MAX)?;
            }
            "report_ms" => self.report_ms = number(0, limits::REPORT_MS_MAX)?,
            "prefill" => self.prefill = number(0, 1)? == 1,
            "idle" => {
                self.idle = [Idle::Halt, Idle::Spin]
                    .into_iter()
                    .find(|idle| idle.word() == value)
                    .ok_or(OptionsError::UnknownWord { key, value, words: "halt or spin" })?;
            }
            word => return Err(OptionsError::Unknown { word }),
        }
        Ok(())
    }
}

fn number<'a>(key: &'a str, value: &'a str, min: u64, max: u64) -> Result<u64, OptionsError<'a>> {
    let (digits, shift) = match value.as_bytes().last() {
        Some(b'K' | b'k') => (&value[..value.len() - 1], 10),
        Some(b'M' | b'm') => (&value[..value.len() - 1], 20),
        Some(b'G' | b'g') => (&value[..value.len() - 1], 30),
        _ => (value, 0),
    };
    let (digits, radix) = digits.strip_prefix("0x").map_or((digits, 10), |hex| (hex, 16));
    // from_str_radix takes a sign, which no key here does.
    let parsed = if digits.starts_with('+') { None } else { u64::from_str_radix(digits, radix).ok() };
    let number = parsed
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or(OptionsError::NotANumber { key, value })?;
    if number < min || number > max {
        return Err(OptionsError::OutOfRange { key, value: number, min, max });
    }
    Ok(number)
}

fn whole_pages(key: &str, value: u64) -> Result<u64, OptionsError<'_>> {
    if value.is_multiple_of(limits::PAGE_BYTES as u64) {
        Ok(value)
    } else {
        Err(OptionsError::NotWholePages { key, value })
    }
}
