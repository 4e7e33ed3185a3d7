//! `SOCK_SEQPACKET` sockets that carry descriptors and identify their peer.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::libc;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType,
    UnixAddr, accept4, bind, getsockopt, listen, recvmsg, sendmsg, socket, socketpair, sockopt,
};

/// A non-blocking listener at `name` in the directory `dir`.
///
/// The address is given through `/proc/self/fd`, because a run directory's path may be longer than
/// the 108 bytes of `sun_path` (`unix(7)`).
///
/// # Errors
/// Those of `socket(2)`, `bind(2)` and `listen(2)`.
pub fn listen_in(dir: BorrowedFd<'_>, name: &str) -> io::Result<OwnedFd> {
    let fd = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )?;
    let path = format!("/proc/self/fd/{}/{name}", dir.as_raw_fd());
    bind(fd.as_raw_fd(), &UnixAddr::new(Path::new(&path))?)?;
    listen(&fd, Backlog::new(1)?)?;
    Ok(fd)
}

/// Who connected.
#[derive(Debug)]
pub struct Peer {
    /// Non-blocking.
    pub stream: OwnedFd,
    /// In this process's pid namespace.
    pub pid: i32,
    /// Names exactly the process that called `connect(2)`.
    pub pidfd: OwnedFd,
}

/// Accepts one connection.
///
/// # Errors
/// `EAGAIN` if there is none; `ESRCH` if the peer has already ended.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<Peer> {
    let fd = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
    // SAFETY: accept4 has just returned this descriptor to us alone.
    let stream = unsafe { OwnedFd::from_raw_fd(fd) };
    let pid = getsockopt(&stream, sockopt::PeerCredentials)?.pid();
    let pidfd = match peer_pidfd(stream.as_fd()) {
        Ok(fd) => fd,
        // Before Linux 6.5. The peer waits for our answer, so its pid is not reused meanwhile.
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => super::pidfd::open(pid)?,
        Err(error) => return Err(error),
    };
    Ok(Peer { stream, pid, pidfd })
}

fn peer_pidfd(stream: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut fd: RawFd = -1;
    let mut len = size_of::<RawFd>() as libc::socklen_t;
    // SAFETY: `fd` and `len` are valid for writes and describe each other.
    let r = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut len,
        )
    };
    if r != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: on success the kernel installed this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A connected pair: the first is non-blocking and stays here, the second is for a child.
///
/// # Errors
/// Those of `socketpair(2)`.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    nix::fcntl::fcntl(&ours, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))?;
    Ok((ours, theirs))
}

/// Sends one datagram with descriptors. Over a stream less than all of it may be sent: the answer
/// is how much.
///
/// # Errors
/// `EAGAIN` if the peer's queue is full; `EPIPE` if it is gone.
pub fn send(socket: BorrowedFd<'_>, data: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    Ok(sendmsg::<UnixAddr>(
        socket.as_raw_fd(),
        &[IoSlice::new(data)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?)
}

/// Receives one datagram into `buffer`: its length (0 is the end of the stream) and at most four
/// descriptors.
///
/// # Errors
/// `EAGAIN` if there is none; `EMSGSIZE` if the datagram or its descriptors did not fit.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = nix::cmsg_space!([RawFd; 4]);
    let mut iov = [IoSliceMut::new(buffer)];
    let message = recvmsg::<UnixAddr>(
        socket.as_raw_fd(),
        &mut iov,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut fds = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = control {
            // SAFETY: the kernel has just installed these descriptors for us alone.
            fds.extend(received.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    if message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    Ok((message.bytes, fds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_and_the_peer_arrive() {
        let dir = tempfile::tempdir().unwrap();
        let handle = std::fs::File::open(dir.path()).unwrap();
        let listener = listen_in(handle.as_fd(), "s").unwrap();
        let client =
            socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::empty(), None).unwrap();
        nix::sys::socket::connect(
            client.as_raw_fd(),
            &UnixAddr::new(&dir.path().join("s")).unwrap(),
        )
        .unwrap();
        let peer = accept(listener.as_fd()).unwrap();
        assert_eq!(peer.pid, std::process::id() as i32);

        let (read, write) = nix::unistd::pipe().unwrap();
        send(peer.stream.as_fd(), b"hello", &[read.as_fd()]).unwrap();
        let mut buffer = [0; 64];
        let (n, fds) = receive(client.as_fd(), &mut buffer).unwrap();
        assert_eq!((&buffer[..n], fds.len()), (&b"hello"[..], 1));
        nix::unistd::write(&write, b"x").unwrap();
        assert_eq!(nix::unistd::read(&fds[0], &mut buffer).unwrap(), 1);

        drop(peer);
        assert_eq!(receive(client.as_fd(), &mut buffer).unwrap().0, 0, "end of stream");
    }

    #[test]
    fn a_datagram_that_does_not_fit_is_an_error_not_a_fragment() {
        let (ours, theirs) = pair().unwrap();
        send(theirs.as_fd(), &[1; 32], &[]).unwrap();
        let error = receive(ours.as_fd(), &mut [0; 8]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE));
    }
}
