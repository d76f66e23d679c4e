//! What the destination wants, and what it is sent.

use page::{Gfn, RegionId};

use super::phase::Phase;
use super::{Action, Literal, LiteralsSent, Source};
use crate::error::ProtocolError;
use crate::limits;
use crate::timer::Time;
use crate::wire::{Channel, Message};

impl Source {
    /// Pages that the destination has asked for and the driver has not been given, and batches that it has been given and not passed on.
    #[must_use]
    pub fn queued(&self) -> (usize, usize) {
        (self.wants.len(), self.literal_batches)
    }

    pub(super) fn wanted(&mut self, now: Time, frames: Vec<Gfn>) -> Result<(), ProtocolError> {
        if let Some(gfn) = frames.iter().find(|gfn| !self.config.layout.has(gfn.region())) {
            return Err(ProtocolError::NotRam(*gfn));
        }
        let room = usize::try_from(self.config.layout.pages()).unwrap_or(usize::MAX);
        if self.wants.len().saturating_add(frames.len()) > room.saturating_mul(2) {
            // More wants than pages, twice over: no honest destination asks so.
            return Err(ProtocolError::Unexpected {
                message: "Want",
                phase: "answering as many wants as there are pages",
            });
        }
        self.wants.extend(frames);
        self.progressed(now);
        self.advance(now);
        Ok(())
    }

    pub(super) fn names_wanted(&mut self, now: Time, region: RegionId) -> Result<(), ProtocolError> {
        if !self.config.layout.has(region) {
            return Err(ProtocolError::NoSuchRegion(region));
        }
        let names = self.names.region(region).to_vec();
        self.actions.push_back(Action::Send(Message::FullNames { region, names }));
        self.progressed(now);
        Ok(())
    }

    /// A batch of literals is on its way.
    pub fn literals_sent(&mut self, now: Time, sent: LiteralsSent) {
        self.literal_batches = self.literal_batches.saturating_sub(1);
        self.stats.literal_pages += sent.pages;
        self.stats.literal_bytes += sent.bytes;
        self.stats.delta_pages += sent.delta_pages;
        self.stats.delta_bytes += sent.delta_bytes;
        if self.serves() {
            // Memory stands still: were a page stale none the less, the destination would wait for it, and say so.
            self.stats.stale += sent.stale.len() as u64;
            self.progressed(now);
            return self.advance(now);
        }
        if matches!(self.phase, Phase::Cut(_)) {
            // The destination asks for these no more: they are named again, if it does not hold their region as it was told.
            for (gfn, _) in &sent.stale {
                self.named_once.remove(*gfn);
            }
            return self.settle(now);
        }
        if !self.names_pages() {
            return;
        }
        if !sent.stale.is_empty() {
            self.stats.stale += sent.stale.len() as u64;
            // The destination gives these up. They are to be named again even if they change back to the name they had, and until
            // then nothing may be called a duplicate of them.
            for (gfn, id) in &sent.stale {
                self.named_once.remove(*gfn);
                self.versions.stale(*gfn, *id);
            }
            self.actions.push_back(Action::Send(Message::Stale(sent.stale)));
        }
        self.progressed(now);
        self.advance(now);
    }

    /// Tells the driver which versions it need not keep.
    pub(super) fn drop_versions(&mut self) {
        let dropped = self.versions.take_dropped();
        if !dropped.is_empty() {
            self.actions.push_back(Action::DropVersions(dropped));
        }
    }

    /// Whether to send a round's `pages` as they are named. To ask for them takes a round trip and the site's time, in which the link stands still once the
    /// round before is through; where sending takes less than that, a page that the site would have had costs bytes that nobody missed.
    pub(super) fn asking_takes_longer(&self, pages: u64) -> bool {
        let bytes = pages.saturating_mul(self.written_page.bytes().unwrap_or(page::PAGE_SIZE as u64));
        self.stats.rounds > 0 && self.link.time_for(bytes) <= self.link.rtt
    }

    /// Gives out what is to be sent, within the window.
    pub(super) fn answer_wants(&mut self) {
        while self.literal_batches < limits::LITERAL_WINDOW_BATCHES && !self.wants.is_empty() {
            let count = self.wants.len().min(limits::LITERAL_BATCH_PAGES);
            let (names, naming, round) = (&self.names, self.naming.as_ref(), self.stats.rounds);
            let name = |gfn: Gfn| match naming.filter(|naming| naming.has(gfn)) {
                Some(naming) => naming.name(gfn),
                None => names.get(gfn),
            };
            let wanted = self.wants.drain(..count).filter_map(|gfn| Some((gfn, name(gfn)?)));
            let pages: Vec<Literal> =
                wanted.map(|(gfn, name)| self.versions.send(round, gfn, name)).collect();
            self.drop_versions();
            if pages.is_empty() {
                continue;
            }
            // Behind the names where nobody has asked, so that no page is there before it is expected.
            let pushed = match &self.phase {
                Phase::Round(round) | Phase::LastRound(round) => round.pushed,
                Phase::Handover { .. } => true,
                Phase::Offering
                | Phase::Collecting
                | Phase::Pausing { .. }
                | Phase::CollectingLast { .. }
                | Phase::Cut(_)
                | Phase::Committed { .. }
                | Phase::Postcopy { .. }
                | Phase::Ended(_) => false,
            };
            let channel = if pushed { Channel::Names } else { Channel::Literals };
            self.literal_batches += 1;
            self.actions.push_back(Action::SendLiterals { channel, pages });
        }
    }
}
