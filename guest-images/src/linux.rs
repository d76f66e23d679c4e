//! The test Linux that `guest-images/linux/build` makes: where its files are.
//!
//! It is no part of cargo's build, for a kernel takes minutes and comes from Debian's sources. [`Linux::find`] asks the
//! recipe where the result of exactly this checkout lies, so that a kernel of an older recipe is never taken for it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The recipe, relative to this package.
const RECIPE: &str = "linux/build";

/// Why there is no test Linux to boot.
#[derive(Debug, thiserror::Error)]
pub enum LinuxError {
    /// The recipe has not been run since it last changed.
    #[error(
        "the test Linux is not built, or not since its recipe changed: run guest-images/linux/build (a few minutes; \
         as root with --install-deps it also installs what it needs). It said: {said}"
    )]
    NotBuilt {
        /// What the recipe said to that.
        said: String,
    },
    /// The recipe itself could not be asked.
    #[error("cannot run {recipe} to ask where the test Linux is")]
    Recipe {
        /// The recipe's path.
        recipe: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file of the result cannot be read.
    #[error("cannot read {path}: remove its directory and run guest-images/linux/build")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The finished build of the test Linux.
#[derive(Debug, Clone)]
pub struct Linux {
    directory: PathBuf,
}

impl Linux {
    /// Finds the build that belongs to this checkout's recipe.
    /// # Errors
    /// When it has not been built; the message says with which command to do so.
    pub fn find() -> Result<Self, LinuxError> {
        let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join(RECIPE);
        let output = Command::new(&recipe)
            .arg("--print-dir")
            .output()
            .map_err(|source| LinuxError::Recipe { recipe: recipe.clone(), source })?;
        if !output.status.success() {
            return Err(LinuxError::NotBuilt {
                said: String::from_utf8_lossy(&output.stderr).trim_end().to_owned(),
            });
        }
        Ok(Self { directory: PathBuf::from(String::from_utf8_lossy(&output.stdout).trim_end()) })
    }

    /// The kernel as an ELF file with a PVH note, not compressed.
    #[must_use]
    pub fn vmlinux(&self) -> PathBuf {
        self.directory.join("vmlinux")
    }

    /// The same kernel as a bzImage, which unpacks itself (dear where KVM emulates supervisor code).
    #[must_use]
    pub fn bzimage(&self) -> PathBuf {
        self.directory.join("bzImage")
    }

    /// The initramfs: busybox, sqlite and the workloads, not compressed.
    #[must_use]
    pub fn initramfs(&self) -> PathBuf {
        self.directory.join("initramfs.cpio")
    }

    /// The command line that the kernel needs on every host; callers append their own words.
    /// # Errors
    /// When the file cannot be read.
    pub fn command_line(&self) -> Result<String, LinuxError> {
        let path = self.directory.join("cmdline");
        let words = fs::read_to_string(&path)
            .map_err(|source| LinuxError::Unreadable { path: path.clone(), source })?;
        Ok(words.split_whitespace().collect::<Vec<_>>().join(" "))
    }
}
