//! The command line: `vmm …`, and `tern vmm …`, which is the same.
//!
//! `parse` has the values, `commands` what an operator asks of a running VM, `show` how it is printed.

mod commands;
mod devices;
mod parse;
mod show;
mod snapshot;
mod spill;

use std::error::Error as _;
use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};

use devices::DeviceArgs;

use crate::config::{BootProtocol, CpuChoice, Load, Serial, VmConfig};
use crate::control::api::DEFAULT_DOWNTIME_MS;
use crate::control::client::ClientError;
use crate::kvm::KvmError;
use crate::kvm::cpu::{self, BaselineError, CpuModel};
use crate::limits;
use crate::migrate::{HostIdentity, MigrateError, Mode};
use crate::process::{self, Ending, ProcessError};
use crate::spill::SpillError;

const EXIT_CODES: &str = "\
Exit codes:
  0  done; `run`, `receive` and `restore`: the guest powered off, an operator stopped the VM, or it runs at a migration's destination
  1  something failed, and standard error says what and what to do
  2  the command line is wrong
  3  `run`, `receive` and `restore`: the guest or KVM failed; registers and instruction bytes are in the log
  4  `migrate`: the VM still runs here, and standard error says why
  5  `migrate`: in doubt, the VM stands still here and may run there; `run`, `receive` and `restore`: ended by a second signal while in doubt";

/// The KVM monitor: one process a VM.
#[derive(Debug, Parser)]
#[command(name = "vmm", version, about, after_help = EXIT_CODES)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Launch a VM and stay until it has ended or runs elsewhere
    Run(Box<Run>),
    /// Wait for a VM from another host; prints the ticket that `vmm migrate --to` takes
    Receive(Box<Receive>),
    /// Write a VM into a directory while it goes on running
    Snapshot(snapshot::Take),
    /// Make a VM of a snapshot and stay until it has ended or runs elsewhere
    Restore(Box<snapshot::Restore>),
    /// Show what a VM is doing
    Status(Control),
    /// Let the virtual CPUs stand still
    Pause(Control),
    /// Let them run again
    Resume(Control),
    /// End the VM and its process
    Stop(Control),
    /// Ask a VM's guest for so much of its memory: more or less than its balloon has
    Balloon(Balloon),
    /// Move a VM; returns when it runs there, or with the reason why it still runs here. Ctrl-C cancels
    Migrate(Migrate),
    /// Give a VM, which runs at its destination, the memory that its lost source had left in a spill file
    #[command(subcommand)]
    Spill(spill::Spill),
    /// Decide about a VM in doubt
    Resolve(Resolve),
    /// Print this host's line for the authorised keys of others
    Identity(Identity),
    /// Print what `--cpu` takes so that a VM can move between hosts: this host's CPU, or what the CPUs in all the files have
    CpuBaseline(CpuBaseline),
}

#[derive(Debug, Args)]
struct Run {
    /// The kernel: an ELF vmlinux or a bzImage (as /boot/vmlinuz-* are)
    #[arg(long, value_name = "PATH")]
    kernel: PathBuf,
    /// How the kernel is started: pvh, linux64 (Linux's 64-bit boot protocol), or auto: PVH if it is an ELF file that can
    #[arg(long, value_name = "HOW", default_value = "auto", value_parser = parse::boot_protocol)]
    boot: BootProtocol,
    /// Whether ACPI tables describe the machine (on), or an MP table and words on the command line (off, for kernels without ACPI)
    #[arg(long, value_name = "on|off", default_value = "on", value_parser = parse::on_off, action = clap::ArgAction::Set)]
    acpi: bool,
    /// An initial RAM file system
    #[arg(long, value_name = "PATH")]
    initramfs: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "STR", default_value = "", allow_hyphen_values = true)]
    cmdline: String,
    /// RAM, a multiple of 2M
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse::memory)]
    memory: u64,
    /// Virtual CPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=i64::from(limits::CPUS_MAX)))]
    cpus: u8,
    /// Which CPU the guest sees: host, a level of x86-64 (v2 moves to any host of the last decade), or what a file of
    /// `vmm cpu-baseline` has
    #[arg(long, value_name = "host|v2|v3|v4|FILE", default_value = "host", value_parser = parse::cpu)]
    cpu: CpuChoice,
    /// A file put into RAM before the VM starts, as by QEMU's loader device: file=PATH,addr=GPA (repeatable)
    #[arg(long = "load", value_name = "file=PATH,addr=GPA", value_parser = parse::load)]
    loads: Vec<Load>,
    /// Where the serial port goes: stdio, file=PATH or off
    #[arg(long, value_name = "WHERE", default_value = "stdio", value_parser = parse::serial)]
    serial: Serial,
    /// A name for people [default: vm-PID]
    #[arg(long, value_parser = parse::name)]
    name: Option<String>,
    #[command(flatten)]
    devices: DeviceArgs,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Args)]
struct Receive {
    /// Where to listen for the source: ADDR:PORT; port 0 takes a free one
    #[arg(long, value_name = "ADDR:PORT")]
    listen: SocketAddr,
    /// Where the serial port goes: stdio, file=PATH or off
    #[arg(long, value_name = "WHERE", default_value = "off", value_parser = parse::serial)]
    serial: Serial,
    #[command(flatten)]
    devices: DeviceArgs,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Args)]
struct Common {
    /// Where to put the control socket
    #[arg(long, value_name = "SOCKET")]
    control: PathBuf,
    /// The local socket of this site's peer (`dht serve --local`). A destination's site is asked for pages only if the source
    /// has a site too, of the same dedup domain
    #[arg(long, value_name = "SOCKET")]
    site: Option<PathBuf>,
    #[command(flatten)]
    identity: Identity,
    /// The keys of the hosts that this one talks to [default: authorized_keys beside the identity]
    #[arg(long, value_name = "FILE")]
    authorized_keys: Option<PathBuf>,
    /// How to log, on standard error; `TERN_LOG` filters (`TERN_LOG=vmm=debug`)
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

#[derive(Debug, Args)]
struct Identity {
    /// This host's key, made if absent [default: tern/host.key in $XDG_CONFIG_HOME or ~/.config]
    #[arg(long, value_name = "FILE")]
    identity: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct CpuBaseline {
    /// What `vmm cpu-baseline` printed on each host
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,
}

#[derive(Debug, Args)]
struct Control {
    /// The VM's control socket
    #[arg(long, value_name = "SOCKET")]
    control: PathBuf,
    /// Print the answer as one line of JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct Balloon {
    #[command(flatten)]
    control: Control,
    /// How much the guest is to give: 512M, or 0 to give all of it back
    #[arg(long, value_name = "SIZE", value_parser = parse::size)]
    size: u64,
}

#[derive(Debug, Args)]
struct Migrate {
    #[command(flatten)]
    control: Control,
    /// A ticket as `vmm receive` printed it, or ADDR:PORT of a host whose key is authorised here
    #[arg(long, value_name = "TICKET")]
    to: String,
    /// How long the VM may stand still, milliseconds if no unit is said: 300ms, 2s
    #[arg(long, value_name = "TIME", default_value_t = DEFAULT_DOWNTIME_MS, value_parser = parse::downtime)]
    downtime: u64,
    /// Whether the VM may run there before its memory is complete
    #[arg(long, value_enum, default_value_t)]
    mode: Mode,
    /// The most to send, bits a second: 100M, 1G [default: what the link carries]
    #[arg(long, value_name = "RATE", value_parser = parse::bandwidth)]
    bandwidth: Option<u64>,
    /// The most memory that old versions of pages may take here, so that pages written again go as deltas: 64M, 0 for none [default: an eighth of the
    /// VM's memory, 1G at most]
    #[arg(long, value_name = "BYTES", value_parser = parse::size)]
    delta_cache: Option<u64>,
    /// Slow the guest down, step by step, if it writes faster than the link carries; only where it does not go by post-copy (`--mode precopy`)
    #[arg(long)]
    auto_converge: bool,
    /// A directory on storage that outlives this host: before the VM runs there without all of its memory, what it lacks is written here
    #[arg(long, value_name = "DIR")]
    spill: Option<PathBuf>,
    /// How long to dial again when the connection is lost before the hand-over, with the VM running on here: 30s, 5m; 0 gives up at once
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = parse::resume_for)]
    resume_for: u64,
    /// Move nothing: say what it would cost, by a sample of the memory, what the site there holds of it, what the guest writes, and what the link carries
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, Args)]
struct Resolve {
    #[command(flatten)]
    control: Control,
    #[command(flatten)]
    word: Word,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Word {
    /// It does not run at the other end: run it here
    #[arg(long)]
    run_here: bool,
    /// It runs at the other end: let it go here
    #[arg(long)]
    let_go: bool,
}

/// How to log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
enum CliError {
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Identity(#[from] MigrateError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Baseline(#[from] BaselineError),
    #[error("neither XDG_CONFIG_HOME nor HOME is set: say `--identity FILE`")]
    NoHome,
    #[error("cannot write to standard output")]
    Output(#[source] std::io::Error),
    #[error("cannot make {} an absolute path", .0.display())]
    Path(PathBuf, #[source] std::io::Error),
    #[error("{} is not UTF-8, and the control socket speaks JSON: choose another path", .0.display())]
    NotText(PathBuf),
    #[error("cannot start the runtime")]
    Runtime(#[source] std::io::Error),
    #[error(transparent)]
    Spill(#[from] SpillError),
    #[error("the answer cannot be written as JSON")]
    Json(#[from] serde_json::Error),
}

/// Runs a command. What fails is told on standard error.
#[must_use]
pub fn run(cli: Cli) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report(&CliError::Runtime(error)),
    };
    let code = runtime.block_on(dispatch(cli.command)).unwrap_or_else(|error| report(&error));
    // What still holds the machine may outlive this function: the user's terminal must not stay raw because of that.
    crate::devices::terminal::restore();
    runtime.shutdown_background();
    code
}

async fn dispatch(command: Command) -> Result<ExitCode, CliError> {
    match command {
        Command::Run(options) => run_vm(*options).await,
        Command::Receive(options) => receive(*options).await,
        Command::Identity(identity) => print_identity(&identity),
        Command::CpuBaseline(options) => print_baseline(&options.files),
        Command::Snapshot(options) => snapshot::take(options).await,
        Command::Restore(options) => snapshot::restore(*options).await,
        Command::Status(control) => commands::status(&control).await,
        Command::Pause(control) => commands::operate(&control, "pause").await,
        Command::Resume(control) => commands::operate(&control, "resume").await,
        Command::Stop(control) => commands::operate(&control, "stop").await,
        Command::Balloon(options) => commands::balloon(&options.control, options.size).await,
        Command::Migrate(options) => commands::migrate(&options).await,
        Command::Spill(spill::Spill::Send(options)) => spill::send(options).await,
        Command::Resolve(options) => commands::resolve(&options.control, options.word.run_here).await,
    }
}

async fn run_vm(options: Run) -> Result<ExitCode, CliError> {
    let Run {
        kernel,
        boot,
        acpi,
        initramfs,
        cmdline,
        memory,
        cpus,
        cpu,
        loads,
        serial,
        name,
        devices,
        common,
    } = options;
    let common = common.prepare()?;
    let config = VmConfig {
        name: name.unwrap_or_else(|| format!("vm-{}", std::process::id())),
        kernel,
        boot,
        acpi,
        initramfs,
        cmdline,
        memory_bytes: memory,
        cpus,
        loads,
        serial,
        cpu,
        devices: devices.options(),
    };
    Ok(ended(&process::run(&common, config).await?))
}

async fn receive(options: Receive) -> Result<ExitCode, CliError> {
    let common = options.common.prepare()?;
    let announce = |ticket: &str| {
        let mut out = std::io::stdout().lock();
        writeln!(out, "{ticket}")?;
        out.flush()
    };
    let devices = options.devices.options();
    Ok(ended(&process::receive(&common, options.listen, options.serial, devices, announce).await?))
}

fn print_identity(identity: &Identity) -> Result<ExitCode, CliError> {
    let key = identity.key()?;
    let host = HostIdentity::load_or_create(&key, &key.with_file_name("authorized_keys"))?;
    print_line(&host.line())?;
    Ok(ExitCode::SUCCESS)
}

fn print_baseline(files: &[PathBuf]) -> Result<ExitCode, CliError> {
    let mut models =
        files.iter().map(|path| CpuModel::read(path)).collect::<Result<Vec<_>, _>>()?.into_iter();
    let common = match models.next() {
        None => cpu::this_host()?,
        Some(first) => cpu::denominator(first, models.as_slice())?,
    };
    print_line(&common.to_json()?)?;
    Ok(ExitCode::SUCCESS)
}

fn ended(ending: &Ending) -> ExitCode {
    match ending {
        Ending::Guest | Ending::Requested | Ending::Migrated | Ending::LetGo => {
            tracing::info!(?ending, "the process ends");
            ExitCode::SUCCESS
        }
        Ending::Failed(failure) => {
            tracing::error!(failure, "the VM failed");
            ExitCode::from(3)
        }
        Ending::DroppedInDoubt => {
            tracing::error!("the process ends while its VM is in doubt: its copy is lost");
            ExitCode::from(5)
        }
    }
}

impl Common {
    /// Starts logging and fills the defaults in.
    fn prepare(self) -> Result<process::Common, CliError> {
        start_logging(self.log_format);
        let identity = self.identity.key()?;
        let authorized_keys =
            self.authorized_keys.unwrap_or_else(|| identity.with_file_name("authorized_keys"));
        Ok(process::Common { control: self.control, site: self.site, identity, authorized_keys })
    }
}

impl Identity {
    fn key(&self) -> Result<PathBuf, CliError> {
        if let Some(path) = &self.identity {
            return Ok(path.clone());
        }
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let config = set("XDG_CONFIG_HOME").or_else(|| Some(set("HOME")?.join(".config")));
        Ok(config.ok_or(CliError::NoHome)?.join("tern").join("host.key"))
    }
}

fn start_logging(format: LogFormat) {
    let filter = tracing_subscriber::EnvFilter::builder()
        .with_default_directive(tracing::level_filters::LevelFilter::INFO.into())
        .with_env_var("TERN_LOG")
        .from_env_lossy();
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    let started = match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    if let Err(error) = started {
        // Only a program that embeds this command line and logs already comes here.
        tracing::debug!(error, "logging was set up before");
    }
}

fn print_line(line: &str) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).map_err(CliError::Output)
}

fn report(error: &CliError) -> ExitCode {
    let mut message = format!("error: {error}");
    let mut source = error.source();
    while let Some(cause) = source {
        message.push_str(": ");
        message.push_str(&cause.to_string());
        source = cause.source();
    }
    eprintln!("{message}");
    ExitCode::FAILURE
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::config::Level;
    use crate::control::api::DEFAULT_RESUME_FOR_MS;

    fn parsed(line: &str) -> Result<Command, clap::Error> {
        Cli::try_parse_from(line.split(' ')).map(|cli| cli.command)
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn run_takes_every_option() {
        let Ok(Command::Run(run)) = parsed(
            "vmm run --kernel k --boot linux64 --acpi off --initramfs i --cmdline=-x --memory 1G --cpus 2 --cpu v2 --load file=a,addr=1 --load \
             file=b,addr=2 --serial off --name n --control c --site s --identity id --authorized-keys ak --log-format json",
        ) else {
            panic!("not parsed");
        };
        assert_eq!((run.memory, run.cpus, run.cpu), (1 << 30, 2, CpuChoice::Level(Level::V2)));
        assert_eq!((run.boot, run.acpi), (BootProtocol::Linux64, false));
        assert_eq!(run.loads.len(), 2);
        assert_eq!((run.serial, run.name.as_deref()), (Serial::Off, Some("n")));
        assert_eq!(run.common.log_format, LogFormat::Json);
        assert_eq!(run.common.site, Some(PathBuf::from("s")));
    }

    #[test]
    fn what_is_wrong_is_refused() {
        for line in [
            "vmm run --control c",
            "vmm run --kernel k",
            "vmm run --kernel k --control c --cpus 0",
            "vmm run --kernel k --control c --cpus 33",
            "vmm run --kernel k --control c --memory 3M",
            "vmm receive --control c",
            "vmm receive --control c --listen nowhere",
            "vmm resolve --control c",
            "vmm snapshot --control c",
            "vmm snapshot --control c --to d --name ../x",
            "vmm restore --control c",
            "vmm resolve --control c --run-here --let-go",
            "vmm migrate --control c",
            "vmm migrate --control c --to x --downtime 0",
            "vmm spill send --to 127.0.0.1:1",
            "vmm status",
            "vmm balloon --control c",
            "vmm balloon --control c --size 1X",
        ] {
            assert_eq!(parsed(line).unwrap_err().exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn migrate_has_its_defaults() {
        let Ok(Command::Migrate(migrate)) = parsed("vmm migrate --control c --to 127.0.0.1:1") else {
            panic!("not parsed");
        };
        assert_eq!((migrate.downtime, migrate.bandwidth, migrate.control.json), (300, None, false));
        assert_eq!((migrate.mode, migrate.resume_for), (Mode::Hybrid, DEFAULT_RESUME_FOR_MS));
        let Ok(Command::Migrate(migrate)) = parsed(
            "vmm migrate --control c --to 127.0.0.1:1 --downtime 2s --mode precopy --bandwidth 100M --json --resume-for 0",
        ) else {
            panic!("not parsed");
        };
        assert_eq!((migrate.downtime, migrate.bandwidth), (2000, Some(100_000_000)));
        assert_eq!(migrate.resume_for, 0);
        assert_eq!(migrate.mode, Mode::Precopy);
    }
}
