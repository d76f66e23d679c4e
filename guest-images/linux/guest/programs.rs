//! Programs that people run: a compressor, a database and a web server, each checked by what it gives back.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::thread;

use crate::content::Content;
use crate::status::{Options, Status};

/// Bytes that are compressed in a round; every other 512 are zero, so that there is something to gain.
const GZIP_BYTES: usize = 256 * 1024;
/// Rows that a round adds to the table.
const ROWS: u64 = 50;
/// Rows at which the table starts anew.
const ROWS_MAX: u64 = 20_000;
/// Bytes of the page that the web server serves.
const PAGE_BYTES: usize = 32 * 1024;

/// Compresses a file and expands it again, by `gzip`.
pub(crate) fn gzip(options: &Options) -> io::Result<()> {
    let mut status = Status::of("gzip")?;
    fs::create_dir_all(&options.directory)?;
    let path = options.directory.join("gzip.in");
    let mut bytes = vec![0; GZIP_BYTES];
    for round in 0_u64.. {
        let mut content = Content::new(options.seed.wrapping_add(round));
        for part in bytes.chunks_mut(1024) {
            content.fill(&mut part[..512]);
        }
        fs::write(&path, &bytes)?;
        let packed = output(Command::new("gzip").arg("-c").arg(&path))?;
        let mut child =
            Command::new("gzip").arg("-dc").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let Some(mut input) = child.stdin.take() else { unreachable!("it was asked to be piped") };
        let length = packed.len() as u64;
        // Both pipes are short, so one thread feeds while another reads.
        let feeder = thread::spawn(move || input.write_all(&packed));
        let unpacked = child.wait_with_output()?;
        feeder.join().map_err(|_| io::Error::other("the thread that feeds gzip panicked"))??;
        if unpacked.stdout != bytes {
            status.fail(format!("round {round}: gzip -d gave back other bytes"));
        }
        status.round(&[("packed_bytes", length)])?;
        thread::sleep(options.pause);
    }
    Ok(())
}

/// Adds rows to a table and has the database add them up, by `sqlite3`.
pub(crate) fn sqlite(options: &Options) -> io::Result<()> {
    let mut status = Status::of("sqlite")?;
    fs::create_dir_all(&options.directory)?;
    let path = options.directory.join("rows.db");
    let mut rows = 0;
    loop {
        let start = if rows == 0 {
            "DROP TABLE IF EXISTS rows; CREATE TABLE rows(id INTEGER PRIMARY KEY, word TEXT);"
        } else {
            ""
        };
        let last = rows + ROWS;
        let statements = format!(
            "{start} BEGIN; WITH RECURSIVE n(i) AS (SELECT {first} UNION ALL SELECT i + 1 FROM n WHERE i < {last}) \
             INSERT INTO rows SELECT i, 'row ' || i FROM n; COMMIT; \
             SELECT count(*), sum(id), sum(length(word)) FROM rows; PRAGMA integrity_check;",
            first = rows + 1,
        );
        let said = output(Command::new("sqlite3").arg(&path).arg(statements))?;
        let said = String::from_utf8_lossy(&said).trim().replace('\n', " ");
        let words: u64 = (1..=last).map(|id| 4 + u64::from(id.ilog10() + 1)).sum();
        let expected = format!("{last}|{}|{words} ok", last * (last + 1) / 2);
        if said != expected {
            status.fail(format!("the database says {said:?}, not {expected:?}"));
        }
        status.round(&[("rows", last)])?;
        rows = if last >= ROWS_MAX { 0 } else { last };
        thread::sleep(options.pause);
    }
}

/// Fetches a page from the guest's own web server, busybox httpd, over and over.
pub(crate) fn http(options: &Options) -> io::Result<()> {
    let mut status = Status::of("http")?;
    fs::create_dir_all("/tmp/www")?;
    let mut page = vec![0; PAGE_BYTES];
    Content::new(options.seed).fill(&mut page);
    fs::write("/tmp/www/page", &page)?;
    // It puts itself into the background once it listens.
    output(Command::new("httpd").args(["-p", "80", "-h", "/tmp/www"]))?;
    loop {
        let mut connection = TcpStream::connect(("127.0.0.1", 80))?;
        connection.write_all(b"GET /page HTTP/1.0\r\n\r\n")?;
        let mut answer = Vec::new();
        connection.read_to_end(&mut answer)?;
        if !answer.starts_with(b"HTTP/1.") || !answer.ends_with(&page) {
            status.fail(format!("the server sent {} bytes that do not end in the page", answer.len()));
        }
        status.round(&[("answer_bytes", answer.len() as u64)])?;
        thread::sleep(options.pause);
    }
}

/// What `command` printed, if it ended well.
fn output(command: &mut Command) -> io::Result<Vec<u8>> {
    let output =
        command.output().map_err(|error| io::Error::new(error.kind(), format!("{command:?}: {error}")))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(io::Error::other(format!(
        "{command:?} {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    )))
}
