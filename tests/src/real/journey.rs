//! A migration under way, followed by the events of its source's control socket.

use std::path::PathBuf;

use tokio::task::JoinHandle;
use tokio::time::timeout;
use vmm::control::api::{DEFAULT_DOWNTIME_MS, EventKind, MigrateRequest};
use vmm::control::client::{Client, ClientError, EventStream};
use vmm::migrate::Mode;
use vmm::migrate::report::{Phase, Progress, Report};

use super::{Vm, limits};

/// How a migration is asked for.
#[derive(Clone, Debug)]
pub struct Terms {
    /// As `--downtime`, milliseconds.
    pub downtime_ms: u64,
    /// As `--mode`.
    pub mode: Mode,
    /// As `--bandwidth`, bits a second.
    pub bandwidth_bits: Option<u64>,
    /// As `--delta-cache`, bytes.
    pub delta_cache_bytes: Option<u64>,
    /// As `--auto-converge`.
    pub auto_converge: bool,
    /// As `--spill`.
    pub spill: Option<PathBuf>,
    /// As `--resume-for`, milliseconds.
    pub resume_for_ms: u64,
}

impl Default for Terms {
    /// All of memory first, whatever the machine's load does to the guest's pace, and over one connection: post-copy and breaks have stories of their
    /// own.
    fn default() -> Self {
        Self {
            downtime_ms: DEFAULT_DOWNTIME_MS,
            mode: Mode::Precopy,
            bandwidth_bits: None,
            delta_cache_bytes: None,
            auto_converge: false,
            spill: None,
            resume_for_ms: 0,
        }
    }
}

impl Terms {
    /// The request for a migration to `to`.
    #[must_use]
    pub fn request(self, to: &str) -> MigrateRequest {
        let Self {
            downtime_ms,
            mode,
            bandwidth_bits,
            delta_cache_bytes,
            auto_converge,
            spill,
            resume_for_ms,
        } = self;
        let spill = spill.map(|dir| dir.to_str().expect("a test's directory is text").to_owned());
        MigrateRequest {
            to: to.to_owned(),
            downtime_ms,
            mode,
            bandwidth_bits,
            delta_cache_bytes,
            auto_converge,
            spill,
            resume_for_ms,
        }
    }
}

/// A migration that has been asked for.
#[derive(Debug)]
pub struct Journey {
    name: String,
    client: Client,
    events: EventStream,
    answer: JoinHandle<Result<Report, ClientError>>,
    last: Progress,
}

impl Journey {
    /// Has `source` begin it. Its events are followed from before its first.
    pub async fn start(source: &Vm, to: &str, terms: Terms) -> Self {
        let client = source.client().clone();
        let events = client.events().await.expect("a running vmm tells its events");
        let request = terms.request(to);
        let asking = client.clone();
        let answer = tokio::spawn(async move { asking.migrate(&request).await });
        Self { name: source.name().to_owned(), client, events, answer, last: Progress::default() }
    }

    /// Has `source` do all of it.
    /// # Errors
    /// As [`Client::migrate`].
    pub async fn whole(source: &Vm, to: &str, terms: Terms) -> Result<Report, ClientError> {
        Self::start(source, to, terms).await.end().await
    }

    /// Follows the events until one tells of progress that is as `wanted`; gives that progress.
    pub async fn until(&mut self, what: &str, wanted: impl Fn(&Progress) -> bool) -> Progress {
        let Self { name, events, last, .. } = self;
        let found = timeout(limits::MIGRATION, async {
            loop {
                let event = events.next().await.unwrap_or_else(|error| panic!("{name}'s events: {error:?}"));
                match event.map(|event| event.kind) {
                    Some(EventKind::Progress { progress }) => {
                        *last = progress;
                        if wanted(last) {
                            return last.clone();
                        }
                    }
                    Some(EventKind::Report { report }) => {
                        panic!("{name}: the migration completed before {what}: {report:#?}")
                    }
                    Some(EventKind::MigrationFailed { error }) => {
                        panic!("{name}: the migration failed before {what}: {error:?}")
                    }
                    Some(EventKind::Lagged { missed }) => panic!("{name}: {missed} events were missed"),
                    Some(EventKind::State { .. } | EventKind::Incoming { .. }) => {}
                    None => panic!("{name} ended before {what}; last seen: {last:?}"),
                }
            }
        });
        found.await.unwrap_or_else(|_| panic!("{name}: it did not come to {what}"))
    }

    /// Follows the events until the migration is in `phase`, or beyond.
    pub async fn until_phase(&mut self, phase: Phase) -> Progress {
        self.until(&format!("{phase:?}"), |progress| rank(progress.phase) >= rank(phase)).await
    }

    /// Cancels it; returns when the VM runs on at the source.
    pub async fn cancel(&self) {
        self.client.cancel().await.expect("a migration before its hand-over can be cancelled");
    }

    /// Waits for the answer.
    /// # Errors
    /// As [`Client::migrate`].
    pub async fn end(self) -> Result<Report, ClientError> {
        let answer = timeout(limits::MIGRATION, self.answer).await;
        let answer = answer.unwrap_or_else(|_| panic!("{}: the migration did not end", self.name));
        answer.expect("asking does not panic")
    }
}

/// The order of the phases.
fn rank(phase: Phase) -> u8 {
    match phase {
        Phase::Offering => 0,
        Phase::Precopy => 1,
        Phase::PrecopyCut => 2,
        Phase::StopAndCopy => 3,
        Phase::Handover => 4,
        Phase::Committing => 5,
        Phase::InDoubt => 6,
        Phase::Postcopy => 7,
        Phase::PostcopyCut => 8,
        Phase::Ended => 9,
    }
}
