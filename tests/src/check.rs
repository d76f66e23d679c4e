//! What must hold, whatever goes wrong.

use std::collections::{BTreeMap, BTreeSet};

use migration_proto::{Epoch, MigrationId};

use page::Gfn;

use crate::arrived::Memory;
use crate::guest::{self, Image};
use crate::palette::{CONTENTS, Content};

/// Looks at every step. The first violation stands.
#[derive(Debug, Default)]
pub(crate) struct Checker {
    violation: Option<String>,
    /// What the source had at its pause, with the state it saved, for each migration.
    paused: BTreeMap<MigrationId, (Image, Option<Vec<u8>>)>,
    /// The newest epoch as which the VM has run.
    newest: Epoch,
    /// What stood at the destination when it last said what it holds, and the frames that have been told to be absent.
    standing: Option<Image>,
    told_absent: BTreeSet<Gfn>,
    /// The VM was killed with the process that owned it, so nobody can be blamed for its absence.
    pub(crate) vm_killed: bool,
}

impl Checker {
    pub(crate) fn violation(&self) -> Option<&str> {
        self.violation.as_deref()
    }

    pub(crate) fn fail(&mut self, what: String) {
        self.violation.get_or_insert(what);
    }

    pub(crate) fn require(&mut self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.fail(what());
        }
    }

    /// The virtual CPUs of the source stand still for good.
    pub(crate) fn paused(&mut self, migration: MigrationId, image: &Image) {
        self.paused.entry(migration).or_default().0.clone_from(image);
    }

    /// The state of the paused VM has been saved.
    pub(crate) fn saved(&mut self, migration: MigrationId, state: &[u8]) {
        self.paused.entry(migration).or_default().1 = Some(state.to_vec());
    }

    /// What the VM had at its pause.
    pub(crate) fn image(&self, migration: Option<MigrationId>) -> Option<Image> {
        Some(self.paused.get(&migration?)?.0.clone())
    }

    /// As [`Checker::image`], of one page.
    pub(crate) fn at_pause(&self, migration: Option<MigrationId>, gfn: Gfn) -> Option<Content> {
        self.paused.get(&migration?)?.0.get(guest::place(gfn)).copied()
    }

    /// The destination is about to take memory for complete, but for what it knows to be absent.
    pub(crate) fn memory(&mut self, migration: MigrationId, memory: &Memory, state: &[u8], when: &str) {
        let Some((paused, saved)) = self.paused.get(&migration) else {
            return self.fail(format!("{when}: the source has not paused and saved the VM"));
        };
        let frames = (0..).map(Gfn).zip(paused.iter().zip(&memory.image));
        let mut present = frames.filter(|(gfn, _)| !memory.absent.contains(gfn));
        let wrong = present.find(|(_, (paused, here))| paused != here).map(|(gfn, _)| gfn);
        let state_wrong = saved.as_deref() != Some(state);
        self.require(wrong.is_none(), || {
            let at = wrong.unwrap_or_default();
            format!("{when}: frame {at} is not what the source had at its pause")
        });
        self.require(!state_wrong, || format!("{when}: the state is not the one that the source saved"));
    }

    /// Virtual CPUs are let run as the owner of `epoch`. `operator`: an operator said so, who may choose an older one when
    /// the newest has died.
    pub(crate) fn runs(&mut self, who: &str, epoch: Epoch, operator: bool) {
        let newest = self.newest;
        self.require(operator || epoch >= newest, || {
            format!("{who} runs the VM as of {epoch:?} after it has run as of {newest:?}: what it did since is undone")
        });
        self.newest = epoch.max(newest);
    }

    /// A migration begins.
    pub(crate) fn begins(&mut self) {
        self.standing = None;
        self.told_absent.clear();
    }

    /// What stands at these frames the source has called worthless.
    pub(crate) fn told_absent(&mut self, frames: &[Gfn]) {
        self.told_absent.extend(frames);
    }

    /// The destination says what it holds after a break.
    pub(crate) fn stands(&mut self, image: &Image) {
        self.standing = Some(image.clone());
    }

    /// A page is written there: what stood there before the break is gone if it was another.
    pub(crate) fn written(&mut self, gfn: Gfn, content: Content) {
        let at = guest::place(gfn);
        let stood = self.standing.as_mut().and_then(|image| image.get_mut(at));
        if let Some(other) = stood.filter(|stood| **stood != content) {
            *other = CONTENTS;
        }
    }

    /// The destination asked for a page, over the connection after a break: it did not arrive before, or was written over.
    pub(crate) fn sent(&mut self, gfn: Gfn, content: Content, there: &Image) {
        let at = guest::place(gfn);
        let stood = |image: &Image| image.get(at) == Some(&content);
        let again = self.standing.as_ref().is_some_and(stood) && stood(there);
        let worthless = self.told_absent.contains(&gfn);
        self.require(!again || worthless, || {
            format!("frame {gfn} is sent again, and had arrived before the connection was lost")
        });
    }

    /// At most one side runs.
    pub(crate) fn at_most_one(&mut self, source: bool, destination: bool) {
        self.require(!(source && destination), || "both sides run the VM".to_owned());
    }
}
