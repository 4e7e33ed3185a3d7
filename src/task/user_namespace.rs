//! What the node's root does for a container whose own root is not it.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use nix::libc;
use proxmox_shim_init::protocol::{Device, Process};

use crate::ledger::RunDir;
use crate::lxc::rootfs::{RootfsMount, UserIds};
use crate::lxc::{devices, subordinate_ids};
use crate::oci::plan::{IdMappings, Plan, UserNamespace};
use crate::sys::limits;
use crate::sys::user_namespace::has_mappings;
use crate::task::error::{Error, Result};

/// Made before the CT exists.
pub struct Prepared {
    /// For the rootfs.
    pub ids: UserIds,
    /// Detached mounts of the [`nodes`], in their order.
    pub devices: Vec<OwnedFd>,
}

/// The devices that the container cannot make itself.
pub fn nodes(devices: &[Device]) -> impl Iterator<Item = &Device> {
    devices.iter().filter(|device| device.mode & libc::S_IFMT != libc::S_IFIFO)
}

/// Prepares the host for a container with the user namespace `user`: LXC reaches its files by their
/// paths, as root of that namespace. Blocks.
///
/// # Errors
/// LXC may not use the ids, or cannot reach a file with them, or a system call failed.
pub fn prepare(
    user: &UserNamespace,
    plan: &Plan,
    dir: &RunDir,
    bundle: &Path,
    init: &Path,
) -> Result<Prepared> {
    subordinate_ids::check(&user.mappings)?;
    // The plan has made sure that there is one.
    let group = user.mappings.host_gid(0).unwrap_or_default();
    dir.admit(group)?;
    admit(bundle, group)
        .map_err(|source| Error::Io { action: "let the CT's root pass the bundle", source })?;
    for path in [init, dir.path(), bundle] {
        reachable(path, &user.mappings)?;
    }
    let ids = UserIds::new(user.mappings.clone())
        .map_err(|source| Error::Io { action: "make a user namespace for id mappings", source })?;
    let nodes: Vec<Device> = nodes(&plan.devices).cloned().collect();
    Ok(Prepared { ids, devices: devices::open(&nodes, &user.mappings, dir.path())? })
}

/// Whether the root of a user namespace may pass all directories on a path, and execute what it names
/// or, if that is a directory, pass it too.
fn reachable(path: &Path, mappings: &IdMappings) -> Result<()> {
    let path = path.canonicalize().map_err(|source| Error::Io {
        action: "resolve a path that LXC needs in a user namespace",
        source,
    })?;
    let (uid, gid) = (mappings.host_uid(0), mappings.host_gid(0));
    for part in path.ancestors() {
        let meta = part.metadata().map_err(|source| Error::Io {
            action: "look at a path that LXC needs in a user namespace",
            source,
        })?;
        let execute = match () {
            () if uid == Some(meta.uid()) => 0o100,
            () if gid == Some(meta.gid()) => 0o010,
            () => 0o001,
        };
        if meta.mode() & execute == 0 {
            return Err(Error::Unreachable {
                path: path.clone(),
                part: part.to_owned(),
                uid: uid.unwrap_or_default(),
            });
        }
    }
    Ok(())
}

/// What containerd itself does with the bundle of a container that it knows to have a user namespace.
fn admit(bundle: &Path, group: u32) -> io::Result<()> {
    let mode = bundle.metadata()?.permissions().mode();
    if mode & 0o001 != 0 {
        return Ok(());
    }
    chown(bundle, None, Some(group))?;
    std::fs::set_permissions(bundle, PermissionsExt::from_mode(mode & 0o7777 | 0o010))
}

/// The mounts of a rootfs that is there already: it cannot be changed, but mapped upon itself.
pub fn rootfs(mounts: Vec<RootfsMount>, root: &Path, target: &Path) -> Result<Vec<RootfsMount>> {
    if !mounts.is_empty() {
        return Ok(mounts);
    }
    match std::fs::create_dir(target) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
            return Err(Error::Io { action: "make the bundle's directory rootfs", source });
        }
        _ => {}
    }
    Ok(vec![RootfsMount {
        fstype: "bind".to_owned(),
        source: root.display().to_string(),
        target: String::new(),
        options: vec!["rbind".to_owned()],
    }])
}

/// Compares the mappings with those of the CT's init. A namespace that was joined has its own,
/// whatever the specification says.
///
/// # Errors
/// They differ.
pub fn verify(user: &UserNamespace, pid: i32) -> Result<()> {
    let mappings = &user.mappings;
    let is_mapped = has_mappings(pid, &mappings.uid_map(), &mappings.gid_map());
    match is_mapped {
        Ok(true) => Ok(()),
        Ok(false) => Err(Error::Argument {
            field: "linux.uidMappings",
            reason: "and linux.gidMappings are not those of the user namespace that the \
                     container joins"
                .to_owned(),
        }),
        Err(source) => Err(Error::Io { action: "read the id mappings of the CT's init", source }),
    }
}

/// Sets what only the node's root may set of a process: init must not do it again, see [`rest`].
///
/// # Errors
/// A value that the node does not allow.
pub fn set_from_outside(process: &Process, pid: i32) -> Result<()> {
    if let Some(score) = process.oom_score_adj {
        std::fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string()).map_err(
            |source| Error::Io { action: "write process.oomScoreAdj of the CT's init", source },
        )?;
    }
    for limit in &process.rlimits {
        limits::set(pid, limit.resource, limit.soft, limit.hard).map_err(|source| Error::Io {
            action: "set process.rlimits of the CT's init",
            source,
        })?;
    }
    Ok(())
}

/// What [`set_from_outside`] leaves to init.
#[must_use]
pub fn rest(process: &Process) -> Process {
    Process { oom_score_adj: None, rlimits: Vec::new(), ..process.clone() }
}

/// The node's id of a user of the container.
///
/// # Errors
/// The user namespace does not map it.
pub fn host_uid(user: &UserNamespace, uid: u32) -> Result<u32> {
    user.mappings.host_uid(uid).ok_or_else(|| Error::Argument {
        field: "process.user.uid",
        reason: format!("is {uid}, which the container's user namespace does not map"),
    })
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};

    use super::*;
    use crate::oci::plan::IdMapping;

    #[test]
    fn the_part_of_a_path_that_cannot_be_passed_is_named() {
        let place = tempfile::tempdir().unwrap();
        let directory = place.path().canonicalize().unwrap().join("a");
        let file = directory.join("init");
        fs::create_dir(&directory).unwrap();
        fs::write(&file, "").unwrap();
        let mode = |path: &Path, mode| {
            fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        };
        mode(place.path(), 0o711);
        let (uid, gid) = (fs::metadata(&file).unwrap().uid(), fs::metadata(&file).unwrap().gid());
        let one = |host| vec![IdMapping { container: 0, host, size: 1 }];
        let mappings = |uid, gid| IdMappings { uids: one(uid), gids: one(gid) };
        let stranger = mappings(4_000_000, 4_000_000);
        let refused_at = |mappings: &IdMappings| match reachable(&file, mappings) {
            Ok(()) => None,
            Err(Error::Unreachable { part, .. }) => Some(part),
            Err(error) => panic!("{error}"),
        };
        mode(&directory, 0o711);
        mode(&file, 0o755);
        assert_eq!(refused_at(&stranger), None);
        mode(&file, 0o750);
        assert_eq!(refused_at(&stranger), Some(file.clone()));
        assert_eq!(refused_at(&mappings(4_000_000, gid)), None);
        mode(&file, 0o755);
        mode(&directory, 0o700);
        assert_eq!(refused_at(&stranger), Some(directory.clone()));
        assert_eq!(refused_at(&mappings(uid, 4_000_000)), None);
        // The owner's bits are for the owner alone.
        mode(&directory, 0o077);
        assert_eq!(refused_at(&mappings(uid, 4_000_000)), Some(directory.clone()));
    }
}
