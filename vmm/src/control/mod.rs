//! The control socket: HTTP/1.1 with JSON over a Unix socket that only its owner can open.
//!
//! Goals: everything that an operator or a program does with a running VM, described by `docs/openapi.yaml`, which a test holds
//! against the running server. Non-goals: access over a network, and users with different rights; whoever can open the
//! socket owns the VM.
//!
//! A request's way: [`socket`] (who may connect) → [`server`] (routes, and [`api`]'s types) → [`crate::process`] (what happens) →
//! an answer or [`api::ErrorBody`]. What happens without being asked is told by [`events`]; [`metrics`] says it in numbers;
//! [`client`] is the other end, used by the command line.

pub mod api;
pub mod client;
pub mod events;
pub mod metrics;
pub mod server;
pub mod socket;
