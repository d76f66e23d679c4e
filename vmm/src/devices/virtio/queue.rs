//! A virtqueue as a device sees it: chains of buffers out, used elements in (virtio 1.2, 2.7).
//!
//! Everything in a queue is written by the guest. What a driver may not do is a [`QueueError`], at which the device stops until its
//! driver resets it; what a driver may do is bounded: the descriptors of a chain, and the chains that one look takes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_queue::{Queue, QueueOwnedT as _, QueueT as _};
use vm_memory::{Address as _, Bytes as _, GuestAddress};

use super::state::QueueState;
use crate::limits::{CHAIN_DESCRIPTORS_MAX, CHAINS_A_LOOK};
use crate::memory::Mapping;
use crate::memory::buffers::{Buffers, NotRam};

/// What a driver did that the specification forbids.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QueueError {
    /// The queue's own structures.
    #[error("the queue cannot be used: {0}")]
    Queue(virtio_queue::Error),
    /// A chain that ends in a loop, outside its table, or in an indirect table that is none.
    #[error("the chain of descriptors from {head} is broken after {descriptors}")]
    Broken {
        /// Its first descriptor.
        head: u16,
        /// How many could be followed.
        descriptors: usize,
    },
    /// A chain that is longer than the device said it takes.
    #[error("the chain of descriptors from {head} is longer than {CHAIN_DESCRIPTORS_MAX}")]
    Long {
        /// Its first descriptor.
        head: u16,
    },
    /// A buffer for the device to read behind one for it to write (2.7.4.2).
    #[error("in the chain of descriptors from {head} a readable one follows a writable one")]
    Order {
        /// Its first descriptor.
        head: u16,
    },
    /// A buffer outside RAM.
    #[error("a buffer is outside memory")]
    NotRam(#[from] NotRam),
    /// A chain that this kind of device cannot take.
    #[error("the chain of descriptors from {head} is no request: {what}")]
    Request {
        /// Its first descriptor.
        head: u16,
        /// What is wrong with it.
        what: &'static str,
    },
}

/// A request: what the device reads, and where it writes its answer.
#[derive(Debug)]
pub(crate) struct Chain<'m> {
    /// Names it when it is given back.
    pub(crate) head: u16,
    /// For the device to read.
    pub(crate) readable: Buffers<'m>,
    /// For the device to write.
    pub(crate) writable: Buffers<'m>,
}

/// Why a look at a queue came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// The device has left something there for later.
    Left,
    /// Nothing is there.
    Empty,
    /// Enough for once, or somebody waits for the device.
    Enough,
}

/// What a look at a queue came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Looked {
    /// There is more to do at once.
    pub(crate) more: bool,
    /// The driver wants an interrupt.
    pub(crate) interrupt: bool,
}

/// A queue that is in use.
#[derive(Debug)]
pub(crate) struct VirtQueue {
    queue: Queue,
    /// Set when somebody waits for the device: no further request is begun.
    hurry: Arc<AtomicBool>,
    left: usize,
    added: bool,
    /// The driver gets an interrupt whether it asked for one or not.
    always: bool,
    ending: Ending,
}

impl VirtQueue {
    /// A queue as its driver, or a saved state, has set it up.
    /// # Errors
    /// A size that is no power of two or above `max`, addresses that are not aligned or not RAM.
    pub(crate) fn new(
        max: u16,
        state: &QueueState,
        event_idx: bool,
        hurry: &Arc<AtomicBool>,
        memory: &Mapping,
    ) -> Result<Self, QueueError> {
        let state = virtio_queue::QueueState {
            max_size: max,
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx_enabled: event_idx,
            size: u16::try_from(state.size)
                .map_err(|_| QueueError::Queue(virtio_queue::Error::InvalidSize))?,
            ready: true,
            desc_table: state.descriptors,
            avail_ring: state.available,
            used_ring: state.used,
        };
        let queue = Queue::try_from(state).map_err(QueueError::Queue)?;
        // Address 0 is where virtio-queue has queues that nobody has set up.
        if state.avail_ring == 0 || !queue.is_valid(memory) {
            return Err(QueueError::Queue(virtio_queue::Error::QueueNotReady));
        }
        Ok(Self {
            queue,
            hurry: Arc::clone(hurry),
            left: 0,
            added: false,
            always: false,
            ending: Ending::Left,
        })
    }

    /// Where driver and device stand in it.
    pub(crate) fn positions(&self) -> (u16, u16) {
        (self.queue.next_avail(), self.queue.next_used())
    }

    /// Begins a look: the driver need not notify during it.
    pub(super) fn begin(&mut self, memory: &Mapping) -> Result<(), QueueError> {
        (self.left, self.added, self.always, self.ending) = (CHAINS_A_LOOK, false, false, Ending::Left);
        self.queue.disable_notification(memory).map_err(QueueError::Queue)
    }

    /// Ends a look.
    pub(super) fn end(&mut self, memory: &Mapping) -> Result<Looked, QueueError> {
        let wanted = self.added && self.queue.needs_notification(memory).map_err(QueueError::Queue)?;
        let interrupt = wanted || self.always;
        let more = match self.ending {
            Ending::Left => false,
            Ending::Enough => true,
            Ending::Empty => self.queue.enable_notification(memory).map_err(QueueError::Queue)?,
        };
        Ok(Looked { more, interrupt })
    }

    /// The next request; `None` when there is none, or no more should be begun now. A device that leaves requests in the queue for
    /// later will be called again when its backend or somebody else wakes it.
    pub(crate) fn pop<'m>(&mut self, memory: &'m Mapping) -> Result<Option<Chain<'m>>, QueueError> {
        if self.left == 0 || self.hurry.load(Ordering::Relaxed) {
            self.ending = Ending::Enough;
            return Ok(None);
        }
        let Some(chain) = self.queue.iter(memory).map_err(QueueError::Queue)?.next() else {
            self.ending = Ending::Empty;
            return Ok(None);
        };
        self.left -= 1;
        follow(chain, memory).map(Some)
    }

    /// Puts the last `count` requests back after [`VirtQueue::pop`] gave none, or when no more are wanted: they will be the next again. If the queue was
    /// empty, the driver's next request brings the device back here.
    pub(crate) fn put_back(&mut self, memory: &Mapping, count: usize) -> Result<(), QueueError> {
        if self.ending == Ending::Empty {
            // Before going back: the driver is to notify of what comes behind these, not of these.
            let more = self.queue.enable_notification(memory).map_err(QueueError::Queue)?;
            self.ending = if more { Ending::Enough } else { Ending::Left };
        }
        (0..count).for_each(|_| self.queue.go_to_previous_position());
        Ok(())
    }

    /// Gives several requests back that the driver must see together, each with the bytes written to it.
    pub(crate) fn push_used_together(
        &mut self,
        memory: &Mapping,
        requests: &[(u16, usize)],
    ) -> Result<(), QueueError> {
        let Some(((last, last_written), before)) = requests.split_last() else { return Ok(()) };
        let (mut next, size) = (self.queue.next_used(), self.queue.size());
        for (head, written) in before {
            // An element of the used ring (2.7.8): published with the ring's index, which the last one moves.
            let at = self.queue.used_ring() + 4 + u64::from(next % size) * 8;
            let written = u32::try_from(*written).unwrap_or(u32::MAX);
            let element = [u32::from(*head), written].map(u32::to_le_bytes).concat();
            memory
                .write_slice(&element, GuestAddress(at))
                .map_err(|_| QueueError::Queue(virtio_queue::Error::AddressOverflow))?;
            next = next.wrapping_add(1);
        }
        self.queue.set_next_used(next);
        // virtio-queue counts only what goes through it, and the driver may have asked for an interrupt at one of the others.
        self.always |= !before.is_empty();
        self.push_used(memory, *last, *last_written)
    }

    /// Gives a request back to the driver, with `written` bytes written to its writable part.
    pub(crate) fn push_used(
        &mut self,
        memory: &Mapping,
        head: u16,
        written: usize,
    ) -> Result<(), QueueError> {
        self.added = true;
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        self.queue.add_used(memory, head, written).map_err(QueueError::Queue)
    }
}

fn follow<'m>(
    chain: virtio_queue::DescriptorChain<&'m Mapping>,
    memory: &'m Mapping,
) -> Result<Chain<'m>, QueueError> {
    let head = chain.head_index();
    let mut request = Chain { head, readable: Buffers::default(), writable: Buffers::default() };
    let (mut descriptors, mut goes_on) = (0, true);
    for descriptor in chain {
        descriptors += 1;
        if descriptors > CHAIN_DESCRIPTORS_MAX {
            return Err(QueueError::Long { head });
        }
        let part = if descriptor.is_write_only() {
            &mut request.writable
        } else if request.writable.bytes() > 0 {
            return Err(QueueError::Order { head });
        } else {
            &mut request.readable
        };
        part.push(memory, descriptor.addr().raw_value(), descriptor.len())?;
        goes_on = descriptor.has_next();
    }
    // The iterator ends silently at what it cannot follow; the last descriptor then still says that one comes after it.
    if goes_on { Err(QueueError::Broken { head, descriptors }) } else { Ok(request) }
}
