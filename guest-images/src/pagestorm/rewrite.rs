//! Small rewrites of a page that keeps its earlier content.
//!
//! A page is 256 units of 16 bytes. Write g replaces one unit, in an order of the page's own, so unit number
//! u holds what the last write that met it put there, which the generation alone tells. The units that no write has
//! met yet hold what was there before pagestorm came (a loaded file, zeros); the sum of their hashes is kept in the
//! page's counter ([`kept_sum`]), so the check proves those bytes too.

use super::content::{Found, Identity, Page};
use super::counters::halves;
use super::limits::PAGE_BYTES;
use super::mix::mix_all;

/// Bytes of a unit.
pub const UNIT_BYTES: usize = 16;
/// Units of a page.
pub const UNITS: u32 = 256;
const _: () = assert!(UNITS as usize * UNIT_BYTES == PAGE_BYTES);
/// A unit's bytes.
type Unit = [u8; UNIT_BYTES];

/// Purposes of [`Identity::key`] on rewritten pages.
const ORDER: u64 = 3;
const FIRST: u64 = 4;
const SECOND: u64 = 5;

/// The unit that write `generation` (from 1) replaces: a walk through all units with an odd step.
fn unit_of(id: Identity, generation: u32) -> usize {
    // Arithmetic of bytes is arithmetic modulo the number of units.
    let [start, step, ..] = id.key(ORDER).to_le_bytes();
    let [turns, ..] = (generation - 1).to_le_bytes();
    usize::from(start.wrapping_add((step | 1).wrapping_mul(turns)))
}

fn unit_bytes(id: Identity, generation: u32) -> Unit {
    let mut unit = [0; UNIT_BYTES];
    unit[..8].copy_from_slice(&(id.key(FIRST) ^ u64::from(generation)).to_le_bytes());
    unit[8..].copy_from_slice(&mix_all(&[id.key(SECOND), u64::from(generation)]).to_le_bytes());
    unit
}

fn unit_hash(number: usize, unit: &Unit) -> u64 {
    let (low, high) = halves(*unit);
    mix_all(&[number as u64, low, high])
}

/// The sum over the units of `page` that generations 1 to `generation` have not met.
#[must_use]
pub fn kept_sum(id: Identity, generation: u32, page: &Page) -> u64 {
    let mut met = [false; UNITS as usize];
    for write in 1..=generation.min(UNITS) {
        met[unit_of(id, write)] = true;
    }
    let units = page.as_chunks::<UNIT_BYTES>().0.iter().enumerate();
    units
        .filter(|(number, _)| !met[*number])
        .fold(0, |sum, (number, unit)| sum.wrapping_add(unit_hash(number, unit)))
}

/// Makes write `generation` (from 1) of a page whose kept sum was `kept`, and returns the sum after it. The sum
/// before the first write is [`kept_sum`] at generation 0.
pub fn rewrite(id: Identity, generation: u32, page: &mut Page, kept: u64) -> u64 {
    let number = unit_of(id, generation);
    let unit = &mut page.as_chunks_mut::<UNIT_BYTES>().0[number];
    let left = if generation <= UNITS { kept.wrapping_sub(unit_hash(number, unit)) } else { kept };
    *unit = unit_bytes(id, generation);
    left
}

/// What a rewritten page holds that ought to hold generation `expected` (from 1) and the kept sum `kept`.
#[must_use]
pub fn examine(id: Identity, expected: u32, page: &Page, kept: u64) -> Found {
    let units = page.as_chunks::<UNIT_BYTES>().0;
    let oldest = expected.saturating_sub(UNITS) + 1;
    let holds = |write: &u32| units[unit_of(id, *write)] == unit_bytes(id, *write);
    let newest_held = (oldest..=expected).rev().find(holds);
    let all_before_held = |newest: u32| (oldest..newest).all(|write| holds(&write));
    match newest_held {
        Some(newest) if !all_before_held(newest) => Found::Unknown,
        Some(newest) if newest < expected => Found::Generation(newest),
        Some(_) if kept_sum(id, expected, page) == kept => Found::Expected,
        Some(_) => Found::Unknown,
        None if page.iter().all(|byte| *byte == 0) => Found::Zeros,
        None => Found::Unknown,
    }
}
