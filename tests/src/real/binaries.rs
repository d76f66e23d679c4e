//! The binaries under test: those of the build that this test belongs to.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

static FOLDER: OnceLock<PathBuf> = OnceLock::new();

/// The file of the binary `name`, built if it is not up to date.
#[must_use]
pub fn path(name: &str) -> PathBuf {
    folder().join(name)
}

/// The folder of the binaries, all built and up to date. Cargo is asked once a process.
#[must_use]
pub fn folder() -> PathBuf {
    FOLDER.get_or_init(build).clone()
}

/// Takes the binaries from `folder` as they are: for a machine that has no cargo. To be said before any binary is asked for.
pub fn stand_in(folder: &Path) {
    assert!(FOLDER.set(folder.to_owned()).is_ok(), "the binaries have a folder already");
}

/// Builds every binary of the workspace into the folder that this program's own file stands in: same target directory, same profile.
fn build() -> PathBuf {
    let program = std::env::current_exe().expect("the program's own file");
    // TARGET/PROFILE/deps/TEST-HASH, or TARGET/PROFILE/BINARY
    let mut folders = program.ancestors().skip(1).skip_while(|folder| folder.ends_with("deps"));
    let folder = folders.next().expect("the program stands in a target directory").to_owned();
    let target = folder.parent().expect("the test stands in a target directory");
    let profile = match folder.file_name().and_then(OsStr::to_str) {
        Some("debug") => "dev",
        Some(profile) => profile,
        None => panic!("{} names no profile", folder.display()),
    };
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let mut cargo = Command::new(env!("CARGO"));
    // `cargo test` tells a test of the test's own package. Build scripts that look at such words (ring's does) would run again because of
    // them, and half of the workspace with them, now and at the next build without them.
    for (name, _) in std::env::vars_os() {
        if name
            .to_str()
            .is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_"))
        {
            cargo.env_remove(name);
        }
    }
    let built = cargo
        .args(["build", "--quiet", "--workspace", "--bins", "--profile", profile, "--target-dir"])
        .arg(target)
        .current_dir(workspace)
        .stdin(Stdio::null())
        .output()
        .expect("cargo can be started");
    assert!(
        built.status.success(),
        "the binaries under test do not build:\n{}",
        String::from_utf8_lossy(&built.stderr)
    );
    folder
}
