//! Frames whose pages come while the VM runs: their names, where each is looked for, and who waits for it.
//!
//! ```text
//!   a frame      unnamed ──PageNames──► named ──► zero: at once
//!   a name       Queued ──► Site ──no answer──► Source (Want)              bulk
//!                Queued, Site ──a virtual CPU waits──► Site, a question of its own ──late or no answer──► Source (Fault)
//!   a fault on an unnamed frame ──► Source (Fault)
//!   no source    Source ──► Queued: the site is asked once more; for what a virtual CPU waits for, again and again
//! ```
//! A frame leaves the set when its page is given out to be installed, so no page is ever installed twice, or over what the VM has written.

mod connection;
mod faults;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use page::{Gfn, PageHash, PageSet, RegionId, ShortId, VerifiedPage};

use super::action::{Action, SiteRung};
use super::pending::{RequestId, patience};
use crate::error::ProtocolError;
use crate::limits;
use crate::postcopy::FullName;
use crate::stats::PostcopyStats;
use crate::timer::{Link, Span, Time};
use crate::waits::Waits;
use crate::wire::Message;

/// Where a page is awaited from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Queued,
    Site(RequestId),
    Source,
}

#[derive(Debug)]
struct Group {
    frames: Vec<Gfn>,
    stage: Stage,
}

#[derive(Debug)]
struct Question {
    names: Vec<PageHash>,
    asked: Time,
    /// How long the site may say nothing.
    patience: Span,
    kind: Kind,
}

/// What a question is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Bulk,
    /// A virtual CPU waits for it.
    Fault,
    /// As `Fault`, and the source has been asked as well.
    LateFault,
}

/// The connection to the source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    /// It can be asked.
    Here,
    /// There is a new connection; what is lacked has not been said over it yet.
    New,
    Away,
}

/// This host's site.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Site {
    Asked,
    /// It was silent too often, and the source can be asked.
    GivenUp,
    /// There is none.
    Nowhere,
}

/// How far the switchover has come.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Progress {
    /// The source tells what is absent.
    Told,
    /// The frames are marked: pages may be installed.
    Marked,
    /// The VM runs here.
    Runs,
}

/// Who gave a page.
#[derive(Clone, Copy, Debug)]
enum Rung {
    Zero,
    Host,
    Site,
    Source,
}

/// See the module's head.
#[derive(Debug)]
pub(super) struct Absent {
    /// Frames without a page.
    frames: PageSet,
    left: u64,
    zero: PageHash,
    /// What was named, frame by frame: kept after the page came, because duplicates refer to it.
    names: BTreeMap<Gfn, PageHash>,
    /// Frames named as zero pages, to be written.
    zeros: Vec<Gfn>,
    groups: BTreeMap<PageHash, Group>,
    queue: VecDeque<PageHash>,
    questions: BTreeMap<RequestId, Question>,
    next_request: u64,
    site: Site,
    strikes: u32,
    /// When the site last answered anything.
    heard: Time,
    /// Frames that a virtual CPU waits for, and since when.
    faults: BTreeMap<Gfn, Time>,
    /// Of those, asked of the source over this connection.
    asked: BTreeSet<Gfn>,
    /// Regions whose names are asked for over this connection, and those that wait for that.
    naming: BTreeSet<RegionId>,
    unnamed: VecDeque<RegionId>,
    ask_again: Option<Time>,
    /// Frames that a page could not be installed at, to be looked for again then.
    failed: Vec<Gfn>,
    source: Source,
    progress: Progress,
    paused: bool,
    complete: bool,
    stats: PostcopyStats,
    /// How long virtual CPUs waited, by who gave the page.
    waits_host: Waits,
    waits_site: Waits,
    waits_source: Waits,
    out: VecDeque<Action>,
}

impl Absent {
    /// No frame yet of a memory of `bound` frames. `site`: whether there is one to ask; `request`: questions are numbered from here.
    pub(super) fn new(bound: u64, zero: PageHash, site: bool, request: u64) -> Self {
        Self {
            frames: PageSet::empty(bound),
            left: 0,
            zero,
            names: BTreeMap::new(),
            zeros: Vec::new(),
            groups: BTreeMap::new(),
            queue: VecDeque::new(),
            questions: BTreeMap::new(),
            next_request: request,
            site: if site { Site::Asked } else { Site::Nowhere },
            strikes: 0,
            heard: Time(0),
            faults: BTreeMap::new(),
            asked: BTreeSet::new(),
            naming: BTreeSet::new(),
            unnamed: VecDeque::new(),
            ask_again: None,
            failed: Vec::new(),
            source: Source::Here,
            progress: Progress::Told,
            paused: false,
            complete: false,
            stats: PostcopyStats::default(),
            waits_host: Waits::default(),
            waits_site: Waits::default(),
            waits_source: Waits::default(),
            out: VecDeque::new(),
        }
    }

    /// This frame, which is RAM, is absent.
    pub(super) fn mark(&mut self, gfn: Gfn) {
        self.left += u64::from(self.frames.insert(gfn));
    }

    /// The frames are marked from the next drain on: gives them, and begins to look for their pages.
    pub(super) fn begin(&mut self, now: Time, link: Link) -> PageSet {
        let marked = self.frames.clone();
        self.progress = Progress::Marked;
        self.stats.absent = self.left;
        self.advance(now, link);
        marked
    }

    pub(super) fn has_begun(&self) -> bool {
        self.progress >= Progress::Marked
    }

    /// The VM is about to run.
    pub(super) fn runs(&mut self) {
        self.progress = Progress::Runs;
    }

    pub(super) fn left(&self) -> u64 {
        self.left
    }

    pub(super) fn is_paused(&self) -> bool {
        self.paused
    }

    pub(super) fn stats(&self) -> PostcopyStats {
        PostcopyStats {
            waited_host: self.waits_host.summary(),
            waited_site: self.waits_site.summary(),
            waited_source: self.waits_source.summary(),
            ..self.stats
        }
    }

    /// What is to be done, in order.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = Action> + '_ {
        self.out.drain(..)
    }

    /// True once a connection: nothing is absent any more, and the source can be told.
    pub(super) fn take_complete(&mut self) -> bool {
        let over = self.progress == Progress::Runs && self.left == 0 && self.source == Source::Here;
        if over {
            self.names = BTreeMap::new();
        }
        over && !std::mem::replace(&mut self.complete, true)
    }

    /// A page that was given out is not there: somebody may wait for it.
    pub(super) fn not_installed(&mut self, now: Time, gfn: Gfn) {
        if self.frames.insert(gfn) {
            self.left += 1;
            self.stats.absent += 1;
            self.stats.faults += 1;
            self.faults.insert(gfn, now);
            self.failed.push(gfn);
            self.ask_again.get_or_insert(now + limits::FAULT_ASK_AGAIN);
        }
    }

    /// Takes names.
    ///
    /// # Errors
    /// If a duplicate refers to a frame that was not named.
    pub(super) fn named(
        &mut self,
        now: Time,
        link: Link,
        region: RegionId,
        entries: &[(Gfn, FullName)],
    ) -> Result<(), ProtocolError> {
        for (gfn, entry) in entries {
            let name = match entry {
                FullName::Zero => self.zero,
                FullName::Name(name) => *name,
                FullName::Duplicate(of) => {
                    *self.names.get(of).ok_or(ProtocolError::DanglingDuplicate(*of))?
                }
            };
            if self.frames.contains(*gfn) && !self.names.contains_key(gfn) {
                self.names.insert(*gfn, name);
                if name == self.zero {
                    self.zeros.push(*gfn);
                } else {
                    self.add(*gfn, name, Stage::Queued);
                }
            }
        }
        self.naming.remove(&region);
        self.advance(now, link);
        Ok(())
    }

    fn add(&mut self, gfn: Gfn, name: PageHash, stage: Stage) {
        match self.groups.get_mut(&name) {
            Some(group) => group.frames.push(gfn),
            None => {
                self.groups.insert(name, Group { frames: vec![gfn], stage });
                if stage == Stage::Queued {
                    self.queue.push_back(name);
                }
            }
        }
    }

    /// Does what can be done now.
    fn advance(&mut self, now: Time, link: Link) {
        if !self.has_begun() {
            return;
        }
        for gfn in std::mem::take(&mut self.zeros) {
            if self.frames.remove(gfn) {
                self.out.push_back(Action::Zero(gfn));
                self.arrived(now, &[gfn], Rung::Zero);
            }
        }
        while self.source == Source::Here && self.naming.len() < limits::NAMES_WINDOW_REGIONS {
            let Some(region) = self.unnamed.pop_front() else { break };
            self.naming.insert(region);
            self.out.push_back(Action::Send(Message::WantNames(region)));
        }
        while self.bulk().count() < limits::QUESTIONS_OPEN && self.next_question(now, link) {}
    }

    fn bulk(&self) -> impl Iterator<Item = &Question> {
        self.questions.values().filter(|question| question.kind == Kind::Bulk)
    }

    /// Asks for the next names in the queue; false if there are none.
    fn next_question(&mut self, now: Time, link: Link) -> bool {
        let mut names = Vec::new();
        while names.len() < limits::QUESTION_IDS {
            let Some(name) = self.queue.pop_front() else { break };
            if self.groups.get(&name).is_some_and(|group| group.stage == Stage::Queued) {
                names.push(name);
            }
        }
        if names.is_empty() {
            return false;
        }
        if self.site == Site::Asked {
            let asked: usize = self.bulk().map(|question| question.names.len()).sum();
            let patience = patience(link, asked + names.len());
            self.ask_site(now, names, patience, Kind::Bulk);
        } else {
            self.ask_source(&names);
        }
        true
    }

    fn ask_site(&mut self, now: Time, names: Vec<PageHash>, patience: Span, kind: Kind) {
        let request = RequestId(self.next_request);
        self.next_request += 1;
        for name in &names {
            if let Some(group) = self.groups.get_mut(name) {
                group.stage = Stage::Site(request);
            }
        }
        let ids = names.iter().map(PageHash::short).collect();
        self.questions.insert(request, Question { names, asked: now, patience, kind });
        self.out.push_back(Action::Resolve { request, ids });
    }

    /// From here on the source is awaited for these names; it is asked if it is here, otherwise when it comes.
    fn ask_source(&mut self, names: &[PageHash]) {
        let mut want = Vec::new();
        for name in names {
            let Some(group) = self.groups.get_mut(name) else { continue };
            group.stage = Stage::Source;
            if self.source != Source::Here || group.frames.iter().any(|gfn| self.asked.contains(gfn)) {
                continue;
            }
            match group.frames.iter().find(|gfn| self.faults.contains_key(gfn)) {
                Some(waited_for) => {
                    self.asked.insert(*waited_for);
                    self.out.push_back(Action::Send(Message::Fault(*waited_for)));
                }
                None => want.extend(group.frames.first()),
            }
        }
        want.sort_unstable();
        for batch in want.chunks(limits::WANT_BATCH_PAGES) {
            self.out.push_back(Action::Send(Message::Want(batch.to_vec())));
        }
    }

    /// The site gave `page` for `id`: where to install it.
    pub(super) fn site_page(
        &mut self,
        now: Time,
        from: SiteRung,
        id: ShortId,
        page: &VerifiedPage,
    ) -> Vec<Gfn> {
        let name = page.name();
        if name.short() != id || (!self.groups.contains_key(&name) && self.awaited(id).next().is_some()) {
            // Its question's end or deadline sends the want to the source.
            self.stats.wrong += 1;
            return Vec::new();
        }
        let rung = match from {
            SiteRung::Host => Rung::Host,
            SiteRung::Site => Rung::Site,
        };
        let frames = self.came(now, name, rung);
        if !frames.is_empty() {
            self.heard = now;
        }
        frames
    }

    /// Nobody in the site has these.
    pub(super) fn site_missing(&mut self, now: Time, request: RequestId, ids: &[ShortId]) {
        let mut missing = Vec::new();
        for id in ids {
            let waits = self.awaited(*id).filter(|(_, group)| group.stage == Stage::Site(request));
            missing.extend(waits.map(|(name, _)| *name));
        }
        if !missing.is_empty() {
            self.heard = now;
            self.site_lacks(now, &missing);
        }
    }

    /// What is awaited under this short id: one name, as far as is known.
    fn awaited(&self, id: ShortId) -> impl Iterator<Item = (&PageHash, &Group)> {
        let mut first = [0; 32];
        let mut last = [0xff; 32];
        first[..8].copy_from_slice(&id.0.to_be_bytes());
        last[..8].copy_from_slice(&id.0.to_be_bytes());
        self.groups.range(PageHash(first)..=PageHash(last))
    }

    /// A literal came: where to install it.
    pub(super) fn literal(&mut self, now: Time, gfn: Gfn, page: &VerifiedPage) -> Vec<Gfn> {
        let other = self.names.get(&gfn).is_some_and(|name| *name != page.name());
        if other && self.frames.contains(gfn) && !self.groups.contains_key(&page.name()) {
            self.stats.wrong += 1;
            return Vec::new();
        }
        self.came(now, page.name(), Rung::Source)
    }

    /// The answer to a fault came: where to install it.
    pub(super) fn fault_page(
        &mut self,
        now: Time,
        gfn: Gfn,
        name: PageHash,
        page: &VerifiedPage,
    ) -> Vec<Gfn> {
        if !self.frames.contains(gfn) {
            self.stats.unneeded += 1;
            return Vec::new();
        }
        let known = *self.names.entry(gfn).or_insert(name);
        if known != self.zero || !self.zeros.contains(&gfn) {
            let group = self.groups.get(&known);
            if group.is_none_or(|group| !group.frames.contains(&gfn)) {
                self.add(gfn, known, Stage::Source);
            }
        }
        if page.name() != known {
            // Damaged on its way, or within the source: it is asked for once more, as any other page.
            self.stats.wrong += 1;
            if self.asked.remove(&gfn) && self.source == Source::Here {
                self.out.push_back(Action::Send(Message::Want(vec![gfn])));
            }
            return Vec::new();
        }
        self.came(now, known, Rung::Source)
    }

    /// The page of this name is here: every frame that awaited it.
    fn came(&mut self, now: Time, name: PageHash, rung: Rung) -> Vec<Gfn> {
        let waiting = self.groups.remove(&name).map(|group| group.frames).unwrap_or_default();
        let frames: Vec<Gfn> = waiting.into_iter().filter(|gfn| self.frames.remove(*gfn)).collect();
        self.stats.unneeded += u64::from(frames.is_empty());
        self.arrived(now, &frames, rung);
        frames
    }

    /// These frames get their page now.
    fn arrived(&mut self, now: Time, frames: &[Gfn], rung: Rung) {
        self.left -= frames.len() as u64;
        let mut waited = 0;
        for gfn in frames {
            self.asked.remove(gfn);
            if let Some(since) = self.faults.remove(gfn) {
                waited += 1;
                let wait = now - since;
                self.stats.longest_wait_us = self.stats.longest_wait_us.max(wait.0);
                match rung {
                    Rung::Zero => {}
                    Rung::Host => self.waits_host.add(wait),
                    Rung::Site => self.waits_site.add(wait),
                    Rung::Source => self.waits_source.add(wait),
                }
            }
        }
        let stats = &mut self.stats;
        let (pages, faults) = match rung {
            Rung::Zero => (&mut stats.zero, &mut stats.faults_zero),
            Rung::Host => (&mut stats.host, &mut stats.faults_host),
            Rung::Site => (&mut stats.site, &mut stats.faults_site),
            Rung::Source => (&mut stats.source, &mut stats.faults_source),
        };
        *pages += frames.len() as u64;
        *faults += waited;
        if self.paused && self.overdue_fault(now).is_none() {
            self.paused = false;
            self.out.push_back(Action::ResumeVm);
        }
        if self.left == 0 {
            self.ask_again = None;
        }
    }

    /// The site has said all it knows. False if the question is not one of these.
    pub(super) fn site_done(&mut self, now: Time, link: Link, request: RequestId) -> bool {
        let Some(question) = self.questions.remove(&request) else { return false };
        self.strikes = 0;
        self.left_over(now, request, &question.names);
        self.advance(now, link);
        true
    }

    /// What nobody answered of a question.
    fn left_over(&mut self, now: Time, request: RequestId, names: &[PageHash]) {
        let waits =
            |name: &&PageHash| self.groups.get(name).is_some_and(|group| group.stage == Stage::Site(request));
        let left: Vec<PageHash> = names.iter().filter(waits).copied().collect();
        self.site_lacks(now, &left);
    }

    /// The site does not give these.
    fn site_lacks(&mut self, now: Time, names: &[PageHash]) {
        self.ask_source(names);
        if !names.is_empty() && self.source != Source::Here {
            self.ask_again.get_or_insert(now + limits::FAULT_ASK_AGAIN);
        }
    }
}
