//! Virtual CPUs that wait for a page: it is looked for by the fastest way, and whoever waits too long pauses the VM.

use std::collections::btree_map::Entry;

use page::{Gfn, PageHash};

use super::{Absent, Action, Kind, Progress, Question, RequestId, Site, Source, Stage};
use crate::limits;
use crate::timer::{Link, Span, Time};
use crate::wire::Message;

impl Absent {
    /// A virtual CPU waits for this frame. False if its page is there.
    pub(in crate::destination) fn fault(&mut self, now: Time, link: Link, gfn: Gfn) -> bool {
        if !self.frames.contains(gfn) {
            return false;
        }
        if let Entry::Vacant(fault) = self.faults.entry(gfn) {
            fault.insert(now);
            self.stats.faults += 1;
            self.hurry(now, link, gfn);
        }
        true
    }

    /// Looks for the page of a fault by the fastest way.
    fn hurry(&mut self, now: Time, link: Link, gfn: Gfn) {
        let Some(name) = self.names.get(&gfn).copied() else {
            if self.source == Source::Here && self.asked.insert(gfn) {
                self.out.push_back(Action::Send(Message::Fault(gfn)));
            }
            return;
        };
        let Some(group) = self.groups.get(&name) else { return };
        let under_way = match group.stage {
            Stage::Queued => false,
            Stage::Site(request) => {
                self.questions.get(&request).is_some_and(|question| question.kind == Kind::Fault)
            }
            // The site has had its turn.
            Stage::Source if self.source == Source::Here => {
                return self.ask_source_at_once(gfn, name);
            }
            Stage::Source => false,
        };
        if under_way {
            return;
        }
        if self.site == Site::Asked {
            let patience = match self.source {
                Source::Here => {
                    Span(link.rtt.0.clamp(limits::FAULT_PATIENCE_MIN.0, limits::FAULT_PATIENCE_MAX.0))
                }
                Source::New | Source::Away => limits::FAULT_ASK_AGAIN,
            };
            self.ask_site(now, vec![name], patience, Kind::Fault);
        } else {
            self.ask_source(&[name]);
        }
    }

    /// A want for it may be under way, behind much else.
    fn ask_source_at_once(&mut self, gfn: Gfn, name: PageHash) {
        let Some(group) = self.groups.get(&name) else { return };
        if !group.frames.iter().any(|gfn| self.asked.contains(gfn)) {
            self.asked.insert(gfn);
            self.out.push_back(Action::Send(Message::Fault(gfn)));
        }
    }

    /// Looks again for pages that came and could not be installed.
    fn look_again(&mut self) {
        for gfn in std::mem::take(&mut self.failed) {
            // Without a name nobody but the source can give it: it answers a fault with the name.
            let Some(name) = self.names.get(&gfn).copied().filter(|_| self.frames.contains(gfn)) else {
                continue;
            };
            if name == self.zero {
                self.zeros.push(gfn);
            } else if self.groups.get(&name).is_none_or(|group| !group.frames.contains(&gfn)) {
                self.add(gfn, name, Stage::Queued);
            }
        }
    }

    pub(super) fn hurry_all(&mut self, now: Time, link: Link) {
        let waiting: Vec<Gfn> = self.faults.keys().copied().collect();
        waiting.into_iter().for_each(|gfn| self.hurry(now, link, gfn));
    }

    pub(super) fn overdue_fault(&self, now: Time) -> Option<Gfn> {
        let overdue = self.faults.iter().find(|(_, since)| **since + limits::FAULT_LIMIT <= now);
        overdue.map(|(gfn, _)| *gfn)
    }

    /// When [`Absent::timeout`] is to be called.
    pub(in crate::destination) fn next_timeout(&self) -> Option<Time> {
        let questions = self.questions.values().map(|question| self.deadline_of(question));
        let first_fault = self.faults.values().min().map(|since| *since + limits::FAULT_LIMIT);
        let limit = first_fault.filter(|_| self.progress == Progress::Runs && !self.paused);
        questions.chain(limit).chain(self.ask_again).min()
    }

    /// A site that answers anything is at work; what a virtual CPU waits for has no such excuse.
    fn deadline_of(&self, question: &Question) -> Time {
        let since = match question.kind {
            Kind::Bulk => question.asked.max(self.heard),
            Kind::Fault | Kind::LateFault => question.asked,
        };
        since + question.patience
    }

    /// A deadline has come. Counts questions that were given up.
    pub(in crate::destination) fn timeout(&mut self, now: Time, link: Link) -> u64 {
        let due: Vec<RequestId> = self
            .questions
            .iter()
            .filter(|(_, question)| self.deadline_of(question) <= now)
            .map(|(request, _)| *request)
            .collect();
        let mut given_up = 0;
        for request in due {
            given_up += u64::from(self.late(now, request));
        }
        if self.ask_again.is_some_and(|at| at <= now) {
            self.ask_again = None;
            self.look_again();
            self.hurry_all(now, link);
        }
        if self.progress == Progress::Runs
            && !self.paused
            && let Some(gfn) = self.overdue_fault(now)
        {
            self.paused = true;
            self.stats.pauses += 1;
            self.out.push_back(Action::PauseVm { gfn, name: self.names.get(&gfn).copied() });
        }
        self.advance(now, link);
        given_up
    }

    /// A question's deadline has come; whether it is given up.
    fn late(&mut self, now: Time, request: RequestId) -> bool {
        let Some(question) = self.questions.get_mut(&request) else { return false };
        if question.kind == Kind::Fault {
            // The source is asked too; whoever is first gives the page.
            question.kind = Kind::LateFault;
            question.patience = limits::SITE_PATIENCE_MAX;
            let names = question.names.clone();
            for name in names {
                let waited_for = self
                    .groups
                    .get(&name)
                    .and_then(|group| group.frames.iter().find(|gfn| self.faults.contains_key(gfn)).copied());
                if let Some(gfn) = waited_for.filter(|_| self.source == Source::Here) {
                    self.ask_source_at_once(gfn, name);
                }
            }
            return false;
        }
        let Some(question) = self.questions.remove(&request) else { return false };
        let waits =
            |name: &PageHash| self.groups.get(name).is_some_and(|group| group.stage == Stage::Site(request));
        // A site that gave some of the pages is slow; one that gave none may be dead.
        self.strikes += u32::from(question.names.iter().all(waits));
        if self.strikes >= limits::SITE_STRIKES && self.source == Source::Here && self.site == Site::Asked {
            self.site = Site::GivenUp;
        }
        self.out.push_back(Action::Forget(request));
        self.left_over(now, request, &question.names);
        true
    }
}
