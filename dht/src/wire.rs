//! The messages between the peers of a site, over libp2p's request-response.
//!
//! A message is `length:u32 body`; integers are big-endian; `[x]` is a 32-bit count and that many x. The version stands in the
//! protocol's name, next to public fingerprints of the site and of the dedup domain, so that peers of another domain find no common protocol.
//!
//! ```text
//! /tern/SITE/DOMAIN/index/2   request   0x01 Announce ids:[u64]      response  0x01 Announced
//!                                       0x02 Lookup   ids:[u64]                0x02 Holders  peers:[[u8]] claims:[at:u32 peer:u16]
//! /tern/SITE/DOMAIN/pages/1   request   ids:[u64]                    response  ids:[u64] pages:4096 each
//! ```
//!
//! `at` is a place in the lookup's ids, `peer` one in the answer's peers.

use std::{fmt, io, marker::PhantomData};

use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use libp2p::{PeerId, StreamProtocol, request_response};
use page::{PAGE_SIZE, Page, ShortId};

pub use crate::codec::CodecError;
use crate::{
    codec::{Reader, put_count, put_sized},
    limits::{FETCH_BATCH, HOLDERS_PER_NAME, INDEX_BATCH, LOOKUP_BATCH, MEMBERS},
};

/// Bytes of a peer id on the wire at most (an inlined Ed25519 key takes 38).
const PEER_ID_BYTES: usize = 64;
/// Claims in one answer.
const CLAIMS: usize = LOOKUP_BATCH * HOLDERS_PER_NAME;

const ANNOUNCE: u8 = 1;
const LOOKUP: u8 = 2;

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
}

/// What an owner answers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum IndexResponse {
    /// Noted.
    Announced,
    /// The holders known.
    Holders {
        /// The peers that the claims speak of.
        peers: Vec<PeerId>,
        /// Places in the lookup's ids and in `peers`.
        claims: Vec<(u32, u16)>,
    },
}

/// A request for pages.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PagesRequest {
    /// The pages.
    pub ids: Vec<ShortId>,
}

/// Those of the pages that the holder has.
#[derive(Clone, PartialEq, Eq)]
pub struct PagesResponse {
    /// The pages, each with the id it was asked by.
    pub pages: Vec<(ShortId, Box<Page>)>,
}

impl fmt::Debug for PagesResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PagesResponse({} pages)", self.pages.len())
    }
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
    const BOUND: usize = 1 + 4 + LOOKUP_BATCH * 8;

    fn encode(&self, out: &mut Vec<u8>) {
        let (kind, ids) = match self {
            Self::Announce { ids } => (ANNOUNCE, ids),
            Self::Lookup { ids } => (LOOKUP, ids),
        };
        out.push(kind);
        put_ids(out, ids.iter().copied());
    }

    fn decode(body: &[u8]) -> Result<Self, CodecError> {
        let mut body = Reader::new(body);
        let request = match body.u8("kind")? {
            ANNOUNCE => Self::Announce { ids: ids(&mut body, INDEX_BATCH)? },
            LOOKUP => Self::Lookup { ids: ids(&mut body, LOOKUP_BATCH)? },
            other => return Err(CodecError::Unknown { field: "index request", value: other.into() }),
        };
        body.end()?;
        Ok(request)
    }
}

impl Message for IndexResponse {
    const BOUND: usize = 1 + 4 + MEMBERS * (4 + PEER_ID_BYTES) + 4 + CLAIMS * 6;

    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Announced => out.push(ANNOUNCE),
            Self::Holders { peers, claims } => {
                out.push(LOOKUP);
                put_count(out, peers.len());
                peers.iter().for_each(|peer| put_sized(out, &peer.to_bytes()));
                put_count(out, claims.len());
                for (at, peer) in claims {
                    out.extend_from_slice(&at.to_be_bytes());
                    out.extend_from_slice(&peer.to_be_bytes());
                }
            }
        }
    }

    fn decode(body: &[u8]) -> Result<Self, CodecError> {
        let mut body = Reader::new(body);
        let response = match body.u8("kind")? {
            ANNOUNCE => Self::Announced,
            LOOKUP => {
                let count = body.count(MEMBERS, 4, "peers")?;
                let peers = (0..count).map(|_| peer_id(&mut body)).collect::<Result<_, _>>()?;
                let count = body.count(CLAIMS, 6, "claims")?;
                let claims = (0..count)
                    .map(|_| Ok((body.u32("claim's id")?, body.u16("claim's peer")?)))
                    .collect::<Result<_, CodecError>>()?;
                Self::Holders { peers, claims }
            }
            other => return Err(CodecError::Unknown { field: "index response", value: other.into() }),
        };
        body.end()?;
        Ok(response)
    }
}

fn peer_id(body: &mut Reader<'_>) -> Result<PeerId, CodecError> {
    let bytes = body.sized(PEER_ID_BYTES, "peer id")?;
    PeerId::from_bytes(bytes).map_err(|_| CodecError::Unknown { field: "peer id", value: bytes.len() as u64 })
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
        put_ids(out, self.pages.iter().map(|(id, _)| *id));
        self.pages.iter().for_each(|(_, page)| out.extend_from_slice(&page[..]));
    }

    fn decode(body: &[u8]) -> Result<Self, CodecError> {
        let mut body = Reader::new(body);
        let ids = ids(&mut body, FETCH_BATCH)?;
        let pages = body.bytes(ids.len() * PAGE_SIZE, "pages")?.as_chunks::<PAGE_SIZE>().0;
        body.end()?;
        let boxed = |page: &Page| Box::<[u8]>::from(&page[..]).try_into().expect("a page's length");
        Ok(Self { pages: ids.into_iter().zip(pages.iter().map(boxed)).collect() })
    }
}

/// libp2p's view of a pair of messages.
pub(crate) struct MessageCodec<Q, R>(PhantomData<fn() -> (Q, R)>);

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
    // The buffer grows as bytes arrive: a length alone reserves nothing.
    let mut body = Vec::new();
    io.take(u64::from(length)).read_to_end(&mut body).await?;
    if body.len() < size {
        return Err(io::ErrorKind::UnexpectedEof.into());
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
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn round_trip<M: Message + PartialEq>(message: &M) {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        assert!(bytes.len() <= M::BOUND);
        assert_eq!(M::decode(&bytes).as_ref(), Ok(message));
        for cut in [0, 1, bytes.len() / 2, bytes.len() - 1] {
            assert!(cut == bytes.len() || M::decode(&bytes[..cut]).is_err(), "cut at {cut}");
        }
    }

    proptest! {
        #[test]
        fn messages_survive_the_wire(
            raw in prop::collection::vec(any::<u64>(), 0..FETCH_BATCH),
            claims in prop::collection::vec((any::<u32>(), any::<u16>()), 0..50),
        ) {
            let ids: Vec<_> = raw.into_iter().map(ShortId).collect();
            round_trip(&IndexRequest::Announce { ids: ids.clone() });
            round_trip(&IndexRequest::Lookup { ids: ids.clone() });
            round_trip(&IndexResponse::Announced);
            round_trip(&IndexResponse::Holders { peers: vec![PeerId::random(), PeerId::random()], claims });
            round_trip(&PagesResponse { pages: ids.iter().take(3).map(|id| (*id, Box::new([7; PAGE_SIZE]))).collect() });
            round_trip(&PagesRequest { ids });
        }

        #[test]
        fn any_bytes_are_decoded_or_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = (IndexRequest::decode(&bytes).is_ok(), IndexResponse::decode(&bytes).is_ok());
            let _ = (PagesRequest::decode(&bytes).is_ok(), PagesResponse::decode(&bytes).is_ok());
        }
    }

    #[test]
    fn the_bounds_hold_the_largest_messages() {
        let ids: Vec<_> = (0..LOOKUP_BATCH as u64).map(ShortId).collect();
        round_trip(&IndexRequest::Lookup { ids });
        let (peers, claims) = (vec![PeerId::random(); MEMBERS], vec![(u32::MAX, u16::MAX); CLAIMS]);
        round_trip(&IndexResponse::Holders { peers, claims });
        let pages = (0..FETCH_BATCH as u64).map(|id| (ShortId(id), Box::new([1; PAGE_SIZE]))).collect();
        round_trip(&PagesResponse { pages });
    }
}
