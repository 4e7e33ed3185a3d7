//! `linux.devices`, `linux.resources.devices`, and what every container gets in `/dev`.

use nix::libc;
use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType as Type};
use proxmox_shim_init::protocol::Device;

use super::document::Document;
use super::plan::{DeviceKind, DeviceRule};
use super::{Error, Host};

/// The nodes of the specification's "Default Devices" (config-linux.md); `/dev/console` is init's,
/// because it depends on the terminal.
const DEFAULT_NODES: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/random", 1, 8),
    ("/dev/full", 1, 7),
    ("/dev/tty", 5, 0),
    ("/dev/zero", 1, 5),
    ("/dev/urandom", 1, 9),
];

pub(super) struct Devices {
    pub nodes: Vec<Device>,
    /// `(target, path)`.
    pub links: Vec<(String, String)>,
    pub rules: Vec<DeviceRule>,
    /// How many of the rules are the specification's own.
    pub specified: usize,
}

/// With `dev_is_bind` the container's `/dev` is a directory of the host, in which nothing is
/// created. The rules are the same.
pub(super) fn read(spec: &Document, dev_is_bind: bool, host: &Host) -> Result<Devices, Error> {
    let own = nodes(spec)?;
    let replaced = |path: &str| own.iter().any(|device| device.path == path);

    let mut rules = rules(spec)?;
    let specified = rules.len();
    // runc appends these after the specification's rules, so that no client can forbid them.
    rules.push(allow(DeviceKind::Char, None, None, "m"));
    rules.push(allow(DeviceKind::Block, None, None, "m"));
    let mut nodes = Vec::new();
    for (path, major, minor) in DEFAULT_NODES {
        if !replaced(path) {
            nodes.push(Device {
                path: path.to_owned(),
                mode: libc::S_IFCHR | 0o666,
                major,
                minor,
                uid: 0,
                gid: 0,
            });
            rules.push(allow(DeviceKind::Char, Some(major), Some(minor), "rwm"));
        }
    }
    // Pseudo terminals, /dev/ptmx, and /dev/net/tun.
    rules.push(allow(DeviceKind::Char, Some(136), None, "rwm"));
    rules.push(allow(DeviceKind::Char, Some(5), Some(2), "rwm"));
    rules.push(allow(DeviceKind::Char, Some(10), Some(200), "rwm"));

    if dev_is_bind {
        return Ok(Devices { nodes: Vec::new(), links: Vec::new(), rules, specified });
    }
    // /dev/ptmx is a link, whatever the specification lists.
    nodes.extend(own.into_iter().filter(|device| device.path != "/dev/ptmx"));
    let mut links = vec![
        ("pts/ptmx", "/dev/ptmx"),
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ];
    if host.kcore {
        links.push(("/proc/kcore", "/dev/core"));
    }
    let links =
        links.into_iter().map(|(target, path)| (target.to_owned(), path.to_owned())).collect();
    Ok(Devices { nodes, links, rules, specified })
}

fn allow(kind: DeviceKind, major: Option<u32>, minor: Option<u32>, access: &str) -> DeviceRule {
    DeviceRule { allow: true, kind, major, minor, access: access.to_owned() }
}

fn nodes(spec: &Document) -> Result<Vec<Device>, Error> {
    spec.list::<LinuxDevice>("linux.devices")?
        .into_iter()
        .map(|item| {
            let (field, device) = (item.field, item.value);
            if !device.path().is_absolute() {
                return Err(Error::invalid(format!("{field}.path"), "must be absolute"));
            }
            let kind = match device.typ() {
                Type::C | Type::U => libc::S_IFCHR,
                Type::B => libc::S_IFBLK,
                Type::P => libc::S_IFIFO,
                Type::A => {
                    return Err(Error::invalid(format!("{field}.type"), "must be c, u, b or p"));
                }
            };
            let number = |name: &str, value: i64| {
                u32::try_from(value).map_err(|_| {
                    Error::invalid(format!("{field}.{name}"), "is not a device number")
                })
            };
            Ok(Device {
                path: device.path().to_string_lossy().into_owned(),
                mode: kind | (device.file_mode().unwrap_or(0o666) & 0o7777),
                major: number("major", device.major())?,
                minor: number("minor", device.minor())?,
                uid: device.uid().unwrap_or(0),
                gid: device.gid().unwrap_or(0),
            })
        })
        .collect()
}

/// `linux.resources.devices`.
pub(super) fn rules(spec: &Document) -> Result<Vec<DeviceRule>, Error> {
    spec.list::<LinuxDeviceCgroup>("linux.resources.devices")?
        .into_iter()
        .map(|item| {
            let (field, rule) = (item.field, item.value);
            let access = rule.access().clone().unwrap_or_default();
            if access.is_empty() || access.chars().any(|c| !"rwm".contains(c)) {
                return Err(Error::invalid(
                    format!("{field}.access"),
                    "must be of the letters r, w and m",
                ));
            }
            let kind = match rule.typ() {
                None | Some(Type::A) => DeviceKind::All,
                Some(Type::C) => DeviceKind::Char,
                Some(Type::B) => DeviceKind::Block,
                Some(Type::U | Type::P) => {
                    return Err(Error::invalid(format!("{field}.type"), "must be a, b or c"));
                }
            };
            let number = |name: &str, value: Option<i64>| match value {
                // runc's sign for all.
                None | Some(-1) => Ok(None),
                Some(value) => u32::try_from(value).map(Some).map_err(|_| {
                    Error::invalid(format!("{field}.{name}"), "is not a device number")
                }),
            };
            // In one order: LXC compares it as text.
            let access: String = "rwm".chars().filter(|c| access.contains(*c)).collect();
            let (major, minor) = (number("major", rule.major())?, number("minor", rule.minor())?);
            // Without a type, or with type a, a rule is for all devices whatever else it says; to
            // deny more than was meant is safe, to allow more is not.
            let all_of_all = major.is_none() && minor.is_none() && access == "rwm";
            if kind == DeviceKind::All && rule.allow() && !all_of_all {
                return Err(Error::invalid(
                    format!("{field}.type"),
                    "must be b or c in a rule that allows only some devices or some access",
                ));
            }
            Ok(DeviceRule { allow: rule.allow(), kind, major, minor, access })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::host;
    use super::*;

    fn read_json(linux: &str, dev_is_bind: bool) -> Result<Devices, String> {
        let json = format!(r#"{{"linux":{linux}}}"#);
        read(&Document::parse(json.as_bytes()).unwrap(), dev_is_bind, &host())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn defaults_without_any_device() {
        let devices = read_json("{}", false).unwrap();
        let paths: Vec<_> = devices.nodes.iter().map(|device| device.path.as_str()).collect();
        assert_eq!(
            paths,
            ["/dev/null", "/dev/random", "/dev/full", "/dev/tty", "/dev/zero", "/dev/urandom"]
        );
        assert!(devices.nodes.iter().all(|device| device.mode == libc::S_IFCHR | 0o666));
        assert_eq!(devices.links.len(), 6);
        assert_eq!(devices.links[0], ("pts/ptmx".to_owned(), "/dev/ptmx".to_owned()));
        assert_eq!(devices.rules.len(), 11);
        assert!(devices.rules.iter().all(|rule| rule.allow));
        assert_eq!(devices.rules[0], allow(DeviceKind::Char, None, None, "m"));
    }

    #[test]
    fn a_bind_mounted_dev_is_left_alone() {
        let devices =
            read_json(r#"{"devices":[{"path":"/dev/x","type":"c","major":1,"minor":3}]}"#, true)
                .unwrap();
        assert!(devices.nodes.is_empty() && devices.links.is_empty());
        assert_eq!(devices.rules.len(), 11);
    }

    #[test]
    fn own_devices_replace_defaults() {
        let devices = read_json(
            r#"{"devices":[
                {"path":"/dev/null","type":"u","major":1,"minor":3,"fileMode":8624,"uid":5,"gid":6},
                {"path":"/dev/sda","type":"b","major":8,"minor":0},
                {"path":"/dev/ptmx","type":"c","major":5,"minor":2},
                {"path":"/run/fifo","type":"p"}]}"#,
            false,
        )
        .unwrap();
        let device = |path: &str, mode, major, minor, uid, gid| Device {
            path: path.to_owned(),
            mode,
            major,
            minor,
            uid,
            gid,
        };
        assert_eq!(
            devices.nodes[5..],
            [
                device("/dev/null", libc::S_IFCHR | 0o660, 1, 3, 5, 6),
                device("/dev/sda", libc::S_IFBLK | 0o666, 8, 0, 0, 0),
                device("/run/fifo", libc::S_IFIFO | 0o666, 0, 0, 0, 0),
            ]
        );
        assert!(!devices.rules.iter().any(|rule| rule.major == Some(1) && rule.minor == Some(3)));
    }

    #[test]
    fn rules_come_before_the_defaults() {
        let devices = read_json(
            r#"{"resources":{"devices":[{"allow":false,"access":"rwm"},
                {"allow":true,"type":"b","major":8,"minor":-1,"access":"r"}]}}"#,
            false,
        )
        .unwrap();
        assert_eq!(
            devices.rules[..2],
            [
                DeviceRule {
                    allow: false,
                    kind: DeviceKind::All,
                    major: None,
                    minor: None,
                    access: "rwm".to_owned(),
                },
                allow(DeviceKind::Block, Some(8), None, "r"),
            ]
        );
        assert_eq!(devices.rules.len(), 13);
    }

    #[test]
    fn wrong_devices_are_refused() {
        for (linux, expected) in [
            (r#"{"devices":[{"path":"x","type":"c"}]}"#, "linux.devices[0].path must be absolute"),
            (r#"{"devices":[{"path":"/x","type":"a"}]}"#, "linux.devices[0].type must be"),
            (
                r#"{"devices":[{"path":"/x","type":"c","major":-2}]}"#,
                "linux.devices[0].major is not",
            ),
            (r#"{"devices":[{"path":"/x","type":"q"}]}"#, "linux.devices[0]: unknown variant"),
            (
                r#"{"resources":{"devices":[{"allow":true}]}}"#,
                "linux.resources.devices[0].access must be",
            ),
            (
                r#"{"resources":{"devices":[{"allow":true,"access":"r\nx"}]}}"#,
                "linux.resources.devices[0].access must be",
            ),
            (
                r#"{"resources":{"devices":[{"allow":true,"type":"p","access":"r"}]}}"#,
                "linux.resources.devices[0].type must be",
            ),
            (
                r#"{"resources":{"devices":[{"allow":true,"major":10,"minor":229,"access":"rwm"}]}}"#,
                "linux.resources.devices[0].type must be b or c",
            ),
            (
                r#"{"resources":{"devices":[{"allow":true,"type":"a","access":"r"}]}}"#,
                "linux.resources.devices[0].type must be b or c",
            ),
        ] {
            let error = read_json(linux, false).err().unwrap();
            assert!(error.starts_with(expected), "{linux}: {error}");
        }
    }
}
