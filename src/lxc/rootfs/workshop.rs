//! A mount namespace of one thread, for mounts that only other mounts need.
//!
//! A layer that is an image, say, has to be mounted somewhere before overlay can use it. Here that is
//! nowhere the host can see; overlay keeps what it has been given, and the rest goes with the thread.
//! So there is nothing to remove when the container ends, also if the shim crashes meanwhile.

use std::fs::DirBuilder;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::thread;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use super::{Error, open_directory};
use crate::sys::mount::{self as api, Filesystem};

/// A tmpfs with a directory for each mount.
#[derive(Debug)]
pub(super) struct Workshop {
    directory: PathBuf,
    directories: u32,
    attached: Vec<OwnedFd>,
}

impl Workshop {
    /// Runs `work` in a thread whose mounts nobody sees. `directory`, which must exist, is where they
    /// are made. What `work` returns must be detached.
    pub fn run<T: Send>(
        directory: &Path,
        work: impl FnOnce(&mut Self) -> Result<T, Error> + Send,
    ) -> Result<T, Error> {
        let run = || work(&mut Self::open(directory)?);
        thread::scope(|scope| match thread::Builder::new().spawn_scoped(scope, run) {
            Ok(thread) => thread.join().unwrap_or_else(|panic| resume_unwind(panic)),
            Err(source) => Err(Error::Workshop { source }),
        })
    }

    fn open(directory: &Path) -> Result<Self, Error> {
        let prepare = || -> io::Result<OwnedFd> {
            unshare(CloneFlags::CLONE_NEWNS)?;
            // The mounts of the host are shared with it until now.
            let all = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, all, None::<&str>)?;
            Filesystem::open("tmpfs")?.mount(0)
        };
        let tmpfs = prepare().map_err(|source| Error::Workshop { source })?;
        // In the new namespace's copy of the mount that it is on.
        let target = open_directory(directory)?;
        api::attach(tmpfs.as_fd(), target.as_fd()).map_err(|source| Error::Workshop { source })?;
        Ok(Self { directory: directory.to_owned(), directories: 0, attached: Vec::new() })
    }

    /// A new directory.
    pub fn directory(&mut self) -> Result<PathBuf, Error> {
        let path = self.directory.join(self.directories.to_string());
        self.directories += 1;
        DirBuilder::new().create(&path).map_err(|source| Error::Workshop { source })?;
        Ok(path)
    }

    /// Attaches a detached mount: its path for as long as this lives, short and without special
    /// characters.
    pub fn attach(&mut self, tree: OwnedFd) -> Result<String, Error> {
        let target = open_directory(&self.directory()?)?;
        api::attach(tree.as_fd(), target.as_fd()).map_err(|source| Error::Workshop { source })?;
        let point = format!("/proc/self/fd/{}", tree.as_raw_fd());
        self.attached.push(tree);
        Ok(point)
    }
}

/// The namespace goes with the thread, but only some time after whoever waits for the thread has been
/// told, and loop devices go with the namespace.
impl Drop for Workshop {
    fn drop(&mut self) {
        let _ = umount2(&self.directory, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    }
}
