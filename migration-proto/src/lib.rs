//! migration-proto
