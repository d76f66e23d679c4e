//! What a first level says on its console, one line a step.

use serde::{Deserialize, Serialize};

/// What a line of ours begins with, wherever the console's other writers have put it.
const MARK: &str = "lane: ";

/// A first level's share of the steps. Each uses one CPU of the host, and they run side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// What boots: a bare-metal guest, and Debian's generic kernel.
    Boots,
    /// What moves: Debian's cloud kernel at work.
    Moves,
}

impl Part {
    /// Every part.
    pub const ALL: [Self; 2] = [Self::Boots, Self::Moves];

    /// Its name on a command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Boots => "boots",
            Self::Moves => "moves",
        }
    }

    /// Its steps, in the order in which they come.
    #[must_use]
    pub fn steps(self) -> &'static [Step] {
        use Step::{
            CloudBoots, CloudMoves, CloudPowersOff, CloudRestored, GenericBoots, GenericRestarts, Kvm,
            PagestormBoots, PagestormMoves,
        };
        match self {
            Self::Boots => &[Kvm, PagestormBoots, PagestormMoves, GenericBoots, GenericRestarts],
            Self::Moves => &[Kvm, CloudBoots, CloudMoves, CloudRestored, CloudPowersOff],
        }
    }
}

/// The steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// /dev/kvm is there.
    Kvm,
    /// pagestorm boots, and every page it wrote is there.
    PagestormBoots,
    /// It moves to another `vmm`, and every page is still there.
    PagestormMoves,
    /// Debian's generic kernel comes to user space, with memory on both sides of the hole below 4 GiB, and finds its disk and its random
    /// number generator.
    GenericBoots,
    /// Its `reboot` ends `vmm` with exit code 0.
    GenericRestarts,
    /// Debian's cloud kernel, as its package has it (a bzImage), comes to user space.
    CloudBoots,
    /// It moves to another `vmm` under load, and itself finds nothing wrong.
    CloudMoves,
    /// A snapshot of it is restored in a fresh process, and it goes on there.
    CloudRestored,
    /// Its `poweroff` ends the `vmm` that it has come to with exit code 0.
    CloudPowersOff,
}

/// How a step ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// Which.
    pub step: Step,
    /// Whether all that it wants held.
    pub ok: bool,
    /// Whether it failed because something did not come in time, as when a machine under TCG sleeps for ever. Another try may tell.
    pub timed_out: bool,
    /// How long it took, seconds of the first level's clock. For a reader's patience, not a measurement.
    pub seconds: f64,
    /// What was seen, or what was missing.
    pub said: String,
}

impl Verdict {
    /// The line that says it.
    #[must_use]
    pub fn line(&self) -> String {
        format!("{MARK}{}", serde_json::json!(self))
    }

    /// The verdict in a line of the console, if it has one.
    #[must_use]
    pub fn find(line: &str) -> Option<Self> {
        let (_, json) = line.split_once(MARK)?;
        serde_json::from_str(json.trim_end()).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_is_found_behind_whatever_the_kernel_wrote_into_its_line() {
        let said = "a \"word\"\nand more".into();
        let verdict = Verdict { step: Step::Kvm, ok: true, timed_out: false, seconds: 0.5, said };
        let line = verdict.line();
        assert_eq!(line.lines().count(), 1);
        assert_eq!(Verdict::find(&format!("[    4.2] kvm: {line}\r")), Some(verdict));
        assert_eq!(Verdict::find("lane: alive"), None);
        assert_eq!(Verdict::find(""), None);
    }
}
