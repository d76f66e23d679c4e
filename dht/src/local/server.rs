//! The peer's end of the local socket.

use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::Path,
    sync::Arc,
};

use page::ShortId;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use tokio::{
    io::{AsyncWriteExt, Interest},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{Semaphore, mpsc},
    time::timeout,
};

use super::{
    protocol::{Answer, DomainBlock, FailureCode, PROTOCOL_VERSION, Request, pages_head, take_frame},
    socket::BoundSocket,
};
use crate::{
    batch::PageBatch,
    codec::CodecError,
    content::store::RetainError,
    error::{ContentError, NodeError},
    limits::{LOCAL_CONNECTIONS, LOCAL_FRAME_QUEUE, LOCAL_HELLO_TIMEOUT, LOCAL_SEND_BYTES},
    node::{Peer, Registered},
    resolve::Part,
};

/// The local socket of a peer; its path goes with it.
#[derive(Debug)]
pub(crate) struct LocalSocket(BoundSocket);

impl LocalSocket {
    /// Binds `path` with mode 0600. A socket that nobody serves is replaced.
    pub(crate) fn bind(path: &Path) -> Result<Self, NodeError> {
        BoundSocket::bind(path).map(Self)
    }

    /// Serves connections until it is dropped.
    pub(crate) async fn serve(&self, peer: Arc<Peer>) {
        let room = Arc::new(Semaphore::new(LOCAL_CONNECTIONS));
        let mut connections = tokio::task::JoinSet::new();
        loop {
            let permit = Arc::clone(&room).acquire_owned().await.expect("the semaphore is never closed");
            while connections.try_join_next().is_some() {}
            match self.0.listener.accept().await {
                Ok((stream, _)) => {
                    let peer = Arc::clone(&peer);
                    connections.spawn(async move {
                        if let Err(error) = serve_connection(&peer, stream).await {
                            tracing::debug!(
                                error = &error as &dyn std::error::Error,
                                "a local connection ended"
                            );
                        }
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept on the local socket");
                    // Out of descriptors, most likely: a pause, so that this does not spin while they last.
                    tokio::time::sleep(crate::limits::ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

/// Why a local connection ended.
#[derive(Debug, thiserror::Error)]
enum ConnectionError {
    #[error("the connection broke")]
    Io(#[from] io::Error),
    #[error("the client sent a malformed frame")]
    Malformed(#[from] CodecError),
    #[error("the client did not finish its handshake in time")]
    HelloTimeout,
    #[error("the client sent a request before its handshake, or a second handshake")]
    OutOfOrder,
    #[error("the client sent a memory without a descriptor")]
    NoDescriptor,
    #[error("the client speaks version {0}")]
    Version(u16),
}

async fn serve_connection(peer: &Arc<Peer>, stream: UnixStream) -> Result<(), ConnectionError> {
    // The kernel gives what it allows; with less the client is woken more often.
    if let Err(error) = rustix::net::sockopt::set_socket_send_buffer_size(&stream, LOCAL_SEND_BYTES) {
        tracing::debug!(%error, "a local connection keeps its usual buffer");
    }
    let (reader, mut writer) = stream.into_split();
    let mut requests = Requests { reader, buffer: Vec::new(), at: 0, descriptor: None };
    let hello = timeout(LOCAL_HELLO_TIMEOUT, requests.next()).await;
    match hello.map_err(|_| ConnectionError::HelloTimeout)?? {
        None => return Ok(()),
        Some(Request::Hello { version }) => {
            // A client of another version needs the version alone, not a secret in a place that it may misread.
            let same = version == PROTOCOL_VERSION;
            let domain = DomainBlock(if same { *peer.domain().block() } else { [0; 64] });
            let welcome =
                Answer::Welcome { version: PROTOCOL_VERSION, domain, peer_id: peer.peer_id().to_owned() };
            send(&mut writer, &welcome).await?;
            if !same {
                return Err(ConnectionError::Version(version));
            }
        }
        Some(_) => return Err(ConnectionError::OutOfOrder),
    }
    while let Some(request) = requests.next().await? {
        let answer = match request {
            Request::Hello { .. } => return Err(ConnectionError::OutOfOrder),
            Request::Register { name, extents } => {
                let descriptor = requests.descriptor.take().ok_or(ConnectionError::NoDescriptor)?;
                match peer.add_memory(name, descriptor, extents) {
                    Ok(registered) => {
                        send(&mut writer, &Answer::Done).await?;
                        return keep(peer, &registered, &mut requests, &mut writer).await;
                    }
                    Err(error) => refusal(&error),
                }
            }
            Request::Retain => return Err(ConnectionError::OutOfOrder),
            Request::Resolve { ids } => {
                if !resolve(peer, ids, &mut requests, &mut writer).await? {
                    return Ok(());
                }
                Answer::Done
            }
            Request::ReportWrong { id } => {
                peer.report_wrong(id);
                Answer::Done
            }
            Request::Status => {
                let json = serde_json::to_vec(&peer.status()).expect("a status is plain data");
                Answer::Status { json }
            }
            Request::AddFile { path } => match peer.add_file(&path) {
                Ok(pages) => Answer::FileAdded { pages },
                Err(error) => refusal(&error),
            },
            Request::Locate { id } => Answer::Located { holders: peer.locate(id).await },
        };
        send(&mut writer, &answer).await?;
    }
    Ok(())
}

/// Holds a registration until its connection ends, and retains its memory if it is asked to. The end of the connection ends that too: no
/// memory lives because this peer reads it.
async fn keep(
    peer: &Arc<Peer>,
    registered: &Registered,
    requests: &mut Requests,
    writer: &mut OwnedWriteHalf,
) -> Result<(), ConnectionError> {
    while let Some(request) = requests.next().await? {
        if request != Request::Retain {
            return Err(ConnectionError::OutOfOrder);
        }
        let answer = tokio::select! {
            retained = peer.retain(registered) => match retained {
                Ok((pages, bytes)) => Answer::Retained { pages, bytes },
                Err(error) => {
                    // Without --retain nobody wants it to be kept.
                    if !matches!(error, RetainError::Off) {
                        let error = &error as &dyn std::error::Error;
                        tracing::warn!(error, "a VM's memory is not retained");
                    }
                    Answer::Failed { code: code_of_retain(&error), message: error.to_string() }
                }
            },
            closed = requests.closed() => return Ok(closed?),
        };
        send(writer, &answer).await?;
    }
    Ok(())
}

fn refusal(error: &ContentError) -> Answer {
    Answer::Failed { code: code_of_content(error), message: error.to_string() }
}

fn code_of_content(error: &ContentError) -> FailureCode {
    match error {
        ContentError::Unreadable { .. } | ContentError::NotAFile { .. } => FailureCode::Unreadable,
        ContentError::Extent { .. } => FailureCode::BadRequest,
        ContentError::TooLarge { .. } | ContentError::Full { .. } => FailureCode::Full,
    }
}

fn code_of_retain(error: &RetainError) -> FailureCode {
    match error {
        RetainError::Off => FailureCode::RetainsNothing,
        RetainError::Budget { .. } => FailureCode::Full,
        RetainError::Write { .. } => FailureCode::NotWritten,
        RetainError::Read { .. } => FailureCode::Unreadable,
        RetainError::Content(error) => code_of_content(error),
    }
}

async fn send(writer: &mut OwnedWriteHalf, answer: &Answer) -> io::Result<()> {
    let mut bytes = Vec::new();
    answer.encode(&mut bytes);
    writer.write_all(&bytes).await
}

/// Writes a frame of pages in one piece where the socket has room: its client is not woken for the head alone.
async fn write_pages(writer: &mut OwnedWriteHalf, head: &[u8], pages: &PageBatch) -> io::Result<()> {
    let mut slices: Vec<IoSlice<'_>> =
        std::iter::once(head).chain(pages.pieces()).map(IoSlice::new).collect();
    let mut rest = &mut slices[..];
    while !rest.is_empty() {
        match writer.write_vectored(rest).await? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            written => IoSlice::advance_slices(&mut rest, written),
        }
    }
    Ok(())
}

/// Writes what is found of `ids`, and what is missing, as it becomes known; `false` if the client went away, which cancels the search.
async fn resolve(
    peer: &Arc<Peer>,
    ids: Vec<ShortId>,
    requests: &mut Requests,
    writer: &mut OwnedWriteHalf,
) -> Result<bool, ConnectionError> {
    let (answer, mut parts) = mpsc::channel(LOCAL_FRAME_QUEUE);
    let search = peer.resolve(ids, answer);
    let write = async {
        let mut head = Vec::new();
        while let Some(part) = parts.recv().await {
            match part {
                Part::Pages(rung, pages) => {
                    head.clear();
                    pages_head(rung, pages.ids(), &mut head);
                    write_pages(writer, &head, &pages).await?;
                }
                Part::Missing(ids) => send(writer, &Answer::Missing { ids }).await?,
            }
        }
        Ok::<_, io::Error>(())
    };
    tokio::select! {
        ((), written) = async { tokio::join!(search, write) } => { written?; Ok(true) }
        closed = requests.closed() => { closed?; Ok(false) }
    }
}

/// The client's requests, and the descriptor that came with them.
struct Requests {
    reader: OwnedReadHalf,
    buffer: Vec<u8>,
    at: usize,
    descriptor: Option<OwnedFd>,
}

impl Requests {
    /// The next request; `None` once the client has closed.
    async fn next(&mut self) -> Result<Option<Request>, ConnectionError> {
        loop {
            if let Some((frame, used)) = take_frame(&self.buffer[self.at..])? {
                let request = Request::decode(frame)?;
                self.at += used;
                return Ok(Some(request));
            }
            if !self.receive().await? {
                return Ok(None);
            }
        }
    }

    /// Returns when the client has closed. Whatever it sends meanwhile is kept for later, up to one frame.
    async fn closed(&mut self) -> io::Result<()> {
        while self.buffer.len() - self.at <= crate::limits::LOCAL_FRAME_BYTES {
            if !self.receive().await? {
                return Ok(());
            }
        }
        Err(io::Error::other("the client sends requests without waiting for answers"))
    }

    /// Reads more bytes, and a descriptor if one comes along; `false` at the end. Safe to cancel.
    async fn receive(&mut self) -> io::Result<bool> {
        self.buffer.drain(..self.at);
        self.at = 0;
        let mut bytes = [0; 16 << 10];
        let stream: &UnixStream = self.reader.as_ref();
        let (count, descriptor) = stream
            .async_io(Interest::READABLE, || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = RecvAncillaryBuffer::new(&mut space);
                let mut data = [io::IoSliceMut::new(&mut bytes)];
                let message = rustix::net::recvmsg(stream, &mut data, &mut control, RecvFlags::CMSG_CLOEXEC)?;
                let mut descriptor = None;
                for part in control.drain() {
                    if let RecvAncillaryMessage::ScmRights(mut fds) = part {
                        descriptor = fds.next();
                    }
                }
                Ok((message.bytes, descriptor))
            })
            .await?;
        if descriptor.is_some() {
            self.descriptor = descriptor;
        }
        self.buffer.extend_from_slice(&bytes[..count]);
        Ok(count > 0)
    }
}
