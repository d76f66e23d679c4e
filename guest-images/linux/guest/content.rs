//! Bytes that follow from a seed, so that whoever reads them back can say what they must be.

/// A stream of bytes: SplitMix64 from `seed`, eight bytes a step.
#[derive(Debug)]
pub(crate) struct Content {
    state: u64,
}

impl Content {
    pub(crate) const fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    fn step(&mut self) -> [u8; 8] {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)).to_le_bytes()
    }

    /// The next bytes of the stream, as many as `bytes` takes; a rest of fewer than eight ends the use of the stream.
    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        for part in bytes.chunks_mut(8) {
            let step = self.step();
            part.copy_from_slice(&step[..part.len()]);
        }
    }

    /// The first offset at which `bytes` are not what the stream says next.
    pub(crate) fn differs(&mut self, bytes: &[u8]) -> Option<usize> {
        for (index, part) in bytes.chunks(8).enumerate() {
            let step = self.step();
            if part != &step[..part.len()] {
                let within = part.iter().zip(step).position(|(found, expected)| *found != expected);
                return Some(index * 8 + within.unwrap_or(0));
            }
        }
        None
    }
}

/// A sum over `bytes` that depends on each byte and its place (FNV-1a, eight bytes a step).
pub(crate) fn sum(bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(0xcbf2_9ce4_8422_2325, |hash, part| {
        let mut word = [0; 8];
        word[..part.len()].copy_from_slice(part);
        (hash ^ u64::from_le_bytes(word)).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_filled_is_recognised_and_a_changed_byte_found() {
        let mut bytes = vec![0; 1003];
        Content::new(7).fill(&mut bytes);
        assert_eq!(Content::new(7).differs(&bytes), None);
        assert!(Content::new(8).differs(&bytes).is_some());
        bytes[1001] ^= 1;
        assert_eq!(Content::new(7).differs(&bytes), Some(1001));
    }

    #[test]
    fn a_sum_depends_on_every_byte_and_on_order() {
        let mut bytes = vec![0; 64];
        Content::new(1).fill(&mut bytes);
        let before = sum(&bytes);
        for index in 0..bytes.len() {
            bytes[index] ^= 0x80;
            assert_ne!(sum(&bytes), before, "byte {index}");
            bytes[index] ^= 0x80;
        }
        bytes.rotate_left(8);
        assert_ne!(sum(&bytes), before);
    }
}
