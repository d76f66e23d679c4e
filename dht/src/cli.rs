//! The command line of `dht`, also reached as `tern dht`.

use std::{
    io::{self, IsTerminal, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, bail};
use clap::{Parser, Subcommand, ValueEnum};
use libp2p::Multiaddr;
use page::{Domain, PAGE_SIZE, Page, ShortId, is_zero};

use crate::{
    SiteClient,
    config::{
        Budgets, Fault, MeshLimits, NodeConfig, Retention, parse_address, parse_bytes, parse_fault,
        parse_percent,
    },
    content::file::ServedFile,
    identity::{SiteKey, peer_identity},
    limits::{CONNECTIONS, LEASE, MESH, OWNER_ENTRIES},
    metrics, node, status_text,
};

/// A site's peer: knows which host of the site holds which page, and serves and fetches pages.
#[derive(Debug, Parser)]
#[command(name = "dht", version)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Makes a new site key (or domain key) and writes it to a file of mode 0600.
    Keygen {
        /// The file to create; an existing one is never overwritten. Without it the key goes to standard output.
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// Runs this host's peer until SIGTERM or SIGINT.
    Serve(Box<Serve>),
    /// Has the peer index and serve files, for as long as its process lasts: after a restart add them again, or name them with `dht serve --add`.
    ///
    /// A file that changes, grows or is replaced is read again; one that is deleted is let go.
    Add {
        /// The files: regular ones, not block devices.
        #[arg(required = true)]
        files: Vec<PathBuf>,
        #[command(flatten)]
        peer: PeerSocket,
    },
    /// Shows the peer's state.
    Status {
        #[command(flatten)]
        peer: PeerSocket,
        /// As one JSON object.
        #[arg(long, conflicts_with = "metrics")]
        json: bool,
        /// As Prometheus' text, the same that `dht serve --metrics` serves.
        #[arg(long)]
        metrics: bool,
    },
    /// Shows who holds a page; exit code 1 if nobody is known to.
    Locate {
        /// The page's name in hex, whole (64 digits) or its first 16 digits.
        #[arg(value_parser = parse_name, required_unless_present = "file", conflicts_with = "file")]
        name: Option<ShortId>,
        /// Instead of a name: a file that has the page. Its name in the peer's domain is shown along.
        #[arg(long)]
        file: Option<PathBuf>,
        /// Which page of FILE, of 4096 bytes, counted from 0.
        #[arg(long, value_name = "N", requires = "file", default_value_t = 0)]
        page: u32,
        #[command(flatten)]
        peer: PeerSocket,
        /// As one JSON array.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, clap::Args)]
struct PeerSocket {
    /// The local socket of this host's peer.
    #[arg(long)]
    local: PathBuf,
}

#[derive(Debug, clap::Args)]
struct Serve {
    /// The key that all peers of the site share.
    #[arg(long)]
    site_key: PathBuf,
    /// The key of the dedup domain; without it the site key's file serves as the domain's key as well.
    #[arg(long)]
    domain_key: Option<PathBuf>,
    /// Where to listen for other peers: IP:PORT or a multiaddr. Port 0 takes a free one.
    #[arg(long, value_parser = parse_address)]
    listen: Multiaddr,
    /// A peer to join the site by: IP:PORT or a multiaddr. Tried again until it answers.
    #[arg(long, value_parser = parse_address)]
    join: Vec<Multiaddr>,
    /// The Unix socket for the processes of this host.
    #[arg(long)]
    local: PathBuf,
    /// A file to index and serve from the start, as `dht add` does; may be given several times. One that cannot be served ends the peer.
    #[arg(long, value_name = "FILE")]
    add: Vec<PathBuf>,
    /// This peer's own key, created if absent; without it the peer has a new identity at each start.
    #[arg(long)]
    identity: Option<PathBuf>,
    /// Keep the memories of VMs that have left this host as checkpoints in this directory, so that they find their pages when they come back.
    #[arg(long, value_name = "DIR", requires = "retain_budget")]
    retain: Option<PathBuf>,
    /// Bytes that retained checkpoints may take on disk (100G is 100 GiB); those unused for longest give way.
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes, requires = "retain")]
    retain_budget: Option<u64>,
    /// CPU time that reading and hashing this host's content may take, in percent of one core. Without it the first look at a content takes what
    /// is idle, and later looks share a tenth of a core.
    #[arg(long, value_name = "PERCENT", value_parser = parse_percent)]
    cpu_budget: Option<u32>,
    /// Bytes a second that announcing this host's content to other peers may take (12M is 12 MiB). Without it there is no bound.
    #[arg(long, value_name = "BYTES/s", value_parser = parse_bytes)]
    lan_budget: Option<u64>,
    /// Where to serve metrics for Prometheus over plain HTTP (GET /metrics): IP:PORT. Whoever reaches it may read them.
    #[arg(long, value_name = "IP:PORT")]
    metrics: Option<SocketAddr>,
    /// How to log, on standard error; `TERN_LOG` filters (`TERN_LOG=dht=debug`).
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    /// Members up to which everyone is connected to everyone; low to have a small site behave as a large one.
    #[arg(long, hide = true, default_value_t = MESH)]
    mesh: usize,
    /// Connections beyond which unused ones are let go.
    #[arg(long, hide = true, default_value_t = CONNECTIONS)]
    connections: usize,
    /// Names that this peer keeps as an owner; few to have a small site behave as a full one.
    #[arg(long, hide = true, default_value_t = OWNER_ENTRIES)]
    owner_entries: usize,
    /// How long announcements last unless they are renewed, in seconds; the same for all peers of a site, low to test in little time.
    #[arg(long, hide = true, default_value_t = LEASE.as_secs(), value_parser = clap::value_parser!(u64).range(1..=86_400))]
    lease: u64,
    /// Misbehave towards other peers, to test a site's tolerance: wrong-bytes, silent, slow=MILLISECONDS, old-owners, announce-false or flood.
    #[arg(long, hide = true, value_parser = parse_fault)]
    fault: Option<Fault>,
}

/// How to log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}

fn parse_name(text: &str) -> Result<ShortId, String> {
    let digits = text.chars().all(|c| c.is_ascii_hexdigit());
    let front = text.get(..16).filter(|_| digits && matches!(text.len(), 16 | 64));
    let front = front.ok_or("give 16 or 64 hex digits")?;
    u64::from_str_radix(front, 16).map(ShortId).map_err(|error| error.to_string())
}

/// Runs a command; errors go to standard error.
#[must_use]
pub fn run(cli: Cli) -> ExitCode {
    match &cli.command {
        // Kademlia warns when the first peer of a site finds nobody to ask, which is as it should be.
        Command::Serve(serve) => start_log(serve.log_format, "info,libp2p_kad=error"),
        Command::Keygen { .. } | Command::Add { .. } | Command::Status { .. } | Command::Locate { .. } => {
            start_log(LogFormat::Text, "warn");
        }
    }
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&error.into()),
    };
    match runtime.block_on(execute(cli.command)) {
        Ok(code) => code,
        Err(error) => failed(&error),
    }
}

fn failed(error: &anyhow::Error) -> ExitCode {
    // Standard error may be closed; then there is nobody to tell.
    let _ = writeln!(io::stderr(), "dht: {error:#}");
    ExitCode::FAILURE
}

/// Logs to standard error; `TERN_LOG` chooses what. A process that has a log already keeps it.
fn start_log(format: LogFormat, default: &str) {
    let chosen = std::env::var("TERN_LOG").ok().filter(|chosen| !chosen.is_empty());
    let filter = tracing_subscriber::EnvFilter::builder().parse_lossy(chosen.as_deref().unwrap_or(default));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal());
    let started = match format {
        LogFormat::Text => log.try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
    if let Err(error) = started {
        // Only a program that embeds this command line and logs already comes here.
        tracing::debug!(error, "logging was set up before");
    }
}

async fn execute(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Locate { name, file, page, peer, json } => {
            return locate(&connect(&peer).await?, name, file.as_deref().map(|file| (file, page)), json)
                .await;
        }
        Command::Keygen { out } => keygen(out),
        Command::Serve(serve) => serve_peer(*serve).await,
        Command::Add { files, peer } => {
            let client = connect(&peer).await?;
            for file in files {
                let pages = client.add_file(&file).await?;
                print(&format!("{}: {pages} pages\n", file.display()))?;
            }
            Ok(())
        }
        Command::Status { peer, json, metrics } => {
            let status = connect(&peer).await?.status().await?;
            print(&match (json, metrics) {
                (true, _) => serde_json::to_string_pretty(&status)? + "\n",
                (false, true) => metrics::text(&status),
                (false, false) => status_text::describe(&status),
            })
        }
    }?;
    Ok(ExitCode::SUCCESS)
}

/// Shows who holds the page of `name`, or that of a file.
async fn locate(
    client: &SiteClient,
    name: Option<ShortId>,
    of_file: Option<(&Path, u32)>,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let id = match (name, of_file) {
        (Some(name), _) => name,
        (None, Some((file, number))) => {
            let name = client.domain().name(&*page_of_file(file, number)?);
            if !json {
                print(&format!("page {number} of {} is {name}\n", file.display()))?;
            }
            name.short()
        }
        (None, None) => unreachable!("the command line has one of them"),
    };
    let holders = client.locate(id).await?;
    print(&if json { holders_json(&holders)? } else { holders_text(&holders) })?;
    Ok(if holders.is_empty() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn page_of_file(path: &Path, number: u32) -> anyhow::Result<Box<Page>> {
    let file = ServedFile::open(path)?;
    let mut page = Box::new([0; PAGE_SIZE]);
    let there = file.read_run(number, &mut page[..]);
    if !there.with_context(|| format!("cannot read {}", path.display()))? {
        bail!("{} has {} pages, counted from 0: there is no page {number}", path.display(), file.pages());
    }
    if is_zero(&page) {
        bail!(
            "page {number} of {} is all zeroes: such pages are never asked for, so nobody has them indexed",
            path.display()
        );
    }
    Ok(page)
}

fn keygen(out: Option<PathBuf>) -> anyhow::Result<()> {
    let key = SiteKey::generate()?;
    match out {
        Some(path) => Ok(key.write_new(&path)?),
        None => print(&key.to_text()),
    }
}

async fn serve_peer(serve: Serve) -> anyhow::Result<()> {
    let site_key = SiteKey::read(&serve.site_key)?;
    let domain_key = match &serve.domain_key {
        Some(path) => SiteKey::read(path)?.domain_key(),
        None => site_key.domain_key(),
    };
    let config = NodeConfig {
        domain: Domain::from_key(&domain_key),
        identity: peer_identity(serve.identity.as_deref())?,
        site_key,
        listen: serve.listen,
        join: serve.join,
        local: serve.local,
        files: serve.add.iter().map(std::path::absolute).collect::<Result<_, _>>().context("--add")?,
        retention: serve
            .retain
            .zip(serve.retain_budget)
            .map(|(dir, budget_bytes)| Retention { dir, budget_bytes }),
        budgets: Budgets { cpu_percent: serve.cpu_budget, lan_bytes_per_second: serve.lan_budget },
        metrics: serve.metrics,
        owner_entries: serve.owner_entries.min(OWNER_ENTRIES),
        mesh: MeshLimits { mesh: serve.mesh, connections: serve.connections },
        lease: Duration::from_secs(serve.lease),
        fault: serve.fault,
    };
    let started =
        |peer_id: &str, address: &Multiaddr| print(&format!("peer {peer_id} listening on {address}\n"));
    node::serve(config, started).await
}

async fn connect(peer: &PeerSocket) -> anyhow::Result<SiteClient> {
    Ok(SiteClient::connect(&peer.local).await?)
}

fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("cannot write to standard output")
}

fn holders_json(holders: &[crate::Holder]) -> anyhow::Result<String> {
    let rows = holders.iter().map(|holder| {
        let rung = match holder.rung {
            crate::FoundOn::Host => "host",
            crate::FoundOn::Site => "site",
        };
        serde_json::json!({"rung": rung, "peer_id": holder.peer_id, "what": holder.what})
    });
    Ok(serde_json::to_string_pretty(&rows.collect::<Vec<_>>())? + "\n")
}

fn holders_text(holders: &[crate::Holder]) -> String {
    if holders.is_empty() {
        return "no holder known\n".to_owned();
    }
    let line = |holder: &crate::Holder| match holder.rung {
        crate::FoundOn::Host => format!("host {} {}\n", holder.peer_id, holder.what),
        crate::FoundOn::Site => format!("site {}\n", holder.peer_id),
    };
    holders.iter().map(line).collect()
}
