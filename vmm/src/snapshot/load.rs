//! Making a VM of a snapshot.

use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use page::{Domain, Gfn, PAGE_SIZE, Page};
use sha2::{Digest as _, Sha256};

use super::manifest::{Manifest, ManifestError, Run};
use super::naming::on_all_cores;
use super::{SnapshotError, is_name, store};
use crate::config::{DeviceOptions, Serial};
use crate::limits::{MANIFEST_MAX_BYTES, SNAPSHOT_BATCH_PAGES, SNAPSHOT_DESCRIPTION_BYTES, STATE_MAX_BYTES};
use crate::machine::{Machine, MachineDescription};
use crate::memory::Memory;

/// A snapshot that has been read and whose parts belong together; its pages have not been read yet.
#[derive(Debug)]
pub struct Snapshot {
    path: PathBuf,
    manifest: Manifest,
    description: MachineDescription,
    state: Vec<u8>,
    packs: Vec<PathBuf>,
}

/// Some pages of a run.
#[derive(Clone, Copy, Debug)]
struct Part<'a> {
    run: &'a Run,
    from: usize,
    pages: usize,
}

impl Snapshot {
    /// Reads the snapshot `name` of the directory `from`, or its newest.
    ///
    /// # Errors
    /// If there is none, or a part of it is damaged or missing.
    pub fn open(from: &Path, name: Option<&str>) -> Result<Self, SnapshotError> {
        let path = find(from, name)?;
        let manifest = read_manifest(&path)?;
        if manifest.domain != Domain::unkeyed().id() {
            let source = ManifestError::Domain(manifest.domain);
            return Err(SnapshotError::Manifest { path: path.join("manifest"), source });
        }
        let description =
            read_part(&path.join("machine.json"), SNAPSHOT_DESCRIPTION_BYTES, &manifest.machine)?;
        let state = read_part(&path.join("state"), STATE_MAX_BYTES as u64, &manifest.state)?;
        let description = serde_json::from_slice(&description)
            .map_err(|source| SnapshotError::Description { path: path.join("machine.json"), source })?;
        let packs = manifest.packs.iter().map(|pack| store::pages_file(from, pack.id)).collect();
        Ok(Self { path, manifest, description, state, packs })
    }

    /// What must be built for it.
    #[must_use]
    pub fn description(&self) -> &MachineDescription {
        &self.description
    }

    /// Builds the machine, its devices opened by what `devices` says and not by what the snapshot says, fills its memory and loads its
    /// state: paused, and under a new identity.
    ///
    /// # Errors
    /// What is missing or damaged; the machine is gone then, and has not run.
    pub fn restore(&self, serial: &Serial, devices: &DeviceOptions) -> Result<Arc<Machine>, SnapshotError> {
        let machine = Machine::prepare(&self.description, serial, devices)?;
        self.fill(machine.memory())?;
        machine.load_state(&self.state)?;
        Ok(machine)
    }

    /// Puts every page into its frame, verified. Memory must be zero before.
    fn fill(&self, memory: &Memory) -> Result<(), SnapshotError> {
        let parts = self.parts(memory)?;
        let domain = Domain::unkeyed();
        on_all_cores(parts.len(), |at| self.install(memory, &domain, parts[at]), Ok)
    }

    /// The work in pieces that fit a worker's buffer.
    fn parts(&self, memory: &Memory) -> Result<Vec<Part<'_>>, SnapshotError> {
        let mut parts = Vec::new();
        for run in &self.manifest.runs {
            let end = run.first.0 + run.names.len() as u64;
            let inside =
                |e: &crate::memory::Extent| e.first_gfn <= run.first.0 && end <= e.first_gfn + e.pages;
            if !memory.extents().iter().any(inside) {
                return Err(SnapshotError::Frame { path: self.path.join("manifest"), gfn: run.first });
            }
            parts.extend((0..run.names.len()).step_by(SNAPSHOT_BATCH_PAGES).map(|from| Part {
                run,
                from,
                pages: SNAPSHOT_BATCH_PAGES.min(run.names.len() - from),
            }));
        }
        Ok(parts)
    }

    /// Reads, hashes and compares some pages, and only then writes them into the guest.
    fn install(&self, memory: &Memory, domain: &Domain, part: Part<'_>) -> Result<(), SnapshotError> {
        let Part { run, from, pages } = part;
        // Opened for each part: there may be more packs than descriptors.
        let path = &self.packs[run.pack as usize];
        let file = File::open(path).map_err(SnapshotError::io("open", path))?;
        let first = u64::from(run.page) + from as u64;
        let mut bytes = vec![0; pages * PAGE_SIZE];
        file.read_exact_at(&mut bytes, first * PAGE_SIZE as u64).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => {
                let gfn = Gfn(run.first.0 + from as u64);
                SnapshotError::Truncated { pack: path.clone(), page: first, gfn }
            }
            _ => SnapshotError::io("read", path)(error),
        })?;
        let names = &run.names[from..from + pages];
        for ((bytes, name), at) in page::page_chunks(&bytes).zip(names).zip(0..) {
            let bytes: &Page = bytes;
            let gfn = Gfn(run.first.0 + from as u64 + at);
            if domain.name(bytes) != *name {
                return Err(SnapshotError::Page { pack: path.clone(), page: first + at, gfn });
            }
            memory.write_page(gfn, bytes);
        }
        Ok(())
    }
}

/// The directory of a snapshot.
fn find(from: &Path, name: Option<&str>) -> Result<PathBuf, SnapshotError> {
    let there = store::list(from)?;
    let path = |name: &str| store::snapshots(from).join(name);
    let Some(name) = name else {
        let mut newest = None;
        for path in there.iter().map(|name| path(name)) {
            let created = read_manifest(&path)?.created_unix_ms;
            if newest.as_ref().is_none_or(|(latest, _)| created >= *latest) {
                newest = Some((created, path));
            }
        }
        return newest.map(|(_, path)| path).ok_or_else(|| SnapshotError::Empty(from.to_owned()));
    };
    if !is_name(name) {
        return Err(SnapshotError::Name(name.to_owned()));
    }
    if there.iter().any(|known| known == name) {
        return Ok(path(name));
    }
    let there =
        if there.is_empty() { "it has none".to_owned() } else { format!("it has {}", there.join(", ")) };
    Err(SnapshotError::NotFound { dir: from.to_owned(), name: name.to_owned(), there })
}

fn read_manifest(path: &Path) -> Result<Manifest, SnapshotError> {
    let path = path.join("manifest");
    let bytes = read_bounded(&path, MANIFEST_MAX_BYTES)?;
    Manifest::decode(&bytes).map_err(|source| SnapshotError::Manifest { path, source })
}

/// A file whose digest the manifest names.
fn read_part(path: &Path, most: u64, digest: &[u8; 32]) -> Result<Vec<u8>, SnapshotError> {
    let bytes = read_bounded(path, most)?;
    if Sha256::digest(&bytes).as_slice() != digest {
        return Err(SnapshotError::Digest(path.to_owned()));
    }
    Ok(bytes)
}

/// A file of at most `most` bytes; what a longer one has beyond is not read, and its digest will tell.
fn read_bounded(path: &Path, most: u64) -> Result<Vec<u8>, SnapshotError> {
    let file = File::open(path).map_err(SnapshotError::io("open", path))?;
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes).map_err(SnapshotError::io("read", path))?;
    Ok(bytes)
}
