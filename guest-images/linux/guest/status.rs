//! How a workload says how it stands: one file of JSON each in `/run/tern`, replaced as a whole.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Where the status files lie (a tmpfs).
pub(crate) const DIRECTORY: &str = "/run/tern";
/// Between two writes of a status: writing one costs several milliseconds where the supervisor is emulated.
const BETWEEN_WRITES: Duration = Duration::from_millis(250);

/// The options of a workload, words `key=value`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Options {
    /// Which content; every value gives other bytes.
    pub(crate) seed: u64,
    /// Between two rounds.
    pub(crate) pause: Duration,
    /// Where workloads that write files write them.
    pub(crate) directory: PathBuf,
}

impl Default for Options {
    fn default() -> Self {
        Self { seed: 1, pause: Duration::from_millis(200), directory: PathBuf::from("/tmp/work") }
    }
}

impl Options {
    pub(crate) fn parse(words: &[&str]) -> Result<Self, String> {
        let mut options = Self::default();
        for word in words {
            let (key, value) =
                word.split_once('=').ok_or_else(|| format!("{word}: not of the form key=value"))?;
            let number = || value.parse::<u64>().map_err(|error| format!("{word}: {error}"));
            match key {
                "seed" => options.seed = number()?,
                "pause_ms" => options.pause = Duration::from_millis(number()?),
                "dir" => options.directory = PathBuf::from(value),
                unknown => return Err(format!("{unknown}: the options are seed, pause_ms and dir")),
            }
        }
        Ok(options)
    }
}

/// A workload's status.
#[derive(Debug)]
pub(crate) struct Status {
    path: PathBuf,
    rounds: u64,
    failure: Option<String>,
    written: Option<Instant>,
}

impl Status {
    /// The status of the workload `name`, not yet written.
    pub(crate) fn of(name: &str) -> io::Result<Self> {
        fs::create_dir_all(DIRECTORY)?;
        let path = PathBuf::from(DIRECTORY).join(name).with_extension("json");
        Ok(Self { path, rounds: 0, failure: None, written: None })
    }

    /// Notes that a check failed. The first failure stays for good.
    pub(crate) fn fail(&mut self, message: String) {
        if self.failure.is_none() {
            self.failure = Some(message);
            self.written = None;
        }
    }

    /// Ends a round: counts it, and writes the status with `details` unless that was done a moment ago.
    pub(crate) fn round(&mut self, details: &[(&str, u64)]) -> io::Result<()> {
        self.rounds += 1;
        if self.written.is_some_and(|written| written.elapsed() < BETWEEN_WRITES) {
            return Ok(());
        }
        self.written = Some(Instant::now());
        let fresh = self.path.with_extension("new");
        fs::write(&fresh, self.json(details))?;
        fs::rename(fresh, &self.path)
    }

    fn json(&self, details: &[(&str, u64)]) -> String {
        let mut line = format!("{{\"ok\":{},\"rounds\":{}", self.failure.is_none(), self.rounds);
        for (key, value) in details {
            let _ = write!(line, ",\"{key}\":{value}");
        }
        if let Some(failure) = &self.failure {
            let _ = write!(line, ",\"failure\":{}", quoted(failure));
        }
        line.push('}');
        line
    }
}

/// `text` as a JSON string.
pub(crate) fn quoted(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for character in text.chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            control if control.is_control() => {
                let _ = write!(quoted, "\\u{:04x}", u32::from(control));
            }
            plain => quoted.push(plain),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_and_others_refused() {
        let options = Options::parse(&["seed=9", "dir=/mnt", "pause_ms=5"]).unwrap();
        assert_eq!(
            options,
            Options { seed: 9, pause: Duration::from_millis(5), directory: PathBuf::from("/mnt") }
        );
        assert!(Options::parse(&["sed=9"]).unwrap_err().contains("sed"));
        assert!(Options::parse(&["seed"]).unwrap_err().contains("key=value"));
        assert!(Options::parse(&["seed=x"]).is_err());
    }

    #[test]
    fn the_first_failure_stays() {
        let mut status = Status { path: PathBuf::new(), rounds: 3, failure: None, written: None };
        assert_eq!(status.json(&[("bytes", 7)]), r#"{"ok":true,"rounds":3,"bytes":7}"#);
        status.fail("byte 5 of \"f\"".to_owned());
        status.fail("another".to_owned());
        assert_eq!(status.json(&[]), r#"{"ok":false,"rounds":3,"failure":"byte 5 of \"f\""}"#);
    }
}
