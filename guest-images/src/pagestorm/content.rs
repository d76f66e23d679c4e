//! What pagestorm writes into a whole page, and how a page tells what was written into it.
//!
//! A page's bytes are a function of (seed, page index, generation): generation g is what its g-th write puts there.
//! A page that holds an earlier generation says which, because the generation can be read from its first bytes and
//! then proved by the rest.

use super::limits::PAGE_BYTES;
use super::mix::{Stream, mix_all};

/// A page's bytes.
pub type Page = [u8; PAGE_BYTES];

/// What a page that ought to hold generation `expected` holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// What it ought to.
    Expected,
    /// What another write had put there: lost writes if it is an earlier one.
    Generation(u32),
    /// Zeros only.
    Zeros,
    /// Nothing that pagestorm ever writes there.
    Unknown,
}

/// Whose bytes: the seed and the data page's index.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// The command line's seed.
    pub seed: u64,
    /// The data page's index.
    pub index: u64,
}

impl Identity {
    /// A key for one purpose.
    #[must_use]
    pub fn key(self, purpose: u64) -> u64 {
        mix_all(&[self.seed, self.index, purpose])
    }
}

/// Purposes of [`Identity::key`] on whole pages.
const TAG: u64 = 1;
const BODY: u64 = 2;

/// Writes generation `generation` of a [`super::options::Content::Random`] page.
pub fn fill_random(id: Identity, generation: u32, page: &mut Page) {
    let mut stream = Stream::new(id.key(BODY) ^ u64::from(generation));
    for word in page.as_chunks_mut::<8>().0 {
        *word = stream.next_u64().to_le_bytes();
    }
    page[..8].copy_from_slice(&(id.key(TAG) ^ u64::from(generation)).to_le_bytes());
}

/// What a random page holds. `scratch` is overwritten.
pub fn examine_random(id: Identity, expected: u32, page: &Page, scratch: &mut Page) -> Found {
    let [b0, b1, b2, b3, b4, b5, b6, b7, ..] = *page;
    let claimed = u64::from_le_bytes([b0, b1, b2, b3, b4, b5, b6, b7]) ^ id.key(TAG);
    examine(expected, u32::try_from(claimed).ok(), page, scratch, |generation, scratch| {
        fill_random(id, generation, scratch);
    })
}

/// Bytes of the first line of a text page: "page ", 16 digits, " write ", 8 digits, a newline.
const HEAD: usize = 37;
/// Where the generation's digits stand in it.
const HEAD_GENERATION: core::ops::Range<usize> = 28..36;

/// Eight-letter cells: a word, then blanks that the next word overwrites.
const WORDS: &[u8; 64 * 8] = b"the     of      and     to      in      page    memory  host    \
guest   network state   virtual machine a       is      that    \
it      was     for     on      are     with    as      at      \
be      this    have    from    or      one     had     by      \
kernel  process write   read    address table   device  queue   \
buffer  driver  error   file    block   cache   clock   thread  \
socket  index   value   number  length  offset  pointer region  \
source  target  copy    round   dirty   clean   zero    time    ";

/// Writes generation `generation` of a [`super::options::Content::Text`] page: a line that says whose it is, then
/// lines of words.
pub fn fill_text(id: Identity, generation: u32, page: &mut Page) {
    page[..HEAD].copy_from_slice(b"page 0000000000000000 write 00000000\n");
    put_hex(&mut page[5..21], id.key(TAG));
    put_hex(&mut page[HEAD_GENERATION], u64::from(generation));
    let mut stream = Stream::new(id.key(BODY) ^ u64::from(generation));
    let mut at = HEAD;
    let mut line_start = at;
    while at < PAGE_BYTES {
        let mut bits = stream.next_u64();
        for _ in 0..10 {
            let (start, number) = (at, (bits % 64) as usize * 8);
            bits /= 64;
            let word = &WORDS[number..number + 8];
            let room = (PAGE_BYTES - start).min(8);
            page[start..start + room].copy_from_slice(&word[..room]);
            let letters = word.iter().position(|byte| *byte == b' ').unwrap_or(word.len() - 1);
            at = (start + letters + 1).min(PAGE_BYTES);
            page[at - 1] = b' ';
            if at - line_start > 72 || at == PAGE_BYTES {
                page[at - 1] = b'\n';
                line_start = at;
            }
        }
    }
}

/// What a text page holds. `scratch` is overwritten.
pub fn examine_text(id: Identity, expected: u32, page: &Page, scratch: &mut Page) -> Found {
    let claimed = core::str::from_utf8(&page[HEAD_GENERATION])
        .ok()
        .and_then(|digits| u32::from_str_radix(digits, 16).ok());
    examine(expected, claimed, page, scratch, |generation, scratch| fill_text(id, generation, scratch))
}

/// Compares with the expected generation, and failing that with the one that the page claims to hold.
fn examine(
    expected: u32,
    claimed: Option<u32>,
    page: &Page,
    scratch: &mut Page,
    fill: impl Fn(u32, &mut Page),
) -> Found {
    fill(expected, scratch);
    if page == scratch {
        return Found::Expected;
    }
    if let Some(generation) = claimed.filter(|generation| *generation != expected) {
        fill(generation, scratch);
        if page == scratch {
            return Found::Generation(generation);
        }
    }
    if page.iter().all(|byte| *byte == 0) { Found::Zeros } else { Found::Unknown }
}

/// Fills `digits` with the last hexadecimal digits of `value`.
fn put_hex(digits: &mut [u8], value: u64) {
    let mut rest = value;
    for digit in digits.iter_mut().rev() {
        *digit = b"0123456789abcdef"[(rest % 16) as usize];
        rest /= 16;
    }
}
