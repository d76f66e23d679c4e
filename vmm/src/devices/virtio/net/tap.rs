//! The host's end of a network device: a TAP interface, or in tests a socket that stands for one.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;

use rustix::fs::{Mode, OFlags};

use super::HEADER_BYTES;
use crate::devices::DeviceError;
use crate::kvm::tun;

const TUN: &str = "/dev/net/tun";

/// Where packets come from and go to, each with a virtio header before it.
#[derive(Debug)]
pub(crate) struct Tap {
    fd: OwnedFd,
    name: String,
    /// Whether the kernel can be told what the reader takes.
    has_offloads: bool,
}

impl Tap {
    /// Opens the TAP interface `name`, or makes it, and brings it up.
    /// # Errors
    /// [`DeviceError::Tap`], with what to do about it.
    pub(crate) fn open(name: &str) -> Result<Self, DeviceError> {
        let failed = |advice: &'static str| {
            let tap = name.to_owned();
            move |source: io::Error| DeviceError::Tap { tap, advice, source }
        };
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = rustix::fs::open(TUN, flags, Mode::empty()).map_err(|error| {
            failed(match error {
                rustix::io::Errno::NOENT => "/dev/net/tun does not exist: load its module (modprobe tun)",
                _ => "/dev/net/tun cannot be opened: it should have mode 0666",
            })(error.into())
        })?;
        let header = i32::try_from(HEADER_BYTES).expect("twelve");
        tun::attach(&fd, name, header).map_err(|error| failed(attach_advice(&error))(error))?;
        let this = Self { fd, name: name.to_owned(), has_offloads: true };
        this.bring_up();
        Ok(this)
    }

    /// A socket in its place: each datagram is a packet with its header.
    pub(crate) fn stand_in(socket: UnixDatagram) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self { fd: socket.into(), name: "socket".to_owned(), has_offloads: false })
    }

    fn bring_up(&self) {
        let up = UnixDatagram::unbound().and_then(|socket| tun::bring_up(&socket, &self.name));
        if let Err(error) = up {
            tracing::warn!(
                tap = self.name,
                %error,
                "the TAP interface is not up and cannot be brought up: no packet passes before `ip link set NAME up`"
            );
        }
    }

    /// The interface's name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Says which unfinished packets the guest takes (`TUN_F_*`).
    pub(crate) fn set_offloads(&self, offloads: u32) -> io::Result<()> {
        if self.has_offloads { tun::set_offloads(&self.fd, offloads) } else { Ok(()) }
    }

    /// Takes one packet; its length.
    pub(crate) fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::retry_on_intr(|| rustix::io::read(&self.fd, &mut *into))?)
    }

    /// Sends one packet, with its header.
    pub(crate) fn send(&self, packet: &[u8]) -> io::Result<()> {
        rustix::io::retry_on_intr(|| rustix::io::write(&self.fd, packet))?;
        Ok(())
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn attach_advice(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "it does not exist or is another user's: make it with `sudo ip tuntap add dev NAME mode tap user \"$USER\" vnet_hdr`, then `sudo ip \
             link set NAME up`"
        }
        Some(libc::EBUSY) => "another process has it, maybe another VM: give each VM a TAP of its own",
        Some(libc::EINVAL) => {
            "there is an interface of this name that is no TAP, or one with several queues: `ip -d link show NAME` says what it is"
        }
        _ => "the kernel did not give it",
    }
}
