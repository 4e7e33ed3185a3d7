//! Images in files, mounted by way of a loop device.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use nix::errno::Errno;

use crate::sys::loop_device;

/// How often a device that somebody else takes first is given up for another one.
const ATTEMPTS: u32 = 100;

/// A loop device. The kernel frees it when this has been dropped and no file system uses it any more:
/// so it needs no clean-up, whoever crashes.
#[derive(Debug)]
pub(super) struct LoopDevice {
    path: PathBuf,
    /// Keeps the device until the file system does.
    _open: File,
}

impl LoopDevice {
    /// # Errors
    /// The image cannot be opened, or there are no loop devices.
    pub fn attach(image: &Path, read_only: bool) -> io::Result<Self> {
        let open = |path: &Path| OpenOptions::new().read(true).write(!read_only).open(path);
        let file = open(image)?;
        for attempt in 0..ATTEMPTS {
            let path = PathBuf::from(format!("/dev/loop{}", loop_device::free()?));
            let device = open(&path)?;
            let name = image.as_os_str().as_encoded_bytes();
            match loop_device::configure(device.as_fd(), file.as_fd(), read_only, name) {
                Ok(()) => return Ok(Self { path, _open: device }),
                Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32) => {
                    sleep(Duration::from_millis(attempt.into()));
                }
                Err(error) => return Err(error),
            }
        }
        Err(Errno::EBUSY.into())
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}
