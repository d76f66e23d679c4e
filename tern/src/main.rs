//! `tern`: one file that can act as `vmm`, as `dht`, and show both together.
//!
//! `tern vmm …` is `vmm …` and `tern dht …` is `dht …`; so is a link to this file with one of these names. `tern demo` starts this file
//! again and again in these roles.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tern::demo;

/// Moves running KVM virtual machines between sites, sending the names of their pages instead of the pages.
#[derive(Parser, Debug)]
#[command(name = "tern", version)]
struct Cli {
    /// Be killed with the process of this id, which must have started this one.
    #[arg(long, value_name = "PID", hide = true)]
    die_with_parent: Option<i32>,
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand, Debug)]
enum Role {
    /// Runs a VM, or steers one that runs.
    Vmm(vmm::cli::Cli),
    /// Runs a site's peer, or steers one that runs.
    Dht(dht::cli::Cli),
    /// Shows a VM move between two sites on this machine.
    Demo(demo::Options),
    /// Writes the test guest pagestorm, a PVH kernel, to a file for `vmm run --kernel`.
    Guest {
        /// The file; one that is there is replaced.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse_from(with_role(std::env::args_os()));
    if let Some(parent) = cli.die_with_parent
        && let Err(error) = die_with_parent(parent)
    {
        eprintln!("tern: cannot ask to be killed with process {parent}: {error}");
        return ExitCode::FAILURE;
    }
    match cli.role {
        Role::Vmm(cli) => vmm::cli::run(cli),
        Role::Dht(cli) => dht::cli::run(cli),
        Role::Demo(options) => demo::run(&options),
        Role::Guest { out } => write_guest(&out),
    }
}

fn write_guest(out: &Path) -> ExitCode {
    match guest_images::write_pagestorm(out) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tern: cannot write the guest to {}: {error}", out.display());
            ExitCode::FAILURE
        }
    }
}

/// Puts the name that this file was called by in front, where that is a role.
fn with_role(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut args: Vec<_> = args.collect();
    let called = args.first().and_then(|name| Path::new(name).file_name()).map(ToOwned::to_owned);
    if let Some(role) = called.filter(|name| name == "vmm" || name == "dht") {
        args.insert(1, role);
    }
    args
}

/// Has the kernel kill this process when its parent dies; an error if the parent is dead already.
fn die_with_parent(parent: i32) -> std::io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    let now = rustix::process::getppid().map(rustix::process::Pid::as_raw_nonzero);
    if now.is_some_and(|now| now.get() == parent) {
        Ok(())
    } else {
        Err(std::io::Error::other("it is not this process's parent any more"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        with_role(line.split_whitespace().map(Into::into))
    }

    #[test]
    fn the_name_that_the_file_is_called_by_is_a_role() {
        assert_eq!(words("/usr/bin/vmm run"), ["/usr/bin/vmm", "vmm", "run"]);
        assert_eq!(words("dht status"), ["dht", "dht", "status"]);
        assert_eq!(words("./tern demo"), ["./tern", "demo"]);
    }

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
