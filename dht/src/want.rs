//! The pages that a search wants, each in a few bytes.

use page::ShortId;

use crate::{
    asked::PeerNo,
    limits::{HOLDERS_PER_NAME, OWNERS},
};

/// A place in a search's ids.
pub(crate) type At = u32;

/// By whose word a peer holds a page.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Word {
    /// It is a guess, or hearsay: should it prove false, the holder is not to blame.
    Nobody,
    /// The holder announced it to this peer.
    Holder,
    /// The holder announced it to this owner, as the owner says.
    Owner(PeerNo),
}

/// How far the question who holds a page has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stage {
    /// An owner's answer is out, or the question is queued.
    Owner,
    /// No owner that answers keeps its name: it waits for the answers about those near it.
    Near,
    /// There is nobody left to ask.
    Over,
    /// The asker has been told that nobody has it: that is final.
    Missing,
}

/// One page. There may be a quarter of a million of them, so it is small.
#[derive(Debug)]
pub(crate) struct Want {
    /// The holders known, `known` of them.
    pub(crate) holders: [PeerNo; HOLDERS_PER_NAME],
    /// By whose word each is.
    pub(crate) word: [Word; HOLDERS_PER_NAME],
    pub(crate) known: u8,
    /// Which of `holders` were asked: none is asked twice.
    pub(crate) asked: u8,
    /// Requests to holders that are out or queued.
    pub(crate) fetching: u8,
    /// Which of its shard's owners were asked, or are not to be: none is asked twice.
    pub(crate) owners_asked: u8,
    pub(crate) stage: Stage,
    pub(crate) found: bool,
}

const _: () = {
    assert!(HOLDERS_PER_NAME <= u8::BITS as usize);
    assert!(OWNERS <= u8::BITS as usize);
};

impl Want {
    pub(crate) fn new() -> Self {
        Self {
            holders: [0; HOLDERS_PER_NAME],
            word: [Word::Nobody; HOLDERS_PER_NAME],
            known: 0,
            asked: 0,
            fetching: 0,
            owners_asked: 0,
            stage: Stage::Owner,
            found: false,
        }
    }

    /// Whether something is out or queued that could still bring it.
    pub(crate) fn open(&self) -> bool {
        let looking = matches!(self.stage, Stage::Owner | Stage::Near);
        !self.found && (looking || self.fetching > 0)
    }

    pub(crate) fn holders(&self) -> &[PeerNo] {
        &self.holders[..usize::from(self.known)]
    }

    pub(crate) fn add(&mut self, holder: PeerNo, word: Word) {
        let known = usize::from(self.known);
        if !self.found && known < HOLDERS_PER_NAME && !self.holders().contains(&holder) {
            self.holders[known] = holder;
            self.word[known] = word;
            self.known += 1;
        }
    }
}

/// Orders ids by value, and drops repetitions: the ids left, in their order, and their places sorted by id.
pub(crate) fn distinct(ids: Vec<ShortId>) -> (Vec<ShortId>, Vec<At>) {
    let sort = |ids: &[ShortId]| {
        let mut sorted: Vec<At> = (0..).zip(ids).map(|(at, _)| at).collect();
        // Stable, so that of equal ids the first stays.
        sorted.sort_by_key(|at| ids[*at as usize]);
        sorted.dedup_by_key(|at| ids[*at as usize]);
        sorted
    };
    let mut sorted = sort(&ids);
    if sorted.len() == ids.len() {
        return (ids, sorted);
    }
    sorted.sort_unstable();
    let once: Vec<ShortId> = sorted.iter().map(|at| ids[*at as usize]).collect();
    let sorted = sort(&once);
    (once, sorted)
}
