//! The user's terminal in raw mode, so that every key reaches the guest.

use std::io;
use std::sync::Mutex;

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

use crate::kvm::threads::lock;

/// The settings to go back to, while the terminal is raw.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Puts the terminal back as it was. Called when a machine ends; a program that ends without dropping its machines
/// (by a signal, by `std::process::exit`) calls it too. Does nothing if the terminal is not raw.
pub fn restore() {
    let Some(before) = lock(&BEFORE).take() else { return };
    if let Err(error) = tcsetattr(io::stdin(), OptionalActions::Now, &before) {
        tracing::error!(%error, "could not restore the terminal: type `reset`");
    }
}

/// Keeps the terminal raw until dropped.
#[derive(Debug)]
pub(crate) struct RawTerminal(());

impl RawTerminal {
    /// Makes the terminal on standard input raw; none if there is none.
    pub(crate) fn enter() -> io::Result<Option<Self>> {
        if !isatty(io::stdin()) {
            return Ok(None);
        }
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        // The guest's and the log's line ends must stay readable on this terminal: leave output processing on.
        raw.output_modes = before.output_modes;
        let mut kept = lock(&BEFORE);
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        kept.get_or_insert(before);
        Ok(Some(Self(())))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}
