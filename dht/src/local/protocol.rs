//! The frames of the local socket.
//!
//! A frame is `length:u32 kind:u8 body`, where `length` counts the kind and the body and is at most
//! [`LOCAL_FRAME_BYTES`]. Integers are big-endian; `[x]` is a 32-bit count and that many x.
//!
//! ```text
//! client to peer                                      peer to client
//! 0x01 Hello     magic:8 version:u16                  0x81 Welcome     version:u16 domain-block:64 peer-id:[u8]
//! 0x02 Register  name:[u8]                            0x82 Done
//!                extents:[gfn:u64 pages:u64 offset:u64]
//!                and one descriptor (SCM_RIGHTS)      0x82 Done; the registration lasts as the connection does
//! 0x08 Retain    on a registration's connection         0x87 Retained    pages:u64 bytes:u64
//! 0x03 Resolve   ids:[u64]                            0x83 Pages*      rung:u8 ids:[u64] pages:4096 each
//!                                                     0x88 Missing*    ids:[u64], 0x82 Done
//! 0x04 ReportWrong id:u64                             0x82 Done
//! 0x05 Status                                         0x84 Status      json:[u8]
//! 0x06 AddFile   path:[u8]                            0x85 FileAdded   pages:u64
//! 0x07 Locate    id:u64                               0x86 Located     [rung:u8 peer-id:[u8] what:[u8]]
//! any                                                 0x8f Failed      code:u8 text:[u8]
//! ```
//!
//! The answers to a Resolve come in any order, as they become known, and name each id of the request once: with its page, or as missing, which
//! is said as soon as nobody is left to ask. Whoever repeats an id in a request asks for it once.
//!
//! The version stands in both handshakes, in the same place for ever; a peer that does not speak the client's version answers
//! `Welcome` with its own version, so that both can say so, and closes.

use std::{ffi::OsString, fmt, os::unix::ffi::OsStringExt, path::PathBuf};

use page::{PAGE_SIZE, Page, ShortId};

pub use crate::codec::CodecError;
use crate::{
    codec::{Reader, cut, put_count, put_sized},
    limits::{
        ERROR_TEXT_BYTES, LOCAL_FRAME_BYTES, LOCAL_PAGES_PER_FRAME, LOCAL_RESOLVE_IDS, LOCATE_HOLDERS,
        MEMORY_EXTENTS, MEMORY_NAME_BYTES, PATH_BYTES, PEER_TEXT_BYTES,
    },
};

/// The version that this build speaks.
pub const PROTOCOL_VERSION: u16 = 2;
/// What a connection starts with.
pub const MAGIC: [u8; 8] = *b"ternsite";

const HELLO: u8 = 0x01;
const REGISTER: u8 = 0x02;
const RESOLVE: u8 = 0x03;
const REPORT_WRONG: u8 = 0x04;
const STATUS: u8 = 0x05;
const ADD_FILE: u8 = 0x06;
const LOCATE: u8 = 0x07;
const RETAIN: u8 = 0x08;
const WELCOME: u8 = 0x81;
const DONE: u8 = 0x82;
const PAGES: u8 = 0x83;
const STATUS_IS: u8 = 0x84;
const FILE_ADDED: u8 = 0x85;
const LOCATED: u8 = 0x86;
const RETAINED: u8 = 0x87;
const MISSING: u8 = 0x88;
const FAILED: u8 = 0x8f;

/// A stretch of a VM's memory: where it stands in the guest and in the memfd.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemoryExtent {
    /// The guest frame of its first page.
    pub first_gfn: u64,
    /// Its length in pages.
    pub pages: u64,
    /// The offset of its first page in the memfd, in bytes, a multiple of the page size.
    pub file_offset: u64,
}

/// Where a page was found.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum FoundOn {
    /// On this host.
    Host,
    /// On another host of the site.
    Site,
}

impl FoundOn {
    fn to_wire(self) -> u8 {
        match self {
            Self::Host => 0,
            Self::Site => 1,
        }
    }

    fn from_wire(value: u8) -> Result<Self, CodecError> {
        match value {
            0 => Ok(Self::Host),
            1 => Ok(Self::Site),
            other => Err(CodecError::Unknown { field: "rung", value: other.into() }),
        }
    }
}

/// Who holds a page.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Holder {
    /// On this host or another one.
    pub rung: FoundOn,
    /// The holder's libp2p identity.
    pub peer_id: String,
    /// What of the holder's contents has it, if this host knows; empty otherwise.
    pub what: String,
}

/// The secret block of the dedup domain, kept out of logs.
#[derive(Clone, PartialEq, Eq)]
pub struct DomainBlock(pub [u8; 64]);

impl fmt::Debug for DomainBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DomainBlock(secret)")
    }
}

/// Why the peer refused a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FailureCode {
    /// The request broke the protocol.
    BadRequest,
    /// The file or memory cannot be read.
    Unreadable,
    /// A bound of the peer is reached.
    Full,
    /// The peer is shutting down.
    Stopping,
    /// The peer keeps no checkpoints.
    RetainsNothing,
    /// The peer cannot write.
    NotWritten,
}

impl FailureCode {
    fn to_wire(self) -> u8 {
        match self {
            Self::BadRequest => 1,
            Self::Unreadable => 2,
            Self::Full => 3,
            Self::Stopping => 4,
            Self::RetainsNothing => 5,
            Self::NotWritten => 6,
        }
    }

    fn from_wire(value: u8) -> Result<Self, CodecError> {
        match value {
            1 => Ok(Self::BadRequest),
            2 => Ok(Self::Unreadable),
            3 => Ok(Self::Full),
            4 => Ok(Self::Stopping),
            5 => Ok(Self::RetainsNothing),
            6 => Ok(Self::NotWritten),
            other => Err(CodecError::Unknown { field: "failure code", value: other.into() }),
        }
    }
}

/// What a client sends.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request {
    /// The handshake.
    Hello {
        /// The client's protocol version.
        version: u16,
    },
    /// Offers a VM's memory; the frame carries one descriptor.
    Register {
        /// The VM's name, for people.
        name: String,
        /// Its memory.
        extents: Vec<MemoryExtent>,
    },
    /// Asks for pages.
    Resolve {
        /// Their ids.
        ids: Vec<ShortId>,
    },
    /// Says that a page from the peer did not have the name it was needed under.
    ReportWrong {
        /// The id it was asked by.
        id: ShortId,
    },
    /// Asks for the peer's state.
    Status,
    /// Asks the peer to index and serve a file.
    AddFile {
        /// Its absolute path.
        path: PathBuf,
    },
    /// Asks who holds a page.
    Locate {
        /// Its id.
        id: ShortId,
    },
    /// Asks the peer to keep a copy of the memory that was registered on this connection.
    Retain,
}

/// What the peer sends.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    /// The handshake.
    Welcome {
        /// The peer's protocol version.
        version: u16,
        /// The dedup domain.
        domain: DomainBlock,
        /// The peer's libp2p identity.
        peer_id: String,
    },
    /// The request is done.
    Done,
    /// Some of the pages asked for.
    Pages {
        /// Where they were found.
        rung: FoundOn,
        /// The pages, each with the id it was asked by.
        pages: Vec<(ShortId, Box<Page>)>,
    },
    /// Some of the pages asked for are neither on this host nor on the site.
    Missing {
        /// Their ids.
        ids: Vec<ShortId>,
    },
    /// The peer's state, as JSON of [`SiteStatus`](crate::SiteStatus).
    Status {
        /// The JSON text.
        json: Vec<u8>,
    },
    /// The file is served from now on, and being indexed.
    FileAdded {
        /// Its pages, the last one padded.
        pages: u64,
    },
    /// Who holds the page.
    Located {
        /// The holders.
        holders: Vec<Holder>,
    },
    /// A copy of the memory is kept.
    Retained {
        /// Its pages: what this host had in no file or checkpoint.
        pages: u64,
        /// What it takes on disk.
        bytes: u64,
    },
    /// The request failed.
    Failed {
        /// Why, for programs.
        code: FailureCode,
        /// Why, for people.
        message: String,
    },
}

impl Request {
    /// Appends the frame to `out`. Callers keep to the bounds: an oversized message is one that the other end refuses.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Hello { version } => frame(out, HELLO, |out| {
                out.extend_from_slice(&MAGIC);
                out.extend_from_slice(&version.to_be_bytes());
            }),
            Self::Register { name, extents } => frame(out, REGISTER, |out| {
                put_sized(out, name.as_bytes());
                put_count(out, extents.len());
                for extent in extents {
                    out.extend_from_slice(&extent.first_gfn.to_be_bytes());
                    out.extend_from_slice(&extent.pages.to_be_bytes());
                    out.extend_from_slice(&extent.file_offset.to_be_bytes());
                }
            }),
            Self::Resolve { ids } => frame(out, RESOLVE, |out| put_ids(out, ids)),
            Self::ReportWrong { id } => {
                frame(out, REPORT_WRONG, |out| out.extend_from_slice(&id.0.to_be_bytes()));
            }
            Self::Status => frame(out, STATUS, |_| {}),
            Self::AddFile { path } => {
                frame(out, ADD_FILE, |out| put_sized(out, path.as_os_str().as_encoded_bytes()));
            }
            Self::Locate { id } => frame(out, LOCATE, |out| out.extend_from_slice(&id.0.to_be_bytes())),
            Self::Retain => frame(out, RETAIN, |_| {}),
        }
    }

    /// Decodes the body of a frame.
    ///
    /// # Errors
    /// [`CodecError`] names the field that is wrong.
    pub fn decode(frame: Frame<'_>) -> Result<Self, CodecError> {
        let mut body = Reader::new(frame.body);
        let request = match frame.kind {
            HELLO => {
                let magic = body.array::<8>("magic")?;
                if *magic != MAGIC {
                    return Err(CodecError::Unknown { field: "magic", value: u64::from_be_bytes(*magic) });
                }
                Self::Hello { version: body.u16("version")? }
            }
            REGISTER => {
                let name = body.text(MEMORY_NAME_BYTES, "memory name")?;
                let count = body.count(MEMORY_EXTENTS, 24, "extents")?;
                let extents = (0..count).map(|_| extent(&mut body)).collect::<Result<_, _>>()?;
                Self::Register { name, extents }
            }
            RESOLVE => Self::Resolve { ids: ids(&mut body)? },
            REPORT_WRONG => Self::ReportWrong { id: ShortId(body.u64("id")?) },
            STATUS => Self::Status,
            ADD_FILE => {
                let path = body.sized(PATH_BYTES, "path")?;
                Self::AddFile { path: OsString::from_vec(path.to_vec()).into() }
            }
            LOCATE => Self::Locate { id: ShortId(body.u64("id")?) },
            RETAIN => Self::Retain,
            other => return Err(CodecError::Unknown { field: "request kind", value: other.into() }),
        };
        body.end()?;
        Ok(request)
    }
}

fn put_ids(out: &mut Vec<u8>, ids: &[ShortId]) {
    put_count(out, ids.len());
    ids.iter().for_each(|id| out.extend_from_slice(&id.0.to_be_bytes()));
}

fn ids(body: &mut Reader<'_>) -> Result<Vec<ShortId>, CodecError> {
    let count = body.count(LOCAL_RESOLVE_IDS, 8, "ids")?;
    (0..count).map(|_| Ok(ShortId(body.u64("id")?))).collect()
}

fn extent(body: &mut Reader<'_>) -> Result<MemoryExtent, CodecError> {
    Ok(MemoryExtent {
        first_gfn: body.u64("first frame")?,
        pages: body.u64("extent's pages")?,
        file_offset: body.u64("file offset")?,
    })
}

impl Answer {
    /// Appends the frame to `out`; texts are cut to their bounds.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Welcome { version, domain, peer_id } => frame(out, WELCOME, |out| {
                out.extend_from_slice(&version.to_be_bytes());
                out.extend_from_slice(&domain.0);
                put_sized(out, cut(peer_id, PEER_TEXT_BYTES).as_bytes());
            }),
            Self::Done => frame(out, DONE, |_| {}),
            Self::Pages { rung, pages } => {
                pages_head(*rung, pages.iter().map(|(id, _)| *id), out);
                pages.iter().for_each(|(_, page)| out.extend_from_slice(&page[..]));
            }
            Self::Missing { ids } => frame(out, MISSING, |out| put_ids(out, ids)),
            Self::Status { json } => frame(out, STATUS_IS, |out| put_sized(out, json)),
            Self::FileAdded { pages } => {
                frame(out, FILE_ADDED, |out| out.extend_from_slice(&pages.to_be_bytes()));
            }
            Self::Located { holders } => frame(out, LOCATED, |out| {
                put_count(out, holders.len());
                for holder in holders {
                    out.push(holder.rung.to_wire());
                    put_sized(out, cut(&holder.peer_id, PEER_TEXT_BYTES).as_bytes());
                    put_sized(out, cut(&holder.what, PATH_BYTES).as_bytes());
                }
            }),
            Self::Retained { pages, bytes } => frame(out, RETAINED, |out| {
                out.extend_from_slice(&pages.to_be_bytes());
                out.extend_from_slice(&bytes.to_be_bytes());
            }),
            Self::Failed { code, message } => frame(out, FAILED, |out| {
                out.push(code.to_wire());
                put_sized(out, cut(message, ERROR_TEXT_BYTES).as_bytes());
            }),
        }
    }

    /// Decodes the body of a frame.
    ///
    /// # Errors
    /// [`CodecError`] names the field that is wrong.
    pub fn decode(frame: Frame<'_>) -> Result<Self, CodecError> {
        let mut body = Reader::new(frame.body);
        let answer = match frame.kind {
            WELCOME => Self::Welcome {
                version: body.u16("version")?,
                domain: DomainBlock(*body.array("domain block")?),
                peer_id: body.text(PEER_TEXT_BYTES, "peer id")?,
            },
            DONE => Self::Done,
            PAGES => {
                let rung = FoundOn::from_wire(body.u8("rung")?)?;
                let count = body.count(LOCAL_PAGES_PER_FRAME, 8 + PAGE_SIZE, "pages")?;
                let ids = body.bytes(count * 8, "page ids")?.as_chunks::<8>().0;
                let bytes = body.bytes(count * PAGE_SIZE, "page bytes")?.as_chunks::<PAGE_SIZE>().0;
                let with_id = |(id, page): (&[u8; 8], &Page)| (ShortId(u64::from_be_bytes(*id)), boxed(page));
                Self::Pages { rung, pages: ids.iter().zip(bytes).map(with_id).collect() }
            }
            MISSING => Self::Missing { ids: ids(&mut body)? },
            STATUS_IS => Self::Status { json: body.sized(LOCAL_FRAME_BYTES, "status")?.to_vec() },
            FILE_ADDED => Self::FileAdded { pages: body.u64("pages")? },
            LOCATED => {
                let count = body.count(LOCATE_HOLDERS, 9, "holders")?;
                Self::Located { holders: (0..count).map(|_| holder(&mut body)).collect::<Result<_, _>>()? }
            }
            RETAINED => Self::Retained { pages: body.u64("pages")?, bytes: body.u64("bytes")? },
            FAILED => Self::Failed {
                code: FailureCode::from_wire(body.u8("failure code")?)?,
                message: body.text(ERROR_TEXT_BYTES, "failure text")?,
            },
            other => return Err(CodecError::Unknown { field: "answer kind", value: other.into() }),
        };
        body.end()?;
        Ok(answer)
    }

    /// The name of the frame, for error messages.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Welcome { .. } => "Welcome",
            Self::Done => "Done",
            Self::Pages { .. } => "Pages",
            Self::Missing { .. } => "Missing",
            Self::Status { .. } => "Status",
            Self::FileAdded { .. } => "FileAdded",
            Self::Located { .. } => "Located",
            Self::Retained { .. } => "Retained",
            Self::Failed { .. } => "Failed",
        }
    }
}

/// Appends a Pages frame up to its ids; the pages' bytes follow, in the order of the ids.
pub(crate) fn pages_head(rung: FoundOn, ids: impl ExactSizeIterator<Item = ShortId>, out: &mut Vec<u8>) {
    put_count(out, 1 + 1 + 4 + ids.len() * (8 + PAGE_SIZE));
    out.push(PAGES);
    out.push(rung.to_wire());
    put_count(out, ids.len());
    ids.for_each(|id| out.extend_from_slice(&id.0.to_be_bytes()));
}

fn holder(body: &mut Reader<'_>) -> Result<Holder, CodecError> {
    Ok(Holder {
        rung: FoundOn::from_wire(body.u8("rung")?)?,
        peer_id: body.text(PEER_TEXT_BYTES, "peer id")?,
        what: body.text(PATH_BYTES, "content name")?,
    })
}

/// A copy of a page on the heap, without a stop on the stack.
fn boxed(page: &Page) -> Box<Page> {
    Box::<[u8]>::from(&page[..]).try_into().expect("the slice has a page's length")
}

/// One frame, not yet decoded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Frame<'a> {
    /// Which message.
    pub kind: u8,
    /// Its fields.
    pub body: &'a [u8],
}

/// Takes the first frame off `bytes`: the frame and the count of bytes that it takes, or `None` while it is incomplete.
///
/// # Errors
/// [`CodecError::TooLarge`] if the length exceeds [`LOCAL_FRAME_BYTES`], [`CodecError::Truncated`] if it is zero (no kind).
pub fn take_frame(bytes: &[u8]) -> Result<Option<(Frame<'_>, usize)>, CodecError> {
    let Some((length, rest)) = bytes.split_first_chunk::<4>() else { return Ok(None) };
    let length = u32::from_be_bytes(*length);
    let size = usize::try_from(length).unwrap_or(usize::MAX);
    if size > LOCAL_FRAME_BYTES {
        let bound = LOCAL_FRAME_BYTES as u64;
        return Err(CodecError::TooLarge { field: "frame length", value: length.into(), bound });
    }
    if size == 0 {
        return Err(CodecError::Truncated { field: "kind" });
    }
    let Some((kind, body)) = rest.get(..size).and_then(<[u8]>::split_first) else { return Ok(None) };
    Ok(Some((Frame { kind: *kind, body }, 4 + size)))
}

/// Appends a frame whose body `fill` writes.
fn frame(out: &mut Vec<u8>, kind: u8, fill: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    out.push(kind);
    fill(out);
    let length = u32::try_from(out.len() - start - 4).expect("frames are bounded far below 4 GiB");
    out[start..start + 4].copy_from_slice(&length.to_be_bytes());
}

#[cfg(test)]
#[path = "protocol_tests.rs"]
mod tests;
