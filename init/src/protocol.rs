//! What the shim and init say to each other.
//!
//! Transport: one `SOCK_SEQPACKET` connection per process. Each datagram is one postcard-encoded
//! [`Request`] (shim to init) or [`Reply`] (init to shim); descriptors travel beside it by
//! `SCM_RIGHTS`. What has no size limit (arguments, environment, mounts, seccomp programs) travels
//! in a memfd, because a datagram is bounded by the socket's buffer.
//!
//! ```text
//! PID 1   init  -> Hello
//!         shim  -> Container     fds: memfd(ContainerSetup) [time namespace]
//!                                     [stdin stdout stderr unless a terminal]
//!         shim  -> Descriptors*  fds: the detached mounts, in the order of ContainerSetup::mounts
//!         init  -> Mounted       the shim runs hooks on the host
//!         shim  -> Finish        fds: [the host's tree, if there are createContainer hooks]
//!         init  -> Ready         fds: [terminal master]
//!         shim  -> Go
//!        [init  -> Listener      fds: the seccomp filter's listener
//!         shim  -> Listening]
//!         EOF: the workload's execve succeeded      or  init -> Failed, then exit 127
//! exec    shim  -> Exec          fds: memfd(ExecSetup) pidfd(CT's init) [cgroup directory or
//!                                     v1 `tasks` files…] [stdin stdout stderr unless a terminal]
//!         init  -> Spawned       fds: pidfd of the new process
//!         init  -> Ready         fds: [terminal master]
//!        [init  -> Listener      fds: the seccomp filter's listener
//!         shim  -> Listening]
//!         EOF: execve succeeded                     or  init -> Failed, then exit 127
//! holder  shim  -> Holder        fds: memfd(HolderSetup) exit record
//!                                     [cgroup directory or v1 `tasks` files…] [namespaces to join…]
//!         init  -> Spawned       fds: pidfd of the holder
//!         init  -> Ready
//!         shim  -> Go
//!         EOF: it holds the namespaces until it is ended   or  init -> Failed, then exit 127
//! ```
//!
//! Both sides are built from this file, and [`VERSION`] is compared at once, so that a shim and an
//! init of different releases refuse each other instead of misunderstanding.

use serde::{Deserialize, Serialize};

/// Raised by any change to a type of this module.
pub const VERSION: u32 = 3;

/// Where the socket directory and the init binary are mounted in the CT until init removes them.
pub const CT_DIR: &str = "/dev/.proxmox-shim";
/// Where a procfs is mounted in a CT with a user namespace until init has made the container's own.
pub const CT_PROC_DIR: &str = "/dev/.proxmox-shim-proc";
/// The socket's name in [`CT_DIR`] and in the run directory's `ctl/`.
pub const SOCKET_NAME: &str = "init.sock";
/// The binary's name in [`CT_DIR`].
pub const BINARY_NAME: &str = "init";
/// Descriptors in one [`Request::Descriptors`]; the kernel's limit is 253 (`SCM_MAX_FD`).
pub const DESCRIPTORS_PER_MESSAGE: usize = 64;
/// The descriptor on which `init exec` finds its socket: stdin.
pub const EXEC_SOCKET_FD: i32 = 0;
/// The longest datagram either side sends.
pub const MAX_DATAGRAM: usize = 32 * 1024;
/// The status init exits with when it could not execute the workload.
pub const EXIT_NOT_EXECUTED: i32 = 127;

/// From the shim to init.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// Set this container up. `stdio` says whether three stdio descriptors come last.
    Container { stdio: bool },
    /// The next detached mounts.
    Descriptors,
    /// The host's part is done: run the createContainer hooks, protect what is to be protected.
    Finish,
    /// Execute the workload.
    Go,
    /// The agent has the listener: what the filter leaves to it will be answered.
    Listening,
    /// Start one more process in a running CT. `cgroup_files` descriptors follow the pidfd:
    /// see [`ExecCgroup`].
    Exec { cgroup: ExecCgroup, cgroup_files: usize, stdio: bool },
    /// Hold a pod's namespaces. The memfd is followed by the file for an [`ExitRecord`], then by
    /// `cgroup_files` descriptors, then by `namespaces`.
    Holder { cgroup: ExecCgroup, cgroup_files: usize, namespaces: usize },
}

/// How the descriptors of [`Request::Exec`] put the new process into the CT's cgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExecCgroup {
    /// The first is a cgroup2 directory for `CLONE_INTO_CGROUP`; the others are as in `Tasks`.
    Directory,
    /// Each is a cgroup v1 `tasks` file: write `0` to join it.
    Tasks,
}

/// From init to the shim.
#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    Hello {
        version: u32,
    },
    /// PID 1: the container's mounts and devices exist, and nothing of them is protected yet.
    Mounted,
    /// PID 1: everything but the workload is in place. Exec: the terminal exists.
    Ready {
        terminal: bool,
    },
    /// Exec: the process exists; `pid` is its id in the shim's pid namespace.
    Spawned {
        pid: i32,
    },
    /// The filter is in force; the agent's answers come through its listener.
    Listener,
    /// The one sentence that the user reads, in the words runc uses where runc has words for it.
    Failed {
        message: String,
    },
}

/// Everything init does before a container's workload runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ContainerSetup {
    pub version: u32,
    /// `sethostname(2)`; only with an own uts namespace.
    pub hostname: Option<String>,
    /// `setdomainname(2)`; only with an own uts namespace.
    pub domainname: Option<String>,
    pub time_namespace: TimeNamespace,
    /// Bring the loopback interface up: an own, new network namespace.
    pub loopback_up: bool,
    /// In the order of the specification.
    pub mounts: Vec<Mount>,
    /// `MS_*` propagation flags of `/`, applied after the mounts; private if `None`.
    pub root_propagation: Option<u64>,
    pub root_readonly: bool,
    /// Nodes to create below `/dev` and elsewhere, the defaults of the OCI runtime specification
    /// among them.
    pub devices: Vec<Device>,
    /// `(from, to)`: symbolic links to create at `to`, such as `/dev/fd`.
    pub links: Vec<(String, String)>,
    /// `(key, value)`, key in dotted or slashed form as `sysctl(8)` takes it.
    pub sysctls: Vec<(String, String)>,
    pub masked_paths: Vec<String>,
    pub readonly_paths: Vec<String>,
    /// OCI `createContainer` hooks, run after [`Reply::Mounted`] with the host's files.
    pub create_container: ContainerHooks,
    /// Where the container's root is on the host: absolute and without symbolic links.
    pub rootfs: String,
    /// OCI `startContainer` hooks, run in the container just before the workload.
    pub start_container: ContainerHooks,
    pub process: Process,
}

/// One process to start in a running CT.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExecSetup {
    pub version: u32,
    /// `CLONE_NEW*` flags for the one `setns(2)` on the pidfd.
    pub namespaces: u32,
    pub process: Process,
}

/// What holds a pod's namespaces: a process that executes nothing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HolderSetup {
    pub version: u32,
    /// `CLONE_NEW*` flags of the namespaces to make; those to join come as descriptors, a user
    /// namespace as the last of them.
    pub new_namespaces: u32,
    /// A user namespace is joined: it owns the new ones.
    pub user_namespace: bool,
    /// `sethostname(2)`; only with an own uts namespace.
    pub hostname: Option<String>,
    /// `setdomainname(2)`; only with an own uts namespace.
    pub domainname: Option<String>,
    /// Bring the loopback interface up: an own, new network namespace.
    pub loopback_up: bool,
    /// As in [`ContainerSetup::sysctls`].
    pub sysctls: Vec<(String, String)>,
    pub uid: u32,
    pub gid: u32,
    pub additional_gids: Vec<u32>,
    pub oom_score_adj: Option<i32>,
}

/// LXC cannot express the offsets of a new one, nor join one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum TimeNamespace {
    /// That of the host.
    #[default]
    Host,
    /// A new one; `offsets` are lines for `/proc/self/timens_offsets` (`time_namespaces(7)`).
    New { offsets: String },
    /// The one whose descriptor follows the memfd of [`Request::Container`].
    Join,
}

/// A mount, after which nothing of the host's paths is needed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Mount {
    /// Absolute, as in the specification; resolved inside the container's root.
    pub destination: String,
    pub source: MountSource,
    /// Copy what the directory under a tmpfs holds into it.
    pub copy_up: bool,
    /// `MS_*` propagation flags to set on the mount point afterwards.
    pub propagation: Vec<u64>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum MountSource {
    /// The next descriptor: a detached mount that already has its attributes. `directory` tells
    /// what to create when the destination is missing.
    Detached { directory: bool },
    /// `mount(2)` in the container's namespaces. `flags` are `MS_*`.
    Filesystem { source: String, fstype: String, flags: u64, data: String },
    /// The container's own cgroup hierarchies (type `cgroup`): cgroup2 where the host has it
    /// alone, else a tmpfs with one directory per v1 hierarchy, as runc does.
    Cgroup { flags: u64, hierarchies: Vec<CgroupHierarchy> },
}

/// A cgroup v1 hierarchy as the container sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CgroupHierarchy {
    /// The directory's name below `/sys/fs/cgroup`, such as `memory` or `cpu,cpuacct`.
    pub name: String,
    /// The options of the mount, such as `memory` or `none,name=systemd`.
    pub options: String,
    /// cgroup2 (the `unified` directory of a hybrid host).
    pub unified: bool,
}

/// A device node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    pub path: String,
    /// `S_IFCHR`, `S_IFBLK` or `S_IFIFO` together with the permission bits.
    pub mode: u32,
    pub major: u32,
    pub minor: u32,
    pub uid: u32,
    pub gid: u32,
}

/// Hooks that run in the container's namespaces.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerHooks {
    pub hooks: Vec<Hook>,
    /// The OCI state that they read on stdin: a JSON object with members, without the pid, which
    /// init adds.
    pub state_json: String,
}

/// An OCI hook.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hook {
    pub path: String,
    /// With `argv[0]`; `[path]` if empty.
    pub args: Vec<String>,
    pub env: Vec<String>,
    /// Seconds.
    pub timeout: Option<u64>,
}

/// An OCI process, with nothing left to look up on the host.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Process {
    /// Not empty.
    pub args: Vec<String>,
    /// `NAME=value`, exact; `HOME` is added from the container's `/etc/passwd` if it is missing.
    pub env: Vec<String>,
    pub cwd: String,
    pub uid: u32,
    pub gid: u32,
    pub additional_gids: Vec<u32>,
    pub umask: Option<u32>,
    /// `None`: an OCI process without `capabilities` has none at all.
    pub capabilities: Capabilities,
    pub rlimits: Vec<Rlimit>,
    pub no_new_privileges: bool,
    pub oom_score_adj: Option<i32>,
    /// Written to `/proc/self/attr/apparmor/exec`.
    pub apparmor_profile: Option<String>,
    pub seccomp: Option<Seccomp>,
    /// Confine it to the abstract Unix sockets of its own processes, by Landlock (kernel 6.12).
    pub scope_abstract_sockets: bool,
    /// `Some`: a new pseudo terminal of the container's devpts is the process's stdio.
    pub terminal: Option<WindowSize>,
    pub scheduler: Option<Scheduler>,
    /// For `ioprio_set(2)`.
    pub io_priority: Option<u16>,
    /// Not for PID 1.
    pub exec_cpu_affinity: ExecCpuAffinity,
    pub memory_policy: Option<MemoryPolicy>,
    /// For `personality(2)`.
    pub personality: Option<u32>,
}

/// For `set_mempolicy(2)`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPolicy {
    /// `MPOL_*`, with its flags.
    pub mode: u32,
    pub nodes: BitSet,
}

/// `struct sched_attr` of `sched_setattr(2)`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scheduler {
    pub policy: u32,
    pub flags: u64,
    pub nice: i32,
    pub priority: u32,
    /// This and the next two in nanoseconds.
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
}

/// Where an exec runs before and after it enters the container's cgroup; `None` changes nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecCpuAffinity {
    pub initial: Option<BitSet>,
    pub last: Option<BitSet>,
}

/// A set of processors or memory nodes: bit n of word m is the number 64 m + n.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BitSet(pub Vec<u64>);

/// Bit masks: bit n is capability n of `capabilities(7)`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    pub bounding: u64,
    pub effective: u64,
    pub inheritable: u64,
    pub permitted: u64,
    pub ambient: u64,
}

/// `prlimit(2)`: `resource` is `RLIMIT_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rlimit {
    pub resource: u32,
    pub soft: u64,
    pub hard: u64,
}

/// A compiled filter: `program` is an array of `struct sock_filter`, `flags` are
/// `SECCOMP_FILTER_FLAG_*` of `seccomp(2)`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seccomp {
    pub flags: u32,
    pub program: Vec<u8>,
}

/// In characters; zero leaves the kernel's default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    pub rows: u16,
    pub columns: u16,
}

/// What the stop hook writes to `exit.json` (one line of JSON) in the run directory.
///
/// `status` is 0..255 for an exit and 128+n for signal n, as containerd reports it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    pub version: u32,
    pub status: u32,
    /// Nanoseconds since the epoch.
    pub time: u64,
    /// OOM kills that the CT's memory cgroup counted.
    pub oom_kills: u64,
    /// Where `status` was read: `pidfd`, `monitor`, `log` or `reboot`; `unknown` with the status 255.
    /// A `holder` tells its own.
    pub source: String,
}
