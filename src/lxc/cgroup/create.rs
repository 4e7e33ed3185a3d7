//! Making the cgroups of what is not a CT. Those of CTs are made by liblxc.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::libc;
use proxmox_shim_init::protocol::ExecCgroup;

use super::{Cgroup, Error, Hierarchies, INNER, Kind, open, read, relative, write};

impl Cgroup {
    /// Makes the cgroups for a process that is none of a CT, in the layout of one: limits on
    /// `container`, such as `kubepods/pod1/abc`, and the process in a directory below it.
    ///
    /// # Errors
    /// [`Error::BadPath`], [`Error::Create`], or no hierarchy is mounted.
    pub fn create(container: &str) -> Result<Self, Error> {
        let container = relative(container)?;
        let hierarchies = Hierarchies::detect()?;
        let cgroup = Self::find(&hierarchies, |_| Some(format!("/{container}")))
            .ok_or(Error::NoHierarchy)?;
        for hierarchy in hierarchies.iter() {
            let Some(inner) = hierarchy.directory(&format!("/{container}/{INNER}")) else {
                continue;
            };
            let Ok(below) = inner.strip_prefix(&hierarchy.mountpoint) else { continue };
            let mut parent = hierarchy.mountpoint.clone();
            for component in below {
                let directory = parent.join(component);
                make(&parent, &directory, &hierarchy.kind)?;
                parent = directory;
            }
        }
        Ok(cgroup)
    }

    /// What `init holder` needs to put its process into the cgroups of [`Self::create`].
    ///
    /// # Errors
    /// They are gone.
    pub fn entry_files(&self) -> Result<(ExecCgroup, Vec<OwnedFd>), Error> {
        let mut directory = None;
        let mut tasks = Vec::new();
        for place in &self.places {
            match place.kind {
                Kind::V2 => {
                    directory = Some(open(&place.inner, libc::O_RDONLY | libc::O_DIRECTORY)?);
                }
                Kind::V1(_) => tasks.push(open(&place.inner.join("tasks"), libc::O_WRONLY)?),
            }
        }
        Ok(match directory {
            Some(directory) => {
                tasks.insert(0, directory);
                (ExecCgroup::Directory, tasks)
            }
            None => (ExecCgroup::Tasks, tasks),
        })
    }
}

/// Has what liblxc makes for a CT inherit its cpuset: on cgroup v1 it sees to that only at the top of
/// a path, and the kubelet, which makes the middle of it, does not.
///
/// # Errors
/// [`Error::BadPath`], [`Error::Write`].
pub fn pass_cpuset_on(container: &str) -> Result<(), Error> {
    let container = relative(container)?;
    for hierarchy in Hierarchies::detect()?.iter().filter(|hierarchy| hierarchy.has("cpuset")) {
        let Some(directory) = hierarchy.directory(&format!("/{container}")) else { continue };
        let mut above = directory.ancestors().skip(1);
        let nearest = above.find(|path| path.is_dir() || *path == hierarchy.mountpoint);
        if let Some(nearest) = nearest.filter(|path| *path != hierarchy.mountpoint) {
            write(&nearest.join("cgroup.clone_children"), "1")?;
        }
    }
    Ok(())
}

fn make(parent: &Path, directory: &Path, kind: &Kind) -> Result<(), Error> {
    if *kind == Kind::V2 {
        pass_controllers_on(parent);
    }
    match fs::create_dir(directory) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
            return Err(Error::Create { path: directory.to_owned(), source });
        }
        _ => {}
    }
    if matches!(kind, Kind::V1(controllers) if controllers.iter().any(|c| c == "cpuset")) {
        inherit_cpuset(parent, directory)?;
    }
    Ok(())
}

/// A cgroup has the controllers that its parent passes on. One that can't be had is missed only when a
/// limit needs it.
fn pass_controllers_on(directory: &Path) {
    let Ok(available) = read(&directory.join("cgroup.controllers")) else { return };
    let enabled = read(&directory.join("cgroup.subtree_control")).unwrap_or_default();
    for controller in available.split_whitespace() {
        if !enabled.split_whitespace().any(|name| name == controller) {
            let _ = write(&directory.join("cgroup.subtree_control"), &format!("+{controller}"));
        }
    }
}

/// A new cpuset of cgroup v1 is empty, and no process can enter it (`cpuset(7)`).
fn inherit_cpuset(parent: &Path, directory: &Path) -> Result<(), Error> {
    for name in ["cpuset.cpus", "cpuset.mems"] {
        let file = directory.join(name);
        if read(&file)?.trim().is_empty() {
            write(&file, read(&parent.join(name))?.trim())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_can_enter_what_was_made() {
        let name = format!("shim-unit-{}", std::process::id());
        let cgroup = Cgroup::create(&format!("{name}/pod")).unwrap();
        let mut child = std::process::Command::new("/bin/sleep").arg("60").spawn().unwrap();
        for place in &cgroup.places {
            write(&place.inner.join("cgroup.procs"), &child.id().to_string()).unwrap();
        }
        assert_eq!(cgroup.pids().unwrap(), [child.id()]);
        child.kill().unwrap();
        child.wait().unwrap();
        // Made a second time, nothing changes.
        assert_eq!(Cgroup::create(&format!("{name}/pod")).unwrap(), cgroup);
        super::super::remove_stale(&[&name]).unwrap();
        assert!(cgroup.places.iter().all(|place| !place.limit.exists()));
    }

    #[test]
    fn a_path_that_leaves_the_hierarchy_is_refused() {
        assert!(matches!(Cgroup::create("../x"), Err(Error::BadPath { .. })));
        assert!(matches!(Cgroup::create(""), Err(Error::BadPath { .. })));
    }
}
