//! Pod sandboxes through containerd's Sandbox service.

use std::fs;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::sandbox_api as api;
use k8s_cri::v1::{
    IdMapping, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption,
    PodSandboxConfig, UserNamespace,
};
use serde_json::{Value, json};

use crate::harness::direct::{Driver, Refusal, Shim, Stdio3, code};
use crate::harness::process::{self, eventually};
use crate::harness::test::Test;
use crate::suites::cases;
use crate::suites::pods::{IDLE, Netns, exec, namespace, own_namespace, refused};

cases!("sandbox":; proxmox:
    a_sandbox_lives_and_ends,
    members_share_what_they_ask_for,
    a_pod_may_have_its_own_ids,
    stopping_ends_the_pod,
    stopping_gives_up_what_is_being_created,
    a_delete_ends_a_shim_that_lives,
    states_that_do_not_allow_it_are_refused,
    what_cannot_be_had_is_refused_and_leaves_nothing,
    texts_of_any_length_and_kind_stay_texts,
    a_placeholder_needs_a_sandbox,
    an_end_from_outside_is_seen,
);

/// A shim for a sandbox of this id; the bundle holds nothing but annotations.
fn start(driver: &Driver, id: &str) -> Sandbox {
    let spec = json!({"ociVersion": "1.0.2", "annotations": {"a": "b"}});
    Sandbox { shim: driver.start(id, &spec) }
}

struct Sandbox {
    shim: Shim,
}

impl Sandbox {
    fn call<Res: Message>(&self, method: &str, request: &impl Message) -> Result<Res, Refusal> {
        self.shim.call_service("containerd.runtime.sandbox.v1.Sandbox", method, request)
    }

    fn create(&self, network: &str) -> Result<api::CreateSandboxResponse, Refusal> {
        let request = api::CreateSandboxRequest {
            sandbox_id: self.shim.id.clone(),
            bundle_path: self.shim.bundle.display().to_string(),
            netns_path: network.to_owned(),
            ..Default::default()
        };
        self.call("CreateSandbox", &request)
    }

    fn start(&self) -> Result<api::StartSandboxResponse, Refusal> {
        let id = self.shim.id.clone();
        self.call(
            "StartSandbox",
            &api::StartSandboxRequest { sandbox_id: id, ..Default::default() },
        )
    }

    fn stop(&self) -> Result<api::StopSandboxResponse, Refusal> {
        let id = self.shim.id.clone();
        self.call("StopSandbox", &api::StopSandboxRequest { sandbox_id: id, ..Default::default() })
    }

    fn wait(&self) -> Result<api::WaitSandboxResponse, Refusal> {
        let id = self.shim.id.clone();
        self.call("WaitSandbox", &api::WaitSandboxRequest { sandbox_id: id, ..Default::default() })
    }

    fn status(&self) -> Result<api::SandboxStatusResponse, Refusal> {
        let id = self.shim.id.clone();
        let request =
            api::SandboxStatusRequest { sandbox_id: id, verbose: true, ..Default::default() };
        self.call("SandboxStatus", &request)
    }

    fn ping(&self) -> Result<api::PingResponse, Refusal> {
        let id = self.shim.id.clone();
        self.call("PingSandbox", &api::PingRequest { sandbox_id: id, ..Default::default() })
    }

    fn metrics(&self) -> Result<api::SandboxMetricsResponse, Refusal> {
        let id = self.shim.id.clone();
        let request = api::SandboxMetricsRequest { sandbox_id: id, ..Default::default() };
        self.call("SandboxMetrics", &request)
    }

    fn shut_down(&self) -> Result<api::ShutdownSandboxResponse, Refusal> {
        let id = self.shim.id.clone();
        let request = api::ShutdownSandboxRequest { sandbox_id: id, ..Default::default() };
        self.call("ShutdownSandbox", &request)
    }

    /// Creates and starts it; its pid.
    fn run(&self, network: &str) -> u32 {
        self.create(network).expect("create the sandbox");
        self.start().expect("start the sandbox").pid
    }

    /// A member with these entries of `linux.namespaces`.
    fn member(&self, driver: &Driver, id: &str, namespaces: &Value) -> Shim {
        let mut spec = driver.spec(id, &IDLE);
        spec["linux"]["namespaces"] = namespaces.clone();
        driver.join(id, &spec, &self.shim)
    }

    /// Shutdown, and the end of the shim.
    fn finish(&self, driver: &Driver) {
        let pid = self.shim.connect().expect("connect").shim_pid;
        self.shut_down().expect("shut down");
        eventually("the shim ends", Duration::from_secs(5), || {
            (!process::is_alive(pid)).then_some(())
        });
        driver.remove_bundle(&self.shim.id);
    }
}

/// Of the figures that containerd knows by these types.
fn memory_and_processes(figures: &Any) -> (u64, u64) {
    use containerd_shim_protos::{cgroups, cgroups_v2};
    match figures.type_url.as_str() {
        "io.containerd.cgroups.v1.Metrics" => {
            let all = cgroups::metrics::Metrics::parse_from_bytes(&figures.value).expect("v1");
            (all.memory.usage.usage, all.pids.current)
        }
        "io.containerd.cgroups.v2.Metrics" => {
            let all = cgroups_v2::metrics::Metrics::parse_from_bytes(&figures.value).expect("v2");
            (all.memory.usage, all.pids.current)
        }
        other => panic!("figures of the type {other:?}"),
    }
}

fn seconds(
    time: Option<&containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp>,
) -> i64 {
    time.map_or(0, |time| time.seconds)
}

fn now() -> i64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970");
    now.as_secs() as i64
}

fn a_sandbox_lives_and_ends(t: &Test) {
    let driver = t.driver();
    let network = Netns::new();
    let sandbox = start(&driver, &t.id("pod"));
    sandbox.create(&network.path()).expect("create");
    let status = sandbox.status().expect("status");
    assert_eq!(status.state, "SANDBOX_NOTREADY", "created is not started");
    refused(sandbox.ping(), "FailedPrecondition", "is not running");

    let started = sandbox.start().expect("start");
    assert!(process::is_alive(started.pid));
    assert!((now() - seconds(started.created_at.as_ref())).abs() < 60);
    sandbox.ping().expect("ping");
    let status = sandbox.status().expect("status");
    assert_eq!((status.state.as_str(), status.pid), ("SANDBOX_READY", started.pid));
    assert_eq!(status.created_at, started.created_at);
    assert!(status.exited_at.is_none());
    assert_eq!(status.info["pid"], started.pid.to_string());
    assert_eq!(status.info["state"], "SANDBOX_READY");
    assert_eq!(status.info["networkSandboxPath"], network.path());
    assert_eq!(
        namespace(started.pid, "net"),
        fs::read_link(network.path()).expect("readlink").display().to_string()
    );
    for kind in ["ipc", "uts", "pid"] {
        assert_ne!(namespace(started.pid, kind), own_namespace(kind), "{kind}");
    }
    let platform: api::PlatformResponse =
        sandbox.call("Platform", &api::PlatformRequest::new()).expect("platform");
    let platform = platform.platform.into_option().expect("a platform");
    assert_eq!(platform.os, "linux");
    assert!(["amd64", "arm64"].contains(&platform.architecture.as_str()));
    let metrics = sandbox.metrics().expect("metrics").metrics.into_option().expect("figures");
    assert_eq!(metrics.id, sandbox.shim.id);
    // The holder is the only process in it, and uses some memory.
    let (memory, processes) = memory_and_processes(&metrics.data.into_option().expect("data"));
    assert!((4 << 10..8 << 20).contains(&memory), "{memory} bytes");
    assert_eq!(processes, 1);

    // Neither Shutdown of the Task service nor its absence of tasks ends it.
    sandbox.shim.shutdown();
    sandbox.ping().expect("ping");
    let waiting = std::thread::spawn({
        let sandbox = Sandbox { shim: sandbox.shim.clone() };
        move || sandbox.wait()
    });
    sandbox.stop().expect("stop");
    let ended = waiting.join().expect("the thread ends").expect("wait");
    assert_eq!(ended.exit_status, 0);
    assert!((now() - seconds(ended.exited_at.as_ref())).abs() < 60);
    let status = sandbox.status().expect("status");
    assert_eq!((status.state.as_str(), status.pid), ("SANDBOX_NOTREADY", started.pid));
    assert_eq!(status.exited_at, ended.exited_at);
    sandbox.stop().expect("stop again");
    assert_eq!(sandbox.wait().expect("wait again"), ended);
    assert!(!process::is_alive(started.pid));
    sandbox.finish(&driver);
}

fn members_share_what_they_ask_for(t: &Test) {
    let driver = t.driver();
    let network = Netns::new();
    let sandbox = start(&driver, &t.id("pod"));
    let pid = sandbox.run(&network.path());
    let (all, none) = (t.id("all"), t.id("none"));
    let sharing = sandbox.member(
        &driver,
        &all,
        &json!([
            {"type": "mount"}, {"type": "network", "path": "/proc/1/ns/net"},
            {"type": "pid", "path": "/proc/1/ns/pid"}, {"type": "ipc", "path": "/proc/1/ns/ipc"},
            {"type": "uts", "path": "/proc/1/ns/uts"},
        ]),
    );
    let private = sandbox.member(
        &driver,
        &none,
        &json!([{"type": "mount"}, {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}]),
    );
    for member in [&sharing, &private] {
        let member_pid = member.create(&Stdio3::default()).expect("create a member");
        member.start("").expect("start a member");
        let shares = member.id == all;
        assert_eq!(namespace(member_pid, "net"), namespace(pid, "net"));
        for kind in ["ipc", "uts", "pid"] {
            let same = namespace(member_pid, kind) == namespace(pid, kind);
            assert_eq!(same, shares, "{kind} of {}", member.id);
        }
    }
    let shm = |member: &Shim, name: &str, script: &str| exec(t, member, name, script).1;
    assert_eq!(shm(&sharing, "write", "echo x > /dev/shm/file; cat /dev/shm/file"), "x");
    assert_eq!(shm(&private, "read", "ls /dev/shm"), "");
    assert_eq!(shm(&sharing, "look", SHM_OF_A_KUBELET), "0:0 1777\n65536");
    let place = format!("/{}/{}/shm", t.node.namespace, sandbox.shim.id);
    let kept = t.node.run_dir().display().to_string() + &place + "/file";
    assert_eq!(fs::read_to_string(&kept).expect("it is the sandbox's"), "x\n");
    // The next container of the pod sees it, too.
    sharing.remove();
    assert_eq!(fs::read_to_string(&kept).expect("it is still there"), "x\n");
    private.remove();
    driver.remove_bundle(&all);
    driver.remove_bundle(&none);
    sandbox.finish(&driver);
}

/// Owner and mode, and KiB.
const SHM_OF_A_KUBELET: &str = "stat -c '%u:%g %a' /dev/shm; df -k /dev/shm | tail -n 1 | { read name size rest; echo $size; }";

fn a_pod_may_have_its_own_ids(t: &Test) {
    let driver = t.driver();
    let ids = || IdMapping { host_id: 1_000_000, container_id: 0, length: 65_536 };
    let users =
        UserNamespace { mode: NamespaceMode::Pod.into(), uids: vec![ids()], gids: vec![ids()] };
    let options = NamespaceOption { userns_options: Some(users), ..NamespaceOption::default() };
    let config = PodSandboxConfig {
        linux: Some(LinuxPodSandboxConfig {
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(options),
                ..LinuxSandboxSecurityContext::default()
            }),
            ..LinuxPodSandboxConfig::default()
        }),
        ..PodSandboxConfig::default()
    };
    let sandbox = start(&driver, &t.id("pod"));
    // No network, which the sandbox then makes itself.
    let empty = t.file("empty");
    fs::write(&empty, "").expect("create a file");
    let mut request = api::CreateSandboxRequest {
        sandbox_id: sandbox.shim.id.clone(),
        bundle_path: sandbox.shim.bundle.display().to_string(),
        netns_path: empty,
        ..Default::default()
    };
    let any = request.options.mut_or_insert_default();
    any.type_url = "runtime.v1.PodSandboxConfig".to_owned();
    any.value = prost::Message::encode_to_vec(&config);
    sandbox.call::<api::CreateSandboxResponse>("CreateSandbox", &request).expect("create");
    let pid = sandbox.start().expect("start").pid;
    let id = t.id("member");
    let mut spec = driver.spec(&id, &IDLE);
    spec["linux"]["namespaces"] = json!([
        {"type": "mount"}, {"type": "pid"}, {"type": "user", "path": "/proc/1/ns/user"},
        {"type": "ipc", "path": "/proc/1/ns/ipc"}, {"type": "uts", "path": "/proc/1/ns/uts"},
    ]);
    for field in ["uidMappings", "gidMappings"] {
        spec["linux"][field] = json!([{"containerID": 0, "hostID": 1_000_000, "size": 65_536}]);
    }
    let member = driver.join(&id, &spec, &sandbox.shim);
    let member_pid = member.create(&Stdio3::default()).expect("create a member");
    member.start("").expect("start a member");
    for kind in ["user", "net", "ipc", "uts"] {
        assert_eq!(namespace(member_pid, kind), namespace(pid, kind), "{kind}");
        assert_ne!(namespace(member_pid, kind), own_namespace(kind), "{kind}");
    }
    assert_eq!(exec(t, &member, "look", SHM_OF_A_KUBELET), (0, "0:0 1777\n65536".to_owned()));
    member.remove();
    driver.remove_bundle(&id);
    sandbox.finish(&driver);
}

fn a_delete_ends_a_shim_that_lives(t: &Test) {
    let driver = t.driver();
    let network = Netns::new();
    let sandbox = start(&driver, &t.id("pod"));
    let pid = sandbox.run(&network.path());
    let shim = sandbox.shim.connect().expect("connect").shim_pid;
    let member = sandbox.member(&driver, &t.id("member"), &json!([{"type": "mount"}]));
    member.create(&Stdio3::default()).expect("create");
    member.start("").expect("start");
    let deleted = driver.delete_after_crash(&sandbox.shim.id);
    assert_eq!((deleted.pid, deleted.exit_status), (pid, 0));
    eventually("the shim ends", Duration::from_secs(5), || {
        (!process::is_alive(shim)).then_some(())
    });
    assert!(!process::is_alive(pid));
    assert_eq!(t.node.pve().vmid_of(&member.id), None);
    for id in [&member.id, &sandbox.shim.id] {
        driver.remove_bundle(id);
    }
}

fn stopping_ends_the_pod(t: &Test) {
    let driver = t.driver();
    let network = Netns::new();
    let sandbox = start(&driver, &t.id("pod"));
    sandbox.run(&network.path());
    let id = t.id("member");
    let member = sandbox.member(&driver, &id, &json!([{"type": "mount"}, {"type": "pid"}]));
    member.create(&Stdio3::default()).expect("create");
    member.start("").expect("start");
    sandbox.stop().expect("stop");
    assert_eq!(member.wait("").expect("wait").exit_status, 137);
    // Nobody deletes it: the end of the sandbox is the end of its containers.
    sandbox.finish(&driver);
    driver.events.wait("the member's deletion", |event| event.topic == "/tasks/delete");
    driver.remove_bundle(&id);
}

fn stopping_gives_up_what_is_being_created(t: &Test) {
    let driver = t.driver();
    let network = Netns::new();
    let sandbox = start(&driver, &t.id("pod"));
    sandbox.run(&network.path());
    let id = t.id("member");
    let mut spec = driver.spec(&id, &IDLE);
    spec["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "pid"}]);
    let marker = t.file("hook");
    let script = format!("touch {marker}; exec sleep 1000");
    let shell = |script: &str| json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}]);
    let undoing = t.file("undoing");
    spec["hooks"] = json!({
        "createRuntime": shell(&script),
        // Its network's end takes a while.
        "poststop": shell(&format!("touch {undoing}; sleep 1")),
    });
    let member = driver.join(&id, &spec, &sandbox.shim);
    let creating = std::thread::spawn({
        let member = member.clone();
        move || member.create(&Stdio3::default())
    });
    eventually("its hook runs", Duration::from_secs(10), || {
        fs::exists(&marker).ok()?.then_some(())
    });
    let stopping = std::thread::spawn({
        let sandbox = Sandbox { shim: sandbox.shim.clone() };
        move || sandbox.stop()
    });
    eventually("its creation is undone", Duration::from_secs(10), || {
        fs::exists(&undoing).ok()?.then_some(())
    });
    // Nothing joins a sandbox that is being stopped.
    let late = driver.join(&t.id("late"), &driver.spec(&t.id("late"), &IDLE), &sandbox.shim);
    refused(late.create(&Stdio3::default()), "FailedPrecondition", "sandbox is not running");
    stopping.join().expect("the thread ends").expect("stop");
    let refusal = creating.join().expect("the thread ends").expect_err("it was given up");
    assert!(refusal.message.contains("was given up"), "{refusal:?}");
    assert_eq!(t.node.pve().vmid_of(&id), None);
    sandbox.finish(&driver);
    driver.remove_bundle(&id);
    driver.remove_bundle(&late.id);
}

fn states_that_do_not_allow_it_are_refused(t: &Test) {
    let driver = t.driver();
    let sandbox = start(&driver, &t.id("pod"));
    refused(sandbox.start(), "FailedPrecondition", "has not been created");
    refused(sandbox.status(), "NotFound", "not found");
    refused(sandbox.stop(), "NotFound", "not found");
    refused(sandbox.wait(), "NotFound", "not found");
    refused(sandbox.ping(), "NotFound", "not found");
    refused(sandbox.metrics(), "NotFound", "not found");
    sandbox.run("");
    refused(sandbox.create(""), "AlreadyExists", "already exists");
    let mut other = Sandbox { shim: sandbox.shim.clone() };
    other.shim.id = t.id("other");
    refused(other.create(""), "AlreadyExists", &format!("{} already exists", sandbox.shim.id));
    refused(other.start(), "NotFound", "not found");
    refused(other.shut_down(), "NotFound", "not found");
    refused(sandbox.start(), "FailedPrecondition", "has been started");
    sandbox.stop().expect("stop");
    refused(sandbox.ping(), "FailedPrecondition", "is not running");
    sandbox.finish(&driver);
}

fn what_cannot_be_had_is_refused_and_leaves_nothing(t: &Test) {
    let driver = t.driver();
    let sandbox = start(&driver, &t.id("pod"));
    refused(sandbox.create(&t.file("vanished")), "FailedPrecondition", "vanished\": is gone");
    refused(sandbox.create("/etc/passwd"), "InvalidArgument", "/etc/passwd\": is not a network");
    let uts = format!("/proc/{}/ns/uts", std::process::id());
    refused(sandbox.create(&uts), "InvalidArgument", "ns/uts\": is not a network");
    let options = |value: &[u8], network: &str| {
        let mut request = api::CreateSandboxRequest {
            netns_path: network.to_owned(),
            sandbox_id: sandbox.shim.id.clone(),
            bundle_path: sandbox.shim.bundle.display().to_string(),
            ..Default::default()
        };
        let any = request.options.mut_or_insert_default();
        any.type_url = "runtime.v1.PodSandboxConfig".to_owned();
        any.value = value.to_vec();
        sandbox.call::<api::CreateSandboxResponse>("CreateSandbox", &request)
    };
    let netns = Netns::new();
    let network = netns.path();
    refused(options(&[0xff], &network), "InvalidArgument", "not a runtime.v1.PodSandboxConfig");
    // hostUsers: false, without ids, and an unknown mode.
    let users = [0x42, 6, 0x12, 4, 0x0a, 2, 0x2a, 0];
    refused(options(&users, &network), "InvalidArgument", "linux.gidMappings are missing");
    let mode = [0x42, 8, 0x12, 6, 0x0a, 4, 0x2a, 2, 8, 1];
    refused(options(&mode, &network), "InvalidArgument", "userns_options");
    // Never the node's network for a pod that did not ask for it.
    refused(options(&[0x12, 1, b'x'], ""), "InvalidArgument", "netns_path: is empty");
    let mut request = api::CreateSandboxRequest::new();
    request.sandbox_id = "../x".to_owned();
    let created = sandbox.call::<api::CreateSandboxResponse>("CreateSandbox", &request);
    refused(created, "InvalidArgument", "sandbox_id");
    assert!(!t.node.run_dir().join(&t.node.namespace).join(&sandbox.shim.id).exists());

    // A shim without a sandbox ends as any other.
    let failed = start(&driver, &t.id("failed"));
    refused(failed.create("/etc/passwd"), "InvalidArgument", "is not a network");
    failed.shim.finish();
    driver.remove_bundle(&failed.shim.id);

    // An empty file is no network, and not the node's.
    let empty = t.file("empty");
    fs::write(&empty, "").expect("create a file");
    let pid = sandbox.run(&empty);
    assert_ne!(namespace(pid, "net"), own_namespace("net"));
    sandbox.finish(&driver);
}

fn texts_of_any_length_and_kind_stay_texts(t: &Test) {
    let driver = t.driver();
    let network = Netns::new();
    let id = t.id("pod");
    let (long, lines) = ("x".repeat(64 << 10), "a\nlxc.hook.start = /bin/sh\r\t\u{7f}\"");
    // Nothing is done with annotations.
    let annotations = json!({"a": lines, lines: long, "b": long});
    let spec = json!({"ociVersion": "1.0.2", "annotations": annotations});
    let sandbox = Sandbox { shim: driver.start(&id, &spec) };
    let create = |network: &str, change: &dyn Fn(&mut PodSandboxConfig)| {
        let mut config = PodSandboxConfig {
            linux: Some(LinuxPodSandboxConfig::default()),
            ..PodSandboxConfig::default()
        };
        change(&mut config);
        let mut request = api::CreateSandboxRequest {
            sandbox_id: id.clone(),
            bundle_path: sandbox.shim.bundle.display().to_string(),
            netns_path: network.to_owned(),
            ..Default::default()
        };
        let options = request.options.mut_or_insert_default();
        options.type_url = "runtime.v1.PodSandboxConfig".to_owned();
        options.value = prost::Message::encode_to_vec(&config);
        sandbox.call::<api::CreateSandboxResponse>("CreateSandbox", &request)
    };
    let linux = |config: &mut PodSandboxConfig, cgroup: &str, sysctl: &str| {
        let linux = config.linux.as_mut().expect("it has one");
        linux.cgroup_parent = cgroup.to_owned();
        if !sysctl.is_empty() {
            linux.sysctls.insert(sysctl.to_owned(), "1".to_owned());
        }
    };
    let path = network.path();
    for text in [lines, &long] {
        let refusals = [
            ("network", create(&format!("/run/netns/{text}"), &|_| ())),
            ("linux.cgroupsPath", create(&path, &|config| linux(config, &format!("/{text}"), ""))),
            ("linux.cgroupsPath", create(&path, &|config| linux(config, "/a/../../b", ""))),
            ("linux.sysctl", create(&path, &|config| linux(config, "", text))),
        ];
        for (field, result) in refusals {
            let refusal = result.expect_err(field);
            let known = [code("InvalidArgument"), code("FailedPrecondition")];
            assert!(known.contains(&refusal.code), "{field}: {refusal:?}");
            assert!(refusal.message.contains(field), "{field}: {refusal:?}");
            assert!(!refusal.message.contains(char::is_control), "{field}: {refusal:?}");
            assert!(refusal.message.len() < 8 << 10, "{field}: {} bytes", refusal.message.len());
        }
        // The kernel's word: the name is well-formed.
        let unknown = create(&path, &|config| linux(config, "", &format!("net.{text}")));
        let message = unknown.expect_err("there is no such sysctl").message;
        assert!(message.contains("set sysctl \"net."), "{message}");
        assert!(!message.contains(char::is_control), "{message}");
    }
    refused(
        create(&path, &|config| config.hostname.clone_from(&long)),
        "InvalidArgument",
        "hostname",
    );
    assert!(!t.node.run_dir().join(&t.node.namespace).join(&id).exists());

    create(&path, &|config| config.hostname = lines.to_owned()).expect("a name may be anything");
    let pid = sandbox.start().expect("start").pid;
    let member = sandbox.member(
        &driver,
        &t.id("member"),
        &json!([{"type": "mount"}, {"type": "pid"}, {"type": "uts", "path": "/proc/1/ns/uts"}]),
    );
    member.create(&Stdio3::default()).expect("create");
    member.start("").expect("start");
    assert_eq!(exec(t, &member, "name", "hostname"), (0, lines.to_owned()));
    member.remove();
    driver.remove_bundle(&member.id);
    assert!(process::is_alive(pid));
    sandbox.finish(&driver);
}

fn a_placeholder_needs_a_sandbox(t: &Test) {
    let driver = t.driver();
    let id = t.id("member");
    let mut spec = driver.spec(&id, &IDLE);
    spec["annotations"] = json!({"io.kubernetes.cri.container-type": "container"});
    spec["linux"]["namespaces"] =
        json!([{"type": "mount"}, {"type": "ipc", "path": "/proc/1/ns/ipc"}]);
    let shim = driver.start(&id, &spec);
    let words = "\"/proc/1/ns/ipc\" stands for the pod sandbox's, but this shim holds no sandbox";
    refused(shim.create(&Stdio3::default()), "FailedPrecondition", words);
    shim.finish();
    driver.remove_bundle(&id);
}

fn an_end_from_outside_is_seen(t: &Test) {
    let driver = t.driver();
    let sandbox = start(&driver, &t.id("pod"));
    let pid = sandbox.run("");
    crate::harness::sys::kill(pid, libc::SIGKILL);
    assert_eq!(sandbox.wait().expect("wait").exit_status, 137);
    assert_eq!(sandbox.status().expect("status").state, "SANDBOX_NOTREADY");
    let id = t.id("member");
    let namespaces =
        json!([{"type": "mount"}, {"type": "pid", "path": format!("/proc/{pid}/ns/pid")}]);
    let member = sandbox.member(&driver, &id, &namespaces);
    let words = "the pod sandbox is not running";
    refused(member.create(&Stdio3::default()), "FailedPrecondition", words);
    driver.remove_bundle(&id);
    // A placeholder must not become the node's namespace then, nor its network the pod's.
    let member = sandbox.member(
        &driver,
        &id,
        &json!([{"type": "mount"}, {"type": "ipc", "path": "/proc/1/ns/ipc"}]),
    );
    refused(member.create(&Stdio3::default()), "FailedPrecondition", words);
    driver.remove_bundle(&id);
    sandbox.finish(&driver);
}
