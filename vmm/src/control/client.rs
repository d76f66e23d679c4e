//! The other end of the control socket: one HTTP/1.1 connection a request, over the Unix socket.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::control::api::{
    BalloonRequest, ErrorBody, ErrorDetail, Event, MigrateRequest, MigrationStatus, ResolveRequest,
    SnapshotRequest, VmStatus,
};
use crate::control::socket::{SocketError, check_path};
use crate::limits::{CLIENT_ANSWER, EVENT_LINE_BYTES, RESPONSE_BODY_BYTES};
use crate::migrate::report::{Forecast, Report};
use crate::snapshot::SnapshotReport;

/// Why a request came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// A path that cannot be a socket's.
    #[error(transparent)]
    Path(#[from] SocketError),
    /// Nobody listens.
    #[error("cannot connect to the VM's control socket {}: does its process run, and do you own it?", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The connection broke.
    #[error("the connection to the control socket broke")]
    Http(#[from] hyper::Error),
    /// The VM's process closed the connection without an answer.
    #[error("the VM's process closed the connection before it answered")]
    Closed,
    /// No answer in time.
    #[error("the VM's process did not answer within {} s", CLIENT_ANSWER.as_secs())]
    Timeout,
    /// A request that cannot be written.
    #[error("the request cannot be built")]
    Request(#[from] hyper::http::Error),
    /// An answer that cannot be read.
    #[error("the VM's process answered something that is not of this API: another version may run there")]
    Json(#[from] serde_json::Error),
    /// An answer beyond its bound.
    #[error("the VM's process answered more than {0} bytes")]
    TooLong(usize),
    /// The VM's process refused, or the operation failed.
    #[error("{}", .1.message)]
    Refused(StatusCode, ErrorDetail),
}

/// A VM's control socket, as its clients see it.
#[derive(Clone, Debug)]
pub struct Client {
    path: PathBuf,
}

impl Client {
    /// A client of the socket at `path`. Nothing is opened yet.
    /// # Errors
    /// If the path is too long for a socket's.
    pub fn new(path: &Path) -> Result<Self, ClientError> {
        check_path(path)?;
        Ok(Self { path: path.to_owned() })
    }

    /// `GET /v1/vm`.
    /// # Errors
    /// If nobody answers.
    pub async fn status(&self) -> Result<VmStatus, ClientError> {
        self.call(Method::GET, "/v1/vm", None::<&()>, Some(CLIENT_ANSWER)).await
    }

    /// `PUT /v1/vm/{operation}`: `pause`, `resume` or `stop`.
    /// # Errors
    /// If nobody answers, or the state does not allow it.
    pub async fn operate(&self, operation: &str) -> Result<VmStatus, ClientError> {
        self.call(Method::PUT, &format!("/v1/vm/{operation}"), None::<&()>, Some(CLIENT_ANSWER)).await
    }

    /// `PUT /v1/vm/balloon`.
    /// # Errors
    /// If nobody answers, the VM has no balloon, or the size is none that it can have.
    pub async fn balloon(&self, size_bytes: u64) -> Result<VmStatus, ClientError> {
        let request = BalloonRequest { size_bytes };
        self.call(Method::PUT, "/v1/vm/balloon", Some(&request), Some(CLIENT_ANSWER)).await
    }

    /// `POST /v1/vm/snapshot`: returns when it is whole, however long that takes.
    /// # Errors
    /// Why there is no new snapshot; the VM is as it was.
    pub async fn snapshot(&self, request: &SnapshotRequest) -> Result<SnapshotReport, ClientError> {
        self.call(Method::POST, "/v1/vm/snapshot", Some(request), None).await
    }

    /// `POST /v1/migration`: returns at the migration's end, however long that takes.
    /// # Errors
    /// Why the VM still runs here, or that it is in doubt.
    pub async fn migrate(&self, request: &MigrateRequest) -> Result<Report, ClientError> {
        self.call(Method::POST, "/v1/migration", Some(request), None).await
    }

    /// `POST /v1/migration/dry-run`: what a migration would cost.
    /// # Errors
    /// Why none could be made.
    pub async fn dry_run(&self, request: &MigrateRequest) -> Result<Forecast, ClientError> {
        self.call(Method::POST, "/v1/migration/dry-run", Some(request), None).await
    }

    /// `GET /v1/migration`.
    /// # Errors
    /// If there has been none.
    pub async fn migration(&self) -> Result<MigrationStatus, ClientError> {
        self.call(Method::GET, "/v1/migration", None::<&()>, Some(CLIENT_ANSWER)).await
    }

    /// `DELETE /v1/migration`.
    /// # Errors
    /// If none runs, or it has gone too far.
    pub async fn cancel(&self) -> Result<MigrationStatus, ClientError> {
        self.call(Method::DELETE, "/v1/migration", None::<&()>, Some(CLIENT_ANSWER)).await
    }

    /// `POST /v1/migration/resolve`.
    /// # Errors
    /// If nothing is in doubt.
    pub async fn resolve(&self, run_here: bool) -> Result<VmStatus, ClientError> {
        let request = ResolveRequest { run_here };
        self.call(Method::POST, "/v1/migration/resolve", Some(&request), Some(CLIENT_ANSWER)).await
    }

    /// `GET /v1/events`.
    /// # Errors
    /// If nobody answers.
    pub async fn events(&self) -> Result<EventStream, ClientError> {
        let response = within(Some(CLIENT_ANSWER), async {
            let mut sender = self.connect().await?;
            Ok(sender.send_request(request(Method::GET, "/v1/events", None::<&()>)?).await?)
        })
        .await?;
        if !response.status().is_success() {
            return Err(refusal(response).await?);
        }
        Ok(EventStream { body: response.into_body(), buffer: BytesMut::new() })
    }

    /// Sends any request and takes its answer as it is: for tests, and for programs with a schema of their own.
    /// # Errors
    /// If nobody answers, or the answer is beyond its bound.
    pub async fn raw(
        &self,
        method: Method,
        path: &str,
        content_type: Option<&str>,
        body: Bytes,
    ) -> Result<Response<Bytes>, ClientError> {
        let mut request = Request::builder().method(method).uri(path).header(header::HOST, "localhost");
        if let Some(content_type) = content_type {
            request = request.header(header::CONTENT_TYPE, content_type);
        }
        let response = self.connect().await?.send_request(request.body(Full::new(body))?).await?;
        let (parts, body) = response.into_parts();
        Ok(Response::from_parts(parts, collect(body).await?))
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
        limit: Option<Duration>,
    ) -> Result<T, ClientError> {
        within(limit, async {
            let mut sender = self.connect().await?;
            let response = sender.send_request(request(method, path, body)?).await?;
            if !response.status().is_success() {
                return Err(refusal(response).await?);
            }
            Ok(serde_json::from_slice(&collect(response.into_body()).await?)?)
        })
        .await
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, ClientError> {
        let stream = UnixStream::connect(&self.path)
            .await
            .map_err(|source| ClientError::Connect { path: self.path.clone(), source })?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection to a control socket ended");
            }
        });
        Ok(sender)
    }
}

/// The events of a VM's process, as they come.
#[derive(Debug)]
pub struct EventStream {
    body: Incoming,
    buffer: BytesMut,
}

impl EventStream {
    /// The next event; none when the process ends.
    /// # Errors
    /// If the connection breaks or a line is not an event.
    pub async fn next(&mut self) -> Result<Option<Event>, ClientError> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(end + 1);
                return Ok(Some(serde_json::from_slice(&line)?));
            }
            if self.buffer.len() > EVENT_LINE_BYTES {
                return Err(ClientError::TooLong(EVENT_LINE_BYTES));
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(frame) => {
                    if let Ok(data) = frame?.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
            }
        }
    }
}

fn request(
    method: Method,
    path: &str,
    body: Option<&impl Serialize>,
) -> Result<Request<Full<Bytes>>, ClientError> {
    let mut request = Request::builder().method(method).uri(path).header(header::HOST, "localhost");
    let body = match body {
        None => Bytes::new(),
        Some(body) => {
            request = request.header(header::CONTENT_TYPE, "application/json");
            Bytes::from(serde_json::to_vec(body)?)
        }
    };
    Ok(request.body(Full::new(body))?)
}

async fn refusal(response: Response<Incoming>) -> Result<ClientError, ClientError> {
    let status = response.status();
    let body: ErrorBody = serde_json::from_slice(&collect(response.into_body()).await?)?;
    Ok(ClientError::Refused(status, body.error))
}

async fn collect(body: Incoming) -> Result<Bytes, ClientError> {
    match Limited::new(body, RESPONSE_BODY_BYTES).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(ClientError::TooLong(RESPONSE_BODY_BYTES)),
        Err(error) => match error.downcast::<hyper::Error>() {
            Ok(error) => Err(ClientError::Http(*error)),
            Err(_) => Err(ClientError::Closed),
        },
    }
}

async fn within<T>(
    limit: Option<Duration>,
    work: impl Future<Output = Result<T, ClientError>>,
) -> Result<T, ClientError> {
    match limit {
        None => work.await,
        Some(limit) => tokio::time::timeout(limit, work).await.unwrap_or(Err(ClientError::Timeout)),
    }
}
