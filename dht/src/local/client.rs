//! The client of the local socket, as a `vmm` uses it.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use page::{Domain, PAGE_SIZE, Page, ShortId};
use rustix::{
    fs::OFlags,
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::UnixStream,
    sync::{mpsc, oneshot},
    time::timeout,
};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    error::SiteError,
    protocol::{Answer, FoundOn, Holder, MemoryExtent, PROTOCOL_VERSION, Request, take_frame},
    question::Question,
};
use crate::{
    limits::{
        CLIENT_TOLD_QUEUE, LOCAL_ANSWER_TIMEOUT, LOCAL_RESOLVE_IDS, MEMORY_EXTENTS, MEMORY_NAME_BYTES,
        MEMORY_PAGES, PATH_BYTES, REREGISTER_EVERY, SOCKET_PATH_BYTES,
    },
    status::SiteStatus,
};

/// How much the client reads at once: a full frame of pages and then some.
const READ_BYTES: usize = 512 << 10;

/// A page that the site has.
#[derive(Debug)]
pub struct Found {
    /// The id that was asked for.
    pub id: ShortId,
    /// Where it was found.
    pub rung: FoundOn,
    /// Its bytes. The peer checked them against the id, this process has not.
    pub bytes: Box<Page>,
}

/// What the site says of pages that it was asked for.
#[derive(Debug)]
pub enum Told {
    /// It has this one.
    Found(Found),
    /// Nobody has these, as far as the index knows: there is no one left to ask.
    Missing(Vec<ShortId>),
}

/// The site's peer of this host, as its VMs see it. Cheap to clone; operations may run at once, each opens its own
/// connection. A peer that restarts (with the same domain) is found again by the next operation.
#[derive(Clone, Debug)]
pub struct SiteClient {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    socket: PathBuf,
    domain: Domain,
    peer_id: String,
}

/// Keeps a VM's memory with the peer; dropping it, or the end of the process, takes the memory back.
#[derive(Debug)]
pub struct Registration {
    _stop: DropGuard,
    retain: mpsc::Sender<oneshot::Sender<Result<Retained, SiteError>>>,
}

/// A copy of a memory that the peer keeps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Retained {
    /// Its pages: what the peer had in no file or other checkpoint.
    pub pages: u64,
    /// Bytes that it takes on disk.
    pub bytes: u64,
}

impl Registration {
    /// Asks the peer to keep a copy of the memory, for a VM that has left and may come back. It takes about as long as hashing and writing the memory;
    /// the caller bounds its patience, and dropping the registration ends the copying.
    ///
    /// # Errors
    /// [`SiteError::Refused`] if the peer keeps no checkpoints or has no room, and those of the connection.
    pub async fn retain(&self) -> Result<Retained, SiteError> {
        let (reply, answer) = oneshot::channel();
        self.retain.send(reply).await.map_err(|_| SiteError::Closed)?;
        answer.await.map_err(|_| SiteError::Closed)?
    }
}

impl SiteClient {
    /// Connects to the peer that serves `socket`, and learns its domain and identity.
    ///
    /// # Errors
    /// [`SiteError::Connect`] if nobody listens there, [`SiteError::Version`] if the peer speaks another version, and
    /// the errors of a connection that breaks.
    pub async fn connect(socket: &Path) -> Result<Self, SiteError> {
        let (_, welcome) = Connection::open(socket).await?;
        let shared = Shared { socket: socket.to_owned(), domain: welcome.domain, peer_id: welcome.peer_id };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// The dedup domain of the site.
    #[must_use]
    pub fn domain(&self) -> &Domain {
        &self.shared.domain
    }

    /// The libp2p identity of the peer, as it was at connect.
    #[must_use]
    pub fn peer_id(&self) -> &str {
        &self.shared.peer_id
    }

    /// Offers a VM's memory to the site. The peer reads it through the descriptor, which must be read-only. When this
    /// returns the peer has taken it; indexing goes on behind. Should the peer restart, the memory is offered again.
    ///
    /// # Errors
    /// [`SiteError::TooLarge`] beyond the bounds of [`limits`](crate::limits), [`SiteError::WritableMemory`], and the errors of
    /// the connection and of the peer.
    pub async fn register_memory(
        &self,
        name: &str,
        memfd: OwnedFd,
        extents: &[MemoryExtent],
    ) -> Result<Registration, SiteError> {
        bounded("the memory's name in bytes", name.len() as u64, MEMORY_NAME_BYTES as u64)?;
        bounded("the memory's extents", extents.len() as u64, MEMORY_EXTENTS as u64)?;
        let pages = extents.iter().fold(0u64, |sum, e| sum.saturating_add(e.pages));
        bounded("the memory's pages", pages, MEMORY_PAGES)?;
        let flags = rustix::fs::fcntl_getfl(&memfd).map_err(io::Error::from)?;
        if flags & OFlags::RWMODE != OFlags::RDONLY {
            return Err(SiteError::WritableMemory);
        }
        let request = Request::Register { name: name.to_owned(), extents: extents.to_vec() };
        let connection = self.register(&request, memfd.as_fd()).await?;
        let stop = CancellationToken::new();
        let (retain, wishes) = mpsc::channel(1);
        let keep = keep_registered(self.clone(), connection, request, memfd, wishes);
        tokio::spawn(stop.clone().run_until_cancelled_owned(keep));
        Ok(Registration { _stop: stop.drop_guard(), retain })
    }

    async fn register(&self, request: &Request, memfd: BorrowedFd<'_>) -> Result<Connection, SiteError> {
        let mut connection = self.open().await?;
        connection.send_with_descriptor(request, memfd).await?;
        match connection.short_answer().await? {
            Answer::Done => Ok(connection),
            other => Err(unexpected(other)),
        }
    }

    /// Asks for the pages of `ids`, on this host and then in the site. The channel yields them in any order, as they are found, and which
    /// of them are missing, as soon as that is certain: each id once. It closes when all is said, or earlier when the peer is lost or breaks
    /// the protocol; dropping the receiver cancels. Pages are checked against their ids by the peer, and still to be verified by whoever
    /// installs them.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    #[must_use]
    pub fn resolve(&self, ids: Vec<ShortId>) -> mpsc::Receiver<Told> {
        let (told, receiver) = mpsc::channel(CLIENT_TOLD_QUEUE);
        let client = self.clone();
        tokio::spawn(async move {
            let asked = ids.len();
            let gone = told.clone();
            tokio::select! {
                () = gone.closed() => {}
                result = client.resolve_into(&ids, &told) => if let Err(error) = result {
                    tracing::warn!(asked, error = &error as &dyn std::error::Error, "the site's peer did not answer to the end of a resolve");
                }
            }
        });
        receiver
    }

    async fn resolve_into(&self, ids: &[ShortId], told: &mpsc::Sender<Told>) -> Result<(), SiteError> {
        let mut connection = self.open().await?;
        for ids in ids.chunks(LOCAL_RESOLVE_IDS) {
            connection.send(&Request::Resolve { ids: ids.to_vec() }).await?;
            let mut question = Question::new(ids);
            loop {
                match connection.answer().await? {
                    Answer::Pages { rung, pages } => {
                        for (id, bytes) in pages {
                            question.answered(id)?;
                            if told.send(Told::Found(Found { id, rung, bytes })).await.is_err() {
                                return Ok(());
                            }
                        }
                    }
                    Answer::Missing { ids } => {
                        ids.iter().try_for_each(|id| question.answered(*id))?;
                        if told.send(Told::Missing(ids)).await.is_err() {
                            return Ok(());
                        }
                    }
                    Answer::Done => {
                        question.ended()?;
                        break;
                    }
                    other => return Err(unexpected(other)),
                }
            }
        }
        Ok(())
    }

    /// Tells the peer that a page it delivered for `id` did not have the full name that was needed, so that it checks its
    /// source and avoids a holder that lies. A failure to tell is logged: the caller has nothing to do about it.
    pub async fn report_wrong(&self, id: ShortId) {
        let told = async {
            match self.ask(&Request::ReportWrong { id }).await? {
                Answer::Done => Ok(()),
                other => Err(unexpected(other)),
            }
        };
        if let Err(error) = told.await {
            tracing::warn!(
                ?id,
                error = &error as &dyn std::error::Error,
                "could not report a wrong page to the site's peer"
            );
        }
    }

    /// The peer's state.
    ///
    /// # Errors
    /// Those of the connection and of the peer.
    pub async fn status(&self) -> Result<SiteStatus, SiteError> {
        match self.ask(&Request::Status).await? {
            Answer::Status { json } => serde_json::from_slice(&json)
                .map_err(|_| SiteError::Unexpected { got: "a status that is not one" }),
            other => Err(unexpected(other)),
        }
    }

    /// Has the peer index and serve a file; returns its pages. Indexing goes on behind.
    ///
    /// # Errors
    /// [`SiteError::Refused`] if the peer cannot read it or serves too many already, and those of the connection.
    pub async fn add_file(&self, path: &Path) -> Result<u64, SiteError> {
        let path = std::path::absolute(path)?;
        bounded("the path's bytes", path.as_os_str().len() as u64, PATH_BYTES as u64)?;
        match self.ask(&Request::AddFile { path }).await? {
            Answer::FileAdded { pages } => Ok(pages),
            other => Err(unexpected(other)),
        }
    }

    /// Who holds the page of `id`, as far as the index knows.
    ///
    /// # Errors
    /// Those of the connection and of the peer.
    pub async fn locate(&self, id: ShortId) -> Result<Vec<Holder>, SiteError> {
        match self.ask(&Request::Locate { id }).await? {
            Answer::Located { holders } => Ok(holders),
            other => Err(unexpected(other)),
        }
    }

    async fn ask(&self, request: &Request) -> Result<Answer, SiteError> {
        let mut connection = self.open().await?;
        connection.send(request).await?;
        connection.short_answer().await
    }

    async fn open(&self) -> Result<Connection, SiteError> {
        let (connection, welcome) = Connection::open(&self.shared.socket).await?;
        let (before, now) = (self.shared.domain.id(), welcome.domain.id());
        if before == now { Ok(connection) } else { Err(SiteError::DomainChanged { before, now }) }
    }
}

/// Holds the registration's connection, and registers again at a peer that was restarted. Runs until it is cancelled.
async fn keep_registered(
    client: SiteClient,
    mut connection: Connection,
    request: Request,
    memfd: OwnedFd,
    mut wishes: mpsc::Receiver<oneshot::Sender<Result<Retained, SiteError>>>,
) {
    loop {
        let end = tokio::select! {
            // Unasked the peer sends nothing on this connection: an answer or an error both mean that it is over.
            end = connection.answer() => end.map(|_| ()),
            Some(reply) = wishes.recv() => match connection.retain().await {
                Err(error @ (SiteError::Closed | SiteError::Io(_) | SiteError::Malformed(_))) => {
                    let end = Err(SiteError::Closed);
                    // Whoever asked may have lost patience.
                    let _ = reply.send(Err(error));
                    end
                }
                answered => {
                    let _ = reply.send(answered);
                    continue;
                }
            },
        };
        tracing::warn!(?end, "the site's peer let the memory go; offering it again");
        connection = loop {
            tokio::select! {
                () = tokio::time::sleep(REREGISTER_EVERY) => {}
                // Nobody is there to keep a copy, and a VM that has left does not wait for somebody to come.
                Some(reply) = wishes.recv() => {
                    let _ = reply.send(Err(SiteError::Closed));
                    continue;
                }
            }
            match client.register(&request, memfd.as_fd()).await {
                Ok(connection) => break connection,
                Err(error) => {
                    tracing::debug!(error = &error as &dyn std::error::Error, "the site's peer is not back")
                }
            }
        };
        tracing::info!("the site's peer has the memory again");
    }
}

fn unexpected(answer: Answer) -> SiteError {
    match answer {
        Answer::Failed { code, message } => SiteError::Refused { code, message },
        other @ (Answer::Welcome { .. }
        | Answer::Done
        | Answer::Pages { .. }
        | Answer::Missing { .. }
        | Answer::Status { .. }
        | Answer::FileAdded { .. }
        | Answer::Located { .. }
        | Answer::Retained { .. }) => SiteError::Unexpected { got: other.kind() },
    }
}

fn bounded(what: &'static str, value: u64, bound: u64) -> Result<(), SiteError> {
    if value <= bound { Ok(()) } else { Err(SiteError::TooLarge { what, value, bound }) }
}

async fn in_time<T>(
    limit: Duration,
    work: impl Future<Output = Result<T, SiteError>>,
) -> Result<T, SiteError> {
    timeout(limit, work).await.unwrap_or(Err(SiteError::Timeout { seconds: limit.as_secs() }))
}

struct Welcome {
    domain: Domain,
    peer_id: String,
}

/// One connection, its handshake done.
#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    read: Vec<u8>,
    /// The start of what is unread in `read`.
    at: usize,
}

impl Connection {
    async fn open(socket: &Path) -> Result<(Self, Welcome), SiteError> {
        let length = socket.as_os_str().len();
        if length > SOCKET_PATH_BYTES {
            return Err(SiteError::SocketPathTooLong { socket: socket.to_owned(), length });
        }
        let stream = UnixStream::connect(socket)
            .await
            .map_err(|source| SiteError::Connect { socket: socket.to_owned(), source })?;
        let mut connection = Self { stream, read: Vec::new(), at: 0 };
        connection.send(&Request::Hello { version: PROTOCOL_VERSION }).await?;
        let welcome = match connection.short_answer().await? {
            Answer::Welcome { version: PROTOCOL_VERSION, domain, peer_id } => {
                Welcome { domain: Domain::from_block(domain.0), peer_id }
            }
            Answer::Welcome { version: theirs, .. } => return Err(SiteError::Version { theirs }),
            other => return Err(unexpected(other)),
        };
        Ok((connection, welcome))
    }

    async fn send(&mut self, request: &Request) -> Result<(), SiteError> {
        let mut bytes = Vec::new();
        request.encode(&mut bytes);
        Ok(self.stream.write_all(&bytes).await?)
    }

    /// Sends a request with a descriptor attached to its first bytes.
    async fn send_with_descriptor(&mut self, request: &Request, fd: BorrowedFd<'_>) -> Result<(), SiteError> {
        let mut bytes = Vec::new();
        request.encode(&mut bytes);
        let stream = &self.stream;
        let sent = stream
            .async_io(Interest::WRITABLE, || {
                let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                let fds = [fd];
                assert!(
                    control.push(SendAncillaryMessage::ScmRights(&fds)),
                    "there is space for one descriptor"
                );
                let data = [io::IoSlice::new(&bytes)];
                Ok(rustix::net::sendmsg(stream, &data, &mut control, SendFlags::NOSIGNAL)?)
            })
            .await?;
        Ok(self.stream.write_all(&bytes[sent..]).await?)
    }

    async fn retain(&mut self) -> Result<Retained, SiteError> {
        self.send(&Request::Retain).await?;
        match self.answer().await? {
            Answer::Retained { pages, bytes } => Ok(Retained { pages, bytes }),
            other => Err(unexpected(other)),
        }
    }

    async fn short_answer(&mut self) -> Result<Answer, SiteError> {
        in_time(LOCAL_ANSWER_TIMEOUT, self.answer()).await
    }

    async fn answer(&mut self) -> Result<Answer, SiteError> {
        loop {
            if let Some((frame, used)) = take_frame(&self.read[self.at..])? {
                let answer = Answer::decode(frame)?;
                self.at += used;
                return Ok(answer);
            }
            self.read.drain(..self.at);
            self.at = 0;
            self.read.reserve(READ_BYTES.max(PAGE_SIZE));
            if self.stream.read_buf(&mut self.read).await? == 0 {
                return Err(SiteError::Closed);
            }
        }
    }
}
