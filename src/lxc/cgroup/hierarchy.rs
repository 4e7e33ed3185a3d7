//! Where the host has its cgroup hierarchies: `/proc/self/mountinfo` and `/proc/<pid>/cgroup`.

use std::path::PathBuf;

use proxmox_shim_init::protocol::CgroupHierarchy;

use super::{Error, read};

/// The controllers of cgroup v1. A mount's options also hold things that are none.
const V1_CONTROLLERS: [&str; 14] = [
    "cpuset",
    "cpu",
    "cpuacct",
    "blkio",
    "memory",
    "devices",
    "freezer",
    "net_cls",
    "perf_event",
    "net_prio",
    "hugetlb",
    "pids",
    "rdma",
    "misc",
];

/// How the host uses cgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// cgroup v1 only.
    V1,
    /// Controllers on cgroup v1, cgroup2 mounted beside it.
    Hybrid,
    /// cgroup2 only, as a Proxmox VE node has it.
    V2,
}

impl Mode {
    /// Of this host.
    ///
    /// # Errors
    /// No cgroup hierarchy is mounted.
    pub fn detect() -> Result<Self, Error> {
        Ok(Hierarchies::detect()?.mode())
    }
}

/// One mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    /// Its version and controllers.
    pub kind: Kind,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// The cgroup that the mount shows at its top; `/` unless the host is itself a container.
    root: String,
}

/// The identity of a hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// The controllers, and `name=…` for a named hierarchy.
    V1(Vec<String>),
    /// The one cgroup2 hierarchy.
    V2,
}

impl Hierarchy {
    /// Whether it is a cgroup v1 hierarchy of this controller.
    #[must_use]
    pub fn has(&self, controller: &str) -> bool {
        matches!(&self.kind, Kind::V1(controllers) if controllers.iter().any(|c| c == controller))
    }

    /// The directory of a cgroup; `None` if this mount does not show it.
    #[must_use]
    pub fn directory(&self, cgroup: &str) -> Option<PathBuf> {
        let below = if self.root == "/" {
            cgroup
        } else {
            let rest = cgroup.strip_prefix(&self.root)?;
            if !rest.is_empty() && !rest.starts_with('/') {
                return None;
            }
            rest
        };
        Some(self.mountpoint.join(below.trim_start_matches('/')))
    }
}

/// All mounted hierarchies, each once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchies(Vec<Hierarchy>);

impl Hierarchies {
    /// Those of this process's mount namespace.
    ///
    /// # Errors
    /// No cgroup hierarchy is mounted.
    pub fn detect() -> Result<Self, Error> {
        Self::parse(&read("/proc/self/mountinfo".as_ref())?)
    }

    /// From the text of `/proc/<pid>/mountinfo` (`proc_pid_mountinfo(5)`).
    ///
    /// # Errors
    /// It has no cgroup hierarchy.
    pub fn parse(mountinfo: &str) -> Result<Self, Error> {
        let mut found: Vec<Hierarchy> = Vec::new();
        for line in mountinfo.lines() {
            let Some(hierarchy) = parse_mount(line) else { continue };
            match found.iter_mut().find(|h| h.kind == hierarchy.kind) {
                // Bind mounts of parts of a hierarchy may come before or after the real one.
                Some(known) if known.root != "/" && hierarchy.root == "/" => *known = hierarchy,
                Some(_) => {}
                None => found.push(hierarchy),
            }
        }
        if found.is_empty() { Err(Error::NoHierarchy) } else { Ok(Self(found)) }
    }

    /// In the order of the mount table.
    pub fn iter(&self) -> std::slice::Iter<'_, Hierarchy> {
        self.0.iter()
    }

    /// Named v1 hierarchies, which have no controller, do not make a host hybrid.
    #[must_use]
    pub fn mode(&self) -> Mode {
        let v2 = self.iter().any(|h| h.kind == Kind::V2);
        let v1 = self
            .iter()
            .any(|h| matches!(&h.kind, Kind::V1(c) if c.iter().any(|c| !c.starts_with("name="))));
        match (v1, v2) {
            (true, true) => Mode::Hybrid,
            (false, true) => Mode::V2,
            (_, false) => Mode::V1,
        }
    }

    /// What a mount of type `cgroup` in a container is made of; empty with [`Mode::V2`], where it is
    /// one mount of cgroup2.
    #[must_use]
    pub fn for_container(&self) -> Vec<CgroupHierarchy> {
        if self.mode() == Mode::V2 {
            return Vec::new();
        }
        self.iter()
            .filter_map(|h| {
                let name = h.mountpoint.file_name()?.to_str()?.to_owned();
                Some(match &h.kind {
                    Kind::V2 => CgroupHierarchy { name, options: String::new(), unified: true },
                    Kind::V1(controllers) => {
                        let mut options = controllers.clone();
                        // A hierarchy without a controller must say so.
                        if controllers.iter().all(|c| c.starts_with("name=")) {
                            options.insert(0, "none".to_owned());
                        }
                        CgroupHierarchy { name, options: options.join(","), unified: false }
                    }
                })
            })
            .collect()
    }
}

/// `36 35 98:0 /root /mountpoint rw,noatime shared:1 - cgroup source rw,memory`
fn parse_mount(line: &str) -> Option<Hierarchy> {
    let (mount, filesystem) = line.split_once(" - ")?;
    let mut mount = mount.split(' ').skip(3);
    let root = unescape(mount.next()?);
    let mountpoint = PathBuf::from(unescape(mount.next()?));
    let mut filesystem = filesystem.split(' ');
    let kind = match filesystem.next()? {
        "cgroup2" => Kind::V2,
        "cgroup" => Kind::V1(
            filesystem
                .nth(1)?
                .split(',')
                .filter(|o| V1_CONTROLLERS.contains(o) || o.starts_with("name="))
                .map(str::to_owned)
                .collect(),
        ),
        _ => return None,
    };
    Some(Hierarchy { kind, mountpoint, root })
}

/// Undoes mountinfo's octal escapes.
pub(crate) fn unescape(field: &str) -> String {
    let mut out = Vec::with_capacity(field.len());
    let bytes = field.as_bytes();
    let mut i = 0;
    while i < bytes.len() {
        let octal = (bytes[i] == b'\\')
            .then(|| field.get(i + 1..i + 4))
            .flatten()
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(byte) => {
                out.push(byte);
                i += 4;
            }
            None => {
                out.push(bytes[i]);
                i += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// The cgroups of one process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Membership(Vec<(Kind, String)>);

impl Membership {
    /// From `/proc/<process>/cgroup`; `process` is a pid or `self`.
    ///
    /// # Errors
    /// There is no such process.
    pub fn of(process: &str) -> Result<Self, Error> {
        Ok(Self::parse(&read(format!("/proc/{process}/cgroup").as_ref())?))
    }

    /// Lines such as `4:memory:/lxc/700/ns` and `0::/lxc/700/ns` (`cgroups(7)`).
    #[must_use]
    pub fn parse(text: &str) -> Self {
        Self(
            text.lines()
                .filter_map(|line| {
                    let mut fields = line.splitn(3, ':');
                    let id = fields.next()?;
                    let controllers = fields.next()?;
                    let path = fields.next()?.to_owned();
                    if controllers.is_empty() && id == "0" {
                        Some((Kind::V2, path))
                    } else {
                        Some((Kind::V1(controllers.split(',').map(str::to_owned).collect()), path))
                    }
                })
                .collect(),
        )
    }

    /// The process's cgroup in a hierarchy.
    #[must_use]
    pub fn in_hierarchy(&self, kind: &Kind) -> Option<&str> {
        self.0.iter().find(|(k, _)| same(k, kind)).map(|(_, path)| path.as_str())
    }
}

/// The two files need not list co-mounted controllers in the same order.
fn same(a: &Kind, b: &Kind) -> bool {
    match (a, b) {
        (Kind::V2, Kind::V2) => true,
        (Kind::V1(a), Kind::V1(b)) => a.len() == b.len() && a.iter().all(|c| b.contains(c)),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A Proxmox VE node.
    const NODE: &str = "\
24 30 0:22 / /sys rw,nosuid,nodev,noexec,relatime shared:7 - sysfs sysfs rw
25 30 0:23 / /proc rw,relatime shared:14 - proc proc rw
35 24 0:30 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot
36 24 0:31 / /sys/fs/pstore rw,nosuid,nodev,noexec,relatime shared:10 - pstore pstore rw
77 30 0:59 / /etc/pve rw,nosuid,nodev,relatime shared:460 - fuse /dev/fuse rw,user_id=0,group_id=0,allow_other
";
    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
90 1 0:31 /lxc/1 /srv/part\\040one rw - cgroup cgroup rw,memory
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:5 - cgroup cgroup rw,cpu,cpuacct
35 31 0:31 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,release_agent=/lib/systemd/systemd-cgroups-agent,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

    #[test]
    fn a_proxmox_node_has_cgroup2_only() {
        let found = Hierarchies::parse(NODE).unwrap();
        assert_eq!(found.mode(), Mode::V2);
        assert_eq!(found.0.len(), 1);
        assert_eq!(
            found.0[0].directory("/lxc/700/ns").unwrap(),
            PathBuf::from("/sys/fs/cgroup/lxc/700/ns")
        );
        assert!(found.for_container().is_empty());
    }

    #[test]
    fn hybrid_hierarchies_are_found_once_and_described_for_containers() {
        let found = Hierarchies::parse(HYBRID).unwrap();
        assert_eq!(found.mode(), Mode::Hybrid);
        let memory: Vec<_> = found.iter().filter(|h| h.has("memory")).collect();
        assert_eq!(memory.len(), 1);
        assert_eq!(memory[0].mountpoint, PathBuf::from("/sys/fs/cgroup/memory"));
        let container: Vec<_> =
            found.for_container().into_iter().map(|h| (h.name, h.options, h.unified)).collect();
        let expected = [
            ("memory", "memory", false),
            ("cpu,cpuacct", "cpu,cpuacct", false),
            ("systemd", "none,name=systemd", false),
            ("unified", "", true),
        ];
        assert_eq!(container.len(), expected.len());
        for (name, options, unified) in expected {
            assert!(container.contains(&(name.into(), options.into(), unified)), "{name}");
        }
    }

    #[test]
    fn a_host_with_named_v1_hierarchies_beside_cgroup2_is_v2() {
        let text =
            format!("{NODE}40 31 0:37 / /sys/fs/cgroup/elogind rw - cgroup c rw,name=elogind\n");
        assert_eq!(Hierarchies::parse(&text).unwrap().mode(), Mode::V2);
    }

    #[test]
    fn no_hierarchy_is_an_error() {
        assert!(matches!(
            Hierarchies::parse("1 1 0:1 / / rw - ext4 x rw\n"),
            Err(Error::NoHierarchy)
        ));
    }

    #[test]
    fn a_mount_of_a_part_shows_that_part_only() {
        let part = parse_mount("1 2 0:3 /lxc/1 /cg rw - cgroup2 c rw").unwrap();
        assert_eq!(part.directory("/lxc/1/ns").unwrap(), PathBuf::from("/cg/ns"));
        assert_eq!(part.directory("/lxc/1").unwrap(), PathBuf::from("/cg/"));
        assert_eq!(part.directory("/lxc/10"), None);
    }

    #[test]
    fn mount_points_are_unescaped() {
        assert_eq!(unescape("/a\\040b\\134\\9x"), "/a b\\\\9x");
    }

    #[test]
    fn membership_matches_hierarchies_whatever_the_order() {
        let of = Membership::parse("5:cpuacct,cpu:/lxc/7/ns\n1:name=systemd:/a:b\n0::/lxc/7/ns\n");
        let cpu = Kind::V1(vec!["cpu".into(), "cpuacct".into()]);
        assert_eq!(of.in_hierarchy(&cpu), Some("/lxc/7/ns"));
        assert_eq!(of.in_hierarchy(&Kind::V1(vec!["name=systemd".into()])), Some("/a:b"));
        assert_eq!(of.in_hierarchy(&Kind::V2), Some("/lxc/7/ns"));
        assert_eq!(of.in_hierarchy(&Kind::V1(vec!["memory".into()])), None);
    }
}
