//! The far end of a dry run: whether a VM would be taken, what this host's site holds of it, and what the link brings. Nothing is kept.

use std::collections::HashSet;
use std::sync::Arc;

use migration_proto::forecast::rate::LinkRate;
use migration_proto::timer::Span;
use migration_proto::wire::{self, Message, Offer, Probe};
use page::{Domain, ShortId};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;

use super::arrival::Shared;
use super::clock::{Clock, micros};
use super::incoming::Greeting;
use super::site::{SitePages, SiteTold};
use super::transport::Close;
use super::{MigrateError, late, limits, pages};
use crate::machine::StopReason;

/// Answers a dry run to its end, or for [`limits::PROBE_TIMEOUT`].
pub(super) async fn answer(
    greeting: Greeting,
    offer: Offer,
    ids: Vec<ShortId>,
    shared: Shared,
    _one_at_a_time: OwnedSemaphorePermit,
) {
    let link = greeting.link.clone();
    let (close, why) = match timeout(limits::PROBE_TIMEOUT, converse(greeting, offer, ids, shared)).await {
        Ok(Ok(())) => (Close::Done, "the dry run is over"),
        Ok(Err(error)) => {
            tracing::debug!(%error, "a dry run broke off");
            (Close::Failed, "the dry run broke off")
        }
        Err(_) => (Close::Failed, "the dry run took too long"),
    };
    link.close(close, why);
}

async fn converse(
    mut greeting: Greeting,
    offer: Offer,
    ids: Vec<ShortId>,
    shared: Shared,
) -> Result<(), MigrateError> {
    let site = shared.site.as_ref().filter(|site| site.domain().id() == offer.domain).map(Arc::clone);
    let agreed = site.is_some() || offer.domain == Domain::unkeyed().id();
    let control = &mut greeting.channels.control;
    if let Err(reason) = would_build(offer, &shared).await {
        control.send(wire::encode(&Message::Refuse(reason)).into()).await?;
        return control.flush().await;
    }
    let held = match site {
        Some(site) => held(site, &ids).await,
        None => HashSet::new(),
    };
    tracing::info!(source = %greeting.link.address(), sampled = ids.len(), held = held.len(), "a dry run asks about a VM");
    let held = ids.iter().map(|id| held.contains(id)).collect();
    let answer = Probe::Answer { shared: agreed, postcopy: late::possible(), held };
    control.send(wire::encode(&Message::Probe(answer)).into()).await?;

    let clock = Clock::start();
    let mut rate = LinkRate::new(Span(micros(greeting.link.path().rtt)));
    let mut before = greeting.link.wan_bytes().rx;
    while greeting.channels.literals.next().await?.is_some() {
        // The connection's count, not the channel's: where a packet is lost, a channel gives nothing for a round trip, and then all at once.
        let received = greeting.link.wan_bytes().rx;
        let arrived = received.saturating_sub(std::mem::replace(&mut before, received));
        if rate.arrived(clock.now(), arrived) {
            tracing::debug!(?rate, "the link is being filled");
            let carried = Probe::Carried { bytes_per_s: rate.bytes_per_s(), enough: rate.is_enough() };
            control.send(wire::encode(&Message::Probe(carried)).into()).await?;
        }
    }
    Ok(())
}

/// Whether the machine can be built here; if so it is let go at once.
async fn would_build(offer: Offer, shared: &Shared) -> Result<(), String> {
    let (serial, devices) = (shared.serial.clone(), Arc::clone(&shared.devices));
    let building = tokio::task::spawn_blocking(move || {
        let machine = super::build(&offer.machine, &offer.layout, &serial, &devices)?;
        machine.stop(StopReason::Requested);
        Ok(())
    });
    building.await.unwrap_or_else(|e| Err(format!("building the machine failed: {e}")))
}

/// Which of these the site gives, hashed. What it has not said within [`limits::PROBE_SITE_TIMEOUT`] counts as not held.
async fn held(site: Arc<dyn SitePages>, ids: &[ShortId]) -> HashSet<ShortId> {
    let mut held = HashSet::new();
    let asking = async {
        let mut told = site.resolve(ids.to_vec());
        let mut batch = Vec::with_capacity(limits::SITE_BATCH_PAGES);
        while told.recv_many(&mut batch, limits::SITE_BATCH_PAGES).await > 0 {
            let pages = batch.drain(..).filter_map(|told| match told {
                SiteTold::Page(page) => Some(page),
                SiteTold::Missing(_) => None,
            });
            let (pages, domain) = (pages.collect(), site.domain().clone());
            match tokio::task::spawn_blocking(move || pages::check(&domain, pages)).await {
                Ok(checked) => {
                    let right = checked.iter().filter(|checked| checked.page.name().short() == checked.id);
                    held.extend(right.map(|checked| checked.id));
                }
                Err(error) => return tracing::warn!(%error, "pages of the site could not be hashed"),
            }
        }
    };
    if timeout(limits::PROBE_SITE_TIMEOUT, asking).await.is_err() {
        tracing::warn!(
            "the site did not say all that a dry run asked for: what it did not say counts as missing"
        );
    }
    held
}
