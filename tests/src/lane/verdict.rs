//! What the first level says on its console, one line a step.

use serde::{Deserialize, Serialize};

/// What a line of ours begins with, wherever the console's other writers have put it.
const MARK: &str = "lane: ";

/// The steps, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// /dev/kvm is there.
    Kvm,
    /// pagestorm boots, and every page it wrote is there.
    PagestormBoots,
    /// It moves to another `vmm`, and every page is still there.
    PagestormMoves,
    /// Debian's generic kernel comes to user space and finds its disk and its random number generator.
    GenericBoots,
    /// Its `poweroff` ends `vmm` with exit code 0.
    GenericPowersOff,
    /// Debian's cloud kernel, as its package has it (a bzImage), comes to user space.
    CloudBoots,
    /// It moves to another `vmm` under load, and itself finds nothing wrong.
    CloudMoves,
    /// A snapshot of it is restored in a fresh process, and it goes on there.
    CloudRestored,
    /// Its `poweroff` ends the `vmm` that it has come to with exit code 0.
    CloudPowersOff,
}

impl Step {
    /// Every step, in the order in which they come.
    pub const ALL: [Self; 9] = [
        Self::Kvm,
        Self::PagestormBoots,
        Self::PagestormMoves,
        Self::GenericBoots,
        Self::GenericPowersOff,
        Self::CloudBoots,
        Self::CloudMoves,
        Self::CloudRestored,
        Self::CloudPowersOff,
    ];
}

/// How a step ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// Which.
    pub step: Step,
    /// Whether all that it wants held.
    pub ok: bool,
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
        let verdict =
            Verdict { step: Step::Kvm, ok: true, seconds: 0.5, said: "a \"word\"\nand more".into() };
        let line = verdict.line();
        assert_eq!(line.lines().count(), 1);
        assert_eq!(Verdict::find(&format!("[    4.2] kvm: {line}\r")), Some(verdict));
        assert_eq!(Verdict::find("lane: alive"), None);
        assert_eq!(Verdict::find(""), None);
    }
}
