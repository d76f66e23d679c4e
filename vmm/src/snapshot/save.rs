//! Taking a snapshot.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use page::{Domain, Gfn, PageHash, PageSet};
use sha2::{Digest as _, Sha256};

use super::manifest::{Manifest, PackRef, Run};
use super::naming::{self, Batch};
use super::store::{self, Spot, Store};
use super::{SnapshotError, SnapshotReport};
use crate::file_size;
use crate::limits::{SNAPSHOT_ROUNDS_MAX, SNAPSHOT_STILL_PAGES};
use crate::machine::{DirtyLog, Machine, RunState};

/// Saves `machine` into the directory `to`, as `name` or else as the next number. A VM that runs goes on running but for a short pause; one
/// that stands still goes on standing still. Nothing else may pause, resume or migrate it meanwhile.
///
/// # Errors
/// Why there is no such snapshot. Earlier ones are as they were, and the VM runs on if it ran.
pub fn save(machine: &Machine, to: &Path, name: Option<&str>) -> Result<SnapshotReport, SnapshotError> {
    if !to.is_absolute() {
        return Err(SnapshotError::Relative(to.to_owned()));
    }
    let started = Instant::now();
    file_size::limit_is_an_error().map_err(SnapshotError::Signal)?;
    let mut store = Store::open(to)?;
    let name = store.free_name(name)?;
    let (mut image, mut pause) = (Image::new(machine), Duration::ZERO);
    let state = if *machine.watch().borrow() == RunState::Running {
        let log = DirtyLog::start(machine)?;
        let left = image.follow(machine, &mut store)?;
        let paused = Instant::now();
        let state = image.finish_still(machine, &mut store, left);
        pause = paused.elapsed();
        drop(log);
        state?
    } else {
        let state = machine.save_state()?;
        // After the state: KVM may write guest memory while its state is read.
        let all = image.all.clone();
        image.take(machine, &mut store, &all)?;
        state
    };
    store.commit_packs()?;
    let shares = image.shares(&store);
    image.commit(machine, &mut store, to, &name, &state)?;
    let report = SnapshotReport {
        to: to.display().to_string(),
        name,
        pages_total: image.all.len(),
        pages_zero: shares.zero,
        pages_present: shares.present,
        pages_written: shares.written,
        bytes_written: store.written_bytes(),
        rounds: image.rounds,
        pause_ms: pause.as_secs_f64() * 1000.0,
        total_ms: started.elapsed().as_secs_f64() * 1000.0,
    };
    tracing::info!(?report, "a snapshot was written");
    Ok(report)
}

/// Where each page lies, so far.
struct Image {
    domain: Domain,
    all: PageSet,
    /// By frame; none where it is zero, or is no RAM.
    places: Vec<Option<(PageHash, Spot)>>,
    rounds: u32,
}

/// How many pages came from where.
#[derive(Clone, Copy, Debug, Default)]
struct Shares {
    zero: u64,
    present: u64,
    written: u64,
}

impl Image {
    fn new(machine: &Machine) -> Self {
        let memory = machine.memory();
        let mut all = PageSet::empty(memory.bound());
        for extent in memory.extents() {
            (extent.first_gfn..extent.first_gfn + extent.pages).for_each(|gfn| {
                all.insert(Gfn(gfn));
            });
        }
        let frames = usize::try_from(memory.bound()).expect("RAM fits the address space");
        Self { domain: Domain::unkeyed(), all, places: vec![None; frames], rounds: 0 }
    }

    /// Stores what `pages` hold now.
    fn take(&mut self, machine: &Machine, store: &mut Store, pages: &PageSet) -> Result<(), SnapshotError> {
        self.rounds += 1;
        let frames: Vec<Gfn> = pages.iter().collect();
        let places = &mut self.places;
        naming::name(machine.memory(), &self.domain, &frames, |batch| keep(places, store, &batch))
    }

    /// Stores what the running VM has, and then what it wrote meanwhile, until that is little or grows no less. Gives what is left.
    fn follow(&mut self, machine: &Machine, store: &mut Store) -> Result<PageSet, SnapshotError> {
        let mut pages = self.all.clone();
        loop {
            let before = pages.len();
            self.take(machine, store, &pages)?;
            pages = machine.take_dirty()?;
            let shrinks = pages.len() < before / 2;
            if pages.len() <= SNAPSHOT_STILL_PAGES || !shrinks || self.rounds >= SNAPSHOT_ROUNDS_MAX {
                return Ok(pages);
            }
        }
    }

    /// Pauses the VM for its state and what is left, and lets it run on whatever comes of that.
    fn finish_still(
        &mut self,
        machine: &Machine,
        store: &mut Store,
        mut left: PageSet,
    ) -> Result<Vec<u8>, SnapshotError> {
        machine.pause()?;
        let mut rest = || {
            let state = machine.save_state()?;
            // After the state: KVM may write guest memory while its state is read.
            left.union_with(&machine.take_dirty()?);
            self.take(machine, store, &left)?;
            Ok(state)
        };
        let state = rest();
        machine.resume()?;
        state
    }

    fn shares(&self, store: &Store) -> Shares {
        let mut shares = Shares { zero: self.all.len(), ..Shares::default() };
        let mut seen = HashSet::new();
        for (_, spot) in self.places.iter().flatten() {
            shares.zero -= 1;
            if store.is_old(spot.pack) || !seen.insert(*spot) {
                shares.present += 1;
            } else {
                shares.written += 1;
            }
        }
        shares
    }

    /// Puts the snapshot's directory together, makes it durable, and gives it its name.
    fn commit(
        &self,
        machine: &Machine,
        store: &mut Store,
        to: &Path,
        name: &str,
        state: &[u8],
    ) -> Result<(), SnapshotError> {
        let tmp = store.tmp(name);
        store::make_directory(&tmp)?;
        let description = serde_json::to_vec_pretty(&machine.description())
            .map_err(|source| SnapshotError::Description { path: tmp.join("machine.json"), source })?;
        let manifest = self.manifest(store, &description, state).encode();
        for (file, bytes) in [("machine.json", &description[..]), ("state", state), ("manifest", &manifest)] {
            store.write(&tmp.join(file), bytes)?;
        }
        store::sync_directory(&tmp)?;
        let whole = store::snapshots(to).join(name);
        match fs::rename(&tmp, &whole) {
            Ok(()) => store::sync_directory(&store::snapshots(to)),
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                Err(SnapshotError::NameTaken { dir: to.to_owned(), name: name.to_owned() })
            }
            Err(error) => Err(SnapshotError::io("give its name to", &whole)(error)),
        }
    }

    fn manifest(&self, store: &Store, description: &[u8], state: &[u8]) -> Manifest {
        // Only packs that the snapshot needs are named in it.
        let mut used = vec![None; store.packs().len()];
        let (mut packs, mut runs) = (Vec::new(), Vec::<Run>::new());
        for (gfn, place) in (0..).map(Gfn).zip(&self.places) {
            let Some((name, Spot { pack, page })) = *place else { continue };
            let pack = *used[pack as usize].get_or_insert_with(|| {
                let pack = &store.packs()[pack as usize];
                packs.push(PackRef { id: pack.id, pages: pack.pages });
                u32::try_from(packs.len() - 1).expect("packs are bounded")
            });
            match runs.last_mut().filter(|run| run.pack == pack && continues(run, gfn, page)) {
                Some(run) => run.names.push(name),
                None => runs.push(Run { first: gfn, pack, page, names: vec![name] }),
            }
        }
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Manifest {
            domain: self.domain.id(),
            created_unix_ms: u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX),
            machine: Sha256::digest(description).into(),
            state: Sha256::digest(state).into(),
            packs,
            runs,
        }
    }
}

fn continues(run: &Run, gfn: Gfn, page: u32) -> bool {
    let length = run.names.len() as u64;
    gfn.0 == run.first.0 + length && u64::from(page) == u64::from(run.page) + length
}

fn keep(
    places: &mut [Option<(PageHash, Spot)>],
    store: &mut Store,
    batch: &Batch,
) -> Result<(), SnapshotError> {
    for (gfn, page) in batch.pages() {
        let place = &mut places[usize::try_from(gfn.0).expect("a frame of this memory")];
        match page {
            None => *place = None,
            Some((name, _)) if place.as_ref().is_some_and(|(known, _)| *known == name) => {}
            Some((name, bytes)) => *place = Some((name, store.place(&name, bytes)?)),
        }
    }
    Ok(())
}
