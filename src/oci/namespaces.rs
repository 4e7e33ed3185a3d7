//! `linux.namespaces`, and the names that belong to the uts namespace.

use std::collections::BTreeMap;
use std::path::{Component, PathBuf};

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType as Type, LinuxTimeOffset};
use proxmox_shim_init::protocol::MountSource;

use super::document::Document;
use super::plan::{Namespace, Namespaces, PlannedMount};
use super::{Cgroups, Error, Host};

/// `__NEW_UTS_LEN` of the kernel.
const MAX_NAME: usize = 64;

pub(super) fn read(spec: &Document, host: &Host) -> Result<Namespaces, Error> {
    let mut namespaces = Namespaces {
        pid: Namespace::Host,
        network: Namespace::Host,
        ipc: Namespace::Host,
        uts: Namespace::Host,
        cgroup: Namespace::Host,
        time: Namespace::Host,
    };
    let mut seen = Vec::new();
    for item in spec.list::<LinuxNamespace>("linux.namespaces")? {
        let (field, namespace) = (item.field, item.value);
        let typ = namespace.typ();
        if seen.contains(&typ) {
            return Err(Error::invalid(field, format!("repeats the type {typ}")));
        }
        seen.push(typ);
        let path = namespace.path().clone().filter(|path| !path.as_os_str().is_empty());
        let (slot, kind) = match typ {
            Type::Pid => (&mut namespaces.pid, "pid"),
            Type::Network => (&mut namespaces.network, "net"),
            Type::Ipc => (&mut namespaces.ipc, "ipc"),
            Type::Uts => (&mut namespaces.uts, "uts"),
            Type::Cgroup => (&mut namespaces.cgroup, "cgroup"),
            Type::Mount if path.is_none() => continue,
            Type::Mount => {
                return Err(Error::unsupported(
                    format!("{field}.path"),
                    "a container always has its own mount namespace; leave the path out",
                ));
            }
            // See the module `user_namespace`.
            Type::User => continue,
            Type::Time => (&mut namespaces.time, "time"),
        };
        *slot = match path {
            None => Namespace::New,
            Some(path) if host.is_own(kind, &path) => Namespace::Host,
            // LXC accepts the path and makes a new one all the same.
            Some(_) if typ == Type::Cgroup => {
                return Err(Error::unsupported(
                    format!("{field}.path"),
                    "LXC cannot join a cgroup namespace; leave the path out for a new one",
                ));
            }
            Some(path) => Namespace::Path(joinable(&field, path)?),
        };
    }
    match seen.contains(&Type::Mount) {
        true => Ok(namespaces),
        false => Err(Error::unsupported(
            "linux.namespaces without the type mount",
            "a container always has its own mount namespace; add it to the list",
        )),
    }
}

impl Host {
    fn is_own(&self, kind: &str, path: &std::path::Path) -> bool {
        (self.is_own_namespace)(kind, path)
    }
}

/// LXC opens the path, in another process, so it must mean the same everywhere.
pub(super) fn joinable(field: &str, path: PathBuf) -> Result<PathBuf, Error> {
    let field = format!("{field}.path");
    if !path.is_absolute() {
        return Err(Error::invalid(field, "must be absolute"));
    }
    let mut components = path.components().skip(1);
    let of_process = (components.next(), components.next());
    if let (Some(Component::Normal(proc)), Some(Component::Normal(which))) = of_process
        && proc == "proc"
        && (which == "self" || which == "thread-self")
    {
        return Err(Error::invalid(field, "must not be relative to the reading process"));
    }
    Ok(path)
}

/// `hostname` or `domainname`. Setting one in the host's uts namespace would rename the node.
pub(super) fn host_name(
    spec: &Document,
    field: &str,
    uts: &Namespace,
) -> Result<Option<String>, Error> {
    let Some(name) = spec.string(field)? else { return Ok(None) };
    if *uts == Namespace::Host {
        return Err(Error::invalid(field, "needs an own uts namespace in linux.namespaces"));
    }
    match name.len() > MAX_NAME {
        true => Err(Error::invalid(field, format!("is longer than {MAX_NAME} bytes"))),
        false => Ok(Some(name)),
    }
}

/// The clocks that a time namespace has of its own, by which a new one differs from the host.
pub(super) fn time_offsets(spec: &Document, time: &Namespace) -> Result<String, Error> {
    const FIELD: &str = "linux.timeOffsets";
    let offsets: BTreeMap<String, LinuxTimeOffset> = spec.read(FIELD)?.unwrap_or_default();
    if !offsets.is_empty() && *time != Namespace::New {
        return Err(Error::invalid(FIELD, "needs a new time namespace in linux.namespaces"));
    }
    let mut lines = String::new();
    for (clock, offset) in offsets {
        if !matches!(clock.as_str(), "monotonic" | "boottime") {
            return Err(Error::invalid(
                format!("{FIELD} {clock:?}"),
                "is no clock of a time namespace: monotonic or boottime",
            ));
        }
        let (seconds, nanoseconds) = (offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0));
        if nanoseconds >= 1_000_000_000 {
            return Err(Error::invalid(
                format!("{FIELD}.{clock}.nanosecs"),
                "is not below a second",
            ));
        }
        lines.push_str(&format!("{clock} {seconds} {nanoseconds}\n"));
    }
    Ok(lines)
}

/// A mount of type `cgroup` must show the container its own cgroups. cgroup v1 without a cgroup
/// namespace would show all of the host's, and bind mounts of the container's directories, which
/// runc makes in this case, cannot be made inside the container: so it gets a namespace. So does a
/// container with a user namespace, which may mount no cgroups but its own.
pub(super) fn hide_host_cgroups(
    namespaces: &mut Namespaces,
    mounts: &[PlannedMount],
    host: &Host,
    has_user_namespace: bool,
    warnings: &mut Vec<String>,
) {
    let reason = match (&host.cgroups, has_user_namespace) {
        (Cgroups::V1 { .. }, _) => "cgroup v1 is mounted",
        (Cgroups::V2, true) => "cgroups are mounted in a user namespace",
        (Cgroups::V2, false) => return,
    };
    let is_cgroup = |mount: &PlannedMount| {
        matches!(mount, PlannedMount::Init(mount)
            if matches!(mount.source, MountSource::Cgroup { .. }))
    };
    if namespaces.cgroup == Namespace::Host && mounts.iter().any(is_cgroup) {
        namespaces.cgroup = Namespace::New;
        warnings.push(format!("linux.namespaces: added a cgroup namespace, because {reason}"));
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::host;
    use super::*;

    fn read_json(namespaces: &str) -> Result<Namespaces, String> {
        let json = format!(r#"{{"linux":{{"namespaces":{namespaces}}}}}"#);
        read(&Document::parse(json.as_bytes()).unwrap(), &host()).map_err(|error| error.to_string())
    }

    #[test]
    fn absent_is_host_listed_is_new_path_is_joined() {
        let namespaces = read_json(
            r#"[{"type":"mount"},{"type":"pid"},{"type":"network","path":"/run/netns/a b"},
                {"type":"ipc","path":""},{"type":"uts","path":"/host/ns/uts"},
                {"type":"time","path":"/proc/7/ns/time"}]"#,
        );
        assert_eq!(
            namespaces.unwrap(),
            Namespaces {
                pid: Namespace::New,
                network: Namespace::Path("/run/netns/a b".into()),
                ipc: Namespace::New,
                uts: Namespace::Host,
                cgroup: Namespace::Host,
                time: Namespace::Path("/proc/7/ns/time".into()),
            }
        );
    }

    #[test]
    fn clock_offsets_need_a_new_time_namespace() {
        let read = |json: &str, time: Namespace| {
            let spec = format!(r#"{{"linux":{{"timeOffsets":{json}}}}}"#);
            time_offsets(&Document::parse(spec.as_bytes()).unwrap(), &time)
                .map_err(|error| error.to_string())
        };
        let both = r#"{"monotonic":{"secs":5},"boottime":{"secs":-7,"nanosecs":999999999}}"#;
        assert_eq!(
            read(both, Namespace::New),
            Ok("boottime -7 999999999\nmonotonic 5 0\n".to_owned())
        );
        assert_eq!(read("{}", Namespace::Host), Ok(String::new()));
        for (json, time, expected) in [
            (both, Namespace::Host, "linux.timeOffsets needs a new time namespace"),
            (both, Namespace::Path("/x".into()), "linux.timeOffsets needs a new time namespace"),
            (r#"{"realtime":{"secs":1}}"#, Namespace::New, "linux.timeOffsets \"realtime\" is no"),
            (
                r#"{"boottime":{"nanosecs":1000000000}}"#,
                Namespace::New,
                "linux.timeOffsets.boottime.nanosecs is not below",
            ),
        ] {
            let error = read(json, time).unwrap_err();
            assert!(error.starts_with(expected), "{json}: {error}");
        }
    }

    #[test]
    fn unsupported_and_wrong_lists_are_refused() {
        for (json, expected) in [
            (r#"[{"type":"pid"}]"#, "linux.namespaces without the type mount is not supported"),
            (r#"[{"type":"mount","path":"/x"}]"#, "linux.namespaces[0].path is not supported"),
            (r#"[{"type":"cgroup","path":"/x"}]"#, "linux.namespaces[0].path is not supported"),
            (r#"[{"type":"pid"},{"type":"pid"}]"#, "linux.namespaces[1] repeats the type pid"),
            (r#"[{"type":"new"}]"#, "linux.namespaces[0]: unknown variant `new`"),
            (r#"[{"type":"pid","path":"x"}]"#, "linux.namespaces[0].path must be absolute"),
            (
                r#"[{"type":"pid","path":"/proc/self/ns/pid"}]"#,
                "linux.namespaces[0].path must not be relative to the reading process",
            ),
            ("5", "linux.namespaces must be a list"),
        ] {
            let error = read_json(json).unwrap_err();
            assert!(error.starts_with(expected), "{json}: {error}");
        }
    }

    #[test]
    fn names_need_an_own_uts_namespace() {
        let spec = Document::parse(br#"{"hostname":"web"}"#).unwrap();
        let read = |uts| host_name(&spec, "hostname", &uts).map_err(|error| error.to_string());
        assert_eq!(read(Namespace::New), Ok(Some("web".to_owned())));
        assert_eq!(read(Namespace::Path("/x".into())), Ok(Some("web".to_owned())));
        assert_eq!(
            read(Namespace::Host),
            Err("hostname needs an own uts namespace in linux.namespaces".to_owned())
        );
        assert_eq!(host_name(&spec, "domainname", &Namespace::Host).unwrap(), None);
        let long = format!(r#"{{"hostname":"{}"}}"#, "x".repeat(65));
        let long = Document::parse(long.as_bytes()).unwrap();
        assert!(host_name(&long, "hostname", &Namespace::New).is_err());
    }
}
