//! `tern`: one file that can act as `vmm`, as `dht`, and show both together.
#![cfg_attr(not(test), expect(dead_code, reason = "the demo's scenario, which uses its parts, lands next"))]

mod demo;
mod limits;

fn main() {}
