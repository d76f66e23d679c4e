//! The tasks between a link's channels and the one task that owns a migration's state: a reader and a writer a channel.
//!
//! Readers put messages into one bounded inbox. An [`Outbox`] takes messages without waiting, so that the owner never waits for the
//! link; it is bounded because the owner reads nothing that could add to it while it is [`Outbox::is_full`].

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use migration_proto::source::LiteralsSent;
use migration_proto::wire::{self, Channel, Message};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::channel::{self, DestinationChannels, FrameReader, FrameWriter, SourceChannels};
use super::throttle::Throttle;
use super::transport::{Close, Link, WanBytes};
use super::{MigrateError, limits};

/// What comes from a link.
#[derive(Debug)]
pub struct LinkEvent {
    /// Which of the migration's connections, counted from 0.
    pub generation: u32,
    /// What came.
    pub what: FromLink,
}

/// See [`LinkEvent`].
#[derive(Debug)]
pub enum FromLink {
    /// A message.
    Message(Message),
    /// A batch of literals has been handed to QUIC.
    LiteralsSent(LiteralsSent),
    /// A frame that holds no message: the other end broke the protocol.
    Undecodable(wire::WireError),
    /// Nothing more will come.
    Lost(MigrateError),
}

/// What a writer is to do next.
enum Outbound {
    Frame {
        frame: Bytes,
        literals: Option<LiteralsSent>,
    },
    /// Say that nothing follows, and answer once the other end has acknowledged everything.
    Flush(oneshot::Sender<()>),
}

#[derive(Default)]
struct Shared {
    queue: Mutex<VecDeque<Outbound>>,
    more: Notify,
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<Outbound>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The queue to one channel's writer.
#[derive(Clone)]
pub struct Outbox {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Outbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outbox").field("queued", &self.len()).finish()
    }
}

impl Outbox {
    fn new() -> Self {
        Self { shared: Arc::default() }
    }

    fn push(&self, item: Outbound) {
        self.shared.lock().push_back(item);
        self.shared.more.notify_one();
    }

    /// Messages that wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shared.lock().len()
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether nothing should be done that adds to it.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.len() >= limits::OUTBOX_BOUND
    }

    async fn pop(&self) -> Outbound {
        loop {
            let more = self.shared.more.notified();
            if let Some(item) = self.shared.lock().pop_front() {
                return item;
            }
            more.await;
        }
    }
}

/// What the owner of a migration has of a link. Dropping it ends the tasks.
#[derive(Debug)]
pub struct Wires {
    /// The connection.
    pub link: Link,
    control: Outbox,
    faults: Outbox,
    wants: Option<Outbox>,
    names: Option<Outbox>,
    literals: Option<Outbox>,
    /// Ends with this.
    _tasks: JoinSet<()>,
}

/// What the tasks of one connection share.
#[derive(Clone)]
struct Context {
    generation: u32,
    inbox: mpsc::Sender<LinkEvent>,
    /// Told whenever a message has left an outbox.
    drained: Arc<Notify>,
    throttle: Arc<Throttle>,
}

impl Wires {
    /// Starts the tasks of a source's link.
    #[must_use]
    pub fn source(
        link: Link,
        channels: SourceChannels,
        generation: u32,
        inbox: &mpsc::Sender<LinkEvent>,
        drained: &Arc<Notify>,
        throttle: &Arc<Throttle>,
    ) -> Self {
        let (inbox, drained) = (inbox.clone(), Arc::clone(drained));
        let context = Context { generation, inbox, drained, throttle: Arc::clone(throttle) };
        let mut tasks = JoinSet::new();
        let control = write_to(&mut tasks, &context, channels.control, Channel::Control);
        let faults = both_ways(&mut tasks, &context, channel::open_faults(link.clone()));
        let names = write_to(&mut tasks, &context, channels.names, Channel::Names);
        let literals = write_to(&mut tasks, &context, channels.literals, Channel::Literals);
        tasks.spawn(read(channels.control_in, context.clone()));
        tasks.spawn(read_wants(link.clone(), context));
        Self {
            link,
            control,
            faults,
            wants: None,
            names: Some(names),
            literals: Some(literals),
            _tasks: tasks,
        }
    }

    /// Starts the tasks of a destination's link.
    #[must_use]
    pub fn destination(
        link: Link,
        channels: DestinationChannels,
        generation: u32,
        inbox: &mpsc::Sender<LinkEvent>,
        drained: &Arc<Notify>,
    ) -> Self {
        let (inbox, drained) = (inbox.clone(), Arc::clone(drained));
        let context = Context { generation, inbox, drained, throttle: Arc::new(Throttle::new(None)) };
        let mut tasks = JoinSet::new();
        let control = write_to(&mut tasks, &context, channels.control, Channel::Control);
        let faults = both_ways(&mut tasks, &context, channel::accept_faults(link.clone()));
        let wants = write_to(&mut tasks, &context, channels.wants, Channel::Wants);
        tasks.spawn(read(channels.control_in, context.clone()));
        tasks.spawn(read(channels.names, context.clone()));
        tasks.spawn(read(channels.literals, context));
        Self { link, control, faults, wants: Some(wants), names: None, literals: None, _tasks: tasks }
    }

    fn outbox(&self, channel: Channel) -> Option<&Outbox> {
        match channel {
            Channel::Control => Some(&self.control),
            Channel::Faults => Some(&self.faults),
            Channel::Wants => self.wants.as_ref(),
            Channel::Names => self.names.as_ref(),
            Channel::Literals => self.literals.as_ref(),
        }
    }

    /// Queues a message.
    pub fn send(&self, message: &Message) {
        let frame = wire::encode(message).into();
        self.push(message.channel(), Outbound::Frame { frame, literals: None });
    }

    /// Queues an encoded batch of literals; [`FromLink::LiteralsSent`] comes when it has been handed to QUIC.
    pub fn send_literals(&self, channel: Channel, batch: Vec<u8>, sent: LiteralsSent) {
        let frame = wire::encode(&Message::Literals(batch)).into();
        self.push(channel, Outbound::Frame { frame, literals: Some(sent) });
    }

    fn push(&self, channel: Channel, item: Outbound) {
        match self.outbox(channel) {
            Some(outbox) => outbox.push(item),
            None => {
                tracing::error!(?channel, "a message for a channel that this end does not write: dropped")
            }
        }
    }

    /// Whether some queue is so long that nothing should be read that could add to it.
    #[must_use]
    pub fn is_full(&self) -> bool {
        [Channel::Control, Channel::Faults, Channel::Wants, Channel::Names, Channel::Literals]
            .into_iter()
            .filter_map(|channel| self.outbox(channel))
            .any(Outbox::is_full)
    }

    /// Messages that wait for the names channel.
    #[must_use]
    pub fn names_queued(&self) -> usize {
        self.names.as_ref().map_or(0, Outbox::len)
    }

    /// Sends what is queued on the control channel, and closes the connection. Says whether the other end has acknowledged it
    /// within [`limits::CLOSE_TIMEOUT`]. The bytes of the whole connection are returned too.
    pub async fn flush_and_close(self, how: Close, reason: &str) -> (bool, WanBytes) {
        let (flushed, done) = oneshot::channel();
        self.control.push(Outbound::Flush(flushed));
        let heard = matches!(timeout(limits::CLOSE_TIMEOUT, done).await, Ok(Ok(())));
        self.link.close(how, reason);
        (heard, self.link.wan_bytes())
    }
}

fn write_to(tasks: &mut JoinSet<()>, context: &Context, writer: FrameWriter, channel: Channel) -> Outbox {
    let outbox = Outbox::new();
    tasks.spawn(write(writer, channel, outbox.clone(), context.clone()));
    outbox
}

/// The channel that goes both ways and is opened beside the others. What is queued waits for it.
fn both_ways(
    tasks: &mut JoinSet<()>,
    context: &Context,
    opening: impl Future<Output = Result<(FrameWriter, FrameReader), MigrateError>> + Send + 'static,
) -> Outbox {
    let outbox = Outbox::new();
    let (queue, context) = (outbox.clone(), context.clone());
    tasks.spawn(async move {
        match opening.await {
            Ok((writer, reader)) => {
                tokio::join!(write(writer, Channel::Faults, queue, context.clone()), read(reader, context));
            }
            Err(error @ MigrateError::Frame { .. }) => context.tell(FromLink::Lost(error)).await,
            // A lost connection is told by the reader of the control channel.
            Err(error) => tracing::debug!(%error, "there is no channel of faults"),
        }
    });
    outbox
}

async fn write(mut writer: FrameWriter, channel: Channel, outbox: Outbox, context: Context) {
    loop {
        let item = outbox.pop().await;
        context.drained.notify_one();
        let result = match item {
            Outbound::Frame { frame, literals } => {
                match channel {
                    Channel::Names | Channel::Literals => {
                        writer.link().fit_send_window();
                        context.throttle.pass(frame.len(), writer.link().wan_bytes().tx).await;
                    }
                    Channel::Faults => {
                        context.throttle.charge_ahead(frame.len(), writer.link().wan_bytes().tx);
                    }
                    Channel::Control | Channel::Wants => {}
                }
                let result = writer.send(frame).await;
                if let (Ok(()), Some(sent)) = (&result, literals) {
                    context.tell(FromLink::LiteralsSent(sent)).await;
                }
                result
            }
            Outbound::Flush(done) => {
                let result = writer.flush().await;
                if result.is_ok() && done.send(()).is_err() {
                    tracing::debug!("nobody waits for the flush any more");
                }
                return;
            }
        };
        if let Err(error) = result {
            // A lost connection is told by the reader of the control channel, behind the other end's last words.
            if writer.link().failure().is_none() {
                context.tell(FromLink::Lost(error)).await;
            }
            return;
        }
    }
}

/// Reads the channel of wants, which the destination opens.
async fn read_wants(link: Link, context: Context) {
    match channel::accept_wants(link.clone()).await {
        Ok(reader) => read(reader, context).await,
        // A lost connection is told by the reader of the control channel.
        Err(error) if link.failure().is_some() => tracing::debug!(%error, "there is no channel of wants"),
        Err(error) => context.tell(FromLink::Lost(error)).await,
    }
}

async fn read(mut reader: FrameReader, context: Context) {
    loop {
        let what = match reader.next().await {
            Ok(Some(frame)) => match wire::decode(&frame) {
                Ok(message) => FromLink::Message(message),
                Err(error) => FromLink::Undecodable(error),
            },
            // The other end has said all it has to say on this channel.
            Ok(None) if reader.channel() == Channel::Control => {
                let why = reader.link().closed().await.into();
                FromLink::Lost(MigrateError::ConnectionLost { address: reader.link().address(), why })
            }
            Ok(None) => return,
            // A lost connection is told by the reader of the control channel, behind the other end's last words.
            Err(_) if reader.channel() != Channel::Control && reader.link().failure().is_some() => return,
            Err(error) => FromLink::Lost(error),
        };
        let last = !matches!(what, FromLink::Message(_));
        context.tell(what).await;
        if last {
            return;
        }
    }
}

impl Context {
    async fn tell(&self, what: FromLink) {
        if self.inbox.send(LinkEvent { generation: self.generation, what }).await.is_err() {
            tracing::debug!("the migration has ended before its connection");
        }
    }
}
