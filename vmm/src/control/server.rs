//! The server: routes, bodies, and one shape for every error.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::Router;
use axum::body::Body;
use axum::extract::rejection::JsonRejection;
use axum::extract::{DefaultBodyLimit, FromRequest, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, delete, get, post, put};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::control::api::{
    BalloonRequest, ErrorBody, ErrorDetail, MigrateRequest, MigrationStatus, ResolveRequest, SnapshotRequest,
    VmStatus,
};
use crate::control::metrics;
use crate::limits::{CONTROL_CONNECTIONS, REQUEST_BODY_BYTES};
use crate::migrate::report::{Forecast, Report};
use crate::process::{Process, ProcessError};
use crate::snapshot::SnapshotReport;

/// One operation of the socket. `docs/openapi.yaml` describes each; a test compares the two.
#[derive(Debug)]
pub struct Route {
    /// The HTTP method, upper case.
    pub method: &'static str,
    /// The path.
    pub path: &'static str,
    handler: fn() -> MethodRouter<Arc<Process>>,
}

/// Every operation. The router is made of this table and of nothing else.
pub const ROUTES: &[Route] = &[
    Route { method: "GET", path: "/v1/vm", handler: || get(status) },
    Route { method: "PUT", path: "/v1/vm/pause", handler: || put(pause) },
    Route { method: "PUT", path: "/v1/vm/resume", handler: || put(resume) },
    Route { method: "PUT", path: "/v1/vm/stop", handler: || put(stop) },
    Route { method: "PUT", path: "/v1/vm/balloon", handler: || put(balloon) },
    Route { method: "POST", path: "/v1/vm/snapshot", handler: || post(snapshot) },
    Route { method: "GET", path: "/v1/migration", handler: || get(migration) },
    Route { method: "POST", path: "/v1/migration", handler: || post(migrate) },
    Route { method: "DELETE", path: "/v1/migration", handler: || delete(cancel) },
    Route { method: "POST", path: "/v1/migration/dry-run", handler: || post(dry_run) },
    Route { method: "POST", path: "/v1/migration/resolve", handler: || post(resolve) },
    Route { method: "GET", path: "/v1/events", handler: || get(events) },
    Route { method: "GET", path: "/v1/metrics", handler: || get(metrics_text) },
];

/// Serves until `shutdown`, then ends once every answer under way has been delivered.
///
/// # Errors
/// If the server itself fails; a single connection's failure is its own.
pub async fn serve(
    listener: UnixListener,
    process: Arc<Process>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let listener = Bounded { listener, permits: Arc::new(Semaphore::new(CONTROL_CONNECTIONS)) };
    axum::serve(listener, router(process)).with_graceful_shutdown(shutdown).await
}

fn router(process: Arc<Process>) -> Router {
    ROUTES
        .iter()
        .fold(Router::new(), |router, route| router.route(route.path, (route.handler)()))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(DefaultBodyLimit::max(REQUEST_BODY_BYTES))
        .with_state(process)
}

type Shared = State<Arc<Process>>;
type Answer<T> = Result<Json<T>, ApiError>;

async fn status(State(process): Shared) -> Json<VmStatus> {
    Json(process.status())
}

async fn pause(State(process): Shared) -> Answer<VmStatus> {
    process.pause().await?;
    Ok(Json(process.status()))
}

async fn resume(State(process): Shared) -> Answer<VmStatus> {
    process.resume().await?;
    Ok(Json(process.status()))
}

async fn stop(State(process): Shared) -> Answer<VmStatus> {
    process.stop().await?;
    Ok(Json(process.status()))
}

async fn balloon(State(process): Shared, Json(request): Json<BalloonRequest>) -> Answer<VmStatus> {
    process.set_balloon(request.size_bytes).await?;
    Ok(Json(process.status()))
}

async fn snapshot(State(process): Shared, Json(request): Json<SnapshotRequest>) -> Answer<SnapshotReport> {
    Ok(Json(process.snapshot(request).await?))
}

async fn migration(State(process): Shared) -> Answer<MigrationStatus> {
    Ok(Json(process.migration()?))
}

async fn migrate(State(process): Shared, Json(request): Json<MigrateRequest>) -> Answer<Report> {
    Ok(Json(process.migrate(request).await?))
}

async fn dry_run(State(process): Shared, Json(request): Json<MigrateRequest>) -> Answer<Forecast> {
    Ok(Json(process.dry_run(request).await?))
}

async fn cancel(State(process): Shared) -> Answer<MigrationStatus> {
    process.cancel().await?;
    Ok(Json(process.migration()?))
}

async fn resolve(State(process): Shared, Json(request): Json<ResolveRequest>) -> Answer<VmStatus> {
    process.resolve(request.run_here).await?;
    Ok(Json(process.status()))
}

async fn events(State(process): Shared) -> Response {
    ([(header::CONTENT_TYPE, "application/jsonl")], Body::from_stream(process.events().follow()))
        .into_response()
}

async fn metrics_text(State(process): Shared) -> Response {
    ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], metrics::text(&process)).into_response()
}

async fn not_found(request: Request) -> ApiError {
    let message = format!("there is no {}: docs/openapi.yaml lists the paths", request.uri().path());
    ApiError::new(StatusCode::NOT_FOUND, "not_found", message)
}

async fn method_not_allowed(request: Request) -> ApiError {
    let message = format!("{} does not take {}", request.uri().path(), request.method());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
}

/// `axum::Json` with errors of our shape.
struct Json<T>(T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        match axum::Json::from_request(request, state).await {
            Ok(axum::Json(value)) => Ok(Self(value)),
            Err(rejection) => Err(rejected(&rejection)),
        }
    }
}

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        axum::Json(self.0).into_response()
    }
}

fn rejected(rejection: &JsonRejection) -> ApiError {
    let message = rejection.body_text();
    match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => {
            let message = format!("the body is longer than {REQUEST_BODY_BYTES} bytes");
            ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "payload_too_large", message)
        }
        StatusCode::UNSUPPORTED_MEDIA_TYPE => {
            let message = "send the body as `Content-Type: application/json`".to_owned();
            ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message)
        }
        _ => ApiError::new(StatusCode::BAD_REQUEST, "bad_request", message),
    }
}

/// An answer that is not a success.
#[derive(Debug)]
struct ApiError {
    status: StatusCode,
    body: ErrorBody,
}

impl ApiError {
    fn new(status: StatusCode, code: &str, message: String) -> Self {
        Self { status, body: ErrorBody { error: ErrorDetail { code: code.to_owned(), message } } }
    }
}

impl From<ProcessError> for ApiError {
    fn from(error: ProcessError) -> Self {
        let status = StatusCode::from_u16(error.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Self { status, body: ErrorBody { error: error.detail() } }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.status, axum::Json(self.body)).into_response()
    }
}

/// A listener that takes no further connection while [`CONTROL_CONNECTIONS`] are open.
struct Bounded {
    listener: UnixListener,
    permits: Arc<Semaphore>,
}

impl axum::serve::Listener for Bounded {
    type Io = Permitted;
    type Addr = ();

    async fn accept(&mut self) -> (Permitted, ()) {
        let permit = match Arc::clone(&self.permits).acquire_owned().await {
            Ok(permit) => permit,
            // Nobody closes the semaphore; were it closed, no connection could be allowed any more.
            Err(_) => std::future::pending().await,
        };
        let (stream, _) = axum::serve::Listener::accept(&mut self.listener).await;
        (Permitted { stream, _permit: permit }, ())
    }

    fn local_addr(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A connection that gives its place back when it is dropped.
struct Permitted {
    stream: UnixStream,
    _permit: OwnedSemaphorePermit,
}

impl AsyncRead for Permitted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Permitted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
