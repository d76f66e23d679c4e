//! A dry run's messages: what a migration would be like is found out over a connection of its own, and no VM moves.
//!
//! ```text
//!  source                                              destination
//!    │ Ask (offer, short ids of sampled pages)       ──►│  would the VM be taken? which of these does the site hold?
//!    │◄── Answer                                         │  (or Refuse)
//!    │ Burst, Burst, …                               ──►│  what does the link carry?
//!    │◄── Carried … until it has carried enough          │
//! ```

use page::ShortId;

use super::codec::{Reader, WireError, Writer};
use super::message::Offer;
use super::offer::{read_accept, read_offer, write_accept, write_offer};
use crate::limits;

/// A message of a dry run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Probe {
    /// Control, to the destination, the first of its connection.
    Ask {
        /// The VM, as an offer of it would be.
        offer: Offer,
        /// Names of sampled pages.
        ids: Vec<ShortId>,
    },
    /// Control, to the source.
    Answer {
        /// As in Accept.
        shared: bool,
        /// As in Accept.
        postcopy: bool,
        /// For each id that was asked for, in that order, whether the site gave a page of that name.
        held: Vec<bool>,
    },
    /// Literals, to the destination: bytes that mean nothing and fill the link.
    Burst(Vec<u8>),
    /// Control, to the source: what the link has carried.
    Carried {
        /// Bytes a second, at best.
        bytes_per_s: u64,
        /// More bursts would tell no more.
        enough: bool,
    },
}

const ASK: u8 = 1;
const ANSWER: u8 = 2;
const BURST: u8 = 3;
const CARRIED: u8 = 4;

impl Probe {
    /// Its name, for errors.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Ask { .. } => "Probe::Ask",
            Self::Answer { .. } => "Probe::Answer",
            Self::Burst(_) => "Probe::Burst",
            Self::Carried { .. } => "Probe::Carried",
        }
    }

    pub(super) fn write(&self, out: &mut Writer) {
        match self {
            Self::Ask { offer, ids } => {
                out.byte(ASK);
                write_offer(out, offer);
                out.varint(ids.len() as u64);
                ids.iter().for_each(|id| out.bytes(&id.0.to_be_bytes()));
            }
            Self::Answer { shared, postcopy, held } => {
                out.byte(ANSWER);
                write_accept(out, *shared, *postcopy);
                out.varint(held.len() as u64);
                for eight in held.chunks(8) {
                    out.byte(eight.iter().rev().fold(0, |byte, held| byte << 1 | u8::from(*held)));
                }
            }
            Self::Burst(bytes) => {
                out.byte(BURST);
                out.bytes(bytes);
            }
            Self::Carried { bytes_per_s, enough } => {
                out.byte(CARRIED);
                out.varint(*bytes_per_s);
                out.byte(u8::from(*enough));
            }
        }
    }

    pub(super) fn read(input: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(match input.byte("kind of probe")? {
            ASK => {
                let offer = read_offer(input)?;
                let count = input.count("sampled ids", limits::PROBE_IDS)?;
                let id = |_| Ok(ShortId(u64::from_be_bytes(input.array("sampled id")?)));
                Self::Ask { offer, ids: (0..count).map(id).collect::<Result<_, _>>()? }
            }
            ANSWER => {
                let (shared, postcopy) = read_accept(input)?;
                let count = input.count("sampled ids", limits::PROBE_IDS)?;
                let bits = input.take("held pages", count.div_ceil(8))?;
                let mut held: Vec<bool> =
                    bits.iter().flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1 == 1)).collect();
                if held.split_off(count).contains(&true) {
                    return Err(WireError::OutOfRange { field: "held pages" });
                }
                Self::Answer { shared, postcopy, held }
            }
            BURST => Self::Burst(input.rest().to_vec()),
            CARRIED => Self::Carried {
                bytes_per_s: input.varint("rate")?,
                enough: match input.byte("enough")? {
                    0 => false,
                    1 => true,
                    _ => return Err(WireError::OutOfRange { field: "enough" }),
                },
            },
            _ => return Err(WireError::OutOfRange { field: "kind of probe" }),
        })
    }
}
