//! What the demo shows while it runs, on standard error: one line that is drawn again and again on a terminal, a plain line
//! a second elsewhere.

use std::io::{IsTerminal, Write};
use std::time::Instant;

use vmm::migrate::report::{Phase, Progress};

use crate::demo::report::{Bytes, named};
use crate::demo::shaper::WanCounts;
use crate::limits;

/// Standard error, as the demo uses it.
#[derive(Debug)]
pub(crate) struct Display {
    begun: Instant,
    terminal: bool,
    /// Whether a line without an end stands on the terminal.
    unfinished: bool,
    last_line: Option<Instant>,
    last_phase: Option<Phase>,
}

impl Display {
    /// Looks whether there is a terminal.
    pub(crate) fn new() -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self { begun: Instant::now(), terminal, unfinished: false, last_line: None, last_phase: None }
    }

    /// Says what comes next.
    pub(crate) fn step(&mut self, text: &str) {
        self.end_line();
        self.write(&format!("[{:6.2} s] {text}\n", self.begun.elapsed().as_secs_f64()));
    }

    /// Shows how far the migration is.
    pub(crate) fn progress(&mut self, progress: &Progress, wan: WanCounts) {
        let due = self.last_line.is_none_or(|at| at.elapsed() >= limits::PROGRESS_LINES)
            || self.last_phase != Some(progress.phase);
        if !self.terminal && !due {
            return;
        }
        self.last_line = Some(Instant::now());
        self.last_phase = Some(progress.phase);
        let line = progress_line(progress, wan);
        let at = self.begun.elapsed().as_secs_f64();
        if self.terminal {
            self.write(&format!("\r\x1b[2K[{at:6.2} s] {line}"));
            self.unfinished = true;
        } else {
            self.write(&format!("[{at:6.2} s] {line}\n"));
        }
    }

    /// Leaves the terminal at the start of a line.
    pub(crate) fn end_line(&mut self) {
        if std::mem::take(&mut self.unfinished) {
            self.write("\n");
        }
    }

    fn write(&self, text: &str) {
        let mut out = std::io::stderr().lock();
        // Progress that nobody can read is no reason to end a migration.
        if let Err(error) = out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            tracing::debug!(%error, "progress cannot be shown");
        }
    }
}

fn progress_line(progress: &Progress, wan: WanCounts) -> String {
    const BAR: u64 = 20;
    let phase = match progress.phase {
        Phase::Offering => "agreeing".to_owned(),
        Phase::Precopy => format!("round {}", progress.round),
        Phase::StopAndCopy => "paused, last pages".to_owned(),
        Phase::Handover => "handing over".to_owned(),
        Phase::PrecopyCut => "connection lost, dialling".to_owned(),
        Phase::Committing => "committing".to_owned(),
        Phase::InDoubt => "IN DOUBT".to_owned(),
        Phase::Postcopy => "runs there, the rest follows".to_owned(),
        Phase::PostcopyCut => "runs there, connection lost".to_owned(),
        Phase::Ended => "ended".to_owned(),
    };
    let filled = (progress.named_pages * BAR).checked_div(progress.round_pages).unwrap_or(0).min(BAR);
    let bar: String = (0..BAR).map(|at| if at < filled { '█' } else { '·' }).collect();
    let rungs = named(&progress.rungs);
    let all: u64 = rungs.iter().map(|(_, rung)| rung.pages).sum();
    let shares: Vec<_> = rungs
        .iter()
        .filter(|(_, rung)| rung.pages > 0)
        .map(|(name, rung)| format!("{name} {}%", rung.pages * 100 / all.max(1)))
        .collect();
    let (out, back) = (Bytes(wan.to_destination.bytes), Bytes(wan.to_source.bytes));
    format!("{phase:<18} {bar} WAN {out} out, {back} back  {}", shares.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_shows_round_share_and_rungs() {
        let mut progress = Progress {
            phase: Phase::Precopy,
            round: 1,
            round_pages: 100,
            named_pages: 50,
            ..Progress::default()
        };
        progress.rungs.zero.pages = 1;
        progress.rungs.source.pages = 3;
        let line = progress_line(&progress, WanCounts::default());
        assert!(line.contains("round 1"), "{line}");
        assert!(line.contains("██████████··········"), "{line}");
        assert!(line.contains("zero 25%, source 75%"), "{line}");
        assert!(!line.contains("host"), "{line}");
    }

    #[test]
    fn a_round_of_no_pages_is_shown_too() {
        assert!(progress_line(&Progress::default(), WanCounts::default()).contains("····"));
    }
}
