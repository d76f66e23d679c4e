//! What happens without being asked for: a bounded broadcast, and the stream of JSON lines that one reader follows.
//!
//! A reader that falls more than [`EVENT_BACKLOG`] events behind loses the oldest and is told how many. Nobody waits for a reader.

use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures::Stream;
use futures::stream;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use crate::control::api::{ErrorDetail, Event, EventKind, VmState};
use crate::limits::EVENT_BACKLOG;
use crate::migrate::report::{IncomingStatus, Progress, Report};

/// The sending side: one a process.
#[derive(Debug)]
pub struct Events {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// None once the process ends: every stream then ends after what is in its backlog.
    sender: Option<broadcast::Sender<Event>>,
    /// The last state told: a reader that comes later starts from it.
    last: Option<(VmState, Option<String>)>,
}

impl Default for Events {
    fn default() -> Self {
        Self::new()
    }
}

impl Events {
    /// Without a reader.
    #[must_use]
    pub fn new() -> Self {
        let (sender, _) = broadcast::channel(EVENT_BACKLOG);
        Self { inner: Mutex::new(Inner { sender: Some(sender), last: None }) }
    }

    /// Tells the state, if it is another than the last one told.
    pub fn state(&self, state: VmState, reason: Option<String>) {
        let mut inner = self.lock();
        if inner.last.as_ref().is_some_and(|(s, r)| *s == state && *r == reason) {
            return;
        }
        tracing::info!(state = state.as_str(), reason, "the VM's state");
        inner.last = Some((state, reason.clone()));
        inner.send(EventKind::State { state, reason });
    }

    /// Tells how far the migration is.
    pub fn progress(&self, progress: Progress) {
        self.lock().send(EventKind::Progress { progress });
    }

    /// Tells what happens where a VM can arrive.
    pub fn incoming(&self, incoming: IncomingStatus) {
        self.lock().send(EventKind::Incoming { incoming });
    }

    /// Tells how a migration ended.
    pub fn ended(&self, end: Result<Report, ErrorDetail>) {
        self.lock().send(match end {
            Ok(report) => EventKind::Report { report: Box::new(report) },
            Err(error) => EventKind::MigrationFailed { error },
        });
    }

    /// Ends every stream after what it has been sent.
    pub fn close(&self) {
        self.lock().sender = None;
    }

    /// A stream of JSON lines, from the current state on.
    pub fn follow(&self) -> impl Stream<Item = Result<Bytes, serde_json::Error>> + Send + 'static {
        let inner = self.lock();
        let receiver = inner.sender.as_ref().map(broadcast::Sender::subscribe);
        let first = inner.last.clone().map(|(state, reason)| event(EventKind::State { state, reason }));
        drop(inner);
        stream::unfold((first, receiver), |(first, receiver)| async move {
            if let Some(first) = first {
                return Some((line(&first), (None, receiver)));
            }
            let mut receiver = receiver?;
            let next = match receiver.recv().await {
                Ok(event) => event,
                Err(RecvError::Lagged(missed)) => event(EventKind::Lagged { missed }),
                Err(RecvError::Closed) => return None,
            };
            Some((line(&next), (None, Some(receiver))))
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        // Every change is one assignment, so a panic elsewhere leaves nothing half done.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn send(&self, kind: EventKind) {
        if let Some(sender) = &self.sender
            && sender.receiver_count() > 0
            && sender.send(event(kind)).is_err()
        {
            tracing::trace!("the last reader of events left");
        }
    }
}

fn event(kind: EventKind) -> Event {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Event { unix_ms: u64::try_from(now.as_millis()).unwrap_or(u64::MAX), kind }
}

fn line(event: &Event) -> Result<Bytes, serde_json::Error> {
    let mut bytes = serde_json::to_vec(event)?;
    bytes.push(b'\n');
    Ok(Bytes::from(bytes))
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;

    async fn kinds(stream: impl Stream<Item = Result<Bytes, serde_json::Error>>) -> Vec<EventKind> {
        stream.map(|line| serde_json::from_slice::<Event>(&line.unwrap()).unwrap().kind).collect().await
    }

    #[tokio::test]
    async fn a_reader_starts_from_the_current_state_and_ends_with_the_process() {
        let events = Events::new();
        events.state(VmState::Running, None);
        events.state(VmState::Running, None);
        let reader = events.follow();
        events.state(VmState::Paused, None);
        events.close();
        let state = |state| EventKind::State { state, reason: None };
        assert_eq!(kinds(reader).await, [state(VmState::Running), state(VmState::Paused)]);
        assert_eq!(kinds(events.follow()).await, [state(VmState::Paused)]);
    }

    #[tokio::test]
    async fn a_slow_reader_is_told_what_it_missed() {
        let events = Events::new();
        let reader = events.follow();
        for n in 0..EVENT_BACKLOG + 10 {
            events.state(VmState::Running, Some(n.to_string()));
        }
        events.close();
        let kinds = kinds(reader).await;
        assert_eq!(kinds[0], EventKind::Lagged { missed: 10 });
        assert_eq!(kinds.len(), EVENT_BACKLOG + 1);
    }
}
