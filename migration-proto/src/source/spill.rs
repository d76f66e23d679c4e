//! The spill file: before Commit every absent page stands on stable storage outside this host, so that a source that dies takes none of them with it. And the
//! source that such a file makes, which gives what is in it and can do nothing else.
//!
//! ```text
//!  post-copy decided ──► walk 0: all that is absent, the VM runs ──► dirty log ──► walk 1: what was written since … while that is much less than before
//!        ──► pause ──► what was written since ──► SealSpill ──┐
//!                                                   Ready ──┴──► Commit
//! ```

use std::collections::VecDeque;

use page::{Domain, Gfn, PageHash, PageSet};

use super::Source;
use super::action::{Action, SourceConfig, SpillConfig};
use super::naming::Naming;
use super::phase::{End, Phase};
use crate::error::AbortReason;
use crate::limits;
use crate::postcopy::Mode;
use crate::timer::{Span, Time};

/// How far the spill file is.
#[derive(Debug)]
pub(super) struct Spill {
    /// Frames to be written, and where the walk goes on.
    todo: PageSet,
    next: Gfn,
    /// Frames that were written at least once.
    written: PageSet,
    /// Walks begun, and the pages of the last.
    walks: u32,
    pages: u64,
    stage: Stage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The driver has nothing to write.
    Idle,
    /// A walk is under way while the VM runs.
    Ahead,
    /// The VM stands still, and the rest is being written; the root to seal with.
    Rest(PageHash),
    /// The file stands.
    Sealed,
}

impl Spill {
    /// With nothing written, if there is to be one.
    pub(super) fn asked_for(config: &SourceConfig) -> Option<Self> {
        let bound = config.layout.page_bound();
        config.spill.then(|| Self {
            todo: PageSet::empty(bound),
            next: Gfn(0),
            written: PageSet::empty(bound),
            walks: 0,
            pages: 0,
            stage: Stage::Idle,
        })
    }

    fn begin(&mut self, todo: PageSet, stage: Stage) {
        self.pages = todo.len();
        self.walks += 1;
        self.written.union_with(&todo);
        (self.todo, self.next, self.stage) = (todo, Gfn(0), stage);
    }

    /// The next frames of the walk; none when it is over.
    fn batch(&mut self) -> Option<Action> {
        let anew = self.walks == 1 && self.next == Gfn(0);
        let frames: Vec<Gfn> = self.todo.iter_from(self.next).take(limits::SPILL_BATCH_PAGES).collect();
        self.next = Gfn(frames.last()?.0 + 1);
        Some(Action::Spill { frames, anew })
    }
}

impl Source {
    /// Post-copy is decided and the VM still runs; `dirty` was written since the last walk. True if a walk has begun: the dirty log is looked at again after it.
    pub(super) fn spill_ahead(&mut self, now: Time, dirty: &PageSet) -> bool {
        let Some(spill) = &mut self.spill else { return false };
        let todo = match spill.walks {
            0 => self.absent.clone(),
            // Another walk helps if it is so much shorter that the guest has less time to write.
            1..limits::SPILL_WALKS
                if dirty.len() > limits::SPILL_REST_PAGES && dirty.len() <= spill.pages / 2 =>
            {
                dirty.clone()
            }
            _ => return false,
        };
        if todo.is_empty() {
            return false;
        }
        spill.begin(todo, Stage::Ahead);
        self.spill_on(now);
        true
    }

    /// The VM stands still; `dirty` was written since the last walk.
    pub(super) fn spill_rest(&mut self, now: Time, dirty: &PageSet, root: PageHash) {
        let Some(spill) = self.spill.as_mut().filter(|_| !self.absent.is_empty()) else { return };
        let mut todo = PageSet::empty(self.absent.bound());
        for gfn in self.absent.iter().filter(|gfn| dirty.contains(*gfn) || !spill.written.contains(*gfn)) {
            todo.insert(gfn);
        }
        spill.begin(todo, Stage::Rest(root));
        self.spill_on(now);
    }

    fn spill_on(&mut self, now: Time) {
        let Some(spill) = &mut self.spill else { return };
        if let Some(batch) = spill.batch() {
            self.actions.push_back(batch);
        } else if let Stage::Rest(root) = spill.stage {
            self.actions.push_back(Action::SealSpill { root });
        } else {
            spill.stage = Stage::Idle;
            self.actions.push_back(Action::CollectDirty);
        }
        self.deadline = Some(now + limits::LOCAL_TIMEOUT);
    }

    /// What [`Action::Spill`] asked for is on stable storage.
    pub fn spilled(&mut self, now: Time) {
        self.owed.spilled();
        let ahead = self.spill.as_ref().is_some_and(|spill| spill.stage == Stage::Ahead);
        let rest = self.spill.as_ref().is_some_and(|spill| matches!(spill.stage, Stage::Rest(_)));
        if (ahead && matches!(self.phase, Phase::Collecting))
            || (rest && matches!(self.phase, Phase::Handover { .. }))
        {
            self.spill_on(now);
        }
        self.settle(now);
    }

    /// Whether the spill file is, or is about to be, whole.
    pub(super) fn seals_spill(&self) -> bool {
        self.spill.as_ref().is_some_and(|spill| matches!(spill.stage, Stage::Rest(_) | Stage::Sealed))
    }

    /// The VM runs on here, and its switchover is void: what was written of it too.
    pub(super) fn forget_spill(&mut self) {
        self.spill = Spill::asked_for(&self.config);
    }

    /// The spill file cannot be written. The VM runs on here: without the file it is not handed over.
    pub fn spill_failed(&mut self, what: String) {
        self.abort(AbortReason::Spill(what));
    }

    /// The spill file is whole and durable, as [`Action::SealSpill`] asked.
    pub fn spill_sealed(&mut self, now: Time) {
        if let Some(spill) = self.spill.as_mut().filter(|spill| matches!(spill.stage, Stage::Rest(_))) {
            spill.stage = Stage::Sealed;
            self.progressed(now);
            self.commit_if_safe(now);
        }
    }

    /// Whether nothing of the spill file keeps Commit back.
    pub(super) fn is_spilled(&self) -> bool {
        let sealed = self.spill.as_ref().is_none_or(|spill| spill.stage == Stage::Sealed);
        sealed || self.absent.is_empty()
    }

    /// Takes the place of a source that is no more, from what it left in a spill file, over a connection to its destination. It serves pages; it has no VM, and
    /// no right to one: none of what it says starts a VM or ends one, and it never asks for [`Action::Resume`].
    #[must_use]
    pub fn from_spill(now: Time, spill: SpillConfig) -> Self {
        let SpillConfig { migration, vm, epoch, layout, root, zero, names, link } = spill;
        let naming = Naming::known(layout.page_bound(), names, zero);
        let config = SourceConfig {
            migration,
            vm,
            epoch,
            // Every name is known: none is computed.
            domain: Domain::unkeyed(),
            layout,
            machine: Vec::new(),
            downtime: Span(0),
            link,
            mode: Mode::Postcopy,
            kept_versions: 0,
            auto_converge: false,
            spill: false,
            resume_for: Span(0),
        };
        let mut source = Self::new(now, config);
        source.phase = Phase::Postcopy { connected: false, told: false, ran: true };
        source.naming = Some(naming);
        source.served = Some(root);
        source.actions = VecDeque::from([Action::Send(source.first_word())]);
        source.deadline = Some(now + limits::RUNNING_TIMEOUT);
        source
    }

    /// The destination does not run the VM: there is nothing that this source could do for it.
    pub(super) fn not_served(&mut self, never: bool) {
        self.finish(End::NotServed { never });
    }
}
