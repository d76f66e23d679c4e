//! Real `dht` processes on loopback.

use std::{
    fs::File,
    io::{BufRead, BufReader, Write},
    os::{fd::OwnedFd, unix::process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use dht::{Found, MemoryExtent, SiteClient, SiteStatus, Told};
use page::{Domain, PAGE_SIZE, Page, ShortId};
use rustix::process::Signal;

/// No condition in these tests takes longer, even on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) fn dht() -> Command {
    Command::new(env!("CARGO_BIN_EXE_dht"))
}

/// A directory with a site key, and the peers that were started in it.
pub(crate) struct Site {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) key: PathBuf,
}

impl Site {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("site.key");
        assert!(dht().arg("keygen").arg("--out").arg(&key).status().unwrap().success());
        Self { dir, key }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A peer's key file with `secret` in it, for a test that minds who owns what.
    pub(crate) fn identity(&self, name: &str, secret: [u8; 32]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, format!("tern peer identity 1\n{}\n", hex::encode(secret))).unwrap();
        path
    }

    pub(crate) fn peer(&self, name: &str, join: &[&Peer], more: &[&str]) -> Peer {
        self.peer_with_key(name, &self.key, join, more)
    }

    pub(crate) fn peer_with_key(&self, name: &str, key: &Path, join: &[&Peer], more: &[&str]) -> Peer {
        self.start(dht(), name, key, "127.0.0.1:0", join, more)
    }

    /// A peer that listens at a certain address.
    pub(crate) fn peer_at(&self, listen: &str, name: &str, more: &[&str]) -> Peer {
        self.start(dht(), name, &self.key, listen, &[], more)
    }

    /// A peer that another program starts: one that puts it into a namespace, and then becomes the peer or outlives it.
    pub(crate) fn peer_within(
        &self,
        wrapper: &[&str],
        name: &str,
        ip: &str,
        join: &[&Peer],
        more: &[&str],
    ) -> Peer {
        let mut command = Command::new(wrapper[0]);
        command.args(&wrapper[1..]).arg(env!("CARGO_BIN_EXE_dht"));
        self.start(command, name, &self.key, &format!("{ip}:0"), join, more)
    }

    fn start(
        &self,
        mut command: Command,
        name: &str,
        key: &Path,
        listen: &str,
        join: &[&Peer],
        more: &[&str],
    ) -> Peer {
        let socket = self.path(&format!("{name}.sock"));
        let log = self.path(&format!("{name}.log"));
        command.arg("serve").arg("--site-key").arg(key).arg("--listen").arg(listen);
        command.arg("--local").arg(&socket).args(more);
        for peer in join {
            command.arg("--join").arg(&peer.address);
        }
        command.stdout(Stdio::piped()).stderr(File::create(&log).unwrap());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.split_whitespace().last().unwrap_or_else(|| panic!("{}", read(&log))).to_owned();
        Peer { child, socket, address, log }
    }

    pub(crate) fn file(&self, name: &str, pages: &[Page]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, pages.concat()).unwrap();
        path
    }
}

pub(crate) fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

/// A `dht serve` process; killed when dropped.
pub(crate) struct Peer {
    child: Child,
    pub(crate) socket: PathBuf,
    pub(crate) address: String,
    pub(crate) log: PathBuf,
}

impl Peer {
    pub(crate) async fn client(&self) -> SiteClient {
        SiteClient::connect(&self.socket).await.unwrap()
    }

    /// The address that it printed, as a status shows it.
    pub(crate) fn listens(&self) -> &str {
        self.address.split_once("/p2p/").unwrap().0
    }

    /// Its process id, as in /proc.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What its descriptors are open on.
    pub(crate) fn descriptors(&self) -> Vec<String> {
        let open = std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap();
        // One may be closed between the listing and the look.
        let target =
            |entry: std::io::Result<std::fs::DirEntry>| std::fs::read_link(entry.unwrap().path()).ok();
        open.filter_map(target).map(|target| target.to_string_lossy().into_owned()).collect()
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) fn terminate(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.child.wait().unwrap()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    pub(crate) fn run(&self, args: &[&str]) -> String {
        let output = dht().args(args).arg("--local").arg(&self.socket).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let ended = self.child.try_wait().unwrap();
        if ended.is_none() {
            self.kill();
        }
        // Errors beside the test's own process, if it failed, show what the peer went through.
        if std::thread::panicking() {
            let _ = writeln!(std::io::stderr(), "--- {}\n{}", self.log.display(), read(&self.log));
        }
        if let Some(status) = ended {
            assert!(status.code() != Some(101) && status.signal() != Some(6), "the peer panicked");
        }
    }
}

/// Sites of a dozen peers take turns: on two cores they would starve each other.
pub(crate) static DOZENS: tokio::sync::Semaphore = tokio::sync::Semaphore::const_new(1);

/// Waits until `done` says so.
pub(crate) async fn until<T, F: Future<Output = Option<T>>>(what: &str, mut done: impl FnMut() -> F) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = done().await {
            return value;
        }
        assert!(start.elapsed() < PATIENCE, "waited for {what} in vain");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until a peer sees `others` other peers and has announced all it holds.
pub(crate) async fn ready(client: &SiteClient, others: usize) -> SiteStatus {
    until("a peer to be ready", || async {
        let status = client.status().await.unwrap();
        (status.ready && status.peers.len() == others).then_some(status)
    })
    .await
}

/// Pages that look random, the same for the same seed.
pub(crate) fn pages(seed: u64, count: u64) -> Vec<Page> {
    let page = |n: u64| {
        let mut state = (seed << 32 | n) ^ 0x9e37_79b9_7f4a_7c15;
        let mut page = [0; PAGE_SIZE];
        for word in page.as_chunks_mut::<8>().0 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *word = state.to_le_bytes();
        }
        page
    };
    (0..count).map(page).collect()
}

pub(crate) fn ids(domain: &Domain, pages: &[Page]) -> Vec<ShortId> {
    pages.iter().map(|page| domain.name(page).short()).collect()
}

/// A VM's memory: the descriptor that writes, and a read-only one for the peer.
pub(crate) fn memory(pages: &[Page]) -> (File, OwnedFd) {
    let fd = rustix::fs::memfd_create("test memory", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut file = File::from(fd);
    file.write_all(&pages.concat()).unwrap();
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let read_only = File::open(path).unwrap();
    (file, read_only.into())
}

pub(crate) fn whole(pages: u64) -> [MemoryExtent; 1] {
    [MemoryExtent { first_gfn: 0, pages, file_offset: 0 }]
}

/// Resolves `ids`, and checks that each page hashes to the id it came for, and that each id is answered for once.
pub(crate) async fn resolve(client: &SiteClient, ids: Vec<ShortId>) -> Vec<Found> {
    resolve_while(client, ids, || ()).await
}

/// As [`resolve`]; `meanwhile` happens once the first page has come.
pub(crate) async fn resolve_while(
    client: &SiteClient,
    ids: Vec<ShortId>,
    meanwhile: impl FnOnce(),
) -> Vec<Found> {
    let mut meanwhile = Some(meanwhile);
    let wanted: std::collections::BTreeSet<_> = ids.iter().copied().collect();
    let mut receiver = client.resolve(ids);
    let (mut found, mut seen) = (Vec::new(), std::collections::BTreeSet::new());
    let all = async {
        while let Some(told) = receiver.recv().await {
            match told {
                Told::Found(page) => {
                    assert_eq!(client.domain().name(&page.bytes).short(), page.id);
                    assert!(seen.insert(page.id));
                    found.push(page);
                    meanwhile.take().into_iter().for_each(|meanwhile| meanwhile());
                }
                Told::Missing(ids) => assert!(ids.into_iter().all(|id| seen.insert(id))),
            }
        }
    };
    tokio::time::timeout(PATIENCE, all).await.expect("a search ends");
    assert!(seen == wanted, "each page was found or called missing");
    found
}
