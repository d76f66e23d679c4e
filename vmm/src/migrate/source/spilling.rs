//! The spill file, as the source's driver writes it: on a thread of its own, one job at a time, as the protocol asks.

use std::path::PathBuf;
use std::time::Duration;

use migration_proto::source::{End, SourceConfig};
use page::{Gfn, PageHash};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::super::report::Spilled;
use super::{Done, Driver};
use crate::migrate::error::chain;
use crate::migrate::{MigrateError, clock};
use crate::spill::{Sealed, SpillError, Writer};

/// What there is of it.
#[derive(Debug, Default)]
pub(super) struct Spilling {
    /// Between jobs.
    writer: Option<Writer>,
    sealed: Option<Sealed>,
    began: Option<Instant>,
    ahead: Duration,
    paused: Duration,
    pages: u64,
    bytes: u64,
}

/// What became of a job.
pub(super) enum Job {
    Written(Result<Box<Writer>, SpillError>),
    Sealed(Result<Sealed, SpillError>),
}

impl Spilling {
    /// Makes the file, where there is to be one, so that a directory which takes none ends the migration before it has begun.
    pub(super) async fn begin(dir: Option<PathBuf>, config: &SourceConfig) -> Result<Self, MigrateError> {
        let Some(dir) = dir else { return Ok(Self::default()) };
        let (migration, vm, epoch) = (config.migration, config.vm, config.epoch);
        let layout = config.layout.clone();
        let make = move || Writer::create(&dir, migration, vm, epoch, layout);
        let made = tokio::task::spawn_blocking(make).await.map_err(|_| MigrateError::Died)?;
        let writer = made.map_err(|error| MigrateError::Spill { why: chain(&error).into() })?;
        Ok(Self { writer: Some(writer), ..Self::default() })
    }

    /// For the report: what stood in the file, if one was needed.
    pub(super) fn report(&self) -> Option<Spilled> {
        (self.bytes > 0).then(|| Spilled {
            pages: self.pages,
            bytes: self.bytes,
            spill_ms: clock::millis(self.ahead + self.paused),
            paused_ms: clock::millis(self.paused),
        })
    }
}

impl Driver {
    /// Writes these pages as they are now; if `anew`, in the place of all that was written before.
    pub(super) fn spill(&mut self, frames: Vec<Gfn>, anew: bool) {
        let before = if anew { 0 } else { self.spilling.pages };
        self.spilling.pages = before + frames.len() as u64;
        let (memory, domain) = (self.machine.memory().clone(), self.core.domain().clone());
        self.spill_job(move |mut writer| {
            let begun = if anew { writer.begin_anew() } else { Ok(()) };
            let written = begun.and_then(|()| writer.write(&memory, &domain, &frames));
            Job::Written(written.map(|()| Box::new(writer)))
        });
    }

    pub(super) fn seal_spill(&mut self, root: PageHash) {
        let domain = self.core.domain().clone();
        self.spill_job(move |writer| Job::Sealed(writer.seal(&domain, &root)));
    }

    fn spill_job(&mut self, job: impl FnOnce(Writer) -> Job + Send + 'static) {
        let Some(writer) = self.spilling.writer.take() else {
            return self.core.spill_failed("there is no spill file to write".to_owned());
        };
        self.spilling.began = Some(Instant::now());
        let results: mpsc::Sender<Done> = self.results.0.clone();
        self.helpers.spawn_blocking(move || {
            // A file that nobody hears of is removed with the result.
            if results.blocking_send(Done::Spilled(job(writer))).is_err() {
                tracing::debug!("the migration ended before its spill file");
            }
        });
    }

    pub(super) fn spilled(&mut self, job: Job) {
        let took = self.spilling.began.take().map(|began| began.elapsed()).unwrap_or_default();
        match self.paused_at {
            None => self.spilling.ahead += took,
            Some(_) => self.spilling.paused += took,
        }
        let now = self.clock.now();
        match job {
            Job::Written(Ok(writer)) => {
                self.spilling.writer = Some(*writer);
                self.core.spilled(now);
            }
            Job::Sealed(Ok(sealed)) => {
                tracing::info!(path = %sealed.path().display(), bytes = sealed.bytes(), "the spill file stands");
                self.spilling.bytes = sealed.bytes();
                // From the next action on the VM may be the destination's, and this file all that is left of its memory here.
                self.spilling.sealed = Some(sealed.keep());
                self.core.spill_sealed(now);
            }
            Job::Written(Err(error)) | Job::Sealed(Err(error)) => self.core.spill_failed(chain(&error)),
        }
    }

    /// The migration is over: whether anybody may need the file.
    pub(super) fn end_spill(&mut self, end: &End) {
        let Some(sealed) = self.spilling.sealed.take() else { return };
        match end {
            End::Completed | End::Aborted(_) | End::NotServed { .. } => sealed.remove(),
            End::LetGo => tracing::warn!(
                path = %sealed.path().display(),
                "the spill file is kept: `vmm spill send` gives its pages to the destination; remove it when nobody needs them"
            ),
        }
    }
}
