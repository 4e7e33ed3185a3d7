use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::oci::plan::{IdMapping, IdMappings};
use crate::oci::{self, Cgroups, Host};

fn layout() -> Layout {
    Layout {
        vmid: 90001,
        rootfs: "/run/containerd/task/default/web/rootfs".into(),
        run_dir: "/run/containerd-shim-proxmox/default/web".into(),
        init: "/usr/libexec/containerd-shim-proxmox/proxmox-shim-init".into(),
        keeps_exit_status: true,
        cgroups: CgroupVersion::V2,
        apparmor: true,
    }
}

fn plan(fixture: &str) -> Plan {
    let host = Host {
        cgroups: Cgroups::V2,
        apparmor: true,
        lacks_profile: |_| false,
        last_capability: 40,
        kcore: true,
        unprivileged: false,
        is_own_namespace: |_, _| false,
    };
    oci::plan(fixture.as_bytes(), Path::new("/bundle"), &host).unwrap()
}

const DEFAULT: &str = include_str!("../../oci/fixtures/ctr-default.json");
const PRIVILEGED: &str = include_str!("../../oci/fixtures/ctr-privileged.json");
const FLAGS: &str = include_str!("../../oci/fixtures/ctr-flags.json");
const CONTAINER: &str = include_str!("../../oci/fixtures/kubernetes-container.json");
const MINIMAL: &str = include_str!("../../oci/fixtures/minimal.json");

/// Compares with a file of `src/lxc/snapshots`; `UPDATE_SNAPSHOTS=1` writes it instead.
fn assert_snapshot(name: &str, text: &str) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lxc/snapshots");
    let path = directory.join(name).with_extension("conf");
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(expected == text, "{} differs from\n{text}", path.display());
}

#[test]
fn snapshot_of_ctr_s_default() {
    assert_snapshot("default", &render(&plan(DEFAULT), &layout()).unwrap());
    let v1 = Layout { cgroups: CgroupVersion::V1, apparmor: false, ..layout() };
    assert_snapshot("default-v1", &render(&plan(DEFAULT), &v1).unwrap());
}

#[test]
fn snapshot_of_a_privileged_container() {
    assert_snapshot("privileged", &render(&plan(PRIVILEGED), &layout()).unwrap());
}

#[test]
fn who_else_tells_the_exit_status_is_asked_only_if_needed() {
    let has = |fixture, layout: &Layout| {
        let text = render(&plan(fixture), layout).unwrap();
        text.contains("\nlxc.hook.start-host = /")
    };
    assert!(!has(DEFAULT, &layout()));
    assert!(has(DEFAULT, &Layout { keeps_exit_status: false, ..layout() }));
    // It may reboot.
    assert!(has(PRIVILEGED, &layout()));
}

#[test]
fn snapshot_with_the_host_s_network() {
    assert_snapshot("host-network", &render(&plan(FLAGS), &layout()).unwrap());
}

#[test]
fn snapshot_of_joined_namespaces_and_a_pod_s_cgroup() {
    assert_snapshot("kubernetes", &render(&plan(CONTAINER), &layout()).unwrap());
}

#[test]
fn snapshot_of_host_namespaces_only() {
    assert_snapshot("minimal", &render(&plan(MINIMAL), &layout()).unwrap());
}

#[test]
fn snapshot_of_user_namespaces() {
    let mut plan = plan(DEFAULT);
    let mapping = |container, host, size| IdMapping { container, host, size };
    plan.user_namespace = Some(UserNamespace {
        path: None,
        mappings: IdMappings {
            uids: vec![mapping(0, 100_000, 1000), mapping(1000, 7, 1)],
            gids: vec![mapping(0, 200_000, 65_536)],
        },
    });
    assert_snapshot("user-namespace", &render(&plan, &layout()).unwrap());
    plan.user_namespace.as_mut().unwrap().path = Some("/proc/7/ns/user".into());
    let text = render(&plan, &layout()).unwrap();
    assert!(text.contains("\nlxc.namespace.share.user = /proc/7/ns/user\n"), "{text}");
    assert!(text.contains("\nlxc.namespace.keep = time"), "{text}");
}

#[test]
fn snapshot_of_hostile_names() {
    let mut plan = plan(CONTAINER);
    plan.namespaces.network = Namespace::Path("/run/netns/a b' = \"c\" # x".into());
    plan.hostname = Some("x\nlxc.hook.start = /bin/sh".to_owned());
    plan.process.args = vec!["x\nlxc.hook.start = /bin/sh".to_owned()];
    plan.process.env = vec!["A=x\nlxc.hook.start = /bin/sh".to_owned()];
    let hostile = Layout {
        rootfs: "/bundles/a b/$(id)/`id`/'q'/\\040/rootfs".into(),
        run_dir: "/run/a b/$(id);'\"\\040#".into(),
        init: "/opt/in it/$HOME/'init".into(),
        ..layout()
    };
    assert_snapshot("hostile", &render(&plan, &hostile).unwrap());
}

#[test]
fn values_that_the_parser_would_change_are_refused() {
    for path in ["/a\nlxc.hook.start = /bin/sh", "/a\r", "/a\tb", "/a\u{85}", "/a\0"] {
        for hostile in [
            Layout { rootfs: path.into(), ..layout() },
            Layout { run_dir: path.into(), ..layout() },
            Layout { init: path.into(), ..layout() },
        ] {
            let error = render(&plan(DEFAULT), &hostile).unwrap_err();
            assert!(matches!(error, Error::Value { .. }), "{path:?}: {error}");
        }
    }
    assert!(render(&plan(DEFAULT), &Layout { rootfs: "/a ".into(), ..layout() }).is_err());
    let relative = Layout { rootfs: "rootfs".into(), ..layout() };
    assert!(matches!(render(&plan(DEFAULT), &relative), Err(Error::Path { .. })));
    let mut outside = plan(DEFAULT);
    for path in ["a/../../b", "/a"] {
        outside.cgroups_path = Some(path.to_owned());
        assert!(render(&outside, &layout()).is_err(), "{path}");
    }
}

/// Every key that may appear.
fn is_known_key(key: &str) -> bool {
    const MORE: [&str; 26] = [
        "lxc.idmap",
        "lxc.init.uid",
        "lxc.init.gid",
        "lxc.no_new_privs",
        "lxc.apparmor.profile",
        "lxc.autodev",
        "lxc.pty.max",
        "lxc.tty.max",
        "lxc.console.path",
        "lxc.rootfs.path",
        "lxc.init.cmd",
        "lxc.signal.halt",
        "lxc.hook.version",
        "lxc.hook.stop",
        "lxc.hook.post-stop",
        "lxc.cgroup.relative",
        "lxc.cgroup.dir.monitor",
        "lxc.cgroup.dir.container",
        "lxc.cgroup.dir.container.inner",
        "lxc.cgroup.devices.allow",
        "lxc.cgroup.devices.deny",
        "lxc.cgroup2.devices.allow",
        "lxc.cgroup2.devices.deny",
        "lxc.log.level",
        "lxc.log.file",
        "lxc.mount.entry",
    ];
    CLEARED.contains(&key) || MORE.contains(&key)
}

proptest! {
    /// Whatever the strings, each line has a known key, and no key has more values than it should.
    #[test]
    fn no_string_can_make_a_line(
        rootfs in "(?s)/.*", run_dir in "(?s)/.*", init in "(?s)/.*", netns in "(?s)/.*",
        cgroup in "(?s).*", hostname in "(?s).*", access in "(?s).*",
    ) {
        let mut plan = plan(DEFAULT);
        plan.namespaces.network = Namespace::Path(netns.into());
        plan.cgroups_path = Some(cgroup);
        plan.hostname = Some(hostname.clone());
        plan.process.args = vec![hostname];
        plan.device_rules[3].access = access;
        let layout = Layout {
            keeps_exit_status: false,
            rootfs: rootfs.into(), run_dir: run_dir.into(), init: init.into(), ..layout()
        };
        let Ok(text) = render(&plan, &layout) else { return Ok(()) };
        let reference = render(&super::tests::plan(DEFAULT), &super::tests::layout()).unwrap();
        // Two lines more than the reference: the joined network namespace and a hook.
        prop_assert_eq!(text.lines().count(), reference.lines().count() + 2);
        for line in text.split(['\n', '\r', '\u{b}', '\u{c}']).filter(|line| !line.is_empty()) {
            let key = line.split_once(" =").unwrap().0;
            prop_assert!(is_known_key(key), "{}", key);
        }
        prop_assert_eq!(text.matches("\nlxc.mount.entry = ").count(), 3);
        for hook in ["start-host", "stop"] {
            prop_assert_eq!(text.matches(&format!("\nlxc.hook.{hook} = /")).count(), 1);
        }
    }
}
