//! A guest's memory as a byte slice: check from outside what pagestorm says from inside.

use crate::pagestorm::content::Page;
use crate::pagestorm::layout::Layout;
use crate::pagestorm::limits::PAGE_BYTES;
use crate::pagestorm::options::Options;
use crate::pagestorm::storm::{Failure, Ram, Storm, Verdict};

/// RAM from guest-physical address 0 on.
#[derive(Debug)]
pub struct RamImage<B>(B);

/// Why a dump of memory cannot be checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DumpError {
    /// The dump ends before the working set does.
    #[error("the dump has {have} bytes, the working set ends at {need}: dump all of RAM")]
    Short {
        /// Bytes of the dump.
        have: usize,
        /// Bytes needed.
        need: u64,
    },
    /// No counters where the options say.
    #[error("no pagestorm counters at {gpa:#x}: give the options that the guest was started with")]
    NoCounters {
        /// Where they ought to be.
        gpa: u64,
    },
}

impl<B: AsRef<[u8]>> RamImage<B> {
    /// Takes `bytes` as memory that holds all of `layout`.
    /// # Errors
    /// [`DumpError::Short`] if they do not.
    pub fn new(bytes: B, layout: &Layout) -> Result<Self, DumpError> {
        let (have, need) = (bytes.as_ref().len(), layout.range.end);
        if (have as u64) < need { Err(DumpError::Short { have, need }) } else { Ok(Self(bytes)) }
    }

    /// The bytes.
    pub const fn bytes_mut(&mut self) -> &mut B {
        &mut self.0
    }
}

impl<B: AsRef<[u8]> + AsMut<[u8]>> Ram for RamImage<B> {
    fn page(&self, gpa: u64) -> &Page {
        self.0.as_ref()[offset(gpa)..].first_chunk().expect("`new` made sure that the working set is inside")
    }

    fn page_mut(&mut self, gpa: u64) -> &mut Page {
        self.0.as_mut()[offset(gpa)..]
            .first_chunk_mut()
            .expect("`new` made sure that the working set is inside")
    }
}

fn offset(gpa: u64) -> usize {
    debug_assert!(gpa.is_multiple_of(PAGE_BYTES as u64));
    usize::try_from(gpa).expect("`new` made sure that the working set is inside")
}

/// The result of [`check_dump`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DumpCheck {
    /// Page writes up to the dump, by the header of the counters.
    pub writes: u64,
    /// Pages looked at: all that have been written.
    pub checked: u64,
    /// What is wrong.
    pub failures: Vec<Failure>,
}

/// Checks a dump of the memory of a pagestorm that was started with `options`. The guest must have stood still while
/// it was taken, between two of its writes: dump it paused, and expect at most one failure from a write cut in two.
/// # Errors
/// If the dump cannot be checked at all; failures of the check are in the result.
pub fn check_dump(ram: &mut [u8], options: &Options) -> Result<DumpCheck, DumpError> {
    let layout = Layout::new(options);
    let gpa = layout.range.start;
    let image = RamImage::new(ram, &layout)?;
    let mut storm = Storm::open(image, options, layout).ok_or(DumpError::NoCounters { gpa })?;
    let mut result = DumpCheck { writes: storm.writes(), checked: 0, failures: Vec::new() };
    for slot in 0..storm.slots() {
        match storm.check(slot) {
            Verdict::Unwritten => {}
            Verdict::Good => result.checked += 1,
            Verdict::Bad(failure) => {
                result.checked += 1;
                result.failures.push(failure);
            }
        }
    }
    Ok(result)
}
