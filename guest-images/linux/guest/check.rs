//! `tern-check`: every verdict in one line of JSON, and the READY line.

use std::fmt::Write as _;
use std::fs;
use std::io;

use crate::clock::uptime_centis;
use crate::status::{DIRECTORY, quoted};
use crate::{dmesg, files, journal};

/// How many warnings `ready` found, so that `check` can tell the later ones.
const AT_READY: &str = "/run/tern/warnings-at-ready";
/// Warnings that the line repeats in full.
const LINES_SHOWN: usize = 8;

/// Notes the warnings of the boot and prints `tern: READY uptime_s=…` with the given words.
pub(crate) fn ready(words: &[&str]) -> Result<(), String> {
    let warnings = dmesg::warnings().map_err(|error| format!("/dev/kmsg: {error}"))?;
    fs::create_dir_all(DIRECTORY)
        .and_then(|()| fs::write(AT_READY, warnings.len().to_string()))
        .map_err(|error| format!("{AT_READY}: {error}"))?;
    let uptime = uptime_centis().map_err(|error| error.to_string())?;
    println!("tern: READY uptime_s={} boot_warnings={} {}", seconds(uptime), warnings.len(), words.join(" "));
    Ok(())
}

/// Prints `tern: CHECK {…}`. `ok` in it is true when every check held; the exit status says the same.
pub(crate) fn run() -> Result<(), String> {
    let verdict = Verdict::gather().map_err(|error| format!("cannot check: {error}"))?;
    println!("tern: CHECK {}", verdict.json());
    if verdict.ok() { Ok(()) } else { Err("a check failed".to_owned()) }
}

#[derive(Debug)]
struct Verdict {
    uptime_centis: u64,
    /// Name and status of each workload that has written one.
    workloads: Vec<(String, String)>,
    /// Whether sha256sum finds the set that stays unchanged.
    kept: Option<bool>,
    journal: Option<Result<u64, String>>,
    warnings_at_ready: usize,
    warnings: Vec<String>,
}

impl Verdict {
    fn gather() -> io::Result<Self> {
        let warnings_at_ready = match fs::read_to_string(AT_READY) {
            Ok(text) => text.parse().map_err(|error| io::Error::other(format!("{AT_READY}: {error}")))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error),
        };
        Ok(Self {
            workloads: statuses()?,
            kept: files::kept_is_right()?,
            journal: journal::lines()?,
            warnings_at_ready,
            warnings: dmesg::warnings()?,
            uptime_centis: uptime_centis()?,
        })
    }

    fn ok(&self) -> bool {
        self.workloads.iter().all(|(_, status)| status.starts_with("{\"ok\":true"))
            && self.kept != Some(false)
            && !matches!(self.journal, Some(Err(_)))
            && self.warnings.len() <= self.warnings_at_ready
    }

    fn json(&self) -> String {
        let mut line = format!("{{\"ok\":{},\"uptime_s\":{}", self.ok(), seconds(self.uptime_centis));
        line.push_str(",\"workloads\":{");
        for (index, (name, status)) in self.workloads.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            let _ = write!(line, "{comma}{}:{status}", quoted(name));
        }
        line.push('}');
        if let Some(kept) = self.kept {
            let _ = write!(line, ",\"kept_files_ok\":{kept}");
        }
        match &self.journal {
            Some(Ok(lines)) => {
                let _ = write!(line, ",\"journal_lines\":{lines}");
            }
            Some(Err(message)) => {
                let _ = write!(line, ",\"journal_failure\":{}", quoted(message));
            }
            None => {}
        }
        let later = self.warnings.get(self.warnings_at_ready..).unwrap_or_default();
        let shown: Vec<String> = later.iter().take(LINES_SHOWN).map(|text| quoted(text)).collect();
        let _ = write!(line, ",\"warnings\":{},\"warning_lines\":[{}]}}", later.len(), shown.join(","));
        line
    }
}

/// Every workload's name and status, in the order of the names.
fn statuses() -> io::Result<Vec<(String, String)>> {
    let mut statuses = Vec::new();
    for entry in fs::read_dir(DIRECTORY)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "json")
            && let Some(name) = path.file_stem().and_then(|name| name.to_str())
        {
            statuses.push((name.to_owned(), fs::read_to_string(&path)?));
        }
    }
    statuses.sort();
    Ok(statuses)
}

fn seconds(centis: u64) -> String {
    format!("{}.{:02}", centis / 100, centis % 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict() -> Verdict {
        Verdict {
            uptime_centis: 1205,
            workloads: vec![("files".to_owned(), "{\"ok\":true,\"rounds\":2}".to_owned())],
            kept: Some(true),
            journal: Some(Ok(7)),
            warnings_at_ready: 1,
            warnings: vec!["at boot".to_owned()],
        }
    }

    #[test]
    fn a_sound_guest_says_so_in_one_line() {
        assert_eq!(
            verdict().json(),
            "{\"ok\":true,\"uptime_s\":12.05,\"workloads\":{\"files\":{\"ok\":true,\"rounds\":2}},\
             \"kept_files_ok\":true,\"journal_lines\":7,\"warnings\":0,\"warning_lines\":[]}"
        );
    }

    #[test]
    fn each_check_alone_makes_the_verdict_bad() {
        let spoil: [fn(&mut Verdict); 4] = [
            |verdict| verdict.workloads[0].1 = "{\"ok\":false,\"rounds\":2}".to_owned(),
            |verdict| verdict.kept = Some(false),
            |verdict| verdict.journal = Some(Err("line 3".to_owned())),
            |verdict| verdict.warnings.push("soft lockup".to_owned()),
        ];
        for (number, spoil) in spoil.into_iter().enumerate() {
            let mut verdict = verdict();
            spoil(&mut verdict);
            assert!(verdict.json().starts_with("{\"ok\":false"), "{number}");
        }
    }
}
