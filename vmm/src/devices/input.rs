//! Standard input, fed to the serial port or the console as fast as the guest reads it.

use std::io;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};

use super::DeviceError;
use super::serial::FIFO_BYTES;
use super::terminal::RawTerminal;
use super::wake::Wake;
use crate::kvm::threads::lock;

/// At a terminal this key begins a command to the monitor, as in QEMU: then x ends the VM, itself sends it to the guest.
const ESCAPE: u8 = 0x01;

/// What takes input for the guest.
pub(crate) trait InputPort: Send + Sync + std::fmt::Debug {
    /// Waits until a byte can be given to the guest; false when there never will be one again.
    fn wait_for_room(&self) -> bool;
    /// Gives the guest as many of `bytes` as it takes now, and says how many: none while the machine stands still.
    fn give(&self, bytes: &[u8]) -> usize;
    /// Holds input back, as while the machine stands still, or lets it in.
    fn set_open(&self, open: bool);
    /// Takes no input ever again.
    fn close_for_good(&self);
}

/// The thread.
#[derive(Debug)]
pub(crate) struct Input {
    stop: Arc<Wake>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Input {
    /// Starts it. `on_quit` is called when the user at the terminal asks for the end.
    pub(crate) fn start(
        port: Arc<dyn InputPort>,
        on_quit: impl Fn() + Send + 'static,
    ) -> Result<Self, DeviceError> {
        let setup = |step| move |source| DeviceError::SerialSetup { step, source };
        let stop = Arc::new(Wake::new().map_err(setup("its wake-up event"))?);
        let terminal = RawTerminal::enter().map_err(setup("the terminal"))?;
        let theirs = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("serial-in".to_owned())
            .spawn(move || {
                let mut keys = terminal.as_ref().map(|_| Keys::default());
                if let Err(error) = feed(&*port, &theirs, &on_quit, &mut keys) {
                    tracing::warn!(%error, "standard input cannot be read: the serial port gets no more input");
                }
            })
            .map_err(setup("its input thread"))?;
        Ok(Self { stop, thread: Mutex::new(Some(thread)) })
    }

    /// Ends it and gives the terminal back. The port must have been closed before.
    pub(crate) fn stop(&self) {
        self.stop.wake();
        // A user's quit key ends the machine on this very thread: then whoever drops the machine joins it.
        let another = |thread: &mut JoinHandle<()>| thread.thread().id() != std::thread::current().id();
        let thread = lock(&self.thread).take_if(another);
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread of the serial input panicked");
        }
    }
}

/// The keys of a terminal: looks for the escape key.
#[derive(Debug, Default)]
struct Keys {
    escaped: bool,
}

impl Keys {
    /// What goes to the guest, and whether the user asked for the end.
    fn filter(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut to_guest = Vec::with_capacity(typed.len());
        for byte in typed {
            match (std::mem::take(&mut self.escaped), *byte) {
                (true, b'x' | b'X') => return (to_guest, true),
                (false, ESCAPE) => self.escaped = true,
                (true | false, byte) => to_guest.push(byte),
            }
        }
        (to_guest, false)
    }
}

fn feed(port: &dyn InputPort, stop: &Wake, on_quit: &impl Fn(), keys: &mut Option<Keys>) -> io::Result<()> {
    let stdin = io::stdin();
    let mut buffer = [0; FIFO_BYTES];
    loop {
        // A terminal's keys are always read, or the escape key would wait behind input that a stuck guest does not take.
        if keys.is_none() && !port.wait_for_room() {
            return Ok(());
        }
        let mut fds = [PollFd::new(&stdin, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        if !fds[1].revents().is_empty() {
            return Ok(());
        }
        let count = match rustix::io::read(&stdin, &mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => continue,
            Err(error) => return Err(error.into()),
        };
        let (bytes, quit) =
            keys.as_mut().map_or_else(|| (buffer[..count].to_vec(), false), |k| k.filter(&buffer[..count]));
        if quit {
            on_quit();
            return Ok(());
        }
        if !deliver(port, &bytes, keys.is_some()) {
            return Ok(());
        }
    }
}

/// Gives the port all of `bytes`; false when it takes no more for good. What a terminal's user types while the guest's
/// buffer is full is dropped, as real serial ports do.
fn deliver(port: &dyn InputPort, mut bytes: &[u8], may_drop: bool) -> bool {
    while !bytes.is_empty() {
        let taken = port.give(bytes);
        bytes = &bytes[taken..];
        if taken == 0 && may_drop {
            return true;
        }
        if taken == 0 && !port.wait_for_room() {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_escape_key_ends_the_vm_and_passes_itself_on() {
        let mut keys = Keys::default();
        assert_eq!(keys.filter(b"ab"), (b"ab".to_vec(), false));
        assert_eq!(keys.filter(&[ESCAPE]), (vec![], false));
        assert_eq!(keys.filter(&[ESCAPE, b'q']), (vec![ESCAPE, b'q'], false));
        assert_eq!(keys.filter(&[b'z', ESCAPE, b'x', b'y']), (vec![b'z'], true));
    }
}
