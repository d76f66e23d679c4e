//! Ways to send a page that the site lacks: what each takes of bytes and of CPU time.

mod similar;
mod xbzrle;

use std::io;

use page::{PAGE_SIZE, Page};
use rustix::time::{ClockId, clock_gettime};

pub use self::similar::{Exchange, Sketches};
pub use self::xbzrle::xbzrle;

/// Bytes and CPU seconds of one way over all pages.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Encoded bytes.
    pub bytes: u64,
    /// CPU seconds of the thread that encoded them.
    pub cpu_s: f64,
}

/// The CPU time that this thread has used, seconds.
#[must_use]
pub fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Runs `encode`, which returns bytes, and takes its CPU time.
///
/// # Errors
/// Those of `encode`.
pub fn cost(encode: impl FnOnce() -> io::Result<u64>) -> io::Result<Cost> {
    let before = cpu_seconds();
    let bytes = encode()?;
    Ok(Cost { bytes, cpu_s: cpu_seconds() - before })
}

/// Batches of `size` pages, each one zstd frame.
///
/// # Errors
/// If zstd fails.
pub fn zstd_batches(pages: &[&Page], size: usize, level: i32) -> io::Result<u64> {
    let mut compressor = zstd::bulk::Compressor::new(level)?;
    pages.chunks(size).map(|batch| Ok(compressor.compress(&joined(batch))?.len() as u64)).sum()
}

/// Batches of `size` pages, each one zstd frame with all old versions as its prefix.
///
/// # Errors
/// If zstd fails.
pub fn delta_batches(pages: &[(&Page, &Page)], size: usize, level: i32) -> io::Result<u64> {
    pages
        .chunks(size)
        .map(|batch| {
            let (new, old): (Vec<&Page>, Vec<&Page>) = batch.iter().copied().unzip();
            let old = joined(&old);
            let mut compressor = zstd::bulk::Compressor::new(level)?;
            compressor.context_mut().ref_prefix(&old).map_err(failed)?;
            Ok(compressor.compress(&joined(&new))?.len() as u64)
        })
        .sum()
}

/// Batches of `size` pages, each one zstd frame of what differs from the old versions, bit by bit.
///
/// # Errors
/// If zstd fails.
pub fn xor_batches(pages: &[(&Page, &Page)], size: usize, level: i32) -> io::Result<u64> {
    let mut compressor = zstd::bulk::Compressor::new(level)?;
    let xor = |(new, old): &(&Page, &Page)| -> Vec<u8> { new.iter().zip(*old).map(|(a, b)| a ^ b).collect() };
    pages
        .chunks(size)
        .map(|batch| Ok(compressor.compress(&batch.iter().flat_map(xor).collect::<Vec<u8>>())?.len() as u64))
        .sum()
}

fn joined(pages: &[&Page]) -> Vec<u8> {
    pages.iter().flat_map(|page| page.iter().copied()).collect()
}

fn failed(code: zstd::zstd_safe::ErrorCode) -> io::Error {
    io::Error::other(zstd::zstd_safe::get_error_name(code))
}

/// The pages of an image.
#[must_use]
pub fn pages_of(image: &[u8]) -> &[Page] {
    image.as_chunks::<PAGE_SIZE>().0
}
