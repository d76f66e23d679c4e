//! A TCP server that answers each line with how many lines it has had on that connection.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use crate::status::{Options, Status};

/// The server's port.
const PORT: u16 = 7000;
/// Connections at a time; the next one waits in the kernel's queue.
const CONNECTIONS: u64 = 16;
/// Between two writes of the status.
const PAUSE: Duration = Duration::from_millis(500);
/// A longer line ends its connection.
const LINE_BYTES: u64 = 1024;

#[derive(Debug, Default)]
struct Totals {
    open: AtomicU64,
    accepted: AtomicU64,
    lines: AtomicU64,
}

pub(crate) fn run(_: &Options) -> io::Result<()> {
    let mut status = Status::of("count")?;
    let listener = TcpListener::bind(("0.0.0.0", PORT))?;
    let totals = Arc::new(Totals::default());
    let of_server = Arc::clone(&totals);
    thread::spawn(move || serve(&listener, &of_server));
    loop {
        status.round(&[
            ("open", totals.open.load(Ordering::Relaxed)),
            ("accepted", totals.accepted.load(Ordering::Relaxed)),
            ("lines", totals.lines.load(Ordering::Relaxed)),
        ])?;
        thread::sleep(PAUSE);
    }
}

fn serve(listener: &TcpListener, totals: &Arc<Totals>) {
    for connection in listener.incoming() {
        let Ok(connection) = connection else { continue };
        totals.accepted.fetch_add(1, Ordering::Relaxed);
        if totals.open.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS {
            totals.open.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let totals = Arc::clone(totals);
        thread::spawn(move || {
            if let Err(error) = answer(&connection, &totals) {
                eprintln!("tern-guest: count: a connection ended: {error}");
            }
            totals.open.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

fn answer(connection: &TcpStream, totals: &Totals) -> io::Result<()> {
    connection.set_nodelay(true)?;
    let mut reader = BufReader::new(connection);
    let mut writer = connection;
    let mut line = Vec::new();
    for count in 1_u64.. {
        line.clear();
        io::Read::take(&mut reader, LINE_BYTES).read_until(b'\n', &mut line)?;
        if line.last() != Some(&b'\n') {
            break; // the end, or a line too long
        }
        totals.lines.fetch_add(1, Ordering::Relaxed);
        writer.write_all(format!("{count}\n").as_bytes())?;
    }
    Ok(())
}
