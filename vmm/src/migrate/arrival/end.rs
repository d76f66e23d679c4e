//! What an arrival tells while it is under way, and how it ends: with the VM or without.

use std::sync::{Arc, PoisonError};

use tokio::time::timeout;

use super::super::limits;
use super::super::report::{IncomingPhase, IncomingStatus, Rungs};
use super::super::transport::Close;
use super::{Arrival, Done};
use crate::machine::StopReason;

impl Arrival {
    pub(super) fn runs_here(&mut self) {
        let Some(machine) = self.machine.clone() else { return };
        self.core.running(self.clock.now());
        // Written down before anybody can learn of it.
        self.record_fate();
        self.tell_status();
        let phase = if self.late.is_some() { IncomingPhase::Postcopy } else { IncomingPhase::Running };
        self.shared.status.send_modify(|status| status.phase = phase);
        self.shared.machine.send_replace(Some(Arc::clone(&machine)));
        if self.source_heartbeat_ns > 0 {
            let results = self.results.0.clone();
            self.helpers.spawn(async move {
                let mut look = tokio::time::interval(limits::HEARTBEAT_LOOK);
                let first = async {
                    loop {
                        look.tick().await;
                        let first_ns = machine.heartbeat().first_unix_ns;
                        if first_ns > 0 {
                            return first_ns;
                        }
                    }
                };
                match timeout(limits::HEARTBEAT_TIMEOUT, first).await {
                    Ok(first_ns) if results.send(Done::FirstHeartbeat(first_ns)).await.is_ok() => {}
                    Ok(_) | Err(_) => tracing::debug!("the guest's first heartbeat was not seen"),
                }
            });
        }
    }

    /// The core's verdict goes into the ledger, which outlives this arrival.
    pub(super) fn record_fate(&self) {
        if let Some(fate) = self.core.fate() {
            let mut ledger = self.shared.ledger.lock().unwrap_or_else(PoisonError::into_inner);
            ledger.record(self.core.migration(), self.core.vm(), fate);
        }
    }

    pub(super) fn tell_status(&self) {
        let mut wan = self.spent;
        if let Some(wires) = &self.wires {
            wan += wires.link.wan_bytes();
        }
        let (stats, round, cut) = (self.core.stats(), self.round, self.core.is_cut_off());
        self.shared.status.send_if_modified(|status| {
            let phase = match status.phase {
                IncomingPhase::Receiving if cut => IncomingPhase::ReceivingCut,
                IncomingPhase::ReceivingCut if !cut => IncomingPhase::Receiving,
                phase => phase,
            };
            let new = IncomingStatus {
                phase,
                round,
                rungs: Rungs::from(stats),
                absent_pages: self.core.absent_pages(),
                wan_tx_bytes: wan.tx,
                wan_rx_bytes: wan.rx,
                ..status.clone()
            };
            let changed = *status != new;
            *status = new;
            changed
        });
    }

    /// The VM is not here to stay: free its memory, make room for the next, and tell the source the last words.
    pub(super) async fn finish(mut self) {
        if let Some(late) = self.late.take_if(|_| self.discarded) {
            late.give_up();
        }
        if let Some(machine) = self.machine.take().filter(|_| self.discarded) {
            machine.stop(StopReason::Requested);
        }
        // From here on the endpoint answers for this migration, by the ledger.
        self.mail.close();
        if self.discarded {
            self.shared.status.send_modify(|status| status.phase = IncomingPhase::Listening);
        }
        if let Some(wires) = self.wires.take() {
            wires.flush_and_close(Close::Done, "the destination has ended the migration").await;
        }
    }
}
