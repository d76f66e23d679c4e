//! The entropy device (virtio 1.2, 5.4): random bytes of the host's kernel.

use std::os::fd::BorrowedFd;

use super::queue::{QueueError, VirtQueue};
use super::{DeviceDescription, VirtioDevice, Wait};
use crate::devices::quiet::Quiet;
use crate::kvm::StateError;
use crate::limits::RANDOM_REQUEST_BYTES;
use crate::memory::Mapping;

/// The device: it has neither features nor configuration nor state.
#[derive(Debug, Default)]
pub(crate) struct Rng {
    quiet: Quiet,
}

impl VirtioDevice for Rng {
    fn describe(&self) -> DeviceDescription {
        DeviceDescription::Rng
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[64]
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn write_config(&mut self, _: u64, _: &[u8]) {}

    fn set_features(&mut self, _: u64) {}

    fn reset(&mut self) {}

    fn serve(&mut self, _: usize, queue: &mut VirtQueue, memory: &Mapping) -> Result<Wait, QueueError> {
        let mut random = Vec::new();
        while let Some(chain) = queue.pop(memory)? {
            random.resize(chain.writable.bytes().min(RANDOM_REQUEST_BYTES), 0);
            if let Err(error) = getrandom::fill(&mut random) {
                self.quiet.say(|dropped| {
                    tracing::error!(%error, dropped, "the host gave no random bytes: the guest gets none");
                });
                random.clear();
            }
            let written = chain.writable.copy_from(&random);
            queue.push_used(memory, chain.head, written)?;
        }
        Ok(Wait::Driver)
    }

    fn backend(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    fn load(&mut self, _: &[u8]) -> Result<(), StateError> {
        Ok(())
    }
}
