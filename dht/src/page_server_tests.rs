//! A peer that serves a file, and others that ask it, over loopback.

use libp2p::{Multiaddr, identity::Keypair, tcp::tokio::TcpStream};
use page::{Domain, DomainKey, PAGE_SIZE, Page, ShortId};
use tokio::net::TcpListener;

use super::*;
use crate::{
    config::{Budgets, MeshLimits, NodeConfig},
    identity::SiteKey,
    network::Network,
    page_client::{FetchError, PageClient},
    proof::End,
    secure::Secure,
};

const HELD: usize = 40;

/// A holder of [`HELD`] pages, each of one byte.
struct Holder {
    peer: Arc<Peer>,
    site: SiteKey,
    address: Multiaddr,
    _dir: tempfile::TempDir,
}

fn pages() -> Vec<Page> {
    (1..).map(|byte| [byte; PAGE_SIZE]).take(HELD).collect()
}

impl Holder {
    async fn start() -> Self {
        let (site, identity) = (SiteKey::generate().unwrap(), Keypair::generate_ed25519());
        let (arrivals, arrived) = mpsc::channel(8);
        let secure = Arc::new(Secure::new(&identity, &site, Some(arrivals)).unwrap());
        let dir = tempfile::tempdir().unwrap();
        let config = NodeConfig {
            site_key: site.clone(),
            domain: Domain::from_key(&DomainKey([1; 32])),
            identity,
            listen: "/ip4/127.0.0.1/tcp/0".parse().unwrap(),
            join: Vec::new(),
            local: dir.path().join("socket"),
            files: Vec::new(),
            retention: None,
            budgets: Budgets::default(),
            metrics: None,
            mesh: MeshLimits::default(),
            owner_entries: crate::limits::OWNER_ENTRIES,
            lease: crate::limits::LEASE,
            fault: None,
        };
        let (commands, _) = mpsc::channel(1);
        let peer = Arc::new(Peer::new(&config, Network { commands }, Arc::clone(&secure)).unwrap());
        let file = dir.path().join("held");
        std::fs::write(&file, pages().concat()).unwrap();
        peer.add_file(&file).unwrap();
        while peer.contents.index().len() < HELD {
            tokio::task::yield_now().await;
        }
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                // What it is not is of no interest to a test.
                let _ = Arc::clone(&secure).upgrade(TcpStream(socket), End::Listener).await.err();
            }
        });
        let serving = Arc::clone(&peer);
        tokio::spawn(async move { run(&serving, arrived).await });
        let address = format!("/ip4/127.0.0.1/tcp/{port}").parse().unwrap();
        Self { peer, site, address, _dir: dir }
    }

    fn ids(&self) -> Vec<ShortId> {
        pages().iter().map(|page| self.peer.domain().name(page).short()).collect()
    }

    fn secure(&self) -> Arc<Secure> {
        Arc::new(Secure::new(&Keypair::generate_ed25519(), &self.site, None).unwrap())
    }

    /// Another peer of the site, in the holder's domain or not.
    fn client(&self, domain: &Domain) -> PageClient {
        PageClient::new(self.secure(), domain.id(), 64)
    }

    async fn fetch(&self, client: &PageClient) -> Result<usize, FetchError> {
        let (ids, address) = (self.ids(), [self.address.clone()]);
        let came = client.fetch(self.peer.me, &address, &ids, |_, _| true).await?;
        assert_eq!(came.wrong, 0);
        Ok(came.pages.len())
    }

    /// A connection of a peer that does with it as it likes.
    async fn dial(&self, secure: &Secure) -> PageConnection {
        let port = self.address.iter().find_map(|part| match part {
            libp2p::multiaddr::Protocol::Tcp(port) => Some(port),
            _ => None,
        });
        let socket = tokio::net::TcpStream::connect(("127.0.0.1", port.unwrap())).await.unwrap();
        secure.dial_for_pages(socket).await.unwrap()
    }
}

fn soon() -> Instant {
    Instant::now() + REQUEST_TIMEOUT * 6
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_gets_its_pages_one_of_another_domain_nothing_and_a_stranger_no_connection() {
    let holder = Holder::start().await;
    let member = holder.client(holder.peer.domain());
    for _ in 0..3 {
        assert_eq!(holder.fetch(&member).await.unwrap(), HELD);
    }
    assert_eq!(holder.peer.counters.show(0).bytes_served, 3 * (HELD * PAGE_SIZE) as u64);
    let other = Domain::from_key(&DomainKey([2; 32]));
    let refused = holder.fetch(&holder.client(&other)).await;
    assert!(matches!(refused, Err(FetchError::Failed(PageError::Closed | PageError::Io(_)))));
    let strange = Secure::new(&Keypair::generate_ed25519(), &SiteKey::generate().unwrap(), None).unwrap();
    let stranger = PageClient::new(Arc::new(strange), holder.peer.domain().id(), 1);
    assert!(matches!(holder.fetch(&stranger).await, Err(FetchError::Connect(_))));
    // It is not whoever answers that is asked, but the holder.
    let somebody = Keypair::generate_ed25519().public().into();
    let address = [holder.address.clone()];
    let another = member.fetch(somebody, &address, &holder.ids(), |_, _| true).await;
    assert!(matches!(another, Err(FetchError::Connect(_))));
    assert_eq!(holder.peer.counters.show(0).bytes_served, 3 * (HELD * PAGE_SIZE) as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_has_its_share_of_connections_and_no_more() {
    let holder = Holder::start().await;
    let greedy = holder.secure();
    let domain = holder.peer.domain().id();
    let ids = holder.ids();
    let mut open = Vec::new();
    for n in 0..=PAGE_CONNECTIONS_EACH {
        let mut connection = holder.dial(&greedy).await;
        connection.greet(domain).unwrap();
        let came = connection.fetch(&ids, soon(), |_, _| true);
        assert_eq!(came.is_ok(), n < PAGE_CONNECTIONS_EACH, "connection {n}");
        open.extend(came.ok().map(|_| connection));
    }
    assert_eq!(holder.peer.counters.show(0).refused_over_share, 1);
    assert_eq!(holder.fetch(&holder.client(holder.peer.domain())).await.unwrap(), HELD, "others have theirs");
    drop(open);
    loop {
        let mut again = holder.dial(&greedy).await;
        again.greet(domain).unwrap();
        if again.fetch(&ids, soon(), |_, _| true).is_ok() {
            break;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn askers_that_do_not_read_keep_nobody_from_their_pages() {
    let holder = Holder::start().await;
    let lazy = holder.secure();
    let mut stuck = Vec::new();
    for _ in 0..PAGE_CONNECTIONS_EACH {
        let mut connection = holder.dial(&lazy).await;
        connection.greet(holder.peer.domain().id()).unwrap();
        // More than the kernel's buffers take, asked for at once and never read.
        for _ in 0..300 {
            connection.ask(&holder.ids(), soon()).unwrap();
        }
        stuck.push(connection);
    }
    let client = holder.client(holder.peer.domain());
    for _ in 0..5 {
        assert_eq!(holder.fetch(&client).await.unwrap(), HELD);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_malformed_is_counted_and_its_connection_closed() {
    let holder = Holder::start().await;
    let mut connection = holder.dial(&holder.secure()).await;
    connection.greet(holder.peer.domain().id()).unwrap();
    let too_many = vec![ShortId(0); crate::limits::FETCH_BATCH + 1];
    assert!(connection.fetch(&too_many, soon(), |_, _| true).is_err());
    while holder.peer.counters.show(0).malformed_requests == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(holder.fetch(&holder.client(holder.peer.domain())).await.unwrap(), HELD);
}

/// A holder that was started again has closed the connections that its askers keep: they make new ones and nothing is missed.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_was_closed_meanwhile_costs_no_page() {
    let holder = Holder::start().await;
    let identity = Keypair::generate_ed25519();
    let (arrivals, mut arrived) = mpsc::channel(1);
    let secure = Arc::new(Secure::new(&identity, &holder.site, Some(arrivals)).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        for _ in 0..3 {
            let (socket, _) = listener.accept().await.unwrap();
            let _ = Arc::clone(&secure).upgrade(TcpStream(socket), End::Listener).await.err();
            let mut connection = arrived.recv().await.unwrap();
            let once = move || {
                connection.greeted(Domain::from_key(&DomainKey([1; 32])).id(), soon()).unwrap();
                connection.request(soon()).unwrap();
                connection.answer(&[(ShortId(1), [1; PAGE_SIZE])].into_iter().collect(), soon()).unwrap();
            };
            crate::node::blocking(once).await;
        }
    });
    let client = holder.client(holder.peer.domain());
    let address = [format!("/ip4/127.0.0.1/tcp/{port}").parse().unwrap()];
    for _ in 0..3 {
        let from = identity.public().into();
        assert_eq!(client.fetch(from, &address, &[ShortId(1)], |_, _| true).await.unwrap().pages.len(), 1);
    }
    let from = identity.public().into();
    let gone = client.fetch(from, &address, &[ShortId(1)], |_, _| true).await;
    assert!(matches!(gone, Err(FetchError::Connect(_))));
}
