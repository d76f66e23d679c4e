//! A Linux guest's judgement of itself: what `tern-check` in it says (guest-images/linux/guest/check.rs).
//!
//! [`Verdict::assert_goes_on_from`] compares two of them: whatever a migration may do to a guest, time goes on and nothing is lost.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Vm;

/// What a kernel says once when its CPU was taken away in the middle of a timer interrupt, as a busy host does: it was late, and nothing
/// is wrong. A clock that jumped would show in the workload that watches clocks.
pub(crate) const LATE: &str = "hrtimer: interrupt took";

/// What stands before the JSON of a verdict.
const CHECK: &str = "tern: CHECK ";

/// The guest's judgement of itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Verdict {
    /// /proc/uptime, seconds.
    pub uptime_s: f64,
    /// Each workload's status.
    pub workloads: BTreeMap<String, Workload>,
    /// Whether the files that stay have the sums that they were given.
    pub kept_files_ok: Option<bool>,
    /// Lines of the journal, if it has no gap.
    pub journal_lines: Option<u64>,
    /// What is wrong with it.
    pub journal_failure: Option<String>,
    /// The kernel's warnings since the boot was done.
    pub warnings: usize,
    /// The first of them.
    pub warning_lines: Vec<String>,
}

/// A workload's status.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Workload {
    /// Whether all its checks held.
    pub ok: bool,
    /// Rounds that it has done, each with its checks.
    pub rounds: u64,
}

impl Verdict {
    /// Has the guest behind `vm`'s serial port judge itself, within `patience`. Panics if anything is wrong; `unexplained` are those of the
    /// kernel's warnings that are.
    pub async fn ask(
        vm: &mut Vm,
        patience: Duration,
        unexplained: impl Fn(&[String]) -> Vec<String>,
    ) -> Self {
        vm.forget_lines();
        vm.type_line("tern-check").await;
        let line = vm.line_within("answers tern-check", patience, |line| line.contains(CHECK)).await;
        let json = line.split_once(CHECK).map_or("", |(_, json)| json);
        let verdict: Self = serde_json::from_str(json)
            .unwrap_or_else(|error| panic!("{}: a verdict that cannot be read ({error}): {line}", vm.name()));
        assert!(verdict.is_well(unexplained), "{}: the guest found something wrong: {line}", vm.name());
        verdict
    }

    fn is_well(&self, unexplained: impl Fn(&[String]) -> Vec<String>) -> bool {
        self.workloads.values().all(|workload| workload.ok)
            && self.kept_files_ok != Some(false)
            && self.journal_failure.is_none()
            && self.warnings == self.warning_lines.len()
            && unexplained(&self.warning_lines).is_empty()
    }

    /// Panics unless this verdict can come after `earlier` from the same guest: its time and its files go on.
    pub fn assert_follows(&self, earlier: &Self) {
        assert!(self.uptime_s > earlier.uptime_s, "uptime did not go on: {earlier:#?} and then {self:#?}");
        assert!(
            self.journal_lines >= earlier.journal_lines,
            "the journal got shorter: {earlier:#?} and then {self:#?}"
        );
        for (name, before) in &earlier.workloads {
            let now = self.workloads.get(name);
            assert!(
                now.is_some_and(|now| now.rounds >= before.rounds),
                "the workload {name} went back: {before:?} and then {now:?}"
            );
        }
    }

    /// Panics unless it follows `earlier` and every workload has done a round since.
    pub fn assert_goes_on_from(&self, earlier: &Self) {
        self.assert_follows(earlier);
        assert!(self.all_went_on(earlier), "a workload stands still: {earlier:#?} and then {self:#?}");
    }

    /// Whether every workload has done a round since `earlier`.
    #[must_use]
    pub fn all_went_on(&self, earlier: &Self) -> bool {
        earlier
            .workloads
            .iter()
            .all(|(name, before)| self.workloads.get(name).is_some_and(|now| now.rounds > before.rounds))
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "up {:.1} s, {} new warnings", self.uptime_s, self.warnings)?;
        for (name, Workload { rounds, .. }) in &self.workloads {
            write!(f, ", {name} {rounds} rounds")?;
        }
        self.warning_lines.iter().try_for_each(|line| write!(f, "; {line}"))
    }
}

/// The lines of `warnings` that do not say that the kernel's CPU was late.
pub(super) fn but_late(warnings: &[String]) -> Vec<String> {
    warnings.iter().filter(|line| !line.starts_with(LATE)).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(ok: bool, more: &str) -> Verdict {
        let json = format!(r#"{{"uptime_s":12.05,"workloads":{{"files":{{"ok":{ok},"rounds":2}}}},{more}}}"#);
        serde_json::from_str(&json).unwrap()
    }

    #[test]
    fn only_lateness_is_forgiven() {
        let late = r#""warnings":1,"warning_lines":["hrtimer: interrupt took 86621810 ns"]"#;
        let is_well = |ok, more: &str| verdict(ok, more).is_well(but_late);
        assert!(is_well(true, r#""warnings":0,"warning_lines":[]"#));
        assert!(is_well(true, late));
        assert!(!is_well(false, late));
        assert!(!is_well(true, &format!(r#"{late},"kept_files_ok":false"#)));
        assert!(!is_well(true, &format!(r#"{late},"journal_failure":"line 3""#)));
        assert!(!is_well(true, r#""warnings":1,"warning_lines":["rcu: INFO"]"#));
        assert!(!is_well(true, r#""warnings":9,"warning_lines":["hrtimer: interrupt took 1 ns"]"#));
    }

    #[test]
    #[should_panic(expected = "stands still")]
    fn a_workload_that_stands_still_is_seen() {
        let before = verdict(true, r#""warnings":0,"warning_lines":[]"#);
        let after = Verdict { uptime_s: before.uptime_s + 1.0, ..before.clone() };
        after.assert_goes_on_from(&before);
    }

    #[test]
    #[should_panic(expected = "uptime did not go on")]
    fn a_time_that_goes_back_is_seen() {
        let before = verdict(true, r#""warnings":0,"warning_lines":[]"#);
        Verdict { uptime_s: before.uptime_s - 1.0, ..before.clone() }.assert_follows(&before);
    }
}
