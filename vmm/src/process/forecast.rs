//! A dry run of a migration, as an operation of a process.

use std::sync::Arc;

use super::{Process, ProcessError, check_request, migrate_options, wrong_state};
use crate::control::api::{MigrateRequest, VmState};
use crate::migrate;
use crate::migrate::report::Forecast;

impl Process {
    /// What a migration as `request` says would cost; the VM runs on, and nothing moves. The report of the next migration to the same destination says how
    /// right it was.
    /// # Errors
    /// If the VM is not running, or the destination cannot be reached or would refuse it.
    pub async fn dry_run(self: &Arc<Self>, request: MigrateRequest) -> Result<Forecast, ProcessError> {
        const OPERATION: &str = "try a migration";
        check_request(&request)?;
        let (machine, busy) = {
            let _step = self.steps.lock().await;
            let machine = self.machine_complete(OPERATION)?;
            let (state, _) = self.state();
            if state != VmState::Running {
                return Err(wrong_state(OPERATION, state));
            }
            (machine, self.busy_with("a dry run of a migration is looking at it"))
        };
        let to = request.to.clone();
        let (site, host) = (self.site_pages(), Arc::clone(&self.host));
        // On a task of its own: where the caller stops waiting, the dirty log is still in use until that has ended.
        let dry_run = tokio::spawn(async move {
            let _busy = busy;
            migrate::dry_run(machine, site, host, migrate_options(request)).await
        });
        let forecast = dry_run.await?.map_err(ProcessError::Migration)?;
        tracing::info!(to, ?forecast, "a dry run");
        self.stage().forecast = Some((to, forecast));
        Ok(forecast)
    }

    /// What the last dry run to `to` said.
    pub(super) fn forecast_of(&self, to: &str) -> Option<Forecast> {
        self.stage().forecast.as_ref().filter(|(there, _)| there == to).map(|(_, forecast)| *forecast)
    }
}
