//! The messages between the peers of a site, over libp2p's request-response.
//!
//! A message is `length:u32 body`; integers are big-endian; `[x]` is a 32-bit count and that many x. The version stands in the
//! protocol's name, next to public fingerprints of the site and of the dedup domain, so that peers of another domain find no common protocol.
//!
//! ```text
//! /tern/SITE/DOMAIN/index/3   request   0x01 Announce ids:[u64]      response  0x01 Announced sampled:[shard:u8 bits:u8]
//!                                       0x02 Lookup   ids:[u64]                0x02 Holders  sampled:[shard:u8 bits:u8] peers:[id:[u8] address:[u8]]
//!                                                                                            claims:[at:u32 peer:u16]
//!                                       0x03 Digests  shard:u8 bits:u8         0x03 Digests  bits:u8 [holder:32 claims:u32 sum:u128]
//!                                       0x04 Claims   shard:u8 bits:u8         0x04 Claims   [id:u64 at:u16 left:u16]
//!                                                     from:u64 holders:[32]                  more:u8 next:u64
//! /tern/SITE/DOMAIN/pages/1   request   ids:[u64]                    response  ids:[u64] pages:4096 each
//! ```
//!
//! `sampled` is how the answering owner samples its shards, those left out of which it keeps every name ([`crate::sample`]); `bits` is how the claims in
//! question are sampled, by both owners.
//!
//! In Holders, a peer's address is a multiaddr in binary, empty if the owner knows none (who asks may never have met the holder); `at` is a place
//! in the lookup's ids and `peer` one in the answer's peers, whose highest bit says that the claim is hearsay: another owner passed it on. Digests and Claims are for the owners of a shard ([`crate::repair`]): a holder is a key in Kademlia's key space, `at` its
//! place in the request, `left` what its lease has left in seconds; if `more` is 1 the claims go on with the id `next`.

use std::{fmt, io, marker::PhantomData};

use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use libp2p::{Multiaddr, PeerId, StreamProtocol, request_response};
use page::{PAGE_SIZE, ShortId};

pub use crate::codec::CodecError;
use crate::{
    batch::PageBatch,
    codec::{Reader, put_count, put_sized},
    limits::{FETCH_BATCH, HOLDERS_PER_NAME, INDEX_BATCH, LOOKUP_BATCH, MEMBERS, PULL_CLAIMS, SAMPLING_BITS},
    repair::ClaimDigest,
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

    /// Decodes a body that may be kept, as one with pages is.
    ///
    /// # Errors
    /// As of [`Message::decode`].
    fn of_body(body: Vec<u8>) -> Result<Self, CodecError> {
        Self::decode(&body)
    }

    /// Appends the front of the body to `out` and returns the rest of it, to be written without a copy.
    fn parts(&self, out: &mut Vec<u8>) -> &[u8] {
        self.encode(out);
        &[]
    }
}

/// What an owner is asked or told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum IndexRequest {
    /// The sender holds these pages.
    Announce {
        /// The pages.
        ids: Vec<ShortId>,
    },
    /// Who holds these pages?
    Lookup {
        /// The pages.
        ids: Vec<ShortId>,
    },
    /// From another owner of the shard: what of each holder do you have?
    Digests {
        /// The shard.
        shard: ShardId,
        /// How whoever asks samples it.
        sampling: Sampling,
    },
    /// From another owner of the shard: the claims of these holders?
    Claims {
        /// The shard.
        shard: ShardId,
        /// The names that both owners keep.
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
    /// What is left of the lease, in seconds.
    pub left_seconds: u16,
}

/// What an owner answers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum IndexResponse {
    /// Noted, as far as the owner keeps the names.
    Announced {
        /// The shards of which the owner does not keep every name.
        sampled: Vec<(ShardId, Sampling)>,
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
    /// The digests of all holders in the shard.
    Digests {
        /// The names that both owners keep, of which the digests are.
        sampling: Sampling,
        /// A holder, and what its claims come to.
        digests: Vec<(MemberId, ClaimDigest)>,
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

/// A request for pages.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PagesRequest {
    /// The pages.
    pub ids: Vec<ShortId>,
}

/// Those of the pages that the holder has.
#[derive(PartialEq, Eq, Debug)]
pub struct PagesResponse {
    /// The pages, each with the id it was asked by.
    pub pages: PageBatch,
}

fn put_ids(out: &mut Vec<u8>, ids: impl ExactSizeIterator<Item = ShortId>) {
    put_count(out, ids.len());
    ids.for_each(|id| out.extend_from_slice(&id.0.to_be_bytes()));
}

fn ids(body: &mut Reader<'_>, bound: usize) -> Result<Vec<ShortId>, CodecError> {
    let count = body.count(bound, 8, "ids")?;
    let bytes = body.bytes(count * 8, "ids")?;
    Ok(bytes.as_chunks::<8>().0.iter().map(|id| ShortId(u64::from_be_bytes(*id))).collect())
}

impl Message for IndexRequest {
    /// Of the two that may be long, a lookup and the claims of all members.
    const BOUND: usize = 1 + 2 + 8 + 4 + LOOKUP_BATCH * 8;

    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Announce { ids } => {
                out.push(ANNOUNCE);
                put_ids(out, ids.iter().copied());
            }
            Self::Lookup { ids } => {
                out.push(LOOKUP);
                put_ids(out, ids.iter().copied());
            }
            Self::Digests { shard, sampling } => {
                out.extend_from_slice(&[DIGESTS, shard.0, sampling.zero_bits()]);
            }
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
            ANNOUNCE => Self::Announce { ids: ids(&mut body, INDEX_BATCH)? },
            LOOKUP => Self::Lookup { ids: ids(&mut body, LOOKUP_BATCH)? },
            DIGESTS => Self::Digests { shard: ShardId(body.u8("shard")?), sampling: sampling(&mut body)? },
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

const _: () = assert!(MEMBERS * HOLDER_BYTES <= LOOKUP_BATCH * 8);

impl Message for IndexResponse {
    /// Of the holders of a lookup, the longest.
    const BOUND: usize =
        1 + 4 + SHARDS * 2 + 4 + MEMBERS * (8 + PEER_ID_BYTES + ADDRESS_BYTES) + 4 + CLAIMS * 6;

    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Announced { sampled } => {
                out.push(ANNOUNCE);
                put_sampled(out, sampled);
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
            Self::Digests { sampling, digests } => {
                out.extend_from_slice(&[DIGESTS, sampling.zero_bits()]);
                put_count(out, digests.len());
                for (holder, ClaimDigest { claims, sum }) in digests {
                    out.extend_from_slice(&holder.0);
                    out.extend_from_slice(&claims.to_be_bytes());
                    out.extend_from_slice(&sum.to_be_bytes());
                }
            }
            Self::Claims { claims, next } => {
                out.push(CLAIMS_OF);
                put_count(out, claims.len());
                for PassedOn { id, holder, left_seconds } in claims {
                    out.extend_from_slice(&id.0.to_be_bytes());
                    out.extend_from_slice(&holder.to_be_bytes());
                    out.extend_from_slice(&left_seconds.to_be_bytes());
                }
                out.push(u8::from(next.is_some()));
                out.extend_from_slice(&next.unwrap_or(ShortId(0)).0.to_be_bytes());
            }
        }
    }

    fn decode(body: &[u8]) -> Result<Self, CodecError> {
        let mut body = Reader::new(body);
        let response = match body.u8("kind")? {
            ANNOUNCE => Self::Announced { sampled: sampled(&mut body)? },
            LOOKUP => {
                let sampled = sampled(&mut body)?;
                let count = body.count(MEMBERS, 8, "peers")?;
                let peers = (0..count).map(|_| holder_peer(&mut body)).collect::<Result<_, _>>()?;
                let count = body.count(CLAIMS, 6, "claims")?;
                let claims = (0..count).map(|_| claim(&mut body)).collect::<Result<_, _>>()?;
                Self::Holders { sampled, peers, claims }
            }
            DIGESTS => {
                let sampling = sampling(&mut body)?;
                let count = body.count(MEMBERS, DIGEST_BYTES, "digests")?;
                let digests = (0..count).map(|_| digest(&mut body)).collect::<Result<_, _>>()?;
                Self::Digests { sampling, digests }
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

const DIGEST_BYTES: usize = HOLDER_BYTES + 4 + 16;
const PASSED_ON_BYTES: usize = 8 + 2 + 2;
const _: () = {
    assert!(2 + 4 + MEMBERS * DIGEST_BYTES <= IndexResponse::BOUND);
    assert!(1 + 4 + PULL_CLAIMS * PASSED_ON_BYTES + 9 <= IndexResponse::BOUND);
};

fn claim(body: &mut Reader<'_>) -> Result<Claim, CodecError> {
    let (at, peer) = (body.u32("claim's id")?, body.u16("claim's peer")?);
    Ok(Claim { at, peer: peer & !HEARSAY, hearsay: peer & HEARSAY != 0 })
}

fn digest(body: &mut Reader<'_>) -> Result<(MemberId, ClaimDigest), CodecError> {
    let (holder, claims) = (holder(body)?, body.u32("digest's claims")?);
    let sum = u128::from_be_bytes(*body.array("digest's sum")?);
    Ok((holder, ClaimDigest { claims, sum }))
}

fn passed_on(body: &mut Reader<'_>) -> Result<PassedOn, CodecError> {
    let (id, holder) = (ShortId(body.u64("claim's id")?), body.u16("claim's holder")?);
    Ok(PassedOn { id, holder, left_seconds: body.u16("claim's lease")? })
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

impl Message for PagesRequest {
    const BOUND: usize = 4 + FETCH_BATCH * 8;

    fn encode(&self, out: &mut Vec<u8>) {
        put_ids(out, self.ids.iter().copied());
    }

    fn decode(body: &[u8]) -> Result<Self, CodecError> {
        let mut body = Reader::new(body);
        let ids = ids(&mut body, FETCH_BATCH)?;
        body.end()?;
        Ok(Self { ids })
    }
}

impl Message for PagesResponse {
    const BOUND: usize = 4 + FETCH_BATCH * (8 + PAGE_SIZE);

    fn encode(&self, out: &mut Vec<u8>) {
        out.reserve(4 + self.pages.len() * (8 + PAGE_SIZE));
        put_ids(out, self.pages.ids());
        self.pages.pieces().for_each(|piece| out.extend_from_slice(piece));
    }

    fn decode(body: &[u8]) -> Result<Self, CodecError> {
        Self::of_body(body.to_vec())
    }

    fn of_body(body: Vec<u8>) -> Result<Self, CodecError> {
        let mut reader = Reader::new(&body);
        let ids = ids(&mut reader, FETCH_BATCH)?;
        reader.bytes(ids.len() * PAGE_SIZE, "pages")?;
        reader.end()?;
        let start = body.len() - ids.len() * PAGE_SIZE;
        Ok(Self { pages: PageBatch::of_buffer(body, start, ids) })
    }

    fn parts(&self, out: &mut Vec<u8>) -> &[u8] {
        let mut pieces = self.pages.pieces();
        if let (Some(piece), None) = (pieces.next(), pieces.next()) {
            put_ids(out, self.pages.ids());
            return piece;
        }
        self.encode(out);
        &[]
    }
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
    M::of_body(body).map_err(invalid)
}

async fn write<M: Message, T: AsyncWrite + Unpin + Send>(io: &mut T, message: &M) -> io::Result<()> {
    let mut front = vec![0; 4];
    let rest = message.parts(&mut front);
    let length = u32::try_from(front.len() - 4 + rest.len()).map_err(io::Error::other)?;
    front[..4].copy_from_slice(&length.to_be_bytes());
    io.write_all(&front).await?;
    io.write_all(rest).await
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
