//! The control plane on real processes: `vmm` binaries, real KVM, the real socket.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking, as tests do")]

mod harness;
mod journey;
mod life;
mod openapi;
