//! Pages that have been named and are not there yet, grouped by short id: one answer fills every frame of a group.

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

/// The groups, the queue to the site, and the questions under way.
#[derive(Debug)]
pub(super) struct Pending {
    groups: BTreeMap<ShortId, Group>,
    queue: VecDeque<ShortId>,
    questions: BTreeMap<RequestId, (Time, Vec<ShortId>)>,
    next_request: u64,
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

    /// The content of `id` is here: every frame that awaited it.
    pub(super) fn take(&mut self, id: ShortId) -> Vec<Gfn> {
        self.groups.remove(&id).map(|group| group.frames).unwrap_or_default()
    }

    /// From now on the source is awaited for `id`. Returns the frame to ask it for.
    pub(super) fn ask_source(&mut self, id: ShortId) -> Option<Gfn> {
        let group = self.groups.get_mut(&id)?;
        group.stage = Stage::Source;
        group.frames.first().copied()
    }

    /// The frame's content is awaited no more: it was named anew.
    pub(super) fn forget(&mut self, id: ShortId, gfn: Gfn) -> Option<Gfn> {
        let group = self.groups.get_mut(&id)?;
        let was_first = group.frames.first() == Some(&gfn);
        group.frames.retain(|other| *other != gfn);
        let next = group.frames.first().copied();
        if next.is_none() {
            self.groups.remove(&id);
            return None;
        }
        // The source may have been asked for just this frame, which it will call stale: ask for the next one.
        next.filter(|_| was_first && self.groups.get(&id).is_some_and(|g| g.stage == Stage::Source))
    }

    /// The next question to the site, while the window has room.
    pub(super) fn next_question(&mut self, now: Time, link: Link) -> Option<(RequestId, Vec<ShortId>)> {
        if self.questions.len() >= limits::RESOLVE_WINDOW {
            return None;
        }
        let request = RequestId(self.next_request);
        let mut ids = Vec::new();
        while ids.len() < limits::RESOLVE_BATCH_IDS {
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
        // The site works on all questions at once: this one may take as long as the source would for all of them.
        let asked: usize = self.questions.values().map(|(_, ids)| ids.len()).sum();
        self.questions.insert(request, (now + patience(link, asked + ids.len()), ids.clone()));
        Some((request, ids))
    }

    /// The site has said all it knows: the frames to ask the source for.
    pub(super) fn answered(&mut self, request: RequestId) -> Vec<Gfn> {
        let Some((_, ids)) = self.questions.remove(&request) else { return Vec::new() };
        self.strikes = 0;
        self.left_over(request, &ids)
    }

    /// The questions whose deadline has come, with the frames to ask the source for instead.
    pub(super) fn overdue(&mut self, now: Time) -> Vec<(RequestId, Vec<Gfn>)> {
        let due: Vec<RequestId> = self
            .questions
            .iter()
            .filter(|(_, (deadline, _))| *deadline <= now)
            .map(|(request, _)| *request)
            .collect();
        let mut given_up = Vec::with_capacity(due.len());
        for request in due {
            let Some((_, ids)) = self.questions.remove(&request) else { continue };
            let waiting = Stage::Site(request);
            let waits = |id: &ShortId| self.groups.get(id).is_some_and(|group| group.stage == waiting);
            // A site that gave some of the pages is slow; one that gave none may be dead.
            self.strikes += u32::from(ids.iter().all(waits));
            given_up.push((request, self.left_over(request, &ids)));
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
        self.questions.values().map(|(deadline, _)| *deadline).min()
    }

    /// What nobody answered of a question.
    fn left_over(&mut self, request: RequestId, ids: &[ShortId]) -> Vec<Gfn> {
        let waits = |group: &Group| group.stage == Stage::Site(request);
        let left: BTreeSet<ShortId> =
            ids.iter().copied().filter(|id| self.groups.get(id).is_some_and(waits)).collect();
        let mut frames: Vec<Gfn> = left.into_iter().filter_map(|id| self.ask_source(id)).collect();
        frames.sort_unstable();
        frames
    }
}

/// How long the site gets for `pages`: what a plain migration would take for them, within bounds. Less would trade WAN bytes,
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

    #[test]
    fn a_silent_site_is_given_up_after_some_strikes() {
        let mut pending = Pending::new(true);
        let mut asked = Vec::new();
        for id in 0..(limits::RESOLVE_BATCH_IDS * (limits::RESOLVE_WINDOW + 2)) as u64 {
            pending.add(ShortId(id), Gfn(id), Comes::ByTheLadder);
        }
        while pending.next_question(Time(0), LINK).is_some() {}
        let deadline = pending.questions.values().map(|(deadline, _)| *deadline).max().unwrap();
        asked.extend(pending.overdue(deadline).into_iter().flat_map(|(_, frames)| frames));
        assert_eq!(asked.len(), limits::RESOLVE_BATCH_IDS * (limits::RESOLVE_WINDOW + 2));
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
        let ids = (limits::RESOLVE_BATCH_IDS * limits::RESOLVE_WINDOW * 2) as u64;
        for id in 0..ids {
            pending.add(ShortId(id), Gfn(id), Comes::ByTheLadder);
        }
        let mut deadlines = Vec::new();
        while let Some((request, ids)) = pending.next_question(Time(0), LINK) {
            // One page of each question comes.
            pending.take(ids[0]);
            deadlines.push(pending.questions[&request].0);
        }
        assert!(deadlines.is_sorted_by(|a, b| a < b), "each question adds to the site's work: {deadlines:?}");
        let given_up = pending.overdue(*deadlines.last().unwrap());
        assert_eq!(given_up.len(), limits::RESOLVE_WINDOW);
        let next = *deadlines.last().unwrap();
        assert!(pending.next_question(next, LINK).is_some(), "the site is asked on");
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
