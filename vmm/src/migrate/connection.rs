//! The source's connection to its destination, over breaks: the wires of the present one, what it has been given and not passed on, and the dials for the next.
//! A VM's source and the server of a spill file have it alike.

use std::net::SocketAddr;
use std::sync::Arc;

use migration_proto::source::LiteralsSent;
use migration_proto::timer;
use migration_proto::wire::{Channel, Message};
use tokio::sync::{Notify, mpsc};

use super::channel::{self, SourceChannels};
use super::clock::{Bulk, Meter};
use super::identity::HostKey;
use super::throttle::Throttle;
use super::transport::{Close, Endpoint, Link, WanBytes};
use super::wires::{FromLink, LinkEvent, Wires};
use super::{MigrateError, limits};

/// See the module.
#[derive(Debug)]
pub(super) struct Connection {
    endpoint: Endpoint,
    /// The first connection's other end: a later one must be the same.
    address: SocketAddr,
    key: HostKey,
    wires: Option<Wires>,
    /// Connections before the present one.
    generation: u32,
    /// Dials so far; only the last one counts.
    dials: u32,
    inbox: (mpsc::Sender<LinkEvent>, mpsc::Receiver<LinkEvent>),
    drained: Arc<Notify>,
    throttle: Arc<Throttle>,
    meter: Meter,
    /// Batches of literals that the present connection has been given and not passed on.
    flying: Vec<LiteralsSent>,
    /// Bytes of connections that are no more.
    spent: WanBytes,
}

/// What came of a dial.
pub(super) struct Dialled {
    number: u32,
    result: Result<(Link, Box<SourceChannels>), MigrateError>,
}

impl Connection {
    /// The first one stands; what its link is like.
    pub(super) fn new(
        endpoint: Endpoint,
        link: Link,
        channels: SourceChannels,
        bandwidth_bits: Option<u64>,
    ) -> (Self, timer::Link) {
        let throttle = Arc::new(Throttle::new(bandwidth_bits));
        let inbox = mpsc::channel(limits::INBOX_BOUND);
        let (drained, address, key) = (Arc::new(Notify::new()), link.address(), link.peer());
        let mut meter = Meter::new(Bulk::Out, throttle.bytes_per_s());
        let measured = meter.measure(&link);
        let wires = Some(Wires::source(link, channels, 0, &inbox.0, &drained, &throttle));
        let connection = Self {
            endpoint,
            address,
            key,
            wires,
            generation: 0,
            dials: 0,
            inbox,
            drained,
            throttle,
            meter,
            flying: Vec::new(),
            spent: WanBytes::default(),
        };
        (connection, measured)
    }

    /// Where connections are made from.
    pub(super) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// The other end.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// The other end's key.
    pub(super) fn key(&self) -> HostKey {
        self.key
    }

    /// Told whenever a message has left an outbox.
    pub(super) fn drained(&self) -> Arc<Notify> {
        Arc::clone(&self.drained)
    }

    /// Whether nothing should be done that adds to what waits to be sent.
    pub(super) fn is_full(&self) -> bool {
        self.wires.as_ref().is_some_and(Wires::is_full)
    }

    /// Whether there is room on the names channel; always where there is no connection.
    pub(super) fn takes_names(&self) -> bool {
        self.wires.as_ref().is_none_or(|wires| wires.names_queued() < limits::NAMES_QUEUED)
    }

    /// Batches that were given to the present connection and not passed on.
    pub(super) fn batches_flying(&self) -> usize {
        self.flying.len()
    }

    /// Sends a message, if there is a connection.
    pub(super) fn send(&self, message: &Message) {
        match &self.wires {
            Some(wires) => wires.send(message),
            None => tracing::debug!(message = message.name(), "not sent: there is no connection"),
        }
    }

    /// Sends a batch of literals; gives it back where there is no connection.
    pub(super) fn send_literals(
        &mut self,
        channel: Channel,
        batch: Vec<u8>,
        sent: LiteralsSent,
    ) -> Result<(), LiteralsSent> {
        let Some(wires) = &self.wires else { return Err(sent) };
        self.flying.push(sent.clone());
        wires.send_literals(channel, batch, sent);
        Ok(())
    }

    /// The next thing that came from a link. Dropping the future loses nothing.
    pub(super) async fn event(&mut self) -> Option<LinkEvent> {
        self.inbox.1.recv().await
    }

    /// What an event says, if it is the present connection's. What one brought that has been given up, here or before, counts as lost with it.
    pub(super) fn take(&mut self, event: LinkEvent) -> Option<FromLink> {
        if event.generation != self.generation || self.wires.is_none() {
            return None;
        }
        if let FromLink::LiteralsSent(sent) = &event.what
            && let Some(at) = self.flying.iter().position(|flying| flying == sent)
        {
            self.flying.swap_remove(at);
        }
        Some(event.what)
    }

    /// Drops the present connection, if there is one. The batches that it has not passed on: the protocol's window of batches is to open again, and what they held
    /// is asked for anew.
    #[must_use = "the protocol is told of the lost batches"]
    pub(super) fn cut(&mut self) -> Vec<LiteralsSent> {
        if let Some(wires) = self.wires.take() {
            wires.link.close(Close::Failed, "another connection follows");
            self.spent += wires.link.wan_bytes();
        }
        std::mem::take(&mut self.flying)
    }

    /// Dials anew. What comes of it goes to [`Connection::dialled`].
    pub(super) fn dial(&mut self) -> impl Future<Output = Dialled> + Send + use<> {
        self.dials += 1;
        let (number, endpoint, address, key) = (self.dials, self.endpoint.clone(), self.address, self.key);
        async move {
            let connecting = async {
                let link = endpoint.connect(address, Some(key)).await?;
                let channels = channel::open_source(&link).await?;
                Ok((link, Box::new(channels)))
            };
            Dialled { number, result: connecting.await }
        }
    }

    /// A dial has ended: whether the connection stands, or none if a later dial is under way.
    pub(super) fn dialled(&mut self, dialled: Dialled) -> Option<Result<(), MigrateError>> {
        let Dialled { number, result } = dialled;
        if number != self.dials {
            if let Ok((link, _)) = result {
                link.close(Close::Done, "another connection was opened since");
            }
            return None;
        }
        Some(result.map(|(link, channels)| {
            self.generation += 1;
            let (inbox, drained) = (&self.inbox.0, &self.drained);
            let wires = Wires::source(link, *channels, self.generation, inbox, drained, &self.throttle);
            self.wires = Some(wires);
        }))
    }

    /// The link, if there is one.
    pub(super) fn link(&self) -> Option<&Link> {
        self.wires.as_ref().map(|wires| &wires.link)
    }

    /// Takes a measurement of the link, if there is one. To be called every [`limits::TICK`] or so.
    pub(super) fn measure(&mut self) -> Option<timer::Link> {
        let wires = self.wires.as_ref()?;
        wires.link.fit_send_window();
        Some(self.meter.measure(&wires.link))
    }

    /// Bytes on the WAN so far, over all connections.
    pub(super) fn wan_bytes(&self) -> WanBytes {
        let mut sum = self.spent;
        if let Some(link) = self.link() {
            sum += link.wan_bytes();
        }
        sum
    }

    /// Ends the present connection after what it has been given. Whether the other end has heard all of it.
    pub(super) async fn close(&mut self, how: Close, words: &str) -> bool {
        let Some(wires) = self.wires.take() else { return false };
        let (flushed, bytes) = wires.flush_and_close(how, words).await;
        self.spent += bytes;
        flushed
    }
}
