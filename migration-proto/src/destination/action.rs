//! What goes in and out of the destination's machine.

use page::{Gfn, PageHash, PageSet, ShortId};

use super::RequestId;
use crate::error::AbortReason;
use crate::manifest::Layout;
use crate::switchover::RunPermit;
use crate::wire::Message;

/// What the driver is to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// Send on the message's channel.
    Send(Message),
    /// Build the machine, with zeroed memory; then call [`Destination::prepared`](super::Destination::prepared).
    Prepare {
        /// What the source said of it.
        machine: Vec<u8>,
        /// Its RAM.
        layout: Layout,
    },
    /// Ask the site. Each page that comes goes to [`Destination::site_page`](super::Destination::site_page), what nobody there has to
    /// [`Destination::site_missing`](super::Destination::site_missing), as soon as the site says so; at the end call
    /// [`Destination::site_done`](super::Destination::site_done).
    Resolve {
        /// The question.
        request: RequestId,
        /// What to look for.
        ids: Vec<ShortId>,
    },
    /// The answer is awaited no more.
    Forget(RequestId),
    /// Fill the frame with zeros; after [`Action::Absent`] as a page is installed.
    Zero(Gfn),
    /// Copy one frame to another. Never after [`Action::Absent`].
    Copy {
        /// Whence.
        from: Gfn,
        /// Where.
        to: Gfn,
    },
    /// All but these frames is here and verified; these come while the VM runs. Make them absent, before the state is loaded: no bytes stand there,
    /// and whoever touches one, a virtual CPU or a device, waits. Tell each such touch once by [`Destination::fault`](super::Destination::fault).
    /// From here on a page is installed, and a frame zeroed, so that whoever waits for it goes on, and only where nothing stands yet.
    Absent(PageSet),
    /// Memory is complete, or what is not is marked: load vCPU and device state; then call [`Destination::loaded`](super::Destination::loaded).
    LoadState(Vec<u8>),
    /// Let the virtual CPUs run; then call [`Destination::running`](super::Destination::running).
    Run(RunPermit),
    /// Tell the operator: this side is ready, the source is silent, and only the source or the operator can say who runs the VM.
    Hold,
    /// The migration is over without the VM: free its memory, and write [`Fate::Refused`](crate::switchover::Fate::Refused) into the ledger.
    Discard(AbortReason),
    /// Stop the virtual CPUs and tell the operator: one of them has waited too long for this page, which neither the site nor a source that can be
    /// reached gives. It may come yet: [`Action::ResumeVm`]. The VM lives here and nowhere else.
    PauseVm {
        /// The frame.
        gfn: Gfn,
        /// The page's full name; `None` if the source was lost before it had told it.
        name: Option<PageHash>,
    },
    /// The pages that the VM was paused for are here: let the virtual CPUs run on.
    ResumeVm,
    /// The source has let go: the connection may be closed.
    Released,
}

/// The call makes no sense now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("nothing is in doubt here: this host is {0}")]
pub struct NotHeld(pub(super) &'static str);

/// Where in the site a page came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SiteRung {
    /// This host.
    Host,
    /// Another host.
    Site,
}
