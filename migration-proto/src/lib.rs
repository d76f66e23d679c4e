//! The migration protocol of Tern as two pure state machines, [`source::Source`] and [`destination::Destination`].
//!
//! # Goals
//! - Send names, not pages: what the destination's site holds never crosses the WAN.
//! - At every instant at most one side may run the VM, whatever message, process or link is lost ([`switchover`]).
//! - No byte of guest memory is trusted before it was hashed: a region's root vouches for its 512 pages, and one root over
//!   all of RAM is compared before the destination says that it is ready.
//! - Every wait has a deadline, every queue a bound ([`limits`]).
//! - One seed replays a whole migration: no I/O, clock, thread or random number in here.
//!
//! # Non-goals
//! Moving bytes. Hashing, reading and writing pages, compressing and talking to the site are the driver's work, done where and with
//! as many threads as it likes; the core decides what, and in which order.
//!
//! # A migration
//! ```text
//!  source                                              destination
//!    │ Offer (machine, memory layout, domain, epoch)  ──►│  Prepare the machine
//!    │◄── Accept (which domain)                          │
//!    │ ┌ round n ────────────────────────────────────────────────┐
//!    │ │ Region (short ids, root) …, RoundEnd          ──►│ zero, duplicate, in place: at once
//!    │ │                                                  │ Resolve in the site, with a deadline
//!    │ │◄── Want (what nobody near has)                   │
//!    │ │ Literals / Stale                              ──►│ hash, install
//!    │ │◄── RoundDone                                     │
//!    │ └ until the dirty rest fits the downtime ─────────────────┘
//!    │ pause; Region, Literals (unasked), State, Final ──►│  every region's root, one root over RAM, load state
//!    │◄── Ready (root)                                    │
//!    │ Commit (epoch + 1)                             ──►│  run
//!    │◄── Running                                         │
//!    │ Released                                       ──►│
//! ```
//!
//! # Post-copy
//! A guest that writes faster than the link carries never comes to the last round (hybrid), or the caller wants the VM there at once
//! (post-copy). Then, in the place of the last round:
//! ```text
//!    │ Absent …                                      ──►│  forget what stands there
//!    │ pause; State, Absent (what was written since) …, ──►│  every region's root with the absent frames marked, one root; mark
//!    │   Final                                            │  them, load state
//!    │◄── Ready (root)                                    │
//!    │ Commit (epoch + 1)                             ──►│  run
//!    │◄── Running                                         │
//!    │ PageNames (full names of absent frames) …     ──►│  zero: at once; Resolve in the site; else
//!    │◄── Want                                            │
//!    │ Literals                                       ──►│  hash, compare, install
//!    │   ┌ a virtual CPU touches an absent frame ───────────────────┐
//!    │   │                                 its name is known: the site, at once, with a short deadline
//!    │◄──┼ Fault                           else, or if the site is late │
//!    │   │ FaultPage (name, bytes)                   ──►│  hash, compare, install
//!    │   └──────────────────────────────────────────────────────────┘
//!    │◄── Complete                                        │  no frame is absent
//!    │ Released                                       ──►│
//! ```
//!
//! Every page that the VM finds at the destination when it begins to run was verified by the roots, every page that comes later by its full
//! name. What stood at an absent frame before is worth nothing: no byte of it is ever read.
//!
//! # A connection that is lost before Commit
//! ends the migration if the offer gave no time to resume. Otherwise, in any phase in which the destination has not begun to load the state:
//! ```text
//!    │ the VM runs on, the dirty log goes on              │ keeps what it has
//!    │ Resume                                         ──►│
//!    │◄── Held (regions that are whole, their roots) …    │  what was said of all others counts as not said
//!    │ an ordinary round: all but what is held there  ──►│  in place, if it has arrived
//! ```
//!
//! A round after the first whose pages take less than a round trip to send is sent without being asked for, literals behind their names, as the last one is.
//!
//! When a page changed after its name was sent, the source sends `Stale` in its place: the page is in the dirty log, and a later
//! round names it again. Content decides, never the order of messages on different channels: a literal is installed where
//! its hash is expected, or nowhere.
//!
//! # The driver's contract
//! 1. One input method is one mutation: call it, then drain `poll()` until it is `None`, and carry out the actions in order, before the next
//!    input. Methods that return frames to install ([`destination::Destination::site_page`], `literal`) want those installed before draining.
//! 2. Time is told ([`timer::Time`]) and never goes back. Call `timeout` when `next_timeout` has come.
//! 3. Messages of one [`wire::Channel`] arrive in the order sent; different channels may overtake each other.
//! 4. A failure of anything the driver was asked to do goes to `failed`; a lost connection to `disconnected`.
//!    The destination takes `Literals` and `FaultPage` decoded and hashed ([`destination::Destination::literal`], `fault_page`).
//! 5. What is asked of the virtual CPUs (`Pause`, `SaveState`, `CollectDirty`, `RunOn`, `Resume`) is done one after the other, in the order asked; a
//!    `Resume` waits for a `Pause` under way. `StartDirtyLog` is done before the next `Hash` begins. What comes back after the end is ignored.
//! 6. `InDoubt` needs no answer: the machine asks for `Reconnect` by itself. A dial that ends after a later `Reconnect` is dropped. `Resume` with `notify`
//!    dials anew and sends `Abort` with this migration's id as the first message.
//! 7. The destination's host looks at the first message of each connection. Offer: refuse if a VM runs or starts here or [`switchover::Ledger`] fences it;
//!    otherwise the source owns the VM, so `superseded` and then `disconnected` end what an earlier attempt left, and a new machine takes the offer.
//!    Commit, Resume or Abort for the migration at hand: that connection is now the machine's, which is told so by `connected` before the message.
//!    Commit or Resume for another: `Ledger::answer` says Running, NotRunning or Unknown. The fate of a machine goes into the ledger as soon as it has one.
//!    Serve for the migration at hand: [`destination::Destination::serve_answer`] says what is answered, or that the connection is the machine's as with Commit; any
//!    authorised host may say it. For another: `Ledger::look_up` says NotRunning or Unknown.
//! 8. What a past machine asked for (pages, state, virtual CPUs) must not reach the next one, nor what a lost connection still brings the machine that has
//!    asked for another. Every `Hash`, `SendLiterals`, `Pause`, `SaveState`, `CollectDirty` and `RunOn` is answered, connection or none; literals that were encoded
//!    for a lost connection are not sent over the next ([`source::SourceProgress::PrecopyCut`]), and `literals_sent` is called all the same.
//! 9. Post-copy, at the source: from the last `CollectDirty` on memory does not change; `Hash`, `SendLiterals` and `SendFault` read it until `Release` (or
//!    `Resume`, before Commit). What fails after Commit goes to `failed`, which dials anew and does again what the destination still lacks.
//! 10. Post-copy, at the destination: between [`destination::Action::Absent`] and the end of the VM's memory, `Zero` and frames to install go where nothing stands
//!     yet, atomically, and wake whoever waits there (`UFFDIO_COPY`, `UFFDIO_ZEROPAGE`). Each touch of an absent frame goes to `fault`, once; if that
//!     says false, the frame's page is there and whoever waits is to be woken. `PauseVm` and `ResumeVm` need no answer.
//!     A page that cannot be installed goes to `not_installed` before the next action is taken.
//! 11. `Spill` reads memory like `Hash`; `SealSpill` is answered when the file would outlive this host. What fails of either goes to `spill_failed`. The file of a
//!     migration that ended in [`source::End::Completed`] or `Aborted` is removed. A source made by [`source::Source::from_spill`] asks for nothing but messages and reads of the
//!     file, and one whose connection is taken by a later one dials again.
//! 12. `Throttle` is carried out at once, whether the virtual CPUs run or not.
#![forbid(unsafe_code)]
#![deny(clippy::wildcard_enum_match_arm, clippy::match_wildcard_for_single_variants)]

pub mod destination;
pub mod error;
pub mod forecast;
pub mod limits;
pub mod literal;
pub mod manifest;
mod memory_names;
pub mod postcopy;
pub mod source;
pub mod stats;
pub mod switchover;
pub mod timer;
mod waits;
pub mod wire;

pub use error::{AbortReason, ProtocolError};
pub use manifest::{Extent, Layout};
pub use postcopy::Mode;
pub use switchover::{Epoch, MigrationId, RunPermit, VmId};
pub use timer::{Span, Time};
