//! Integers, bytes and frames, written and read with bounds.

use page::{Gfn, PageHash};

/// Bytes that are not a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The frame ends before the field does.
    #[error("the frame ends within {field}")]
    Truncated {
        /// The field.
        field: &'static str,
    },
    /// The field's value is beyond its bound or has no meaning.
    #[error("{field} is out of range")]
    OutOfRange {
        /// The field.
        field: &'static str,
    },
    /// Bytes are left over.
    #[error("{0} bytes stand after the end of the message")]
    Trailing(usize),
    /// A kind of message that this version does not know.
    #[error("unknown kind of message {0}")]
    UnknownKind(u8),
    /// A version that this build does not speak.
    #[error("wire version {0} is not spoken here (this build speaks {ours})", ours = crate::limits::WIRE_VERSION)]
    UnknownVersion(u16),
}

/// Writes fields.
#[derive(Debug, Default)]
pub struct Writer {
    out: Vec<u8>,
}

impl Writer {
    /// One byte.
    pub fn byte(&mut self, value: u8) {
        self.out.push(value);
    }

    /// Bytes as they are, without a length.
    pub fn bytes(&mut self, value: &[u8]) {
        self.out.extend_from_slice(value);
    }

    /// A length (varint) and bytes.
    pub fn blob(&mut self, value: &[u8]) {
        self.varint(value.len() as u64);
        self.bytes(value);
    }

    /// An integer as LEB128 (DWARF 5, section 7.6): 7 bits a byte, low bits first.
    pub fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.out.push(value.to_le_bytes()[0] | 0x80);
            value >>= 7;
        }
        self.out.push(value.to_le_bytes()[0]);
    }

    /// A frame as its difference to another, zigzag, so that near frames take one byte.
    pub fn frame(&mut self, from: Gfn, to: Gfn) {
        let difference = to.0.wrapping_sub(from.0).cast_signed();
        self.varint(((difference << 1) ^ (difference >> 63)).cast_unsigned());
    }

    /// The bytes written.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        self.out
    }
}

/// Reads fields.
#[derive(Debug)]
pub struct Reader<'a> {
    left: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Reads `bytes` from the front.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { left: bytes }
    }

    /// The next `n` bytes.
    ///
    /// # Errors
    /// If there are fewer.
    pub fn take(&mut self, field: &'static str, n: usize) -> Result<&'a [u8], WireError> {
        let (head, tail) = self.left.split_at_checked(n).ok_or(WireError::Truncated { field })?;
        self.left = tail;
        Ok(head)
    }

    /// One byte.
    ///
    /// # Errors
    /// If there is none.
    pub fn byte(&mut self, field: &'static str) -> Result<u8, WireError> {
        let (head, tail) = self.left.split_first().ok_or(WireError::Truncated { field })?;
        self.left = tail;
        Ok(*head)
    }

    /// An array of `N` bytes.
    ///
    /// # Errors
    /// If there are fewer.
    pub fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], WireError> {
        let (head, tail) = self.left.split_first_chunk().ok_or(WireError::Truncated { field })?;
        self.left = tail;
        Ok(*head)
    }

    /// A name.
    ///
    /// # Errors
    /// If there are fewer than 32 bytes.
    pub fn name(&mut self, field: &'static str) -> Result<PageHash, WireError> {
        Ok(PageHash(self.array(field)?))
    }

    /// An integer in LEB128.
    ///
    /// # Errors
    /// If it is truncated or exceeds 64 bits.
    pub fn varint(&mut self, field: &'static str) -> Result<u64, WireError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte(field)?;
            let bits = u64::from(byte & 0x7f);
            if (bits << shift) >> shift != bits {
                return Err(WireError::OutOfRange { field });
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(WireError::OutOfRange { field })
    }

    /// A count, at most `most`.
    ///
    /// # Errors
    /// If it is truncated or larger.
    pub fn count(&mut self, field: &'static str, most: usize) -> Result<usize, WireError> {
        let value = self.varint(field)?;
        usize::try_from(value).ok().filter(|n| *n <= most).ok_or(WireError::OutOfRange { field })
    }

    /// A length, at most `most`, and as many bytes.
    ///
    /// # Errors
    /// If it is truncated or longer.
    pub fn blob(&mut self, field: &'static str, most: usize) -> Result<&'a [u8], WireError> {
        let length = self.count(field, most)?;
        self.take(field, length)
    }

    /// A frame as its difference to another.
    ///
    /// # Errors
    /// If it is truncated.
    pub fn frame(&mut self, field: &'static str, from: Gfn) -> Result<Gfn, WireError> {
        let zigzag = self.varint(field)?;
        let difference = (zigzag >> 1) ^ 0u64.wrapping_sub(zigzag & 1);
        Ok(Gfn(from.0.wrapping_add(difference)))
    }

    /// All that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.left)
    }

    /// Says that the message ends here.
    ///
    /// # Errors
    /// If bytes are left.
    pub fn end(self) -> Result<(), WireError> {
        if self.left.is_empty() { Ok(()) } else { Err(WireError::Trailing(self.left.len())) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn integers_and_frames_come_back(value: u64, from: u64, to: u64) {
            let mut out = Writer::default();
            out.varint(value);
            out.frame(Gfn(from), Gfn(to));
            let bytes = out.finish();
            let mut input = Reader::new(&bytes);
            prop_assert_eq!(input.varint("value"), Ok(value));
            prop_assert_eq!(input.frame("frame", Gfn(from)), Ok(Gfn(to)));
            prop_assert_eq!(input.end(), Ok(()));
        }
    }

    #[test]
    fn an_integer_beyond_64_bits_is_out_of_range() {
        assert_eq!(Reader::new(&[0xff; 10]).varint("n"), Err(WireError::OutOfRange { field: "n" }));
        assert_eq!(Reader::new(&[0x80]).varint("n"), Err(WireError::Truncated { field: "n" }));
    }
}
