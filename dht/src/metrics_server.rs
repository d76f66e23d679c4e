//! `dht serve --metrics`: `GET /metrics` over plain HTTP.
//!
//! It tells numbers alone, to whoever reaches the address: the operator chooses one that only those who may know can reach. A
//! connection carries one request and has one deadline; there are few at once.

use std::{convert::Infallible, io, net::SocketAddr, sync::Arc};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
    time::timeout,
};

use crate::{
    error::NodeError,
    limits::{ACCEPT_PAUSE, METRICS_CONNECTIONS, METRICS_TIMEOUT},
    metrics,
    node::Peer,
};

/// A bound metrics address.
#[derive(Debug)]
pub(crate) struct MetricsServer {
    listener: TcpListener,
}

impl MetricsServer {
    /// Listens.
    pub(crate) async fn bind(address: SocketAddr) -> Result<Self, NodeError> {
        let failed = |source| NodeError::Metrics { address, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        tracing::info!(%address, "serving metrics on http://{address}/metrics");
        Ok(Self { listener })
    }

    /// Serves until it is dropped.
    pub(crate) async fn serve(&self, peer: Arc<Peer>) {
        let room = Arc::new(Semaphore::new(METRICS_CONNECTIONS));
        let mut connections = JoinSet::new();
        loop {
            let permit = Arc::clone(&room).acquire_owned().await.expect("the semaphore is never closed");
            while connections.try_join_next().is_some() {}
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let peer = Arc::clone(&peer);
                    connections.spawn(async move {
                        if let Err(error) = serve_connection(&peer, stream).await {
                            tracing::debug!(%error, "a metrics connection ended");
                        }
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept on the metrics address");
                    // Out of descriptors, most likely: a pause, so that this does not spin while they last.
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

async fn serve_connection(peer: &Arc<Peer>, stream: TcpStream) -> io::Result<()> {
    let service = service_fn(async |request: Request<Incoming>| Ok::<_, Infallible>(answer(peer, &request)));
    let connection = http1::Builder::new().keep_alive(false).serve_connection(TokioIo::new(stream), service);
    timeout(METRICS_TIMEOUT, connection).await?.map_err(io::Error::other)
}

fn answer(peer: &Peer, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let (status, kind, body) = match (request.uri().path(), request.method()) {
        ("/metrics", &Method::GET | &Method::HEAD) => {
            (StatusCode::OK, metrics::CONTENT_TYPE, metrics::text(&peer.status()))
        }
        ("/metrics", _) => (StatusCode::METHOD_NOT_ALLOWED, "text/plain", "/metrics takes GET\n".to_owned()),
        (_, _) => (StatusCode::NOT_FOUND, "text/plain", "the metrics are at /metrics\n".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    if status == StatusCode::METHOD_NOT_ALLOWED {
        response.headers_mut().insert(header::ALLOW, header::HeaderValue::from_static("GET, HEAD"));
    }
    response
}
