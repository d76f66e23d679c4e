//! The `dht` binary: a site's peer, and the commands that talk to one.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    dht::cli::run(dht::cli::Cli::parse())
}
