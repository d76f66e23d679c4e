//! The near end of a dry run: samples the VM's memory, watches what its guest writes, asks the destination, fills the link for a moment, and says what a
//! migration would cost. The VM runs on, and nothing moves.

use std::collections::HashSet;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use migration_proto::forecast::{self, Findings, Run, sample};
use migration_proto::timer::{self, Span};
use migration_proto::wire::{self, Message, Offer, Probe};
use migration_proto::{Layout, MigrationId, limits as proto, literal};
use page::{Domain, Gfn, PAGE_SIZE, Page, PageHash, PageSet, ShortId};
use tokio::time::timeout;

use super::channel::{self, SourceChannels};
use super::clock::micros;
use super::identity::HostIdentity;
use super::pages;
use super::report::{Forecast, WhyStopped};
use super::site::SitePages;
use super::throttle::Throttle;
use super::ticket::Ticket;
use super::transport::{Close, Endpoint, Link};
use super::{MigrateError, MigrateOptions, copies, layout_of, limits};
use crate::machine::{DirtyLog, Machine, RunState};
use crate::memory::Memory;

/// What a migration of `machine` as `options` say would cost. The caller keeps others from the machine's dirty log.
pub(super) async fn run(
    machine: Arc<Machine>,
    site: Option<Arc<dyn SitePages>>,
    host: Arc<HostIdentity>,
    options: MigrateOptions,
) -> Result<Forecast, MigrateError> {
    let ticket: Ticket = options.to.parse()?;
    let domain = site.as_ref().map_or_else(Domain::unkeyed, |site| site.domain().clone());
    let layout = layout_of(machine.memory().extents())
        .ok_or_else(|| unfit("its memory is not laid out in regions".to_owned()))?;
    let (endpoint, link) = Endpoint::open(&ticket, &host).await?;
    let asking = async {
        let mut channels = channel::open_source(&link).await?;
        let names = {
            let (machine, layout, domain) = (Arc::clone(&machine), layout.clone(), domain.clone());
            blocking(move || sampled(machine.memory(), &layout, &domain)).await?
        }?;
        let offer = offer(&machine, &domain, layout.clone(), &options)?;
        let ask = Probe::Ask { offer, ids: names.ids.clone() };
        channels.control.send(wire::encode(&Message::Probe(ask)).into()).await?;
        // While the destination asks its site, the guest is watched.
        let watched = {
            let machine = Arc::clone(&machine);
            blocking(move || watch(&machine)).await??
        };
        let (postcopy, held) = answered(&mut channels, names.ids.len()).await?;
        // Before the link is filled: then its queue is part of the round trip.
        let rtt = Span(micros(link.path().rtt));
        let bytes_per_s = fill(&link, &mut channels, &Throttle::new(options.bandwidth_bits)).await?;
        let missing: HashSet<ShortId> =
            names.ids.iter().zip(&held).filter(|(_, held)| !**held).map(|(id, _)| *id).collect();
        let literal_bytes_a_page = {
            let (machine, frames) = (Arc::clone(&machine), names.frames_of(&missing));
            blocking(move || literal_bytes(machine.memory(), &frames) / frames.len().max(1) as u64).await?
        };
        let findings = Findings {
            mode: if postcopy { options.mode.into() } else { migration_proto::Mode::Precopy },
            downtime: Span::from_millis(options.downtime_ms),
            auto_converge: options.auto_converge,
            pages: layout.pages(),
            sample: names.runs(&missing),
            literal_bytes_a_page,
            written: watched.written,
            written_bytes_a_page: watched.bytes_a_page,
            link: timer::Link { rtt, bytes_per_s },
            named_per_s: names.named_per_s,
        };
        Ok(report(&findings))
    };
    let found = timeout(limits::PROBE_TIMEOUT, asking).await.unwrap_or_else(|_| {
        let why = format!("the dry run was not over after {} s", limits::PROBE_TIMEOUT.as_secs());
        Err(MigrateError::ConnectionLost { address: link.address(), why: why.into() })
    });
    link.close(Close::Done, "the dry run is over");
    endpoint.settle().await;
    found
}

fn unfit(why: String) -> MigrateError {
    MigrateError::NotMovable { why: why.into() }
}

async fn blocking<T: Send + 'static>(job: impl FnOnce() -> T + Send + 'static) -> Result<T, MigrateError> {
    tokio::task::spawn_blocking(job).await.map_err(|_| MigrateError::Died)
}

fn offer(
    machine: &Machine,
    domain: &Domain,
    layout: Layout,
    options: &MigrateOptions,
) -> Result<Offer, MigrateError> {
    let ownership = machine.ownership();
    let machine = serde_json::to_vec(&machine.description()).map_err(|e| unfit(e.to_string()))?;
    // Nothing is ever said of this migration again.
    let (migration, domain, mode) = (MigrationId([0; 16]), domain.id(), options.mode.into());
    let deltas = options.delta_cache_bytes != Some(0);
    let (vm, epoch) = (ownership.vm, ownership.epoch);
    Ok(Offer { migration, vm, epoch, domain, layout, machine, mode, deltas, resume_for: Span(0) })
}

/// A page of the sample that is not zero.
struct Sample {
    gfn: Gfn,
    name: PageHash,
    /// How many frames of the VM hold it, thousandths.
    copies: u64,
}

/// The sample: what stands where, run by run, and the names to ask for.
struct Sampled {
    /// By run, how many pages it has, and those that are not zero.
    runs: Vec<(u64, Vec<Sample>)>,
    /// Each name once.
    ids: Vec<ShortId>,
    named_per_s: u64,
}

/// Looks at the sample.
fn sampled(memory: &Memory, layout: &Layout, domain: &Domain) -> Result<Sampled, MigrateError> {
    let mut seed = [0; 8];
    getrandom::fill(&mut seed).map_err(|e| unfit(e.to_string()))?;
    let runs = sample::frames(layout, u64::from_le_bytes(seed));
    let started = Instant::now();
    let named: Vec<_> = runs.iter().map(|frames| pages::name(memory, domain, frames)).collect();
    let (zero, count) = (domain.zero_name(), runs.iter().map(Vec::len).sum::<usize>() as u64);
    let cores = thread::available_parallelism().map_or(1, std::num::NonZero::get) as u64;
    let named_per_s = count.saturating_mul(cores * 1_000_000) / micros(started.elapsed()).max(1);

    let frames: Vec<Gfn> =
        named.iter().flatten().filter(|(_, name)| *name != zero).map(|(gfn, _)| *gfn).collect();
    let copies = copies::count(memory, layout, &frames)
        .map_err(|e| unfit(format!("its memory cannot be read: {e}")))?;
    let mut copies = copies.into_iter();
    let mut seen = HashSet::new();
    let ids =
        named.iter().flatten().map(|(_, name)| *name).filter(|name| *name != zero && seen.insert(*name));
    let ids = ids.map(|name| name.short()).collect();
    let runs = named
        .into_iter()
        .map(|run| {
            let pages = run.len() as u64;
            let kept = run.into_iter().filter(|(_, name)| *name != zero).zip(&mut copies);
            (pages, kept.map(|((gfn, name), copies)| Sample { gfn, name, copies }).collect())
        })
        .collect();
    Ok(Sampled { runs, ids, named_per_s })
}

impl Sampled {
    /// What each run comes to, where these are missing. Of a page that stands in several frames each counts for its share.
    fn runs(&self, missing: &HashSet<ShortId>) -> Vec<Run> {
        let count = |(pages, run): &(u64, Vec<Sample>)| {
            let mut sum = Run { pages: pages * 1000, ..Run::default() };
            for page in run {
                let share = 1_000_000 / page.copies;
                sum.named += share;
                sum.duplicate += 1000 - share;
                sum.missing += if missing.contains(&page.name.short()) { share } else { 0 };
            }
            sum
        };
        self.runs.iter().map(count).collect()
    }

    /// A frame for each of these.
    fn frames_of(&self, missing: &HashSet<ShortId>) -> Vec<Gfn> {
        let mut left = missing.clone();
        let pages = self.runs.iter().flat_map(|(_, run)| run);
        pages.filter(|page| left.remove(&page.name.short())).map(|page| page.gfn).collect()
    }
}

/// What these pages take as literals, bytes.
fn literal_bytes(memory: &Memory, frames: &[Gfn]) -> u64 {
    let batch = |frames: &[Gfn]| {
        let mut pages: Vec<(Gfn, Page)> = frames.iter().map(|gfn| (*gfn, [0; PAGE_SIZE])).collect();
        pages.iter_mut().for_each(|(gfn, page)| memory.read_page(*gfn, page));
        let borrowed: Vec<(Gfn, &Page)> = pages.iter().map(|(gfn, page)| (*gfn, page)).collect();
        literal::encode(&borrowed).len() as u64
    };
    frames.chunks(proto::LITERAL_BATCH_PAGES).map(batch).sum()
}

/// What the guest writes.
struct Watched {
    written: Vec<(Span, u64)>,
    bytes_a_page: Option<u64>,
}

/// Watches what the guest writes for [`limits::PROBE_WATCH`].
fn watch(machine: &Machine) -> Result<Watched, MigrateError> {
    let failed = |e: crate::machine::MachineError| unfit(format!("its writes cannot be watched: {e}"));
    if *machine.watch().borrow() != RunState::Running {
        return Ok(Watched { written: Vec::new(), bytes_a_page: None });
    }
    let log = DirtyLog::start(machine).map_err(failed)?;
    let started = Instant::now();
    let mut all = PageSet::empty(machine.memory().bound());
    let mut written = Vec::new();
    for look in 1..=limits::PROBE_LOOKS {
        let due = limits::PROBE_WATCH * look / limits::PROBE_LOOKS;
        thread::sleep(due.saturating_sub(started.elapsed()));
        all.union_with(&machine.take_dirty().map_err(failed)?);
        written.push((Span(micros(started.elapsed())), all.len()));
    }
    drop(log);
    let step = usize::try_from(all.len()).unwrap_or(usize::MAX).div_ceil(limits::PROBE_WRITTEN_PAGES).max(1);
    let some: Vec<Gfn> = all.iter().step_by(step).collect();
    let bytes_a_page = (!some.is_empty()).then(|| literal_bytes(machine.memory(), &some) / some.len() as u64);
    Ok(Watched { written, bytes_a_page })
}

/// The destination's answer to so many ids: whether it takes a VM before its memory, and which it holds.
async fn answered(channels: &mut SourceChannels, ids: usize) -> Result<(bool, Vec<bool>), MigrateError> {
    match next(channels).await? {
        Message::Probe(Probe::Answer { postcopy, held, .. }) if held.len() == ids => Ok((postcopy, held)),
        Message::Refuse(reason) => Err(unfit(format!("the destination would refuse it: {reason}"))),
        other => Err(broken(&format!("{} where an answer for {ids} names belongs", other.name()))),
    }
}

async fn next(channels: &mut SourceChannels) -> Result<Message, MigrateError> {
    let frame = channels.control_in.next().await?.ok_or_else(|| broken("it ends before its answer"))?;
    wire::decode(&frame).map_err(|e| broken(&e.to_string()))
}

fn broken(why: &str) -> MigrateError {
    MigrateError::Frame { channel: "control", why: why.into() }
}

/// Fills the link until the destination says that it has seen enough; what the link carries, bytes a second.
async fn fill(link: &Link, channels: &mut SourceChannels, throttle: &Throttle) -> Result<u64, MigrateError> {
    let burst: bytes::Bytes =
        wire::encode(&Message::Probe(Probe::Burst(vec![0; proto::PROBE_BURST_BYTES]))).into();
    let SourceChannels { control_in, literals, .. } = channels;
    let bursts = async {
        let mut sent = 0;
        let started = Instant::now();
        let most = Duration::from_micros(proto::PROBE_BURSTS_TIME.0);
        while sent < proto::PROBE_BURSTS_BYTES && started.elapsed() < most {
            throttle.pass(burst.len(), link.wan_bytes().tx).await;
            link.fit_send_window();
            literals.send(burst.clone()).await?;
            sent += burst.len() as u64;
        }
        literals.finish()?;
        Ok::<(), MigrateError>(())
    };
    let told = async {
        let mut best = 0;
        while let Some(frame) = control_in.next().await? {
            match wire::decode(&frame).map_err(|e| broken(&e.to_string()))? {
                Message::Probe(Probe::Carried { bytes_per_s, enough }) => {
                    best = bytes_per_s;
                    if enough {
                        break;
                    }
                }
                other => return Err(broken(&format!("{} in the midst of bursts", other.name()))),
            }
        }
        Ok::<u64, MigrateError>(best)
    };
    tokio::pin!(bursts, told);
    let best = tokio::select! {
        best = &mut told => best?,
        sent = &mut bursts => {
            sent?;
            told.await?
        }
    };
    Ok(best.min(throttle.bytes_per_s().unwrap_or(u64::MAX)).max(1))
}

fn report(findings: &Findings) -> Forecast {
    let forecast = forecast::forecast(findings);
    let sum = |count: fn(&Run) -> u64| findings.sample.iter().map(count).sum::<u64>() / 1000;
    let last = findings.written.last().copied().unwrap_or((Span(1), 0));
    Forecast {
        wan_bytes: forecast.wan_bytes,
        wan_bytes_error: forecast.wan_bytes_error,
        total_ms: forecast.total.0 / 1000,
        downtime_ms: forecast.downtime.0 / 1000,
        downtime_asked_ms: findings.downtime.0 / 1000,
        rounds: forecast.rounds,
        why_stopped: WhyStopped::from(forecast.why_stopped),
        pages: findings.pages,
        sampled_pages: sum(|run| run.pages),
        sampled_named: sum(|run| run.named),
        sampled_missing: sum(|run| run.missing),
        written_pages_per_s: last.1.saturating_mul(1_000_000) / last.0.0.max(1),
        link_bits_per_s: findings.link.bytes_per_s.saturating_mul(8),
        round_trip_us: findings.link.rtt.0,
    }
}
