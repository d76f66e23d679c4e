//! The destination's end of post-copy: the frames that a VM which runs here still lacks, as the arrival's task has them.

use std::sync::Arc;

use page::{Gfn, Page, PageHash, PageSet};
use tokio::io::unix::AsyncFd;

use super::arrival::Arrival;
use super::error::chain;
use super::pages;
use super::report::IncomingPhase;
use crate::machine::{Machine, RunState};
use crate::memory::Memory;
use crate::memory::absent::{self, Absent, AbsentError};

/// Frames whose pages come while the VM runs.
pub(super) struct LatePages {
    absent: AsyncFd<Absent>,
}

impl LatePages {
    /// Makes `frames` absent.
    ///
    /// # Errors
    /// [`AbsentError`]: the memory is of no further use.
    pub(super) fn new(memory: &Arc<Memory>, frames: PageSet) -> Result<Self, AbsentError> {
        let absent = Absent::new(Arc::clone(memory), frames)?.watched()?;
        Ok(Self { absent })
    }

    /// The frames that somebody has touched since the last call and waits for; returns when there are some. May be cancelled.
    ///
    /// # Errors
    /// [`AbsentError`].
    pub(super) async fn faults(&self) -> Result<Vec<Gfn>, AbsentError> {
        loop {
            let ready = self.absent.readable().await;
            let mut ready = ready.map_err(|source| AbsentError::Unsupported { step: "epoll", source })?;
            let faults = self.absent.get_ref().faults()?;
            ready.clear_ready();
            if !faults.is_empty() {
                return Ok(faults);
            }
        }
    }

    /// Installs a page; nothing is written if the frame is not absent any more.
    ///
    /// # Errors
    /// [`AbsentError`]: the frame stays absent.
    pub(super) fn install(&self, gfn: Gfn, page: &Page) -> Result<(), AbsentError> {
        if !self.absent.get_ref().install(gfn, page)? {
            tracing::debug!(%gfn, "a page for a frame that is not absent: dropped");
        }
        Ok(())
    }

    /// Lets go on whoever waits for a frame that is not absent any more.
    ///
    /// # Errors
    /// [`AbsentError`].
    pub(super) fn wake(&self, gfn: Gfn) -> Result<(), AbsentError> {
        self.absent.get_ref().wake(gfn)
    }

    /// How many frames are absent.
    pub(super) fn left(&self) -> u64 {
        self.absent.get_ref().left()
    }
}

impl Arrival {
    /// The VM is to run before these pages are here.
    pub(super) fn make_absent(&mut self, frames: PageSet) {
        let Some(memory) = &self.memory else {
            return self.failures.push("there is no memory to mark frames absent in".to_owned());
        };
        match LatePages::new(memory, frames) {
            Ok(late) => self.late = Some(late),
            Err(error) => self.failures.push(chain(&error)),
        }
    }

    /// The VM, or a device of it, waits for pages that are not here.
    pub(super) fn faults(&mut self, faults: Result<Vec<Gfn>, AbsentError>) {
        let (Some(late), now) = (&self.late, self.clock.now()) else { return };
        match faults {
            Ok(frames) => {
                for gfn in frames {
                    if !self.core.fault(now, gfn)
                        && let Err(error) = late.wake(gfn)
                    {
                        self.failures.push(chain(&error));
                    }
                }
            }
            Err(error) => self.failures.push(chain(&error)),
        }
    }

    /// Nobody gives a page that the VM waits for: it stands still, for all to see, rather than hang on one virtual CPU.
    pub(super) fn starve(&mut self, gfn: Gfn, name: Option<PageHash>) {
        let name = name.map_or_else(|| "of a name not known here".to_owned(), |name| format!("named {name}"));
        let lack = format!(
            "the VM is paused: nobody gives the page of frame {gfn}, {name}. Its source cannot be reached and the site lacks it; it goes on \
             when one of them gives the page"
        );
        tracing::error!("{lack}");
        self.shared.status.send_modify(|status| {
            status.phase = IncomingPhase::Starved;
            status.last_failure = Some(lack);
        });
        self.after_last(|machine| {
            // An operator's pause stands as it is.
            let runs = matches!(&*machine.watch().borrow(), RunState::Running);
            if runs && let Err(error) = machine.pause() {
                tracing::error!(error = chain(&error), "the VM could not be paused for want of a page");
            }
        });
    }

    /// The page is here.
    pub(super) fn feed(&mut self) {
        tracing::info!("the page that the VM was paused for is here: it goes on");
        self.shared.status.send_modify(|status| {
            status.phase = IncomingPhase::Postcopy;
            status.last_failure = None;
        });
        self.after_last(|machine| {
            if let Err(error) = machine.resume() {
                tracing::error!(error = chain(&error), "the VM could not go on; `vmm resume` tries again");
            }
        });
    }

    /// Does something to the VM when all that was to be done to it before is done.
    fn after_last(&mut self, job: impl FnOnce(&Machine) + Send + 'static) {
        let Some(machine) = self.machine.clone() else { return };
        let before = self.starving.take();
        self.starving = Some(tokio::spawn(async move {
            if let Some(before) = before
                && let Err(error) = before.await
            {
                tracing::error!(%error, "stopping or starting the VM for want of a page failed");
            }
            if let Err(error) = tokio::task::spawn_blocking(move || job(&machine)).await {
                tracing::error!(%error, "stopping or starting the VM for want of a page failed");
            }
        }));
    }

    /// One page, and somebody waits for it: no worker is asked first.
    pub(super) fn fault_page(&mut self, gfn: Gfn, name: PageHash, batch: &[u8]) {
        match pages::decode(self.core.domain(), batch) {
            Ok(decoded) => {
                for (_, page) in decoded.iter().filter(|(frame, _)| *frame == gfn).take(1) {
                    let frames = self.core.fault_page(self.clock.now(), gfn, name, page);
                    self.install(&frames, page);
                }
            }
            Err(error) => self.core.failed(format!("the source sent a page that cannot be decoded: {error}")),
        }
    }

    /// Nothing is absent any more: who touches a page from here on is not asked about.
    pub(super) fn end_absence(&mut self) {
        if self.late.as_ref().is_some_and(|late| late.left() == 0) && self.core.fate().is_some() {
            self.late = None;
            tracing::info!("all of the VM's memory is here");
            self.shared.status.send_modify(|status| {
                status.phase = IncomingPhase::Running;
                status.absent_pages = 0;
            });
        }
    }
}

/// Whether a VM may run here before its memory is complete.
pub(super) fn possible() -> bool {
    match absent::supported() {
        Ok(()) => true,
        Err(error) => {
            tracing::warn!(error = chain(&error), "no post-copy: VMs come here by pre-copy alone");
            false
        }
    }
}

/// The faults of what is absent; never, where nothing is.
pub(super) async fn faults(late: Option<&LatePages>) -> Result<Vec<Gfn>, AbsentError> {
    match late {
        Some(late) => late.faults().await,
        None => std::future::pending().await,
    }
}
