//! Pages that have been named and are not there yet, grouped by short id: one answer fills every frame of a group.
//!
//! Each question to the site costs it a request to each owner of the index, whatever its size, so questions are to be few and large, and no
//! page is to wait for others. What has gathered is asked for at once while nothing is unanswered, and otherwise when it is at least as much as what is
//! unanswered: while names come faster than pages, each question is as large as all that are open together; while pages come faster, a
//! name does not wait longer than the answers take that are due. There is no timer in it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use page::{Gfn, PAGE_SIZE, ShortId};

use crate::limits;
use crate::timer::{Link, Span, Time};

/// A question to the site.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RequestId(pub u64);

/// Where the answer for a group is awaited from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// In the queue to the site.
    Queued,
    /// The site has been asked.
    Site(RequestId),
    /// The source has been asked, or sends unasked.
    Source,
}

/// How a page that has just been named comes here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Comes {
    /// The site is asked first, then the source.
    ByTheLadder,
    /// The source is asked at once.
    OnRequest,
    /// The source sends it without being asked.
    Unasked,
}

#[derive(Debug)]
struct Group {
    frames: Vec<Gfn>,
    stage: Stage,
}

/// A question under way.
#[derive(Debug)]
struct Question {
    ids: Vec<ShortId>,
    /// How many of them the site has not answered.
    open: usize,
    asked: Time,
    /// How far the site may fall behind the source.
    patience: Span,
    link: Link,
    /// Pages that the site had given before.
    given_before: u64,
}

/// The groups, the queue to the site, and the questions under way.
#[derive(Debug)]
pub(super) struct Pending {
    groups: BTreeMap<ShortId, Group>,
    queue: VecDeque<ShortId>,
    questions: BTreeMap<RequestId, Question>,
    next_request: u64,
    /// Pages that the site has given.
    given: u64,
    /// When it last answered anything.
    heard: Time,
    site: bool,
    strikes: u32,
}

impl Pending {
    /// `site`: whether there is a site to ask.
    pub(super) fn new(site: bool) -> Self {
        Self {
            groups: BTreeMap::new(),
            queue: VecDeque::new(),
            questions: BTreeMap::new(),
            next_request: 0,
            given: 0,
            heard: Time(0),
            site,
            strikes: 0,
        }
    }

    /// No question has this number or a higher one.
    pub(super) fn next_request(&self) -> u64 {
        self.next_request
    }

    pub(super) fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// A frame awaits `id`. Returns it if the source is to be asked for it at once.
    pub(super) fn add(&mut self, id: ShortId, gfn: Gfn, comes: Comes) -> Option<Gfn> {
        if let Some(group) = self.groups.get_mut(&id) {
            group.frames.push(gfn);
            return None;
        }
        let (stage, ask) = match (comes, self.site) {
            (Comes::Unasked, _) => (Stage::Source, None),
            (Comes::ByTheLadder, true) => {
                self.queue.push_back(id);
                (Stage::Queued, None)
            }
            (Comes::ByTheLadder, false) | (Comes::OnRequest, _) => (Stage::Source, Some(gfn)),
        };
        self.groups.insert(id, Group { frames: vec![gfn], stage });
        ask
    }

    /// Whether the site is to answer for `id`, so that the source is not to be asked.
    pub(super) fn is_with_site(&self, id: ShortId) -> bool {
        self.groups.get(&id).is_some_and(|group| group.stage != Stage::Source)
    }

    /// The content of `id` is here: every frame that awaited it.
    pub(super) fn take(&mut self, id: ShortId) -> Vec<Gfn> {
        let Some(group) = self.groups.remove(&id) else { return Vec::new() };
        self.settled(group.stage);
        group.frames
    }

    /// A group is awaited in this stage no more.
    fn settled(&mut self, stage: Stage) {
        match stage {
            Stage::Site(request) => {
                if let Some(question) = self.questions.get_mut(&request) {
                    question.open -= 1;
                }
            }
            Stage::Queued | Stage::Source => {}
        }
    }

    /// From now on the source is awaited for `id`. Returns the frame to ask it for.
    fn ask_source(&mut self, id: ShortId) -> Option<Gfn> {
        let group = self.groups.get_mut(&id)?;
        let before = std::mem::replace(&mut group.stage, Stage::Source);
        let frame = group.frames.first().copied();
        self.settled(before);
        frame
    }

    /// Nothing is awaited any more. Returns the questions that are under way.
    pub(super) fn forget_all(&mut self) -> Vec<RequestId> {
        self.groups.clear();
        self.queue.clear();
        std::mem::take(&mut self.questions).into_keys().collect()
    }

    /// The frame's content is awaited no more: it was named anew.
    pub(super) fn forget(&mut self, id: ShortId, gfn: Gfn) -> Option<Gfn> {
        let group = self.groups.get_mut(&id)?;
        let was_first = group.frames.first() == Some(&gfn);
        group.frames.retain(|other| *other != gfn);
        let next = group.frames.first().copied();
        if next.is_none() {
            self.take(id);
            return None;
        }
        // The source may have been asked for just this frame, which it will call stale: ask for the next one.
        next.filter(|_| was_first && self.groups.get(&id).is_some_and(|g| g.stage == Stage::Source))
    }

    /// The next question to the site, if enough has gathered for one and the window has room.
    pub(super) fn next_question(&mut self, now: Time, link: Link) -> Option<(RequestId, Vec<ShortId>)> {
        let unanswered: usize = self.questions.values().map(|question| question.open).sum();
        if self.questions.len() >= limits::QUESTIONS_OPEN || self.queue.len() < unanswered {
            return None;
        }
        let request = RequestId(self.next_request);
        let mut ids = Vec::new();
        while ids.len() < limits::QUESTION_IDS {
            let Some(id) = self.queue.pop_front() else { break };
            if let Some(group) = self.groups.get_mut(&id).filter(|group| group.stage == Stage::Queued) {
                group.stage = Stage::Site(request);
                ids.push(id);
            }
        }
        if ids.is_empty() {
            return None;
        }
        self.next_request += 1;
        let question = Question {
            open: ids.len(),
            asked: now,
            // The site works on all questions at once: this one may take as long as the source would for all of them.
            patience: patience(link, unanswered + ids.len()),
            link,
            given_before: self.given,
            ids: ids.clone(),
        };
        self.questions.insert(request, question);
        Some((request, ids))
    }

    /// The site has given a page that was awaited.
    pub(super) fn site_gave(&mut self, now: Time) {
        self.given += 1;
        self.heard = now;
    }

    /// Nobody in the site has these: the frames to ask the source for.
    pub(super) fn missing(&mut self, now: Time, request: RequestId, ids: &[ShortId]) -> Vec<Gfn> {
        let waits = |id: &ShortId| self.groups.get(id).is_some_and(|g| g.stage == Stage::Site(request));
        let missing: BTreeSet<ShortId> = ids.iter().copied().filter(waits).collect();
        if !missing.is_empty() {
            self.heard = now;
        }
        self.ask_source_for(missing)
    }

    /// The site has said all it knows: the frames to ask the source for.
    pub(super) fn answered(&mut self, request: RequestId) -> Vec<Gfn> {
        let Some(question) = self.questions.remove(&request) else { return Vec::new() };
        self.strikes = 0;
        self.left_over(request, &question)
    }

    /// The questions whose deadline has come, with the frames to ask the source for instead.
    pub(super) fn overdue(&mut self, now: Time) -> Vec<(RequestId, Vec<Gfn>)> {
        let is_due = |(request, question): (&RequestId, &Question)| {
            (self.deadline_of(question) <= now).then_some(*request)
        };
        let due: Vec<RequestId> = self.questions.iter().filter_map(is_due).collect();
        let mut given_up = Vec::with_capacity(due.len());
        for request in due {
            let Some(question) = self.questions.remove(&request) else { continue };
            // A site that answered for some of the pages is slow; one that answered for none may be dead.
            self.strikes += u32::from(question.open == question.ids.len());
            given_up.push((request, self.left_over(request, &question)));
        }
        if self.strikes >= limits::SITE_STRIKES && self.site {
            self.site = false;
            // What was queued for the site goes to the source as if it had been asked for in vain.
            let queued: Vec<ShortId> = self.queue.drain(..).collect();
            let frames = queued.into_iter().filter_map(|id| {
                let queued = self.groups.get(&id).is_some_and(|group| group.stage == Stage::Queued);
                queued.then(|| self.ask_source(id)).flatten()
            });
            let frames: Vec<Gfn> = frames.collect();
            if let Some((_, last)) = given_up.last_mut() {
                last.extend(frames);
            }
        }
        given_up
    }

    /// The earliest deadline of a question.
    pub(super) fn deadline(&self) -> Option<Time> {
        self.questions.values().map(|question| self.deadline_of(question)).min()
    }

    /// The site may neither be silent for longer than its patience, nor fall that far behind what the source would have sent meanwhile.
    fn deadline_of(&self, question: &Question) -> Time {
        let given = (self.given - question.given_before).saturating_mul(PAGE_SIZE as u64);
        let behind = question.asked + question.patience + question.link.time_for(given);
        let silent = question.asked.max(self.heard) + question.patience;
        behind.min(silent)
    }

    /// What nobody answered of a question.
    fn left_over(&mut self, request: RequestId, question: &Question) -> Vec<Gfn> {
        if question.open == 0 {
            return Vec::new();
        }
        let waits = |id: &ShortId| self.groups.get(id).is_some_and(|g| g.stage == Stage::Site(request));
        let left = question.ids.iter().copied().filter(waits).collect();
        self.ask_source_for(left)
    }

    fn ask_source_for(&mut self, ids: BTreeSet<ShortId>) -> Vec<Gfn> {
        let mut frames: Vec<Gfn> = ids.into_iter().filter_map(|id| self.ask_source(id)).collect();
        frames.sort_unstable();
        frames
    }
}

/// How far the site may be behind with `pages`: what a plain migration would take for them, within bounds. Less would trade WAN bytes,
/// which are scarce, for time that nobody gains: the link is busy with other literals in the meantime.
pub(super) fn patience(link: Link, pages: usize) -> Span {
    let source = link.time_for((pages * PAGE_SIZE) as u64).0 + link.rtt.0;
    Span(source.clamp(limits::SITE_PATIENCE_MIN.0, limits::SITE_PATIENCE_MAX.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINK: Link = Link { rtt: Span::from_millis(50), bytes_per_s: 12_500_000 };

    #[test]
    fn one_answer_fills_every_frame_of_a_group() {
        let mut pending = Pending::new(true);
        for gfn in [3, 9, 12] {
            assert_eq!(pending.add(ShortId(7), Gfn(gfn), Comes::ByTheLadder), None);
        }
        let (_, ids) = pending.next_question(Time(0), LINK).unwrap();
        assert_eq!(ids, [ShortId(7)]);
        assert_eq!(pending.take(ShortId(7)), [Gfn(3), Gfn(9), Gfn(12)]);
        assert!(pending.is_empty());
    }

    #[test]
    fn what_the_site_lacks_is_asked_of_the_source_once() {
        let mut pending = Pending::new(true);
        pending.add(ShortId(1), Gfn(1), Comes::ByTheLadder);
        pending.add(ShortId(2), Gfn(2), Comes::ByTheLadder);
        let (request, _) = pending.next_question(Time(0), LINK).unwrap();
        pending.take(ShortId(1));
        assert_eq!(pending.answered(request), [Gfn(2)]);
        assert_eq!(pending.answered(request), []);
        assert_eq!(pending.add(ShortId(2), Gfn(5), Comes::ByTheLadder), None, "on its way already");
    }

    /// Names `ids` of as many frames.
    fn name(pending: &mut Pending, ids: std::ops::Range<u64>) {
        for id in ids {
            pending.add(ShortId(id), Gfn(id), Comes::ByTheLadder);
        }
    }

    #[test]
    fn what_is_missing_is_asked_of_the_source_before_the_question_ends() {
        let mut pending = Pending::new(true);
        name(&mut pending, 0..10);
        let (request, _) = pending.next_question(Time(0), LINK).unwrap();
        assert_eq!(pending.missing(Time(1), request, &[ShortId(4), ShortId(3)]), [Gfn(3), Gfn(4)]);
        assert_eq!(pending.missing(Time(1), request, &[ShortId(4)]), [], "once");
        assert_eq!(pending.missing(Time(1), request, &[ShortId(99)]), [], "nobody asked for that");
        let other = RequestId(request.0 + 1);
        assert_eq!(pending.missing(Time(1), other, &[ShortId(5)]), [], "that was not asked in this question");
        assert_eq!(pending.take(ShortId(3)), [Gfn(3)], "it comes all the same");
        let rest: Vec<Gfn> = [0, 1, 2, 5, 6, 7, 8, 9].map(Gfn).into();
        assert_eq!(pending.answered(request), rest, "what the site forgot to answer");
        assert_eq!(pending.deadline(), None);
    }

    /// A quarter of a million names used to be 128 questions, each of which asked every owner of the site's index.
    #[test]
    fn names_that_come_faster_than_pages_make_few_questions() {
        const REGION: u64 = 512;
        let (mut pending, mut asked, mut named, mut given) = (Pending::new(true), Vec::new(), 0, 0);
        while given < limits::QUESTION_IDS as u64 {
            if named < limits::QUESTION_IDS as u64 {
                name(&mut pending, named..named + 2 * REGION);
                named += 2 * REGION;
            }
            let gives = asked.iter().map(Vec::len).sum::<usize>() as u64;
            let until = gives.min(given + REGION);
            (given..until).for_each(|id| drop(pending.take(ShortId(id))));
            given = until;
            // A question is over when its last page has come.
            let over = |question: &Question| question.open == 0;
            let ended: Vec<_> =
                pending.questions.iter().filter(|q| over(q.1)).map(|(request, _)| *request).collect();
            assert!(ended.into_iter().all(|request| pending.answered(request).is_empty()));
            while let Some((_, ids)) = pending.next_question(Time(0), LINK) {
                asked.push(ids);
            }
            assert!(pending.questions.len() <= limits::QUESTIONS_OPEN);
        }
        let sizes: Vec<usize> = asked.iter().map(Vec::len).collect();
        assert!(sizes.len() <= 24, "{sizes:?}");
    }

    #[test]
    fn a_silent_site_is_given_up_after_some_strikes() {
        let mut pending = Pending::new(true);
        let (mut named, mut questions) = (0, 0);
        // As many at a time as lets the next question go.
        while questions < limits::QUESTIONS_OPEN {
            name(&mut pending, named..(named * 2).max(512));
            named = (named * 2).max(512);
            questions += usize::from(pending.next_question(Time(0), LINK).is_some());
        }
        name(&mut pending, named..named + 100);
        let deadline = pending.questions.values().map(|q| pending.deadline_of(q)).max().unwrap();
        let given_up = pending.overdue(deadline);
        let asked = given_up.into_iter().flat_map(|(_, frames)| frames).count() as u64;
        assert_eq!(asked, named + 100);
        assert!(pending.next_question(deadline, LINK).is_none());
        assert_eq!(
            pending.add(ShortId(u64::MAX), Gfn(1), Comes::ByTheLadder),
            Some(Gfn(1)),
            "straight to the source"
        );
    }

    /// On a loaded machine the site gave its pages in time for none of eight questions asked at once, each of which had been
    /// given the time of one: it was taken for dead, and 300 MB that it held crossed the WAN.
    #[test]
    fn a_site_that_is_slow_is_not_taken_for_dead() {
        let mut pending = Pending::new(true);
        for _ in 0..3 {
            name(&mut pending, 0..2048);
            let (request, ids) = pending.next_question(Time(0), LINK).unwrap();
            pending.take(ids[0]);
            let deadline = pending.deadline().unwrap();
            assert_eq!(
                pending.overdue(deadline).iter().map(|(over, _)| *over).collect::<Vec<_>>(),
                [request]
            );
            (0..2048).for_each(|id| drop(pending.take(ShortId(id))));
        }
        name(&mut pending, 0..2048);
        let (_, ids) = pending.next_question(Time(0), LINK).expect("the site is asked on");
        let first = pending.deadline().unwrap();
        name(&mut pending, 2048..4096);
        let (second, _) = pending.next_question(Time(0), LINK).unwrap();
        let second = pending.deadline_of(&pending.questions[&second]);
        assert!(first < second, "each question adds to the site's work");
        assert_eq!(ids.len(), 2048);
    }

    /// A question may be as large as the VM: how long it may take cannot be known when it is asked, nor may it go on for ever.
    #[test]
    fn a_site_keeps_its_time_by_being_faster_than_the_source() {
        const PAGES: u64 = 100_000;
        let at = |page_us: u64| {
            let (mut pending, mut now) = (Pending::new(true), Time(0));
            name(&mut pending, 0..PAGES);
            pending.next_question(now, LINK).unwrap();
            for page in 0..PAGES {
                now = now + Span(page_us);
                if pending.deadline().unwrap() <= now {
                    return Err((page, now));
                }
                pending.take(ShortId(page));
                pending.site_gave(now);
            }
            Ok(now)
        };
        let source_us = PAGE_SIZE as u64 * 1_000_000 / LINK.bytes_per_s;
        assert_eq!(at(source_us - 7), Ok(Time(PAGES * (source_us - 7))), "a little faster than the source");
        let (pages, until) = at(source_us * 2).expect_err("half as fast as the source");
        let patience = limits::SITE_PATIENCE_MAX;
        assert!(pages > 0 && until <= Time(0) + patience + patience + Span::from_millis(100), "{until:?}");

        let mut pending = Pending::new(true);
        name(&mut pending, 0..PAGES);
        pending.next_question(Time(0), LINK).unwrap();
        let early = Time(0) + Span::from_secs(1);
        (0..PAGES / 2).for_each(|page| {
            pending.take(ShortId(page));
            pending.site_gave(early);
        });
        assert_eq!(pending.deadline(), Some(early + patience), "it was fast, and has stopped");
    }

    #[test]
    fn a_frame_named_anew_leaves_the_others_of_its_group_waiting() {
        let mut pending = Pending::new(false);
        assert_eq!(pending.add(ShortId(1), Gfn(1), Comes::ByTheLadder), Some(Gfn(1)));
        assert_eq!(pending.add(ShortId(1), Gfn(2), Comes::ByTheLadder), None);
        assert_eq!(pending.forget(ShortId(1), Gfn(1)), Some(Gfn(2)), "asked for in its stead");
        assert_eq!(pending.forget(ShortId(1), Gfn(2)), None);
        assert!(pending.is_empty());
    }
}
