//! Files that are written, synced and read back for ever, and a set that is written once.
//!
//! Every round writes one of [`SLOTS`] files anew with content of its own seed and reads another one back, byte for
//! byte. The set that stays has its SHA-256 sums made by another program at the start, so that `tern-check` can have that
//! program judge it (`sha256sum -c`).

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use crate::content::Content;
use crate::status::{Options, Status};

/// Files that are rewritten in turn.
const SLOTS: usize = 8;
/// Files that stay.
const KEPT: u64 = 4;
/// Bytes of a file; odd, so that its last page is a part of one.
const BYTES: usize = 64 * 1024 + 77;
/// The file of sums of the set that stays.
const SUMS: &str = "SHA256SUMS";

/// Where the set that stays lies, relative to the work directory.
const KEPT_DIRECTORY: &str = "kept";

/// The file in which the workload leaves the name of its directory, for `tern-check`.
const WHERE: &str = "/run/tern/files.dir";

pub(crate) fn run(options: &Options) -> io::Result<()> {
    let mut status = Status::of("files")?;
    keep(&options.directory.join(KEPT_DIRECTORY), options.seed)?;
    fs::write(WHERE, options.directory.as_os_str().as_encoded_bytes())?;
    let mut written: [Option<u64>; SLOTS] = [None; SLOTS];
    let mut buffer = vec![0; BYTES];
    for round in 0_usize.. {
        let slot = round % SLOTS;
        let seed = options.seed ^ ((round as u64) << 16);
        Content::new(seed).fill(&mut buffer);
        let mut file = File::create(path(&options.directory, slot))?;
        file.write_all(&buffer)?;
        file.sync_all()?;
        written[slot] = Some(seed);

        let other = (round * 5 + 3) % SLOTS;
        if let Some(seed) = written[other]
            && let Some(wrong) = differs(&path(&options.directory, other), seed, &mut buffer)?
        {
            status.fail(wrong);
        }
        status.round(&[("bytes", BYTES as u64), ("files", SLOTS as u64)])?;
        thread::sleep(options.pause);
    }
    Ok(())
}

fn path(directory: &Path, slot: usize) -> PathBuf {
    directory.join(format!("file{slot}"))
}

/// Says what is wrong with the file, if it does not hold the content of `seed`.
fn differs(path: &Path, seed: u64, buffer: &mut Vec<u8>) -> io::Result<Option<String>> {
    buffer.clear();
    File::open(path)?.read_to_end(buffer)?;
    let wrong = if buffer.len() == BYTES {
        Content::new(seed)
            .differs(buffer)
            .map(|offset| format!("byte {offset} of {} is wrong", path.display()))
    } else {
        Some(format!("{} has {} bytes, not {BYTES}", path.display(), buffer.len()))
    };
    buffer.resize(BYTES, 0);
    Ok(wrong)
}

/// Writes the set that stays, and its sums.
fn keep(directory: &Path, seed: u64) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    let mut buffer = vec![0; BYTES];
    let names: Vec<String> = (0..KEPT).map(|number| format!("kept{number}")).collect();
    for (name, number) in names.iter().zip(1..) {
        Content::new(!seed ^ number).fill(&mut buffer);
        fs::write(directory.join(name), &buffer)?;
    }
    let output = Command::new("sha256sum").args(&names).current_dir(directory).output()?;
    if !output.status.success() {
        return Err(io::Error::other(format!("sha256sum: {}", String::from_utf8_lossy(&output.stderr))));
    }
    fs::write(directory.join(SUMS), output.stdout)
}

/// Has `sha256sum` judge the set that stays; `None` when the workload does not run.
pub(crate) fn kept_is_right() -> io::Result<Option<bool>> {
    let directory = match fs::read_to_string(WHERE) {
        Ok(directory) => PathBuf::from(directory).join(KEPT_DIRECTORY),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let status = Command::new("sha256sum").args(["-c", "-s", SUMS]).current_dir(directory).status()?;
    Ok(Some(status.success()))
}
