//! The process's standard streams: descriptors from the shim, or a new pseudo terminal.

use std::os::fd::{AsFd, OwnedFd};

use crate::error::{Attempt, Error, Result};
use crate::protocol::{Process, Reply};
use crate::rootfs::{Kind, Root};
use crate::socket::Channel;
use crate::sys;

/// Makes 0, 1 and 2 what the process shall have, starts its session, and builds the
/// [`Reply::Ready`] with the descriptor that goes with it.
pub struct Streams {
    master: Option<OwnedFd>,
}

impl Streams {
    /// `stdio` are the shim's three descriptors; none if the process has a terminal.
    pub fn open(root: &Root, process: &Process, stdio: Vec<OwnedFd>) -> Result<Self> {
        sys::new_session().attempt(|| "start a session")?;
        let Some(size) = process.terminal else {
            let [stdin, stdout, stderr] = <[OwnedFd; 3]>::try_from(stdio)
                .map_err(|_| Error::Protocol("expected three stdio descriptors"))?;
            for (number, fd) in (0..).zip([stdin, stdout, stderr]) {
                give(&fd, process.uid);
                sys::become_stdio(fd.as_fd(), number).attempt(|| "set up stdio")?;
            }
            return Ok(Self { master: None });
        };
        if !stdio.is_empty() {
            return Err(Error::Protocol("stdio descriptors beside a terminal"));
        }
        // The terminal comes from the container's own devpts: a terminal of the host would let
        // the container push input into the host's session.
        let master = root
            .open_at("/dev/pts/ptmx", libc::O_RDWR | libc::O_NOCTTY)
            .attempt(|| "open \"/dev/pts/ptmx\" of the container for its terminal")?;
        if sys::file_system(master.as_fd()).attempt(|| "inspect \"/dev/pts\"")? != sys::DEVPTS_MAGIC
        {
            return Err(Error::Refused {
                object: "\"/dev/pts\"".to_owned(),
                reason: "is not a devpts file system, which a terminal needs",
            });
        }
        let peer = sys::open_peer(master.as_fd()).attempt(|| "open the terminal")?;
        if (size.rows, size.columns) != (0, 0) {
            sys::set_window_size(master.as_fd(), size.rows, size.columns)
                .attempt(|| "set the terminal's size")?;
        }
        // The group stays devpts's: 5, tty.
        sys::fchown_user(peer.as_fd(), process.uid).attempt(|| "give the terminal to the user")?;
        sys::set_controlling_terminal(peer.as_fd()).attempt(|| "set the controlling terminal")?;
        for number in 0..3 {
            sys::become_stdio(peer.as_fd(), number).attempt(|| "set up stdio")?;
        }
        Ok(Self { master: Some(master) })
    }

    /// Binds the terminal on `/dev/console`, as runc does.
    pub fn bind_console(&self, root: &Root) -> Result<()> {
        if self.master.is_none() {
            return Ok(());
        }
        // An image or a volume could have it cover a file of procfs that the runtime relies on.
        if root.is_link("/dev/console").attempt(|| "inspect \"/dev/console\"")? {
            return Err(Error::Refused {
                object: "\"/dev/console\"".to_owned(),
                reason: "is a symbolic link",
            });
        }
        let target =
            root.target("/dev/console", Kind::File).attempt(|| "create \"/dev/console\"")?;
        sys::clone_mount(sys::stdio(0), false)
            .and_then(|mount| sys::attach_mount(mount.as_fd(), target.fd.as_fd()))
            .attempt(|| "bind the terminal on \"/dev/console\"")
    }

    /// Tells the shim that everything is in place and hands it the terminal.
    pub fn report_ready(self, channel: &Channel) -> Result<()> {
        let ready = Reply::Ready { terminal: self.master.is_some() };
        match &self.master {
            Some(master) => channel.send(&ready, &[master.as_fd()]),
            None => channel.send(&ready, &[]),
        }
    }
}

/// Makes a pipe or socket the user's, so that programs can open `/dev/stdout`. Best effort, as in
/// runc: it may lie on a file system that does not allow it. Files and devices of the host stay
/// what they are.
fn give(fd: &OwnedFd, uid: u32) {
    if let Ok(status) = sys::fstat(fd.as_fd()) {
        let kind = status.st_mode & libc::S_IFMT;
        if status.st_uid != uid && matches!(kind, libc::S_IFIFO | libc::S_IFSOCK) {
            let _ = sys::fchown_user(fd.as_fd(), uid);
        }
    }
}
