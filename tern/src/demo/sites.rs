//! The peers of a site: one `dht serve` process a host.

use std::path::{Path, PathBuf};

use dht::{SiteClient, SiteError};

use crate::demo::error::DemoError;
use crate::demo::process::{Args, Process, Stage, until};
use crate::limits;

/// The peer of one host.
#[derive(Debug)]
pub(crate) struct Peer {
    host: &'static str,
    process: Process,
    socket: PathBuf,
    client: SiteClient,
    /// Memories and files that it has been given.
    contents: usize,
}

impl Peer {
    /// Its local socket, for the vmms of its host.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Has it index a file.
    ///
    /// # Errors
    /// If it refuses.
    pub(crate) async fn add_file(&mut self, path: &Path) -> Result<(), DemoError> {
        self.client.add_file(path).await.map_err(|source| DemoError::Site { host: self.host, source })?;
        self.contents += 1;
        Ok(())
    }

    /// A VM has been started with this peer, and will offer its memory.
    pub(crate) fn expect_memory(&mut self) {
        self.contents += 1;
    }

    /// Waits until it sees `others` other peers and all its content is in the site's index.
    async fn wait_until_ready(&mut self, others: usize) -> Result<(), DemoError> {
        let Self { host, client, contents, process, .. } = self;
        until(
            "all content of the site is indexed and announced",
            limits::INDEXED,
            &mut [process],
            async || {
                let status = client.status().await.map_err(|source| DemoError::Site { host, source })?;
                let peers = status.peers.iter().filter(|peer| peer.answering).count();
                let announced =
                    status.contents.iter().filter(|content| content.scanned && content.announced).count();
                Ok((peers >= others && announced >= *contents).then_some(()))
            },
        )
        .await
    }
}

/// The keys of a site, as files.
#[derive(Debug)]
pub(crate) struct SiteKeys {
    /// Who has this may join the site.
    pub(crate) site: PathBuf,
    /// The dedup domain's key, which both sites share.
    pub(crate) domain: PathBuf,
}

/// A site.
#[derive(Debug)]
pub(crate) struct Site<const N: usize> {
    /// Its peers, in the order of the hosts.
    pub(crate) peers: [Peer; N],
}

impl<const N: usize> Site<N> {
    /// Starts a peer on each of `hosts`; the later ones join by the first.
    ///
    /// # Errors
    /// If one of them does not come up.
    pub(crate) async fn start(
        stage: &Stage,
        dir: &Path,
        keys: &SiteKeys,
        hosts: [&'static str; N],
    ) -> Result<Self, DemoError> {
        let mut peers: Vec<Peer> = Vec::with_capacity(N);
        for host in hosts {
            let join = match peers.first() {
                Some(first) => Some(listen_address(first).await?),
                None => None,
            };
            peers.push(start_peer(stage, dir, keys, host, join).await?);
        }
        let peers = peers.try_into().map_err(|_| DemoError::Answer("a site has lost a peer".into()))?;
        Ok(Self { peers })
    }

    /// Waits until every peer sees every other and all content is indexed and announced.
    ///
    /// # Errors
    /// If that does not come true in time, or a peer ends.
    pub(crate) async fn wait_until_ready(&mut self) -> Result<(), DemoError> {
        for peer in &mut self.peers {
            peer.wait_until_ready(N - 1).await?;
        }
        Ok(())
    }

    /// Ends every peer; says whether all ended well.
    ///
    /// # Errors
    /// If one of them cannot be told or waited for.
    pub(crate) async fn stop(&mut self) -> Result<bool, DemoError> {
        self.peers.iter_mut().try_for_each(|peer| peer.process.terminate())?;
        let mut well = true;
        for peer in &mut self.peers {
            well &= peer.process.finish().await?;
        }
        Ok(well)
    }
}

async fn start_peer(
    stage: &Stage,
    dir: &Path,
    keys: &SiteKeys,
    host: &'static str,
    join: Option<String>,
) -> Result<Peer, DemoError> {
    let socket = dir.join(format!("{host}-dht.sock"));
    let mut args = Args::new(&["dht", "serve"])
        .with("--site-key", &keys.site)
        .with("--domain-key", &keys.domain)
        .with("--listen", "127.0.0.1:0")
        .with("--local", &socket);
    if let Some(join) = join {
        args = args.with("--join", join);
    }
    let mut process = stage.spawn(&format!("{host}-dht"), &args)?;
    let client = until("a dht peer answers", limits::START, &mut [&mut process], async || {
        match SiteClient::connect(&socket).await {
            Ok(client) => Ok(Some(client)),
            // The socket comes with the peer.
            Err(SiteError::Connect { .. }) => Ok(None),
            Err(source) => Err(DemoError::Site { host, source }),
        }
    })
    .await?;
    Ok(Peer { host, process, socket, client, contents: 0 })
}

/// An address that another peer can join by.
async fn listen_address(peer: &Peer) -> Result<String, DemoError> {
    let status = peer.client.status().await.map_err(|source| DemoError::Site { host: peer.host, source })?;
    let nowhere = || DemoError::Answer(format!("the peer of host {} listens nowhere", peer.host));
    status.listen.into_iter().next().ok_or_else(nowhere)
}
