//! Files that stay open: a log that numbers its lines, and a file whose name is gone.
//!
//! The log is opened once; if the open file were lost, or a write done twice or not at all, the numbers would show it.
//! The file without a name lives only as long as this process' descriptor.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::thread;
use std::time::Duration;

use crate::content::Content;
use crate::status::{DIRECTORY, Options, Status};

/// Between two lines.
const PAUSE: Duration = Duration::from_millis(100);
/// Bytes of the file without a name.
const UNNAMED_BYTES: usize = 8192;

fn path() -> String {
    format!("{DIRECTORY}/journal.log")
}

pub(crate) fn run(options: &Options) -> io::Result<()> {
    let mut status = Status::of("journal")?;
    let mut log = OpenOptions::new().append(true).create_new(true).open(path())?;
    let unnamed = unnamed(options.seed)?;
    let mut read = vec![0; UNNAMED_BYTES];
    for line in 1_u64.. {
        writeln!(log, "{line}")?;
        unnamed.read_exact_at(&mut read, 0)?;
        if let Some(offset) = Content::new(options.seed).differs(&read) {
            status.fail(format!("byte {offset} of the file without a name is wrong"));
        }
        status.round(&[("line", line)])?;
        thread::sleep(PAUSE);
    }
    Ok(())
}

fn unnamed(seed: u64) -> io::Result<File> {
    let path = format!("{DIRECTORY}/unnamed");
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
    let mut bytes = vec![0; UNNAMED_BYTES];
    Content::new(seed).fill(&mut bytes);
    file.write_all_at(&bytes, 0)?;
    fs::remove_file(path)?;
    Ok(file)
}

/// The number of lines if they are 1, 2, 3 and so on without a gap; else what is wrong. `None` when the workload does not run.
pub(crate) fn lines() -> io::Result<Option<Result<u64, String>>> {
    match fs::read_to_string(path()) {
        Ok(log) => Ok(Some(gapless(&log))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn gapless(log: &str) -> Result<u64, String> {
    let mut last = 0;
    for line in log.lines() {
        let expected = last + 1;
        if line.parse() != Ok(expected) {
            return Err(format!("line {expected} of the journal says {line:?}"));
        }
        last = expected;
    }
    Ok(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_or_doubled_line_is_found() {
        assert_eq!(gapless("1\n2\n3\n"), Ok(3));
        assert_eq!(gapless(""), Ok(0));
        assert!(gapless("1\n3\n").unwrap_err().contains("line 2"));
        assert!(gapless("1\n2\n2\n").unwrap_err().contains("line 3"));
    }
}
