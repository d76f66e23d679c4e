//! The bodies of the fuzz targets (fuzz/, which is not of the workspace), compiled here so that they cannot rot, and let loose on their seeds and
//! on changed seeds. Coverage-guided runs, for hours, are cargo-fuzz's business: see fuzz/README.md.

extern crate self as libfuzzer_sys;
extern crate self as tern_fuzz;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

/// In libFuzzer's place: the body becomes a function.
#[macro_export]
macro_rules! fuzz_target {
    (|$input:ident: &[u8]| $body:block) => {
        pub(crate) fn run($input: &[u8]) {
            $body
        }
    };
    (|$input:ident: &str| $body:block) => {
        pub(crate) fn run(bytes: &[u8]) {
            if let Ok($input) = std::str::from_utf8(bytes) {
                $body
            }
        }
    };
}

#[path = "../../fuzz/src/lib.rs"]
mod shared;
pub use shared::Disk;

/// What the seeds' modules make.
#[derive(Clone)]
struct Target {
    name: &'static str,
    seeds: Vec<Vec<u8>>,
    takes: fn(&[u8]) -> bool,
}

#[path = "../../fuzz/examples/seeds/formats.rs"]
mod formats;
#[path = "../../fuzz/examples/seeds/guests.rs"]
mod guests;
#[path = "../../fuzz/examples/seeds/peers.rs"]
mod peers;

macro_rules! targets {
    ($($name:ident = $path:literal,)*) => {
        $(
            #[path = $path]
            #[allow(unused_attributes, unused_imports, reason = "a target is a program of its own, with libFuzzer's main")]
            mod $name;
        )*
        const TARGETS: &[(&str, fn(&[u8]))] = &[$((stringify!($name), $name::run),)*];
    };
}

targets! {
    checkpoint = "../../fuzz/fuzz_targets/checkpoint.rs",
    cpu_baseline = "../../fuzz/fuzz_targets/cpu_baseline.rs",
    guest_cmdline = "../../fuzz/fuzz_targets/guest_cmdline.rs",
    kernel = "../../fuzz/fuzz_targets/kernel.rs",
    literal = "../../fuzz/fuzz_targets/literal.rs",
    local_answer = "../../fuzz/fuzz_targets/local_answer.rs",
    local_request = "../../fuzz/fuzz_targets/local_request.rs",
    machine_state = "../../fuzz/fuzz_targets/machine_state.rs",
    site_message = "../../fuzz/fuzz_targets/site_message.rs",
    snapshot_manifest = "../../fuzz/fuzz_targets/snapshot_manifest.rs",
    spill = "../../fuzz/fuzz_targets/spill.rs",
    ticket = "../../fuzz/fuzz_targets/ticket.rs",
    virtio_balloon = "../../fuzz/fuzz_targets/virtio_balloon.rs",
    virtio_block = "../../fuzz/fuzz_targets/virtio_block.rs",
    virtio_console = "../../fuzz/fuzz_targets/virtio_console.rs",
    virtio_net = "../../fuzz/fuzz_targets/virtio_net.rs",
    virtio_race = "../../fuzz/fuzz_targets/virtio_race.rs",
    virtio_rng = "../../fuzz/fuzz_targets/virtio_rng.rs",
    virtio_state = "../../fuzz/fuzz_targets/virtio_state.rs",
    wire = "../../fuzz/fuzz_targets/wire.rs",
}

/// Has the changed seeds made from this number again.
const SEED: &str = "TERN_FUZZ_SEED";
/// Changed seeds of each target.
const CHANGED: usize = 300;

#[test]
fn every_target_is_here_and_in_the_manifest() {
    let fuzz = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("fuzz");
    let manifest = std::fs::read_to_string(fuzz.join("Cargo.toml")).unwrap();
    let readme = std::fs::read_to_string(fuzz.join("README.md")).unwrap();
    let mut files: Vec<String> = std::fs::read_dir(fuzz.join("fuzz_targets"))
        .unwrap()
        .map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    files.sort_unstable();
    assert_eq!(files, TARGETS.iter().map(|(name, _)| *name).collect::<Vec<_>>());
    for name in files {
        assert!(manifest.contains(&format!("name = \"{name}\"")), "fuzz/Cargo.toml lacks {name}");
        assert!(readme.contains(&format!("`{name}`")), "fuzz/README.md lacks {name}");
    }
}

#[test]
fn seeds_are_taken_and_changed_seeds_break_nothing() {
    let seed: u64 = match std::env::var(SEED) {
        Ok(given) => given.parse().expect("a seed is a number"),
        Err(_) => rand::rng().random(),
    };
    println!("{SEED}={seed} replays this");
    let mut random = StdRng::seed_from_u64(seed);
    let all: Vec<Target> = [formats::all(), guests::all(), peers::all()].concat();
    for (name, run) in TARGETS {
        let target = all.iter().find(|target| target.name == *name);
        let target = target.unwrap_or_else(|| panic!("no seeds for {name}"));
        for (number, seed) in target.seeds.iter().enumerate() {
            assert!((target.takes)(seed), "{name} does not take its seed {number}");
            run(seed);
        }
        for _ in 0..CHANGED {
            let mut changed = target.seeds[random.random_range(0..target.seeds.len())].clone();
            for _ in 0..random.random_range(1..8) {
                let at = random.random_range(0..changed.len());
                changed[at] = random.random();
            }
            if random.random_bool(0.2) {
                changed.truncate(random.random_range(0..changed.len()));
            }
            run(&changed);
        }
    }
}
