//! What exists on the node because of one pod sandbox: the holder of its namespaces, its cgroup, and
//! its shared memory.

use std::fs::{DirBuilder, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::libc;
use proxmox_shim_init::protocol::{HolderSetup, VERSION};

use crate::ledger::{self, ProcessId, Record, RunDir};
use crate::lxc::cgroup::{self, Cgroup};
use crate::lxc::subordinate_ids;
use crate::oci;
use crate::oci::plan::{Namespace, Namespaces, Resources, UserNamespace};
use crate::sandbox::holder::{self, Holder, Waiting};
use crate::sandbox::names::{self, Names};
use crate::sandbox::namespace::{self, Joined, by_kind};
use crate::sys::mount;
use crate::sys::user_namespace::{has_mappings, with_mappings};

/// Bytes that containers may add to the files of the pod's names.
const ROOM: u64 = 1 << 20;

/// Why a pod has no sandbox.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A namespace can't be joined.
    #[error(transparent)]
    Namespace(#[from] namespace::Error),
    /// The holder failed.
    #[error(transparent)]
    Holder(#[from] holder::Error),
    /// The cgroup can't be made, or a limit can't be set.
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    /// LXC may not use the ids of the pod's user namespace.
    #[error(transparent)]
    SubordinateIds(#[from] subordinate_ids::Error),
    /// The user namespace can't be made, or looked at.
    #[error("make the pod's user namespace")]
    UserNamespace(#[source] io::Error),
    /// An existing user namespace, that of the network perhaps, has other ids.
    #[error(
        "linux.uidMappings and linux.gidMappings are not those of the user namespace that the pod \
         sandbox joins"
    )]
    Mappings,
    /// The run directory failed.
    #[error(transparent)]
    Ledger(#[from] ledger::Error),
    /// The shared memory can't be mounted.
    #[error("mount the pod's shared memory at {path}")]
    SharedMemory { path: PathBuf, source: io::Error },
    /// The files of the pod can't be written.
    #[error("make the pod's hostname, hosts and resolv.conf in {path}")]
    Names { path: PathBuf, source: io::Error },
    /// The holder could not tell its status.
    #[error("create {path}")]
    ExitRecord { path: PathBuf, source: io::Error },
    /// The runtime ends.
    #[error("the shim is shutting down")]
    ShuttingDown,
}

/// What the sandbox of a pod is to be.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Of these, the cgroup namespace is not made: nobody can join one.
    pub namespaces: Namespaces,
    /// It owns the new ones.
    pub user_namespace: Option<UserNamespace>,
    pub hostname: Option<String>,
    pub domainname: Option<String>,
    pub sysctls: Vec<(String, String)>,
    /// Relative to each hierarchy's root.
    pub cgroup: String,
    pub resources: Resources,
    pub uid: u32,
    pub gid: u32,
    pub additional_gids: Vec<u32>,
    pub oom_score_adj: Option<i32>,
    /// Bytes of a `/dev/shm` for the containers that share the ipc namespace, if the client does not
    /// bring one.
    pub shared_memory: Option<u64>,
    /// For the containers' `/etc`, if the client does not bring the files.
    pub names: Option<Names>,
}

impl Plan {
    /// For the specification of a pause container.
    ///
    /// What restricts the pause program (its rootfs, mounts, devices, capabilities, rlimits, seccomp
    /// filter and AppArmor profile) has no counterpart: nothing of the image is executed, and the
    /// holder has less than any of them leaves.
    #[must_use]
    pub fn of_pause_container(plan: &oci::plan::Plan, namespace: &str, id: &str) -> Self {
        Self {
            namespaces: plan.namespaces.clone(),
            user_namespace: plan.user_namespace.clone(),
            hostname: plan.hostname.clone(),
            domainname: plan.domainname.clone(),
            sysctls: plan.sysctls.clone(),
            cgroup: plan.cgroups_path.clone().unwrap_or_else(|| default_cgroup(namespace, id)),
            resources: plan.resources.clone(),
            uid: plan.process.uid,
            gid: plan.process.gid,
            additional_gids: plan.process.additional_gids.clone(),
            oom_score_adj: plan.process.oom_score_adj,
            shared_memory: None,
            names: None,
        }
    }

    fn new_namespaces(&self) -> u32 {
        by_kind(&self.namespaces)
            .into_iter()
            .filter(|(_, namespace)| **namespace == Namespace::New)
            .fold(0, |flags, (kind, _)| flags | kind.flag().unsigned_abs())
    }

    fn setup(&self) -> HolderSetup {
        HolderSetup {
            version: VERSION,
            new_namespaces: self.new_namespaces(),
            user_namespace: self.user_namespace.is_some(),
            hostname: self.hostname.clone(),
            domainname: self.domainname.clone(),
            loopback_up: self.namespaces.network == Namespace::New,
            sysctls: self.sysctls.clone(),
            uid: self.uid,
            gid: self.gid,
            additional_gids: self.additional_gids.clone(),
            oom_score_adj: self.oom_score_adj,
        }
    }
}

/// containerd's own default for a container without `cgroupsPath`.
#[must_use]
pub fn default_cgroup(namespace: &str, id: &str) -> String {
    format!("{namespace}/{id}")
}

/// A pod sandbox whose holder exists.
#[derive(Debug)]
pub struct Pod {
    pub dir: RunDir,
    pub record: Record,
    pub holder: Holder,
    pub cgroup: Arc<Cgroup>,
    /// Of the files in the run directory's [`RunDir::etc`].
    pub names: Vec<&'static str>,
}

/// Makes the sandbox in `dir`, which exists. `record` always tells what has been made, so that a
/// failure can be undone from it, as after a crash.
///
/// # Errors
/// [`Error`]; the caller undoes what is there.
pub async fn create(
    binary: &OwnedFd,
    dir: &RunDir,
    record: &mut Record,
    plan: &Plan,
) -> Result<(Pod, Waiting), Error> {
    record.holder = true;
    save(dir, record).await?;
    let (namespaces, user) = (plan.namespaces.clone(), plan.user_namespace.clone());
    // Before anything is made: this is what most likely is wrong.
    let joined = blocking(move || joined(&namespaces, user.as_ref())).await?;
    if let Some(bytes) = plan.shared_memory {
        let (path, user) = (dir.shm(), plan.user_namespace.clone());
        blocking(move || mount_shared_memory(path, bytes, user.as_ref())).await?;
    }
    let names = match plan.names.clone() {
        Some(names) => {
            let (path, user) = (dir.etc(), plan.user_namespace.clone());
            blocking(move || write_names(path, &names, user.as_ref())).await?
        }
        None => Vec::new(),
    };
    // What another pod of this name left behind must not count for this one. Only a cgroup that nobody
    // uses becomes ours.
    let path = plan.cgroup.clone();
    blocking(move || Ok(cgroup::remove_stale(&[&path])?)).await?;
    record.cgroups = vec![plan.cgroup.clone()];
    save(dir, record).await?;
    let (path, resources) = (plan.cgroup.clone(), plan.resources.clone());
    let (cgroup, entry) = blocking(move || {
        let cgroup = Cgroup::create(&path)?;
        cgroup.apply(&resources, true)?;
        let entry = cgroup.entry_files()?;
        Ok((cgroup, entry))
    })
    .await?;
    let path = dir.exit();
    let exit_record = blocking(move || exit_record(path)).await?;
    let setup = plan.setup();
    let starting = Holder::start(binary, &setup, exit_record, entry, joined);
    let (holder, waiting) = starting.await?;
    record.init = Some(ProcessId::of(holder.pid)?);
    save(dir, record).await?;
    if let Some(UserNamespace { mappings, .. }) = plan.user_namespace.clone() {
        let pid = holder.pid;
        blocking(move || {
            let is_mapped = has_mappings(pid, &mappings.uid_map(), &mappings.gid_map());
            if is_mapped.map_err(Error::UserNamespace)? { Ok(()) } else { Err(Error::Mappings) }
        })
        .await?;
    }
    let (dir, record, cgroup) = (dir.clone(), record.clone(), Arc::new(cgroup));
    let pod = Pod { dir, record, holder, cgroup, names };
    Ok((pod, waiting))
}

async fn save(dir: &RunDir, record: &Record) -> Result<(), Error> {
    let (dir, record) = (dir.clone(), record.clone());
    blocking(move || Ok(dir.save(&record)?)).await
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Error::ShuttingDown)?
}

/// The file for the holder's own word of its end.
fn exit_record(path: PathBuf) -> Result<OwnedFd, Error> {
    let mut new = OpenOptions::new();
    let file = new.write(true).create_new(true).mode(0o600).open(&path);
    file.map(OwnedFd::from).map_err(|source| Error::ExitRecord { path, source })
}

/// The namespaces that the holder enters before it makes others.
fn joined(namespaces: &Namespaces, user: Option<&UserNamespace>) -> Result<Vec<OwnedFd>, Error> {
    let joined = Joined::open(namespaces, user)?;
    let Some(UserNamespace { path, mappings }) = user else { return Ok(joined.into_fds()) };
    // The pod's containers will be LXC's.
    subordinate_ids::check(mappings)?;
    let user = match path {
        Some(_) => None,
        None => Some(match joined.owner_of_network()? {
            Some(owner) => owner,
            None => with_mappings(&mappings.uid_map(), &mappings.gid_map())
                .map_err(Error::UserNamespace)?,
        }),
    };
    let mut joined = joined.into_fds();
    joined.extend(user);
    Ok(joined)
}

/// As the kubelet's own: world-writable, nothing in it is executed.
fn mount_shared_memory(
    path: PathBuf,
    bytes: u64,
    user: Option<&UserNamespace>,
) -> Result<(), Error> {
    let mounted = mount_tmpfs("shm", &path, bytes, "1777", root(user));
    mounted.map_err(|source| Error::SharedMemory { path, source })
}

/// The containers may change the files, so they have a file system of their own: they could fill up the
/// node's.
fn write_names(
    path: PathBuf,
    names: &Names,
    user: Option<&UserNamespace>,
) -> Result<Vec<&'static str>, Error> {
    let write = || {
        let files = names.files()?;
        let bytes: usize = files.iter().map(|(_, content)| content.len()).sum();
        let bytes = u64::try_from(bytes).map_err(io::Error::other)?;
        mount_tmpfs("names", &path, bytes + ROOM, "0755", root(user))?;
        names::write(&path, &files, root(user))?;
        Ok(files.iter().map(|(name, _)| *name).collect())
    };
    write().map_err(|source| Error::Names { path: path.clone(), source })
}

/// The node's ids of the pod's root.
fn root(user: Option<&UserNamespace>) -> (u32, u32) {
    let mappings = user.map(|user| &user.mappings);
    let uid = mappings.and_then(|mappings| mappings.host_uid(0));
    let gid = mappings.and_then(|mappings| mappings.host_gid(0));
    (uid.unwrap_or(0), gid.unwrap_or(0))
}

fn mount_tmpfs(
    source: &str,
    path: &Path,
    bytes: u64,
    mode: &str,
    (uid, gid): (u32, u32),
) -> io::Result<()> {
    const ATTRIBUTES: u64 =
        libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    DirBuilder::new().mode(0o700).create(path)?;
    let fs = mount::Filesystem::open("tmpfs")?;
    fs.set("source", source.as_bytes())?;
    fs.set("mode", mode.as_bytes())?;
    for (option, value) in [("size", bytes), ("uid", uid.into()), ("gid", gid.into())] {
        fs.set(option, value.to_string().as_bytes())?;
    }
    let tree = fs.mount(ATTRIBUTES)?;
    mount::attach(tree.as_fd(), std::fs::File::open(path)?.as_fd())
}
