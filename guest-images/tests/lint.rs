//! The guest's own files are compiled by build.rs, out of clippy's sight; here is what shows them to it.

use std::path::Path;
use std::process::Command;

#[test]
#[ignore = "needs clippy-driver; for CI"]
fn the_guest_keeps_the_workspaces_lints() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let lints = [
        "missing_docs",
        "elided_lifetimes_in_paths",
        "unsafe_op_in_unsafe_fn",
        "clippy::all",
        "clippy::undocumented_unsafe_blocks",
        "clippy::multiple_unsafe_ops_per_block",
        "clippy::cast_possible_truncation",
        "clippy::cast_sign_loss",
        "clippy::ptr_as_ptr",
        "clippy::unwrap_used",
        "clippy::allow_attributes_without_reason",
        "clippy::too_many_lines",
        "clippy::needless_pass_by_value",
        "clippy::use_self",
    ];
    let output = Command::new("clippy-driver")
        .args(["--edition", "2024", "--crate-type", "bin", "--emit", "metadata", "-C", "panic=abort"])
        .args(lints.iter().flat_map(|lint| ["-D", lint]))
        .arg("-o")
        .arg(folder.path().join("pagestorm"))
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("pagestorm/main.rs"))
        .output()
        .expect("clippy-driver is installed: rustup component add clippy");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
