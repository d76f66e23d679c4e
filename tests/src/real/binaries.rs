//! The binaries under test: those of the build that this test belongs to.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// The file of the binary `name`, built if it is not up to date. Cargo is asked once a process.
#[must_use]
pub fn path(name: &str) -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(build).join(name)
}

/// Builds every binary of the workspace into the folder that the test's own file stands in: same target directory, same profile.
fn build() -> PathBuf {
    let test = std::env::current_exe().expect("the test's own file");
    // TARGET/PROFILE/deps/TEST-HASH
    let folder = test.ancestors().nth(2).expect("the test stands in a target directory").to_owned();
    let target = folder.parent().expect("the test stands in a target directory");
    let profile = match folder.file_name().and_then(OsStr::to_str) {
        Some("debug") => "dev",
        Some(profile) => profile,
        None => panic!("{} names no profile", folder.display()),
    };
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let built = Command::new(env!("CARGO"))
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
