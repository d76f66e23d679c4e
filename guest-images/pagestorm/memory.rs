//! Guest memory by address, and the four functions that compiled Rust expects from a C library.

use core::arch::asm;

use super::pagestorm::content::Page;
use super::pagestorm::layout::{Layout, LayoutError};
use super::pagestorm::storm::Ram;

unsafe extern "C" {
    /// First byte of the image.
    static image_start: u8;
    /// The byte behind the image.
    static image_end: u8;
}

/// The working set's memory.
pub struct WorkingSet {
    range: core::ops::Range<u64>,
}

impl WorkingSet {
    /// The memory of `layout`, if it is RAM and outside the image.
    pub fn new(
        layout: &Layout,
        ram: &(impl Iterator<Item = core::ops::Range<u64>> + Clone),
    ) -> Result<Self, LayoutError> {
        let image = (&raw const image_start) as u64..(&raw const image_end) as u64;
        layout.check(ram, &image)?;
        Ok(Self { range: layout.range.clone() })
    }

    fn check(&self, gpa: u64) {
        assert!(
            self.range.contains(&gpa) && gpa.is_multiple_of(size_of::<Page>() as u64),
            "no page of the working set"
        );
    }
}

impl Ram for WorkingSet {
    fn page(&self, gpa: u64) -> &Page {
        self.check(gpa);
        // SAFETY: `new` made sure that the range is mapped RAM outside the image, so no Rust object is there and address
        // 0 only if the operator asked for it; a page is bytes. The borrow of self keeps writers away.
        unsafe { &*(gpa as *const Page) }
    }

    fn page_mut(&mut self, gpa: u64) -> &mut Page {
        self.check(gpa);
        // SAFETY: as in `page`; the exclusive borrow of self makes this the only reference.
        unsafe { &mut *(gpa as *mut Page) }
    }
}

/// C's memcpy.
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    // SAFETY: the caller owns both ranges and they do not overlap; the direction flag is clear (ABI).
    unsafe {
        asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") bytes => _,
            options(nostack, preserves_flags));
    }
    to
}

/// C's memmove.
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= bytes {
        // SAFETY: the destination does not start inside the source, so copying forward reads each byte before it is
        // written.
        return unsafe { memcpy(to, from, bytes) };
    }
    // SAFETY: the caller owns both ranges; backward, from the last byte (bytes is not 0 here), for the same reason; the
    // direction flag is clear again afterwards.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rdi") to.wrapping_add(bytes).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(bytes).wrapping_sub(1) => _, inout("rcx") bytes => _, options(nostack));
    }
    to
}

/// C's memset.
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memset(to: *mut u8, byte: i32, bytes: usize) -> *mut u8 {
    // SAFETY: the caller owns the range; the direction flag is clear (ABI).
    unsafe {
        asm!("rep stosb", inout("rdi") to => _, in("eax") byte, inout("rcx") bytes => _,
            options(nostack, preserves_flags));
    }
    to
}

/// C's memcmp; [`bcmp`] is the same.
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, bytes: usize) -> i32 {
    // SAFETY: the caller owns both ranges for reading.
    let left = unsafe { core::slice::from_raw_parts(left, bytes) };
    // SAFETY: as above.
    let right = unsafe { core::slice::from_raw_parts(right, bytes) };
    // Eight bytes at a time up to the first that differ: pages are compared with this. Comparing slices here would call
    // this function again.
    let (left_words, right_words) = (left.as_chunks::<8>().0, right.as_chunks::<8>().0);
    let same = left_words
        .iter()
        .zip(right_words)
        .take_while(|(left, right)| u64::from_ne_bytes(**left) == u64::from_ne_bytes(**right));
    let start = same.count() * 8;
    let rest = left[start..].iter().zip(&right[start..]);
    rest.map(|(left, right)| i32::from(*left) - i32::from(*right)).find(|order| *order != 0).unwrap_or(0)
}

/// BSD's bcmp.
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, bytes: usize) -> i32 {
    // SAFETY: the caller keeps memcmp's contract, which is the same.
    unsafe { memcmp(left, right, bytes) }
}
