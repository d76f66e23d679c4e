//! The messages between the peers of a site: those about the index over libp2p's request-response, those for pages on connections of their own
//! (`page_connection.rs`).
//!
//! A message over libp2p is `length:u32 body`; integers are big-endian; `[x]` is a 32-bit count and that many x. The version stands in the
//! protocol's name, next to public fingerprints of the site and of the dedup domain, so that peers of another domain find no common protocol.
//!
//! ```text
//! /tern/SITE/DOMAIN/index/3   request   0x01 Announce serial:u64     response  0x01 Announced sampled:[shard:u8 bits:u8] anew:[shard:u8]
//!                                                     gone:[u64]
//!                                                     begins:[shard:u8]
//!                                                     ids:[u64]
//!                                                     [shard:u8 claims:u32 sum:u128]
//!                                       0x02 Lookup   ids:[u64]                0x02 Holders  sampled:[shard:u8 bits:u8] peers:[id:[u8] address:[u8]]
//!                                                                                            claims:[at:u32 peer:u16]
//!                                       0x03 Digests  shard:u8                 0x03 Digests  [holder:32 claims:u32 sum:u128 left:u32]
//!                                       0x04 Claims   shard:u8 bits:u8         0x04 Claims   [id:u64 at:u16]
//!                                                     from:u64 holders:[32]                  more:u8 next:u64
//! a page connection           request   ids:[u64]                    response  ids:[u64] pages:4096 each, or 0xffffffff: too busy
//! ```
//!
//! Announce is an [`Announcement`], and `anew` names the shards of its digests that the holder has to tell anew. `sampled` is how the
//! answering owner samples its shards, those left out of which it keeps every name ([`crate::sample`]); `bits` is how the claims asked for are sampled.
//!
//! In Holders, a peer's address is a multiaddr in binary, empty if the owner knows none (who asks may never have met the holder); `at` is a place
//! in the lookup's ids and `peer` one in the answer's peers, whose highest bit says that the claim is hearsay: another owner passed it on. Digests and Claims are for the owners of a shard ([`crate::repair`]): a holder is a key in Kademlia's key space, `at` its
//! place in the request, `left` what its lease has left in milliseconds; if `more` is 1 the claims go on with the id `next`.

use std::{fmt, io, marker::PhantomData, time::Duration};

use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use libp2p::{Multiaddr, PeerId, StreamProtocol, request_response};
use page::ShortId;

pub use crate::codec::CodecError;
use crate::{
    claims::{Announcement, ClaimDigest, ShareDigest, put_ids, put_shards, take_ids, take_shards},
    codec::{Reader, put_count, put_sized},
    limits::{FETCH_BATCH, HOLDERS_PER_NAME, LOOKUP_BATCH, MEMBERS, PULL_CLAIMS, SAMPLING_BITS},
    sample::Sampling,
    shard::{MemberId, SHARDS, ShardId},
};

/// What a message's reader makes room for at once.
const READ_STEP_BYTES: usize = 64 << 10;
/// Bytes of a peer id on the wire at most (an inlined Ed25519 key takes 38).
const PEER_ID_BYTES: usize = 64;
/// Bytes of an address on the wire at most (IPv6, TCP and the peer's id take 60).
const ADDRESS_BYTES: usize = 64;
/// Claims in one answer.
const CLAIMS: usize = LOOKUP_BATCH * HOLDERS_PER_NAME;

/// Bytes of a holder's key.
const HOLDER_BYTES: usize = 32;
/// The bit of a claim's peer that makes it hearsay.
const HEARSAY: u16 = 1 << 15;
const _: () = assert!(MEMBERS < HEARSAY as usize);

const ANNOUNCE: u8 = 1;
const LOOKUP: u8 = 2;
const DIGESTS: u8 = 3;
const CLAIMS_OF: u8 = 4;

/// A message with a bounded encoding.
pub trait Message: Sized + Send + Sync + fmt::Debug + 'static {
    /// The longest body in bytes.
    const BOUND: usize;
    /// Appends the body to `out`.
    fn encode(&self, out: &mut Vec<u8>);
    /// Decodes a body.
    ///
    /// # Errors
    /// [`CodecError`] names the field that is wrong.
    fn decode(body: &[u8]) -> Result<Self, CodecError>;
}

/// What an owner is asked or told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum IndexRequest {
    /// What the sender holds, and no longer holds.
    Announce(Announcement),
    /// Who holds these pages?
    Lookup {
        /// The pages.
        ids: Vec<ShortId>,
    },
    /// From another owner of the shard: what of each holder do you have?
    Digests {
        /// The shard.
        shard: ShardId,
    },
    /// From another owner of the shard: the claims of these holders?
    Claims {
        /// The shard.
        shard: ShardId,
        /// The names that whoever asks keeps.
        sampling: Sampling,
        /// The first id.
        from: ShortId,
        /// The holders.
        holders: Vec<MemberId>,
    },
}

/// That a peer holds a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Claim {
    /// The place of the page in the lookup.
    pub at: u32,
    /// The place of the holder in the answer's peers.
    pub peer: u16,
    /// Whether another owner passed it on, rather than the holder having announced it.
    pub hearsay: bool,
}

/// A claim that one owner passes on to another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PassedOn {
    /// The page.
    pub id: ShortId,
    /// The place of the holder in the request.
    pub holder: u16,
}

/// What an owner answers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum IndexResponse {
    /// Noted, as far as the owner keeps the names.
    Announced {
        /// The shards of which the owner does not keep every name.
        sampled: Vec<(ShardId, Sampling)>,
        /// Shards whose digests are not those of what the owner was told.
        anew: Vec<ShardId>,
    },
    /// The holders known.
    Holders {
        /// The shards of which the owner does not keep every name.
        sampled: Vec<(ShardId, Sampling)>,
        /// The peers that the claims speak of.
        peers: Vec<HolderPeer>,
        /// Who holds what.
        claims: Vec<Claim>,
    },
    /// What holders have told of the shard.
    Digests {
        /// Their shares.
        shares: Vec<ShareDigest>,
    },
    /// The claims asked for.
    Claims {
        /// In the order of their ids.
        claims: Vec<PassedOn>,
        /// Where they go on, if that was not all.
        next: Option<ShortId>,
    },
}

/// A holder, and where it can be dialled.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HolderPeer {
    /// Its identity, which it proves when it is dialled.
    pub peer: PeerId,
    /// Its address, if the owner knows one.
    pub address: Option<Multiaddr>,
}

/// What a page connection's request is, and what its answer begins with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PageIds {
    /// In a request the pages asked for, at most [`FETCH_BATCH`]. In an answer those that follow.
    These(Vec<ShortId>),
    /// In an answer: the holder is too busy.
    Busy,
}

/// What [`PageIds::Busy`] has in place of a count.
const BUSY: [u8; PageIds::COUNT_BYTES] = [0xff; PageIds::COUNT_BYTES];

impl PageIds {
    /// Bytes of what says how many ids follow.
    pub const COUNT_BYTES: usize = 4;

    /// How many bytes of ids follow a count.
    ///
    /// # Errors
    /// [`CodecError::TooLarge`].
    pub fn bytes_after(count: [u8; Self::COUNT_BYTES]) -> Result<usize, CodecError> {
        if count == BUSY {
            return Ok(0);
        }
        let value = u32::from_be_bytes(count);
        match usize::try_from(value) {
            Ok(count) if count <= FETCH_BATCH => Ok(count * 8),
            Ok(_) | Err(_) => {
                let bound = FETCH_BATCH as u64;
                Err(CodecError::TooLarge { field: "ids", value: value.into(), bound })
            }
        }
    }
}

impl Message for PageIds {
    const BOUND: usize = Self::COUNT_BYTES + FETCH_BATCH * 8;

    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::These(ids) => put_ids(out, ids.iter().copied()),
            Self::Busy => out.extend_from_slice(&BUSY),
        }
    }

    fn decode(body: &[u8]) -> Result<Self, CodecError> {
        if body == BUSY {
            return Ok(Self::Busy);
        }
        let mut body = Reader::new(body);
        let ids = take_ids(&mut body, FETCH_BATCH)?;
        body.end()?;
        Ok(Self::These(ids))
    }
}

impl Message for IndexRequest {
    /// Of the two that may be long, a lookup and the claims of all members.
    const BOUND: usize = 1 + 2 + 8 + 4 + LOOKUP_BATCH * 8;

    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Announce(announcement) => {
                out.push(ANNOUNCE);
                announcement.encode(out);
            }
            Self::Lookup { ids } => {
                out.push(LOOKUP);
                put_ids(out, ids.iter().copied());
            }
            Self::Digests { shard } => out.extend_from_slice(&[DIGESTS, shard.0]),
            Self::Claims { shard, sampling, from, holders } => {
                out.extend_from_slice(&[CLAIMS_OF, shard.0, sampling.zero_bits()]);
                out.extend_from_slice(&from.0.to_be_bytes());
                put_count(out, holders.len());
                holders.iter().for_each(|holder| out.extend_from_slice(&holder.0));
            }
        }
    }

    fn decode(body: &[u8]) -> Result<Self, CodecError> {
        let mut body = Reader::new(body);
        let request = match body.u8("kind")? {
            ANNOUNCE => Self::Announce(Announcement::decode(&mut body)?),
            LOOKUP => Self::Lookup { ids: take_ids(&mut body, LOOKUP_BATCH)? },
            DIGESTS => Self::Digests { shard: ShardId(body.u8("shard")?) },
            CLAIMS_OF => {
                let (shard, sampling) = (ShardId(body.u8("shard")?), sampling(&mut body)?);
                let from = ShortId(body.u64("first id")?);
                let count = body.count(MEMBERS, HOLDER_BYTES, "holders")?;
                let holders = (0..count).map(|_| holder(&mut body)).collect::<Result<_, _>>()?;
                Self::Claims { shard, sampling, from, holders }
            }
            other => return Err(CodecError::Unknown { field: "index request", value: other.into() }),
        };
        body.end()?;
        Ok(request)
    }
}

fn sampling(body: &mut Reader<'_>) -> Result<Sampling, CodecError> {
    const FIELD: &str = "sampled bits";
    let bits = body.u8(FIELD)?;
    let bound = u64::from(SAMPLING_BITS);
    Sampling::new(bits).ok_or(CodecError::TooLarge { field: FIELD, value: bits.into(), bound })
}

fn put_sampled(out: &mut Vec<u8>, sampled: &[(ShardId, Sampling)]) {
    put_count(out, sampled.len());
    sampled.iter().for_each(|(shard, sampling)| out.extend_from_slice(&[shard.0, sampling.zero_bits()]));
}

fn sampled(body: &mut Reader<'_>) -> Result<Vec<(ShardId, Sampling)>, CodecError> {
    let count = body.count(SHARDS, 2, "sampled shards")?;
    (0..count).map(|_| Ok((ShardId(body.u8("sampled shard")?), sampling(body)?))).collect()
}

fn holder(body: &mut Reader<'_>) -> Result<MemberId, CodecError> {
    Ok(MemberId(*body.array::<HOLDER_BYTES>("holder")?))
}

const _: () = {
    assert!(MEMBERS * HOLDER_BYTES <= LOOKUP_BATCH * 8);
    assert!(Announcement::BOUND < IndexRequest::BOUND);
};

impl Message for IndexResponse {
    /// Of the holders of a lookup, the longest.
    const BOUND: usize =
        1 + 4 + SHARDS * 2 + 4 + MEMBERS * (8 + PEER_ID_BYTES + ADDRESS_BYTES) + 4 + CLAIMS * 6;

    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Announced { sampled, anew } => {
                out.push(ANNOUNCE);
                put_sampled(out, sampled);
                put_shards(out, anew);
            }
            Self::Holders { sampled, peers, claims } => {
                out.push(LOOKUP);
                put_sampled(out, sampled);
                put_count(out, peers.len());
                for HolderPeer { peer, address } in peers {
                    put_sized(out, &peer.to_bytes());
                    let address = address.as_ref().map_or(&[][..], AsRef::as_ref);
                    put_sized(out, if address.len() <= ADDRESS_BYTES { address } else { &[] });
                }
                put_count(out, claims.len());
                for Claim { at, peer, hearsay } in claims {
                    let peer = peer | if *hearsay { HEARSAY } else { 0 };
                    out.extend_from_slice(&at.to_be_bytes());
                    out.extend_from_slice(&peer.to_be_bytes());
                }
            }
            Self::Digests { shares } => {
                out.push(DIGESTS);
                put_count(out, shares.len());
                for ShareDigest { holder, digest, left } in shares {
                    out.extend_from_slice(&holder.0);
                    digest.encode(out);
                    let left_ms = u32::try_from(left.as_millis()).unwrap_or(u32::MAX);
                    out.extend_from_slice(&left_ms.to_be_bytes());
                }
            }
            Self::Claims { claims, next } => {
                out.push(CLAIMS_OF);
                put_count(out, claims.len());
                for PassedOn { id, holder } in claims {
                    out.extend_from_slice(&id.0.to_be_bytes());
                    out.extend_from_slice(&holder.to_be_bytes());
                }
                out.push(u8::from(next.is_some()));
                out.extend_from_slice(&next.unwrap_or(ShortId(0)).0.to_be_bytes());
            }
        }
    }

    fn decode(body: &[u8]) -> Result<Self, CodecError> {
        let mut body = Reader::new(body);
        let response = match body.u8("kind")? {
            ANNOUNCE => Self::Announced { sampled: sampled(&mut body)?, anew: take_shards(&mut body)? },
            LOOKUP => {
                let sampled = sampled(&mut body)?;
                let count = body.count(MEMBERS, 8, "peers")?;
                let peers = (0..count).map(|_| holder_peer(&mut body)).collect::<Result<_, _>>()?;
                let count = body.count(CLAIMS, 6, "claims")?;
                let claims = (0..count).map(|_| claim(&mut body)).collect::<Result<_, _>>()?;
                Self::Holders { sampled, peers, claims }
            }
            DIGESTS => {
                let count = body.count(MEMBERS, SHARE_BYTES, "digests")?;
                let shares = (0..count).map(|_| share(&mut body)).collect::<Result<_, _>>()?;
                Self::Digests { shares }
            }
            CLAIMS_OF => {
                let count = body.count(PULL_CLAIMS, PASSED_ON_BYTES, "claims")?;
                let claims = (0..count).map(|_| passed_on(&mut body)).collect::<Result<_, _>>()?;
                let (more, next) = (body.u8("more")?, ShortId(body.u64("next id")?));
                let next = match (more, next) {
                    (0, ShortId(0)) => None,
                    (1, next) => Some(next),
                    (other, _) => return Err(CodecError::Unknown { field: "more", value: other.into() }),
                };
                Self::Claims { claims, next }
            }
            other => return Err(CodecError::Unknown { field: "index response", value: other.into() }),
        };
        body.end()?;
        Ok(response)
    }
}

const SHARE_BYTES: usize = HOLDER_BYTES + ClaimDigest::BYTES + 4;
const PASSED_ON_BYTES: usize = 8 + 2;
const _: () = {
    assert!(1 + 4 + MEMBERS * SHARE_BYTES <= IndexResponse::BOUND);
    assert!(1 + 4 + PULL_CLAIMS * PASSED_ON_BYTES + 9 <= IndexResponse::BOUND);
};

fn claim(body: &mut Reader<'_>) -> Result<Claim, CodecError> {
    let (at, peer) = (body.u32("claim's id")?, body.u16("claim's peer")?);
    Ok(Claim { at, peer: peer & !HEARSAY, hearsay: peer & HEARSAY != 0 })
}

fn share(body: &mut Reader<'_>) -> Result<ShareDigest, CodecError> {
    let (holder, digest) = (holder(body)?, ClaimDigest::decode(body)?);
    Ok(ShareDigest { holder, digest, left: Duration::from_millis(body.u32("lease")?.into()) })
}

fn passed_on(body: &mut Reader<'_>) -> Result<PassedOn, CodecError> {
    Ok(PassedOn { id: ShortId(body.u64("claim's id")?), holder: body.u16("claim's holder")? })
}

fn peer_id(body: &mut Reader<'_>) -> Result<PeerId, CodecError> {
    let bytes = body.sized(PEER_ID_BYTES, "peer id")?;
    PeerId::from_bytes(bytes).map_err(|_| CodecError::Unknown { field: "peer id", value: bytes.len() as u64 })
}

fn holder_peer(body: &mut Reader<'_>) -> Result<HolderPeer, CodecError> {
    let peer = peer_id(body)?;
    let bytes = body.sized(ADDRESS_BYTES, "address")?;
    let malformed = |_| CodecError::Unknown { field: "address", value: bytes.len() as u64 };
    let address = match bytes {
        [] => None,
        bytes => Some(Multiaddr::try_from(bytes.to_vec()).map_err(malformed)?),
    };
    Ok(HolderPeer { peer, address })
}

/// libp2p's view of a pair of messages.
#[derive(Debug)]
pub struct MessageCodec<Q, R>(PhantomData<fn() -> (Q, R)>);

impl<Q, R> Default for MessageCodec<Q, R> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<Q, R> Clone for MessageCodec<Q, R> {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl<Q: Message, R: Message> request_response::Codec for MessageCodec<Q, R> {
    type Protocol = StreamProtocol;
    type Request = Q;
    type Response = R;

    async fn read_request<T: AsyncRead + Unpin + Send>(
        &mut self,
        _: &StreamProtocol,
        io: &mut T,
    ) -> io::Result<Q> {
        read(io).await
    }

    async fn read_response<T: AsyncRead + Unpin + Send>(
        &mut self,
        _: &StreamProtocol,
        io: &mut T,
    ) -> io::Result<R> {
        read(io).await
    }

    async fn write_request<T: AsyncWrite + Unpin + Send>(
        &mut self,
        _: &StreamProtocol,
        io: &mut T,
        request: Q,
    ) -> io::Result<()> {
        write(io, &request).await
    }

    async fn write_response<T: AsyncWrite + Unpin + Send>(
        &mut self,
        _: &StreamProtocol,
        io: &mut T,
        response: R,
    ) -> io::Result<()> {
        write(io, &response).await
    }
}

async fn read<M: Message, T: AsyncRead + Unpin + Send>(io: &mut T) -> io::Result<M> {
    let invalid = |error: CodecError| io::Error::new(io::ErrorKind::InvalidData, error);
    let mut length = [0; 4];
    io.read_exact(&mut length).await?;
    let length = u32::from_be_bytes(length);
    let size = usize::try_from(length).unwrap_or(usize::MAX);
    if size > M::BOUND {
        let bound = M::BOUND as u64;
        return Err(invalid(CodecError::TooLarge { field: "message length", value: length.into(), bound }));
    }
    // The buffer is touched as bytes arrive: a length alone takes addresses and no memory.
    let mut body = Vec::with_capacity(size);
    while body.len() < size {
        let from = body.len();
        body.resize(size.min(from + READ_STEP_BYTES), 0);
        io.read_exact(&mut body[from..]).await?;
    }
    M::decode(&body).map_err(invalid)
}

async fn write<M: Message, T: AsyncWrite + Unpin + Send>(io: &mut T, message: &M) -> io::Result<()> {
    let mut bytes = vec![0; 4];
    message.encode(&mut bytes);
    let length = u32::try_from(bytes.len() - 4).map_err(io::Error::other)?;
    bytes[..4].copy_from_slice(&length.to_be_bytes());
    io.write_all(&bytes).await
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
