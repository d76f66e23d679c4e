//! Frames of a running guest whose pages are still on their way: whoever touches one waits until it is installed (userfaultfd(2), post-copy).
//!
//! Guest memory is registered whole. A touched frame that is not absent (a hole that reads as zeros) is filled with zeros here; one that is
//! absent is told to the caller, who brings its page.
#![expect(unsafe_code, reason = "hands structures to ioctls of userfaultfd")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd as _, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use page::{Gfn, PAGE_SIZE, Page, PageSet};
use rustix::mm::{UserfaultfdFlags, userfaultfd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iowr_nr};

use super::Memory;
use crate::limits::FAULTS_A_READ;

/// The magic of the API, and of its ioctls (linux/userfaultfd.h, as are the structures and numbers that follow).
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
const FLAGS: UserfaultfdFlags = UserfaultfdFlags::CLOEXEC.union(UserfaultfdFlags::NONBLOCK);
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
/// The length of a message, and where the address of a fault stands in it.
const MESSAGE_BYTES: usize = 32;
const ADDRESS_AT: usize = 16;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct ZeroPage {
    range: Range,
    mode: u64,
    zeroed: i64,
}

ioctl_io_nr!(USERFAULTFD_IOC_NEW, 0xaa, 0x00);
ioctl_iowr_nr!(UFFDIO_REGISTER, 0xaa, 0x00, Register);
ioctl_ior_nr!(UFFDIO_WAKE, 0xaa, 0x02, Range);
ioctl_iowr_nr!(UFFDIO_COPY, 0xaa, 0x03, Copy);
ioctl_iowr_nr!(UFFDIO_ZEROPAGE, 0xaa, 0x04, ZeroPage);
ioctl_iowr_nr!(UFFDIO_API, 0xaa, 0x3f, Api);

/// Why frames cannot be absent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AbsentError {
    /// No userfaultfd that sees KVM's own accesses.
    #[error(
        "this process may not handle page faults of guest memory: be root, or be given access to /dev/userfaultfd, \
         or set the sysctl vm.unprivileged_userfaultfd to 1; without it VMs come by pre-copy alone"
    )]
    Denied(#[source] io::Error),
    /// The kernel lacks what is needed.
    #[error("the kernel's userfaultfd cannot do what post-copy needs ({step}); Linux 4.11 and later can")]
    Unsupported {
        /// Which call said so.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A call failed on a frame.
    #[error("{step} failed for frame {gfn}")]
    Frame {
        /// Which call.
        step: &'static str,
        /// Which frame.
        gfn: Gfn,
        /// Why.
        source: io::Error,
    },
}

/// The absent frames of a guest's memory.
///
/// Dropped while frames are absent it leaves whoever waits for one waiting for as long as the process lives: to let go would have the
/// guest read zeros there.
#[derive(Debug)]
pub(crate) struct Absent {
    faults: Option<File>,
    memory: Arc<Memory>,
    frames: Mutex<PageSet>,
}

/// Whether this process can have absent frames.
///
/// # Errors
/// [`AbsentError::Denied`], [`AbsentError::Unsupported`]: why not.
pub(crate) fn supported() -> Result<(), AbsentError> {
    open().map(drop)
}

impl Absent {
    /// Makes `frames` absent: what stands there now is given up, and whoever touches one waits.
    ///
    /// # Errors
    /// [`AbsentError`]; the memory is then of no further use.
    ///
    /// # Panics
    /// If the set's bound is not the memory's.
    pub(crate) fn new(memory: Arc<Memory>, frames: PageSet) -> Result<Self, AbsentError> {
        assert_eq!(frames.bound(), memory.bound(), "a set over this memory");
        let faults = open()?;
        for (extent, start) in memory.host_addresses() {
            let range = Range { start, len: extent.bytes() };
            let mut register = Register { range, mode: UFFDIO_REGISTER_MODE_MISSING, ioctls: 0 };
            // SAFETY: the structure is what the call reads and writes; the range is a mapping of this process that lives as long as `memory`.
            check("UFFDIO_REGISTER", unsafe {
                ioctl_with_mut_ref(&faults, UFFDIO_REGISTER(), &mut register)
            })?;
        }
        // After the registration: a frame touched between the two would be filled with zeros by the kernel.
        for run in runs(&frames) {
            memory.punch(run.0, run.1).map_err(|source| AbsentError::Frame {
                step: "giving up what stood there",
                gfn: run.0,
                source,
            })?;
        }
        Ok(Self { faults: Some(faults), memory, frames: Mutex::new(frames) })
    }

    fn frames(&self) -> MutexGuard<'_, PageSet> {
        self.frames.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn file(&self) -> &File {
        self.faults.as_ref().expect("taken only when dropped")
    }

    /// As what a tokio task can await faults of. Called within a runtime.
    ///
    /// # Errors
    /// If the runtime cannot watch the descriptor.
    pub(crate) fn watched(self) -> Result<AsyncFd<Self>, AbsentError> {
        // SAFETY: `as_raw_fd` is always the same descriptor, which is open until `self` is dropped.
        unsafe { AsyncFd::register_with_interest(self, Interest::READABLE) }
            .map_err(|error| AbsentError::Unsupported { step: "epoll", source: error.into_parts().1 })
    }

    /// The guest will never run on this memory: what waits may read zeros once this is dropped.
    pub(crate) fn forget(&self) {
        let mut frames = self.frames();
        *frames = PageSet::empty(frames.bound());
    }

    /// How many frames are absent.
    pub(crate) fn left(&self) -> u64 {
        self.frames().len()
    }

    /// The faults that have come since the last call: absent frames that somebody waits for. Never waits itself.
    ///
    /// # Errors
    /// If the descriptor cannot be read, or a frame that is not absent not be filled.
    pub(crate) fn faults(&self) -> Result<Vec<Gfn>, AbsentError> {
        use std::io::Read as _;
        let mut messages = [0; MESSAGE_BYTES * FAULTS_A_READ];
        let mut absent = Vec::new();
        loop {
            let length = match self.file().read(&mut messages) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(absent),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(AbsentError::Unsupported { step: "read", source }),
            };
            for message in messages[..length].chunks_exact(MESSAGE_BYTES) {
                let Some(gfn) = self.frame_of(message) else { continue };
                if self.frames().contains(gfn) {
                    absent.push(gfn);
                } else {
                    self.fill_with_zeros(gfn)?;
                }
            }
        }
    }

    /// The frame that a message is about.
    fn frame_of(&self, message: &[u8]) -> Option<Gfn> {
        if message[0] != UFFD_EVENT_PAGEFAULT {
            return None;
        }
        let address: [u8; 8] = message[ADDRESS_AT..ADDRESS_AT + 8].try_into().expect("eight bytes");
        let address = u64::from_ne_bytes(address);
        let (extent, start) = self
            .memory
            .host_addresses()
            .find(|(extent, start)| address >= *start && address - start < extent.bytes())?;
        Some(Gfn(extent.first_gfn + (address - start) / PAGE_SIZE as u64))
    }

    /// Installs the page of an absent frame and lets go on whoever waits for it; `false` if the frame is not absent (any more): then
    /// nothing is written.
    ///
    /// # Errors
    /// If the kernel refuses: the frame stays absent.
    pub(crate) fn install(&self, gfn: Gfn, page: &Page) -> Result<bool, AbsentError> {
        // Held meanwhile: one page is installed once.
        let mut frames = self.frames();
        if !frames.contains(gfn) {
            return Ok(false);
        }
        let to = self.memory.host_address(gfn).expect("frames of the set are RAM");
        let mut copy =
            Copy { to, from: page.as_ptr().addr() as u64, len: PAGE_SIZE as u64, mode: 0, copied: 0 };
        self.retry("UFFDIO_COPY", gfn, || {
            // SAFETY: the kernel reads one page from `page` and fills a missing page of a registered mapping, which nobody has a reference to.
            unsafe { ioctl_with_mut_ref(self.file(), UFFDIO_COPY(), &mut copy) }
        })?;
        frames.remove(gfn);
        Ok(true)
    }

    /// A frame that nobody ever wrote, or that the guest gave back.
    fn fill_with_zeros(&self, gfn: Gfn) -> Result<(), AbsentError> {
        let start = self.memory.host_address(gfn).expect("frames that fault are RAM");
        let mut zero = ZeroPage { range: range(start), mode: 0, zeroed: 0 };
        let filled = self.retry("UFFDIO_ZEROPAGE", gfn, || {
            // SAFETY: the kernel fills a missing page of a registered mapping, which nobody has a reference to.
            unsafe { ioctl_with_mut_ref(self.file(), UFFDIO_ZEROPAGE(), &mut zero) }
        })?;
        if filled {
            return Ok(());
        }
        // It is there: installed since the fault was read.
        self.wake(gfn)
    }

    /// Lets go on whoever waits for a frame that is not absent any more: they only have to look again.
    ///
    /// # Errors
    /// If the kernel refuses.
    ///
    /// # Panics
    /// If the frame is not RAM.
    pub(crate) fn wake(&self, gfn: Gfn) -> Result<(), AbsentError> {
        let start = self.memory.host_address(gfn).expect("frames that fault are RAM");
        self.retry("UFFDIO_WAKE", gfn, || {
            // SAFETY: the kernel reads the structure and wakes waiters.
            unsafe { ioctl_with_ref(self.file(), UFFDIO_WAKE(), &range(start)) }
        })
        .map(drop)
    }

    /// Calls until the mapping is not just being changed by another thread; `false` if the page is there already.
    fn retry(
        &self,
        step: &'static str,
        gfn: Gfn,
        mut call: impl FnMut() -> i32,
    ) -> Result<bool, AbsentError> {
        while call() != 0 {
            let source = io::Error::last_os_error();
            match source.raw_os_error() {
                Some(libc::EAGAIN) => {}
                Some(libc::EEXIST) => return Ok(false),
                _ => return Err(AbsentError::Frame { step, gfn, source }),
            }
        }
        Ok(true)
    }
}

impl AsRawFd for Absent {
    /// Readable when there are faults.
    fn as_raw_fd(&self) -> RawFd {
        self.file().as_raw_fd()
    }
}

impl Drop for Absent {
    fn drop(&mut self) {
        if !self.frames().is_empty()
            && let Some(faults) = self.faults.take()
        {
            std::mem::forget(faults);
        }
    }
}

fn range(start: u64) -> Range {
    Range { start, len: PAGE_SIZE as u64 }
}

/// Runs of neighbouring members.
fn runs(frames: &PageSet) -> Vec<(Gfn, u64)> {
    let mut runs: Vec<(Gfn, u64)> = Vec::new();
    for gfn in frames.iter() {
        match runs.last_mut() {
            Some((first, pages)) if first.0 + *pages == gfn.0 => *pages += 1,
            _ => runs.push((gfn, 1)),
        }
    }
    runs
}

fn check(step: &'static str, result: i32) -> Result<(), AbsentError> {
    if result == 0 {
        Ok(())
    } else {
        Err(AbsentError::Unsupported { step, source: io::Error::last_os_error() })
    }
}

/// A userfaultfd that handles the faults of kernel code too: KVM touches guest memory itself.
fn open() -> Result<File, AbsentError> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd");
    let faults = match device {
        Ok(device) => {
            let flags = libc::c_ulong::from(FLAGS.bits());
            // SAFETY: the call takes flags and returns a new descriptor.
            let fd = unsafe { ioctl_with_val(&device, USERFAULTFD_IOC_NEW(), flags) };
            if fd < 0 {
                return Err(AbsentError::Denied(io::Error::last_os_error()));
            }
            // SAFETY: the kernel has just made this descriptor for us.
            unsafe { OwnedFd::from_raw_fd(fd) }
        }
        // A kernel before 6.1 has no such device; one that has it may let root alone open it.
        // SAFETY: what the descriptor can do to memory is done in this file, and said there.
        Err(_) => unsafe { userfaultfd(FLAGS) }.map_err(|error| AbsentError::Denied(error.into()))?,
    };
    let faults = File::from(faults);
    let mut api = Api { api: UFFD_API, features: UFFD_FEATURE_MISSING_SHMEM, ioctls: 0 };
    // SAFETY: the structure is what the call reads and writes.
    check("UFFDIO_API", unsafe { ioctl_with_mut_ref(&faults, UFFDIO_API(), &mut api) })?;
    Ok(faults)
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Instant;

    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;
    use crate::memory::layout;

    fn filled(bytes: u64) -> Arc<Memory> {
        let memory = Memory::new(&layout(bytes).unwrap()).unwrap();
        for gfn in 0..bytes / PAGE_SIZE as u64 / 2 {
            memory.write_page(Gfn(gfn), &[1; PAGE_SIZE]);
        }
        Arc::new(memory)
    }

    fn set(memory: &Memory, frames: impl IntoIterator<Item = u64>) -> PageSet {
        let mut set = PageSet::empty(memory.bound());
        frames.into_iter().for_each(|gfn| {
            set.insert(Gfn(gfn));
        });
        set
    }

    fn read(memory: &Memory, gfn: u64) -> u8 {
        let mut page = [0; PAGE_SIZE];
        memory.read_page(Gfn(gfn), &mut page);
        assert!(page.iter().all(|byte| *byte == page[0]));
        page[0]
    }

    fn wait(absent: &Absent) -> Vec<Gfn> {
        loop {
            let faults = absent.faults().unwrap();
            if !faults.is_empty() {
                return faults;
            }
            poll(&mut [PollFd::new(absent.file(), PollFlags::IN)], None).unwrap();
        }
    }

    #[test]
    fn whoever_touches_an_absent_frame_waits_for_its_page() {
        let memory = filled(2 << 20);
        let absent = Absent::new(Arc::clone(&memory), set(&memory, [3, 4, 9])).unwrap();
        assert_eq!(read(&memory, 5), 1, "the others are there");
        let reader = thread::spawn({
            let memory = Arc::clone(&memory);
            move || [3, 9, 4].map(|gfn| read(&memory, gfn))
        });
        assert!(absent.install(Gfn(4), &[4; PAGE_SIZE]).unwrap(), "before anybody touched it");
        assert!(!absent.install(Gfn(4), &[5; PAGE_SIZE]).unwrap(), "once");
        assert!(!absent.install(Gfn(5), &[5; PAGE_SIZE]).unwrap(), "only what is absent");
        for expected in [3, 9] {
            assert_eq!(wait(&absent), [Gfn(expected)]);
            assert!(absent.install(Gfn(expected), &[7; PAGE_SIZE]).unwrap());
        }
        assert_eq!(reader.join().unwrap(), [7, 7, 4]);
        assert_eq!(absent.left(), 0);
    }

    #[test]
    fn a_frame_that_was_never_written_reads_as_zeros() {
        let memory = filled(2 << 20);
        let absent = Arc::new(Absent::new(Arc::clone(&memory), set(&memory, [0])).unwrap());
        let reader = thread::spawn({
            let (memory, absent) = (Arc::clone(&memory), Arc::clone(&absent));
            move || {
                let byte = read(&memory, 511);
                absent.install(Gfn(0), &[2; PAGE_SIZE]).unwrap();
                (byte, read(&memory, 0))
            }
        });
        while absent.left() > 0 {
            assert_eq!(absent.faults().unwrap(), []);
        }
        assert_eq!(reader.join().unwrap(), (0, 2));
    }

    #[test]
    fn memory_above_four_gibibytes_is_watched_too() {
        let memory = Arc::new(Memory::new(&layout((3 << 30) + (2 << 20)).unwrap()).unwrap());
        let high = (1 << 20) + 7;
        let absent = Absent::new(Arc::clone(&memory), set(&memory, [high])).unwrap();
        let reader = thread::spawn({
            let memory = Arc::clone(&memory);
            move || read(&memory, high)
        });
        assert_eq!(wait(&absent), [Gfn(high)]);
        absent.install(Gfn(high), &[8; PAGE_SIZE]).unwrap();
        assert_eq!(reader.join().unwrap(), 8);
    }

    #[test]
    fn memory_that_is_given_up_keeps_nobody_waiting() {
        let memory = filled(2 << 20);
        let absent = Absent::new(Arc::clone(&memory), set(&memory, [3])).unwrap();
        let reader = thread::spawn({
            let memory = Arc::clone(&memory);
            move || read(&memory, 3)
        });
        assert_eq!(wait(&absent), [Gfn(3)]);
        absent.forget();
        drop(absent);
        assert_eq!(reader.join().unwrap(), 0);
    }

    #[test]
    #[ignore = "a measurement: how long it takes to make frames absent"]
    fn time_to_make_frames_absent() {
        for every in [1, 2, 8] {
            let memory = filled(512 << 20);
            let frames = set(&memory, (0..65_536).step_by(every));
            let count = frames.len();
            let start = Instant::now();
            let absent = Absent::new(Arc::clone(&memory), frames).unwrap();
            let made = start.elapsed();
            let start = Instant::now();
            for gfn in (0..65_536).step_by(every) {
                absent.install(Gfn(gfn), &[3; PAGE_SIZE]).unwrap();
            }
            println!(
                "{count} frames, one in {every}: made absent in {made:?}, installed in {:?}",
                start.elapsed()
            );
        }
    }
}
