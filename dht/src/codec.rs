//! Reading and writing bounded binary messages. All integers are big-endian.

use thiserror::Error;

/// Why bytes are not a message.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum CodecError {
    /// The message ends within a field.
    #[error("the message ends within its {field}")]
    Truncated {
        /// The field.
        field: &'static str,
    },
    /// A length or count exceeds its bound.
    #[error("{field} is {value}, the bound is {bound}")]
    TooLarge {
        /// The field.
        field: &'static str,
        /// What it says.
        value: u64,
        /// What it may say.
        bound: u64,
    },
    /// A field has a value that this version does not know.
    #[error("{field} has the unknown value {value}")]
    Unknown {
        /// The field.
        field: &'static str,
        /// What it says.
        value: u64,
    },
    /// A text is not UTF-8.
    #[error("{field} is not UTF-8 text")]
    NotText {
        /// The field.
        field: &'static str,
    },
    /// Bytes follow the message's last field.
    #[error("{bytes} bytes follow the end of the message")]
    Trailing {
        /// How many.
        bytes: usize,
    },
}

/// Takes fields off the front of a message.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(crate) fn bytes(&mut self, count: usize, field: &'static str) -> Result<&'a [u8], CodecError> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(CodecError::Truncated { field })?;
        self.rest = rest;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self, field: &'static str) -> Result<&'a [u8; N], CodecError> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(CodecError::Truncated { field })?;
        self.rest = rest;
        Ok(taken)
    }

    pub(crate) fn u8(&mut self, field: &'static str) -> Result<u8, CodecError> {
        Ok(self.array::<1>(field)?[0])
    }

    pub(crate) fn u16(&mut self, field: &'static str) -> Result<u16, CodecError> {
        Ok(u16::from_be_bytes(*self.array(field)?))
    }

    pub(crate) fn u32(&mut self, field: &'static str) -> Result<u32, CodecError> {
        Ok(u32::from_be_bytes(*self.array(field)?))
    }

    pub(crate) fn u64(&mut self, field: &'static str) -> Result<u64, CodecError> {
        Ok(u64::from_be_bytes(*self.array(field)?))
    }

    /// A 32-bit count of items that take at least `item_bytes` each: bounded by `bound` and by what the message can still hold,
    /// so that a lying count reserves no memory.
    pub(crate) fn count(
        &mut self,
        bound: usize,
        item_bytes: usize,
        field: &'static str,
    ) -> Result<usize, CodecError> {
        let value = self.u32(field)?;
        let count = usize::try_from(value).unwrap_or(usize::MAX);
        if count > bound {
            return Err(CodecError::TooLarge { field, value: value.into(), bound: bound as u64 });
        }
        if count.saturating_mul(item_bytes) > self.rest.len() {
            return Err(CodecError::Truncated { field });
        }
        Ok(count)
    }

    /// Bytes after their own 32-bit length.
    pub(crate) fn sized(&mut self, bound: usize, field: &'static str) -> Result<&'a [u8], CodecError> {
        let length = self.count(bound, 1, field)?;
        self.bytes(length, field)
    }

    /// Text after its own 32-bit length in bytes.
    pub(crate) fn text(&mut self, bound: usize, field: &'static str) -> Result<String, CodecError> {
        let bytes = self.sized(bound, field)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| CodecError::NotText { field })
    }

    pub(crate) fn end(self) -> Result<(), CodecError> {
        match self.rest.len() {
            0 => Ok(()),
            bytes => Err(CodecError::Trailing { bytes }),
        }
    }
}

/// Appends a 32-bit count.
///
/// # Panics
/// If the count does not fit: writers check their own bounds first, and all are below 2^32.
pub(crate) fn put_count(out: &mut Vec<u8>, count: usize) {
    out.extend_from_slice(&u32::try_from(count).expect("counts are bounded below 2^32").to_be_bytes());
}

/// Appends bytes after their 32-bit length.
pub(crate) fn put_sized(out: &mut Vec<u8>, bytes: &[u8]) {
    put_count(out, bytes.len());
    out.extend_from_slice(bytes);
}

/// The front of `text` that fits in `bound` bytes, cut between characters.
pub(crate) fn cut(text: &str, bound: usize) -> &str {
    let end = (0..=bound.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    &text[..end]
}
