//! Where serial output goes: through a bounded buffer and a thread, so that a reader who does not read cannot stall
//! the guest or keep it from being paused.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd as _;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::DeviceError;
use super::wake::Wake;
use crate::config::Serial;
use crate::kvm::threads::lock;
use crate::limits::SERIAL_PENDING_MAX_BYTES;

/// A pipe that poll calls writable takes this much at once without blocking (POSIX's least PIPE_BUF).
const CHUNK_BYTES: usize = 512;

#[derive(Debug, Default)]
struct Pending {
    bytes: VecDeque<u8>,
    dropped: u64,
    finished: bool,
}

#[derive(Debug)]
struct Shared {
    pending: Mutex<Pending>,
    wake: Wake,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// A handle to write to. Clones write to the same place; without one, bytes vanish.
#[derive(Clone, Debug)]
pub(crate) struct Output(Option<Arc<Shared>>);

impl Output {
    /// Standard output, the end of a file, which is made if absent, or nowhere.
    pub(crate) fn open(to: &Serial) -> Result<Self, DeviceError> {
        let setup = |step| move |source| DeviceError::SerialSetup { step, source };
        let file = match to {
            Serial::Stdio => {
                let fd = io::stdout().as_fd().try_clone_to_owned().map_err(setup("standard output"))?;
                File::from(fd)
            }
            Serial::File(path) => {
                let file = File::options().append(true).create(true).open(path);
                file.map_err(|source| DeviceError::SerialFile { path: path.clone(), source })?
            }
            Serial::Off => return Ok(Self(None)),
        };
        Self::to(file).map_err(setup("its output thread"))
    }

    fn to(file: File) -> io::Result<Self> {
        let wake = Wake::new()?;
        let shared = Arc::new(Shared { pending: Mutex::default(), wake, thread: Mutex::new(None) });
        let theirs = Arc::clone(&shared);
        let thread =
            std::thread::Builder::new().name("serial-out".to_owned()).spawn(move || theirs.serve(&file))?;
        *lock(&shared.thread) = Some(thread);
        Ok(Self(Some(shared)))
    }

    /// Writes what can be written without waiting, and ends the thread.
    pub(crate) fn finish(&self) {
        let Some(shared) = &self.0 else { return };
        lock(&shared.pending).finished = true;
        shared.wake.wake();
        let thread = lock(&shared.thread).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread of the serial output panicked");
        }
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(shared) = &self.0 else { return Ok(bytes.len()) };
        let first = {
            let mut pending = lock(&shared.pending);
            if pending.bytes.len() + bytes.len() > SERIAL_PENDING_MAX_BYTES {
                if pending.dropped == 0 {
                    tracing::warn!(
                        "serial output is not being read: what the guest writes beyond 1 MiB is dropped"
                    );
                }
                pending.dropped += bytes.len() as u64;
                return Ok(bytes.len());
            }
            let first = pending.bytes.is_empty();
            pending.bytes.extend(bytes);
            first
        };
        if first {
            shared.wake.wake();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Shared {
    fn next(&self) -> (Vec<u8>, bool) {
        let pending = lock(&self.pending);
        (pending.bytes.iter().take(CHUNK_BYTES).copied().collect(), pending.finished)
    }

    fn serve(&self, file: &File) {
        loop {
            let (chunk, finished) = self.next();
            if chunk.is_empty() {
                if finished {
                    return;
                }
                // Blocks until somebody wrote or finished.
                if let Err(error) = self.wake.wait() {
                    tracing::error!(%error, "the serial output ends: its wake-up event failed");
                    return;
                }
                continue;
            }
            match self.write_chunk(file, &chunk, finished) {
                Ok(0) if finished => return,
                Ok(written) => {
                    lock(&self.pending).bytes.drain(..written);
                }
                Err(error) => {
                    tracing::warn!(%error, "serial output cannot be written and is dropped");
                    lock(&self.pending).bytes.clear();
                }
            }
        }
    }

    /// Writes when the file takes it; 0 if it takes nothing now and `finished` forbids waiting, or if there is news.
    fn write_chunk(&self, mut file: &File, chunk: &[u8], finished: bool) -> io::Result<usize> {
        let mut fds = [PollFd::new(&file, PollFlags::OUT), PollFd::new(&self.wake, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let watched = if finished { &mut fds[..1] } else { &mut fds[..] };
        match poll(watched, finished.then_some(&now)) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(0),
            Err(error) => return Err(error.into()),
        }
        if !fds[1].revents().is_empty() {
            self.wake.clear();
        }
        if fds[0].revents().is_empty() {
            return Ok(0);
        }
        match file.write(chunk) {
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {
                Ok(0)
            }
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn what_is_written_before_the_end_arrives() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        let mut output = Output::open(&Serial::File(path.clone())).unwrap();
        for _ in 0..1000 {
            output.write_all(b"0123456789").unwrap();
        }
        output.finish();
        assert_eq!(std::fs::read(&path).unwrap().len(), 10_000);
    }

    #[test]
    fn a_reader_who_does_not_read_stalls_nobody() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let mut output = Output::to(File::from(writer)).unwrap();
        for _ in 0..SERIAL_PENDING_MAX_BYTES / 1024 + 200 {
            output.write_all(&[b'x'; 1024]).unwrap();
        }
        output.finish();
        drop(output);
        let mut got = Vec::new();
        File::from(reader).read_to_end(&mut got).unwrap();
        assert!(got.len() >= 4096 && got.iter().all(|b| *b == b'x'));
    }
}
