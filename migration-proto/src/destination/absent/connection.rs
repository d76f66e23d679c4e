//! Connections to the source: what is done without one, and what a new one is told.

use page::{Gfn, PageHash, RegionId};

use super::{Absent, Site, Source, Stage};
use crate::timer::{Link, Time};

impl Absent {
    /// The connection is lost. The VM goes on with what the site gives.
    pub(in crate::destination) fn disconnected(&mut self, now: Time, link: Link) {
        self.lose(Source::Away);
        self.strikes = 0;
        if self.site != Site::Nowhere {
            self.site = Site::Asked;
            for (name, group) in &mut self.groups {
                if group.stage == Stage::Source {
                    group.stage = Stage::Queued;
                    self.queue.push_back(*name);
                }
            }
            self.hurry_all(now, link);
        }
        self.advance(now, link);
    }

    /// There is a new connection. The source has to say first that it is the source: see `tell_lack`.
    pub(in crate::destination) fn connected(&mut self) {
        self.lose(Source::New);
        self.stats.reconnects += 1;
    }

    /// What was asked over the connection may never be answered.
    fn lose(&mut self, source: Source) {
        self.source = source;
        self.asked.clear();
        self.naming.clear();
        self.unnamed.clear();
        self.complete = false;
    }

    /// Over a new connection, once Running has been said: tells the source what is lacked, and only that.
    pub(in crate::destination) fn tell_lack(&mut self, now: Time, link: Link) {
        if self.source != Source::New {
            return;
        }
        self.source = Source::Here;
        if self.failed.is_empty() {
            self.ask_again = None;
        }
        if self.has_begun() {
            let unnamed = self.frames.iter().filter(|gfn| !self.names.contains_key(gfn));
            let mut regions: Vec<RegionId> = unnamed.map(Gfn::region).collect();
            regions.dedup();
            self.unnamed.extend(regions);
            let at_source = self.groups.iter().filter(|(_, group)| group.stage == Stage::Source);
            let names: Vec<PageHash> = at_source.map(|(name, _)| *name).collect();
            self.ask_source(&names);
            self.hurry_all(now, link);
        }
        self.advance(now, link);
    }
}
