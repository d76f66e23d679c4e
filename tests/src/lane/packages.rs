//! Debian's packages, by name, version and checksum (guest-images/lane/packages), fetched once and kept in a cache directory.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

/// One a line.
const PINS: &str = include_str!("../../../guest-images/lane/packages");

/// Why a package cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PackageError {
    /// No place for a cache.
    #[error("neither XDG_CACHE_HOME nor HOME is set: say where packages may be kept")]
    NoCache,
    /// A file of the cache.
    #[error("{} in the cache of packages", path.display())]
    Cache {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A tool of Debian's is missing or failed.
    #[error("`{command}` failed: {said}")]
    Tool {
        /// What was run.
        command: String,
        /// What it said.
        said: String,
    },
    /// Not the package that was pinned.
    #[error("{} has the SHA-256 {found}, and guest-images/lane/packages wants {wanted}: it was removed, run again", path.display())]
    Checksum {
        /// The file.
        path: PathBuf,
        /// What it has.
        found: String,
        /// What it ought to have.
        wanted: &'static str,
    },
    /// The package has no such file.
    #[error("the package in {} has no {what}", folder.display())]
    Missing {
        /// Where it was unpacked.
        folder: PathBuf,
        /// What was looked for.
        what: String,
    },
}

/// A line of the list.
#[derive(Clone, Copy, Debug)]
struct Pin {
    name: &'static str,
    version: &'static str,
    sha256: &'static str,
}

/// A Debian kernel, unpacked.
#[derive(Debug)]
pub(super) struct Kernel {
    /// As Debian ships it.
    pub(super) bzimage: PathBuf,
    folder: PathBuf,
}

/// All packages, unpacked.
#[derive(Debug)]
pub(super) struct Unpacked {
    pub(super) cloud: Kernel,
    pub(super) generic: Kernel,
    pub(super) busybox: PathBuf,
}

/// Fetches and unpacks what is not there yet.
/// # Errors
/// If a package cannot be fetched, or is not the one that was pinned.
pub(super) fn unpacked() -> Result<Unpacked, PackageError> {
    let cache = cache()?;
    let mut folders = Vec::new();
    for pin in pins() {
        folders.push((pin.name, unpack(&cache, pin)?));
    }
    let folder = |wanted: &dyn Fn(&str) -> bool| {
        let found = folders.iter().find(|(name, _)| wanted(name)).map(|(_, folder)| folder.clone());
        found.expect("the list names both kernels and busybox; a test holds it to that")
    };
    let is_kernel = |name: &str| name.starts_with("linux-image-");
    Ok(Unpacked {
        cloud: Kernel::of(folder(&|name| is_kernel(name) && name.contains("-cloud-")))?,
        generic: Kernel::of(folder(&|name| is_kernel(name) && !name.contains("-cloud-")))?,
        busybox: folder(&|name| name == "busybox-static").join("bin/busybox"),
    })
}

impl Kernel {
    fn of(folder: PathBuf) -> Result<Self, PackageError> {
        let bzimage = find(&folder.join("boot"), &|name| name.starts_with("vmlinuz-"))?;
        let what = "kernel".to_owned();
        bzimage
            .map(|bzimage| Self { bzimage, folder: folder.clone() })
            .ok_or(PackageError::Missing { folder, what })
    }

    /// The file of the module `name`.
    pub(super) fn module(&self, name: &str) -> Result<PathBuf, PackageError> {
        let file = format!("{name}.ko");
        let found = find(&self.folder.join("lib/modules"), &|name| name == file)?;
        found.ok_or_else(|| PackageError::Missing { folder: self.folder.clone(), what: file })
    }
}

fn pins() -> impl Iterator<Item = Pin> {
    PINS.lines().filter(|line| !line.starts_with('#')).filter_map(|line| {
        let mut words = line.split_whitespace();
        Some(Pin { name: words.next()?, version: words.next()?, sha256: words.next()? })
    })
}

fn cache() -> Result<PathBuf, PackageError> {
    let base = env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(Path::new(&env::var_os("HOME")?).join(".cache")))
        .ok_or(PackageError::NoCache)?;
    let cache = base.join("tern/debian");
    fs::create_dir_all(&cache).map_err(|source| PackageError::Cache { path: cache.clone(), source })?;
    Ok(cache)
}

/// The folder of `pin`'s files. It appears whole or not at all.
fn unpack(cache: &Path, pin: Pin) -> Result<PathBuf, PackageError> {
    let folder = cache.join(pin.sha256);
    if folder.is_dir() {
        return Ok(folder);
    }
    let failed = |path: &Path, source| PackageError::Cache { path: path.to_owned(), source };
    let work = tempfile::tempdir_in(cache).map_err(|source| failed(cache, source))?;
    let package = fetch(work.path(), pin)?;
    let files = work.path().join("files");
    debian("dpkg-deb", &["-x".as_ref(), package.as_os_str(), files.as_os_str()], work.path())?;
    match fs::rename(&files, &folder) {
        // Another run was faster: its files are the same.
        Err(_) if folder.is_dir() => Ok(folder),
        renamed => renamed.map(|()| folder.clone()).map_err(|source| failed(&folder, source)),
    }
}

/// Has apt fetch `pin`'s file into `folder` and checks it.
fn fetch(folder: &Path, pin: Pin) -> Result<PathBuf, PackageError> {
    let wanted = format!("{}={}", pin.name, pin.version);
    let download: [&OsStr; 2] = ["download".as_ref(), wanted.as_ref()];
    if debian("apt-get", &download, folder).is_err() {
        // A machine that never asked knows no packages.
        debian("apt-get", &["update".as_ref()], folder)?;
        debian("apt-get", &download, folder)?;
    }
    let missing = || PackageError::Missing { folder: folder.to_owned(), what: format!("file of {wanted}") };
    let path = find(folder, &|name| name.ends_with(".deb"))?.ok_or_else(missing)?;
    let bytes = fs::read(&path).map_err(|source| PackageError::Cache { path: path.clone(), source })?;
    let found: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    if found != pin.sha256 {
        return Err(PackageError::Checksum { path, found, wanted: pin.sha256 });
    }
    Ok(path)
}

fn debian(tool: &str, args: &[&OsStr], folder: &Path) -> Result<(), PackageError> {
    let mut command = Command::new(tool);
    command.args(args).current_dir(folder);
    let failed = |said: String| PackageError::Tool { command: format!("{tool} {}", args[0].display()), said };
    let output = command.output().map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

/// The first file below `folder` whose name is as `wanted`.
fn find(folder: &Path, wanted: &dyn Fn(&str) -> bool) -> Result<Option<PathBuf>, PackageError> {
    let failed = |source| PackageError::Cache { path: folder.to_owned(), source };
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let kind = entry.file_type().map_err(failed)?;
        if kind.is_file() && wanted(&entry.file_name().to_string_lossy()) {
            return Ok(Some(entry.path()));
        }
        if kind.is_dir()
            && let Some(found) = find(&entry.path(), wanted)?
        {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_names_what_the_lane_takes() {
        let names: Vec<&str> = pins().map(|pin| pin.name).collect();
        for wanted in ["linux-image-", "-cloud-", "busybox-static"] {
            assert!(names.iter().any(|name| name.contains(wanted)), "{names:?}");
        }
        assert!(pins().all(|pin| pin.sha256.len() == 64 && pin.version.contains('.')));
    }
}
