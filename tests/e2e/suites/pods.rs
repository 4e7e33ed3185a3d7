//! Kubernetes pods as containerd's CRI plugin makes them: one shim for all containers of a pod, a pod
//! sandbox that is no CT, and members that join its namespaces. The shim is driven directly here; the
//! suite `cri` does the same through CRI.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::direct::{Driver, Refusal, Shim, Stdio3, code};
use crate::harness::process::{self, eventually};
use crate::harness::sys;
use crate::harness::test::Test;
use crate::suites::cases;

cases!("pods":
    containers_of_a_group_share_a_shim,
    a_failing_member_touches_no_other,
    each_member_is_deleted_after_a_crash;    proxmox:
    the_sandbox_holds_the_pods_namespaces_and_is_no_ct,
    the_sandbox_has_nothing_of_the_host,
    the_sandbox_ends_as_a_pause_container_does,
    the_sandbox_refuses_what_it_cannot_do,
    the_sandbox_of_a_host_network_pod_is_on_the_host,
    members_join_the_sandbox,
    a_shared_pid_namespace_is_reaped_and_kills_stay_inside,
    a_member_whose_sandbox_is_gone_is_refused,
    a_crash_leaves_no_sandbox,
    a_crash_leaves_no_process_in_the_pods_pid_namespace,
    an_end_that_no_shim_saw_is_known,
    members_share_the_user_namespace_of_the_sandbox,
    a_sandbox_that_is_given_up_leaves_nothing,
    a_sandbox_never_ends_who_was_in_its_cgroup,
    hooks_of_a_sandbox_run,
    a_sandbox_whose_hook_hangs_can_be_killed,
    proxmox_shows_the_pods_names,
    hostile_names_stay_in_their_places,
);

const GROUP: &str = "io.containerd.runc.v2.group";
pub const IDLE: [&str; 3] = ["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 1000 & wait; done"];

/// A network namespace as CNI would have made it; it ends with this value.
pub struct Netns(Child);

impl Netns {
    pub fn new() -> Netns {
        let mut command = Command::new("unshare");
        command.args(["--net", "sh", "-c", "ip link set lo up && echo up && exec sleep 1000"]);
        let mut child = command.stdout(Stdio::piped()).spawn().expect("run unshare");
        use std::io::Read;
        let mut line = [0; 3];
        child.stdout.take().expect("is piped").read_exact(&mut line).expect("it is up");
        Netns(child)
    }

    pub fn path(&self) -> String {
        format!("/proc/{}/ns/net", self.0.id())
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn namespace(pid: u32, kind: &str) -> String {
    fs::read_link(format!("/proc/{pid}/ns/{kind}")).expect("read a namespace").display().to_string()
}

pub fn own_namespace(kind: &str) -> String {
    namespace(std::process::id(), kind)
}

/// The specification that CRI writes for the pod's pause container.
fn sandbox_spec(driver: &Driver, id: &str, network: &str) -> Value {
    let mut spec = driver.spec(id, &["/pause"]);
    spec["hostname"] = json!("web-0");
    spec["process"]["user"] = json!({"uid": 65535, "gid": 65535, "additionalGids": [65535]});
    spec["annotations"] = json!({
        "io.kubernetes.cri.container-type": "sandbox",
        "io.kubernetes.cri.sandbox-id": id,
    });
    spec["linux"]["namespaces"] = json!([
        {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
        {"type": "network", "path": network},
    ]);
    spec["linux"]["sysctl"] = json!({"net.ipv4.ip_unprivileged_port_start": "0"});
    spec
}

/// The specification of a container of that pod, with the kinds of namespaces it shares.
fn member_spec(driver: &Driver, id: &str, pod: &str, pid: u32, shared: &[&str]) -> Value {
    let mut spec = driver.spec(id, &IDLE);
    spec["annotations"] = json!({
        "io.kubernetes.cri.container-type": "container",
        "io.kubernetes.cri.sandbox-id": pod,
    });
    let namespaces = [("pid", "pid"), ("ipc", "ipc"), ("uts", "uts"), ("network", "net")];
    let mut list = vec![json!({"type": "mount"})];
    for (oci, proc) in namespaces {
        list.push(match shared.contains(&oci) {
            true => json!({"type": oci, "path": format!("/proc/{pid}/ns/{proc}")}),
            false => json!({"type": oci}),
        });
    }
    spec["linux"]["namespaces"] = json!(list);
    spec
}

/// Starts a shim with a running sandbox; its pid.
fn start_sandbox(driver: &Driver, id: &str, network: &Netns) -> (Shim, u32) {
    let shim = driver.start(id, &sandbox_spec(driver, id, &network.path()));
    let pid = shim.create(&Stdio3::default()).expect("create the sandbox");
    assert_eq!(shim.start("").expect("start the sandbox"), pid);
    (shim, pid)
}

/// Output of a command in a member.
pub fn exec(t: &Test, member: &Shim, name: &str, script: &str) -> (u32, String) {
    let log = t.file(&format!("{}-{name}.out", member.id));
    let uri = format!("file://{log}");
    let io = Stdio3 { stdout: uri.clone(), stderr: uri, ..Stdio3::default() };
    let process = json!({"args": ["sh", "-c", script], "cwd": "/", "env": ["PATH=/bin"],
        "user": {"uid": 0, "gid": 0}});
    member.exec(name, &process, &io).expect("add an exec");
    member.start(name).expect("start an exec");
    let status = member.wait(name).expect("wait for the exec").exit_status;
    member.delete(name).expect("delete the exec");
    (status, fs::read_to_string(log).unwrap_or_default().trim().to_owned())
}

#[track_caller]
pub fn refused<T: std::fmt::Debug>(result: Result<T, Refusal>, name: &str, words: &str) {
    let refusal = result.expect_err("it must be refused");
    assert_eq!(refusal.code, code(name), "{refusal:?}");
    assert!(refusal.message.contains(words), "{refusal:?} does not say {words:?}");
    assert!(!refusal.message.contains('\n'), "{refusal:?} is more than one line");
}

fn containers_of_a_group_share_a_shim(t: &Test) {
    let driver = t.driver();
    let (one, two, three) = (t.id("one"), t.id("two"), t.id("three"));
    let spec = |id: &str| {
        let mut spec = driver.spec(id, &IDLE);
        spec["annotations"] =
            json!({GROUP: one, "io.kubernetes.cri.sandbox-id": "the other one wins"});
        spec
    };
    let first = driver.start(&one, &spec(&one));
    // Version 2 of the protocol: a start for each container, which finds the shim.
    let second = driver.start(&two, &spec(&two));
    assert_eq!(second.address, first.address);
    // Version 3: containerd goes to the shim at once.
    let third = driver.join(&three, &spec(&three), &first);
    assert!(!third.bundle.join("address").exists());
    fs::remove_dir(third.bundle.join("rootfs")).expect("a bundle need not have it");
    let members = [&first, &second, &third];
    let mut pids = Vec::new();
    for member in members {
        pids.push(member.create(&Stdio3::default()).expect("create"));
        member.start("").expect("start");
    }
    let shim = first.connect().expect("connect").shim_pid;
    assert_eq!(third.connect().expect("connect").shim_pid, shim);
    for (member, pid) in members.iter().zip(&pids) {
        assert!(member.pids().expect("pids").contains(pid));
        assert_eq!(member.connect().expect("connect").task_pid, *pid);
    }
    // Not while a task lives, whoever asks.
    first.remove();
    first.shutdown();
    second.shutdown();
    assert!(process::is_alive(shim));
    assert_eq!(second.state("").expect("state").pid, pids[1]);
    second.remove();
    second.shutdown();
    third.finish();
    assert!(!process::is_alive(shim));
    for id in [&one, &two, &three] {
        driver.remove_bundle(id);
    }
}

fn a_failing_member_touches_no_other(t: &Test) {
    let driver = t.driver();
    let (one, two) = (t.id("one"), t.id("two"));
    let mut spec = driver.spec(&one, &IDLE);
    spec["annotations"] = json!({ GROUP: one });
    let first = driver.start(&one, &spec);
    first.create(&Stdio3::default()).expect("create");
    first.start("").expect("start");

    let mut broken = driver.spec(&two, &IDLE);
    broken["annotations"] = json!({ GROUP: one });
    broken["mounts"].as_array_mut().expect("mounts").push(
        json!({"destination": "/x", "type": "bind", "source": "/nonexistent", "options": ["rbind"]}),
    );
    let second = driver.start(&two, &broken);
    let failure = second.create(&Stdio3::default()).expect_err("the source does not exist");
    assert!(failure.message.contains("/nonexistent"), "{failure:?}");
    second.shutdown();
    let mut missing = driver.spec(&two, &["/nonexistent"]);
    missing["annotations"] = json!({ GROUP: one });
    driver.remove_bundle(&two);
    let second = driver.join(&two, &missing, &first);
    second.create(&Stdio3::default()).expect("create");
    second.start("").expect_err("there is no such program");
    second.remove();
    second.shutdown();

    let (status, text) = exec(t, &first, "alive", "echo alive");
    assert_eq!((status, text.as_str()), (0, "alive"));
    first.finish();
    driver.remove_bundle(&one);
    driver.remove_bundle(&two);
}

fn each_member_is_deleted_after_a_crash(t: &Test) {
    let driver = t.driver();
    let (one, two) = (t.id("one"), t.id("two"));
    let spec = |id: &str, arguments: &[&str]| {
        let mut spec = driver.spec(id, arguments);
        spec["annotations"] = json!({ GROUP: one });
        spec
    };
    let first = driver.start(&one, &spec(&one, &IDLE));
    let second = driver.start(&two, &spec(&two, &["sh", "-c", "exit 7"]));
    for member in [&first, &second] {
        member.create(&Stdio3::default()).expect("create");
        member.start("").expect("start");
    }
    assert_eq!(second.wait("").expect("wait").exit_status, 7);
    t.kill_shim(&one);
    // containerd calls it for each; the second must find its own status.
    assert_eq!(driver.delete_after_crash(&one).exit_status, 137);
    assert_eq!(driver.delete_after_crash(&two).exit_status, 7);
    driver.remove_bundle(&one);
    driver.remove_bundle(&two);
}

fn the_sandbox_holds_the_pods_namespaces_and_is_no_ct(t: &Test) {
    let driver = t.driver();
    let network = Netns::new();
    let id = t.id("pod");
    let shim = driver.start(&id, &sandbox_spec(&driver, &id, &network.path()));
    refused(shim.start(""), "NotFound", &id);
    let pid = shim.create(&Stdio3::default()).expect("create");
    assert_eq!(shim.state("").expect("state").status.value(), 1, "created");
    assert_eq!(shim.start("").expect("start"), pid);
    assert_eq!(shim.state("").expect("state").status.value(), 2, "running");
    refused(shim.start(""), "FailedPrecondition", "cannot go from running to starting");
    assert_eq!(t.node.pve().vmid_of(&id), None, "a sandbox is no CT");

    for kind in ["pid_for_children", "ipc", "uts", "mnt"] {
        assert_ne!(namespace(pid, kind), own_namespace(kind), "{kind}");
    }
    assert_eq!(namespace(pid, "net"), namespace(network.0.id(), "net"));
    let enter = |arguments: &[&str]| {
        let mut command = Command::new("nsenter");
        command.args(["--target", &pid.to_string()]).args(arguments);
        process::run(&mut command).ok().text()
    };
    assert_eq!(enter(&["--uts", "hostname"]).trim(), "web-0");
    let sysctl = "cat /proc/sys/net/ipv4/ip_unprivileged_port_start";
    assert_eq!(enter(&["--net", "sh", "-c", sysctl]).trim(), "0");
    assert_eq!(process::status_field(pid, "NSpid").as_deref(), Some(&*format!("{pid}\t1")));

    let place = format!("/{}/{id}/ns", t.node.namespace);
    for line in fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("cgroup").lines() {
        assert!(line.ends_with(&place), "{line}");
    }
    assert_eq!(shim.pids().expect("pids"), [pid]);
    let stats = shim.stats().expect("stats");
    assert!(stats.type_url.contains("cgroups") && !stats.value.is_empty(), "{stats:?}");

    shim.finish();
    driver.remove_bundle(&id);
}

fn the_sandbox_has_nothing_of_the_host(t: &Test) {
    let driver = t.driver();
    let network = Netns::new();
    let id = t.id("pod");
    let (shim, pid) = start_sandbox(&driver, &id, &network);
    let root = fs::read_dir(format!("/proc/{pid}/root")).expect("read its root");
    assert_eq!(root.count(), 0, "its root is empty");
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).expect("mountinfo");
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(mounts.contains(" / ro,nosuid,nodev,noexec"), "{mounts}");
    for (field, value) in [
        ("CapEff", "0000000000000000"),
        ("CapPrm", "0000000000000000"),
        ("CapBnd", "0000000000000000"),
        ("CapInh", "0000000000000000"),
        ("CapAmb", "0000000000000000"),
        ("NoNewPrivs", "1"),
        ("Uid", "65535\t65535\t65535\t65535"),
        ("Gid", "65535\t65535\t65535\t65535"),
        ("Groups", "65535"),
        ("Name", "pod-sandbox"),
    ] {
        let found = process::status_field(pid, field);
        assert_eq!(found.as_deref().map(str::trim), Some(value), "{field}");
    }
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).expect("fd").flatten() {
        let target = fs::read_link(entry.path()).expect("readlink");
        // Where it tells its end; it can only write to it.
        let flags = fs::read_to_string(format!(
            "/proc/{pid}/fdinfo/{}",
            entry.file_name().to_string_lossy()
        ));
        let is_record = target.ends_with("exit.json")
            && flags.expect("fdinfo").lines().any(|line| line.ends_with("01"));
        assert!(is_record || target == Path::new("/dev/null"), "{}", target.display());
    }
    // Even root of a container that shares the pid namespace, and that user, cannot look into it.
    let member_id = t.id("member");
    let mut spec = member_spec(&driver, &member_id, &id, pid, &["pid"]);
    spec["process"]["user"] = json!({"uid": 65535, "gid": 65535});
    let member = driver.join(&member_id, &spec, &shim);
    member.create(&Stdio3::default()).expect("create");
    member.start("").expect("start");
    for user in [0, 65535] {
        let log = t.file(&format!("look-{user}"));
        let uri = format!("file://{log}");
        let script = "cat /proc/1/comm; for i in root cwd exe fd/0 fd/1; do readlink /proc/1/$i; done; \
                      ls /proc/1/root/; cat /proc/1/mem; kill -9 1; cat /proc/1/comm";
        let process = json!({"args": ["sh", "-c", script], "cwd": "/", "env": ["PATH=/bin"],
            "user": {"uid": user, "gid": user}});
        let io = Stdio3 { stdout: uri, stderr: "file:///dev/null".to_owned(), ..Stdio3::default() };
        let name = format!("look{user}");
        member.exec(&name, &process, &io).expect("exec");
        member.start(&name).expect("start");
        member.wait(&name).expect("wait");
        let seen = fs::read_to_string(&log).expect("read its output");
        assert_eq!(seen.split_whitespace().collect::<Vec<_>>(), ["pod-sandbox", "pod-sandbox"]);
    }
    member.remove();
    shim.finish();
    driver.remove_bundle(&member_id);
    driver.remove_bundle(&id);
}

fn the_sandbox_ends_as_a_pause_container_does(t: &Test) {
    let driver = t.driver();
    let network = Netns::new();
    for (name, signal, status) in [("term", 15, 0), ("kill", 9, 137), ("int", 2, 0)] {
        let id = t.id(name);
        let (shim, pid) = start_sandbox(&driver, &id, &network);
        refused(shim.delete(""), "FailedPrecondition", "is running");
        shim.kill("", signal, false).expect("kill");
        let (exit, _) = driver.events.wait_exit(&id, &id);
        assert_eq!((exit.exit_status, exit.pid), (status, pid), "{name}");
        assert_eq!(shim.wait("").expect("wait").exit_status, status, "{name}");
        let state = shim.state("").expect("state");
        assert_eq!((state.status.value(), state.exit_status), (3, status), "{name}: stopped");
        refused(shim.kill("", 9, false), "NotFound", "process already finished");
        let deleted = shim.delete("").expect("delete");
        assert_eq!((deleted.exit_status, deleted.pid), (status, pid), "{name}");
        refused(shim.state(""), "NotFound", &id);
        shim.finish();
        let topics: Vec<String> = driver.events.all().iter().map(|e| e.topic.clone()).collect();
        let mine = &topics[topics.len() - 4..];
        assert_eq!(mine, ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]);
        driver.remove_bundle(&id);
    }
}

fn the_sandbox_refuses_what_it_cannot_do(t: &Test) {
    let driver = t.driver();
    let network = Netns::new();
    let id = t.id("pod");
    let (shim, pid) = start_sandbox(&driver, &id, &network);
    let process = json!({"args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0}});
    let only = "a pod sandbox only holds the pod's namespaces";
    refused(shim.exec("e", &process, &Stdio3::default()), "Unimplemented", only);
    refused(shim.create(&Stdio3::default()), "AlreadyExists", &id);
    let update = json!({"memory": {"limit": 64 << 20}, "cpu": {"shares": 2}});
    shim.update(&update).expect("update");
    let limit = process::cgroup_value(pid, &id, "memory", "memory.limit_in_bytes", "memory.max");
    assert_eq!(limit, (64 << 20).to_string());
    shim.finish();
    driver.remove_bundle(&id);

    // Without a network of its own.
    let with_sysctl = |key: &str| {
        let linux =
            json!({"namespaces": [{"type": "mount"}, {"type": "uts"}], "sysctl": {key: "1"}});
        Some(("linux", linux))
    };
    for (name, change, field) in [
        ("tty", None, "terminal"),
        (
            "hook",
            Some(("hooks", json!({"startContainer": [{"path": "/bin/true"}]}))),
            "startContainer",
        ),
        ("uts", Some(("linux", json!({"namespaces": [{"type": "mount"}]}))), "hostname"),
        ("sysctl", with_sysctl("net.ipv4.ip_forward"), "net.ipv4.ip_forward"),
        ("node", with_sysctl("vm.swappiness"), "vm.swappiness"),
        (
            "time",
            Some((
                "linux",
                json!({"namespaces": [{"type": "mount"}, {"type": "uts"}, {"type": "time"}]}),
            )),
            "time namespace",
        ),
    ] {
        let id = t.id(name);
        let mut spec = sandbox_spec(&driver, &id, &network.path());
        if let Some((key, value)) = change.clone() {
            spec[key] = value;
        }
        let shim = driver.start(&id, &spec);
        let io = Stdio3 { terminal: change.is_none(), ..Stdio3::default() };
        refused(shim.create(&io), "InvalidArgument", field);
        shim.finish();
        driver.remove_bundle(&id);
    }
}

fn the_sandbox_of_a_host_network_pod_is_on_the_host(t: &Test) {
    let driver = t.driver();
    let (id, member_id) = (t.id("pod"), t.id("member"));
    let mut spec = sandbox_spec(&driver, &id, "");
    // hostNetwork, hostPID and hostIPC: CRI leaves them all out, and the hostname with them.
    spec["linux"]["namespaces"] = json!([{"type": "mount"}]);
    spec["linux"]["sysctl"] = json!({});
    spec.as_object_mut().expect("an object").remove("hostname");
    let shim = driver.start(&id, &spec);
    let pid = shim.create(&Stdio3::default()).expect("create");
    shim.start("").expect("start");
    for kind in ["net", "pid", "ipc", "uts"] {
        assert_eq!(namespace(pid, kind), own_namespace(kind), "{kind}");
    }
    let shared = ["network", "pid", "ipc", "uts"];
    let spec = member_spec(&driver, &member_id, &id, pid, &shared);
    let member = driver.join(&member_id, &spec, &shim);
    let member_pid = member.create(&Stdio3::default()).expect("create a member");
    member.start("").expect("start a member");
    for kind in ["net", "pid", "ipc", "uts"] {
        assert_eq!(namespace(member_pid, kind), own_namespace(kind), "{kind}");
    }
    member.remove();
    shim.finish();
    driver.remove_bundle(&member_id);
    driver.remove_bundle(&id);
}

fn members_join_the_sandbox(t: &Test) {
    let driver = t.driver();
    let network = Netns::new();
    let (id, one, two) = (t.id("pod"), t.id("one"), t.id("two"));
    let (shim, pid) = start_sandbox(&driver, &id, &network);
    let shared = ["ipc", "uts", "network"];
    let members: Vec<Shim> = [&one, &two]
        .into_iter()
        .map(|name| {
            let member = driver.start(name, &member_spec(&driver, name, &id, pid, &shared));
            assert_eq!(member.address, shim.address);
            let member_pid = member.create(&Stdio3::default()).expect("create a member");
            member.start("").expect("start a member");
            for kind in ["ipc", "uts", "net"] {
                assert_eq!(namespace(member_pid, kind), namespace(pid, kind), "{kind}");
            }
            assert_ne!(namespace(member_pid, "pid"), namespace(pid, "pid_for_children"));
            assert_eq!(exec(t, &member, "hostname", "hostname"), (0, "web-0".to_owned()));
            member
        })
        .collect();
    // They reach each other on the pod's loopback.
    let server = "nc -l -p 4242 -e echo hello & while ! netstat -ltn | grep -q :4242; do :; done";
    assert_eq!(exec(t, &members[0], "server", server).0, 0);
    assert_eq!(exec(t, &members[1], "client", "nc 127.0.0.1 4242"), (0, "hello".to_owned()));
    // The end of one is not that of another, nor of the sandbox.
    members[0].remove();
    assert_eq!(exec(t, &members[1], "alive", "echo alive"), (0, "alive".to_owned()));
    assert_eq!(shim.state("").expect("state").status.value(), 2, "running");
    // Nor does the end of the sandbox end a member with a pid namespace of its own.
    shim.kill("", 9, false).expect("kill");
    shim.wait("").expect("wait");
    assert_eq!(exec(t, &members[1], "still", "hostname"), (0, "web-0".to_owned()));
    members[1].remove();
    shim.finish();
    for name in [&one, &two, &id] {
        driver.remove_bundle(name);
    }
}

fn a_shared_pid_namespace_is_reaped_and_kills_stay_inside(t: &Test) {
    let driver = t.driver();
    let network = Netns::new();
    let (id, one, two) = (t.id("pod"), t.id("one"), t.id("two"));
    let (shim, pid) = start_sandbox(&driver, &id, &network);
    let members: Vec<Shim> = [&one, &two]
        .into_iter()
        .map(|name| {
            let spec = member_spec(&driver, name, &id, pid, &["pid", "ipc", "uts", "network"]);
            let member = driver.join(name, &spec, &shim);
            member.create(&Stdio3::default()).expect("create a member");
            member.start("").expect("start a member");
            member
        })
        .collect();
    // Their scripts may be on the way to it.
    let mut look = 0;
    eventually("one sees both", Duration::from_secs(10), || {
        look += 1;
        let script = "cat /proc/1/comm; ps | grep -c '[s]leep 1000$'";
        let seen = exec(t, &members[0], &format!("see{look}"), script).1;
        (seen == "pod-sandbox\n2").then_some(())
    });
    // An orphan becomes a child of the sandbox, which reaps it: no zombie stays.
    exec(t, &members[0], "orphan", "(sleep 0.1 & sh -c 'sleep 0.2 & exit' &) ; exit");
    eventually("orphans are reaped", Duration::from_secs(5), || {
        process::children(pid).is_empty().then_some(())
    });
    let (first, second) = (members[0].pids().expect("pids"), members[1].pids().expect("pids"));
    assert!(first.iter().all(|pid| !second.contains(pid)), "{first:?} {second:?}");
    assert_eq!(shim.pids().expect("pids"), [pid]);
    members[0].kill("", 9, true).expect("kill all");
    assert_eq!(members[0].wait("").expect("wait").exit_status, 137);
    eventually("all of it has ended", Duration::from_secs(5), || {
        first.iter().all(|pid| !process::is_alive(*pid)).then_some(())
    });
    assert_eq!(members[1].pids().expect("pids"), second);
    members[0].delete("").expect("delete");
    // The end of the sandbox is the end of its pid namespace.
    shim.kill("", 9, false).expect("kill the sandbox");
    assert_eq!(members[1].wait("").expect("wait").exit_status, 137);
    members[1].remove();
    shim.finish();
    for name in [&one, &two, &id] {
        driver.remove_bundle(name);
    }
}

fn a_member_whose_sandbox_is_gone_is_refused(t: &Test) {
    let driver = t.driver();
    let network = Netns::new();
    let (id, member_id) = (t.id("pod"), t.id("member"));
    let (shim, pid) = start_sandbox(&driver, &id, &network);
    let spec = member_spec(&driver, &member_id, &id, pid, &["ipc"]);
    shim.kill("", 9, false).expect("kill");
    shim.wait("").expect("wait");
    let member = driver.join(&member_id, &spec, &shim);
    let path = format!("/proc/{pid}/ns/ipc\": is gone: the pod sandbox has ended");
    refused(member.create(&Stdio3::default()), "FailedPrecondition", &path);
    driver.remove_bundle(&member_id);
    let path = format!("/proc/{}/ns/uts", std::process::id());
    let mut wrong = spec.clone();
    wrong["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "network", "path": path}]);
    let member = driver.join(&member_id, &wrong, &shim);
    let words = format!("network namespace {path:?}: is not a network namespace");
    refused(member.create(&Stdio3::default()), "InvalidArgument", &words);
    shim.finish();
    driver.remove_bundle(&member_id);
    driver.remove_bundle(&id);

    // The same for the sandbox itself and CNI's namespace.
    for (name, path, code) in [
        ("vanished", t.file("vanished"), "FailedPrecondition"),
        ("file", "/etc/passwd".to_owned(), "InvalidArgument"),
    ] {
        let id = t.id(name);
        let shim = driver.start(&id, &sandbox_spec(&driver, &id, &path));
        refused(shim.create(&Stdio3::default()), code, &format!("network namespace {path:?}: is"));
        shim.finish();
        driver.remove_bundle(&id);
    }
}

fn a_crash_leaves_no_sandbox(t: &Test) {
    let driver = t.driver();
    let network = Netns::new();
    let (id, started, unstarted) = (t.id("pod"), t.id("started"), t.id("unstarted"));
    let (shim, pid) = start_sandbox(&driver, &id, &network);
    let shared = ["ipc", "uts", "network"];
    let second = driver.start(&started, &member_spec(&driver, &started, &id, pid, &shared));
    let third =
        driver.join(&unstarted, &member_spec(&driver, &unstarted, &id, pid, &shared), &shim);
    for member in [&second, &third] {
        member.create(&Stdio3::default()).expect("create");
        member.start("").expect("start");
    }
    // Another pod, whose members must not be taken for those of this one.
    let (other_id, stays) = (t.id("other"), t.id("stays"));
    let (other, other_pid) = start_sandbox(&driver, &other_id, &network);
    let spec = member_spec(&driver, &stays, &other_id, other_pid, &shared);
    let stays = driver.join(&stays, &spec, &other);
    stays.create(&Stdio3::default()).expect("create");
    stays.start("").expect("start");
    sys::kill(t.node.shims(&id)[0], libc::SIGKILL);
    eventually("the shim is gone", Duration::from_secs(5), || {
        t.node.shims(&id).is_empty().then_some(())
    });
    assert!(process::is_alive(pid), "a crash of the shim ends no pod");
    assert_eq!(driver.delete_after_crash(&id).exit_status, 137);
    assert!(!process::is_alive(pid));
    // A member that containerd started has its own delete; nobody calls one for the other.
    assert!(t.node.pve().vmid_of(&started).is_some());
    eventually("the member without a start is gone", Duration::from_secs(10), || {
        t.node.pve().vmid_of(&unstarted).is_none().then_some(())
    });
    assert_eq!(driver.delete_after_crash(&started).exit_status, 137);
    assert_eq!(exec(t, &stays, "alive", "hostname"), (0, "web-0".to_owned()));
    stays.remove();
    other.finish();
    for name in [&started, &unstarted, &id, &stays.id, &other_id] {
        driver.remove_bundle(name);
    }
}

fn a_crash_leaves_no_process_in_the_pods_pid_namespace(t: &Test) {
    let driver = t.driver();
    let network = Netns::new();
    let (id, member_id) = (t.id("pod"), t.id("member"));
    let (shim, pid) = start_sandbox(&driver, &id, &network);
    let spec = member_spec(&driver, &member_id, &id, pid, &["pid", "ipc", "uts", "network"]);
    let member = driver.start(&member_id, &spec);
    member.create(&Stdio3::default()).expect("create");
    member.start("").expect("start");
    let processes = eventually("it has a child", Duration::from_secs(5), || {
        member.pids().ok().filter(|pids| pids.len() == 2)
    });
    shim.crash();
    assert_eq!(driver.delete_after_crash(&member_id).exit_status, 137);
    assert!(processes.iter().all(|pid| !process::is_alive(*pid)), "{processes:?}");
    assert!(process::is_alive(pid), "the sandbox is not the member's");
    assert_eq!(driver.delete_after_crash(&id).exit_status, 137);
    assert!(!process::is_alive(pid));
    driver.remove_bundle(&member_id);
    driver.remove_bundle(&id);
}

/// `hostUsers: false`, with a new network as containerd 1.7 asks for it, and with one that belongs to a
/// user namespace already.
fn members_share_the_user_namespace_of_the_sandbox(t: &Test) {
    let driver = t.driver();
    let users = |spec: &mut Value, namespace: Value| {
        let linux = &mut spec["linux"];
        linux["namespaces"].as_array_mut().expect("a list").push(namespace);
        for field in ["uidMappings", "gidMappings"] {
            linux[field] = json!([{"containerID": 0, "hostID": 1_000_000, "size": 65_536}]);
        }
    };
    let (id, one, two) = (t.id("pod"), t.id("one"), t.id("two"));
    let mut spec = sandbox_spec(&driver, &id, "");
    spec["linux"]["sysctl"]["kernel.shm_rmid_forced"] = json!("1");
    users(&mut spec, json!({"type": "user"}));
    let shim = driver.start(&id, &spec);
    let pid = shim.create(&Stdio3::default()).expect("create the sandbox");
    shim.start("").expect("start the sandbox");
    let uid = process::status_field(pid, "Uid").expect("Uid");
    assert_eq!(uid, ["1065535"; 4].join("\t"));
    let shared = ["ipc", "uts", "network"];
    for name in [&one, &two] {
        let mut spec = member_spec(&driver, name, &id, pid, &shared);
        users(&mut spec, json!({"type": "user", "path": format!("/proc/{pid}/ns/user")}));
        let member = driver.join(name, &spec, &shim);
        let member_pid = member.create(&Stdio3::default()).expect("create");
        member.start("").expect("start");
        for kind in ["user", "net", "ipc", "uts"] {
            assert_eq!(namespace(member_pid, kind), namespace(pid, kind), "{kind}");
            assert_ne!(namespace(member_pid, kind), own_namespace(kind), "{kind}");
        }
        let script = "stat -c %u:%g /bin/busybox; cat /proc/sys/kernel/shm_rmid_forced; hostname";
        assert_eq!(exec(t, &member, "look", script), (0, "0:0\n1\nweb-0".to_owned()));
    }
    let mut spec = member_spec(&driver, &t.id("other"), &id, pid, &shared);
    users(&mut spec, json!({"type": "user", "path": format!("/proc/{pid}/ns/user")}));
    spec["linux"]["uidMappings"][0]["size"] = json!(1000);
    let other = driver.join(&t.id("other"), &spec, &shim);
    refused(other.create(&Stdio3::default()), "InvalidArgument", "linux.uidMappings");
    driver.remove_bundle(&other.id);
    // Nor does a sandbox get other ids than those of the network that it is to have.
    let other = t.id("of-the-network");
    let network = format!("/proc/{pid}/ns/net");
    let mut spec = sandbox_spec(&driver, &other, &network);
    users(&mut spec, json!({"type": "user"}));
    spec["linux"]["uidMappings"][0]["size"] = json!(1000);
    spec["process"]["user"]["uid"] = json!(0);
    let words = "not those of the user namespace that the pod sandbox joins";
    let refusing = driver.start(&other, &spec);
    refused(refusing.create(&Stdio3::default()), "InvalidArgument", words);
    spec["linux"]["uidMappings"][0]["size"] = json!(65_536);
    refusing.finish();
    driver.remove_bundle(&other);
    let same = driver.start(&other, &spec);
    let same_pid = same.create(&Stdio3::default()).expect("create");
    for kind in ["user", "net"] {
        assert_eq!(namespace(same_pid, kind), namespace(pid, kind), "{kind}");
    }
    same.finish();
    driver.remove_bundle(&other);
    // LXC could not give them to its containers.
    if Path::new("/usr/bin/newuidmap").exists() {
        let mut spec = sandbox_spec(&driver, &other, "");
        users(&mut spec, json!({"type": "user"}));
        spec["linux"]["uidMappings"][0]["hostID"] = json!(5_000_000);
        let refusing = driver.start(&other, &spec);
        let remedy = "add the line \"root:5000000:65536\" to /etc/subuid";
        refused(refusing.create(&Stdio3::default()), "FailedPrecondition", remedy);
        refusing.finish();
        driver.remove_bundle(&other);
    }
    for name in [&one, &two, &id] {
        let mut member = shim.clone();
        member.id.clone_from(name);
        member.kill("", 9, true).expect("kill");
        member.wait("").expect("wait");
        member.delete("").expect("delete");
    }
    shim.finish();
    for name in [&one, &two, &id] {
        driver.remove_bundle(name);
    }
}

fn an_end_that_no_shim_saw_is_known(t: &Test) {
    let driver = t.driver();
    for (name, signal, status) in [("asked", libc::SIGTERM, 0), ("killed", libc::SIGKILL, 137)] {
        let (network, id) = (Netns::new(), t.id(name));
        let (_, pid) = start_sandbox(&driver, &id, &network);
        sys::kill(t.node.shims(&id)[0], libc::SIGKILL);
        eventually("the shim is gone", Duration::from_secs(5), || {
            t.node.shims(&id).is_empty().then_some(())
        });
        sys::kill(pid, signal);
        eventually("the sandbox has ended", Duration::from_secs(5), || {
            (!process::is_alive(pid)).then_some(())
        });
        assert_eq!(driver.delete_after_crash(&id).exit_status, status, "{name}");
        driver.remove_bundle(&id);
    }
}

fn a_sandbox_that_is_given_up_leaves_nothing(t: &Test) {
    let driver = t.driver();
    let network = Netns::new();
    let id = t.id("pod");
    let mut spec = sandbox_spec(&driver, &id, &network.path());
    spec["hooks"] = json!({"createRuntime": [{"path": "/bin/sleep", "args": ["sleep", "1000"]}]});
    let shim = driver.start(&id, &spec);
    let creating = {
        let shim = shim.clone();
        std::thread::spawn(move || shim.create(&Stdio3::default()))
    };
    let place = format!("/{}/{id}/ns", t.node.namespace);
    let holder = eventually("the holder exists", Duration::from_secs(10), || {
        process::processes().into_iter().map(|(pid, _)| pid).find(|pid| {
            fs::read_to_string(format!("/proc/{pid}/cgroup"))
                .is_ok_and(|text| text.contains(&place))
        })
    });
    // containerd's restart monitor would replace a task that it finds now.
    refused(shim.state(""), "NotFound", &id);
    shim.delete("").expect("give it up");
    let refusal = creating.join().expect("the thread ends").expect_err("it was given up");
    assert!(refusal.message.contains("was given up"), "{refusal:?}");
    assert!(!process::is_alive(holder));
    shim.finish();
    driver.remove_bundle(&id);
}

fn a_sandbox_never_ends_who_was_in_its_cgroup(t: &Test) {
    let driver = t.driver();
    let (one, id) = (t.id("one"), t.id("pod"));
    let other = driver.start(&one, &driver.spec(&one, &IDLE));
    let pid = other.create(&Stdio3::default()).expect("create");
    other.start("").expect("start");
    let network = Netns::new();
    let mut spec = sandbox_spec(&driver, &id, &network.path());
    spec["linux"]["cgroupsPath"] = json!(format!("/{}/{one}", t.node.namespace));
    let shim = driver.start(&id, &spec);
    let refusal = shim.create(&Stdio3::default()).expect_err("it is in use");
    assert!(refusal.message.contains("still has process"), "{refusal:?}");
    shim.finish();
    driver.remove_bundle(&id);
    assert!(process::is_alive(pid), "the other container was killed");
    assert_eq!(exec(t, &other, "alive", "echo alive"), (0, "alive".to_owned()));
    other.finish();
    driver.remove_bundle(&one);

    // Nor who came after the sandbox had ended.
    let (shim, _) = start_sandbox(&driver, &id, &network);
    shim.kill("", 15, false).expect("kill");
    shim.wait("").expect("wait");
    let mut spec = driver.spec(&one, &IDLE);
    spec["linux"]["cgroupsPath"] = json!(format!("/{}/{id}", t.node.namespace));
    let other = driver.start(&one, &spec);
    let pid = other.create(&Stdio3::default()).expect("create");
    other.start("").expect("start");
    shim.finish();
    assert!(process::is_alive(pid), "the other container was killed");
    assert_eq!(exec(t, &other, "lives", "echo alive"), (0, "alive".to_owned()));
    other.finish();
    driver.remove_bundle(&one);
    driver.remove_bundle(&id);
}

fn hooks_of_a_sandbox_run(t: &Test) {
    let driver = t.driver();
    let network = Netns::new();
    let id = t.id("pod");
    let mut spec = sandbox_spec(&driver, &id, &network.path());
    let log = t.file("hooks");
    let hook = |name: &str| {
        let script = format!("echo {name} $(cat) >> {log}");
        json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}])
    };
    spec["hooks"] = json!({
        "createRuntime": hook("create"), "poststart": hook("poststart"), "poststop": hook("poststop"),
    });
    let shim = driver.start(&id, &spec);
    let pid = shim.create(&Stdio3::default()).expect("create");
    shim.start("").expect("start");
    shim.finish();
    let text = fs::read_to_string(&log).expect("read what they wrote");
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 3, "{text}");
    for (line, (name, status)) in lines.iter().zip([
        ("create", "creating"),
        ("poststart", "running"),
        ("poststop", "stopped"),
    ]) {
        assert!(
            line.starts_with(name) && line.contains(&format!("\"status\":\"{status}\"")),
            "{line}"
        );
        assert!(name == "poststop" || line.contains(&format!("\"pid\":{pid},")), "{line}");
    }
    driver.remove_bundle(&id);
}

fn a_sandbox_whose_hook_hangs_can_be_killed(t: &Test) {
    let driver = t.driver();
    let network = Netns::new();
    let id = t.id("pod");
    let mut spec = sandbox_spec(&driver, &id, &network.path());
    let marker = t.file("hook");
    let script = format!("touch {marker}; exec sleep 1000");
    spec["hooks"] = json!({"poststart": [{"path": "/bin/sh", "args": ["sh", "-c", script]}]});
    let shim = driver.start(&id, &spec);
    shim.create(&Stdio3::default()).expect("create");
    let starting = {
        let shim = shim.clone();
        std::thread::spawn(move || shim.start(""))
    };
    eventually("its hook runs", Duration::from_secs(10), || {
        Path::new(&marker).exists().then_some(())
    });
    refused(shim.delete(""), "FailedPrecondition", "is being started");
    shim.kill("", 9, false).expect("kill");
    assert_eq!(shim.wait("").expect("wait").exit_status, 137);
    let refusal = starting.join().expect("the thread ends");
    refused(refusal, "FailedPrecondition", "has ended while it was being started");
    assert_eq!(shim.delete("").expect("delete").exit_status, 137);
    shim.finish();
    driver.remove_bundle(&id);
}

/// A member with these annotations beside its own, created and removed; what Proxmox showed of it.
fn shown(t: &Test, name: &str, annotations: &[(&str, &str)]) -> (String, String) {
    let driver = t.driver();
    let id = t.id(name);
    let mut spec = driver.spec(&id, &IDLE);
    for (key, value) in annotations {
        spec["annotations"][format!("io.kubernetes.cri.{key}")] = json!(value);
    }
    let shim = driver.start(&id, &spec);
    shim.create(&Stdio3::default()).expect("create");
    let text = {
        let pve = t.node.pve();
        let vmid = pve.vmid_of(&id).expect("it is a CT");
        let all = pve.configurations();
        let description = pve.call("GET", &pve.lxc(&format!("/{vmid}/config")), &[]);
        let notes = description["description"].as_str().expect("notes").to_owned();
        (all.into_iter().find(|(found, _)| *found == vmid).expect("it has a file").1, notes)
    };
    shim.finish();
    driver.remove_bundle(&id);
    text
}

fn proxmox_shows_the_pods_names(t: &Test) {
    let names = [
        ("sandbox-id", "s"),
        ("sandbox-name", "web-5d8f"),
        ("sandbox-namespace", "Shop"),
        ("sandbox-uid", "0b3c"),
        ("container-name", "nginx"),
        ("image-name", "docker.io/library/nginx:1"),
    ];
    let (config, notes) = shown(t, "named", &names);
    assert!(config.contains("\nhostname: web-5d8f-nginx\n"), "{config}");
    let tags = config.lines().find_map(|line| line.strip_prefix("tags: ")).expect("tags");
    let tags: Vec<_> = tags.split(';').collect();
    for tag in ["containerd", "shop", "web-5d8f"] {
        assert!(tags.contains(&tag), "{tags:?}");
    }
    let words =
        "pod: web-5d8f\npod namespace: Shop\npod uid: 0b3c\ncontainer: nginx\nimage: docker.io/";
    assert!(notes.contains(words), "{notes}");
}

fn hostile_names_stay_in_their_places(t: &Test) {
    let long = "x".repeat(64 << 10);
    let line =
        "a\ncontainerd-shim-proxmox: v1 install=0\r\nlxc.hook.pre-start = /bin/false\u{2028}";
    let names = [
        ("sandbox-name", line),
        ("sandbox-namespace", &long),
        ("sandbox-uid", line),
        ("container-name", &long),
        ("image-name", line),
    ];
    let (config, notes) = shown(t, "hostile", &names);
    assert!(config.len() < 8 << 10, "{}", config.len());
    let starting = |text: &str, start: &str| text.lines().filter(|l| l.starts_with(start)).count();
    assert_eq!(starting(&config, "lxc.hook"), 0, "{config}");
    assert_eq!(starting(&notes, "containerd-shim-proxmox:"), 1, "{notes}");
}
