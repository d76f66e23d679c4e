//! `vmm`: launch a VM, receive one, move one. The command line is the library's, so that `tern vmm …` is the same.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    vmm::cli::run(vmm::cli::Cli::parse())
}
