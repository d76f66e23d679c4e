//! tern-guest: the workloads of the test Linux, and the check of all of them.
//!
//! One static program without dependencies, because starting a program is dear where the host's KVM emulates
//! supervisor code (a fork with exec costs 83 ms there, a page fault 1.5 ms). Init starts one process a workload; each
//! checks itself in every round and says how it stands in a file of `/run/tern` ([`status`]). `tern-check`, typed at
//! the console or run by whatever reaches the guest, reads those files, looks at what only an outsider can judge
//! ([`check`]), and prints one line of JSON.
//!
//! Nothing here trusts a checksum alone: content comes from a seed ([`content`]), so every byte can be said again.

use std::process::ExitCode;

mod check;
mod checksum;
mod clock;
mod content;
mod count;
mod dmesg;
mod files;
mod journal;
mod programs;
mod status;

/// What a person who mistyped sees.
const USAGE: &str =
    "usage: tern-guest work NAME [KEY=VALUE ...]   (files checksum journal clock count gzip sqlite http)
       tern-guest ready [WORD ...]           note the kernel's warnings so far, print the READY line
       tern-guest check | tern-check         print every verdict as one line of JSON";

fn main() -> ExitCode {
    let mut words = std::env::args();
    let called = words.next().unwrap_or_default();
    let words: Vec<String> = words.collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let outcome = match (called.ends_with("tern-check"), words.as_slice()) {
        (true, []) | (false, ["check"]) => check::run(),
        (false, ["ready", rest @ ..]) => check::ready(rest),
        (false, ["work", name, options @ ..]) => work(name, options),
        (_, _) => Err(USAGE.to_owned()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("tern-guest: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Runs a workload until it fails to run at all; that a check failed is written into its status, and it goes on.
fn work(name: &str, options: &[&str]) -> Result<(), String> {
    let options = status::Options::parse(options)?;
    let run = match name {
        "files" => files::run,
        "checksum" => checksum::run,
        "journal" => journal::run,
        "clock" => clock::run,
        "count" => count::run,
        "gzip" => programs::gzip,
        "sqlite" => programs::sqlite,
        "http" => programs::http,
        unknown => return Err(format!("there is no workload {unknown}\n{USAGE}")),
    };
    let Err(error) = run(&options) else { return Ok(()) };
    // Its status must not go on saying that all is well.
    let mut status = status::Status::of(name).map_err(|error| format!("{}: {error}", status::DIRECTORY))?;
    status.fail(format!("it ended: {error}"));
    status.round(&[]).map_err(|error| format!("{}: {error}", status::DIRECTORY))?;
    Err(format!("workload {name}: {error}"))
}
