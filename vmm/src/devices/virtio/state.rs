//! The saved state of a virtio device.
//!
//! ```text
//! device  = version u32 (1) | kind u32 | name string | status u32 | driver features u64 | interrupt status u32
//!           | config generation u32 | device features selector u32 | driver features selector u32 | queue selector u32
//!           | count u32 | queue* | the device's own state, a string
//! queue   = size u32 | ready u32 (0 or 1) | descriptors u64 | available u64 | used u64 | next available u16 | next used u16
//! string  = length u32 | bytes        integers little-endian
//! ```
//! Nothing here panics on any input; what a guest or another host could have written is checked again where it is put into a device.

use crate::kvm::StateError;
use crate::limits::{DEVICE_NAME_BYTES, DEVICE_STATE_MAX_BYTES, QUEUES_MAX};

const VERSION: u32 = 1;

/// One queue's registers, and where device and driver stand in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueState {
    /// Its size as the driver wrote it.
    pub size: u32,
    /// Whether the driver has set it up.
    pub ready: bool,
    /// The descriptor table's guest-physical address.
    pub descriptors: u64,
    /// The available ring's.
    pub available: u64,
    /// The used ring's.
    pub used: u64,
    /// The next entry of the available ring that the device takes.
    pub next_avail: u16,
    /// The next entry of the used ring that the device writes.
    pub next_used: u16,
}

/// One device: its registers, and its own state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VirtioState {
    /// The kind, as virtio numbers it (virtio 1.2, 5).
    pub kind: u32,
    /// What an operator calls it.
    pub name: String,
    /// The device status register.
    pub status: u32,
    /// The features that the driver has taken.
    pub driver_features: u64,
    /// The interrupt status register.
    pub interrupt_status: u32,
    /// The configuration's generation.
    pub config_generation: u32,
    /// Which half of the device's features is shown.
    pub device_features_select: u32,
    /// Which half of the driver's features is written.
    pub driver_features_select: u32,
    /// Which queue the queue registers speak of.
    pub queue_select: u32,
    /// Its queues.
    pub queues: Vec<QueueState>,
    /// What this kind of device has besides.
    pub own: Vec<u8>,
}

impl VirtioState {
    /// As bytes.
    /// # Panics
    /// If a device broke its own bounds.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_u32(&mut out, VERSION);
        put_u32(&mut out, self.kind);
        put_bytes(&mut out, self.name.as_bytes());
        put_u32(&mut out, self.status);
        put_u64(&mut out, self.driver_features);
        put_u32(&mut out, self.interrupt_status);
        put_u32(&mut out, self.config_generation);
        put_u32(&mut out, self.device_features_select);
        put_u32(&mut out, self.driver_features_select);
        put_u32(&mut out, self.queue_select);
        put_count(&mut out, self.queues.len());
        for queue in &self.queues {
            put_u32(&mut out, queue.size);
            put_u32(&mut out, u32::from(queue.ready));
            put_u64(&mut out, queue.descriptors);
            put_u64(&mut out, queue.available);
            put_u64(&mut out, queue.used);
            out.extend(queue.next_avail.to_le_bytes());
            out.extend(queue.next_used.to_le_bytes());
        }
        put_bytes(&mut out, &self.own);
        out
    }

    /// From bytes.
    /// # Errors
    /// [`StateError`], naming the field.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let mut reader = Reader(bytes);
        let version = reader.u32("device version")?;
        if version != VERSION {
            return Err(StateError::Version(version));
        }
        let state = Self {
            kind: reader.u32("device kind")?,
            name: reader.name()?,
            status: reader.u32("device status")?,
            driver_features: reader.u64("device's driver features")?,
            interrupt_status: reader.u32("device interrupt status")?,
            config_generation: reader.u32("device configuration's generation")?,
            device_features_select: reader.u32("device features selector")?,
            driver_features_select: reader.u32("driver features selector")?,
            queue_select: reader.u32("queue selector")?,
            queues: (0..reader.count("queues", QUEUES_MAX)?)
                .map(|_| decode_queue(&mut reader))
                .collect::<Result<_, _>>()?,
            own: reader.bytes("device's own state", DEVICE_STATE_MAX_BYTES)?.to_vec(),
        };
        match reader.0.len() {
            0 => Ok(state),
            left => Err(StateError::Trailing(left)),
        }
    }
}

fn decode_queue(reader: &mut Reader<'_>) -> Result<QueueState, StateError> {
    Ok(QueueState {
        size: reader.u32("queue size")?,
        ready: reader.u32("queue readiness")? != 0,
        descriptors: reader.u64("queue's descriptor table")?,
        available: reader.u64("queue's available ring")?,
        used: reader.u64("queue's used ring")?,
        next_avail: u16::from_le_bytes(reader.array("queue's next available entry")?),
        next_used: u16::from_le_bytes(reader.array("queue's next used entry")?),
    })
}

fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend(value.to_le_bytes());
}

fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend(value.to_le_bytes());
}

fn put_count(out: &mut Vec<u8>, count: usize) {
    put_u32(out, u32::try_from(count).expect("a few devices with a few queues"));
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_count(out, bytes.len());
    out.extend(bytes);
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], StateError> {
        let (array, rest) = self.0.split_first_chunk::<N>().ok_or(StateError::Truncated { field })?;
        self.0 = rest;
        Ok(*array)
    }

    fn u32(&mut self, field: &'static str) -> Result<u32, StateError> {
        self.array(field).map(u32::from_le_bytes)
    }

    fn u64(&mut self, field: &'static str) -> Result<u64, StateError> {
        self.array(field).map(u64::from_le_bytes)
    }

    fn count(&mut self, field: &'static str, most: usize) -> Result<usize, StateError> {
        let got = usize::try_from(self.u32(field)?).unwrap_or(usize::MAX);
        if got > most { Err(StateError::TooMany { field, got, most }) } else { Ok(got) }
    }

    fn name(&mut self) -> Result<String, StateError> {
        let bytes = self.bytes("device name", DEVICE_NAME_BYTES)?.to_vec();
        // Not mended: a name that grows in the mending could not be written again.
        String::from_utf8(bytes)
            .map_err(|_| StateError::Device { device: "?".to_owned(), what: "its name is not UTF-8" })
    }

    fn bytes(&mut self, field: &'static str, most: usize) -> Result<&'a [u8], StateError> {
        let length = self.count(field, most)?;
        let (bytes, rest) = self.0.split_at_checked(length).ok_or(StateError::Truncated { field })?;
        self.0 = rest;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn state() -> VirtioState {
        let queue = QueueState {
            size: 256,
            ready: true,
            descriptors: 1 << 32,
            next_used: 65_535,
            ..QueueState::default()
        };
        VirtioState {
            kind: 2,
            name: "disk data".to_owned(),
            status: 15,
            queues: vec![queue, QueueState::default()],
            own: vec![1],
            ..VirtioState::default()
        }
    }

    #[test]
    fn what_is_written_is_read_and_nothing_shorter_or_longer() {
        let bytes = state().encode();
        assert_eq!(VirtioState::decode(&bytes).unwrap(), state());
        for end in 0..bytes.len() {
            let error = VirtioState::decode(&bytes[..end]).unwrap_err();
            assert!(matches!(error, StateError::Truncated { .. }), "{end}: {error}");
        }
        assert_eq!(VirtioState::decode(&[bytes, vec![0]].concat()).unwrap_err(), StateError::Trailing(1));
    }

    /// Found by fuzzing: bytes that are not UTF-8 were mended, and the longer name broke the bound when it was written again.
    #[test]
    fn a_name_that_is_not_utf_8_is_refused() {
        let mut bytes = state().encode();
        bytes[12] = 0xff;
        assert!(matches!(VirtioState::decode(&bytes), Err(StateError::Device { .. })));
    }

    #[test]
    fn lengths_are_bounded() {
        let mut bytes = state().encode();
        bytes[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(VirtioState::decode(&bytes), Err(StateError::TooMany { field: "device name", .. })));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
            raw in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            let mut bytes = state().encode();
            for (at, value) in edits {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            let _: Result<_, _> = VirtioState::decode(&bytes);
            let _: Result<_, _> = VirtioState::decode(&raw);
        }
    }
}
