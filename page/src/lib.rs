//! The vocabulary that both ends of a migration share.
//!
//! A page is 4096 bytes of guest memory ([`Page`]), stands at a guest frame number ([`Gfn`]), and has a name
//! ([`PageHash`]) within a dedup domain ([`Domain`]). A [`VerifiedPage`] can only be had by hashing its bytes. A
//! [`PageSet`] is a set of frames, one bit a page. Nothing here does I/O.

mod addr;
mod bitmap;
mod hash;

pub use addr::{Gfn, PAGE_SIZE, Page, REGION_PAGES, RegionId, is_zero, page_chunks};
pub use bitmap::PageSet;
pub use hash::{Domain, DomainId, DomainKey, PageHash, ShortId, VerifiedPage, root_of};
