//! The secured connection between two peers: TCP, TLS 1.3 with the peers' own keys, the proof of the site's key. Then ALPN says what it is for:
//! Yamux and libp2p's protocols on it, or pages alone ([`crate::page_connection`]). Both are authenticated by the same code; the proof is bound to the
//! session's exporter, which hangs on the whole handshake, ALPN included.
//!
//! TLS runs with raw public keys (RFC 7250): each end shows the Ed25519 key that is its libp2p identity and signs the handshake with it, so that
//! there is no certificate to make, parse or expire. One cipher suite, AES-128-GCM, which processors do in hardware. Nothing is resumed. What comes
//! before the proof ([`crate::proof`]) has checked out is TLS's own and 32 bytes; a connection whose proof is wrong is closed without another word.

use std::{io, sync::Arc};

use futures::{
    AsyncReadExt, AsyncWriteExt,
    io::{BufReader, BufWriter},
};
use futures_rustls::{TlsAcceptor, TlsConnector, TlsStream};
use libp2p::{
    PeerId,
    core::{
        muxing::StreamMuxerBox,
        upgrade::{InboundConnectionUpgrade as _, OutboundConnectionUpgrade as _},
    },
    identity::Keypair,
    tcp::tokio::TcpStream,
    yamux,
};
use ring::hmac;
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme,
    client::{
        AlwaysResolvesClientRawPublicKeys, Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring as provider, verify_tls13_signature_with_raw_key},
    pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime},
    server::{
        AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
};
use thiserror::Error;
use tokio::sync::mpsc;
use zeroize::Zeroizing;

use crate::{
    error::NodeError,
    identity::SiteKey,
    limits::{SOCKET_READ_BYTES, STREAMS, TLS_WRITE_BYTES},
    page_connection::PageConnection,
    proof::{End, EndKey, PROOF_BYTES, ProofError, SESSION_BYTES, SESSION_LABEL, Session},
};

/// What a connection is for, told in the handshake; another version of Tern's sites has other names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Purpose {
    /// libp2p's protocols.
    Swarm,
    /// Pages.
    Pages,
}

impl Purpose {
    fn alpn(self) -> &'static [u8] {
        match self {
            Self::Swarm => b"tern-site/1",
            Self::Pages => b"tern-pages/1",
        }
    }
}

/// An Ed25519 private key in PKCS #8 (RFC 8410, section 7) is this and the key's 32 bytes.
const ED25519_PKCS8: [u8; 16] =
    [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];

/// Why a connection was not made.
#[derive(Debug, Error)]
pub(crate) enum SecureError {
    #[error("the TLS handshake failed: the other end is not a peer of this version")]
    Handshake(#[source] io::Error),
    #[error("the other end agreed to no protocol that this end offers")]
    Protocol,
    #[error("no session key can be exported")]
    Export(#[source] rustls::Error),
    #[error("{peer} ended the connection instead of proving the site's key")]
    NoProof { peer: PeerId, source: io::Error },
    #[error("the peer {peer} was refused")]
    Stranger { peer: PeerId, source: ProofError },
    #[error("the other end's identity was refused")]
    Identity(#[source] ProofError),
    #[error("the socket cannot be used")]
    Socket(#[source] io::Error),
    /// Not a failure: the connection is authenticated, and in other hands.
    #[error("{peer} made a connection for pages, which has been handed over")]
    ForPages { peer: PeerId },
    #[error("{peer} made a connection for pages, while too many others are new")]
    TooManyForPages { peer: PeerId },
}

/// A connection whose other end is known to belong to the site.
pub(crate) struct Authenticated<S> {
    pub(crate) peer: PeerId,
    purpose: Purpose,
    stream: TlsStream<S>,
}

/// libp2p's socket, read in large pieces: rustls reads 4 KiB at a time.
type Socket = BufReader<TcpStream>;

fn buffered(socket: TcpStream) -> Socket {
    BufReader::with_capacity(SOCKET_READ_BYTES, socket)
}

impl Authenticated<Socket> {
    /// Takes the connection out of the async world.
    fn for_pages(self) -> Result<PageConnection, SecureError> {
        let (socket, tls) = match self.stream {
            TlsStream::Client(stream) => {
                let (socket, tls) = stream.into_inner();
                (socket, tls.into())
            }
            TlsStream::Server(stream) => {
                let (socket, tls) = stream.into_inner();
                (socket, tls.into())
            }
        };
        // What the other end sent right after its proof.
        let read = socket.buffer().to_vec();
        let socket = socket.into_inner().0.into_std();
        socket
            .and_then(|socket| PageConnection::new(self.peer, socket, tls, read))
            .map_err(SecureError::Socket)
    }
}

/// What secures connections, the same for all of a peer's.
pub(crate) struct Secure {
    me: EndKey,
    key: hmac::Key,
    swarm: TlsConnector,
    pages: TlsConnector,
    acceptor: TlsAcceptor,
    /// Where connections for pages go; without it none is taken.
    arrivals: Option<mpsc::Sender<PageConnection>>,
}

impl Secure {
    pub(crate) fn new(
        identity: &Keypair,
        site: &SiteKey,
        arrivals: Option<mpsc::Sender<PageConnection>>,
    ) -> Result<Self, NodeError> {
        let pair = identity.clone().try_into_ed25519().map_err(|_| NodeError::IdentityKind)?;
        let provider = Arc::new(CryptoProvider {
            cipher_suites: vec![provider::cipher_suite::TLS13_AES_128_GCM_SHA256],
            ..provider::default_provider()
        });
        let me = EndKey::from(pair.public());
        let mut secret = Zeroizing::new(ED25519_PKCS8.to_vec());
        secret.extend_from_slice(pair.secret().as_ref());
        let signer = provider::sign::any_eddsa_type(&PrivatePkcs8KeyDer::from(&secret[..]))?;
        // Where rustls speaks of a certificate it means the raw key here.
        let shown = CertificateDer::from(me.to_spki());
        let own = Arc::new(CertifiedKey::new(vec![shown], signer));
        let verifier = Arc::new(AnyPeer { provider: Arc::clone(&provider) });

        let versions = &[&rustls::version::TLS13];
        let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(versions)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::clone(&verifier) as Arc<dyn ServerCertVerifier>)
            .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(Arc::clone(&own))));
        client.resumption = Resumption::disabled();
        client.enable_sni = false;
        let connector = |purpose: Purpose| {
            let mut client = client.clone();
            client.alpn_protocols = vec![purpose.alpn().to_vec()];
            TlsConnector::from(Arc::new(client))
        };
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(own)));
        let pages = arrivals.is_some().then_some(Purpose::Pages);
        let taken = std::iter::once(Purpose::Swarm).chain(pages);
        server.alpn_protocols = taken.map(|purpose| purpose.alpn().to_vec()).collect();
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        Ok(Self {
            me,
            key: hmac::Key::new(hmac::HMAC_SHA256, &site.connection_key()),
            swarm: connector(Purpose::Swarm),
            pages: connector(Purpose::Pages),
            acceptor: TlsAcceptor::from(Arc::new(server)),
            arrivals,
        })
    }

    /// Secures a connection and makes it carry streams; one that another peer made for pages is handed over. Its caller bounds the time.
    pub(crate) async fn upgrade(
        self: Arc<Self>,
        socket: TcpStream,
        end: End,
    ) -> Result<(PeerId, StreamMuxerBox), SecureError> {
        let Authenticated { peer, purpose, stream } = match end {
            End::Dialer => self.dial(buffered(socket), Purpose::Swarm).await?,
            End::Listener => self.accept(buffered(socket)).await?,
        };
        if purpose == Purpose::Pages {
            return Err(self.hand_over(Authenticated { peer, purpose, stream }));
        }
        // Yamux writes a header and a body: together they make full TLS records.
        let stream = BufWriter::with_capacity(TLS_WRITE_BYTES, stream);
        let mut config = yamux::Config::default();
        config.set_max_num_streams(STREAMS);
        let muxer = match end {
            End::Dialer => config.upgrade_outbound(stream, "").await,
            End::Listener => config.upgrade_inbound(stream, "").await,
        };
        let muxer = muxer.map_err(SecureError::Handshake)?;
        Ok((peer, StreamMuxerBox::new(muxer)))
    }

    /// Makes a connection for pages over a connected socket, to whoever is there. Its caller bounds the time, and looks who it is.
    pub(crate) async fn dial_for_pages(
        &self,
        socket: tokio::net::TcpStream,
    ) -> Result<PageConnection, SecureError> {
        self.dial(buffered(TcpStream(socket)), Purpose::Pages).await?.for_pages()
    }

    /// Hands a connection over to whoever serves pages; the result says to the swarm why it is none of its own.
    fn hand_over(&self, connection: Authenticated<Socket>) -> SecureError {
        let peer = connection.peer;
        let connection = match connection.for_pages() {
            Ok(connection) => connection,
            Err(error) => return error,
        };
        let arrivals = self.arrivals.as_ref().and_then(|arrivals| arrivals.try_reserve().ok());
        let Some(room) = arrivals else { return SecureError::TooManyForPages { peer } };
        room.send(connection);
        SecureError::ForPages { peer }
    }

    async fn dial<S>(&self, socket: S, purpose: Purpose) -> Result<Authenticated<S>, SecureError>
    where
        S: futures::AsyncRead + futures::AsyncWrite + Unpin,
    {
        let nobody = ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into());
        let connector = match purpose {
            Purpose::Swarm => &self.swarm,
            Purpose::Pages => &self.pages,
        };
        let stream = connector.connect(nobody, socket).await.map_err(SecureError::Handshake)?;
        self.prove(stream.into(), End::Dialer, &[purpose]).await
    }

    async fn accept<S>(&self, socket: S) -> Result<Authenticated<S>, SecureError>
    where
        S: futures::AsyncRead + futures::AsyncWrite + Unpin,
    {
        let stream = self.acceptor.accept(socket).await.map_err(SecureError::Handshake)?;
        self.prove(stream.into(), End::Listener, &[Purpose::Swarm, Purpose::Pages]).await
    }

    /// Both proofs, in the TLS session.
    async fn prove<S>(
        &self,
        mut stream: TlsStream<S>,
        end: End,
        offered: &[Purpose],
    ) -> Result<Authenticated<S>, SecureError>
    where
        S: futures::AsyncRead + futures::AsyncWrite + Unpin,
    {
        let agreed = stream.get_ref().1.alpn_protocol();
        let purpose = offered.iter().copied().find(|purpose| agreed == Some(purpose.alpn()));
        let purpose = purpose.ok_or(SecureError::Protocol)?;
        let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
        let spki = shown.map_or(&[][..], |key| key.as_ref());
        let other = EndKey::from_spki(spki).map_err(SecureError::Identity)?;
        let peer = other.peer_id();
        let (dialer, listener) = match end {
            End::Dialer => (&self.me, &other),
            End::Listener => (&other, &self.me),
        };
        let session = Session { exported: exported(&stream)?, dialer, listener };
        // Both ends send at once: a proof tells nothing to who lacks the key.
        let proof = session.prove(&self.key, end);
        let no_proof = |source| SecureError::NoProof { peer, source };
        stream.write_all(&proof).await.map_err(no_proof)?;
        stream.flush().await.map_err(no_proof)?;
        let mut theirs = [0; PROOF_BYTES];
        stream.read_exact(&mut theirs).await.map_err(no_proof)?;
        session
            .check(&self.key, end.other(), &theirs)
            .map_err(|source| SecureError::Stranger { peer, source })?;
        Ok(Authenticated { peer, purpose, stream })
    }
}

fn exported<S>(stream: &TlsStream<S>) -> Result<[u8; SESSION_BYTES], SecureError> {
    let out = [0; SESSION_BYTES];
    match stream {
        TlsStream::Client(client) => client.get_ref().1.export_keying_material(out, SESSION_LABEL, None),
        TlsStream::Server(server) => server.get_ref().1.export_keying_material(out, SESSION_LABEL, None),
    }
    .map_err(SecureError::Export)
}

/// Takes any Ed25519 key that signs its handshake: who of them belongs to the site, the proof says.
#[derive(Debug)]
struct AnyPeer {
    provider: Arc<CryptoProvider>,
}

impl AnyPeer {
    fn known(shown: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        EndKey::from_spki(shown).map(|_| ()).map_err(|error| rustls::Error::General(error.to_string()))
    }

    fn signed(
        &self,
        message: &[u8],
        shown: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let key = SubjectPublicKeyInfoDer::from(shown.as_ref());
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature_with_raw_key(message, &key, signature, algorithms)
    }
}

fn tls12() -> rustls::Error {
    rustls::Error::General("TLS 1.2 is not spoken".to_owned())
}

impl ServerCertVerifier for AnyPeer {
    fn verify_server_cert(
        &self,
        shown: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Self::known(shown).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        shown: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signed(message, shown, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

impl ClientCertVerifier for AnyPeer {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        shown: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Self::known(shown).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        shown: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signed(message, shown, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

#[cfg(test)]
#[path = "secure_tests.rs"]
mod tests;
