//! The destination in post-copy: what the source says of absent frames, what the virtual CPUs wait for, and the connections in between.

use page::{Gfn, PageHash, RegionId, VerifiedPage};

use super::Destination;
use super::absent::Absent;
use super::action::Action;
use crate::error::ProtocolError;
use crate::postcopy::FullName;
use crate::stats::PostcopyStats;
use crate::timer::Time;
use crate::wire::Message;

impl Destination {
    /// What was counted after the switchover; `None` if all of memory came before it.
    #[must_use]
    pub fn postcopy_stats(&self) -> Option<PostcopyStats> {
        self.absent.as_ref().map(Absent::stats)
    }

    /// Frames whose page has not come.
    #[must_use]
    pub fn absent_pages(&self) -> u64 {
        self.absent.as_ref().map_or(0, Absent::left)
    }

    /// Whether the VM, which runs here, is paused because nobody gives a page.
    #[must_use]
    pub fn is_starved(&self) -> bool {
        self.absent.as_ref().is_some_and(Absent::is_paused)
    }

    /// A virtual CPU or a device touched this frame, which [`Action::Absent`] named, and waits. False if its page has been given out: it is to be
    /// woken. Every later word on a frame that is waited for is ignored.
    #[must_use = "if not, it is to be woken"]
    pub fn fault(&mut self, now: Time, gfn: Gfn) -> bool {
        let link = self.link;
        let waits = self.late().is_some_and(|absent| absent.fault(now, link, gfn));
        self.after_late();
        waits
    }

    /// The answer to a fault came, decoded and hashed: the frames to install `page` at, at once. Empty if it is needed no more, or is not the page that
    /// belongs there.
    #[must_use = "the page is installed at these frames before the next input"]
    pub fn fault_page(&mut self, now: Time, gfn: Gfn, name: PageHash, page: &VerifiedPage) -> Vec<Gfn> {
        let Some(absent) = self.late() else { return Vec::new() };
        let frames = absent.fault_page(now, gfn, name, page);
        self.after_late();
        frames
    }

    /// A later connection of this migration is the machine's from here on; its first message follows.
    pub fn connected(&mut self) {
        if let Some(absent) = &mut self.absent {
            absent.connected();
        }
    }

    /// What is absent, once pages may be installed.
    pub(super) fn late(&mut self) -> Option<&mut Absent> {
        self.absent.as_mut().filter(|absent| absent.has_begun())
    }

    /// Carries out what that led to.
    pub(super) fn after_late(&mut self) {
        let Some(absent) = &mut self.absent else { return };
        self.actions.extend(absent.drain());
    }

    /// Nothing is absent any more: the source is told.
    pub(super) fn complete_memory(&mut self) -> Option<Action> {
        let absent = self.absent.as_mut()?;
        let postcopy = Box::new(absent.stats());
        let complete = Message::Complete { migration: self.migration, stats: self.stats, postcopy };
        absent.take_complete().then_some(Action::Send(complete))
    }

    /// A page that was given out to be installed or zeroed at this frame, after [`Action::Absent`], could not be: the frame is still absent. Called before the
    /// next action is taken. The page is looked for again after a while, and the VM paused if that does not help.
    pub fn not_installed(&mut self, now: Time, gfn: Gfn) {
        if let Some(absent) = self.late() {
            absent.not_installed(now, gfn);
        }
    }

    /// These frames come after the VM runs.
    pub(super) fn mark_absent(
        &mut self,
        region: RegionId,
        frames: &[Gfn],
        root: PageHash,
    ) -> Result<(), ProtocolError> {
        let awaited = self.memory.absent(region, frames, root)?;
        let mut ask = Vec::new();
        for (id, gfn) in awaited {
            ask.extend(self.pending.forget(id, gfn));
        }
        self.want(&ask);
        let (bound, zero) = (self.memory.page_bound(), self.domain.zero_name());
        // Questions that are still under way keep their numbers.
        let (site, request) = (self.has_site, self.pending.next_request());
        let absent = self.absent.get_or_insert_with(|| Absent::new(bound, zero, site, request));
        frames.iter().for_each(|gfn| absent.mark(*gfn));
        Ok(())
    }

    /// Whether names of absent frames may come now.
    pub(super) fn takes_names(&self) -> bool {
        self.absent.is_some()
    }

    pub(super) fn names_came(
        &mut self,
        now: Time,
        region: RegionId,
        entries: &[(Gfn, FullName)],
    ) -> Result<(), ProtocolError> {
        self.progressed(now);
        let link = self.link;
        let taken = match &mut self.absent {
            Some(absent) => absent.named(now, link, region, entries),
            None => Ok(()),
        };
        self.after_late();
        taken
    }

    /// All that is not absent is verified: the frames are marked, and their pages are looked for.
    pub(super) fn begin_absent(&mut self, now: Time) {
        let link = self.link;
        if let Some(absent) = &mut self.absent {
            let marked = absent.begin(now, link);
            self.actions.push_back(Action::Absent(marked));
        }
    }

    /// The source hears over this connection, if it is a new one, what is lacked.
    pub(super) fn tell_lack(&mut self, now: Time) {
        let link = self.link;
        if let Some(absent) = &mut self.absent {
            absent.tell_lack(now, link);
        }
        self.after_late();
    }
}
