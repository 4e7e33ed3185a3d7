//! What the containers of a pod get from a sandbox that the Sandbox service holds.
//!
//! Such a client need not know the holder's pid: it writes a placeholder, the path of a namespace of
//! the node's first process, for "that of the sandbox". It says nothing of `/dev/shm`, which is shared
//! by those that share the ipc namespace.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use nix::libc;
use proxmox_shim_init::protocol::MountSource;

use crate::oci;
use crate::oci::plan::{MountAttributes, Namespace, Namespaces, Plan, PlannedMount};
use crate::sandbox::namespace::{Kind, by_kind};

/// Why a container can't be a member.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Nothing that the placeholder could stand for.
    #[error(
        "linux.namespaces: {path:?} stands for the pod sandbox's, but this shim holds no sandbox"
    )]
    NoSandbox { path: PathBuf },
    /// The sandbox has nothing to share.
    #[error("the pod sandbox is not running")]
    NotRunning,
    /// The sandbox has no ids of its own.
    #[error(
        "linux.namespaces: {path:?} stands for the pod sandbox's, but that has no user namespace"
    )]
    NoUserNamespace { path: PathBuf },
    /// The sandbox is on the node.
    #[error("{field} cannot be set: the pod sandbox shares that namespace with the node")]
    OfTheNode { field: &'static str },
}

/// What a running sandbox has to share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shared {
    /// The holder's.
    pub pid: i32,
    /// As the sandbox was planned: new ones and those that were joined are the holder's.
    pub namespaces: Namespaces,
    /// It has a user namespace.
    pub maps_users: bool,
    /// The directory to be mounted on `/dev/shm`.
    pub memory: PathBuf,
    /// The directory of the files to be mounted in `/etc`, and their names.
    pub etc: PathBuf,
    pub names: Vec<&'static str>,
}

/// Whether the shim holds a sandbox for the Sandbox service.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum State {
    /// It never did: containers are made as they are described.
    #[default]
    Absent,
    /// It was not started yet, or has ended. A container made now would get the node's namespaces in
    /// the place of the pod's.
    NotRunning,
    Running(Arc<Shared>),
}

/// The one sandbox of a shim.
#[derive(Debug, Default)]
pub struct Slot(Mutex<State>);

impl Slot {
    /// Sets what there is to share.
    pub fn set(&self, state: State) {
        // Nothing panics while it holds the lock.
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// What there is to share.
    #[must_use]
    pub fn get(&self) -> State {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The placeholder of a kind.
fn placeholder(kind: Kind) -> PathBuf {
    Path::new("/proc/1/ns").join(kind.file())
}

/// Refuses placeholders where there is no sandbox.
///
/// # Errors
/// [`Error::NoSandbox`].
pub fn refuse_placeholders(plan: &Plan) -> Result<(), Error> {
    let paths =
        by_kind(&plan.namespaces).into_iter().filter_map(|(_, namespace)| match namespace {
            Namespace::Path(path) => Some(path),
            Namespace::New | Namespace::Host => None,
        });
    let user = plan.user_namespace.as_ref().and_then(|user| user.path.as_ref());
    match paths.chain(user).find(|path| oci::is_placeholder(path)) {
        Some(path) => Err(Error::NoSandbox { path: path.clone() }),
        None => Ok(()),
    }
}

impl Shared {
    /// Lets the container share what it asks for.
    ///
    /// # Errors
    /// [`Error::OfTheNode`], [`Error::NoUserNamespace`].
    pub fn join(&self, plan: &mut Plan) -> Result<(), Error> {
        let Namespaces { pid, network, ipc, uts, cgroup: _, time: _ } = &mut plan.namespaces;
        for (kind, namespace) in [(Kind::Pid, pid), (Kind::Ipc, ipc), (Kind::Uts, uts)] {
            if *namespace == Namespace::Path(placeholder(kind)) {
                *namespace = self.namespace(kind);
            }
        }
        // One network for the pod, whatever the container says of it, unless it names one.
        match network {
            Namespace::Path(path) if *path != placeholder(Kind::Network) => {}
            _ => *network = self.namespace(Kind::Network),
        }
        let user = plan.user_namespace.as_mut().and_then(|user| user.path.as_mut());
        if let Some(path) = user.filter(|path| **path == placeholder(Kind::User)) {
            if !self.maps_users {
                return Err(Error::NoUserNamespace { path: path.clone() });
            }
            *path = self.file(Kind::User);
        }
        let names =
            [("hostname", plan.hostname.is_some()), ("domainname", plan.domainname.is_some())];
        for (field, _) in names.into_iter().filter(|(_, set)| *set) {
            if plan.namespaces.uts == Namespace::Host {
                return Err(Error::OfTheNode { field });
            }
        }
        if !plan.sysctls.is_empty()
            && [&plan.namespaces.network, &plan.namespaces.ipc].contains(&&Namespace::Host)
        {
            return Err(Error::OfTheNode { field: "linux.sysctl" });
        }
        if plan.namespaces.ipc == self.path(Kind::Ipc) && self.holds(Kind::Ipc) {
            self.share_memory(&mut plan.mounts);
        }
        self.share_names(plan);
        Ok(())
    }

    fn holds(&self, kind: Kind) -> bool {
        let mut planned = by_kind(&self.namespaces).into_iter();
        planned.any(|(planned, namespace)| planned == kind && *namespace != Namespace::Host)
    }

    fn namespace(&self, kind: Kind) -> Namespace {
        if self.holds(kind) { self.path(kind) } else { Namespace::Host }
    }

    fn path(&self, kind: Kind) -> Namespace {
        Namespace::Path(self.file(kind))
    }

    fn file(&self, kind: Kind) -> PathBuf {
        format!("/proc/{}/ns/{}", self.pid, kind.file()).into()
    }

    /// Those that the client does not mount itself.
    fn share_names(&self, plan: &mut Plan) {
        for name in &self.names {
            let destination = format!("/etc/{name}");
            if plan.mounts.iter().any(|mount| mount.destination() == destination) {
                continue;
            }
            let read_only = if plan.root_readonly { libc::MOUNT_ATTR_RDONLY } else { 0 };
            plan.mounts.push(PlannedMount::Bind {
                source: self.etc.join(name),
                destination,
                recursive: false,
                attributes: MountAttributes { set: read_only, ..MountAttributes::default() },
                propagation: vec![libc::MS_PRIVATE],
                ids: None,
            });
        }
    }

    fn share_memory(&self, mounts: &mut [PlannedMount]) {
        for mount in mounts {
            let is_private = matches!(mount, PlannedMount::Init(own)
                if own.destination.trim_end_matches('/') == "/dev/shm"
                    && matches!(&own.source, MountSource::Filesystem { fstype, .. } if fstype == "tmpfs"));
            if is_private {
                *mount = PlannedMount::Bind {
                    source: self.memory.clone(),
                    destination: "/dev/shm".to_owned(),
                    recursive: false,
                    attributes: MountAttributes {
                        set: libc::MOUNT_ATTR_NOSUID
                            | libc::MOUNT_ATTR_NODEV
                            | libc::MOUNT_ATTR_NOEXEC,
                        ..MountAttributes::default()
                    },
                    propagation: vec![libc::MS_PRIVATE],
                    ids: None,
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::oci::plan::{IdMappings, UserNamespace};

    use super::*;

    fn namespaces(one: &Namespace) -> Namespaces {
        let one = || one.clone();
        Namespaces {
            pid: one(),
            network: one(),
            ipc: one(),
            uts: one(),
            cgroup: Namespace::New,
            time: Namespace::Host,
        }
    }

    fn sandbox(namespace: &Namespace) -> Shared {
        let namespaces = namespaces(namespace);
        Shared {
            pid: 42,
            namespaces,
            maps_users: false,
            memory: "/run/shm".into(),
            etc: "/run/etc".into(),
            names: vec!["hosts", "resolv.conf"],
        }
    }

    /// A container whose namespaces have these paths; the others are the node's.
    fn plan(paths: &[(&str, &str)], more: &str) -> Plan {
        let list: Vec<String> = paths
            .iter()
            .map(|(kind, path)| format!(r#",{{"type":"{kind}","path":"{path}"}}"#))
            .collect();
        let json = format!(
            r#"{{"ociVersion":"1.0.2","process":{{"args":["x"],"cwd":"/"}},"root":{{"path":"r"}},
                "mounts":[{{"destination":"/dev/shm","type":"tmpfs","source":"shm"}}]{more},
                "linux":{{"namespaces":[{{"type":"mount"}}{}]}}}}"#,
            list.concat()
        );
        let mut host = oci::Host::probe().unwrap();
        host.is_own_namespace = |_, _| false;
        oci::plan(json.as_bytes(), Path::new("/b"), &host).unwrap()
    }

    fn path(kind: &str) -> Namespace {
        Namespace::Path(format!("/proc/42/ns/{kind}").into())
    }

    #[test]
    fn placeholders_stand_for_the_sandbox() {
        let all = [("pid", "/proc/1/ns/pid"), ("ipc", "/proc/1/ns/ipc"), ("uts", "/proc/1/ns/uts")];
        let mut member = plan(&all, "");
        sandbox(&Namespace::New).join(&mut member).unwrap();
        let joined = &member.namespaces;
        assert_eq!((&joined.pid, &joined.ipc), (&path("pid"), &path("ipc")));
        assert_eq!((&joined.uts, &joined.network), (&path("uts"), &path("net")));
        assert!(matches!(&member.mounts[0], PlannedMount::Bind { source, .. }
            if source == Path::new("/run/shm")));

        let mut member = plan(&all, "");
        sandbox(&Namespace::Host).join(&mut member).unwrap();
        assert_eq!(member.namespaces, namespaces_with_cgroup(&Namespace::Host, &member));
        assert!(matches!(&member.mounts[0], PlannedMount::Init(_)));
    }

    fn namespaces_with_cgroup(one: &Namespace, plan: &Plan) -> Namespaces {
        Namespaces { cgroup: plan.namespaces.cgroup.clone(), ..namespaces(one) }
    }

    #[test]
    fn what_is_not_asked_for_is_not_shared_except_the_network() {
        let mut member = plan(&[("pid", ""), ("ipc", "")], "");
        sandbox(&Namespace::New).join(&mut member).unwrap();
        let own = &member.namespaces;
        assert_eq!(
            (&own.pid, &own.ipc, &own.uts),
            (&Namespace::New, &Namespace::New, &Namespace::Host)
        );
        assert_eq!(own.network, path("net"));
        assert!(matches!(&member.mounts[0], PlannedMount::Init(_)));
        let other = Namespace::Path("/run/netns/other".into());
        let mut member = plan(&[("network", "/run/netns/other")], "");
        sandbox(&Namespace::New).join(&mut member).unwrap();
        assert_eq!(member.namespaces.network, other);
    }

    #[test]
    fn files_of_names_are_mounted_unless_the_client_does() {
        let mut member = plan(&[], "");
        member.root_readonly = true;
        let [own, shared] = [("/mine", "/etc/hosts"), ("/run/etc/resolv.conf", "/etc/resolv.conf")];
        let bind = |(source, destination): (&str, &str), set| PlannedMount::Bind {
            source: source.into(),
            destination: destination.to_owned(),
            recursive: false,
            attributes: MountAttributes { set, ..MountAttributes::default() },
            propagation: vec![libc::MS_PRIVATE],
            ids: None,
        };
        member.mounts = vec![bind(own, 0)];
        sandbox(&Namespace::New).join(&mut member).unwrap();
        assert_eq!(member.mounts, [bind(own, 0), bind(shared, libc::MOUNT_ATTR_RDONLY)]);
    }

    #[test]
    fn the_nodes_own_name_cannot_be_changed_through_the_sandbox() {
        let mut member = plan(&[("uts", "/proc/1/ns/uts")], r#","hostname":"x""#);
        let refused = sandbox(&Namespace::Host).join(&mut member);
        assert_eq!(refused, Err(Error::OfTheNode { field: "hostname" }));
        let mut member = plan(&[("uts", "/proc/1/ns/uts")], r#","hostname":"x""#);
        sandbox(&Namespace::New).join(&mut member).unwrap();
    }

    #[test]
    fn without_a_sandbox_a_placeholder_is_refused() {
        let member = plan(&[("ipc", "/proc/1/ns/ipc")], "");
        let refused = refuse_placeholders(&member).unwrap_err().to_string();
        assert!(refused.contains("/proc/1/ns/ipc") && refused.contains("no sandbox"), "{refused}");
        refuse_placeholders(&plan(&[("ipc", "/proc/12/ns/ipc")], "")).unwrap();
    }

    #[test]
    fn the_sandbox_s_ids_are_shared_if_it_has_any() {
        let member = || {
            let mut member = plan(&[], "");
            let ids = vec![crate::oci::plan::IdMapping { container: 0, host: 100_000, size: 1000 }];
            member.user_namespace = Some(UserNamespace {
                path: Some("/proc/1/ns/user".into()),
                mappings: IdMappings { uids: ids.clone(), gids: ids },
            });
            member
        };
        let mut joined = member();
        Shared { maps_users: true, ..sandbox(&Namespace::New) }.join(&mut joined).unwrap();
        let path = joined.user_namespace.and_then(|user| user.path);
        assert_eq!(path.as_deref(), Some(Path::new("/proc/42/ns/user")));
        let refused = sandbox(&Namespace::New).join(&mut member()).unwrap_err().to_string();
        assert!(refused.contains("no user namespace"), "{refused}");
        let refused = refuse_placeholders(&member()).unwrap_err().to_string();
        assert!(refused.contains("/proc/1/ns/user"), "{refused}");
    }
}
