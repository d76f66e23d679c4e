//! Literals at both hosts: the versions that the source's driver keeps, deltas against them, and what the destination's driver makes of those.

use std::collections::BTreeMap;

use migration_proto::Span;
use migration_proto::literal::{self, Delta};
use migration_proto::source::{Literal, LiteralsSent};
use migration_proto::wire::Channel;
use page::{Gfn, PageHash, ShortId};

use crate::mutation::Mutation;
use crate::palette::Content;
use crate::rng::Rng;
use crate::source_host::SourceJob;
use crate::world::World;

/// The versions of pages that the source's driver keeps.
#[derive(Debug)]
pub(crate) struct Versions {
    /// How many the protocol may have it keep.
    pub(crate) most: usize,
    /// Percent of deltas that are made against another page than the destination has.
    wrong: u64,
    rng: Rng,
    pub(crate) kept: BTreeMap<Gfn, (PageHash, Content)>,
    /// What is to be read and kept then. What is dropped meanwhile is not.
    awaited: BTreeMap<Gfn, PageHash>,
    /// What was last sent for a frame.
    sent: BTreeMap<Gfn, Content>,
}

impl Versions {
    pub(crate) fn draw(seed: u64) -> Self {
        // A sequence of its own: what else happens in a run of this seed does not hang on it.
        let mut rng = Rng::new(seed ^ 0x5EED_DE17A);
        Self {
            most: rng.pick(&[0, 2, 40, 5000, 5000]),
            wrong: rng.pick(&[0, 0, 2, 60]),
            rng,
            kept: BTreeMap::new(),
            awaited: BTreeMap::new(),
            sent: BTreeMap::new(),
        }
    }

    /// Another migration begins.
    pub(crate) fn begin(&mut self) {
        self.kept.clear();
        self.awaited.clear();
    }

    /// These are to be read and sent.
    pub(crate) fn give_out(&mut self, literals: &[Literal]) {
        let kept = literals.iter().filter(|literal| literal.keep);
        self.awaited.extend(kept.map(|literal| (literal.gfn, literal.name)));
    }

    /// Forgets what is kept of these frames, or is to be.
    pub(crate) fn drop_those(&mut self, frames: &[Gfn]) {
        self.kept.retain(|gfn, _| !frames.contains(gfn));
        self.awaited.retain(|gfn, _| !frames.contains(gfn));
    }

    /// What the literal of `content` is a delta against. The wrong base is the page itself: what the destination makes of that delta is what stands there.
    fn base(&mut self, literal: &Literal, content: Content, always: bool) -> Option<Content> {
        let (name, kept) = self.kept.get(&literal.gfn).copied()?;
        if always {
            return Some(content);
        }
        (literal.base == Some(name)).then(|| if self.rng.chance(self.wrong) { content } else { kept })
    }
}

/// Plain pages, and deltas with what they gave.
type DecodedPages = (Vec<(Gfn, Content)>, Vec<(Gfn, Option<Content>)>);

impl World {
    pub(crate) fn read_to_send(&mut self, channel: Channel, pages: &[Literal], rest: Span) {
        let (names, unchecked) = (self.names(), self.mutated(Mutation::LiteralsUnchecked));
        let always = self.mutated(Mutation::DeltasAgain);
        let cut = self.source.is_cut() || !self.destination.alive();
        let Some(guest) = &self.source.guest else { return };
        let versions = &mut self.source.versions;
        let (mut deltas, mut plain) = (Vec::new(), Vec::new());
        let mut stale: Vec<(Gfn, ShortId)> = Vec::new();
        for literal in pages {
            let (gfn, content) = (literal.gfn, guest.read(literal.gfn));
            let page = names.page(content);
            if page.name() != literal.name && !unchecked {
                stale.push((gfn, literal.name.short()));
                continue;
            }
            if channel == Channel::Literals && !cut {
                self.check.sent(gfn, content, &self.destination.memory.image);
            }
            match versions.base(literal, content, always) {
                Some(base) => {
                    deltas.push(Delta { gfn, page: page.bytes(), base: names.page(base).bytes() });
                }
                None => plain.push((gfn, page.bytes())),
            }
            versions.sent.insert(gfn, content);
            if literal.keep && versions.awaited.get(&gfn) == Some(&literal.name) {
                versions.awaited.remove(&gfn);
                versions.kept.insert(gfn, (page.name(), content));
            }
        }
        let (kept, most) = (self.source.versions.kept.len(), self.source.versions.most);
        self.check.require(kept <= most, || format!("{kept} versions are kept, and {most} may be"));
        if self.mutated(Mutation::DropStale) {
            stale.clear();
        }
        let count = deltas.len() + plain.len();
        let batch = (count > 0).then(|| literal::encode_with(1, &deltas, &plain).batch);
        let bytes = batch.as_ref().map_or(0, |batch| batch.len() as u64);
        let delta_pages = deltas.len() as u64;
        let sent = LiteralsSent { pages: count as u64, bytes, delta_pages, delta_bytes: 0, stale };
        self.source_job_after(rest, SourceJob::LiteralsReady { channel, batch, sent });
    }

    /// Decodes a batch against what stands in memory now: plain pages, and deltas with what they gave, if that is any page.
    pub(crate) fn decode(&mut self, batch: &[u8]) -> DecodedPages {
        let names = self.destination_names();
        let memory = &self.destination.memory;
        let decoded = literal::decode_with(batch, |gfn, page| {
            if !memory.absent.contains(&gfn) {
                *page = *names.page(memory.read(gfn)).bytes();
            }
        });
        match decoded {
            Ok(decoded) => {
                let plain = decoded.plain.iter().map(|(gfn, page)| (*gfn, names.recognise(page)));
                let delta = |page: &page::Page| names.try_recognise(page);
                let deltas = decoded.deltas.iter().map(|(gfn, page)| (*gfn, page.as_deref().and_then(delta)));
                (plain.collect(), deltas.collect())
            }
            Err(error) => {
                self.check.fail(format!("a batch of literals cannot be decoded: {error}"));
                (Vec::new(), Vec::new())
            }
        }
    }

    /// What a delta gave, hashed, goes to the protocol.
    pub(crate) fn delta_came(&mut self, gfn: Gfn, content: Option<Content>) {
        let (now, names) = (self.now, self.destination_names());
        let truth = self.source.versions.sent.get(&gfn).copied();
        if content != truth && self.mutated(Mutation::IgnoresDeltaMisses) {
            return;
        }
        let claimed = if self.mutated(Mutation::DeltasUnchecked) { truth } else { content };
        let Some(machine) = &mut self.destination.machine else { return };
        let frames = machine.delta(now, gfn, claimed.map(|claimed| names.page(claimed)));
        self.install(&frames, content.unwrap_or(0));
        self.drain_destination();
    }
}
