//! Migration's I/O side: drives the pure core in `migration-proto` over QUIC, KVM and the site's peer.

pub mod report;
pub mod site;
