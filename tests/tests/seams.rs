//! The rules of the house that can be checked: who imports whom, how long files are, where `unsafe` may stand, which papers are there.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use cargo_metadata::{DependencyKind, MetadataCommand};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace holds this crate").to_path_buf()
}

/// Crates of this workspace and who they may import, dev-dependencies aside. `tests` and `bench` may import anything.
fn allowed() -> BTreeMap<&'static str, &'static [&'static str]> {
    BTreeMap::from([
        ("page", &[] as &[_]),
        ("migration-proto", &["page"]),
        ("dht", &["page"]),
        ("vmm", &["page", "migration-proto", "dht"]),
        ("guest-images", &[]),
        ("tern", &["page", "migration-proto", "dht", "vmm", "guest-images"]),
    ])
}

#[test]
fn crates_import_only_whom_they_may() {
    let metadata = MetadataCommand::new()
        .manifest_path(root().join("Cargo.toml"))
        .no_deps()
        .exec()
        .expect("cargo metadata");
    let allowed = allowed();
    let ours: BTreeSet<String> = metadata.packages.iter().map(|package| package.name.to_string()).collect();
    for package in &metadata.packages {
        let Some(may) = allowed.get(package.name.as_str()) else {
            assert!(matches!(package.name.as_str(), "tern-tests" | "bench"), "{} has no rule", package.name);
            continue;
        };
        for dependency in package.dependencies.iter().filter(|d| d.kind != DependencyKind::Development) {
            let name = dependency.name.as_str();
            assert!(!ours.contains(name) || may.contains(&name), "{} may not import {name}", package.name);
        }
    }
}

#[test]
fn page_needs_only_sha2_and_the_core_no_runtime() {
    let metadata = MetadataCommand::new()
        .manifest_path(root().join("Cargo.toml"))
        .no_deps()
        .exec()
        .expect("cargo metadata");
    let normal = |name: &str| -> BTreeSet<String> {
        let package = metadata.packages.iter().find(|p| p.name.as_str() == name).expect(name);
        package
            .dependencies
            .iter()
            .filter(|d| d.kind == DependencyKind::Normal)
            .map(|d| d.name.clone())
            .collect()
    };
    assert_eq!(normal("page"), BTreeSet::from(["sha2".to_owned()]));
    assert_eq!(normal("migration-proto"), ["page", "thiserror", "zstd"].map(str::to_owned).into());
}

#[test]
fn the_monitor_has_no_libp2p() {
    let tree = std::process::Command::new(env!("CARGO"))
        .args(["tree", "--offline", "-p", "vmm", "-e", "normal", "--prefix", "none"])
        .current_dir(root())
        .output()
        .expect("cargo tree");
    assert!(tree.status.success(), "{}", String::from_utf8_lossy(&tree.stderr));
    let tree = String::from_utf8_lossy(&tree.stdout);
    assert!(tree.contains("kvm-ioctls"), "the tree is vmm's");
    assert!(!tree.contains("libp2p"), "vmm takes dht's local client alone");
}

/// Every Rust file of the repository.
fn rust_files() -> Vec<PathBuf> {
    fn walk(folder: &Path, into: &mut Vec<PathBuf>) {
        for entry in
            std::fs::read_dir(folder).expect("a readable folder").map(|entry| entry.expect("an entry"))
        {
            let path = entry.path();
            let name = entry.file_name();
            if path.is_dir() && name != "target" && !name.to_string_lossy().starts_with('.') {
                walk(&path, into);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                into.push(path);
            }
        }
    }
    let mut files = Vec::new();
    walk(&root(), &mut files);
    assert!(files.len() > 50, "the walk found the repository");
    files
}

#[test]
fn no_file_outgrows_its_job() {
    let long: Vec<String> = rust_files()
        .into_iter()
        .filter_map(|path| {
            let lines = std::fs::read_to_string(&path).expect("a readable file").lines().count();
            (lines > 600).then(|| format!("{} ({lines} lines)", path.display()))
        })
        .collect();
    assert!(long.is_empty(), "a file over 600 lines has two jobs, find them: {long:#?}");
}

#[test]
fn unsafe_stands_only_where_it_may() {
    let homes = ["vmm/src/kvm", "vmm/src/memory", "guest-images"].map(|home| root().join(home));
    let strays: Vec<PathBuf> = rust_files()
        .into_iter()
        .filter(|path| !homes.iter().any(|home| path.starts_with(home)))
        .filter(|path| {
            let text = std::fs::read_to_string(path).expect("a readable file");
            // Assembled here, so that this file does not find itself.
            let block = concat!("unsafe", " {");
            text.lines().any(|line| line.contains(block) && !line.trim_start().starts_with("//"))
        })
        .collect();
    assert!(strays.is_empty(), "move it to a folder that may hold it, with its invariants: {strays:#?}");
}

#[test]
fn the_papers_are_there_and_the_readme_opens_with_the_two_commands() {
    for paper in [
        "README.md",
        "ARCHITECTURE.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE-APACHE",
        "LICENSE-MIT",
        "docs/openapi.yaml",
        "docs/dependencies.md",
        "docs/operations.md",
        "docs/wire.md",
    ] {
        assert!(root().join(paper).is_file(), "{paper} is missing");
    }
    let readme = std::fs::read_to_string(root().join("README.md")).expect("README.md");
    let head: String = readme.lines().take(30).collect::<Vec<_>>().join("\n");
    assert!(head.contains("cargo run --release --bin tern -- demo"));
    assert!(head.contains("cargo test --workspace"));
}

#[test]
fn every_dependency_has_its_line() {
    let lines = std::fs::read_to_string(root().join("docs/dependencies.md")).expect("docs/dependencies.md");
    let metadata = MetadataCommand::new()
        .manifest_path(root().join("Cargo.toml"))
        .no_deps()
        .exec()
        .expect("cargo metadata");
    let ours: BTreeSet<String> = metadata.packages.iter().map(|package| package.name.to_string()).collect();
    let direct: BTreeSet<&str> = metadata
        .packages
        .iter()
        .flat_map(|package| &package.dependencies)
        .map(|dependency| dependency.name.as_str())
        .filter(|name| !ours.contains(*name))
        .collect();
    let missing: Vec<&str> =
        direct.into_iter().filter(|name| !lines.contains(&format!("| `{name}` |"))).collect();
    assert!(missing.is_empty(), "docs/dependencies.md says nothing of {missing:?}");
}

#[test]
fn every_step_of_the_datas_way_that_the_architecture_names_exists() {
    let text = std::fs::read_to_string(root().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    let named: Vec<&str> = text
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|word| word.contains('/') && word.ends_with(".rs") && !word.contains(['*', '{', ' ']))
        .collect();
    assert!(named.len() >= 9, "the page names a file for each step");
    let gone: Vec<&&str> = named.iter().filter(|path| !root().join(path).is_file()).collect();
    assert!(gone.is_empty(), "ARCHITECTURE.md names files that are not there: {gone:?}");
}
