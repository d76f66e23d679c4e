//! A second mapping of the page that a virtual CPU shares with KVM (`struct kvm_run`), for the two fields that
//! `kvm_ioctls` does not let other code reach: `immediate_exit` from another thread, and the access size of port I/O.
#![expect(unsafe_code, reason = "maps memory that KVM shares")]

use std::mem::offset_of;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::{kvm_run, kvm_run__bindgen_ty_1__bindgen_ty_4 as kvm_run_io};
use rustix::mm::{MapFlags, ProtFlags};

/// Enough for `struct kvm_run`; what KVM puts behind it (port I/O data) is read through `kvm_ioctls`.
const BYTES: usize = 4096;

const _: () = assert!(size_of::<kvm_run>() <= BYTES);

/// The mapping. It stays valid after the virtual CPU's descriptor has been closed.
#[derive(Debug)]
pub(crate) struct RunPage(NonNull<u8>);

// SAFETY: the mapping belongs to this value alone and is only reached through atomics.
unsafe impl Send for RunPage {}
// SAFETY: as above: every access is atomic.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// Maps the page of a virtual CPU's descriptor.
    pub(crate) fn map(vcpu: impl AsFd) -> std::io::Result<Self> {
        // SAFETY: a fresh mapping at an address of the kernel's choosing aliases nothing that Rust knows.
        let at = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                BYTES,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                vcpu.as_fd(),
                0,
            )
        }?;
        Ok(Self(NonNull::new(at.cast()).expect("mmap gives no null page")))
    }

    fn byte(&self, offset: usize) -> &AtomicU8 {
        assert!(offset < BYTES, "a field of kvm_run");
        // SAFETY: within the mapping, as asserted.
        let at = unsafe { self.0.add(offset) };
        // SAFETY: valid as long as self, aligned (a byte), and every access of this process through this mapping is atomic.
        unsafe { AtomicU8::from_ptr(at.as_ptr()) }
    }

    /// Makes the current or next KVM_RUN return with EINTR once pending I/O has been completed (true), or not (false).
    pub(crate) fn set_immediate_exit(&self, on: bool) {
        self.byte(offset_of!(kvm_run, immediate_exit)).store(u8::from(on), Ordering::SeqCst);
    }

    /// The bytes of one access of the port I/O that KVM_RUN has just returned with: 1, 2 or 4.
    pub(crate) fn io_access_bytes(&self) -> usize {
        let offset = offset_of!(kvm_run, __bindgen_anon_1) + offset_of!(kvm_run_io, size);
        usize::from(self.byte(offset).load(Ordering::SeqCst)).max(1)
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: the range is the one that `map` made, and no reference into it outlives self.
        if let Err(error) = unsafe { rustix::mm::munmap(self.0.as_ptr().cast(), BYTES) } {
            tracing::error!(%error, "could not unmap a virtual CPU's run page");
        }
    }
}
