//! What a migration tells its operator while it is under way, and its end at the source.

use migration_proto::AbortReason;
use migration_proto::source::End;
use tokio::time::timeout;

use super::super::clock::millis;
use super::super::report::{
    self, AutoConverge, Literals, Phase, Postcopy, Progress, Report, Rungs, WhyStopped,
};
use super::super::transport::Close;
use super::super::{MigrateError, dial, limits};
use super::{Driver, Outcome};
use crate::machine::StopReason;

impl Driver {
    pub(super) fn tell_progress(&self) {
        let (stats, wan) = (self.core.stats(), self.connection.wan_bytes());
        let new = Progress {
            phase: Phase::from(self.core.progress()),
            round: stats.rounds.saturating_sub(1),
            round_pages: stats.round_pages,
            named_pages: stats.named_pages,
            rungs: Rungs::from(self.core.destination_stats()),
            wan_tx_bytes: wan.tx,
            wan_rx_bytes: wan.rx,
            breaks: stats.breaks,
            cut_off_ms: stats.cut_off.millis(),
            elapsed_ms: millis(self.clock.elapsed()),
        };
        // The end is told when everything is done, by `run`.
        if new.phase != Phase::Ended {
            self.progress.send_if_modified(|old| {
                let changed = old.phase != new.phase
                    || old.round != new.round
                    || new.elapsed_ms >= old.elapsed_ms + millis(limits::TICK);
                if changed {
                    *old = new;
                }
                changed
            });
        }
    }

    /// Has the guest rest for so many percent of the time.
    pub(super) fn throttle_guest(&mut self, percent: u8) {
        if percent > 0 {
            tracing::info!(percent, "the guest writes faster than the link carries: it is slowed down");
        }
        if let Err(error) = self.machine.throttle(percent) {
            self.outcomes.push_back(Outcome::Failed(format!("the guest could not be slowed down: {error}")));
        }
    }

    /// Puts the end into effect on the VM, and tells both ends.
    pub(super) async fn finish(mut self) -> Result<Report, MigrateError> {
        // What follows takes a few more round trips, and nobody waits for the VM any more.
        let total_ms = millis(self.clock.elapsed());
        let end = self
            .core
            .end()
            .cloned()
            .unwrap_or(End::Aborted(AbortReason::Local("the driver stopped early".to_owned())));
        // A pause under way must not overtake the resume. Nobody takes results any more, so no job waits for room.
        self.results.1.close();
        let jobs = async { while self.vm_jobs.join_next().await.is_some() {} };
        if timeout(limits::VM_JOB_TIMEOUT, jobs).await.is_err() {
            tracing::error!("KVM has not done what it was asked for; going on without");
        }
        self.end_spill(&end);
        match &end {
            End::Completed | End::LetGo | End::NotServed { .. } => self.machine.stop(StopReason::Migrated),
            End::Aborted(_) => self.run_on(),
        }
        let (how, words) = match &end {
            End::Completed => (Close::Done, "the VM has moved"),
            End::LetGo | End::Aborted(_) | End::NotServed { .. } => {
                (Close::Failed, "the migration was given up")
            }
        };
        let heard = self.connection.close(how, words).await;
        if self.notify_destination && !heard {
            tokio::spawn(dial::tell_abort(
                self.connection.endpoint().clone(),
                self.connection.address(),
                Some(self.connection.key()),
                self.migration,
            ));
        } else if heard {
            // The other end has heard all that matters to it: that the connection is closed it may hear later.
            let endpoint = self.connection.endpoint().clone();
            tokio::spawn(async move { endpoint.settle().await });
        } else {
            self.connection.endpoint().settle().await;
        }
        match end {
            End::Completed => Ok(self.report(report::Outcome::Completed, None, total_ms)),
            End::LetGo | End::NotServed { .. } => {
                let reason = "in doubt, and let go by the operator: the VM was ended here".to_owned();
                Ok(self.report(report::Outcome::InDoubt, Some(reason), total_ms))
            }
            End::Aborted(AbortReason::Cancelled) => Err(MigrateError::Cancelled),
            End::Aborted(AbortReason::Disconnected) => {
                Err(self.link_error.unwrap_or(MigrateError::Aborted { reason: AbortReason::Disconnected }))
            }
            End::Aborted(reason) => Err(MigrateError::Aborted { reason }),
        }
    }

    /// The VM goes on here, as it was before.
    fn run_on(&self) {
        if let Err(error) = self.machine.stop_dirty_log() {
            tracing::warn!(%error, "the dirty log goes on after the migration");
        }
        let back = if self.was_running { self.machine.resume() } else { self.machine.stay() };
        if let Err(error) = back {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "the VM stands still after the migration and could not be taken back; `vmm resume` tries again"
            );
        }
    }

    fn report(&self, outcome: report::Outcome, reason: Option<String>, total_ms: u64) -> Report {
        let (stats, there) = (self.core.stats(), self.core.destination_stats());
        let wan = self.connection.wan_bytes();
        Report {
            outcome,
            reason,
            verified: self.core.is_verified(),
            rounds: stats.rounds,
            total_ms,
            downtime_ms: self.downtime_ms,
            downtime_asked_ms: self.downtime_asked_ms,
            why_stopped: self.core.stop_why().map(WhyStopped::from),
            postcopy: self.core.postcopy_stats().map(Postcopy::from),
            auto_converge: (stats.throttle_percent > 0).then_some(AutoConverge {
                highest_percent: stats.throttle_percent,
                throttled_ms: stats.throttled_us / 1000,
            }),
            spill: self.spilling.report(),
            breaks: stats.breaks,
            cut_off_ms: stats.cut_off.millis(),
            rungs: Rungs::from(there),
            literals: Literals::from(stats),
            wan_tx_bytes: wan.tx,
            wan_rx_bytes: wan.rx,
            plain_bytes: stats.plain_bytes,
            wrong_pages: there.wrong,
            site_timeouts: there.site_timeouts,
            forecast: None,
        }
    }
}
