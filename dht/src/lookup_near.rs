//! The part of a search that guesses: pages whose names no owner keeps, or none that answers.

use super::Search;
use crate::{
    asked::PeerNo,
    limits::{FETCH_BATCH, NEAR_HOLDERS},
    near::{cover, nearest},
    want::{At, Stage, Word},
};

impl Search {
    /// Has those pages asked for whose holders are to be guessed from the pages near them, as soon as these are looked up.
    pub(super) fn settle(&mut self) {
        while let Some(window) = self.windows.next_settled() {
            let near = |at: &At| self.wants[*at as usize].stage == Stage::Near;
            if !window.clone().any(|at| near(&at)) {
                continue;
            }
            let hits: Vec<At> = window.clone().filter(|at| self.wants[*at as usize].known > 0).collect();
            let cover = cover(hits.iter().map(|at| self.wants[*at as usize].holders()), NEAR_HOLDERS);
            for at in window {
                if self.wants[at as usize].stage == Stage::Near {
                    self.ask_near(&hits, &cover, at);
                }
            }
        }
    }

    fn ask_near(&mut self, hits: &[At], cover: &[PeerNo], at: At) {
        // Of those who hold a page beside it one after the other has its turn, a request's worth of pages each.
        let turn = at as usize / FETCH_BATCH;
        let beside = nearest(hits, at).map(|near| {
            let holders = self.wants[near as usize].holders();
            holders[turn % holders.len()]
        });
        for holder in beside.collect::<Vec<_>>().into_iter().chain(cover.iter().copied()) {
            if self.wants[at as usize].holders().len() < NEAR_HOLDERS {
                self.wants[at as usize].add(holder, Word::Nobody);
            }
        }
        if self.wants[at as usize].known == 0 && self.suggestions > 0 && !self.suggested.is_empty() {
            self.suggestions -= 1;
            self.suggested.iter().for_each(|holder| self.wants[at as usize].add(*holder, Word::Nobody));
        }
        self.change(at, |want| want.stage = Stage::Over);
        self.queue_if_idle(at);
    }
}
