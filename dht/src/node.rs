//! The peer: its state, and its life from start to SIGTERM.

use std::{
    borrow::Cow,
    collections::{BTreeMap, VecDeque},
    os::fd::OwnedFd,
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
    time::Instant,
};

use libp2p::{Multiaddr, PeerId, core::ConnectedPoint, swarm::ConnectionId};
use page::{Domain, ShortId};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{Notify, Semaphore, mpsc},
};

use crate::{
    announce::Announcer,
    anti_entropy, behaviour,
    config::{Fault, NodeConfig},
    connections::member,
    content::{
        Content, Contents, Source,
        check::CheckKey,
        scan::{self, Ended},
        store::{self, RetainError, Store},
        workers::{Urgency, Workers},
    },
    counters::Counters,
    error::{ContentError, NodeError},
    fetch::OnTheWay,
    flood,
    gone::Gone,
    index::ContentId,
    joins::Joins,
    known::Known,
    lease::OwnerTable,
    limits::{
        COMMANDS, FETCHES_EACH, FLOOD_IN_FLIGHT, LAN_BURST_DIVISOR, LISTEN_ADDRESSES, PAGE_ARRIVALS,
        RECENT_SOURCES, SEARCHES,
    },
    local::{
        protocol::{FoundOn, Holder, MemoryExtent},
        server::LocalSocket,
    },
    membership::Membership,
    metrics_server::MetricsServer,
    network::{Driver, Network},
    pace::Budget,
    page_client::PageClient,
    page_server,
    recent::RecentHolders,
    requests::Requests,
    sample::Sampling,
    secure::Secure,
    shard::{MemberId, ShardId},
    status::How,
    upkeep,
};

/// A peer's state, shared by its tasks. Where several locks are held at once, they are taken in the order of the fields.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) me: PeerId,
    peer_text: String,
    pub(crate) fault: Option<Fault>,
    pub(crate) contents: Arc<Contents>,
    workers: Arc<Workers>,
    /// Where memories of VMs that left are kept.
    store: Option<Store>,
    /// What announcing may take of the LAN, in bytes.
    pub(crate) lan: Budget,
    pub(crate) network: Network,
    pub(crate) counters: Counters,
    /// The requests of other peers.
    pub(crate) requests: Requests,
    /// Asks other peers for pages.
    pub(crate) page_client: PageClient,
    /// The pages on their way to this host.
    pub(crate) on_the_way: OnTheWay,
    /// Bounds the searches of this host that are under way.
    pub(crate) searching: Semaphore,
    /// Wakes the announcer.
    pub(crate) news: Notify,
    listening: Mutex<Vec<String>>,
    joins: Mutex<Joins>,
    site: Mutex<Membership>,
    owned: Mutex<OwnerTable>,
    announcer: Mutex<Announcer>,
    directory: Mutex<BTreeMap<MemberId, Known>>,
    gone: Mutex<Gone>,
    /// Who served this host lately.
    recent: Mutex<RecentHolders>,
    /// Where the latest pages came from, for a report that one was wrong.
    sources: Mutex<VecDeque<(ShortId, MemberId)>>,
}

/// A registered memory; dropping it takes the memory out.
#[derive(Debug)]
pub(crate) struct Registered {
    contents: Arc<Contents>,
    /// Not the content itself: nothing but a chunk that is being read may keep its descriptor open longer than this lives.
    content: ContentId,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.contents.remove(self.content);
    }
}

/// Runs work that blocks. A panic in it goes on here; when the runtime shuts down, this never returns.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_cancelled) => std::future::pending().await,
        },
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nothing panics while it holds this lock")
}

impl Peer {
    pub(crate) fn new(config: &NodeConfig, network: Network, secure: Arc<Secure>) -> Result<Self, NodeError> {
        let budgets = config.budgets;
        let workers = Workers::start(budgets.cpu_percent).map_err(NodeError::Threads)?;
        let lan = budgets.lan_bytes_per_second.map(|rate| Budget::new(rate, rate / LAN_BURST_DIVISOR));
        let store = config.retention.as_ref().map(Store::open).transpose()?;
        let peer_id = PeerId::from(config.identity.public());
        let check_key = CheckKey::generate().map_err(NodeError::Random)?;
        let mut serial = [0; 8];
        getrandom::fill(&mut serial).map_err(NodeError::Random)?;
        let (serial, now) = (u64::from_le_bytes(serial), Instant::now());
        let each = if config.fault == Some(Fault::Flood) { FLOOD_IN_FLIGHT } else { FETCHES_EACH };
        Ok(Self {
            me: peer_id,
            peer_text: peer_id.to_string(),
            fault: config.fault,
            contents: Arc::new(Contents::new(config.domain.clone(), check_key)),
            workers: Arc::new(workers),
            store,
            lan: lan.unwrap_or_default(),
            network,
            counters: Counters::default(),
            requests: Requests::default(),
            page_client: PageClient::new(secure, config.domain.id(), each),
            on_the_way: OnTheWay::default(),
            searching: Semaphore::new(SEARCHES),
            news: Notify::new(),
            listening: Mutex::default(),
            joins: Mutex::new(Joins::new(&config.join)),
            site: Mutex::new(Membership::new(MemberId::of_peer(&peer_id.to_bytes()))),
            owned: Mutex::new(OwnerTable::with_room(config.owner_entries, config.lease)),
            announcer: Mutex::new(Announcer::new(config.lease, serial, now)),
            directory: Mutex::default(),
            gone: Mutex::default(),
            recent: Mutex::default(),
            sources: Mutex::default(),
        })
    }

    pub(crate) fn domain(&self) -> &Domain {
        &self.contents.domain
    }

    pub(crate) fn peer_id(&self) -> &str {
        &self.peer_text
    }

    pub(crate) fn site(&self) -> MutexGuard<'_, Membership> {
        lock(&self.site)
    }

    pub(crate) fn owned(&self) -> MutexGuard<'_, OwnerTable> {
        lock(&self.owned)
    }

    pub(crate) fn announcer(&self) -> MutexGuard<'_, Announcer> {
        lock(&self.announcer)
    }

    pub(crate) fn directory(&self) -> MutexGuard<'_, BTreeMap<MemberId, Known>> {
        lock(&self.directory)
    }

    /// The peers to join by.
    pub(crate) fn joins(&self) -> MutexGuard<'_, Joins> {
        lock(&self.joins)
    }

    /// The members of late that are gone.
    pub(crate) fn gone(&self) -> MutexGuard<'_, Gone> {
        lock(&self.gone)
    }

    pub(crate) fn recent(&self) -> MutexGuard<'_, RecentHolders> {
        lock(&self.recent)
    }

    /// The addresses that it listens on.
    pub(crate) fn listen_addresses(&self) -> Vec<String> {
        lock(&self.listening).clone()
    }

    pub(crate) fn listening(&self, address: String) {
        let mut listening = lock(&self.listening);
        if listening.len() < LISTEN_ADDRESSES && !listening.contains(&address) {
            listening.push(address);
        }
    }

    pub(crate) fn connected(&self, peer_id: PeerId, endpoint: &ConnectedPoint) {
        let mut directory = self.directory();
        directory.entry(member(&peer_id)).or_insert_with(|| Known::new(peer_id)).connect(endpoint);
    }

    /// A connected peer said where it listens; returns where to dial it.
    pub(crate) fn listens(&self, peer_id: PeerId, listen: &[Multiaddr]) -> Vec<Multiaddr> {
        // It may be disconnected by now, and no member.
        let mut directory = self.directory();
        let Some(known) = directory.get_mut(&member(&peer_id)) else { return Vec::new() };
        known.listens(listen);
        known.addresses.clone()
    }

    /// As [`Known::said_otherwise`].
    pub(crate) fn said_otherwise(
        &self,
        peer_id: &PeerId,
        connection: ConnectionId,
        listen: &[Multiaddr],
    ) -> Option<Vec<Multiaddr>> {
        self.directory().get_mut(&member(peer_id))?.said_otherwise(connection, listen)
    }

    /// One of several connections to a peer is gone.
    pub(crate) fn closed_one(&self, peer_id: &PeerId, connection: ConnectionId) {
        if let Some(known) = self.directory().get_mut(&member(peer_id)) {
            known.closed_one(connection);
        }
    }

    /// A connected peer turned out to be a member of this site and domain.
    pub(crate) fn joined(&self, peer_id: PeerId) {
        let id = member(&peer_id);
        if self.site().joined(id) {
            let address = self.address_of(&peer_id);
            tracing::info!(%peer_id, %address, "a peer joined");
            self.gone().back(id, &address);
            self.rehome();
        }
    }

    /// Where a peer listens, for the log; empty if that is not known.
    pub(crate) fn address_of(&self, peer_id: &PeerId) -> Cow<'static, str> {
        self.directory().get(&member(peer_id)).map_or(Cow::Borrowed(""), Known::address)
    }

    /// There is no connection to a peer any more; a member is still known. `how` it ended, unless this end closed it.
    pub(crate) fn disconnected(&self, peer_id: PeerId, how: Option<How>) {
        let id = member(&peer_id);
        let stays = self.site().contains(id);
        let mut directory = self.directory();
        match directory.get_mut(&id) {
            Some(known) if stays => (known.connected, known.ended) = (false, how),
            Some(_) | None => {
                directory.remove(&id);
            }
        }
    }

    /// A peer cannot be reached, as `how` says if its last connection does not: it is no member any more.
    pub(crate) fn left(&self, peer_id: PeerId, how: How) {
        let id = member(&peer_id);
        let was = self.site().left(id);
        let (address, how) = {
            let mut directory = self.directory();
            let known = directory.get(&id);
            let last =
                known.map_or_else(Default::default, |known| (known.address(), known.ended, known.connected));
            let (address, ended, connected) = last;
            if !connected {
                directory.remove(&id);
            }
            (address, ended.unwrap_or(how))
        };
        if was {
            tracing::info!(%peer_id, %address, %how, "a peer is gone");
            self.gone().left(id, peer_id, address.into_owned(), how, Instant::now());
            self.rehome();
        }
    }

    /// The members changed, and with them the owners of some shards.
    fn rehome(&self) {
        if self.fault == Some(Fault::OldOwners) && !self.contents.index().is_empty() {
            return;
        }
        let site = self.site();
        self.announcer().set_owners(site.shards(), site.me());
        self.news.notify_one();
    }

    /// An owner says of which of its shards it does not keep every name.
    pub(crate) fn sampled(&self, owner: MemberId, sampled: Vec<(ShardId, Sampling)>) {
        self.announcer().sampled(owner, &sampled);
        self.news.notify_one();
        self.site().sampled(owner, sampled);
    }

    /// Serves a VM's memory for as long as the result lives.
    pub(crate) fn add_memory(
        self: &Arc<Self>,
        name: String,
        fd: OwnedFd,
        extents: Vec<MemoryExtent>,
    ) -> Result<Registered, ContentError> {
        let content = self.contents.add_memory(name, fd, extents)?;
        let registered = Registered { contents: Arc::clone(&self.contents), content: content.id };
        self.keep_indexed(content, Urgency::First);
        Ok(registered)
    }

    /// Serves a file from now on; returns its pages.
    pub(crate) fn add_file(self: &Arc<Self>, path: &Path) -> Result<u64, ContentError> {
        let content = self.contents.add_file(path)?;
        let pages = content.source.pages();
        self.keep_indexed(content, Urgency::First);
        Ok(pages.into())
    }

    /// Takes the checkpoints that are retained here; their index is made behind.
    fn load_retained(self: &Arc<Self>) -> Result<(), NodeError> {
        let Some(store) = &self.store else { return Ok(()) };
        for (content, ids) in store.load(&self.contents)? {
            tokio::spawn(Arc::clone(self).index_retained(content, ids));
        }
        Ok(())
    }

    async fn index_retained(self: Arc<Self>, content: Arc<Content>, ids: Vec<ShortId>) {
        store::index(&self.contents, &self.workers, &content, ids, |ids| self.note(ids)).await;
        self.news.notify_one();
    }

    /// Keeps a copy of a registered memory; returns its pages and bytes. Dropping the future ends the copying.
    pub(crate) async fn retain(self: &Arc<Self>, registered: &Registered) -> Result<(u64, u64), RetainError> {
        let store = self.store.as_ref().ok_or(RetainError::Off)?;
        // It is there for as long as it is registered.
        let Some(memory) = self.contents.get(registered.content) else { return Ok((0, 0)) };
        let retained = store.retain(&self.contents, &self.workers, &memory).await?;
        let Some((content, ids)) = retained else { return Ok((0, 0)) };
        let Source::Checkpoint(file) = &content.source else { unreachable!("a checkpoint was made") };
        let (pages, bytes) = (u64::from(file.pages()), file.file_bytes());
        tracing::info!(name = file.name(), pages, bytes, "a VM's memory is retained");
        // Indexed before the answer: whoever comes back at once finds it, and the memory that goes now is not missed.
        Arc::clone(self).index_retained(Arc::clone(&content), ids).await;
        Ok((pages, bytes))
    }

    fn note(&self, ids: &[ShortId]) {
        self.announcer().note(ids);
        self.news.notify_one();
    }

    fn keep_indexed(self: &Arc<Self>, content: Arc<Content>, urgency: Urgency) {
        let peer = Arc::clone(self);
        tokio::spawn(async move {
            let (contents, workers) = (Arc::clone(&peer.contents), Arc::clone(&peer.workers));
            let (id, done) = (content.id, || peer.news.notify_one());
            let ended =
                scan::keep_indexed(contents, content, workers, urgency, |ids| peer.note(ids), done).await;
            match ended {
                Ended::Removed => {}
                Ended::Replaced => peer.reopen(id),
                Ended::Gone => {
                    if let Some(path) = peer.contents.file_path(id) {
                        tracing::info!(path = %path.display(), "a file is gone, and is not served any more");
                    }
                    peer.contents.remove(id);
                }
            }
        });
    }

    /// Another file stands at a served file's path: that one is served from now on. It is read at the pace of a change, not of something new.
    fn reopen(self: &Arc<Self>, id: ContentId) {
        let Some(path) = self.contents.file_path(id) else { return };
        match self.contents.add_file(&path) {
            Ok(content) => {
                tracing::info!(path = %path.display(), "a file was replaced, or has another length; it is read again");
                self.keep_indexed(content, Urgency::Again);
            }
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "a file was replaced by one that cannot be served");
                self.contents.remove(id);
            }
        }
    }

    /// Remembers where pages came from.
    pub(crate) fn note_source(&self, ids: impl Iterator<Item = ShortId>, from: MemberId) {
        let mut sources = lock(&self.sources);
        sources.extend(ids.map(|id| (id, from)));
        let over = sources.len().saturating_sub(RECENT_SOURCES);
        sources.drain(..over);
    }

    /// A VM found that a page does not have the full name it needed. Every page was hashed here before it was handed on, so
    /// this is two pages with one short id; whoever sent the page is avoided all the same, should this host be at fault
    /// the place is forgotten until the next scan.
    pub(crate) fn report_wrong(&self, id: ShortId) {
        self.counters.wrong_pages(1);
        let source = lock(&self.sources).iter().rev().find(|(other, _)| *other == id).map(|(_, from)| *from);
        tracing::warn!(?id, ?source, "a VM reports a page with the right short id and the wrong name");
        match source {
            Some(member) => self.site().lied(member, 1, Instant::now()),
            None => {
                let mut index = self.contents.index_mut();
                if let Some(place) = index.place(id) {
                    index.forget(id, place);
                }
            }
        }
    }

    /// Who holds a page: this host first, then whom the owners name.
    pub(crate) async fn locate(self: &Arc<Self>, id: ShortId) -> Vec<Holder> {
        let here = self.contents.describe(id).map(|what| Holder {
            rung: FoundOn::Host,
            peer_id: self.peer_text.clone(),
            what,
        });
        let mut holders: Vec<Holder> = here.into_iter().collect();
        let members = self.holders_on_site(id).await;
        let directory = self.directory();
        let known = members.iter().filter_map(|member| directory.get(member));
        holders.extend(known.map(|known| Holder {
            rung: FoundOn::Site,
            peer_id: known.peer_id.to_string(),
            what: String::new(),
        }));
        holders
    }
}

/// Runs a peer until SIGTERM or SIGINT. `started` hears of its identity and address once both sockets serve.
///
/// # Errors
/// [`NodeError`] if a socket cannot be had; and the error of `started`, which ends the peer.
pub async fn serve<E>(
    config: NodeConfig,
    started: impl FnOnce(&str, &Multiaddr) -> Result<(), E>,
) -> Result<(), E>
where
    E: From<NodeError>,
{
    let mut terminate = signal(SignalKind::terminate()).map_err(NodeError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(NodeError::Signals)?;
    let local = LocalSocket::bind(&config.local)?;
    let metrics = match config.metrics {
        Some(address) => Some(MetricsServer::bind(address).await?),
        None => None,
    };
    let (commands, receiver) = mpsc::channel(COMMANDS);
    let (arrivals, for_pages) = mpsc::channel(PAGE_ARRIVALS);
    let secure = Arc::new(Secure::new(&config.identity, &config.site_key, Some(arrivals))?);
    let (swarm, protocols) = behaviour::swarm(&config, Arc::clone(&secure));
    let peer = Arc::new(Peer::new(&config, Network { commands }, secure)?);
    peer.load_retained()?;
    for file in &config.files {
        peer.add_file(file).map_err(NodeError::Add)?;
    }
    let mut driver = Driver::new(swarm, protocols, Arc::clone(&peer), &config);
    let address = driver.listen(config.listen.clone()).await?;
    tracing::info!(peer_id = peer.peer_id(), %address, local = %config.local.display(), "serving");
    started(peer.peer_id(), &address)?;
    tokio::select! {
        result = driver.run(receiver) => result?,
        () = local.serve(Arc::clone(&peer)) => {}
        () = page_server::run(&peer, for_pages) => {}
        () = upkeep::run(&peer) => {}
        () = anti_entropy::run(&peer) => {}
        () = flood::run(&peer), if config.fault == Some(Fault::Flood) => {}
        () = serve_metrics(metrics.as_ref(), &peer) => {}
        _ = terminate.recv() => tracing::info!("SIGTERM: leaving the site"),
        _ = interrupt.recv() => tracing::info!("SIGINT: leaving the site"),
    }
    Ok(())
}

async fn serve_metrics(server: Option<&MetricsServer>, peer: &Arc<Peer>) {
    match server {
        Some(server) => server.serve(Arc::clone(peer)).await,
        None => std::future::pending().await,
    }
}
