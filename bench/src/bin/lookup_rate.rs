//! Measures names looked up and announced a second through the site's page index against Kademlia's own records, one `get_providers` query or
//! one `start_providing` a name, on the same peers, from the same process, in one run.
//!
//! `cargo build --release -p dht && cargo run --release -p bench --bin lookup-rate [-- --peers N]` prints one JSON object. The peers are real `dht
//! serve` processes on loopback, which are Kademlia servers as well. This process joins none of their tables: it dials all of them and asks. For
//! Kademlia every parallelism of [`PARALLEL`] is tried and the best counts, and a query is ended at the first provider that it finds.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use bench::random_pages;
use bench::site::{self, Site, ready};
use clap::Parser;
use dht::SiteClient;
use dht::asker::{Asker, AskerEvent, asker};
use dht::claims::Announcement;
use dht::identity::SiteKey;
use dht::limits::{INDEX_BATCH, LOOKUP_BATCH, LOOKUPS_IN_FLIGHT};
use dht::shard::{MemberId, ShardId, ShardMap};
use dht::wire::{IndexRequest, IndexResponse};
use futures::StreamExt as _;
use libp2p::identity::Keypair;
use libp2p::kad::{self, QueryResult, RecordKey};
use libp2p::multiaddr::{Multiaddr, Protocol};
use libp2p::request_response::{self, Message};
use libp2p::swarm::{DialError, SwarmEvent, dial_opts::DialOpts};
use libp2p::{PeerId, Swarm};
use page::{PAGE_SIZE, ShortId};

/// The index against one query a name.
#[derive(Parser)]
struct Options {
    /// Peers of the site.
    #[arg(long, default_value_t = 12)]
    peers: usize,
    /// Content of the one that holds, MiB.
    #[arg(long, default_value_t = 256)]
    mib: usize,
    /// Names for Kademlia: no more than one peer keeps records.
    #[arg(long, default_value_t = 1000)]
    records: usize,
    /// How often the index is asked for all of the content.
    #[arg(long, default_value_t = 4)]
    rounds: usize,
}

/// Queries in flight that are tried.
const PARALLEL: [usize; 4] = [8, 32, 128, 512];
const PATIENCE: Duration = Duration::from_secs(120);

type Failure = Box<dyn Error>;

struct Peer {
    process: site::Peer,
    address: Multiaddr,
    id: PeerId,
}

impl Peer {
    fn start(site: &Site, n: usize, join: Option<&Self>) -> Result<Self, Failure> {
        let process = site.serve(&n.to_string(), join.map(|peer| &peer.process))?;
        let address: Multiaddr = process.address.parse()?;
        let id = address.iter().find_map(|part| match part {
            Protocol::P2p(id) => Some(id),
            _ => None,
        });
        Ok(Self { process, address, id: id.ok_or("the address names the peer")? })
    }

    async fn client(&self) -> Result<SiteClient, Failure> {
        Ok(SiteClient::connect(&self.process.socket).await?)
    }
}

/// This process's node.
struct Node {
    swarm: Swarm<Asker>,
    peers: BTreeMap<MemberId, PeerId>,
    shards: ShardMap,
}

impl Node {
    async fn connect(mut swarm: Swarm<Asker>, site: &[Peer]) -> Result<Self, Failure> {
        for peer in site {
            let address: Multiaddr =
                peer.address.iter().filter(|part| !matches!(part, Protocol::P2p(_))).collect();
            swarm.behaviour_mut().kad.add_address(&peer.id, address.clone());
            match swarm.dial(DialOpts::peer_id(peer.id).addresses(vec![address]).build()) {
                // Kademlia dials as well.
                Ok(()) | Err(DialError::DialPeerConditionFalse(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        while swarm.connected_peers().count() < site.len() {
            tokio::time::timeout(PATIENCE, swarm.select_next_some()).await?;
        }
        let member = |peer: &Peer| (MemberId::of_peer(&peer.id.to_bytes()), peer.id);
        let peers: BTreeMap<MemberId, PeerId> = site.iter().map(member).collect();
        let shards = ShardMap::new(&peers.keys().copied().collect());
        Ok(Self { swarm, peers, shards })
    }

    /// Cuts names into batches for the `n`th of their owners.
    fn batches(
        &self,
        ids: &[ShortId],
        bound: usize,
        nth: impl Fn(ShortId) -> usize,
    ) -> Vec<(PeerId, Vec<ShortId>)> {
        let mut by_owner: BTreeMap<MemberId, Vec<ShortId>> = BTreeMap::new();
        for id in ids {
            let owners = self.shards.owners(ShardId::of(*id));
            by_owner.entry(owners[nth(*id) % owners.len()]).or_default().push(*id);
        }
        let cut = |(owner, ids): (MemberId, Vec<ShortId>)| {
            ids.chunks(bound).map(|ids| (self.peers[&owner], ids.to_vec())).collect::<Vec<_>>()
        };
        by_owner.into_iter().flat_map(cut).collect()
    }

    /// Makes the requests, as many at once as a search does; returns how many names had a holder.
    async fn ask(&mut self, mut requests: Vec<(PeerId, IndexRequest)>) -> Result<usize, Failure> {
        let (mut flying, mut found) = (0, 0);
        while flying > 0 || !requests.is_empty() {
            while flying < LOOKUPS_IN_FLIGHT
                && let Some((peer, request)) = requests.pop()
            {
                self.swarm.behaviour_mut().index.send_request(&peer, request);
                flying += 1;
            }
            let event = tokio::time::timeout(PATIENCE, self.swarm.select_next_some()).await?;
            let SwarmEvent::Behaviour(AskerEvent::Index(event)) = event else { continue };
            match event {
                request_response::Event::Message { message: Message::Response { response, .. }, .. } => {
                    flying -= 1;
                    if let IndexResponse::Holders { claims, .. } = response {
                        let mut places: Vec<u32> = claims.iter().map(|claim| claim.at).collect();
                        places.dedup();
                        found += places.len();
                    }
                }
                request_response::Event::OutboundFailure { error, .. } => return Err(error.into()),
                request_response::Event::Message { .. }
                | request_response::Event::InboundFailure { .. }
                | request_response::Event::ResponseSent { .. } => {}
            }
        }
        Ok(found)
    }

    /// Names looked up a second, and how many of them had a holder.
    async fn lookups(&mut self, ids: &[ShortId], rounds: usize) -> Result<(f64, usize), Failure> {
        let spread = |id: ShortId| usize::from(id.0.to_be_bytes()[2]);
        let (start, mut found) = (Instant::now(), 0);
        for _ in 0..rounds {
            let batches = self.batches(ids, LOOKUP_BATCH, spread).into_iter();
            found += self.ask(batches.map(|(to, ids)| (to, IndexRequest::Lookup { ids })).collect()).await?;
        }
        Ok(((ids.len() * rounds) as f64 / start.elapsed().as_secs_f64(), found / rounds))
    }

    /// Names announced a second, each to both of its owners.
    async fn announcements(&mut self, ids: &[ShortId]) -> Result<f64, Failure> {
        let start = Instant::now();
        for owner in 0..2 {
            let batches = self.batches(ids, INDEX_BATCH, |_| owner).into_iter();
            let announce = |((to, ids), serial)| {
                let announcement = Announcement { serial, ids, ..Announcement::default() };
                (to, IndexRequest::Announce(announcement))
            };
            self.ask(batches.zip(0..).map(announce).collect()).await?;
        }
        Ok(ids.len() as f64 / start.elapsed().as_secs_f64())
    }

    /// Runs one query of Kademlia a name, `parallel` at a time; returns names a second, and how many had a provider.
    async fn queries(
        &mut self,
        ids: &[ShortId],
        what: What,
        parallel: usize,
    ) -> Result<(f64, usize), Failure> {
        let (start, mut flying, mut found) = (Instant::now(), 0, 0);
        let mut names = ids.iter();
        let mut left = ids.len();
        while left > 0 {
            while flying < parallel
                && let Some(id) = names.next()
            {
                let (key, kad) = (RecordKey::new(&id.0.to_be_bytes()), &mut self.swarm.behaviour_mut().kad);
                match what {
                    What::GetProviders => drop(kad.get_providers(key)),
                    What::StartProviding => drop(kad.start_providing(key)?),
                }
                flying += 1;
            }
            let event = tokio::time::timeout(PATIENCE, self.swarm.select_next_some()).await?;
            let SwarmEvent::Behaviour(AskerEvent::Kad(kad::Event::OutboundQueryProgressed {
                id,
                result,
                step,
                ..
            })) = event
            else {
                continue;
            };
            if let QueryResult::GetProviders(Ok(kad::GetProvidersOk::FoundProviders { .. })) = &result {
                found += 1;
                if let Some(mut query) = self.swarm.behaviour_mut().kad.query_mut(&id) {
                    query.finish();
                }
            }
            if step.last {
                (flying, left) = (flying - 1, left - 1);
            }
        }
        Ok((ids.len() as f64 / start.elapsed().as_secs_f64(), found))
    }

    /// The best of all parallelisms: names a second, with how many in flight, and how many were found.
    async fn best(
        &mut self,
        names: impl Fn(usize) -> Vec<ShortId>,
        what: What,
    ) -> Result<(f64, usize, usize), Failure> {
        let mut best = (0.0, 0, 0);
        for (round, parallel) in PARALLEL.into_iter().enumerate() {
            let (rate, found) = self.queries(&names(round), what, parallel).await?;
            if rate > best.0 {
                best = (rate, parallel, found);
            }
        }
        Ok(best)
    }
}

#[derive(Clone, Copy)]
enum What {
    GetProviders,
    StartProviding,
}

/// Names that nobody has, distinct for each n and spread like a hash (the finaliser of splitmix64, Steele et al. 2014).
fn nobodys(count: usize, salt: u64) -> Vec<ShortId> {
    let name = |n: u64| {
        let x = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ salt << 48;
        let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ShortId(x ^ (x >> 31))
    };
    (1..=count as u64).map(name).collect()
}

/// Starts the peers and fills the first; returns them with the names that it holds, and the domain.
async fn filled(
    options: &Options,
    site: &Site,
    dir: &Path,
) -> Result<(Vec<Peer>, Vec<ShortId>, page::DomainId), Failure> {
    let mut peers: Vec<Peer> = Vec::new();
    for n in 0..options.peers {
        peers.push(Peer::start(site, n, peers.first())?);
    }
    let content = random_pages((options.mib << 20) / PAGE_SIZE, 1);
    let file = dir.join("content");
    fs::write(&file, content.as_flattened())?;
    let holder = peers[0].client().await?;
    holder.add_file(&file).await?;
    for peer in &peers {
        ready(&peer.client().await?, options.peers - 1).await?;
    }
    let ids = content.iter().map(|page| holder.domain().name(page).short()).collect();
    Ok((peers, ids, holder.domain().id()))
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let options = Options::parse();
    let place = tempfile::tempdir()?;
    let dir = place.path();
    let site = Site::new(dir)?;
    let (peers, held, domain) = filled(&options, &site, dir).await?;
    let key = SiteKey::read(&site.key())?;
    let records = options.records * (PARALLEL.len() + 1);
    let swarm = asker(&Keypair::generate_ed25519(), &key, domain, records)?;
    let mut node = Node::connect(swarm, &peers).await?;

    let (hits, found) = node.lookups(&held, options.rounds).await?;
    let (misses, _) = node.lookups(&nobodys(held.len(), 1), options.rounds).await?;
    let announced = node.announcements(&nobodys(held.len(), 2)).await?;
    // The peers keep the first records that come, so that these are found below.
    let provided = nobodys(options.records, 3);
    node.queries(&provided, What::StartProviding, PARALLEL[1]).await?;
    // Its own records would be found without asking anybody.
    for id in &provided {
        node.swarm.behaviour_mut().kad.stop_providing(&RecordKey::new(&id.0.to_be_bytes()));
    }
    let (kad_hits, hit_parallel, kad_found) = node.best(|_| provided.clone(), What::GetProviders).await?;
    let (kad_misses, _, _) =
        node.best(|round| nobodys(options.records, 10 + round as u64), What::GetProviders).await?;
    let (kad_announced, _, _) =
        node.best(|round| nobodys(options.records, 20 + round as u64), What::StartProviding).await?;

    let report = serde_json::json!({
        "peers": options.peers,
        "index_names": held.len(),
        "index_names_found": found,
        "kademlia_names": options.records,
        "kademlia_names_found": kad_found,
        "kademlia_queries_in_flight": hit_parallel,
        "found_per_s": { "index": hits, "kademlia": kad_hits, "ratio": hits / kad_hits },
        "missed_per_s": { "index": misses, "kademlia": kad_misses, "ratio": misses / kad_misses },
        "announced_per_s": { "index": announced, "kademlia": kad_announced, "ratio": announced / kad_announced },
    });
    println!("{report:#}");
    Ok(())
}
