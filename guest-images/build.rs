//! Builds the bare-metal guests with the compiler that builds this crate, so that no target has to be installed.
//!
//! The guest is a freestanding program for the host's own triple: no standard library, no C start files, static, at
//! the addresses of its linker script. `cargo` cannot say that for one target of a package (panic strategy and
//! linker arguments that a dependent's profile must not change), so `rustc` is called here.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    // rustfmt follows the guest's sources through a `mod` that no build turns on (src/lib.rs).
    println!("cargo:rustc-check-cfg=cfg(guest_sources)");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=pagestorm");
    println!("cargo:rerun-if-changed=src/pagestorm");
    let package = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let target = env::var("TARGET").expect("cargo sets it");
    assert!(
        target == "x86_64-unknown-linux-gnu",
        "the guests are linked with the tools of x86_64-unknown-linux-gnu: build for that, not for {target}"
    );
    compile(&package.join("pagestorm"), &target, &out.join("pagestorm"));
}

/// Compiles `source/main.rs` with `source/link.ld` into `image`.
fn compile(source: &Path, target: &str, image: &Path) {
    let rustc = env::var_os("RUSTC").expect("cargo sets it");
    let mut command = Command::new(rustc);
    command.args(["--crate-name", "pagestorm", "--crate-type", "bin", "--edition", "2024"]);
    command.arg("--target").arg(target);
    if let Some(linker) = env::var_os("RUSTC_LINKER") {
        command.arg("-C").arg(concat("linker=", linker));
    }
    for option in [
        "panic=abort",
        "opt-level=2",
        "overflow-checks=yes",
        "codegen-units=1",
        "target-cpu=x86-64", // nothing beyond SSE2: whoever runs it may lack more
        "relocation-model=static",
        "target-feature=+crt-static",
        "linker-features=-lld", // the system's linker: a script of its own dialect
        "strip=debuginfo",
        "no-redzone=yes",
        "link-arg=-nostdlib",
        "link-arg=-static",
        "link-arg=-no-pie",
        "link-arg=-Wl,--build-id=none,-z,max-page-size=4096",
    ] {
        command.arg("-C").arg(option);
    }
    command.arg("-C").arg(concat("link-arg=-Wl,-T,", source.join("link.ld")));
    // The same bytes wherever the workspace lies.
    command.arg("--remap-path-prefix").arg(format!("{}=.", source.display()));
    command.arg("-o").arg(image).arg(source.join("main.rs"));
    let status = command.status().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    assert!(status.success(), "the guest does not compile: {command:?} ended with {status}");
}

/// `prefix` and `rest` in one argument; paths need not be UTF-8.
fn concat(prefix: &str, rest: impl Into<std::ffi::OsString>) -> std::ffi::OsString {
    let mut whole = std::ffi::OsString::from(prefix);
    whole.push(rest.into());
    whole
}
