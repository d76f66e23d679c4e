//! A site's peer, one process a host.
//!
//! Goals: keep the membership of a site (hosts on one LAN), know which host holds which page, and serve and fetch
//! pages within the site's dedup domain. It outlives the VMs of its host. Non-goals: anything over the WAN, and
//! proving a page against a migration's manifest; whoever installs a page hashes it first.
//!
//! The processes of a host talk to their peer over a Unix socket: [`local`] has that protocol and its client, and is
//! all that remains without the feature `node`. With it this crate is the peer itself, on libp2p.

#[cfg(feature = "node")]
pub mod announce;
#[cfg(feature = "node")]
mod anti_entropy;
#[cfg(feature = "node")]
mod asked;
#[cfg(feature = "node")]
pub mod asker;
pub mod batch;
#[cfg(feature = "node")]
mod behaviour;
#[cfg(feature = "node")]
pub mod budget;
#[cfg(feature = "node")]
pub mod checkpoint;
#[cfg(feature = "node")]
pub mod claims;
#[cfg(feature = "node")]
pub mod cli;
mod codec;
#[cfg(feature = "node")]
pub mod config;
#[cfg(feature = "node")]
mod connections;
#[cfg(feature = "node")]
mod content;
#[cfg(feature = "node")]
mod counters;
#[cfg(feature = "node")]
mod entries;
#[cfg(feature = "node")]
pub mod error;
#[cfg(feature = "node")]
pub mod estimate;
#[cfg(feature = "node")]
pub mod fair;
#[cfg(feature = "node")]
mod fetch;
#[cfg(feature = "node")]
pub mod flight;
#[cfg(feature = "node")]
mod flood;
#[cfg(feature = "node")]
mod gone;
mod id_map;
#[cfg(feature = "node")]
pub mod identity;
#[cfg(feature = "node")]
pub mod index;
#[cfg(feature = "node")]
mod joins;
#[cfg(feature = "node")]
mod known;
#[cfg(feature = "node")]
pub mod lease;
pub mod limits;
pub mod local;
#[cfg(feature = "node")]
pub mod lookup;
#[cfg(feature = "node")]
pub mod membership;
#[cfg(feature = "node")]
pub mod mesh;
#[cfg(feature = "node")]
pub mod metrics;
#[cfg(feature = "node")]
mod metrics_server;
#[cfg(feature = "node")]
mod near;
#[cfg(feature = "node")]
mod network;
#[cfg(feature = "node")]
pub mod node;
#[cfg(feature = "node")]
mod pace;
#[cfg(feature = "node")]
mod page_client;
#[cfg(feature = "node")]
mod page_connection;
#[cfg(feature = "node")]
mod page_server;
#[cfg(feature = "node")]
pub mod proof;
#[cfg(feature = "node")]
pub mod recent;
#[cfg(feature = "node")]
mod refusal;
#[cfg(feature = "node")]
pub mod repair;
#[cfg(feature = "node")]
mod report;
#[cfg(feature = "node")]
mod requests;
#[cfg(feature = "node")]
mod resolve;
#[cfg(feature = "node")]
mod round_trip;
#[cfg(feature = "node")]
pub mod sample;
#[cfg(feature = "node")]
mod secure;
#[cfg(feature = "node")]
mod seldom;
#[cfg(feature = "node")]
mod serve;
#[cfg(feature = "node")]
pub mod shard;
pub mod status;
#[cfg(feature = "node")]
mod status_text;
#[cfg(feature = "node")]
mod told;
#[cfg(feature = "node")]
pub mod trust;
#[cfg(feature = "node")]
mod upkeep;
#[cfg(feature = "node")]
mod want;
#[cfg(feature = "node")]
pub mod wire;

pub use local::client::{Found, Registration, Retained, SiteClient, Told};
pub use local::error::SiteError;
pub use local::protocol::{FoundOn, Holder, MemoryExtent};
pub use status::SiteStatus;
