//! A connection for pages between two peers: TCP and TLS without Yamux, in blocking calls. It is authenticated before it comes here ([`crate::secure`]).
//!
//! ```text
//! asker                                             holder
//! domain:16            once, with the first request   (closes if it is not its own)
//! ids:[u64]            ─────────────────────────►
//!                      ◄─────────────────────────   ids:[u64] pages:4096 each      those that it has
//!                                               or   0xffffffff                     it is too busy for the request
//! ```
//!
//! Integers are big-endian, `[x]` is a 32-bit count and that many x, at most [`FETCH_BATCH`](crate::limits::FETCH_BATCH). There is one request at a time: who wants more at once
//! makes more connections. Both ends may close a connection between two requests.
//!
//! Blocking, because a page's way is then short: the thread that reads the socket decrypts, hashes and puts it in its place while it is in the
//! processor's cache, and the one that writes has read the file. Every wait has a deadline, looked at each [`PAGE_CONNECTION_LOOK`].

use std::{
    io::{self, BufRead as _, Read as _, Write as _},
    net::{Shutdown, TcpStream},
    sync::Arc,
    time::Instant,
};

use libp2p::PeerId;
use page::{DomainId, PAGE_SIZE, Page, ShortId};
use thiserror::Error;

use crate::{
    batch::PageBatch,
    codec::CodecError,
    limits::{PAGE_CONNECTION_LOOK, PAGE_WRITE_BYTES, SOCKET_READ_BYTES},
    wire::{Message as _, PageIds},
};

/// Why nothing more comes or goes on a connection for pages, unless it says that only the request failed.
#[derive(Debug, Error)]
pub(crate) enum PageError {
    #[error("the connection broke")]
    Io(#[source] io::Error),
    #[error("what came is not TLS's")]
    Tls(#[from] rustls::Error),
    #[error("the other end closed the connection")]
    Closed,
    #[error("the other end takes too long")]
    Late,
    #[error("the other end sent something malformed")]
    Malformed(#[from] CodecError),
    #[error("the other end is in the dedup domain {theirs:?}")]
    Domain { theirs: DomainId },
    /// The connection goes on.
    #[error("the holder is too busy for the request")]
    Busy,
}

/// Pages that came, those that were right, and how many were not.
pub(crate) struct Came {
    pub(crate) pages: PageBatch,
    pub(crate) wrong: usize,
}

/// One end of a connection.
#[derive(Debug)]
pub(crate) struct PageConnection {
    peer: PeerId,
    socket: Arc<TcpStream>,
    tls: rustls::Connection,
    /// What came and TLS has not taken yet.
    read: Vec<u8>,
    taken: usize,
    came: usize,
}

/// Ends a connection that is in use elsewhere, unless it is let be.
#[derive(Debug)]
pub(crate) struct Cancel(Option<Arc<TcpStream>>);

impl Cancel {
    pub(crate) fn let_be(mut self) {
        self.0 = None;
    }
}

impl Drop for Cancel {
    fn drop(&mut self) {
        // An error says that it has ended already.
        self.0.take().map(|socket| socket.shutdown(Shutdown::Both));
    }
}

impl PageConnection {
    /// `read` came on the socket and was not given to TLS.
    pub(crate) fn new(
        peer: PeerId,
        socket: TcpStream,
        mut tls: rustls::Connection,
        read: Vec<u8>,
    ) -> io::Result<Self> {
        socket.set_nonblocking(false)?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(PAGE_CONNECTION_LOOK))?;
        socket.set_write_timeout(Some(PAGE_CONNECTION_LOOK))?;
        // What is written is bounded by its writer.
        tls.set_buffer_limit(None);
        let came = read.len();
        Ok(Self { peer, socket: Arc::new(socket), tls, read, taken: 0, came })
    }

    /// Whom TLS and the proof have shown the other end to be.
    pub(crate) fn peer(&self) -> PeerId {
        self.peer
    }

    pub(crate) fn cancel(&self) -> Cancel {
        Cancel(Some(Arc::clone(&self.socket)))
    }

    /// Says which domain this end is in, along with what is written next.
    pub(crate) fn greet(&mut self, domain: DomainId) -> Result<(), PageError> {
        self.tls.writer().write_all(&domain.0).map_err(PageError::Io)
    }

    /// Hears which domain the other end is in.
    pub(crate) fn greeted(&mut self, domain: DomainId, by: Instant) -> Result<(), PageError> {
        let theirs = DomainId(self.array(by)?);
        if theirs == domain { Ok(()) } else { Err(PageError::Domain { theirs }) }
    }

    /// Sends a request.
    pub(crate) fn ask(&mut self, ids: &[ShortId], by: Instant) -> Result<(), PageError> {
        self.write(&PageIds::These(ids.to_vec()))?;
        self.flush(by)
    }

    /// Asks for pages, and takes them. `right` looks at each as it comes; it must be one of `ids`, which are distinct.
    pub(crate) fn fetch(
        &mut self,
        ids: &[ShortId],
        by: Instant,
        mut right: impl FnMut(ShortId, &Page) -> bool,
    ) -> Result<Came, PageError> {
        self.ask(ids, by)?;
        let mut open = ids.to_vec();
        open.sort_unstable();
        let mut open: Vec<(ShortId, bool)> = open.into_iter().map(|id| (id, true)).collect();
        // Whether a page that comes was asked for and has not come before.
        let mut wanted = |id: ShortId| {
            let place = open.binary_search_by_key(&id, |(id, _)| *id);
            place.is_ok_and(|place| std::mem::replace(&mut open[place].1, false))
        };
        let PageIds::These(coming) = self.read_ids(by)? else { return Err(PageError::Busy) };
        let mut buffer = Vec::with_capacity(coming.len() * PAGE_SIZE);
        let mut pages = Vec::with_capacity(coming.len());
        let mut unseen = (0u32..).zip(&coming);
        while buffer.len() < coming.len() * PAGE_SIZE {
            let more = self.plaintext(by)?;
            let length = more.len().min(coming.len() * PAGE_SIZE - buffer.len());
            let seen = buffer.len() / PAGE_SIZE;
            buffer.extend_from_slice(&more[..length]);
            self.consume(length);
            let whole = buffer[seen * PAGE_SIZE..].as_chunks::<PAGE_SIZE>().0;
            for (page, (number, id)) in whole.iter().zip(unseen.by_ref()) {
                if wanted(*id) && right(*id, page) {
                    pages.push((*id, number));
                }
            }
        }
        let wrong = coming.len() - pages.len();
        Ok(Came { pages: PageBatch::of_buffer(buffer, pages), wrong })
    }

    /// Waits for a request; `false` if none has begun to come within [`PAGE_CONNECTION_LOOK`].
    pub(crate) fn asked(&mut self) -> Result<bool, PageError> {
        match self.plaintext(Instant::now() + PAGE_CONNECTION_LOOK) {
            Ok(_) => Ok(true),
            Err(PageError::Late) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The ids of a request.
    pub(crate) fn request(&mut self, by: Instant) -> Result<Vec<ShortId>, PageError> {
        match self.read_ids(by)? {
            PageIds::These(ids) => Ok(ids),
            PageIds::Busy => {
                Err(CodecError::Unknown { field: "request's ids", value: u32::MAX.into() }.into())
            }
        }
    }

    /// Answers a request.
    pub(crate) fn answer(&mut self, pages: &PageBatch, by: Instant) -> Result<(), PageError> {
        self.write(&PageIds::These(pages.ids().collect()))?;
        for part in pages.pieces().flat_map(|piece| piece.chunks(PAGE_WRITE_BYTES)) {
            self.tls.writer().write_all(part).map_err(PageError::Io)?;
            if part.len() == PAGE_WRITE_BYTES {
                self.flush(by)?;
            }
        }
        self.flush(by)
    }

    /// Answers that this end is too busy.
    pub(crate) fn refuse(&mut self, by: Instant) -> Result<(), PageError> {
        self.write(&PageIds::Busy)?;
        self.flush(by)
    }

    fn write(&mut self, ids: &PageIds) -> Result<(), PageError> {
        let mut bytes = Vec::with_capacity(PageIds::BOUND);
        ids.encode(&mut bytes);
        self.tls.writer().write_all(&bytes).map_err(PageError::Io)
    }

    fn flush(&mut self, by: Instant) -> Result<(), PageError> {
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut &*self.socket) {
                Ok(0) => return Err(PageError::Closed),
                Ok(_) => {}
                Err(error) => waited(error)?,
            }
            // An end that reads a little at a time is late as well.
            if self.tls.wants_write() && Instant::now() >= by {
                return Err(PageError::Late);
            }
        }
        Ok(())
    }

    fn read_ids(&mut self, by: Instant) -> Result<PageIds, PageError> {
        let count = self.array(by)?;
        let mut bytes = vec![0; PageIds::COUNT_BYTES + PageIds::bytes_after(count)?];
        bytes[..PageIds::COUNT_BYTES].copy_from_slice(&count);
        self.read_exact(&mut bytes[PageIds::COUNT_BYTES..], by)?;
        Ok(PageIds::decode(&bytes)?)
    }

    fn array<const N: usize>(&mut self, by: Instant) -> Result<[u8; N], PageError> {
        let mut array = [0; N];
        self.read_exact(&mut array, by)?;
        Ok(array)
    }

    fn read_exact(&mut self, mut into: &mut [u8], by: Instant) -> Result<(), PageError> {
        while !into.is_empty() {
            let more = self.plaintext(by)?;
            let length = more.len().min(into.len());
            let (now, later) = into.split_at_mut(length);
            now.copy_from_slice(&more[..length]);
            into = later;
            self.consume(length);
        }
        Ok(())
    }

    /// What has come and was not consumed, at least a byte.
    fn plaintext(&mut self, by: Instant) -> Result<&[u8], PageError> {
        while self.tls.process_new_packets()?.plaintext_bytes_to_read() == 0 {
            if self.taken == self.came {
                self.receive(by)?;
            }
            let taken = self.tls.read_tls(&mut &self.read[self.taken..self.came]).map_err(PageError::Io)?;
            self.taken += taken;
        }
        self.tls.reader().into_first_chunk().map_err(PageError::Io)
    }

    fn consume(&mut self, bytes: usize) {
        self.tls.reader().consume(bytes);
    }

    /// Reads from the socket.
    fn receive(&mut self, by: Instant) -> Result<(), PageError> {
        self.read.resize(SOCKET_READ_BYTES, 0);
        loop {
            // An end that sends a little at a time is late as well.
            if Instant::now() >= by {
                return Err(PageError::Late);
            }
            match (&*self.socket).read(&mut self.read) {
                Ok(0) => return Err(PageError::Closed),
                Ok(came) => {
                    (self.taken, self.came) = (0, came);
                    return Ok(());
                }
                Err(error) => waited(error)?,
            }
        }
    }
}

/// Whether a call ended only because it had waited for long enough.
fn waited(error: io::Error) -> Result<(), PageError> {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted => Ok(()),
        _ => Err(PageError::Io(error)),
    }
}

#[cfg(test)]
#[path = "page_connection_tests.rs"]
mod tests;
