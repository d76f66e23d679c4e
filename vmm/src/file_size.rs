//! The limit of a file's size (`ulimit -f`).

use std::io;

use vmm_sys_util::signal::register_signal_handler;

/// A file that would outgrow the process's limit raises a signal, which would end the process and its VM: with a handler the write fails, which is all that it should.
///
/// # Errors
/// If the system takes no handler.
pub(crate) fn limit_is_an_error() -> io::Result<()> {
    extern "C" fn on_limit(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(libc::SIGXFSZ, on_limit).map_err(io::Error::from)
}
