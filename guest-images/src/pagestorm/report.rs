//! The JSON line on the serial port.

use core::fmt;

/// What pagestorm says of itself: the answer to a check (`c`) or to a status question (`s`).
///
/// One line of JSON, always with these fields in this order:
/// `{"check":N,"pages_written":W,"pages_checked":P,"failures":F,"first_bad":null|"0x…","uptime_ms":T,"heartbeats":H,"max_gap_us":G}`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Number of the check that this line is the result of, from 1; 0 for a status line, which checks nothing.
    pub check: u64,
    /// Page writes since boot, a page counting as often as it was written.
    pub pages_written: u64,
    /// Distinct pages that this check looked at: all that have been written at least once.
    pub pages_checked: u64,
    /// Pages that did not hold what they ought to, and counters that did not fit the others.
    pub failures: u64,
    /// Guest-physical address of the first failure.
    pub first_bad: Option<u64>,
    /// Time since boot by the guest's clock.
    pub uptime_ms: u64,
    /// Heartbeats since boot.
    pub heartbeats: u64,
    /// The longest time between two heartbeats by the guest's clock, since boot or the last `r`.
    pub max_gap_us: u64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{{\"check\":{},\"pages_written\":{},\"pages_checked\":{},\"failures\":{},\"first_bad\":",
            self.check, self.pages_written, self.pages_checked, self.failures
        )?;
        match self.first_bad {
            Some(gpa) => write!(f, "\"{gpa:#x}\"")?,
            None => f.write_str("null")?,
        }
        write!(
            f,
            ",\"uptime_ms\":{},\"heartbeats\":{},\"max_gap_us\":{}}}",
            self.uptime_ms, self.heartbeats, self.max_gap_us
        )
    }
}

impl Report {
    /// Reads a line that pagestorm printed; `None` if it is any other line.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let mut rest = line.trim_end().strip_prefix('{')?.strip_suffix('}')?.split(',');
        let mut field = |key: &str| {
            let (name, value) = rest.next()?.split_once(':')?;
            (name.strip_prefix('"')?.strip_suffix('"')? == key).then_some(value)
        };
        let report = Self {
            check: field("check")?.parse().ok()?,
            pages_written: field("pages_written")?.parse().ok()?,
            pages_checked: field("pages_checked")?.parse().ok()?,
            failures: field("failures")?.parse().ok()?,
            first_bad: match field("first_bad")? {
                "null" => None,
                quoted => {
                    let digits = quoted.strip_prefix("\"0x")?.strip_suffix('"')?;
                    Some(u64::from_str_radix(digits, 16).ok()?)
                }
            },
            uptime_ms: field("uptime_ms")?.parse().ok()?,
            heartbeats: field("heartbeats")?.parse().ok()?,
            max_gap_us: field("max_gap_us")?.parse().ok()?,
        };
        rest.next().is_none().then_some(report)
    }
}
