//! What the serial port or the virtio console is connected to: the user's terminal, a file, or nothing.

use std::sync::Arc;

use super::input::{Input, InputPort};
use super::output::Output;
use super::{DeviceError, terminal};
use crate::config::Serial;

/// The threads between a port and what it is connected to.
#[derive(Debug)]
pub(crate) struct Line {
    pub(super) port: Arc<dyn InputPort>,
    output: Output,
    stdio: bool,
    input: Option<Input>,
}

impl Line {
    /// Connects a port, whose output goes to `output`. No input comes before [`Line::start`].
    pub(super) fn new(port: Arc<dyn InputPort>, output: Output, to: &Serial) -> Self {
        Self { port, output, stdio: *to == Serial::Stdio, input: None }
    }

    /// Lets the user's keys in, if it is the user's terminal; `on_quit` is called when the user asks for the end.
    pub(super) fn start(&mut self, on_quit: impl Fn() + Send + 'static) -> Result<(), DeviceError> {
        if self.stdio {
            self.input = Some(Input::start(Arc::clone(&self.port), on_quit)?);
        }
        Ok(())
    }

    /// Whether standard input and output are its own.
    pub(super) fn is_stdio(&self) -> bool {
        self.stdio
    }

    /// Holds input back, or lets it in.
    pub(crate) fn set_open(&self, open: bool) {
        self.port.set_open(open);
    }

    /// Ends the threads; output that can be written without waiting is written first.
    pub(crate) fn shut_down(&self) {
        self.port.close_for_good();
        if let Some(input) = &self.input {
            input.stop();
        }
        self.end_output();
    }

    /// Gives the user's terminal back, if it is connected to it.
    pub(super) fn release_terminal(&self) {
        if self.input.is_some() {
            terminal::restore();
        }
    }

    /// Writes what output can be written, and takes no more.
    pub(super) fn end_output(&self) {
        self.output.finish();
    }
}

impl Drop for Line {
    /// Also a line that was only opened to see whether it can be has threads.
    fn drop(&mut self) {
        self.shut_down();
    }
}
