//! Tests of real `dht` processes: one peer and its host's processes, and sites of several peers on loopback.

#![expect(clippy::unwrap_used, reason = "a failure outside of #[test] functions is a failed test too")]

mod budget;
mod common;
mod fair;
mod faults;
mod host;
mod large;
mod leases;
mod metrics;
mod operator;
mod repair;
mod retain;
mod seen;
mod site;
mod trust;
