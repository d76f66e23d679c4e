//! Auto-converge, carried out: what [`Converge`](super::converge::Converge) decides, and that it is always undone.

use super::{Action, Source};
use crate::timer::Time;

impl Source {
    /// Has the guest run as slowly as it is to.
    pub(super) fn slow_down(&mut self, now: Time) {
        let percent = self.converge.throttle();
        let (since, before) = self.throttled.unwrap_or((now, 0));
        if self.stop_why.is_none() && percent > before {
            self.stats.throttle_percent = self.stats.throttle_percent.max(percent);
            self.throttled = Some((since, percent));
            self.actions.push_back(Action::Throttle { percent });
        }
    }

    /// Has it run at full speed again: when it stands still for its hand-over, when the connection is lost, and before it is let run on here.
    pub(super) fn full_speed(&mut self, now: Option<Time>) {
        if let Some((since, _)) = self.throttled.take() {
            self.stats.throttled_us += now.map_or(0, |now| (now - since).0);
            self.actions.push_back(Action::Throttle { percent: 0 });
        }
    }
}
