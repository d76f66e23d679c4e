//! The destination's driver: one task owns the protocol core of one arriving VM, from its offer for as long as somebody may ask
//! what became of it.

mod ask;
mod end;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use migration_proto::destination::{Action, Destination, RequestId};
use migration_proto::switchover::{Fate, Ledger};
use migration_proto::wire::{Message, Offer, WireError};
use migration_proto::{Layout, MigrationId, VmId};
use page::{Gfn, PAGE_SIZE, Page, ShortId, VerifiedPage};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::sleep_until;

use super::clock::{Bulk, Clock, Meter};
use super::error::chain;
use super::identity::HostKey;
use super::incoming::{Greeting, is_server};
use super::late::{self, LatePages};
use super::pages::{self, CheckedPage, DecodedBatch, Pool};
use super::report::{IncomingPhase, IncomingStatus};
use super::site::SitePages;
use super::transport::{Close, WanBytes};
use super::wires::{FromLink, LinkEvent, Wires};
use super::{MigrateError, bundle, limits};
use crate::config::{DeviceOptions, Serial};
use crate::machine::{Machine, MachineDescription, Ownership, StopReason};
use crate::memory::Memory;

/// What reaches an arrival from outside its own connection.
pub(super) enum Mail {
    /// A later connection of the same migration.
    Connection(Box<Greeting>),
    /// The same source has offered the same VM anew: it owns it, and this attempt is void.
    Superseded,
    /// The operator's word.
    Resolve {
        /// Here, or not.
        run_here: bool,
    },
}

/// What workers and helpers have done.
enum Done {
    Prepared(Result<Arc<Machine>, String>),
    Literals(Result<DecodedBatch, WireError>),
    SitePages(Vec<CheckedPage>),
    SiteMissing(RequestId, Vec<ShortId>),
    Answered(RequestId),
    Loaded(Result<u64, String>),
    Resumed(Result<(), String>),
    FirstHeartbeat(u64),
}

/// What an arrival shares with the endpoint it came to.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) site: Option<Arc<dyn SitePages>>,
    pub(super) serial: Serial,
    pub(super) devices: Arc<DeviceOptions>,
    pub(super) ledger: Arc<Mutex<Ledger>>,
    pub(super) status: watch::Sender<IncomingStatus>,
    pub(super) machine: watch::Sender<Option<Arc<Machine>>>,
}

pub(super) struct Arrival {
    pub(super) core: Destination,
    source: HostKey,
    pub(super) clock: Clock,
    pub(super) shared: Shared,
    pub(super) machine: Option<Arc<Machine>>,
    pub(super) memory: Option<Arc<Memory>>,
    /// What the VM, which is to run before its memory is complete, lacks.
    pub(super) late: Option<LatePages>,
    /// Stopping and starting the VM for want of a page, one after the other.
    pub(super) starving: Option<tokio::task::JoinHandle<bool>>,
    wires: Option<Wires>,
    generation: u32,
    inbox: (mpsc::Sender<LinkEvent>, mpsc::Receiver<LinkEvent>),
    results: (mpsc::Sender<Done>, mpsc::Receiver<Done>),
    mail: mpsc::Receiver<Mail>,
    drained: Arc<Notify>,
    meter: Meter,
    pool: Pool,
    pub(super) helpers: JoinSet<()>,
    questions: BTreeMap<RequestId, AbortHandle>,
    decoding: usize,
    pub(super) failures: Vec<String>,
    spent: WanBytes,
    source_heartbeat_ns: u64,
    round: u32,
    discarded: bool,
}

impl Arrival {
    /// Takes up the offer that came with `greeting`.
    ///
    /// # Errors
    /// If there are no threads to work with.
    pub(super) fn new(
        offer: Offer,
        greeting: Greeting,
        shared: Shared,
        mail: mpsc::Receiver<Mail>,
    ) -> Result<Self, MigrateError> {
        let clock = Clock::start();
        let mut meter = Meter::new(Bulk::In, None);
        let (inbox, results) = (mpsc::channel(limits::INBOX_BOUND), mpsc::channel(limits::RESULTS_BOUND));
        let drained = Arc::new(Notify::new());
        let (source, address) = (greeting.link.peer(), greeting.link.address());
        let link = meter.measure(&greeting.link);
        let name = serde_json::from_slice::<MachineDescription>(&offer.machine)
            .ok()
            .map(|description| description.name);
        shared.status.send_modify(|status| {
            *status = IncomingStatus {
                phase: IncomingPhase::Receiving,
                name,
                source: Some(format!("{address} {source}")),
                last_failure: status.last_failure.take(),
                ..IncomingStatus::default()
            };
        });
        let wires = Wires::destination(greeting.link, greeting.channels, 0, &inbox.0, &drained);
        let pool = Pool::new()
            .map_err(|e| MigrateError::NotMovable { why: format!("no worker threads: {e}").into() })?;
        let site = shared.site.as_ref().map(|site| site.domain());
        if site.is_some_and(|domain| domain.id() != offer.domain) {
            tracing::warn!(
                "this host's site is not asked for the VM's pages: the source is of another dedup domain, or has no --site"
            );
        }
        let core = Destination::new(clock.now(), offer, site, link, late::possible());
        Ok(Self {
            core,
            source,
            clock,
            shared,
            machine: None,
            memory: None,
            late: None,
            starving: None,
            wires: Some(wires),
            generation: 0,
            inbox,
            results,
            mail,
            drained,
            meter,
            pool,
            helpers: JoinSet::new(),
            questions: BTreeMap::new(),
            decoding: 0,
            failures: Vec::new(),
            spent: WanBytes::default(),
            source_heartbeat_ns: 0,
            round: 0,
            discarded: false,
        })
    }

    pub(super) fn migration(&self) -> MigrationId {
        self.core.migration()
    }

    pub(super) fn vm(&self) -> VmId {
        self.core.vm()
    }

    pub(super) fn source(&self) -> HostKey {
        self.source
    }

    /// Runs until the VM is discarded; where it runs here, until the endpoint is closed.
    pub(super) async fn run(mut self) {
        let mut tick = tokio::time::interval(limits::TICK);
        let drained = Arc::clone(&self.drained);
        loop {
            self.carry_out();
            self.record_fate();
            if self.discarded {
                return self.finish().await;
            }
            let full = self.decoding >= limits::DECODE_WINDOW_BATCHES
                || self.wires.as_ref().is_some_and(Wires::is_full);
            let deadline = self.clock.instant(self.core.next_timeout());
            tokio::select! {
                Some(done) = self.results.1.recv() => self.done(done),
                Some(event) = self.inbox.1.recv(), if !full => self.link_event(event),
                mail = self.mail.recv() => match mail {
                    Some(mail) => self.mail(mail),
                    // The endpoint is closed: nobody can ask any more.
                    None => return self.finish().await,
                },
                () = drained.notified() => {}
                faults = late::faults(self.late.as_ref()) => self.faults(faults),
                () = sleep_until(deadline) => self.core.timeout(self.clock.now()),
                _ = tick.tick() => self.measure(),
            }
        }
    }

    fn carry_out(&mut self) {
        loop {
            while let Some(action) = self.core.poll() {
                self.act(action);
            }
            let Some(failure) = self.failures.pop() else { break };
            self.core.failed(failure);
        }
        self.end_absence();
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Send(message) => match &self.wires {
                Some(wires) => wires.send(&message),
                None => tracing::debug!(message = message.name(), "not sent: there is no connection"),
            },
            Action::Prepare { machine, layout } => self.prepare(machine, layout),
            Action::Resolve { request, ids } => self.resolve(request, ids),
            Action::Forget(request) => {
                if let Some(question) = self.questions.remove(&request) {
                    question.abort();
                }
            }
            Action::Zero(gfn) => self.write(gfn, &[0; PAGE_SIZE]),
            Action::Copy { from, to } => {
                let mut page: Page = [0; PAGE_SIZE];
                if let Some(memory) = &self.memory {
                    memory.read_page(from, &mut page);
                }
                self.write(to, &page);
            }
            Action::Absent(frames) => self.make_absent(frames),
            Action::PauseVm { gfn, name } => self.starve(gfn, name),
            Action::ResumeVm => self.feed(),
            Action::LoadState(bytes) => self.blocking(move |machine| {
                let loaded =
                    bundle::unpack(&bytes).map_err(|e| e.to_string()).and_then(|(heartbeat, state)| {
                        machine
                            .load_state(state)
                            .map_err(|e| format!("the VM's state cannot be loaded: {}", chain(&e)))?;
                        Ok(heartbeat)
                    });
                Done::Loaded(loaded)
            }),
            Action::Run(permit) => {
                tracing::info!(
                    epoch = permit.epoch().0,
                    "the source has handed the VM over: it runs here now"
                );
                let ownership = Ownership { vm: self.core.vm(), epoch: permit.epoch() };
                self.blocking(move |machine| {
                    machine.set_ownership(ownership);
                    let resumed = machine.resume();
                    Done::Resumed(resumed.map_err(|e| format!("the VM cannot be run here: {}", chain(&e))))
                });
            }
            Action::Hold => {
                tracing::warn!(
                    source = %self.source,
                    "HELD: the VM is complete here and its source is silent. It stands still until the source comes back; if the source is \
                     gone for good, look at its host, then `vmm resolve --run-here` or `--let-go`"
                );
                self.shared.status.send_modify(|status| status.phase = IncomingPhase::Held);
            }
            Action::Discard(reason) => {
                tracing::warn!(%reason, "the VM did not come here");
                self.shared.status.send_modify(|status| status.last_failure = Some(reason.to_string()));
                self.discarded = true;
            }
            Action::Released => tracing::info!("the source has let the VM go"),
        }
    }

    fn write(&mut self, gfn: Gfn, page: &Page) {
        match (&self.late, &self.memory) {
            (Some(late), _) => {
                if let Err(error) = late.install(gfn, page) {
                    tracing::error!(error = chain(&error), "a page that came late; it is looked for again");
                    self.core.not_installed(self.clock.now(), gfn);
                }
            }
            (None, Some(memory)) => memory.write_page(gfn, page),
            (None, None) => tracing::error!(%gfn, "a page for memory that does not exist: dropped"),
        }
    }

    pub(super) fn install(&mut self, frames: &[Gfn], page: &VerifiedPage) {
        for gfn in frames {
            self.write(*gfn, page.bytes());
        }
    }

    /// Builds the machine that the source described.
    fn prepare(&mut self, description: Vec<u8>, layout: Layout) {
        let (results, serial) = (self.results.0.clone(), self.shared.serial.clone());
        let devices = Arc::clone(&self.shared.devices);
        self.helpers.spawn_blocking(move || {
            let result = super::build(&description, &layout, &serial, &devices);
            if let Err(tokio::sync::mpsc::error::SendError(Done::Prepared(Ok(machine)))) =
                results.blocking_send(Done::Prepared(result))
            {
                machine.stop(StopReason::Requested);
            }
        });
    }

    fn blocking(&mut self, job: impl FnOnce(&Machine) -> Done + Send + 'static) {
        let Some(machine) = self.machine.clone() else {
            return self.failures.push("there is no machine to do it to".to_owned());
        };
        let results = self.results.0.clone();
        self.helpers.spawn_blocking(move || send(&results, job(&machine)));
    }

    fn done(&mut self, done: Done) {
        let now = self.clock.now();
        match done {
            Done::Prepared(Ok(machine)) => {
                self.memory = Some(Arc::clone(machine.memory()));
                self.machine = Some(machine);
                self.core.prepared(now);
            }
            Done::Literals(Ok(literals)) => {
                self.decoding = self.decoding.saturating_sub(1);
                self.literals(literals);
            }
            Done::SitePages(checked) => {
                for page in &checked {
                    self.site_page(now, page);
                }
            }
            Done::SiteMissing(request, ids) => self.core.site_missing(now, request, &ids),
            Done::Answered(request) => {
                self.questions.remove(&request);
                self.core.site_done(now, request);
            }
            Done::Loaded(Ok(heartbeat)) => {
                self.source_heartbeat_ns = heartbeat;
                self.core.loaded(now);
            }
            Done::Resumed(Ok(())) => self.runs_here(),
            Done::FirstHeartbeat(first_ns) => {
                let nanos = i128::from(first_ns) - i128::from(self.source_heartbeat_ns);
                #[expect(clippy::cast_precision_loss, reason = "a downtime in nanoseconds is far below 2^53")]
                let ms = nanos as f64 / 1e6;
                self.shared.status.send_modify(|status| status.guest_downtime_ms = Some(ms));
            }
            Done::Literals(Err(error)) => {
                self.decoding = self.decoding.saturating_sub(1);
                self.core.failed(format!("the source sent literals that cannot be decoded: {error}"));
            }
            Done::Prepared(Err(error)) | Done::Loaded(Err(error)) | Done::Resumed(Err(error)) => {
                self.core.failed(error)
            }
        }
    }

    fn link_event(&mut self, event: LinkEvent) {
        if event.generation != self.generation {
            return;
        }
        let now = self.clock.now();
        match event.what {
            FromLink::Message(Message::Literals(batch)) => self.decode(batch),
            FromLink::Message(Message::FaultPage { gfn, name, batch }) => self.fault_page(gfn, name, &batch),
            FromLink::Message(message) => {
                match message {
                    Message::RoundEnd { round } => self.round = round.saturating_add(1),
                    Message::Final { round, .. } => self.round = round,
                    _ => {}
                }
                self.core.message(now, message);
            }
            FromLink::LiteralsSent(_) => {}
            FromLink::Undecodable(error) => {
                self.core.failed(format!("the source sent what cannot be decoded: {error}"))
            }
            FromLink::Lost(error) => {
                tracing::debug!(%error, "the connection from the source has ended");
                self.drop_wires(Close::Done, "the connection has ended");
                self.core.disconnected(now);
                if self.core.is_cut_off() {
                    tracing::warn!(
                        "the source is lost, and may come back: what is here of its VM is kept for it"
                    );
                    self.tell_status();
                }
            }
        }
    }

    fn literals(&mut self, literals: DecodedBatch) {
        let now = self.clock.now();
        for (gfn, page) in literals.plain {
            let frames = self.core.literal(now, gfn, &page);
            self.install(&frames, &page);
            self.carry_out();
        }
        for (gfn, page) in literals.deltas {
            let frames = self.core.delta(now, gfn, page.as_ref());
            if let Some(page) = page {
                self.install(&frames, &page);
            }
            self.carry_out();
        }
    }

    fn decode(&mut self, batch: Vec<u8>) {
        let (domain, results) = (self.core.domain().clone(), self.results.0.clone());
        // What is absent has no old version: reading it would wait for it.
        let memory = self.memory.clone().filter(|_| self.late.is_none());
        let decode = move || Done::Literals(pages::decode(memory.as_deref(), &domain, &batch));
        match self.pool.submit(move || send(&results, decode())) {
            Ok(()) => self.decoding += 1,
            Err(error) => self.failures.push(error.to_string()),
        }
    }

    fn mail(&mut self, mail: Mail) {
        match mail {
            Mail::Connection(greeting) => {
                let Some(greeting) = self.not_in_vain(greeting) else { return };
                if greeting.link.peer() != self.source && !is_server(&greeting.first) {
                    tracing::warn!(key = %greeting.link.peer(), "another host speaks of this migration: refused");
                    return greeting.link.close(Close::Failed, "this migration is another host's");
                }
                let Greeting { link, channels, first, waited: _ } = *greeting;
                self.drop_wires(Close::Done, "the source has opened another connection");
                self.generation += 1;
                self.wires =
                    Some(Wires::destination(link, channels, self.generation, &self.inbox.0, &self.drained));
                self.core.connected();
                self.core.message(self.clock.now(), first);
            }
            Mail::Superseded => {
                self.core.superseded();
                self.carry_out();
                self.core.disconnected(self.clock.now());
            }
            Mail::Resolve { run_here } => {
                if let Err(error) = self.core.resolve(self.clock.now(), run_here) {
                    tracing::warn!(%error, "an operator's command came too late");
                }
            }
        }
    }

    fn drop_wires(&mut self, how: Close, why: &str) {
        if let Some(wires) = self.wires.take() {
            wires.link.close(how, why);
            self.spent += wires.link.wan_bytes();
        }
    }

    fn measure(&mut self) {
        while self.helpers.try_join_next().is_some() {}
        if let Some(wires) = &self.wires {
            let link = self.meter.measure(&wires.link);
            self.core.link(link);
        }
        if self.core.fate() != Some(Fate::Refused) {
            self.tell_status();
        }
    }
}

fn send(results: &mpsc::Sender<Done>, done: Done) {
    if results.blocking_send(done).is_err() {
        tracing::debug!("the migration ended before its worker");
    }
}
