//! Asking other peers for pages, on connections of their own: made when they are needed, kept for the next request, closed when there is none for a while.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex},
    time::Instant,
};

use libp2p::{Multiaddr, PeerId, multiaddr::Protocol};
use page::{DomainId, Page, ShortId};
use thiserror::Error;
use tokio::{net::TcpStream, sync::Semaphore, time::timeout};

use crate::{
    limits::{PAGE_CONNECTION_KEPT, PAGE_CONNECTIONS_KEPT, REQUEST_TIMEOUT, UPGRADE_TIMEOUT},
    node::{blocking, lock},
    page_connection::{Came, PageConnection, PageError},
    secure::{Secure, SecureError},
};

/// Why a holder gave no pages.
#[derive(Debug, Error)]
pub(crate) enum FetchError {
    #[error("no connection to the holder can be made")]
    Connect(#[from] ConnectError),
    #[error("the request failed")]
    Failed(#[source] PageError),
}

/// Why there is no connection to a holder.
#[derive(Debug, Error)]
pub(crate) enum ConnectError {
    #[error("no address of it is known")]
    NoAddress,
    #[error("it does not answer")]
    Unreachable(#[source] std::io::Error),
    #[error("it took too long")]
    Late,
    #[error("it was not secured")]
    Unsecured(#[source] SecureError),
    #[error("{there} is there instead")]
    Another { there: PeerId },
    #[error("the connection does not carry the domain")]
    Greeting(#[source] PageError),
}

/// The connections to one holder.
#[derive(Debug)]
struct Pool {
    /// As many requests at once as there may be connections.
    turns: Semaphore,
    /// Those not in use, and since when; the latest last.
    idle: Mutex<Vec<(PageConnection, Instant)>>,
}

/// The connections to all holders.
pub(crate) struct PageClient {
    secure: Arc<Secure>,
    domain: DomainId,
    /// Connections to one holder at once.
    each: usize,
    pools: Mutex<BTreeMap<PeerId, Arc<Pool>>>,
}

impl std::fmt::Debug for PageClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageClient").field("pools", &self.pools).finish_non_exhaustive()
    }
}

impl PageClient {
    pub(crate) fn new(secure: Arc<Secure>, domain: DomainId, each: usize) -> Self {
        Self { secure, domain, each, pools: Mutex::default() }
    }

    /// Asks a holder for pages; `right` looks at each that comes, where it comes. Dropping the future ends the request.
    pub(crate) async fn fetch<F>(
        &self,
        holder: PeerId,
        addresses: &[Multiaddr],
        ids: &[ShortId],
        right: F,
    ) -> Result<Came, FetchError>
    where
        F: Fn(ShortId, &Page) -> bool + Clone + Send + 'static,
    {
        let pool = self.pool(holder);
        let _turn = pool.turns.acquire().await.expect("the semaphore is never closed");
        let kept = lock(&pool.idle).pop();
        if let Some((connection, _)) = kept {
            match ask(&pool, connection, ids, right.clone()).await {
                // The holder may have closed it, or be another process by now.
                Err(PageError::Closed | PageError::Io(_)) => {}
                answered => return answered.map_err(FetchError::Failed),
            }
        }
        let connection = self.connect(holder, addresses).await?;
        ask(&pool, connection, ids, right).await.map_err(FetchError::Failed)
    }

    fn pool(&self, holder: PeerId) -> Arc<Pool> {
        let new = || Arc::new(Pool { turns: Semaphore::new(self.each), idle: Mutex::default() });
        Arc::clone(lock(&self.pools).entry(holder).or_insert_with(new))
    }

    async fn connect(&self, holder: PeerId, addresses: &[Multiaddr]) -> Result<PageConnection, ConnectError> {
        let dial = async {
            let socket = dial(addresses).await?;
            self.secure.dial_for_pages(socket).await.map_err(ConnectError::Unsecured)
        };
        let mut connection = timeout(UPGRADE_TIMEOUT, dial).await.map_err(|_| ConnectError::Late)??;
        if connection.peer() != holder {
            return Err(ConnectError::Another { there: connection.peer() });
        }
        connection.greet(self.domain).map_err(ConnectError::Greeting)?;
        Ok(connection)
    }

    /// Closes what has not been used for [`PAGE_CONNECTION_KEPT`].
    pub(crate) fn tidy(&self, now: Instant) {
        let kept = |since: &Instant| now.saturating_duration_since(*since) < PAGE_CONNECTION_KEPT;
        lock(&self.pools).retain(|_, pool| {
            let mut idle = lock(&pool.idle);
            idle.retain(|(_, since)| kept(since));
            let used = pool.turns.available_permits() < self.each;
            used || !idle.is_empty()
        });
    }
}

/// Makes a request on a connection, and keeps it afterwards if it is still good.
async fn ask<F>(
    pool: &Pool,
    mut connection: PageConnection,
    ids: &[ShortId],
    right: F,
) -> Result<Came, PageError>
where
    F: Fn(ShortId, &Page) -> bool + Send + 'static,
{
    let (cancel, ids) = (connection.cancel(), ids.to_vec());
    let exchange = move || {
        let came = connection.fetch(&ids, Instant::now() + REQUEST_TIMEOUT, right);
        (connection, came)
    };
    let (connection, came) = blocking(exchange).await;
    cancel.let_be();
    if matches!(came, Ok(_) | Err(PageError::Busy)) {
        let mut idle = lock(&pool.idle);
        if idle.len() < PAGE_CONNECTIONS_KEPT {
            idle.push((connection, Instant::now()));
        }
    }
    came
}

async fn dial(addresses: &[Multiaddr]) -> Result<TcpStream, ConnectError> {
    let mut failed = ConnectError::NoAddress;
    for address in addresses.iter().filter_map(socket_address) {
        match TcpStream::connect(address).await {
            Ok(socket) => return Ok(socket),
            Err(error) => failed = ConnectError::Unreachable(error),
        }
    }
    Err(failed)
}

/// The address over TCP that a multiaddr begins with.
pub(crate) fn socket_address(address: &Multiaddr) -> Option<SocketAddr> {
    let mut parts = address.iter();
    let ip: IpAddr = match parts.next()? {
        Protocol::Ip4(ip) => ip.into(),
        Protocol::Ip6(ip) => ip.into(),
        _ => return None,
    };
    let Protocol::Tcp(port) = parts.next()? else { return None };
    Some((ip, port).into())
}
