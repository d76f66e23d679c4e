//! The dht peers of a site.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use dht::{SiteClient, SiteStatus};

use super::lab::run;
use super::{Lab, Process, binaries, limits, until};

/// How a peer misbehaves towards other peers that ask it for pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It serves other bytes than those asked for.
    WrongBytes,
    /// It never answers.
    Silent,
    /// It answers after so many milliseconds.
    SlowMs(u64),
}

/// A `dht serve` process. Dropping it kills it.
#[derive(Debug)]
pub struct Peer {
    name: String,
    process: Process,
    socket: PathBuf,
    client: SiteClient,
    files: usize,
}

/// A site's key and the peers that hold it.
#[derive(Debug)]
pub struct Site {
    name: String,
    key: PathBuf,
    domain_key: PathBuf,
    /// Its peers, in the order in which they joined.
    pub peers: Vec<Peer>,
}

impl Site {
    /// A site without peers, its key by `dht keygen`. All sites of a lab are of one dedup domain.
    pub async fn new(lab: &Lab, name: &str) -> Self {
        let domain_key = lab.dir().join("domain.key");
        if !domain_key.exists() {
            keygen(&domain_key).await;
        }
        let key = lab.dir().join(format!("{name}.key"));
        keygen(&key).await;
        Self { name: name.to_owned(), key, domain_key, peers: Vec::new() }
    }

    /// Adds a peer, which joins by the first.
    pub async fn join(&mut self, lab: &Lab, fault: Option<Fault>) -> &mut Peer {
        let fault = match fault {
            None => return self.join_with(lab, &[]).await,
            Some(Fault::WrongBytes) => "wrong-bytes".to_owned(),
            Some(Fault::Silent) => "silent".to_owned(),
            Some(Fault::SlowMs(ms)) => format!("slow={ms}"),
        };
        self.join_with(lab, &["--fault".into(), fault.into()]).await
    }

    /// Adds a peer that keeps at most `budget` (as `--retain-budget` takes it) of the memories of VMs that left.
    pub async fn join_retaining(&mut self, lab: &Lab, budget: &str) -> &mut Peer {
        let dir = lab.fresh(&format!("{}-retained", self.name));
        self.join_with(lab, &["--retain".into(), dir.into(), "--retain-budget".into(), budget.into()]).await
    }

    async fn join_with(&mut self, lab: &Lab, more: &[OsString]) -> &mut Peer {
        let name = format!("{}{}-dht", self.name, self.peers.len() + 1);
        let socket = lab.fresh(&format!("{name}.sock"));
        let mut args: Vec<OsString> = vec!["serve".into(), "--site-key".into(), self.key.clone().into()];
        args.extend(["--domain-key".into(), self.domain_key.clone().into()]);
        args.extend(["--listen".into(), "127.0.0.1:0".into(), "--local".into(), socket.clone().into()]);
        if let Some(first) = self.peers.first() {
            let status = first.status().await;
            let address = status.listen.first().expect("a peer listens somewhere");
            args.extend(["--join".into(), address.into()]);
        }
        args.extend_from_slice(more);
        let mut process = lab.start(&name, &binaries::path("dht"), &args);
        let client = until(&format!("{name} answers"), limits::START, async || {
            process.assert_alive();
            SiteClient::connect(&socket).await.ok()
        })
        .await;
        self.peers.push(Peer { name, process, socket, client, files: 0 });
        self.peers.last_mut().expect("it was just added")
    }

    /// Waits until every peer sees every other, holds `memories` of VMs in all, and all content is in the index.
    pub async fn ready(&mut self, memories: usize) {
        let (others, name) = (self.peers.len() - 1, &self.name);
        let peers = &mut self.peers;
        until(&format!("all content of site {name} is in its index"), limits::INDEXED, async || {
            let mut found = 0;
            for peer in peers.iter_mut() {
                peer.process.assert_alive();
                let status = peer.status().await;
                let contents = &status.contents;
                let of_kind = |kind| contents.iter().filter(|content| content.kind == kind).count();
                let files = of_kind("file");
                found += of_kind("memory");
                let indexed = contents.iter().all(|content| content.scanned && content.announced);
                let seen = status.peers.iter().filter(|other| other.answering).count();
                if !status.ready || !indexed || files < peer.files || seen < others {
                    return None;
                }
            }
            (found >= memories).then_some(())
        })
        .await;
    }
}

impl Peer {
    /// Its name in the lab.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its local socket, for the vmms of its host.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// What it says of itself.
    pub async fn status(&self) -> SiteStatus {
        match self.client.status().await {
            Ok(status) => status,
            Err(error) => panic!("{} does not say how it is: {error:?}", self.name),
        }
    }

    /// `dht add`: has it index and serve a file.
    pub async fn add(&mut self, file: &Path) {
        let args = ["add".into(), file.into(), "--local".into(), self.socket.clone().into()];
        let said = run("dht", &args).await;
        assert!(said.ok, "dht add: {}", said.stderr);
        self.files += 1;
    }
}

async fn keygen(path: &Path) {
    let said = run("dht", &["keygen".into(), "--out".into(), path.into()]).await;
    assert!(said.ok, "dht keygen: {}", said.stderr);
}
