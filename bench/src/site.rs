//! Real `dht serve` processes on loopback, for the benches of a site.

use std::error::Error;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use dht::SiteClient;

use crate::Killed;

/// No peer takes longer to be ready, even with 8 GiB on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(1800);
/// Between two looks at whether a peer is ready.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// A site's key in a directory, and the program of its peers.
#[derive(Debug)]
pub struct Site {
    dht: PathBuf,
    dir: PathBuf,
}

/// A peer's process; killed when dropped.
#[derive(Debug)]
pub struct Peer {
    /// The process.
    pub process: Killed,
    /// Where it listens, in the form that `--join` takes.
    pub address: String,
    /// Its local socket.
    pub socket: PathBuf,
}

impl Site {
    /// A site without peers in `dir`, of the `dht` that stands beside this program.
    ///
    /// # Errors
    /// If `dht` was not built, or cannot make a key.
    pub fn new(dir: &Path) -> Result<Self, Box<dyn Error>> {
        let dht = std::env::current_exe()?.with_file_name("dht");
        if !dht.exists() {
            return Err(format!("{} is missing: `cargo build --release -p dht` first", dht.display()).into());
        }
        let site = Self { dht, dir: dir.to_owned() };
        if !Command::new(&site.dht).args(["keygen", "--out"]).arg(site.key()).status()?.success() {
            return Err("dht keygen failed".into());
        }
        Ok(site)
    }

    /// The file of its key.
    #[must_use]
    pub fn key(&self) -> PathBuf {
        self.dir.join("key")
    }

    /// Starts a peer, and waits until it listens.
    ///
    /// # Errors
    /// What it says if it does not start.
    pub fn serve(&self, name: &str, join: Option<&Peer>) -> Result<Peer, Box<dyn Error>> {
        let (socket, log) = (self.dir.join(format!("{name}.sock")), self.dir.join(format!("{name}.log")));
        let mut command = Command::new(&self.dht);
        command.args(["serve", "--listen", "127.0.0.1:0", "--site-key"]).arg(self.key());
        command.arg("--local").arg(&socket).stdout(Stdio::piped()).stderr(File::create(&log)?);
        if let Some(peer) = join {
            command.args(["--join", &peer.address]);
        }
        let mut process = Killed(command.spawn()?);
        let output = process.0.stdout.take().ok_or("its output is piped")?;
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line)?;
        let Some(address) = line.split_whitespace().last().map(str::to_owned) else {
            return Err(fs::read_to_string(log)?.into());
        };
        Ok(Peer { process, address, socket })
    }
}

impl Peer {
    /// CPU time of the peer so far, seconds (proc(5), fields 14 and 15 of stat: threads that have ended are in it).
    ///
    /// # Errors
    /// If the process has ended.
    pub fn cpu_s(&self) -> Result<f64, Box<dyn Error>> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.process.0.id()))?;
        let fields = stat.rsplit(')').next().ok_or("stat has a name")?.split_whitespace();
        let ticks = fields.skip(11).take(2).map(str::parse::<f64>).sum::<Result<f64, _>>()?;
        Ok(ticks / rustix::param::clock_ticks_per_second() as f64)
    }
}

/// Waits until a peer sees `others` other peers and has told them all it has.
///
/// # Errors
/// Those of the client, and if it takes too long.
pub async fn ready(client: &SiteClient, others: usize) -> Result<(), Box<dyn Error>> {
    let end = Instant::now() + PATIENCE;
    loop {
        let status = client.status().await?;
        if status.ready && status.peers.len() == others {
            return Ok(());
        }
        if Instant::now() > end {
            return Err(format!("the peer does not become ready: {status:#?}").into());
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}
