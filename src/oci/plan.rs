//! The [`Plan`]: everything a bundle asks for, in this project's own words.
//!
//! Nothing of the OCI crate's types and nothing of LXC's syntax is visible here. A plan exists only
//! if every field that the bundle sets can be honoured; otherwise building it failed with an error
//! that names the field.

use std::collections::BTreeMap;
use std::path::PathBuf;

use proxmox_shim_init::protocol::{Device, Hook, Mount, Process};

/// What one container is to become.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The workload.
    pub process: Process,
    /// The host's path of the root filesystem: `root.path`, absolute.
    pub root_path: PathBuf,
    /// As in the specification; `None` leaves the namespace's name.
    pub hostname: Option<String>,
    pub domainname: Option<String>,
    pub namespaces: Namespaces,
    /// Lines for `/proc/self/timens_offsets` of a new time namespace (time_namespaces(7)).
    pub time_offsets: String,
    /// `None`: the node's, so root of the container is root of the node.
    pub user_namespace: Option<UserNamespace>,
    /// In the order of the specification.
    pub mounts: Vec<PlannedMount>,
    /// `MS_*` propagation flags for `/`.
    pub root_propagation: Option<u64>,
    pub root_readonly: bool,
    pub devices: Vec<Device>,
    /// `(from, to)`.
    pub links: Vec<(String, String)>,
    pub sysctls: Vec<(String, String)>,
    pub masked_paths: Vec<String>,
    pub readonly_paths: Vec<String>,
    pub resources: Resources,
    /// Evaluated in order, the last match wins, as in the specification. The runtime's default
    /// devices come last.
    pub device_rules: Vec<DeviceRule>,
    /// How many of them are the specification's own: the first ones.
    pub specified_device_rules: usize,
    /// OCI `cgroupsPath` in its cgroupfs form, without the leading slash.
    pub cgroups_path: Option<String>,
    /// Who answers for system calls that the process's filter does not decide.
    pub seccomp_agent: Option<SeccompAgent>,
    pub hooks: Hooks,
    /// Verbatim: hooks read them in the state JSON.
    pub annotations: BTreeMap<String, String>,
    /// The specification's version, for the state JSON.
    pub oci_version: String,
    /// What a person calls the container, if its id is not that.
    pub name: Option<String>,
    /// What a person should see of the image in the CT's notes, from containerd's annotations.
    pub image: Option<String>,
    /// Of a container of a Kubernetes pod, what a person should see of that.
    pub pod: Option<Pod>,
    /// Things that were understood but need a word in the log, such as an unknown capability.
    pub warnings: Vec<String>,
}

impl Plan {
    /// Whether a process of the container may call `reboot(2)`, of which only the parent of PID 1
    /// learns.
    #[must_use]
    pub fn may_reboot(&self) -> bool {
        const CAP_SYS_BOOT: u32 = 22;
        self.process.capabilities.bounding & (1 << CAP_SYS_BOOT) != 0
    }
}

/// What Kubernetes calls a container. Only shown to people.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pod {
    pub name: String,
    pub namespace: String,
    pub uid: String,
    pub container: String,
}

/// Where each namespace of the container comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespaces {
    pub pid: Namespace,
    pub network: Namespace,
    pub ipc: Namespace,
    pub uts: Namespace,
    pub cgroup: Namespace,
    pub time: Namespace,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Namespace {
    /// A new one.
    New,
    /// The one of the host (the specification does not list the type).
    Host,
    /// An existing one.
    Path(PathBuf),
}

/// A user namespace of the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserNamespace {
    /// An existing one; `None` for a new one.
    pub path: Option<PathBuf>,
    /// They map the ids 0.
    pub mappings: IdMappings,
}

/// A mount of the specification, before the host's side of it is opened.
#[derive(Debug, Clone, PartialEq)]
pub enum PlannedMount {
    /// A bind mount: the shim opens `source` as a detached mount and applies `attributes`;
    /// init attaches it.
    Bind {
        source: PathBuf,
        destination: String,
        /// `rbind`.
        recursive: bool,
        attributes: MountAttributes,
        /// `MS_*` propagation, to be set one after the other; at least one entry: a clone left in
        /// the host's peer group would carry the container's mounts to the host. Slave first, as
        /// with runc, unless `rootfsPropagation` says otherwise; then the mount's own options.
        propagation: Vec<u64>,
        /// The mount is id-mapped: files that belong to a `container` id of the mappings appear as
        /// those of the `host` id.
        ids: Option<MountIds>,
    },
    /// A file system that shows a namespace of the container, with `MOUNT_ATTR_*`, opened by the shim:
    /// root of a user namespace may not mount it if that namespace belongs to somebody else.
    OfNamespace {
        filesystem: NamespaceFilesystem,
        destination: String,
        attributes: u64,
        propagation: Vec<u64>,
    },
    /// Anything init mounts by itself.
    Init(Mount),
}

impl PlannedMount {
    /// Where it is in the container.
    #[must_use]
    pub fn destination(&self) -> &str {
        match self {
            Self::Bind { destination, .. } | Self::OfNamespace { destination, .. } => destination,
            Self::Init(mount) => &mount.destination,
        }
    }
}

/// See [`PlannedMount::OfNamespace`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NamespaceFilesystem {
    /// Of the network namespace.
    Sysfs,
    /// Of the ipc namespace.
    Mqueue,
}

/// Attributes for `mount_setattr(2)`, as `MOUNT_ATTR_*`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MountAttributes {
    pub set: u64,
    pub clear: u64,
    /// For the recursive forms (`rro`, `rnosuid`, …).
    pub recursive_set: u64,
    pub recursive_clear: u64,
}

/// Receives the listener of each process's seccomp filter (OCI `listenerPath`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeccompAgent {
    /// Its socket on the host.
    pub socket: PathBuf,
    /// Told to it verbatim.
    pub metadata: String,
}

/// How a bind mount is id-mapped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountIds {
    pub mappings: IdMappings,
    /// `ridmap`: also the mounts below it.
    pub recursive: bool,
}

/// Which ids of a user namespace are which outside (user_namespaces(7)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMappings {
    pub uids: Vec<IdMapping>,
    pub gids: Vec<IdMapping>,
}

/// `size` ids from `container` on are those from `host` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdMapping {
    pub container: u32,
    pub host: u32,
    pub size: u32,
}

/// Limits. `None` leaves the kernel's default; OCI's `-1` (no limit) is [`Limit::Max`].
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Resources {
    /// Bytes.
    pub memory_limit: Option<Limit>,
    /// Bytes; memory and swap together, as OCI counts.
    pub memory_swap: Option<Limit>,
    /// Bytes.
    pub memory_reservation: Option<Limit>,
    /// 0..100; cgroup v1 only.
    pub memory_swappiness: Option<u64>,
    /// Refuse a limit below what is in use, instead of having the kernel reclaim or kill.
    pub memory_check_usage: bool,
    /// cgroup v1's unit, 2..262144.
    pub cpu_shares: Option<u64>,
    /// Microseconds per period.
    pub cpu_quota: Option<Limit>,
    /// Microseconds.
    pub cpu_period: Option<u64>,
    /// Microseconds.
    pub cpu_burst: Option<u64>,
    pub cpu_idle: Option<i64>,
    /// List format of `cpuset(7)`.
    pub cpuset_cpus: Option<String>,
    pub cpuset_mems: Option<String>,
    pub pids_limit: Option<Limit>,
    /// 10..1000.
    pub blkio_weight: Option<u16>,
    /// `(major, minor, bytes or operations per second)`.
    pub blkio_read_bps: Vec<(u64, u64, u64)>,
    pub blkio_write_bps: Vec<(u64, u64, u64)>,
    pub blkio_read_iops: Vec<(u64, u64, u64)>,
    pub blkio_write_iops: Vec<(u64, u64, u64)>,
    /// `(page size as in the kernel's file names, bytes)`.
    pub hugepages: Vec<(String, u64)>,
    /// cgroup2 file and value, verbatim.
    pub unified: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    Max,
    Value(u64),
}

/// One line of the device list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceRule {
    pub allow: bool,
    pub kind: DeviceKind,
    /// `None`: all.
    pub major: Option<u32>,
    pub minor: Option<u32>,
    /// Of `rwm`.
    pub access: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    All,
    Char,
    Block,
}

/// The OCI hooks, by the moment they run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hooks {
    /// Run by the shim on the host once the namespaces exist, before `create_runtime`.
    pub prestart: Vec<Hook>,
    pub create_runtime: Vec<Hook>,
    /// Run by init with the host's files, in the container's namespaces.
    pub create_container: Vec<Hook>,
    /// Run by init in the container.
    pub start_container: Vec<Hook>,
    /// Run by the shim after the workload was started.
    pub poststart: Vec<Hook>,
    /// Run by the shim after the container was deleted.
    pub poststop: Vec<Hook>,
}
