//! Helpers that the benches share.

pub mod delta;
pub mod site;

use std::process::Child;

use page::{PAGE_SIZE, Page};

/// A process that is killed when its handle goes.
#[derive(Debug)]
pub struct Killed(pub Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // It may have ended by itself, which is as well.
        let _ended = self.0.kill().and_then(|()| self.0.wait());
    }
}

/// Pages of pseudo-random bytes, the same for the same seed: incompressible, like the worst of guest memory.
#[must_use]
pub fn random_pages(count: usize, seed: u64) -> Vec<Page> {
    let mut state = seed | 1;
    (0..count)
        .map(|_| {
            let mut page = [0; PAGE_SIZE];
            for word in page.as_chunks_mut::<8>().0 {
                // xorshift64 (Marsaglia, 2003)
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                *word = state.to_le_bytes();
            }
            page
        })
        .collect()
}

/// Pages that zstd shrinks to about a third, like the usual page of guest memory: a random half-word among repeats.
#[must_use]
pub fn structured_pages(count: usize, seed: u64) -> Vec<Page> {
    let mut pages = random_pages(count, seed);
    for page in &mut pages {
        for record in page.as_chunks_mut::<16>().0 {
            record[..12].copy_from_slice(b"name=value\0\0");
        }
    }
    pages
}
