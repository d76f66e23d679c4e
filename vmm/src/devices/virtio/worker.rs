//! The thread that serves one device.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};

use super::engine::Engine;
use crate::devices::wake::Wake;
use crate::kvm::threads::lock;

/// The thread: parked at first.
#[derive(Debug)]
pub(super) struct Worker {
    engine: Arc<Engine>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Worker {
    /// Starts it. `notifications` are what the driver's notifications of the queues arrive at.
    pub(super) fn start(engine: &Arc<Engine>, name: &str, notifications: &[Arc<Wake>]) -> io::Result<Self> {
        let notifications = notifications.to_vec();
        let backend = engine.with_core(|core| core.device.backend().map(|fd| fd.try_clone_to_owned()));
        let backend = backend.transpose()?;
        let own = Arc::clone(engine);
        let thread = std::thread::Builder::new()
            .name(format!("virtio-{name}"))
            .spawn(move || serve(&own, &notifications, backend.as_ref()))?;
        Ok(Self { engine: Arc::clone(engine), thread: Mutex::new(Some(thread)) })
    }

    /// Ends it, and returns when it has ended.
    pub(super) fn quit(&self) {
        self.engine.quit();
        if let Some(thread) = lock(&self.thread).take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of a virtio device panicked");
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.quit();
    }
}

fn serve(engine: &Engine, notifications: &[Arc<Wake>], backend: Option<&OwnedFd>) {
    while let Some(serving) = engine.enter() {
        let pass = engine.pass();
        drop(serving);
        if pass.more {
            continue;
        }
        let backend = backend.filter(|_| pass.wants_backend).map(OwnedFd::as_fd);
        if let Err(error) = wait(engine, notifications, backend) {
            tracing::error!(%error, "the thread of a virtio device cannot wait for its driver: the device stands still");
            return;
        }
    }
}

/// Waits for a notification, the backend, or a wish; takes the notifications.
fn wait(engine: &Engine, notifications: &[Arc<Wake>], backend: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut fds = vec![PollFd::new(&engine.wake, PollFlags::IN)];
    fds.extend(notifications.iter().map(|event| PollFd::new(&**event, PollFlags::IN)));
    fds.extend(backend.iter().map(|fd| PollFd::new(fd, PollFlags::IN)));
    loop {
        match poll(&mut fds, None) {
            Ok(_) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let set: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
    let events = std::iter::once(&engine.wake).chain(notifications.iter().map(|event| &**event));
    events.zip(set).filter(|(_, set)| *set).for_each(|(event, _)| event.clear());
    Ok(())
}
