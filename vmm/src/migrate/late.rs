//! The destination's end of post-copy: the frames that a VM which runs here still lacks, as the arrival's task has them.

use std::sync::Arc;

use migration_proto::wire::Message;
use page::{Gfn, Page, PageHash, PageSet};
use tokio::io::unix::AsyncFd;

use super::arrival::Arrival;
use super::error::chain;
use super::incoming::{self, Greeting};
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

    /// The VM is given up before it ran: whoever waits is let go.
    pub(super) fn give_up(self) {
        self.absent.get_ref().forget();
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
        let woken = faults.and_then(|frames| {
            let mut here = frames.into_iter().filter(|gfn| !self.core.fault(now, *gfn));
            here.try_for_each(|gfn| late.wake(gfn))
        });
        if let Err(error) = woken {
            // Before the VM runs that ends the migration; afterwards nothing can.
            tracing::error!(error = chain(&error), "the guest's page faults cannot be served");
            self.failures.push(chain(&error));
        }
    }

    /// Nobody gives a page that the VM waits for: it stands still, for all to see, rather than hang on one virtual CPU.
    pub(super) fn starve(&mut self, gfn: Gfn, name: Option<PageHash>) {
        let name = name.map_or_else(|| "of a name not known here".to_owned(), |name| format!("named {name}"));
        let lack = format!(
            "the VM is paused: nobody gives the page of frame {gfn}, {name}. Its source cannot be reached and the site lacks it; it goes on \
             when one of them gives the page, or `vmm spill send` with the spill file of a source that wrote one"
        );
        tracing::error!("{lack}");
        self.shared.status.send_modify(|status| {
            status.phase = IncomingPhase::Starved;
            status.last_failure = Some(lack);
        });
        self.after_last(|machine, _| {
            // An operator's pause stands as it is.
            let runs = matches!(&*machine.watch().borrow(), RunState::Running);
            if runs && let Err(error) = machine.pause() {
                tracing::error!(error = chain(&error), "the VM could not be paused for want of a page");
            }
            runs
        });
    }

    /// The page is here.
    pub(super) fn feed(&mut self) {
        tracing::info!("the page that the VM waited for is here");
        self.shared.status.send_modify(|status| {
            status.phase = IncomingPhase::Postcopy;
            status.last_failure = None;
        });
        self.after_last(|machine, starved| {
            if starved && let Err(error) = machine.resume() {
                tracing::error!(error = chain(&error), "the VM could not go on; `vmm resume` tries again");
            }
            false
        });
    }

    /// Does something to the VM when all that was to be done to it before is done. The job is told, and says, whether the VM was stopped for want of a
    /// page, and not by an operator.
    fn after_last(&mut self, job: impl FnOnce(&Machine, bool) -> bool + Send + 'static) {
        let Some(machine) = self.machine.clone() else { return };
        let before = self.starving.take();
        self.starving = Some(tokio::spawn(async move {
            let failed = |error| {
                tracing::error!(%error, "stopping or starting the VM for want of a page failed");
                false
            };
            let starved = match before {
                Some(before) => before.await.unwrap_or_else(failed),
                None => false,
            };
            tokio::task::spawn_blocking(move || job(&machine, starved)).await.unwrap_or_else(failed)
        }));
    }

    /// A later connection, if it is one for this machine. Whoever brings a spill file to a VM that does not run here is told so.
    pub(super) fn not_in_vain(&mut self, greeting: Box<Greeting>) -> Option<Box<Greeting>> {
        let Message::Serve { epoch, root, .. } = greeting.first else { return Some(greeting) };
        match self.core.serve_answer(epoch, root) {
            None => {
                tracing::info!(key = %greeting.link.peer(), "the VM's missing pages come from a spill file");
                Some(greeting)
            }
            Some(answer) => {
                tracing::warn!(key = %greeting.link.peer(), "a spill file was brought for a VM that does not run here by it");
                self.helpers.spawn(incoming::say(*greeting, Some(answer)));
                None
            }
        }
    }

    /// One page, and somebody waits for it: no worker is asked first.
    pub(super) fn fault_page(&mut self, gfn: Gfn, name: PageHash, batch: &[u8]) {
        let wrong = match pages::decode_plain(self.core.domain(), batch) {
            Ok(decoded) => match &decoded[..] {
                [(frame, page)] if *frame == gfn => {
                    let frames = self.core.fault_page(self.clock.now(), gfn, name, page);
                    return self.install(&frames, page);
                }
                _ => format!("the source answered the fault of frame {gfn} with another page"),
            },
            Err(error) => format!("the source sent a page that cannot be decoded: {error}"),
        };
        // Where the VM runs already it goes on without: the page is looked for again, and the VM paused if nobody gives it.
        tracing::warn!("{wrong}");
        self.core.failed(wrong);
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
