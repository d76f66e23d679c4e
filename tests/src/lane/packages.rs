//! Debian's packages: fetched by guest-images/linux/build, which checks them against a list of checksums, and unpacked once.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The stock kernels' list: version and checksum of each.
const KERNELS: &str = include_str!("../../../guest-images/lane/inputs.lock");
const GUEST_IMAGES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../guest-images");

/// Why a package cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PackageError {
    /// A file or directory of the cache.
    #[error("{} in the cache of packages", path.display())]
    Cache {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A tool is missing or failed.
    #[error("`{command}` failed: {said}")]
    Tool {
        /// What was run.
        command: String,
        /// What it said.
        said: String,
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

/// A Debian kernel, unpacked.
#[derive(Debug)]
pub(super) struct Kernel {
    /// As Debian ships it.
    pub(super) bzimage: PathBuf,
    folder: PathBuf,
    /// Every module's file, by the name that modules know each other by.
    modules: BTreeMap<String, PathBuf>,
    /// What is no module but part of the kernel.
    builtin: BTreeSet<String>,
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
    let (cloud, generic) = kernels();
    let kernel =
        |name| Kernel::of(unpack(&fetch(&["--lock", &guest_images("lane/inputs.lock"), "--fetch", name])?)?);
    let busybox = unpack(&fetch(&["--fetch", "busybox-static"])?)?;
    Ok(Unpacked { cloud: kernel(cloud)?, generic: kernel(generic)?, busybox: busybox.join("bin/busybox") })
}

/// The names of the cloud kernel's package and of the generic one's.
fn kernels() -> (&'static str, &'static str) {
    let names =
        || KERNELS.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split(' ').next());
    let one = |cloud| {
        names().find(|name| name.contains("-cloud-") == cloud).expect("a test holds the list to both")
    };
    (one(true), one(false))
}

fn guest_images(file: &str) -> String {
    format!("{GUEST_IMAGES}/{file}")
}

fn fetch(args: &[&str]) -> Result<PathBuf, PackageError> {
    let recipe = guest_images("linux/build");
    let args: Vec<&OsStr> = args.iter().map(OsStr::new).collect();
    run(Path::new(&recipe), &args).map(|path| PathBuf::from(path.trim()))
}

/// The folder of the files in `package`, beside it. It appears whole or not at all.
fn unpack(package: &Path) -> Result<PathBuf, PackageError> {
    let folder = package.with_extension("files");
    if folder.is_dir() {
        return Ok(folder);
    }
    let failed = |source| PackageError::Cache { path: folder.clone(), source };
    let work = tempfile::tempdir_in(package.parent().unwrap_or(Path::new("."))).map_err(failed)?;
    let files = work.path().join("files");
    run(Path::new("dpkg-deb"), &["-x".as_ref(), package.as_os_str(), files.as_os_str()])?;
    match fs::rename(&files, &folder) {
        // Another run was faster: its files are the same.
        Err(_) if folder.is_dir() => Ok(folder),
        renamed => renamed.map(|()| folder.clone()).map_err(failed),
    }
}

fn run(tool: &Path, args: &[&OsStr]) -> Result<String, PackageError> {
    let failed = |said: String| PackageError::Tool { command: tool.display().to_string(), said };
    let output = Command::new(tool).args(args).output().map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

impl Kernel {
    fn of(folder: PathBuf) -> Result<Self, PackageError> {
        let mut files = Vec::new();
        list(&folder.join("boot"), &mut files)?;
        let name = |path: &PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let missing = |what: &str| PackageError::Missing { folder: folder.clone(), what: what.to_owned() };
        let bzimage = files.iter().find(|path| name(path).starts_with("vmlinuz-")).cloned();
        let bzimage = bzimage.ok_or_else(|| missing("kernel"))?;
        files.clear();
        list(&folder.join("lib/modules"), &mut files)?;
        let builtin = files.iter().find(|path| name(path) == "modules.builtin");
        let builtin = builtin.ok_or_else(|| missing("list of what is built in"))?;
        let text = fs::read_to_string(builtin)
            .map_err(|source| PackageError::Cache { path: builtin.clone(), source })?;
        let builtin = text.lines().filter_map(|line| module_name(Path::new(line))).collect();
        let modules = files.into_iter().filter_map(|path| Some((module_name(&path)?, path))).collect();
        Ok(Self { bzimage, folder, modules, builtin })
    }

    /// The files of `names` and of all that they need, in the order in which they are to be loaded.
    pub(super) fn modules(&self, names: &[&str]) -> Result<Vec<PathBuf>, PackageError> {
        let mut order = Vec::new();
        for name in names {
            self.with_needs(name, &mut order)?;
        }
        Ok(order)
    }

    fn with_needs(&self, name: &str, order: &mut Vec<PathBuf>) -> Result<(), PackageError> {
        let name = name.replace('-', "_");
        if self.builtin.contains(&name) {
            return Ok(());
        }
        let missing =
            || PackageError::Missing { folder: self.folder.clone(), what: format!("module {name}") };
        let path = self.modules.get(&name).ok_or_else(missing)?;
        if order.contains(path) {
            return Ok(());
        }
        let module = fs::read(path).map_err(|source| PackageError::Cache { path: path.clone(), source })?;
        for need in needs(&module) {
            self.with_needs(&need, order)?;
        }
        order.push(path.clone());
        Ok(())
    }
}

/// What modules call each other: a file's name without its ending, with `_` for `-`.
fn module_name(path: &Path) -> Option<String> {
    let is_module = path.extension().is_some_and(|extension| extension == "ko");
    is_module.then(|| path.file_stem().unwrap_or_default().to_string_lossy().replace('-', "_"))
}

/// The modules that `module`'s section .modinfo says it depends on.
fn needs(module: &[u8]) -> Vec<String> {
    const WORD: &[u8] = b"\0depends=";
    let Some(at) = module.windows(WORD.len()).position(|window| window == WORD) else {
        return Vec::new();
    };
    let names = module[at + WORD.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let names = String::from_utf8_lossy(names);
    names.split(',').filter(|name| !name.is_empty()).map(ToOwned::to_owned).collect()
}

/// Every file below `folder`.
fn list(folder: &Path, into: &mut Vec<PathBuf>) -> Result<(), PackageError> {
    let failed = |source| PackageError::Cache { path: folder.to_owned(), source };
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_type().map_err(failed)?.is_dir() {
            list(&entry.path(), into)?;
        } else {
            into.push(entry.path());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_has_a_cloud_kernel_and_a_generic_one() {
        let (cloud, generic) = kernels();
        assert!(
            cloud.starts_with("linux-image-") && generic.starts_with("linux-image-"),
            "{cloud} {generic}"
        );
        assert_ne!(cloud, generic);
    }

    #[test]
    fn a_modules_needs_are_read_from_its_information() {
        assert_eq!(
            needs(b"..\0license=GPL\0depends=virtio,virtio_ring\0intree=Y\0"),
            ["virtio", "virtio_ring"]
        );
        assert!(needs(b"\0depends=\0name=x\0").is_empty());
        assert!(needs(b"no module").is_empty());
        assert_eq!(module_name(Path::new("kernel/drivers/virtio-rng.ko")), Some("virtio_rng".to_owned()));
        assert_eq!(module_name(Path::new("modules.builtin")), None);
    }
}
