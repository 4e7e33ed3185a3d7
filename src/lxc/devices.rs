//! Device nodes for a container with a user namespace, which may not make any.
//!
//! They are made on a tmpfs that nobody sees, with the owner and the mode that the specification asks
//! for, and each becomes a bind mount of its own.

use std::fs::Permissions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use proxmox_shim_init::protocol::Device;

use crate::lxc::workshop::{self, Workshop};
use crate::oci::plan::IdMappings;
use crate::sys::mount::clone_tree;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A node could not be made.
    #[error("make device {path} for a user namespace: {source}")]
    Make { path: String, source: io::Error },
    /// There is no place for them.
    #[error(transparent)]
    Workshop(#[from] workshop::Error),
}

/// A detached mount of each device, in their order, with the owners that `mappings` give them.
/// `directory` must exist; nothing is left in it.
///
/// # Errors
/// [`Error`].
pub fn open(
    devices: &[Device],
    mappings: &IdMappings,
    directory: &Path,
) -> Result<Vec<OwnedFd>, Error> {
    if devices.is_empty() {
        return Ok(Vec::new());
    }
    Workshop::run(directory, |workshop| {
        let open = |device: &Device| {
            make(device, mappings, workshop.free_name())
                .map_err(|source| Error::Make { path: device.path.clone(), source })
        };
        devices.iter().map(open).collect()
    })
}

fn make(device: &Device, mappings: &IdMappings, node: PathBuf) -> io::Result<OwnedFd> {
    let (kind, mode) = (SFlag::from_bits_truncate(device.mode), device.mode & 0o7777);
    let number = makedev(device.major.into(), device.minor.into());
    mknod(&node, kind & SFlag::S_IFMT, Mode::empty(), number)?;
    // An id without a mapping has been refused with the specification.
    let owners = (mappings.host_uid(device.uid), mappings.host_gid(device.gid));
    let (Some(uid), Some(gid)) = owners else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    chown(&node, Some(uid), Some(gid))?;
    // After the owner, whose change takes bits away, and regardless of the umask.
    std::fs::set_permissions(&node, Permissions::from_mode(mode))?;
    clone_tree(&node, false)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::MetadataExt;

    use nix::libc;

    use super::*;
    use crate::oci::plan::IdMapping;

    #[test]
    fn nodes_have_mapped_owners_and_work() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let device = |path: &str, minor, mode, uid| Device {
            path: path.to_owned(),
            mode: libc::S_IFCHR | mode,
            major: 1,
            minor,
            uid,
            gid: 5,
        };
        let mapping = IdMapping { container: 0, host: 100_000, size: 10 };
        let mappings = IdMappings { uids: vec![mapping], gids: vec![mapping] };
        let directory = tempfile::tempdir().unwrap();
        let devices = [device("/dev/null", 3, 0o666, 0), device("/dev/full", 7, 0o620, 7)];
        let opened = open(&devices, &mappings, directory.path()).unwrap();
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        for (fd, uid, minor, mode) in
            [(&opened[0], 100_000, 3, 0o666), (&opened[1], 100_007, 7, 0o620)]
        {
            let node = File::from(fd.try_clone().unwrap()).metadata().unwrap();
            assert_eq!((node.uid(), node.gid()), (uid, 100_005));
            assert_eq!(node.mode(), libc::S_IFCHR | mode);
            assert_eq!(node.rdev(), makedev(1, minor));
        }
        let null = format!("/proc/self/fd/{}", opened[0].as_raw_fd());
        File::options().write(true).open(null).unwrap().write_all(b"x").unwrap();
        let strange = [device("/dev/x", 3, 0o666, 10)];
        let error = open(&strange, &mappings, directory.path()).unwrap_err();
        assert!(error.to_string().contains("/dev/x"), "{error}");
    }
}
