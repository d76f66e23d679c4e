//! The bus of device registers in guest-physical memory.

use std::sync::Arc;

/// A device with registers in memory. Virtual CPUs call it concurrently.
pub(crate) trait MmioDevice: Send + Sync + std::fmt::Debug {
    /// One read at `offset` from the device's first register; `data` is 1, 2, 4 or 8 bytes long and holds ones.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// One write at `offset` from the device's first register.
    fn write(&self, offset: u64, data: &[u8]);
}

#[derive(Debug)]
struct Claim {
    first: u64,
    bytes: u64,
    device: Arc<dyn MmioDevice>,
}

/// The bus. What nobody claims reads as ones and swallows writes.
#[derive(Debug, Default)]
pub(crate) struct MmioBus(Vec<Claim>);

impl MmioBus {
    /// Puts a device on the bus. Claims do not overlap: the monitor places all of them.
    pub(crate) fn claim(&mut self, first: u64, bytes: u64, device: Arc<dyn MmioDevice>) {
        self.0.push(Claim { first, bytes, device });
    }

    fn find(&self, address: u64, length: usize) -> Option<(&dyn MmioDevice, u64)> {
        self.0.iter().find_map(|claim| {
            let offset = address.checked_sub(claim.first)?;
            let end = offset.checked_add(length as u64)?;
            (end <= claim.bytes).then(|| (claim.device.as_ref(), offset))
        })
    }

    /// Answers a read.
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.read(offset, data);
        }
    }

    /// Carries out a write.
    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.write(offset, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Debug, Default)]
    struct Register(Mutex<Vec<(u64, Vec<u8>)>>);

    impl MmioDevice for Register {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn only_what_is_claimed_answers() {
        let device = Arc::new(Register::default());
        let mut bus = MmioBus::default();
        bus.claim(0x1000, 0x100, Arc::clone(&device) as _);
        let read = |address, length| {
            let mut data = vec![0; length];
            bus.read(address, &mut data);
            data
        };
        assert_eq!(read(0x1004, 4), [4; 4]);
        for (address, length) in [(0xfff, 1), (0xffe, 4), (0x10fd, 4), (0x1100, 1), (u64::MAX, 8)] {
            assert_eq!(read(address, length), vec![0xff; length], "{address:#x}");
            bus.write(address, &vec![1; length]);
        }
        bus.write(0x10fc, &[1, 2, 3, 4]);
        assert_eq!(*device.0.lock().unwrap(), [(0xfc, vec![1, 2, 3, 4])]);
    }
}
