//! Linux, booted once and restored from then on: a boot takes half a minute where KVM emulates its supervisor code, a restore a second.
//!
//! [`Booted::of`] boots a guest, waits until every workload has done a round, has `vmm snapshot` save it, and keeps that in the target
//! directory, `tmp/linux/<guest>`, for the tests that come after it, in this process and in others: each begins with `vmm restore` in a
//! process of its own. The snapshot is good for as long as nothing changes that went into it ([`key`]: the monitor's own bytes, the kernel, the
//! initramfs, the options, this host's CPU and kernel); else it is made anew. There is one a guest, so nothing piles up.
//!
//! Whoever uses a snapshot holds its lock shared, whoever makes it holds it alone: processes wait for each other and never see half of one.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::lab::{finish, run};
use super::{Host, Lab, LinuxGuest, LinuxVm, Net, Verdict, binaries, limits, until};

/// The name of the snapshot.
const NAME: &str = "ready";

/// A booted guest's snapshot. As long as this lives nobody replaces it.
#[derive(Debug)]
pub struct Booted {
    folder: PathBuf,
    record: Record,
    here: bool,
    _lock: File,
}

/// What is written last, beside a snapshot that is whole.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    key: String,
    ready: String,
    verdict: Verdict,
}

impl Booted {
    /// The snapshot of `guest`, which is booted now, on `host`, unless there is one already.
    pub async fn of(lab: &Lab, host: &Host, guest: &LinuxGuest, net: Option<&Net>) -> Self {
        let key = key(guest, net).await;
        let target = binaries::folder().parent().expect("binaries stand in a target directory").to_owned();
        let folder = target.join("tmp/linux").join(name_of(guest, net));
        fs::create_dir_all(&folder).expect("the target directory takes a folder");
        let mut here = false;
        loop {
            let shared = lock(&folder, File::lock_shared).await;
            if let Some(record) = find(&folder, &key) {
                return Self { folder, record, here, _lock: shared };
            }
            drop(shared);
            let _alone = lock(&folder, File::lock).await;
            if find(&folder, &key).is_none() {
                make(lab, host, guest, net, &folder, &key).await;
                here = true;
            }
        }
    }

    /// The directory that `vmm snapshot` wrote, to be read only: other tests begin with it.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        self.folder.join("snapshot")
    }

    /// A copy of that directory, in `lab`, for a test that changes it.
    pub async fn copy(&self, lab: &Lab) -> PathBuf {
        let to = lab.fresh("snapshots");
        copy(&self.dir(), &to).await;
        to
    }

    /// Whether this test booted it, rather than one before.
    #[must_use]
    pub fn here(&self) -> bool {
        self.here
    }

    /// What the guest said when it was up.
    #[must_use]
    pub fn ready(&self) -> &str {
        &self.record.ready
    }

    /// The guest's own verdict from before it was saved.
    #[must_use]
    pub fn verdict(&self) -> &Verdict {
        &self.record.verdict
    }

    /// `vmm restore` on `host`: the guest goes on.
    pub async fn restore(&self, lab: &Lab, host: &Host, name: &str, net: Option<&Net>) -> LinuxVm {
        LinuxVm::restore(lab, host, name, &self.dir(), NAME, net).await
    }
}

/// Copies a directory as an operator would: `cp -r`.
pub async fn copy(from: &Path, to: &Path) {
    let words: [OsString; 3] = ["-r".into(), from.into(), to.into()];
    let said = finish(tokio::process::Command::new("cp").args(words)).await;
    assert!(said.ok, "cp: {}", said.stderr);
}

/// What a guest's folder is called.
fn name_of(guest: &LinuxGuest, net: Option<&Net>) -> String {
    let LinuxGuest { cpus, memory_mib, workload } = guest;
    let net = if net.is_some() { "-net" } else { "" };
    format!("{cpus}cpu-{memory_mib}M-{}{net}", workload.replace(',', "-"))
}

/// A digest of everything that a snapshot of `guest` depends on.
async fn key(guest: &LinuxGuest, net: Option<&Net>) -> String {
    let args = guest.args(net);
    let cpu = run("vmm", &["cpu-baseline".into()]).await;
    assert!(cpu.ok, "vmm cpu-baseline: {}", cpu.stderr);
    let digest = tokio::task::spawn_blocking(move || {
        let mut digest = Sha256::new();
        let mut take = |bytes: &[u8]| {
            digest.update((bytes.len() as u64).to_le_bytes());
            digest.update(bytes);
        };
        take(cpu.stdout.as_bytes());
        let files = [binaries::path("vmm"), PathBuf::from("/proc/version")];
        let named = args.iter().map(PathBuf::from).filter(|path| path.is_absolute());
        for path in files.into_iter().chain(named) {
            take(&fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())));
        }
        args.iter().for_each(|word| take(word.as_encoded_bytes()));
        digest.finalize()
    });
    let digest = digest.await.expect("hashing does not panic");
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The folder's lock, once it can be had.
async fn lock(folder: &Path, how: fn(&File) -> io::Result<()>) -> File {
    let path = folder.join("lock");
    let locked = tokio::task::spawn_blocking(move || {
        let file = File::create(&path)?;
        how(&file).map(|()| file)
    });
    locked.await.expect("locking does not panic").expect("the target directory has locks")
}

fn find(folder: &Path, key: &str) -> Option<Record> {
    let record = fs::read(folder.join("record.json")).ok()?;
    // One that was cut off is none.
    let record: Record = serde_json::from_slice(&record).ok()?;
    (record.key == key).then_some(record)
}

/// Boots the guest and saves it in the folder, in place of what is there.
async fn make(lab: &Lab, host: &Host, guest: &LinuxGuest, net: Option<&Net>, folder: &Path, key: &str) {
    for old in ["record.json", "snapshot"].map(|old| folder.join(old)) {
        let removed = if old.is_dir() { fs::remove_dir_all(&old) } else { fs::remove_file(&old) };
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => panic!("{}: {error}", old.display()),
            Ok(()) | Err(_) => {}
        }
    }
    let (mut vm, ready) = LinuxVm::launch(lab, host, "boot", guest, net).await;
    let verdict = until("every workload does its rounds", limits::LINUX_CHECK, async || {
        let verdict = vm.check().await;
        let works = |name: &str| verdict.workloads.get(name).is_some_and(|workload| workload.rounds > 0);
        guest.workload.split(',').all(works).then_some(verdict)
    })
    .await;
    let said = vm.vm.snapshot(&folder.join("snapshot"), Some(NAME)).await;
    assert!(said.ok, "vmm snapshot: {said:#?}");
    vm.vm.client().operate("stop").await.expect("a running VM can be stopped");
    vm.vm.assert_ends_well().await;
    let record = Record { key: key.to_owned(), ready, verdict };
    let record = serde_json::to_vec_pretty(&record).expect("a record is plain data");
    fs::write(folder.join("record.json"), record).expect("the target directory takes a file");
}
