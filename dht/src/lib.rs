//! A site's peer, one process a host.
//!
//! Goals: keep the membership of a site (hosts on one LAN), know which host holds which page, and serve and fetch
//! pages within the site's dedup domain. It outlives the VMs of its host. Non-goals: anything over the WAN, and
//! proving a page against a migration's manifest; whoever installs a page hashes it first.
//!
//! The processes of a host talk to their peer over a Unix socket: [`local`] has that protocol and its client, and is
//! all that remains without the feature `node`. With it this crate is the peer itself, on libp2p.

mod codec;
pub mod limits;
pub mod local;
pub mod status;

pub use local::client::{Found, Registration, SiteClient};
pub use local::error::SiteError;
pub use local::protocol::{FoundOn, Holder, MemoryExtent};
pub use status::SiteStatus;
