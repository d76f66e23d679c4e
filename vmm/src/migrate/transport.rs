//! The WAN connection: QUIC (RFC 9000), both ends authenticated ([`super::tls`]), one connection a migration.
//!
//! An [`Endpoint`] accepts and makes connections; a [`Link`] is one of them. Its streams are the [`super::channel`]s.

use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};

use quinn::{
    AckFrequencyConfig, ClientConfig, Connection, ConnectionError, EndpointConfig, IdleTimeout, ServerConfig,
    TransportConfig, VarInt,
};
use rustls::pki_types::CertificateDer;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::MigrateError;
use super::congestion::DelayControl;
use super::identity::{HostIdentity, HostKey};
use super::tls::{self, Expect, Refusal, RefusalSlot};
use super::{limits, ticket::Ticket};

/// QUIC's error code for a TLS alert (RFC 9001, 4.8) with the alert `access_denied` (RFC 8446, 6.2).
const ACCESS_DENIED: u64 = 0x100 + 49;

/// The alert `no_application_protocol` (RFC 7301, 3.2).
const NO_COMMON_VERSION: u64 = 0x100 + 120;

/// A UDP socket on which QUIC connections come and go.
#[derive(Clone, Debug)]
pub struct Endpoint {
    quinn: quinn::Endpoint,
    host: Arc<HostIdentity>,
    /// Places for handshakes under way.
    handshakes: Arc<Semaphore>,
    transport: Arc<TransportConfig>,
}

/// Bytes on the WAN as counted here: UDP payloads plus 28 (IPv4) or 48 (IPv6) bytes of headers a datagram. Datagrams that were lost, most
/// often because the queue before the link was full, do not count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WanBytes {
    /// Sent, and not lost.
    pub tx: u64,
    /// Received.
    pub rx: u64,
}

impl std::ops::AddAssign for WanBytes {
    fn add_assign(&mut self, other: Self) {
        self.tx += other.tx;
        self.rx += other.rx;
    }
}

/// One authenticated connection.
#[derive(Clone, Debug)]
pub struct Link {
    connection: Connection,
    peer: HostKey,
    own: HostKey,
}

/// How a connection is closed on purpose (QUIC's application error codes).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Close {
    /// All is said.
    Done,
    /// The other end broke the protocol, or something failed here: the reason says what.
    Failed,
    /// Something else has the place: a VM is arriving already, or runs here.
    Busy,
}

impl Close {
    fn code(self) -> VarInt {
        VarInt::from_u32(match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Busy => 2,
        })
    }
}

impl Endpoint {
    /// Binds a UDP socket that accepts connections and can make them. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// If the address cannot be bound, or TLS refuses the identity.
    pub fn listen(address: SocketAddr, host: &Arc<HostIdentity>) -> Result<Self, MigrateError> {
        Self::bind(address, host, true)
    }

    /// Binds a UDP socket that makes connections to addresses of the kind of `remote`.
    ///
    /// # Errors
    /// As [`Endpoint::listen`].
    pub fn outgoing(remote: SocketAddr, host: &Arc<HostIdentity>) -> Result<Self, MigrateError> {
        let any: SocketAddr = if remote.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
        Self::bind(any, host, false)
    }

    fn bind(address: SocketAddr, host: &Arc<HostIdentity>, accepts: bool) -> Result<Self, MigrateError> {
        let failed = |e: std::io::Error| MigrateError::Bind { address, why: e.to_string().into() };
        let transport = Arc::new(transport_config());
        let server = if accepts { Some(server_config(host, &transport)?.0) } else { None };
        let socket = std::net::UdpSocket::bind(address).map_err(failed)?;
        enlarge_buffers(&socket);
        let runtime = Arc::new(quinn::TokioRuntime);
        let quinn =
            quinn::Endpoint::new(EndpointConfig::default(), server, socket, runtime).map_err(failed)?;
        let handshakes = Arc::new(Semaphore::new(limits::MAX_HANDSHAKES));
        Ok(Self { quinn, host: Arc::clone(host), handshakes, transport })
    }

    /// The address that the socket is bound to.
    ///
    /// # Errors
    /// If the system does not say.
    pub fn local_address(&self) -> Result<SocketAddr, MigrateError> {
        let unknown = SocketAddr::from(([0, 0, 0, 0], 0));
        self.quinn
            .local_addr()
            .map_err(|e| MigrateError::Bind { address: unknown, why: e.to_string().into() })
    }

    /// Connects to a ticket's host.
    ///
    /// # Errors
    /// If there is no connection within [`limits::CONNECT_TIMEOUT`], or either end refuses the other's key. A refusal by the other end
    /// can also show up at the first use of the link: TLS lets a client speak before its key has been looked at.
    pub async fn connect(&self, address: SocketAddr, key: Option<HostKey>) -> Result<Link, MigrateError> {
        let (crypto, refusal) = tls::client(&self.host, key.map_or(Expect::Authorized, Expect::Key))?;
        let mut config = ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::clone(&self.transport));
        let failed = |why: String| MigrateError::Connect { address, why: why.into() };
        let connecting =
            self.quinn.connect_with(config, address, tls::SERVER_NAME).map_err(|e| failed(e.to_string()))?;
        let connection = timeout(limits::CONNECT_TIMEOUT, connecting)
            .await
            .map_err(|_| failed(format!("no answer within {} s", limits::CONNECT_TIMEOUT.as_secs())))?
            .map_err(|e| self.handshake_error(address, &e, &refusal))?;
        Link::new(connection, self.host.key())
    }

    /// Connects to where a ticket points.
    ///
    /// # Errors
    /// As [`Endpoint::connect`], or if the ticket's name does not resolve.
    pub async fn open(ticket: &Ticket, host: &Arc<HostIdentity>) -> Result<(Self, Link), MigrateError> {
        let lookup = ticket.clone();
        let address = tokio::task::spawn_blocking(move || lookup.resolve()).await.map_err(|e| {
            MigrateError::Address { address: ticket.address.clone(), why: e.to_string().into() }
        })??;
        let endpoint = Self::outgoing(address, host)?;
        let link = endpoint.connect(address, ticket.key).await?;
        Ok((endpoint, link))
    }

    /// The next connection whose other end has asked to come in; its handshake is the caller's to await, so that a slow one holds
    /// nobody up. `None` once the endpoint is closed.
    pub async fn accept(&self) -> Option<Handshake> {
        loop {
            let incoming = self.quinn.accept().await?;
            let address = incoming.remote_address();
            let Ok(place) = Arc::clone(&self.handshakes).try_acquire_owned() else {
                tracing::warn!(%address, "too many handshakes under way: refused");
                incoming.refuse();
                continue;
            };
            let busy = limits::MAX_HANDSHAKES - self.handshakes.available_permits() > limits::FREE_HANDSHAKES;
            if busy && incoming.may_retry() {
                if let Err(error) = incoming.retry() {
                    tracing::debug!(%address, %error, "cannot ask for proof of the address");
                }
                continue;
            }
            return Some(Handshake { endpoint: self.clone(), incoming, _place: place });
        }
    }

    /// Closes every connection and accepts no more.
    pub fn close(&self, reason: &str) {
        self.quinn.close(Close::Done.code(), reason.as_bytes());
    }

    /// Waits until closed connections have said so to their other ends, at most [`limits::CLOSE_TIMEOUT`].
    pub async fn settle(&self) {
        if timeout(limits::CLOSE_TIMEOUT, self.quinn.wait_idle()).await.is_err() {
            tracing::debug!("connections were still closing");
        }
    }

    fn handshake_error(
        &self,
        address: SocketAddr,
        error: &ConnectionError,
        slot: &RefusalSlot,
    ) -> MigrateError {
        match slot.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(Refusal::NotAuthorized(key)) => {
                let file = self.host.authorized_keys().to_owned();
                MigrateError::UnknownPeer { address, key, file }
            }
            Some(Refusal::NotTheTickets { presented, expected }) => {
                MigrateError::WrongPeer { address, presented, expected }
            }
            Some(Refusal::NoKey) => MigrateError::NoPeerKey { address },
            Some(Refusal::File(error)) => error,
            None if refused(error) => MigrateError::RefusedByPeer { address, key: self.host.key() },
            None => MigrateError::Connect { address, why: describe(error).into() },
        }
    }
}

/// A connection whose other end has not proved its key yet.
#[derive(Debug)]
pub struct Handshake {
    endpoint: Endpoint,
    incoming: quinn::Incoming,
    _place: tokio::sync::OwnedSemaphorePermit,
}

impl Handshake {
    /// Finishes the handshake.
    ///
    /// # Errors
    /// If the other end's key is not authorised (nothing but this host's key has been told to it then), or the handshake fails.
    pub async fn finish(self) -> Result<Link, MigrateError> {
        let address = self.incoming.remote_address();
        let (config, refusal) = server_config(&self.endpoint.host, &self.endpoint.transport)?;
        let failed = |e: &ConnectionError| self.endpoint.handshake_error(address, e, &refusal);
        let connecting = self.incoming.accept_with(Arc::new(config)).map_err(|e| failed(&e))?;
        let connection = timeout(limits::CONNECT_TIMEOUT, connecting)
            .await
            .map_err(|_| MigrateError::Connect { address, why: "the handshake took too long".into() })?
            .map_err(|e| failed(&e))?;
        Link::new(connection, self.endpoint.host.key())
    }
}

impl Link {
    fn new(connection: Connection, own: HostKey) -> Result<Self, MigrateError> {
        let no_key = MigrateError::NoPeerKey { address: connection.remote_address() };
        let identity =
            connection.peer_identity().and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
        let peer = identity.and_then(|chain| chain.first().and_then(tls::key_of)).ok_or(no_key)?;
        Ok(Self { connection, peer, own })
    }

    /// The key that the other end has proved.
    #[must_use]
    pub fn peer(&self) -> HostKey {
        self.peer
    }

    /// The other end's address.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.connection.remote_address()
    }

    /// Bytes that crossed the wire so far: what was sent less what was lost on the way, and what was received.
    #[must_use]
    pub fn wan_bytes(&self) -> WanBytes {
        let stats = self.connection.stats();
        // An IPv4 or IPv6 header without options (RFC 791, RFC 8200) and a UDP header (RFC 768).
        let headers = if self.address().is_ipv4() { 20 + 8 } else { 40 + 8 };
        let sent = stats.udp_tx.bytes + headers * stats.udp_tx.datagrams;
        let lost = stats.path.lost_bytes + headers * stats.path.lost_packets;
        WanBytes { tx: sent.saturating_sub(lost), rx: stats.udp_rx.bytes + headers * stats.udp_rx.datagrams }
    }

    /// The path as congestion control sees it.
    #[must_use]
    pub fn path(&self) -> Path {
        let path = self.connection.stats().path;
        Path { rtt: path.rtt, window_bytes: path.cwnd, lost_packets: path.lost_packets }
    }

    /// Lets QUIC hold no more data than the path takes in two round trips: what is queued there can be overtaken by no newer version
    /// of a page. To be called before much is sent: the path's window may have doubled since.
    pub fn fit_send_window(&self) {
        let twice = self.path().window_bytes.saturating_mul(2);
        self.connection.set_send_window(twice.clamp(limits::SEND_WINDOW_MIN_BYTES, limits::WINDOW_MAX_BYTES));
    }

    /// Lets the other end have so much in flight, over all streams.
    pub fn set_receive_window(&self, bytes: u64) {
        self.connection.set_receive_window(varint(bytes));
    }

    /// Closes the connection; the other end learns the reason.
    pub fn close(&self, how: Close, reason: &str) {
        self.connection.close(how.code(), reason.as_bytes());
    }

    /// Waits until the connection is closed or lost, and says how.
    pub async fn closed(&self) -> String {
        describe(&self.connection.closed().await)
    }

    /// Why the connection ended, if it has: above all, whether the other end has refused this host's key.
    #[must_use]
    pub fn failure(&self) -> Option<MigrateError> {
        let (address, error) = (self.address(), self.connection.close_reason()?);
        Some(if refused(&error) {
            MigrateError::RefusedByPeer { address, key: self.own }
        } else {
            MigrateError::ConnectionLost { address, why: describe(&error).into() }
        })
    }

    pub(super) fn connection(&self) -> &Connection {
        &self.connection
    }
}

/// The path of a connection as congestion control sees it.
#[derive(Clone, Copy, Debug)]
pub struct Path {
    /// The round trip, smoothed.
    pub rtt: std::time::Duration,
    /// The congestion window, bytes.
    pub window_bytes: u64,
    /// Packets believed lost so far.
    pub lost_packets: u64,
}

fn refused(error: &ConnectionError) -> bool {
    matches!(error, ConnectionError::ConnectionClosed(frame) if u64::from(frame.error_code) == ACCESS_DENIED)
}

fn describe(error: &ConnectionError) -> String {
    match error {
        ConnectionError::ApplicationClosed(frame) => {
            format!("closed by the other end: {}", String::from_utf8_lossy(&frame.reason))
        }
        ConnectionError::ConnectionClosed(frame) if u64::from(frame.error_code) == NO_COMMON_VERSION => {
            "the other end speaks another version of the protocol".to_owned()
        }
        ConnectionError::TimedOut => format!("nothing was heard for {} s", limits::IDLE_TIMEOUT.as_secs()),
        ConnectionError::LocallyClosed => "closed by this end".to_owned(),
        ConnectionError::VersionMismatch
        | ConnectionError::TransportError(_)
        | ConnectionError::ConnectionClosed(_)
        | ConnectionError::Reset
        | ConnectionError::CidsExhausted => error.to_string(),
    }
}

/// Asks for socket buffers that take a burst; the kernel gives what its limits (net.core.rmem_max) allow, and QUIC lives with that.
fn enlarge_buffers(socket: &std::net::UdpSocket) {
    use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_send_buffer_size};
    let wanted = limits::SOCKET_BUFFER_BYTES;
    if let Err(error) =
        set_socket_recv_buffer_size(socket, wanted).and_then(|()| set_socket_send_buffer_size(socket, wanted))
    {
        tracing::warn!(%error, "the UDP socket's buffers stay small: a fast link will lose packets");
    }
}

fn server_config(
    host: &Arc<HostIdentity>,
    transport: &Arc<TransportConfig>,
) -> Result<(ServerConfig, RefusalSlot), MigrateError> {
    let (crypto, refusal) = tls::server(host)?;
    let mut config = ServerConfig::with_crypto(Arc::new(crypto));
    config.transport_config(Arc::clone(transport)).migration(false).max_incoming(limits::MAX_HANDSHAKES);
    Ok((config, refusal))
}

/// A window for QUIC; all windows are far below its largest integer, as [`limits`] makes sure.
fn varint(bytes: u64) -> VarInt {
    VarInt::from_u64(bytes).unwrap_or(VarInt::MAX)
}

fn transport_config() -> TransportConfig {
    let mut acks = AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(limits::ACK_EVERY_DATAGRAMS.into())
        .max_ack_delay(Some(limits::MAX_ACK_DELAY));
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(2u8.into())
        .max_concurrent_uni_streams(2u8.into())
        .max_idle_timeout(Some(IdleTimeout::try_from(limits::IDLE_TIMEOUT).expect("a few seconds fit")))
        .keep_alive_interval(Some(limits::KEEP_ALIVE))
        .stream_receive_window(varint(limits::WINDOW_MAX_BYTES))
        .receive_window(varint(limits::RECEIVE_WINDOW_FIRST_BYTES))
        .send_window(limits::SEND_WINDOW_FIRST_BYTES)
        .datagram_receive_buffer_size(None)
        .congestion_controller_factory(Arc::new(DelayControl::default()))
        .ack_frequency_config(Some(acks));
    config
}
