//! A mount namespace of one thread, for mounts that only other mounts need.
//!
//! A layer that is an image, say, has to be mounted somewhere before overlay can use it. Here that is
//! nowhere the host can see; overlay keeps what it has been given, and the rest goes with the thread.
//! So there is nothing to remove when the container ends, also if the shim crashes meanwhile.

use std::fs::{DirBuilder, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::thread;

use nix::libc;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use crate::sys::mount::{self as api, Filesystem};

/// The mount namespace, or something in it, could not be made.
#[derive(Debug, thiserror::Error)]
#[error("prepare a mount namespace that only this container's mounts are made in: {0}")]
pub struct Error(#[from] io::Error);

/// A tmpfs with a directory for each mount.
#[derive(Debug)]
pub struct Workshop {
    directory: PathBuf,
    names: u32,
    attached: Vec<OwnedFd>,
}

impl Workshop {
    /// Runs `work` in a thread whose mounts, and credentials, are nobody else's. `directory`, which
    /// must exist, is where the mounts are made. What `work` returns must be detached.
    ///
    /// # Errors
    /// [`Error`], or those of `work`.
    pub fn run<T: Send, E: From<Error> + Send>(
        directory: &Path,
        work: impl FnOnce(&mut Self) -> Result<T, E> + Send,
    ) -> Result<T, E> {
        let run = || work(&mut Self::open(directory).map_err(Error)?);
        thread::scope(|scope| match thread::Builder::new().spawn_scoped(scope, run) {
            Ok(thread) => thread.join().unwrap_or_else(|panic| resume_unwind(panic)),
            Err(error) => Err(Error(error).into()),
        })
    }

    fn open(directory: &Path) -> io::Result<Self> {
        unshare(CloneFlags::CLONE_NEWNS)?;
        // The mounts of the host are shared with it until now.
        let all = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, all, None::<&str>)?;
        let tmpfs = Filesystem::open("tmpfs")?.mount(0)?;
        api::attach(tmpfs.as_fd(), open_directory(directory)?.as_fd())?;
        Ok(Self { directory: directory.to_owned(), names: 0, attached: Vec::new() })
    }

    /// The path of a file that does not exist yet.
    pub fn free_name(&mut self) -> PathBuf {
        self.names += 1;
        self.directory.join(self.names.to_string())
    }

    /// A new directory.
    ///
    /// # Errors
    /// [`Error`].
    pub fn directory(&mut self) -> Result<PathBuf, Error> {
        let path = self.free_name();
        DirBuilder::new().create(&path)?;
        Ok(path)
    }

    /// Attaches a detached mount: its path for as long as this lives, short and without special
    /// characters.
    ///
    /// # Errors
    /// [`Error`].
    pub fn attach(&mut self, tree: OwnedFd) -> Result<String, Error> {
        let target = open_directory(&self.directory()?)?;
        api::attach(tree.as_fd(), target.as_fd())?;
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

fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW)
        .open(path)
        .map(OwnedFd::from)
}
