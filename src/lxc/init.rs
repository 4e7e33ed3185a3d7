//! The shim's side of the conversation with init (`proxmox_shim_init::protocol`).

use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::sys::memfd::{MFdFlags, memfd_create};
use proxmox_shim_init::protocol::{
    BINARY_NAME, ContainerSetup, DESCRIPTORS_PER_MESSAGE, MAX_DATAGRAM, Reply, Request,
    SOCKET_NAME, VERSION,
};
use serde::Serialize;
use tokio::io::unix::AsyncFd;

use crate::sys::{self, socket};

/// What can go wrong between the shim and init.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket or its directory could not be made.
    #[error("prepare init's socket in {dir}")]
    Listen { dir: PathBuf, source: io::Error },
    /// The connection broke.
    #[error("talk to init: {action}")]
    Socket { action: &'static str, source: io::Error },
    /// Init ended without a word.
    #[error("init ended before {expected}")]
    Ended { expected: &'static str },
    /// Init could not do what it was asked; the sentence is for the user.
    #[error("{0}")]
    Refused(String),
    /// The binary that runs in the CT is of another release than this shim.
    #[error(
        "init speaks protocol version {theirs}, this shim {VERSION}: install the shim and \
         proxmox-shim-init from the same release"
    )]
    Version { theirs: u32 },
    /// The datagram makes no sense at this point.
    #[error("init sent {got} where {expected} was due")]
    Unexpected { got: String, expected: &'static str },
    /// The message could not be encoded.
    #[error("encode a message for init")]
    Encode(#[source] postcard::Error),
    /// The datagram could not be decoded.
    #[error("decode a message of init")]
    Decode(#[source] postcard::Error),
}

/// The socket that one container's PID 1 connects to.
///
/// Its directory is bind-mounted into the CT. Host users can't reach it, because the run
/// directories above it have mode 0700; the mapped root of a user namespace can, because the
/// directory itself has 0711 and the socket 0666.
#[derive(Debug)]
pub struct Listener {
    fd: AsyncFd<OwnedFd>,
    dir: PathBuf,
}

impl Listener {
    /// Makes the directory `ctl` (which may exist) and listens in it.
    ///
    /// # Errors
    /// [`Error::Listen`].
    pub fn bind(ctl: &Path) -> Result<Self, Error> {
        let prepare = || -> io::Result<OwnedFd> {
            match std::fs::DirBuilder::new().mode(0o711).create(ctl) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
            // The umask may have taken bits away.
            std::fs::set_permissions(ctl, Permissions::from_mode(0o711))?;
            // The mount point of the init binary.
            File::create(ctl.join(BINARY_NAME))?;
            let dir = File::open(ctl)?;
            let fd = socket::listen_in(dir.as_fd(), SOCKET_NAME)?;
            std::fs::set_permissions(ctl.join(SOCKET_NAME), Permissions::from_mode(0o666))?;
            Ok(fd)
        };
        prepare()
            .and_then(sys::watch)
            .map(|fd| Self { fd, dir: ctl.to_owned() })
            .map_err(|source| Error::Listen { dir: ctl.to_owned(), source })
    }

    /// Waits until PID 1 has connected and said hello. Nobody else can connect afterwards.
    ///
    /// # Errors
    /// [`Error::Socket`], [`Error::Version`], [`Error::Unexpected`], [`Error::Ended`].
    pub async fn accept(self) -> Result<Connected, Error> {
        let peer = self
            .fd
            .async_io(tokio::io::Interest::READABLE, |fd| socket::accept(fd.as_fd()))
            .await
            .map_err(|source| Error::Socket { action: "accept its connection", source })?;
        let _ = std::fs::remove_file(self.dir.join(SOCKET_NAME));
        let session = Session::new(peer.stream)?;
        match session.receive("its greeting").await? {
            (Reply::Hello { version: VERSION }, _) => {
                Ok(Connected { session, pid: peer.pid, pidfd: peer.pidfd })
            }
            (Reply::Hello { version }, _) => Err(Error::Version { theirs: version }),
            (other, _) => Err(unexpected(&other, "its greeting")),
        }
    }
}

/// PID 1 of the CT, waiting for its instructions.
#[derive(Debug)]
pub struct Connected {
    pub session: Session,
    /// In the host's pid namespace.
    pub pid: i32,
    pub pidfd: OwnedFd,
}

/// A connection to `init` in either mode.
#[derive(Debug)]
pub struct Session(AsyncFd<OwnedFd>);

impl Session {
    /// `stream` must be non-blocking.
    ///
    /// # Errors
    /// [`Error::Socket`] if the runtime can't watch it.
    pub fn new(stream: OwnedFd) -> Result<Self, Error> {
        sys::watch(stream)
            .map(Self)
            .map_err(|source| Error::Socket { action: "watch its socket", source })
    }

    /// Has the container's mounts and devices made, up to the moment for hooks.
    ///
    /// `time_namespace` is the one to join, if there is one; `mounts` are the detached mounts in the order of `setup.mounts`.
    ///
    /// # Errors
    /// [`Error::Refused`] with init's own sentence if a step failed in the CT.
    pub async fn set_up(
        &self,
        setup: &ContainerSetup,
        time_namespace: Option<OwnedFd>,
        stdio: Option<[OwnedFd; 3]>,
        mounts: Vec<OwnedFd>,
    ) -> Result<(), Error> {
        let body = memory_file(setup)?;
        let mut fds = vec![body];
        let request = Request::Container { stdio: stdio.is_some() };
        fds.extend(time_namespace);
        fds.extend(stdio.into_iter().flatten());
        self.send(&request, fds).await?;
        let mut mounts = mounts.into_iter().peekable();
        while mounts.peek().is_some() {
            let batch: Vec<OwnedFd> = mounts.by_ref().take(DESCRIPTORS_PER_MESSAGE).collect();
            self.send(&Request::Descriptors, batch).await?;
        }
        match self.receive("the container was set up").await? {
            (Reply::Mounted, _) => Ok(()),
            (other, _) => Err(unexpected(&other, "its mounts")),
        }
    }

    /// Has the container completed: returns the terminal's master if the process asked for one.
    ///
    /// `host` is the host's mount tree for createContainer hooks, and for them only.
    ///
    /// # Errors
    /// [`Error::Refused`] with init's own sentence if a step failed in the CT.
    pub async fn finish(&self, host: Option<OwnedFd>) -> Result<Option<OwnedFd>, Error> {
        self.send(&Request::Finish, host.into_iter().collect()).await?;
        self.ready().await
    }

    /// Lets PID 1 execute the workload; see [`Self::executed`].
    ///
    /// # Errors
    /// [`Error::Refused`] if it had already given up.
    pub async fn go(&self) -> Result<(), Error> {
        self.send(&Request::Go, Vec::new()).await
    }

    /// The listener of the process's seccomp filter, if the filter has one. The process waits until
    /// it is told that it may go on: see [`Self::listening`].
    ///
    /// # Errors
    /// [`Error::Ended`] if the filter forbids to send it.
    pub async fn listener(&self) -> Result<OwnedFd, Error> {
        const EXPECTED: &str =
            "it sent the seccomp listener; the profile must allow sendmsg and recvmsg";
        match self.receive(EXPECTED).await? {
            (Reply::Listener, mut fds) => fds.pop().ok_or(Error::Unexpected {
                got: "no descriptor".to_owned(),
                expected: "the seccomp listener",
            }),
            (other, _) => Err(unexpected(&other, "the seccomp listener")),
        }
    }

    /// The agent has the listener.
    ///
    /// # Errors
    /// [`Error::Socket`].
    pub async fn listening(&self) -> Result<(), Error> {
        self.send(&Request::Listening, Vec::new()).await
    }

    /// The end of the stream: `execve` closed the socket.
    ///
    /// # Errors
    /// [`Error::Refused`] with the reason why it could not be executed.
    pub async fn executed(self) -> Result<(), Error> {
        match self.receive("the execution").await {
            Err(Error::Ended { .. }) => Ok(()),
            Err(error) => Err(error),
            Ok((other, _)) => Err(unexpected(&other, "the execution")),
        }
    }

    /// `Ready`, with the terminal's master if there is one.
    ///
    /// # Errors
    /// [`Error::Refused`] with init's own sentence.
    pub async fn ready(&self) -> Result<Option<OwnedFd>, Error> {
        match self.receive("the container was set up").await? {
            (Reply::Ready { terminal }, mut fds) => match (terminal, fds.pop()) {
                (false, None) => Ok(None),
                (true, Some(master)) => Ok(Some(master)),
                _ => Err(Error::Unexpected {
                    got: "a wrong number of descriptors".to_owned(),
                    expected: "a terminal",
                }),
            },
            (other, _) => Err(unexpected(&other, "readiness")),
        }
    }

    /// Sends one message; the descriptors are closed here afterwards.
    ///
    /// # Errors
    /// [`Error::Refused`] if init had already given up and said why.
    pub async fn send(&self, request: &Request, fds: Vec<OwnedFd>) -> Result<(), Error> {
        let data = postcard::to_allocvec(request).map_err(Error::Encode)?;
        let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        let sent = self
            .0
            .async_io(tokio::io::Interest::WRITABLE, |socket| {
                socket::send(socket.as_fd(), &data, &borrowed)
            })
            .await;
        match sent {
            Ok(_) => Ok(()),
            // Its last words are still in the queue.
            Err(source) if source.kind() == io::ErrorKind::BrokenPipe => {
                match self.receive("it took its instructions").await {
                    Err(refused @ Error::Refused(_)) => Err(refused),
                    _ => Err(Error::Ended { expected: "it took its instructions" }),
                }
            }
            Err(source) => Err(Error::Socket { action: "send to it", source }),
        }
    }

    /// The next message. `Failed` becomes [`Error::Refused`].
    ///
    /// # Errors
    /// [`Error::Ended`] at the end of the stream, naming what was `expected`.
    pub async fn receive(&self, expected: &'static str) -> Result<(Reply, Vec<OwnedFd>), Error> {
        let mut buffer = vec![0; MAX_DATAGRAM];
        let received = self
            .0
            .async_io(tokio::io::Interest::READABLE, |socket| {
                match socket::receive(socket.as_fd(), &mut buffer) {
                    // It ended with something unread, which the kernel reports once, and before
                    // its last words, which are still in the queue.
                    Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                        socket::receive(socket.as_fd(), &mut buffer)
                    }
                    received => received,
                }
            })
            .await;
        let (n, fds) = match received {
            Ok((0, _)) => return Err(Error::Ended { expected }),
            Ok(received) => received,
            Err(source) => return Err(Error::Socket { action: "receive from it", source }),
        };
        match postcard::from_bytes(&buffer[..n]).map_err(Error::Decode)? {
            Reply::Failed { message } => Err(Error::Refused(message)),
            reply => Ok((reply, fds)),
        }
    }
}

fn unexpected(got: &Reply, expected: &'static str) -> Error {
    Error::Unexpected { got: format!("{got:?}"), expected }
}

/// An anonymous file that holds `value`: a datagram is bounded, this is not.
///
/// # Errors
/// [`Error::Encode`], [`Error::Socket`].
pub fn memory_file<T: Serialize>(value: &T) -> Result<OwnedFd, Error> {
    let bytes = postcard::to_allocvec(value).map_err(Error::Encode)?;
    let write = || -> io::Result<OwnedFd> {
        let fd = memfd_create(c"proxmox-shim", MFdFlags::MFD_CLOEXEC)?;
        let mut file = File::from(fd);
        file.write_all(&bytes)?;
        Ok(file.into())
    };
    write().map_err(|source| Error::Socket { action: "write its instructions", source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sessions() -> (Session, Session) {
        let (a, b) = socket::pair().unwrap();
        nix::fcntl::fcntl(&b, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))
            .unwrap();
        (Session::new(a).unwrap(), Session::new(b).unwrap())
    }

    async fn say(session: &Session, reply: &Reply) {
        let data = postcard::to_allocvec(reply).unwrap();
        socket::send(session.0.as_fd(), &data, &[]).unwrap();
    }

    #[tokio::test]
    async fn the_end_of_the_stream_means_executed_and_words_mean_failure() {
        let (shim, init) = sessions();
        drop(init);
        shim.executed().await.unwrap();

        let (shim, init) = sessions();
        say(&init, &Reply::Failed { message: "exec: \"x\": not found".into() }).await;
        drop(init);
        assert_eq!(shim.executed().await.unwrap_err().to_string(), "exec: \"x\": not found");
    }

    #[tokio::test]
    async fn last_words_are_heard_although_sending_fails() {
        let (shim, init) = sessions();
        say(&init, &Reply::Failed { message: "no such mount".into() }).await;
        drop(init);
        let error = shim.send(&Request::Go, Vec::new()).await.unwrap_err();
        assert_eq!(error.to_string(), "no such mount");
    }

    #[tokio::test]
    async fn last_words_are_heard_although_something_was_not_read() {
        let (shim, init) = sessions();
        shim.send(&Request::Descriptors, Vec::new()).await.unwrap();
        say(&init, &Reply::Failed { message: "no such mount".into() }).await;
        drop(init);
        assert_eq!(shim.ready().await.unwrap_err().to_string(), "no such mount");
        assert!(matches!(shim.ready().await.unwrap_err(), Error::Ended { .. }));
    }

    #[tokio::test]
    async fn an_init_that_dies_is_named() {
        let (shim, init) = sessions();
        drop(init);
        let error = shim.ready().await.unwrap_err();
        assert_eq!(error.to_string(), "init ended before the container was set up");
    }
}
