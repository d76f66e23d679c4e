//! Snapshots: a VM's memory and state in a directory, and a VM made of them.
//!
//! Goals: a second snapshot of the same VM, or of a sibling, costs only what no earlier one has; a snapshot is either whole or not
//! there, whatever happens while it is written; nothing runs on a byte that was not verified; a peer of the site serves a
//! snapshot's pages without knowing about snapshots. Non-goals: compression (the pages must lie as they are), snapshots of disks (they
//! stay where they are; a restored VM opens them again), and deleting.
//!
//! ```text
//!  DIR/
//!    lock                          held (flock) by whoever writes; readers need no lock, since nothing that is whole ever changes
//!    packs/<id>.pages              4 KiB pages as they are, each at a multiple of 4 KiB: `dht add` serves the file as it is
//!    packs/<id>.names              their names, in the same order; what makes the pages known to the next snapshot
//!    snapshots/<name>/manifest     where each page lies, and its name
//!    snapshots/<name>/state        vCPUs, interrupt controllers, clock, devices (crate::kvm::state_bytes)
//!    snapshots/<name>/machine.json what must be built before the state can be loaded (MachineDescription)
//!    tmp/                          what is being written; whatever a crash left is removed by the next snapshot
//! ```
//! A page's way out: guest memory → `naming` (read, zero or not, name, on all cores) → `store` (found in a pack and compared, or
//! appended to a new one) → `manifest`. While a VM runs, its memory is walked with the dirty log on, then what was written
//! meanwhile, until little is left; only that and the state are taken while it stands still. Files are written in `tmp/`, synced, and
//! renamed; the snapshot's directory comes last, so that it never names what is not there.
//!
//! A page's way in (`load`): manifest (checked whole) → pack → read, hash, compare → guest memory. Zero pages are not stored.
//!
//! Names are those of the domain without a secret ([`page::Domain::unkeyed`]), whatever domain the site has: a snapshot must be verifiable
//! years later and elsewhere, by whoever holds the directory, and that is whoever can read the pages anyway. A peer names the packs in its own
//! domain when it scans them.
//!
//! A restored VM is a copy: it gets a new identity ([`migration_proto::VmId`]) and epoch 0, for the original may run on, and two VMs of one
//! identity would fence each other off. Guest time goes on from the moment of the snapshot.

pub mod error;
pub mod load;
pub mod manifest;
mod naming;
pub mod save;
mod store;

use serde::{Deserialize, Serialize};

pub use error::SnapshotError;
pub use load::Snapshot;
pub use manifest::check_manifest;
pub use save::save;

use crate::limits::SNAPSHOT_NAME_BYTES;

/// What a snapshot came to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotReport {
    /// The directory.
    pub to: String,
    /// Its name there.
    pub name: String,
    /// The VM's pages: the sum of the next three.
    pub pages_total: u64,
    /// Those that are zero; they are not stored.
    pub pages_zero: u64,
    /// Those whose content a pack had already, or another page of this snapshot has.
    pub pages_present: u64,
    /// Those whose content was written by this snapshot.
    pub pages_written: u64,
    /// Everything written: pages (those that the guest changed meanwhile included), names, manifest and state.
    pub bytes_written: u64,
    /// Walks over memory; the first is over all of it, the last over what was written since the one before.
    pub rounds: u32,
    /// How long the VM stood still for it, milliseconds; 0 for one that was paused.
    pub pause_ms: f64,
    /// From beginning to end, milliseconds.
    pub total_ms: f64,
}

/// Whether `name` can be a snapshot's: it is a directory's as well.
#[must_use]
pub fn is_name(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    (1..=SNAPSHOT_NAME_BYTES).contains(&name.len()) && !name.starts_with('.') && name.bytes().all(fits)
}
