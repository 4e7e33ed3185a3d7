//! Whole specifications, as real clients write them.

use std::path::Path;

use nix::libc;
use proxmox_shim_init::protocol::{CgroupHierarchy, MountSource};

use super::plan::{DeviceKind, Limit, Namespace, PlannedMount};
use super::*;

/// A hybrid cgroup v1 host without AppArmor; `/host/ns/*` are its namespaces.
pub(super) fn host() -> Host {
    let hierarchy = |name: &str, options: &str, unified| CgroupHierarchy {
        name: name.to_owned(),
        options: options.to_owned(),
        unified,
    };
    Host {
        cgroups: Cgroups::V1 {
            hierarchies: vec![hierarchy("memory", "memory", false), hierarchy("unified", "", true)],
        },
        apparmor: false,
        lacks_profile: |name| name == "missing",
        last_capability: 40,
        kcore: true,
        unprivileged: false,
        is_own_namespace: |kind, path| path == Path::new("/host/ns").join(kind),
    }
}

/// A cgroup2 host with AppArmor, as Proxmox VE is.
fn node() -> Host {
    Host { cgroups: Cgroups::V2, apparmor: true, ..host() }
}

fn fixture(json: &str, host: &Host) -> Plan {
    plan(json.as_bytes(), Path::new("/bundle"), host).unwrap()
}

const DEFAULT: &str = include_str!("fixtures/ctr-default.json");
const FLAGS: &str = include_str!("fixtures/ctr-flags.json");
const PRIVILEGED: &str = include_str!("fixtures/ctr-privileged.json");
const CONTAINER: &str = include_str!("fixtures/kubernetes-container.json");
const SANDBOX: &str = include_str!("fixtures/kubernetes-sandbox.json");
const MINIMAL: &str = include_str!("fixtures/minimal.json");

fn binds(plan: &Plan) -> Vec<(&str, &[u64])> {
    plan.mounts
        .iter()
        .filter_map(|mount| match mount {
            PlannedMount::Bind { destination, propagation, .. } => {
                Some((destination.as_str(), propagation.as_slice()))
            }
            PlannedMount::Init(_) | PlannedMount::OfNamespace { .. } => None,
        })
        .collect()
}

#[test]
fn ctr_default() {
    let plan = fixture(DEFAULT, &host());
    assert_eq!(plan.warnings, Vec::<String>::new());
    assert_eq!(plan.process.args, ["/bin/echo", "hi"]);
    assert_eq!(plan.root_path, Path::new("/srv/rootfs"));
    assert_eq!(plan.process.capabilities.bounding, 0xa804_25fb);
    assert_eq!(plan.process.capabilities.ambient, 0);
    assert!(plan.process.no_new_privileges && plan.process.seccomp.is_none());
    assert_eq!(plan.namespaces.network, Namespace::New);
    assert_eq!(plan.namespaces.cgroup, Namespace::Host);
    assert_eq!(plan.mounts.len(), 7);
    assert_eq!(plan.devices.len(), 6);
    assert_eq!(plan.links.len(), 6);
    assert_eq!(plan.device_rules.len(), 10 + 11);
    assert_eq!(plan.cgroups_path.as_deref(), Some("default/ctr-default"));
    assert_eq!(plan.resources, plan::Resources::default());
    assert_eq!((plan.masked_paths.len(), plan.readonly_paths.len()), (10, 5));
    assert_eq!((plan.hostname, plan.root_propagation, plan.root_readonly), (None, None, false));
}

#[test]
fn ctr_with_many_flags() {
    let plan = fixture(FLAGS, &host());
    assert_eq!(plan.warnings, Vec::<String>::new());
    assert_eq!(plan.process.env, ["PATH=/bin", "A=1", "B=x y"]);
    assert_eq!(plan.process.cwd, "/tmp");
    let caps = plan.process.capabilities.bounding;
    assert_eq!(caps, (0xa804_25fb | 1 << 21) & !1);
    assert!(!plan.process.no_new_privileges && plan.root_readonly);
    assert_eq!(plan.process.seccomp.as_ref().unwrap().flags, 4);
    assert_eq!(plan.namespaces.network, Namespace::Host);
    assert_eq!(plan.namespaces.uts, Namespace::Path("/proc/1/ns/uts".into()));
    assert_eq!(plan.resources.memory_limit, Some(Limit::Value(64 << 20)));
    assert_eq!(plan.resources.memory_swap, None);
    assert_eq!(plan.resources.cpu_shares, Some(512));
    assert_eq!(plan.resources.cpu_quota, Some(Limit::Value(150_000)));
    assert_eq!(plan.resources.cpu_period, Some(100_000));
    // The device asked for takes the place of the default one.
    assert_eq!(plan.devices.iter().filter(|device| device.path == "/dev/full").count(), 1);
    let slave = libc::MS_SLAVE | libc::MS_REC;
    assert_eq!(
        binds(&plan),
        [("/host", &[slave][..]), ("/etc/hosts", &[slave]), ("/etc/resolv.conf", &[slave])]
    );
    assert_eq!(plan.annotations["a"], "b");
}

#[test]
fn ctr_privileged() {
    let plan = fixture(PRIVILEGED, &host());
    assert_eq!(plan.root_propagation, Some(libc::MS_SHARED | libc::MS_REC));
    // What the client may do depends on the machine that the fixture was made on.
    assert_ne!(plan.process.capabilities.effective & 1 << 21, 0);
    let last_all = plan.device_rules.iter().rfind(|rule| rule.kind == DeviceKind::All).unwrap();
    assert!(last_all.allow);
    assert!(plan.devices.iter().any(|device| device.mode == libc::S_IFBLK | 0o600));
    assert!(plan.devices.iter().all(|device| device.path != "/dev/ptmx"));
    assert!(plan.masked_paths.is_empty() && plan.readonly_paths.is_empty());
}

#[test]
fn kubernetes_container() {
    let plan = fixture(CONTAINER, &node());
    assert_eq!(plan.warnings, Vec::<String>::new());
    assert_eq!(plan.image.as_deref(), Some("registry.k8s.io/nginx:1.27"));
    assert_eq!(
        plan.cgroups_path.as_deref(),
        Some(
            "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podp.slice/\
             cri-containerd-web1.scope"
        )
    );
    assert_eq!(plan.process.apparmor_profile.as_deref(), Some("cri-containerd.apparmor.d"));
    assert_eq!(plan.process.oom_score_adj, Some(969));
    assert_eq!(plan.namespaces.network, Namespace::Path("/proc/4242/ns/net".into()));
    assert_eq!(plan.namespaces.cgroup, Namespace::New);
    assert_eq!(plan.resources.hugepages, [("2MB".to_owned(), 0), ("1GB".to_owned(), 0)]);
    assert_eq!(plan.resources.unified["memory.oom.group"], "1");
    let cgroup = plan.mounts.iter().find_map(|mount| match mount {
        PlannedMount::Init(mount) => match &mount.source {
            MountSource::Cgroup { flags, hierarchies } => Some((*flags, hierarchies.len())),
            _ => None,
        },
        PlannedMount::Bind { .. } | PlannedMount::OfNamespace { .. } => None,
    });
    let (flags, hierarchies) = cgroup.unwrap();
    assert_ne!(flags & libc::MS_RDONLY, 0);
    assert_eq!(hierarchies, 0);
    assert_eq!(binds(&plan).len(), 5);

    let error = plan_error(CONTAINER, &Host { apparmor: false, ..node() });
    assert_eq!(
        error,
        "process.apparmorProfile is not supported: AppArmor is not enabled on this host; enable \
         it or leave the profile out"
    );
    let error = plan_error(&CONTAINER.replace("cri-containerd.apparmor.d", "missing"), &node());
    assert_eq!(
        error,
        "process.apparmorProfile is \"missing\", which is not loaded here: use apparmor_parser(8)"
    );
}

fn plan_error(json: &str, host: &Host) -> String {
    plan(json.as_bytes(), Path::new("/bundle"), host).unwrap_err().to_string()
}

#[test]
fn kubernetes_sandbox() {
    let plan = fixture(SANDBOX, &node());
    assert_eq!(plan.warnings, Vec::<String>::new());
    assert_eq!(plan.hostname.as_deref(), Some("web-0"));
    assert_eq!(plan.sysctls.len(), 2);
    assert_eq!(plan.process.oom_score_adj, Some(-998));
    assert_eq!(plan.image.as_deref(), Some("registry.k8s.io/pause:3.10"));
    assert_eq!(plan.resources.cpu_shares, Some(2));
}

#[test]
fn minimal_specification_with_only_a_mount_namespace() {
    let plan = fixture(MINIMAL, &host());
    assert_eq!(plan.warnings, Vec::<String>::new());
    assert_eq!(plan.root_path, Path::new("/bundle/rootfs"));
    assert_eq!(plan.process.capabilities, Default::default());
    assert_eq!(
        plan.namespaces,
        plan::Namespaces {
            pid: Namespace::Host,
            network: Namespace::Host,
            ipc: Namespace::Host,
            uts: Namespace::Host,
            cgroup: Namespace::Host,
            time: Namespace::Host,
        }
    );
    assert_eq!(plan.cgroups_path, None);
    assert_eq!(plan.oci_version, "1.1.0");
    assert_eq!(plan.device_rules.len(), 11);
}

#[test]
fn cgroup_v1_is_never_mounted_without_a_cgroup_namespace() {
    let mut spec: serde_json::Value = serde_json::from_str(CONTAINER).unwrap();
    spec["linux"]["namespaces"].as_array_mut().unwrap().pop();
    spec["linux"]["resources"]["unified"] = serde_json::Value::Null;
    let apparmor = |host: Host| Host { apparmor: true, ..host };
    let on_v1 = fixture(&spec.to_string(), &apparmor(host()));
    assert_eq!(on_v1.namespaces.cgroup, Namespace::New);
    assert_eq!(on_v1.warnings.len(), 1);
    assert_eq!(fixture(&spec.to_string(), &node()).namespaces.cgroup, Namespace::Host);
}

#[test]
fn the_host_s_own_namespace_by_path_is_the_host_s() {
    let mut spec: serde_json::Value = serde_json::from_str(SANDBOX).unwrap();
    spec["linux"]["namespaces"][4]["path"] = "/host/ns/net".into();
    assert!(plan_error(&spec.to_string(), &node()).contains("would change the host's network"));
    spec["linux"]["namespaces"][2]["path"] = "/host/ns/uts".into();
    assert!(plan_error(&spec.to_string(), &node()).starts_with("hostname needs an own uts"));
}

#[test]
fn load_reads_the_bundle_and_names_the_file() {
    let bundle = tempfile::tempdir().unwrap();
    let load = |bundle: &Path| load(bundle, false, &Programs::default());
    let error = load(bundle.path()).unwrap_err();
    assert!(matches!(error, Error::Read { ref path, .. } if path.ends_with("config.json")));
    std::fs::write(bundle.path().join("config.json"), MINIMAL).unwrap();
    assert_eq!(load(bundle.path()).unwrap().root_path, bundle.path().join("rootfs"));
    let huge = std::fs::File::create(bundle.path().join("config.json")).unwrap();
    huge.set_len(MAX_SPEC_BYTES + 1).unwrap();
    assert!(matches!(load(bundle.path()), Err(Error::TooLarge { .. })));
}

mod hostile {
    use proptest::prelude::*;

    use super::*;

    /// Replaces the string at one place of a fixture.
    fn mutate(value: &mut serde_json::Value, pick: &mut usize, text: &str) {
        match value {
            serde_json::Value::String(s) => {
                if *pick == 0 {
                    *s = text.to_owned();
                }
                *pick = pick.wrapping_sub(1);
            }
            serde_json::Value::Array(values) => {
                values.iter_mut().for_each(|value| mutate(value, pick, text));
            }
            serde_json::Value::Object(values) => {
                values.values_mut().for_each(|value| mutate(value, pick, text));
            }
            _ => {}
        }
    }

    proptest! {
        #[test]
        fn any_bytes_give_an_answer(json in proptest::collection::vec(any::<u8>(), 0..256)) {
            let _ = plan(&json, Path::new("/bundle"), &host());
        }

        #[test]
        fn any_string_anywhere_gives_an_answer(pick in 0usize..160, text in "\\PC*|[\\x00-\\x20./=,:]*") {
            let mut spec = serde_json::from_str(CONTAINER).unwrap();
            mutate(&mut spec, &mut { pick }, &text);
            if let Ok(plan) = plan(spec.to_string().as_bytes(), Path::new("/bundle"), &node()) {
                let cgroup = plan.cgroups_path.unwrap_or_default();
                prop_assert!(!cgroup.starts_with('/') && !cgroup.contains(['\n', ' ']));
                prop_assert!(cgroup.split('/').all(|part| part != ".."));
                prop_assert!(!plan.process.args.iter().any(|arg| arg.contains('\0')));
            }
        }
    }
}
