//! The user namespace: `linux.namespaces`, `linux.uidMappings`, `linux.gidMappings`, and what else of a
//! specification depends on it.

use std::path::PathBuf;

use nix::libc;
use oci_spec::runtime::{LinuxIdMapping, LinuxNamespace, LinuxNamespaceType as Type};
use proxmox_shim_init::protocol::{Device, Mount, MountSource, Process};

use super::document::{Document, Item};
use super::plan::{
    IdMapping, IdMappings, Namespace, NamespaceFilesystem, Namespaces, PlannedMount, UserNamespace,
};
use super::{Error, Host, id_mappings, mounts, namespaces};

/// What a user namespace may mount (`FS_USERNS_MOUNT` of the kernel).
const MOUNTABLE: [&str; 8] =
    ["cgroup", "cgroup2", "devpts", "mqueue", "proc", "ramfs", "sysfs", "tmpfs"];

/// `None` if the container is to have the node's.
pub(super) fn read(spec: &Document, host: &Host) -> Result<Option<UserNamespace>, Error> {
    let list = |name: &str| -> Result<Vec<LinuxIdMapping>, Error> {
        Ok(spec.list(&format!("linux.{name}"))?.into_iter().map(|item| item.value).collect())
    };
    let mappings = id_mappings::convert("linux", &list("uidMappings")?, &list("gidMappings")?)?;
    let entry = listed(spec)?;
    let path = entry.as_ref().and_then(|(_, path)| path.clone());
    let is_host = path.as_deref().is_some_and(|path| (host.is_own_namespace)("user", path));
    let Some((field, path)) = entry.filter(|_| !is_host) else {
        return match mappings {
            None => Ok(host.unprivileged.then(proxmox)),
            Some(_) => Err(Error::invalid(
                "linux.uidMappings",
                "needs an own user namespace in linux.namespaces",
            )),
        };
    };
    // Also for a namespace that exists: the root file system and the devices are prepared by them.
    let Some(mappings) = mappings else {
        return Err(Error::invalid(
            "linux.uidMappings",
            "and linux.gidMappings are missing beside the user namespace",
        ));
    };
    for (field, root) in
        [("uidMappings", mappings.host_uid(0)), ("gidMappings", mappings.host_gid(0))]
    {
        if root.is_none() {
            let problem = "must map the container's id 0, which sets the container up";
            return Err(Error::invalid(format!("linux.{field}"), problem));
        }
    }
    let path = path.map(|path| namespaces::joinable(&field, path)).transpose()?;
    Ok(Some(UserNamespace { path, mappings }))
}

/// That of an unprivileged CT.
fn proxmox() -> UserNamespace {
    let ids = vec![IdMapping { container: 0, host: 100_000, size: 65_536 }];
    UserNamespace { path: None, mappings: IdMappings { uids: ids.clone(), gids: ids } }
}

/// The entry's field and path.
fn listed(spec: &Document) -> Result<Option<(String, Option<PathBuf>)>, Error> {
    let list = spec.list::<LinuxNamespace>("linux.namespaces")?;
    let entry = list.into_iter().find(|item| item.value.typ() == Type::User);
    Ok(entry.map(|Item { field, value }| {
        (field, value.path().clone().filter(|path| !path.as_os_str().is_empty()))
    }))
}

/// Refuses what cannot be had in `user`, and leaves to the shim what root of a user namespace may not
/// mount itself. `mounts` are those of the specification.
pub(super) fn adapt(
    user: &UserNamespace,
    namespaces: &Namespaces,
    process: &Process,
    devices: &[Device],
    mounts: &mut [PlannedMount],
) -> Result<(), Error> {
    check_ids(user, process, devices)?;
    for (index, mount) in mounts.iter_mut().enumerate() {
        let PlannedMount::Init(Mount { destination, source, propagation, .. }) = mount else {
            continue;
        };
        let MountSource::Filesystem { fstype, flags, data, .. } = source else { continue };
        let field = |name: &str| format!("mounts[{index}].{name}");
        if !MOUNTABLE.contains(&fstype.as_str()) {
            return Err(Error::unsupported(
                format!("{} {fstype:?} in a user namespace", field("type")),
                "the kernel forbids it; bind-mount the node's, or run it with a configuration that has \
                 ct.unprivileged = false",
            ));
        }
        if fstype == "proc" && namespaces.pid == Namespace::Host {
            let problem = "\"proc\" in a user namespace needs an own pid namespace as well";
            return Err(Error::invalid(field("type"), problem));
        }
        // They show a namespace, which may belong to the node.
        let of = match fstype.as_str() {
            "sysfs" => NamespaceFilesystem::Sysfs,
            "mqueue" => NamespaceFilesystem::Mqueue,
            _ => continue,
        };
        if !data.is_empty() {
            let problem = format!("{data:?} mean nothing to {fstype}");
            return Err(Error::invalid(field("options"), problem));
        }
        *mount = PlannedMount::OfNamespace {
            filesystem: of,
            destination: std::mem::take(destination),
            attributes: mounts::attributes_of(*flags),
            propagation: std::mem::take(propagation),
        };
    }
    Ok(())
}

fn check_ids(user: &UserNamespace, process: &Process, devices: &[Device]) -> Result<(), Error> {
    let (uid, gid) = (|id| user.mappings.host_uid(id), |id| user.mappings.host_gid(id));
    let unmapped = |field: &str, id: u32| {
        Error::invalid(field, format!("is {id}, which the user namespace does not map"))
    };
    if uid(process.uid).is_none() {
        return Err(unmapped("process.user.uid", process.uid));
    }
    let gids = std::iter::once(("process.user.gid", process.gid))
        .chain(process.additional_gids.iter().map(|id| ("process.user.additionalGids", *id)));
    for (field, id) in gids {
        if gid(id).is_none() {
            return Err(unmapped(field, id));
        }
    }
    for device in devices.iter().filter(|device| device.mode & libc::S_IFMT != libc::S_IFIFO) {
        if uid(device.uid).is_none() || gid(device.gid).is_none() {
            let problem = format!(
                "{:?} belongs to {}:{}, which the user namespace does not map",
                device.path, device.uid, device.gid
            );
            return Err(Error::invalid("linux.devices", problem));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::plan::IdMapping;
    use super::super::tests::host;
    use super::*;

    const MAPPINGS: &str = r#""uidMappings":[{"containerID":0,"hostID":100000,"size":1000}],
        "gidMappings":[{"containerID":0,"hostID":200000,"size":1000}]"#;

    fn read_json(linux: &str) -> Result<Option<UserNamespace>, String> {
        let json = format!(r#"{{"linux":{{{linux}}}}}"#);
        read(&Document::parse(json.as_bytes()).unwrap(), &host()).map_err(|error| error.to_string())
    }

    #[test]
    fn new_joined_and_the_node_s() {
        for (namespace, path) in
            [(r#"{"type":"user"}"#, None), (r#"{"type":"user","path":"/x"}"#, Some("/x"))]
        {
            let linux = format!(r#""namespaces":[{{"type":"pid"}},{namespace}],{MAPPINGS}"#);
            let user = read_json(&linux).unwrap().unwrap();
            assert_eq!(user.path.as_deref(), path.map(Path::new));
            let mapping = |host| vec![IdMapping { container: 0, host, size: 1000 }];
            assert_eq!(
                (user.mappings.uids, user.mappings.gids),
                (mapping(100_000), mapping(200_000))
            );
        }
        for linux in [
            r#""namespaces":[{"type":"pid"}]"#,
            r#""namespaces":[{"type":"user","path":"/host/ns/user"}]"#,
            r#""namespaces":[],"uidMappings":[],"gidMappings":[]"#,
        ] {
            assert_eq!(read_json(linux).unwrap(), None, "{linux}");
        }
    }

    #[test]
    fn an_unprivileged_container_gets_proxmox_s() {
        let read = |linux: &str| {
            let json = format!(r#"{{"linux":{{{linux}}}}}"#);
            let host = Host { unprivileged: true, ..host() };
            super::read(&Document::parse(json.as_bytes()).unwrap(), &host).unwrap().unwrap()
        };
        for linux in ["", r#""namespaces":[{"type":"user","path":"/host/ns/user"}]"#] {
            let user = read(linux);
            assert_eq!((user.path, user.mappings.uid_map()), (None, "0 100000 65536\n".to_owned()));
            assert_eq!(user.mappings.gid_map(), "0 100000 65536\n");
        }
        let own = read(&format!(r#""namespaces":[{{"type":"user"}}],{MAPPINGS}"#));
        assert_eq!(own.mappings.gid_map(), "0 200000 1000\n");
    }

    #[test]
    fn mappings_and_namespace_need_each_other() {
        let without_root = MAPPINGS.replace("\"containerID\":0", "\"containerID\":1");
        for (linux, expected) in [
            (MAPPINGS.to_owned(), "linux.uidMappings needs an own user namespace"),
            (
                r#""namespaces":[{"type":"user"}]"#.to_owned(),
                "linux.uidMappings and linux.gidMappings are missing",
            ),
            (
                format!(r#""namespaces":[{{"type":"user"}}],{without_root}"#),
                "linux.uidMappings must map the container's id 0",
            ),
            (
                format!(
                    r#""namespaces":[{{"type":"user","path":"/proc/self/ns/user"}}],{MAPPINGS}"#
                ),
                "linux.namespaces[0].path must not be relative to the reading process",
            ),
        ] {
            let error = read_json(&linux).unwrap_err();
            assert!(error.starts_with(expected), "{linux}: {error}");
        }
    }

    /// The plan of a whole specification with a user namespace.
    fn plan(
        change: impl FnOnce(&mut serde_json::Value),
    ) -> Result<super::super::plan::Plan, String> {
        let mut spec: serde_json::Value =
            serde_json::from_str(include_str!("fixtures/ctr-default.json")).unwrap();
        let linux = &mut spec["linux"];
        linux["namespaces"].as_array_mut().unwrap().push(serde_json::json!({"type": "user"}));
        for (field, host) in [("uidMappings", 100_000), ("gidMappings", 200_000)] {
            linux[field] = serde_json::json!([{"containerID": 0, "hostID": host, "size": 1000}]);
        }
        change(&mut spec);
        super::super::plan(spec.to_string().as_bytes(), Path::new("/bundle"), &host())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn sysfs_is_left_to_the_shim_and_cgroups_are_hidden() {
        let plan = plan(|_| {}).unwrap();
        let sysfs = plan.mounts.iter().find_map(|mount| match mount {
            PlannedMount::OfNamespace {
                filesystem: NamespaceFilesystem::Sysfs,
                destination,
                attributes,
                propagation,
            } => Some((destination.as_str(), *attributes, propagation.len())),
            _ => None,
        });
        let attributes = libc::MOUNT_ATTR_NOSUID
            | libc::MOUNT_ATTR_NOEXEC
            | libc::MOUNT_ATTR_NODEV
            | libc::MOUNT_ATTR_RDONLY;
        assert_eq!(sysfs, Some(("/sys", attributes, 0)));
    }

    #[test]
    fn what_a_user_namespace_cannot_have_is_refused_by_name() {
        let push = |spec: &mut serde_json::Value, mount| {
            spec["mounts"].as_array_mut().unwrap().push(mount);
        };
        let host_namespace = |spec: &mut serde_json::Value, kind: &str| {
            let list = spec["linux"]["namespaces"].as_array_mut().unwrap();
            list.retain(|namespace| namespace["type"] != kind);
        };
        let refused = |change: &dyn Fn(&mut serde_json::Value), expected: &str| {
            let error = plan(|spec| change(spec)).unwrap_err();
            assert!(error.contains(expected), "{expected}: {error}");
        };
        refused(
            &|s| push(s, serde_json::json!({"destination": "/d", "type": "debugfs"})),
            "mounts[7].type \"debugfs\" in a user namespace is not supported",
        );
        refused(&|s| host_namespace(s, "pid"), "mounts[0].type \"proc\" in a user namespace needs");
        refused(
            &|s| s["process"]["user"]["uid"] = 1000.into(),
            "process.user.uid is 1000, which the user namespace does not map",
        );
        refused(
            &|s| s["process"]["user"]["additionalGids"] = serde_json::json!([5, 5000]),
            "process.user.additionalGids is 5000",
        );
        refused(
            &|s| {
                s["linux"]["devices"] = serde_json::json!(
                    [{"path": "/dev/x", "type": "c", "major": 1, "minor": 3, "uid": 7000}]
                );
            },
            "linux.devices \"/dev/x\" belongs to 7000:0",
        );
    }

    #[test]
    fn an_id_mapped_mount_without_mappings_has_the_container_s() {
        let plan = plan(|spec| {
            spec["mounts"].as_array_mut().unwrap().push(serde_json::json!({
                "destination": "/v", "source": "/s", "options": ["bind", "idmap"],
            }));
        })
        .unwrap();
        let Some(PlannedMount::Bind { ids: Some(ids), .. }) = plan.mounts.last() else {
            panic!("{:?}", plan.mounts)
        };
        assert_eq!(ids.mappings, plan.user_namespace.unwrap().mappings);
    }
}
