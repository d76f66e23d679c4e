//! Writes inputs that each fuzz target takes, from our own encoders, so that it begins behind its first checks:
//! `cargo run --manifest-path fuzz/Cargo.toml --no-default-features --features site --example seeds`.
//!
//! They go to `fuzz/corpus/TARGET/seed-N`. Each is checked: what a parser refuses is no seed.

use std::path::Path;

mod formats;
mod guests;
#[cfg(feature = "site")]
mod peers;

/// A target, its seeds, and whether it takes one.
#[derive(Clone)]
struct Target {
    name: &'static str,
    seeds: Vec<Vec<u8>>,
    takes: fn(&[u8]) -> bool,
}

fn main() -> std::io::Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let targets = [
        formats::all(),
        guests::all(),
        #[cfg(feature = "site")]
        peers::all(),
    ];
    for Target { name, seeds, takes } in targets.concat() {
        let dir = corpus.join(name);
        std::fs::create_dir_all(&dir)?;
        for (number, seed) in seeds.iter().enumerate() {
            assert!(takes(seed), "{name} does not take its seed {number}");
            std::fs::write(dir.join(format!("seed-{number}")), seed)?;
        }
        println!("{name}: {} seeds", seeds.len());
    }
    Ok(())
}
