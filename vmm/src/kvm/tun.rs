//! TAP interfaces: the ioctls of /dev/net/tun (the kernel's Documentation/networking/tuntap.rst).
#![expect(unsafe_code, reason = "hands structures to ioctls of /dev/net/tun")]

use std::io;
use std::os::fd::AsFd;
use std::os::raw::{c_int, c_short, c_uint, c_ulong};

use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

fn done(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn request(name: &str) -> io::Result<libc::ifreq> {
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.bytes().any(|b| b == 0 || b == b'/') {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "no name of an interface: 1 to 15 bytes without `/`",
        ));
    }
    // SAFETY: the structure is plain numbers, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    Ok(request)
}

/// Connects a descriptor of /dev/net/tun to the TAP interface `name`, which is made if it is absent. Packets then come and go with a
/// virtio header of `header_bytes` before them.
pub(crate) fn attach(fd: &impl AsFd, name: &str, header_bytes: c_int) -> io::Result<()> {
    let mut request = request(name)?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = c_short::try_from(flags).map_err(io::Error::other)?;
    let fd = fd.as_fd();
    // SAFETY: the ioctl reads and writes one `ifreq`, which is borrowed for the call.
    done(unsafe { ioctl_with_mut_ref(&fd, c_ulong::from(libc::TUNSETIFF), &mut request) })?;
    // SAFETY: the ioctl reads one int, which is borrowed for the call.
    done(unsafe { ioctl_with_ref(&fd, c_ulong::from(libc::TUNSETVNETHDRSZ), &header_bytes) })
}

/// Says which packets the reader takes that are not finished: without checksum, or to be cut into segments (`TUN_F_*`).
pub(crate) fn set_offloads(fd: &impl AsFd, offloads: c_uint) -> io::Result<()> {
    // SAFETY: the ioctl takes its argument by value.
    done(unsafe { ioctl_with_val(&fd.as_fd(), c_ulong::from(libc::TUNSETOFFLOAD), c_ulong::from(offloads)) })
}

/// Brings an interface up, if it is not.
pub(crate) fn bring_up(socket: &impl AsFd, name: &str) -> io::Result<()> {
    let mut request = request(name)?;
    let socket = socket.as_fd();
    // SAFETY: the ioctl writes one `ifreq`, which is borrowed for the call.
    done(unsafe { ioctl_with_mut_ref(&socket, c_ulong::from(libc::SIOCGIFFLAGS), &mut request) })?;
    // SAFETY: the ioctl has filled in this member of the union; it is a plain number.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    let up = c_short::try_from(libc::IFF_UP).map_err(io::Error::other)?;
    if flags & up != 0 {
        return Ok(());
    }
    request.ifr_ifru.ifru_flags = flags | up;
    // SAFETY: the ioctl reads one `ifreq`, which is borrowed for the call.
    done(unsafe { ioctl_with_ref(&socket, c_ulong::from(libc::SIOCSIFFLAGS), &request) })
}
