//! What the bytes of an exercise mean, and how to write them.
//!
//! ```text
//! step       = 0 register u8 (times 4) | value u32                        write a register
//!            | 1 offset u16 | width u8                                    read registers or configuration
//!            | 2 offset u16 (from the end of the registers) | width u8 | bytes [8]      write configuration
//!            | 3 place u16 (times 8) | bytes [16]                         write memory
//!            | 4 features not taken u32 | logarithm of queues' size u8    set the device and its queues up by the book
//!            | 5 queue u8 | how u8 | head u16, if how says so | part*     make a chain available
//!            | 6 how u8 | at u16 | value u16                              save and load, with the state as it was or changed
//!            | 7                                                          let the device look
//!            | 8 bytes u16                                                something arrives from outside
//!            | 9 queue u8 | count u8                                      make what stands in the ring available once more
//! part       = kind u8 | place u16 (times 64) | length u16 | bytes [16], if kind says so
//! ```
//! A step's number is taken modulo [`STEPS`]. Where the bytes end, zeros are read.

pub(super) const WRITE_REGISTER: u8 = 0;
pub(super) const READ: u8 = 1;
pub(super) const WRITE_CONFIG: u8 = 2;
pub(super) const PUT: u8 = 3;
pub(super) const SET_UP: u8 = 4;
pub(super) const REQUEST: u8 = 5;
pub(super) const SAVE: u8 = 6;
pub(super) const LOOK: u8 = 7;
pub(super) const ARRIVE: u8 = 8;
pub(super) const AGAIN: u8 = 9;
/// How many kinds of steps there are.
pub const STEPS: u8 = 10;

/// A request's `how`: the bits below are one less than its parts.
pub(super) const PARTS: u8 = 7;
/// The first descriptor is one that the bytes name, not the next one.
pub const HEAD_GIVEN: u8 = 1 << 3;
/// The parts stand in an indirect table.
pub const INDIRECT: u8 = 1 << 4;
/// The last descriptor goes on at the first one.
pub const LOOP: u8 = 1 << 5;
/// The device does not look yet.
pub const WAIT: u8 = 1 << 6;

/// A part's `kind`: for the device to write.
pub const WRITABLE: u8 = 1;
/// The buffer's first 16 bytes come with it.
pub const FILL: u8 = 1 << 1;
/// The place counts bytes back from the end of memory.
pub const FROM_END: u8 = 1 << 2;
/// The length is in units of 64 KiB.
pub const HUGE: u8 = 1 << 3;
/// The place is the highest 16 bits of the address.
pub const FAR: u8 = 1 << 4;
/// The descriptor says that it is an indirect table.
pub const TABLE: u8 = 1 << 5;
/// The length is in sectors.
pub const SECTORS: u8 = 1 << 6;
/// The chain goes on where it should end, and the other way round.
pub const FLIP: u8 = 1 << 7;

/// A save's `how`: where each queue's driver and device stand is changed.
pub const POSITIONS: u8 = 1;
/// A byte of the saved state is changed.
pub const DAMAGE: u8 = 2;

/// One buffer of a request.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    kind: u8,
    place: u16,
    length: u16,
    fill: [u8; 16],
}

impl Part {
    /// Room for a disk's status.
    pub const STATUS: Self = Self { kind: WRITABLE, place: 0x1080, length: 1, fill: [0; 16] };

    /// A buffer with `bytes` for the device to read.
    #[must_use]
    pub fn filled(place: u16, bytes: [u8; 16]) -> Self {
        Self { kind: FILL, place, length: 16, fill: bytes }
    }

    /// A buffer of `kind`, without its own bytes.
    #[must_use]
    pub fn new(kind: u8, place: u16, length: u16) -> Self {
        Self { kind: kind & !FILL, place, length, fill: [0; 16] }
    }

    /// The same with another length.
    #[must_use]
    pub fn with_length(self, length: u16) -> Self {
        Self { length, ..self }
    }
}

/// The bytes of an exercise.
#[derive(Clone, Debug, Default)]
pub struct Script(Vec<u8>);

impl Script {
    /// A device and its queues of 16 entries as a driver that takes all features sets them up.
    #[must_use]
    pub fn live() -> Self {
        Self::default().set_up(0, 4)
    }

    fn step(mut self, step: u8, fields: &[&[u8]]) -> Self {
        self.0.push(step);
        fields.iter().for_each(|field| self.0.extend(*field));
        self
    }

    /// Writes a register.
    #[must_use]
    pub fn register(self, offset: u8, value: u32) -> Self {
        self.step(WRITE_REGISTER, &[&[offset / 4], &value.to_le_bytes()])
    }

    /// Reads registers or configuration.
    #[must_use]
    pub fn read(self, offset: u16, width: u8) -> Self {
        self.step(READ, &[&offset.to_le_bytes(), &[width]])
    }

    /// Writes the first `width` of `bytes` to the configuration, `offset` bytes behind the registers' end.
    #[must_use]
    pub fn config(self, offset: u16, width: u8, bytes: [u8; 8]) -> Self {
        self.step(WRITE_CONFIG, &[&offset.to_le_bytes(), &[width], &bytes])
    }

    /// Writes memory at `place` times 8.
    #[must_use]
    pub fn put(self, place: u16, bytes: [u8; 16]) -> Self {
        self.step(PUT, &[&place.to_le_bytes(), &bytes])
    }

    /// Resets the device and sets it up, with queues of two to the `logarithm` entries.
    #[must_use]
    pub fn set_up(self, features_not_taken: u32, logarithm: u8) -> Self {
        self.step(SET_UP, &[&features_not_taken.to_le_bytes(), &[logarithm]])
    }

    /// Makes a chain of one to eight parts available.
    #[must_use]
    pub fn request(self, queue: u8, how: u8, parts: &[Part]) -> Self {
        let count = u8::try_from(parts.len().saturating_sub(1)).map_or(PARTS, |more| more.min(PARTS));
        let mut this = self.step(REQUEST, &[&[queue, how & !(PARTS | HEAD_GIVEN) | count]]);
        for part in parts.iter().take(usize::from(PARTS) + 1) {
            this.0.push(part.kind);
            this.0.extend(part.place.to_le_bytes());
            this.0.extend(part.length.to_le_bytes());
            if part.kind & FILL != 0 {
                this.0.extend(part.fill);
            }
        }
        this
    }

    /// Saves the device and loads it into another.
    #[must_use]
    pub fn save(self, how: u8, at: u16, value: u16) -> Self {
        self.step(SAVE, &[&[how], &at.to_le_bytes(), &value.to_le_bytes()])
    }

    /// Lets the device look.
    #[must_use]
    pub fn look(self) -> Self {
        self.step(LOOK, &[])
    }

    /// Something of `bytes` bytes arrives from outside.
    #[must_use]
    pub fn arrive(self, bytes: u16) -> Self {
        self.step(ARRIVE, &[&bytes.to_le_bytes()])
    }

    /// Makes the next `count` entries of a queue's ring available, whatever they hold.
    #[must_use]
    pub fn again(self, queue: u8, count: u8) -> Self {
        self.step(AGAIN, &[&[queue, count]])
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(self) -> Vec<u8> {
        self.0
    }
}
