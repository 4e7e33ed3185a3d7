//! Pods through containerd's CRI plugin, as the kubelet runs them, with CNI's plugins. Each test has a
//! node of its own.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use k8s_cri::v1::MountPropagation::{
    PropagationBidirectional, PropagationHostToContainer, PropagationPrivate,
};
use k8s_cri::v1::{AttachRequest, ExecRequest, NamespaceMode, PortForwardRequest};

use crate::harness::cri::{Container, Cri, IDS, Pod, Stream, Volume, words};
use crate::harness::image;
use crate::harness::node::{Node, Options};
use crate::harness::process::{self, Slice, eventually};
use crate::harness::test::Test;
use crate::harness::websocket::{Channels, ERROR, STDIN, STDOUT};
use crate::suites::{apparmor, own_node};

own_node!("cri", Options { cri: Some("podsandbox"), ..Options::default() };
    a_pod_runs_and_goes,
    a_pod_tells_its_containers_names,
    processes_are_executed_attached_and_forwarded_to,
    logs_are_written_and_rotated,
    resources_are_limited_counted_and_changed,
    pods_are_in_slices_of_systemd,
    security_contexts_are_applied,
    profiles_and_groups_are_applied,
    volumes_propagate_mounts_and_come_from_images,
    devices_are_given,
    namespaces_are_shared_as_asked,
    a_pod_can_be_in_the_nodes_namespaces,
    pods_survive_restarts_of_containerd,
    thirty_pods_come_and_go_twice,
);

/// For what containerd offers only if the shim says that it can do it. Its runtime has no options then.
pub fn feature_cases() -> Vec<crate::suites::Case> {
    own_node!("cri", Options {
        cri: Some("podsandbox"), cri_without_options: true, ..Options::default()
    };
        features_are_told_to_the_kubelet,
        mounts_are_read_only_with_all_below_them,
        pods_have_user_namespaces,
    );
    cases()
}

/// The same with the Sandbox service, which CRI can use from containerd 2.0 on; except for the load,
/// which is the same, and for pods on the node's network, for which containerd 2.1.9 itself crashes (a nil
/// pointer in its `NewBundle`).
pub fn shim_sandboxer_cases() -> Vec<crate::suites::Case> {
    const OTHERS: [&str; 4] = [
        "thirty_pods_come_and_go_twice",
        "a_pod_can_be_in_the_nodes_namespaces",
        "features_are_told_to_the_kubelet",
        "mounts_are_read_only_with_all_below_them",
    ];
    let cases = cases().into_iter().chain(feature_cases());
    let own = cases.filter(|case| !OTHERS.contains(&case.name));
    own.map(|case| crate::suites::Case {
        suite: "cri_shim",
        needs: crate::suites::Needs::OwnNode(|| Options {
            cri: Some("shim"),
            ..Options::default()
        }),
        ..case
    })
    .collect()
}

/// Removes all pods; nothing of them may be left.
fn finish(cri: &Cri) {
    nothing_is_left_of(cri, &[]);
}

/// The same, for pods of which some have been removed before.
fn nothing_is_left_of(cri: &Cri, removed: &[String]) {
    let mut pods = cri.pods();
    for pod in &pods {
        cri.remove_pod(pod);
    }
    pods.extend_from_slice(removed);
    let end = process::deadline(Duration::from_secs(15));
    loop {
        let left = remains(cri.node, &pods);
        if left.is_empty() {
            return;
        }
        assert!(std::time::Instant::now() < end, "left behind: {left:#?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn remains(node: &Node, pods: &[String]) -> Vec<String> {
    let mut left = node.remains("", pods);
    let root = node.root.display().to_string();
    left.extend(image::loop_devices_below(&root).map(|file| format!("loop device of {file}")));
    for entry in fs::read_dir(node.root.join("cni-data/e2e")).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with("last_reserved_ip") && name != "lock" {
            left.push(format!("address {name}"));
        }
    }
    // Network namespaces among them.
    let root = format!("{}/", node.root.display());
    for line in fs::read_to_string("/proc/self/mountinfo").unwrap_or_default().lines() {
        left.extend(
            line.split(' ')
                .nth(4)
                .filter(|at| at.starts_with(&root))
                .map(|at| format!("mount {at}")),
        );
    }
    let mine = format!("/{}/", node.tag);
    for (pid, line) in process::processes() {
        let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        if cgroup.contains(&mine) && process::is_alive(pid) {
            left.push(format!("process {pid} {line}"));
        }
    }
    // The pods' own directories are the kubelet's to remove; what is in them is not.
    for directory in process::cgroup_directories(&node.tag) {
        let text = directory.display().to_string();
        if text.rsplit_once(&mine).is_some_and(|(_, rest)| rest.contains('/')) {
            left.push(format!("cgroup {text}"));
        }
    }
    left
}

fn a_pod_runs_and_goes(t: &Test) {
    let cri = Cri { node: &t.node };
    let mut pod = Pod::new(&t.node, "web-0");
    pod.host_port = Some((8080, 18080));
    pod.sysctls = vec![("kernel.shm_rmid_forced", "1")];
    let id = cri.run_pod(&pod);
    let (ready, address) = cri.pod_status(&id);
    assert!(ready, "not ready");
    assert!(address.starts_with("10."), "{address}");
    assert_eq!(t.node.pve().vmid_of(&id), None, "the sandbox is no CT");

    // To CRI a restartable init container is one that was started first and goes on.
    let sidecar = cri.run(&id, &pod, &Container::idle("sidecar"));
    // An init container runs to its end first.
    let init = cri.run(&id, &pod, &Container::new("init", &["sh", "-c", "echo done; exit 0"]));
    eventually("the init container has ended", Duration::from_secs(20), || {
        cri.has_exited(&init).then_some(())
    });
    let status = cri.status(&init);
    assert_eq!((status.exit_code, status.reason.as_str()), (0, "Completed"));
    assert!(cri.is_running(&sidecar), "the end of another ended it");

    let server = "while :; do nc -l -p 8080 -e echo hello from $HOSTNAME; done";
    let server = cri.run(&id, &pod, &Container::new("server", &["sh", "-c", server]));
    let client = cri.run(&id, &pod, &Container::idle("client"));
    for container in [&server, &client] {
        assert!(cri.is_running(container));
        assert_eq!(cri.output(container, "hostname"), "web-0");
        assert_eq!(cri.output(container, "cat /proc/sys/kernel/shm_rmid_forced"), "1");
        assert!(cri.output(container, "cat /etc/hosts /etc/resolv.conf; ls /dev/shm").len() < 4096);
        let vmid = t.node.pve().vmid_of(container).expect("a container is a CT");
        let configurations = t.node.pve().configurations();
        let text = &configurations.iter().find(|(found, _)| *found == vmid).expect("its file").1;
        assert!(text.contains("hostname: web-0-"), "{text}");
        assert!(text.contains(";shop;web-0"), "{text}");
        let pve = t.node.pve();
        let config = pve.call("GET", &pve.lxc(&format!("/{vmid}/config")), &[]);
        drop(pve);
        let notes = config["description"].as_str().expect("notes").to_owned();
        assert!(notes.contains(&format!("\ndigest: {}\n", t.image_digest())), "{notes}");
    }
    // One shim for the pod, whatever the version of containerd.
    let shims: Vec<_> = t.node.shims("");
    assert_eq!(shims.len(), 1, "{shims:?}");

    assert_eq!(cri.output(&client, "nc 127.0.0.1 8080"), "hello from web-0");
    assert_eq!(cri.output(&client, "echo shared > /dev/shm/x; cat /dev/shm/x"), "shared");
    assert_eq!(cri.output(&server, "cat /dev/shm/x"), "shared");
    // From the node: the pod's address, and the port that portmap forwards.
    for target in [format!("{address}:8080"), "127.0.0.1:18080".to_owned()] {
        let greeting = eventually(&target, Duration::from_secs(10), || {
            let mut text = String::new();
            let mut stream = TcpStream::connect(&target).ok()?;
            stream.set_read_timeout(Some(process::scaled(Duration::from_secs(2)))).ok()?;
            stream.read_to_string(&mut text).ok()?;
            (!text.is_empty()).then_some(text)
        });
        assert_eq!(greeting.trim(), "hello from web-0");
    }

    // A container that fails and its successor, in the same pod.
    let failed = cri.run(&id, &pod, &Container::new("fails", &["sh", "-c", "exit 3"]));
    eventually("it has failed", Duration::from_secs(20), || cri.has_exited(&failed).then_some(()));
    let status = cri.status(&failed);
    assert_eq!((status.exit_code, status.reason.as_str()), (3, "Error"));
    cri.remove(&failed);
    let created = cri.try_create(&id, &pod, &Container::new("missing", &["/nonexistent"]));
    let missing = created.expect("it is found out at the start");
    let failure = cri.try_start(&missing);
    let message = failure.expect_err("there is no such program").message;
    assert!(message.contains("/nonexistent"), "{message}");
    assert_eq!(cri.output(&client, "echo untouched"), "untouched");

    cri.stop(&client, 5);
    assert_eq!(cri.status(&client).exit_code, 0, "SIGTERM came first");
    cri.stop(&server, 1);
    // The kubelet stops it after all others.
    assert_eq!(cri.output(&sidecar, "hostname"), "web-0");
    cri.stop(&sidecar, 5);
    assert_eq!(cri.status(&sidecar).exit_code, 0, "SIGTERM came first");
    cri.stop_pod(&id);
    assert!(!cri.pod_status(&id).0, "it is stopped");
    cri.stop_pod(&id);
    finish(&cri);
}

/// Whatever the image has in `/etc`.
fn a_pod_tells_its_containers_names(t: &Test) {
    let cri = Cri { node: &t.node };
    let mut pod = Pod::new(&t.node, "named");
    let search = vec!["shop.svc", "svc"];
    pod.dns = Some([vec!["10.96.0.10", "10.96.0.11"], search, vec!["ndots:5", "rotate"]]);
    let id = cri.run_pod(&pod);
    let one = cri.run(&id, &pod, &Container::idle("one"));
    let resolver = "search shop.svc svc\nnameserver 10.96.0.10\nnameserver 10.96.0.11\n\
                    options ndots:5 rotate";
    assert_eq!(cri.output(&one, "cat /etc/resolv.conf"), resolver);
    assert_eq!(cri.output(&one, "cat /etc/hostname"), "named");
    let hosts = fs::read_to_string("/etc/hosts").expect("the node has one");
    assert_eq!(cri.output(&one, "cat /etc/hosts"), hosts.trim_end());
    let owners = "stat -c %u:%g:%a /etc/hostname /etc/hosts /etc/resolv.conf";
    assert_eq!(cri.output(&one, owners), ["0:0:644"; 3].join("\n"));

    // They are the pod's, and can be changed.
    cri.output(&one, "echo 10.1.2.3 db >> /etc/hosts");
    let mut container = Container::idle("two");
    container.read_only = true;
    let two = cri.run(&id, &pod, &container);
    assert!(cri.output(&two, "cat /etc/hosts").ends_with("10.1.2.3 db"));
    assert_ne!(cri.exec(&two, "echo 10.1.2.4 db2 >> /etc/hosts").status, 0);
    // The kubelet brings its own hosts.
    let own = t.node.root.join("own-hosts");
    fs::write(&own, "10.9.9.9 other\n").expect("write a file");
    let mut container = Container::idle("three");
    container.mounts.push(Volume::new("/etc/hosts", &own.display().to_string()));
    let three = cri.run(&id, &pod, &container);
    assert_eq!(cri.output(&three, "cat /etc/hosts"), "10.9.9.9 other");
    assert_eq!(cri.output(&three, "cat /etc/resolv.conf"), resolver);

    let plain = Pod::new(&t.node, "plain");
    let id = cri.run_pod(&plain);
    let idle = cri.run(&id, &plain, &Container::idle("idle"));
    let of_node = fs::read_to_string("/etc/resolv.conf").expect("the node has one");
    assert_eq!(cri.output(&idle, "cat /etc/resolv.conf"), of_node.trim_end());
    finish(&cri);
}

fn processes_are_executed_attached_and_forwarded_to(t: &Test) {
    let cri = Cri { node: &t.node };
    let pod = Pod::new(&t.node, "exec");
    let id = cri.run_pod(&pod);
    let idle = cri.run(&id, &pod, &Container::idle("idle"));
    let executed = cri.exec(&idle, "echo out; echo err >&2; exit 5");
    assert_eq!(
        (executed.stdout.as_str(), executed.stderr.as_str(), executed.status),
        ("out\n", "err\n", 5)
    );
    // A probe that takes too long is killed: as with runc the one process, not what it has started.
    let slow = cri.try_exec(&idle, &["sh", "-c", "sleep 4322 & exec sleep 4321"], 1);
    let failure = slow.expect_err("it takes too long");
    assert!(failure.message.contains("timeout"), "{failure:?}");
    let left = "ps | grep -c '[s]leep 4321'; ps | grep -c '[s]leep 4322'";
    assert_eq!(cri.output(&idle, left), "0\n1");
    let missing = cri.try_exec(&idle, &["/nonexistent"], 5).expect_err("there is no such program");
    assert!(missing.message.contains("/nonexistent"), "{missing:?}");

    let request = |script: &str| ExecRequest {
        container_id: idle.clone(),
        cmd: words(&["sh", "-c", script]),
        stdin: true,
        stdout: true,
        ..ExecRequest::default()
    };
    let script = "read line; echo got $line; exit 6";
    let url = cri.stream(Stream::Exec(ExecRequest { stderr: true, ..request(script) }));
    let mut channels = Channels::open(&url);
    channels.send(STDIN, b"ping\n");
    channels.read_until(|received| received.contains_key(&ERROR));
    assert_eq!(channels.text(STDOUT), "got ping\n");
    assert!(channels.text(ERROR).contains("\"message\":\"6\""), "{}", channels.text(ERROR));
    let terminal = ExecRequest { tty: true, ..request("tty; stty size") };
    let url = cri.stream(Stream::Exec(terminal));
    let mut channels = Channels::open(&url);
    channels.read_until(|received| received.contains_key(&ERROR));
    assert!(channels.text(STDOUT).starts_with("/dev/pts/"), "{}", channels.text(STDOUT));

    let script = "while read line; do echo read $line; done; echo end";
    let mut container = Container::new("attached", &["sh", "-c", script]);
    (container.stdin, container.stdin_once) = (true, true);
    let attached = cri.run(&id, &pod, &container);
    let request = AttachRequest {
        container_id: attached.clone(),
        stdin: true,
        stdout: true,
        stderr: true,
        tty: false,
    };
    let mut channels = Channels::open(&cri.stream(Stream::Attach(request)));
    channels.send(STDIN, b"one\n");
    let has = |text: &'static str| {
        move |received: &std::collections::BTreeMap<u8, Vec<u8>>| {
            received.get(&STDOUT).is_some_and(|out| String::from_utf8_lossy(out).contains(text))
        }
    };
    channels.read_until(has("read one\n"));
    assert!(channels.text(STDOUT).contains("read one\n"), "{}", channels.text(STDOUT));
    drop(channels);
    eventually("stdin's end is the end of it", Duration::from_secs(20), || {
        cri.has_exited(&attached).then_some(())
    });
    assert_eq!(cri.status(&attached).exit_code, 0);

    let server = "while :; do nc -l -p 7070 -e cat; done";
    cri.run(&id, &pod, &Container::new("server", &["sh", "-c", server]));
    cri.output(
        &idle,
        "for i in 1 2 3 4 5 6 7 8 9; do nc -z 127.0.0.1 7070 && break; sleep 0.2; done",
    );
    let request = PortForwardRequest { pod_sandbox_id: id.clone(), port: vec![7070] };
    let url = cri.stream(Stream::PortForward(request));
    let mut channels = Channels::open(&format!("{url}?port=7070"));
    // Channel 0 carries the data of the first port, after the port's number.
    channels.send(0, b"through the pod");
    let answered = |received: &std::collections::BTreeMap<u8, Vec<u8>>| {
        received.get(&0).is_some_and(|data| data.ends_with(b"through the pod"))
    };
    channels.read_until(answered);
    assert!(answered(&channels.received), "{:?}", channels.received);
    drop(channels);
    finish(&cri);
}

fn logs_are_written_and_rotated(t: &Test) {
    let cri = Cri { node: &t.node };
    let pod = Pod::new(&t.node, "logs");
    let id = cri.run_pod(&pod);
    let termination = t.node.root.join("termination");
    fs::write(&termination, "").expect("create the termination log");
    let script = "i=0; while test -e /bin/sh; do i=$((i+1)); echo line $i; echo error $i >&2; \
                  test -e /tmp/stop && { echo last words > /dev/termination-log; exit 9; }; \
                  sleep 0.05; done";
    let mut container = Container::new("writer", &["sh", "-c", script]);
    let path = termination.display().to_string();
    container.mounts.push(Volume::new("/dev/termination-log", &path));
    let writer = cri.run(&id, &pod, &container);
    let log = std::path::Path::new(pod.logs()).join(container.log());
    let wait_for = |text: &str| {
        eventually(text, Duration::from_secs(20), || {
            fs::read_to_string(&log).ok().filter(|log| log.contains(text))
        })
    };
    let first = wait_for(" stdout F line 3\n");
    assert!(first.contains(" stderr F error 1\n"), "{first}");
    let rotated = log.with_extension("old");
    fs::rename(&log, &rotated).expect("rotate the log");
    cri.reopen_log(&writer);
    let second = wait_for(" stdout F line ");
    cri.output(&writer, "touch /tmp/stop");
    eventually("it has ended", Duration::from_secs(20), || cri.has_exited(&writer).then_some(()));
    assert_eq!(cri.status(&writer).exit_code, 9);
    assert_eq!(fs::read_to_string(&termination).expect("read it"), "last words\n");
    // No line is lost or repeated by the rotation.
    let all = fs::read_to_string(&rotated).expect("read the rotated log")
        + &fs::read_to_string(&log).expect("read the log");
    let numbers: Vec<u32> =
        all.lines().filter_map(|line| line.split_once(" stdout F line ")?.1.parse().ok()).collect();
    let expected: Vec<u32> = (1..=numbers.len() as u32).collect();
    assert_eq!(numbers, expected);
    assert!(!second.contains(" line 1\n"), "{second}");
    finish(&cri);
}

fn resources_are_limited_counted_and_changed(t: &Test) {
    let cri = Cri { node: &t.node };
    let pod = Pod::new(&t.node, "limits");
    let id = cri.run_pod(&pod);
    let mut container = Container::idle("limited");
    (container.memory, container.cpu_quota) = (Some(64 << 20), Some(50_000));
    let limited = cri.run(&id, &pod, &container);
    let pid = cri.pid(&limited);
    let memory =
        || process::cgroup_value(pid, &limited, "memory", "memory.limit_in_bytes", "memory.max");
    assert_eq!(memory(), (64 << 20).to_string());
    // The kubelet's pod cgroup contains it.
    let place = format!("/{}/limits/{limited}", t.node.tag);
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("read its cgroups");
    assert!(cgroups.lines().all(|line| line.contains(&place)), "{cgroups}");

    let before = cri.stats(&limited);
    // The second is memory until it is removed.
    cri.output(&limited, "dd if=/dev/zero of=/dev/null bs=1M count=2000 2>/dev/null");
    cri.output(&limited, "head -c 20971520 /dev/zero > /dev/shm/held");
    let now = cri.stats(&limited);
    assert!(now.cpu > before.cpu + 1_000_000, "{before:?} {now:?}");
    assert!((20 << 20..64 << 20).contains(&now.memory), "{now:?}");
    assert!(now.memory >= before.memory + (18 << 20), "{before:?} {now:?}");
    let listed = cri.all_stats()[&limited];
    assert!(listed.cpu >= now.cpu && listed.memory >= 20 << 20, "{now:?} {listed:?}");
    // 1.6 has no statistics of pods.
    if t.node.setting.version() >= (1, 7) {
        let pod = cri.pod_stats(&id);
        let in_it = pod.containers[&limited];
        assert!(in_it.cpu >= now.cpu && in_it.memory >= 20 << 20, "{now:?} {pod:?}");
        assert!(pod.all.cpu >= now.cpu && pod.all.memory >= 20 << 20, "{now:?} {pod:?}");
        // The container's shell and what that waits for.
        assert_eq!((pod.containers.len(), pod.processes), (1, 2), "{pod:?}");
        assert_eq!(pod.received.0, "eth0", "{pod:?}");
    }
    cri.output(&limited, "rm /dev/shm/held");

    container.memory = Some(32 << 20);
    (container.cpu_quota, container.cpu_shares) = (Some(25_000), Some(512));
    container.cpuset = "1";
    cri.update(&limited, &container);
    assert_eq!(memory(), (32 << 20).to_string());
    let value = |controller, v1, v2| process::cgroup_value(pid, &limited, controller, v1, v2);
    let quota = value("cpu", "cpu.cfs_quota_us", "cpu.max");
    assert_eq!(quota.split_whitespace().next(), Some("25000"));
    // 512 of 1024 are 20 of 100 on cgroup2, as runc converts them.
    let weight = value("cpu", "cpu.shares", "cpu.weight");
    assert!(["512", "20", "59"].contains(&weight.as_str()), "{weight}");
    let allowed = "grep Cpus_allowed_list: /proc/1/status";
    assert_eq!(cri.output(&limited, allowed), "Cpus_allowed_list:\t1");
    let vmid = t.node.pve().vmid_of(&limited).expect("it is a CT");
    let shown = {
        let pve = t.node.pve();
        pve.call("GET", &pve.lxc(&format!("/{vmid}/config")), &[])
    };
    let shown = |key: &str| shown[key].to_string().trim_matches('"').to_owned();
    assert_eq!((shown("memory"), shown("cpulimit")), ("32".to_owned(), "0.25".to_owned()));
    // What containerd remembers of it comes back with a restart of the container, not here: a value
    // that the node does not have changes nothing.
    container.cpuset = "4000";
    let refused = cri.try_update(&limited, &container).expect_err("there is no such processor");
    assert!(refused.message.contains("cpuset"), "{refused:?}");
    assert_eq!(cri.output(&limited, allowed), "Cpus_allowed_list:\t1");

    let mut greedy = Container::new("greedy", &["probe", "eat-memory", "256"]);
    greedy.memory = Some(32 << 20);
    let greedy = cri.run(&id, &pod, &greedy);
    eventually("it was killed", Duration::from_secs(30), || cri.has_exited(&greedy).then_some(()));
    let status = cri.status(&greedy);
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"), "{status:?}");
    assert_eq!(cri.output(&limited, "echo untouched"), "untouched");
    finish(&cri);
}

/// As a kubelet with the cgroup driver `systemd` has it.
/// The process that holds a pod's namespaces: in its cgroup, whichever way CRI has asked for it.
fn holder(id: &str) -> u32 {
    let processes = process::processes().into_iter().map(|(pid, _)| pid);
    let mut inside = processes.filter(|pid| {
        let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        cgroup.lines().any(|line| line.contains(id) && line.ends_with("/ns"))
    });
    inside.next().expect("the sandbox has a process")
}

fn pods_are_in_slices_of_systemd(t: &Test) {
    let cri = Cri { node: &t.node };
    let mut pod = Pod::new(&t.node, "sliced");
    let slice = Slice::new(&format!("{}-sliced", t.node.tag.replace('-', "_")));
    pod.cgroup = format!("/{}", slice.path());
    let id = cri.run_pod(&pod);
    let mut container = Container::idle("limited");
    container.memory = Some(64 << 20);
    let limited = cri.run(&id, &pod, &container);
    for (name, pid) in [(&id, holder(&id)), (&limited, cri.pid(&limited))] {
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("cgroups");
        let place = format!(":/{}/cri-containerd-{name}.scope/ns", slice.path());
        assert!(groups.lines().all(|line| line.ends_with(&place)), "{place}: {groups}");
    }
    if process::has_systemd() {
        process::run(std::process::Command::new("systemctl").arg("daemon-reload")).ok();
    }
    let scope = format!("cri-containerd-{limited}.scope");
    let memory = || slice.read(&scope, ["memory.limit_in_bytes", "memory.max"]);
    assert_eq!(memory(), Some((64 << 20).to_string()));
    container.memory = Some(32 << 20);
    cri.update(&limited, &container);
    assert_eq!(memory(), Some((32 << 20).to_string()));
    let figures = cri.stats(&limited);
    assert!(figures.cpu > 0 && figures.memory > 0, "{figures:?}");
    finish(&cri);
    for name in [&id, &limited] {
        let scope = format!("cri-containerd-{name}.scope");
        assert_eq!(slice.read(&scope, ["cgroup.procs"; 2]), None, "{scope} is gone");
    }
}

fn security_contexts_are_applied(t: &Test) {
    let cri = Cri { node: &t.node };
    let pod = Pod::new(&t.node, "security");
    let id = cri.run_pod(&pod);
    let shared = t.node.root.join("shared");
    fs::create_dir_all(&shared).expect("create a volume");
    fs::set_permissions(&shared, fs::Permissions::from_mode(0o777)).expect("open it to all");
    let shared = shared.display().to_string();
    let mut container = Container::idle("strict");
    container.user = Some((1000, 1001));
    container.groups = vec![2000, 3000];
    (container.read_only, container.no_new_privileges, container.seccomp) = (true, true, true);
    container.dropped = vec!["ALL"];
    container.added = vec!["NET_BIND_SERVICE"];
    container.mounts.push(Volume::new("/data", &shared));
    container.mounts.push(Volume { read_only: true, ..Volume::new("/readonly", &shared) });
    let strict = cri.run(&id, &pod, &container);
    // 1234 is what the image says of that user.
    assert_eq!(cri.output(&strict, "id -u; id -g; id -G"), "1000\n1001\n1001 1234 2000 3000");
    let status = cri.output(&strict, "cat /proc/1/status");
    for line in ["CapBnd:\t0000000000000400", "NoNewPrivs:\t1", "Seccomp:\t2"] {
        assert!(status.contains(line), "{line} is not in {status}");
    }
    // CRI names its own profile for every container where the node has AppArmor.
    let labels = |profile: &str| apparmor::is_enabled().then(|| profile.to_owned());
    assert_eq!(apparmor::label(cri.pid(&strict)), labels("cri-containerd.apparmor.d (enforce)"));
    assert_ne!(cri.exec(&strict, "touch /x").status, 0, "the root is read-only");
    assert_ne!(cri.exec(&strict, "touch /readonly/x").status, 0);
    cri.output(&strict, "touch /data/x && test -e /readonly/x");
    assert_ne!(cri.exec(&strict, "echo 1 > /proc/sys/kernel/core_uses_pid").status, 0);
    assert_eq!(cri.output(&strict, "head -c 1 /proc/kcore | wc -c"), "0", "it is masked");

    let mut pod = Pod::new(&t.node, "privileged");
    pod.privileged = true;
    let id = cri.run_pod(&pod);
    let mut container = Container::idle("privileged");
    container.privileged = true;
    container.mounts.push(Volume::new("/data", &shared));
    let privileged = cri.run(&id, &pod, &container);
    let own = process::status_field(std::process::id(), "CapBnd").expect("our capabilities");
    let status = cri.output(&privileged, "cat /proc/1/status");
    assert!(status.contains(&format!("CapEff:\t{own}")), "{status}");
    assert_eq!(apparmor::label(cri.pid(&privileged)), labels("unconfined"));
    cri.output(&privileged, "mount -t tmpfs none /mnt && test -w /proc/sys/kernel && test -e /dev/mem -o -e /dev/loop-control -o -e /dev/fuse -o -e /dev/null");

    // What does not exist is refused, and nothing stays of it.
    let mut container = Container::idle("broken");
    container.mounts.push(Volume::new("/x", "/proc/nonexistent"));
    cri.try_create(&id, &pod, &container).expect_err("the source can't exist");
    finish(&cri);
}

fn profiles_and_groups_are_applied(t: &Test) {
    let cri = Cri { node: &t.node };
    let pod = Pod::new(&t.node, "profiles");
    let id = cri.run_pod(&pod);
    let profile = t.node.root.join("seccomp.json").display().to_string();
    let rule = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 31}]}"#;
    fs::write(&profile, rule).expect("write the profile");
    let mut container = Container::idle("localhost");
    container.seccomp_profile = Some(format!("localhost/{profile}"));
    let localhost = cri.run(&id, &pod, &container);
    let made = cri.exec(&localhost, "mkdir /tmp/x");
    assert!(made.status != 0 && made.stderr.contains("Too many links"), "{made:?}");
    cri.output(&localhost, "touch /tmp/x");
    container.name = "missing".to_owned();
    container.seccomp_profile = Some(format!("localhost/{profile}.missing"));
    cri.try_create(&id, &pod, &container).expect_err("there is no such profile");

    let enabled = fs::read_to_string("/sys/module/apparmor/parameters/enabled");
    let mut container = Container::idle("confined");
    if enabled.is_ok_and(|enabled| enabled.starts_with('Y')) {
        // containerd gives it its own by default.
        let confined = cri.run(&id, &pod, &container);
        let label = "cat /proc/1/attr/current /proc/self/attr/current";
        let own = "cri-containerd.apparmor.d (enforce)";
        assert_eq!(cri.output(&confined, label), format!("{own}\n{own}"));
        assert_ne!(cri.exec(&confined, "echo 1 > /proc/sysrq-trigger").status, 0);
        (container.name, container.apparmor) = ("unconfined".to_owned(), Some("unconfined"));
        let unconfined = cri.run(&id, &pod, &container);
        assert_eq!(cri.output(&unconfined, label), "unconfined\nunconfined");
        container.name = "named".to_owned();
        container.apparmor = Some("localhost/cri-containerd.apparmor.d");
        let named = cri.run(&id, &pod, &container);
        assert_eq!(cri.output(&named, label), format!("{own}\n{own}"));
        (container.name, container.apparmor) = ("absent".to_owned(), Some("localhost/absent"));
        cri.try_create(&id, &pod, &container).expect_err("there is no such profile");
    } else {
        // Never silently without.
        container.apparmor = Some("localhost/absent");
        let refused = cri.try_create(&id, &pod, &container).expect_err("the node cannot");
        assert!(refused.message.contains("apparmor"), "{refused:?}");
    }

    // From 2.0 on.
    if t.node.setting.version() >= (2, 0) {
        let mut container = Container::idle("strict");
        (container.user, container.groups) = (Some((1000, 1001)), vec![2000]);
        container.strict_groups = true;
        let strict = cri.run(&id, &pod, &container);
        assert_eq!(
            cri.output(&strict, "id -G; grep Groups: /proc/1/status"),
            "1001 2000\nGroups:\t1001 2000"
        );
    }
    finish(&cri);
}

/// A directory of the node with mounts of its own, shared with whoever has it.
struct SharedDirectory(String);

impl SharedDirectory {
    fn new(path: &std::path::Path) -> SharedDirectory {
        fs::create_dir_all(path.join("below")).expect("create a directory");
        let path = path.display().to_string();
        mount(&["--bind", &path, &path]);
        mount(&["--make-shared", &path]);
        SharedDirectory(path)
    }

    fn mount_below(&self, file: &str) {
        let below = format!("{}/below", self.0);
        mount(&["-t", "tmpfs", "none", &below]);
        fs::write(format!("{below}/{file}"), "x").expect("write");
    }
}

impl Drop for SharedDirectory {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").args(["--recursive", &self.0]).status();
    }
}

fn mount(arguments: &[&str]) {
    process::run(std::process::Command::new("mount").args(arguments)).ok();
}

fn volumes_propagate_mounts_and_come_from_images(t: &Test) {
    let cri = Cri { node: &t.node };
    let pod = Pod::new(&t.node, "volumes");
    let id = cri.run_pod(&pod);
    let shared = SharedDirectory::new(&t.node.root.join("shared"));
    let volume = |name: &str, propagation| {
        let mut container = Container::idle(name);
        container.mounts.push(Volume { propagation, ..Volume::new("/data", &shared.0) });
        container
    };
    let private = cri.run(&id, &pod, &volume("private", PropagationPrivate));
    let slave = cri.run(&id, &pod, &volume("slave", PropagationHostToContainer));
    shared.mount_below("late");
    assert_ne!(cri.exec(&private, "test -e /data/below/late").status, 0);
    cri.output(&slave, "test -e /data/below/late");
    // What is mounted already is there for everybody, and is not read-only because what is above is.
    let mut container = volume("late", PropagationPrivate);
    container.mounts[0].read_only = true;
    let late = cri.run(&id, &pod, &container);
    cri.output(&late, "test -e /data/below/late && touch /data/below/only-the-top-is");
    assert_ne!(cri.exec(&late, "touch /data/x").status, 0);

    // Bidirectional propagation is for privileged containers.
    let mut privileged = Pod::new(&t.node, "csi");
    privileged.privileged = true;
    let driver_pod = cri.run_pod(&privileged);
    let mut container = volume("driver", PropagationBidirectional);
    container.privileged = true;
    let driver = cri.run(&driver_pod, &privileged, &container);
    cri.output(&driver, "mkdir /data/published && mount -t tmpfs none /data/published");
    cri.output(&driver, "touch /data/published/by-driver");
    assert!(std::path::Path::new(&shared.0).join("published/by-driver").exists());
    cri.output(&slave, "test -e /data/published/by-driver");
    cri.output(&driver, "umount /data/published");
    assert_ne!(cri.exec(&slave, "test -e /data/published/by-driver").status, 0);
    // A directory whose mounts nobody shares cannot propagate any.
    mount(&["--make-private", &shared.0]);
    container.name = "unshared".to_owned();
    let refused = cri.try_create(&driver_pod, &privileged, &container);
    let refused = refused.and_then(|created| cri.try_start(&created));
    let message = refused.expect_err("the mount is private").message;
    assert!(message.contains("not a shared mount"), "{message}");
    if t.node.setting.version() >= (2, 1) {
        let mut container = Container::idle("with-image");
        container.image_volumes = vec![("/volume", image::IMAGE)];
        let with_image = cri.run(&id, &pod, &container);
        assert_eq!(cri.output(&with_image, "cat /volume/etc/not-executable"), "#!/bin/sh");
        assert_ne!(cri.exec(&with_image, "touch /volume/x").status, 0);
    }
    // What is mounted below the node's directory is no remainder of the pods.
    drop(shared);
    finish(&cri);
}

fn devices_are_given(t: &Test) {
    let cri = Cri { node: &t.node };
    let pod = Pod::new(&t.node, "devices");
    let id = cri.run_pod(&pod);
    let mut container = Container::idle("plain");
    container.devices =
        vec![("/dev/clock", "/dev/zero", "r"), ("/dev/inner/null", "/dev/null", "rwm")];
    let plain = cri.run(&id, &pod, &container);
    assert_eq!(
        cri.output(&plain, "head -c 3 /dev/clock | wc -c; stat -c %t:%T /dev/inner/null"),
        "3\n1:3"
    );
    cri.output(&plain, "echo x > /dev/inner/null");
    container.devices = vec![("/dev/x", "/dev/nonexistent", "r")];
    container.name = "missing".to_owned();
    cri.try_create(&id, &pod, &container).expect_err("there is no such device");

    // From 1.7 on.
    if t.node.setting.version() >= (1, 7) {
        let directory = t.node.root.join("cdi");
        fs::create_dir_all(&directory).expect("create CDI's directory");
        let shared = t.node.root.join("cdi-volume");
        fs::create_dir_all(&shared).expect("create a directory");
        fs::write(shared.join("library"), "of the vendor").expect("write");
        let spec = serde_json::json!({
            "cdiVersion": "0.5.0",
            "kind": "example.com/clock",
            "devices": [{
                "name": "one",
                "containerEdits": {
                    "env": ["CLOCK=one"],
                    "deviceNodes": [{"path": "/dev/clock0", "hostPath": "/dev/zero", "permissions": "r"}],
                    "mounts": [{
                        "hostPath": shared, "containerPath": "/opt/vendor", "options": ["ro", "bind"],
                    }],
                },
            }],
        });
        fs::write(directory.join("clock.json"), spec.to_string()).expect("write CDI's file");
        let mut container = Container::idle("cdi");
        container.cdi_devices = vec!["example.com/clock=one"];
        let cdi = cri.run(&id, &pod, &container);
        let script = "echo $CLOCK; head -c 5 /dev/clock0 | wc -c; cat /opt/vendor/library";
        assert_eq!(cri.output(&cdi, script), "one\n5\nof the vendor");
        container.name = "unknown".to_owned();
        container.cdi_devices = vec!["example.com/clock=two"];
        let refused = cri.try_create(&id, &pod, &container).expect_err("there is no such device");
        assert!(refused.message.contains("example.com/clock=two"), "{refused:?}");
    }
    finish(&cri);
}

fn features_are_told_to_the_kubelet(t: &Test) {
    let cri = Cri { node: &t.node };
    let known = t.node.setting.version() >= (2, 0);
    assert_eq!(cri.features(), [known; 2]);
}

fn mounts_are_read_only_with_all_below_them(t: &Test) {
    let cri = Cri { node: &t.node };
    let pod = Pod::new(&t.node, "readonly");
    let id = cri.run_pod(&pod);
    let shared = SharedDirectory::new(&t.node.root.join("shared"));
    shared.mount_below("x");
    let mut container = Container::idle("readonly");
    container.mounts.push(Volume { read_only: true, ..Volume::new("/data", &shared.0) });
    let readonly = cri.run(&id, &pod, &container);
    cri.output(&readonly, "touch /data/below/only-the-top-is");
    assert_ne!(cri.exec(&readonly, "touch /data/x").status, 0);
    // From 2.0 on.
    if t.node.setting.version() >= (2, 0) {
        container.name = "recursively".to_owned();
        container.recursive_read_only = true;
        let recursively = cri.run(&id, &pod, &container);
        cri.output(&recursively, "test -e /data/below/x");
        assert_ne!(cri.exec(&recursively, "touch /data/below/x").status, 0);
    }
    cri.remove_pod(&id);
    drop(shared);
    finish(&cri);
}

/// `hostUsers: false`.
fn pods_have_user_namespaces(t: &Test) {
    let cri = Cri { node: &t.node };
    // CRI itself knows them from 1.7 on.
    if t.node.setting.version() < (1, 7) {
        let mut pod = Pod::new(&t.node, "unknown");
        pod.users = Some(1_000_000);
        let id = cri.run_pod(&pod);
        let idle = cri.run(&id, &pod, &Container::idle("idle"));
        assert_eq!(namespace(cri.pid(&idle), "user"), namespace(std::process::id(), "user"));
        return finish(&cri);
    }
    let volume = t.node.root.join("volume");
    fs::create_dir_all(&volume).expect("create a volume");
    for (name, pids) in
        [("mapped", NamespaceMode::Container), ("mapped-processes", NamespaceMode::Pod)]
    {
        let mut pod = Pod::new(&t.node, name);
        pod.users = Some(1_000_000);
        pod.namespaces[1] = pids;
        pod.sysctls =
            vec![("net.ipv4.ip_unprivileged_port_start", "7"), ("kernel.shm_rmid_forced", "1")];
        let id = cri.run_pod(&pod);
        let (ready, address) = cri.pod_status(&id);
        assert!(ready && address.starts_with("10."), "{ready} {address}");
        assert_eq!(t.node.pve().vmid_of(&id), None, "the sandbox is no CT");
        let server = "while :; do nc -l -p 80 -e echo hello from $HOSTNAME; done";
        let server = cri.run(&id, &pod, &Container::new("server", &["sh", "-c", server]));
        let mut container = Container::idle("client");
        container.added = vec!["NET_ADMIN"];
        // containerd 1.7 refuses to map the ids of volumes.
        let maps_volumes = t.node.setting.version() >= (2, 0);
        if maps_volumes {
            container.mounts.push(Volume::new("/data", &volume.display().to_string()));
        }
        let client = cri.run(&id, &pod, &container);
        let pids: Vec<u32> = [&server, &client].map(|container| cri.pid(container)).to_vec();
        for (container, pid) in [&server, &client].into_iter().zip(&pids) {
            assert_eq!(process::status_field(*pid, "Uid").expect("Uid"), ["1000000"; 4].join("\t"));
            let map = cri.output(container, "cat /proc/self/uid_map");
            assert_eq!(
                map.split_whitespace().collect::<Vec<_>>(),
                ["0", "1000000", &IDS.to_string()]
            );
            assert_eq!(
                cri.output(container, "hostname; id -u; stat -c %u:%g / /bin/busybox"),
                format!("{name}\n0\n0:0\n0:0")
            );
            assert_eq!(cri.output(container, "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced"), "7\n1");
        }
        for kind in ["user", "net", "ipc", "uts"] {
            assert_eq!(namespace(pids[0], kind), namespace(pids[1], kind), "{kind}");
            assert_ne!(namespace(pids[0], kind), namespace(std::process::id(), kind), "{kind}");
        }
        // Its root is that of the pod's network, and of nothing else.
        cri.output(&client, "ip address add 10.255.255.1/32 dev lo && ls /sys/class/net/eth0");
        assert_ne!(cri.exec(&client, "hostname other").status, 0);
        cri.output(&client, "echo shared > /dev/shm/x");
        assert_eq!(cri.output(&server, "cat /dev/shm/x"), "shared");
        eventually("the server listens", Duration::from_secs(10), || {
            let greeting = cri.exec(&client, "nc 127.0.0.1 80").stdout;
            (greeting.trim() == format!("hello from {name}")).then_some(())
        });
        if maps_volumes {
            let own = "echo 10.1.2.3 db >> /etc/hosts && stat -c %u:%g /etc/resolv.conf";
            assert_eq!(cri.output(&client, own), "0:0");
            cri.output(&client, &format!("touch /data/{name} && stat -c %u /data | grep -qx 0"));
            let file = fs::metadata(volume.join(name)).expect("it was made");
            assert_eq!(std::os::unix::fs::MetadataExt::uid(&file), 0);
        }
        let failed = cri.run(&id, &pod, &Container::new("fails", &["sh", "-c", "exit 3"]));
        eventually("it has failed", Duration::from_secs(20), || {
            cri.has_exited(&failed).then_some(())
        });
        assert_eq!(cri.status(&failed).exit_code, 3);
        assert_eq!(t.node.shims("").len(), 1);
        cri.stop(&client, 5);
        assert_eq!(cri.status(&client).exit_code, 0, "SIGTERM came first");
        finish(&cri);
    }
}

fn namespace(pid: u32, kind: &str) -> std::path::PathBuf {
    fs::read_link(format!("/proc/{pid}/ns/{kind}")).expect("read a namespace")
}

fn a_pod_can_be_in_the_nodes_namespaces(t: &Test) {
    let cri = Cri { node: &t.node };
    let mut pod = Pod::new(&t.node, "host");
    pod.namespaces = [NamespaceMode::Node; 3];
    pod.privileged = true;
    let id = cri.run_pod(&pod);
    let mut container = Container::idle("host");
    container.privileged = true;
    let host = cri.run(&id, &pod, &container);
    for kind in ["net", "pid", "ipc"] {
        assert_eq!(namespace(cri.pid(&host), kind), namespace(std::process::id(), kind), "{kind}");
    }
    assert_eq!(cri.output(&host, "hostname"), cri.output(&host, "cat /proc/sys/kernel/hostname"));
    // It sees all processes of the node, but only its own are listed, and end with it.
    let me = std::process::id();
    cri.output(&host, &format!("test -d /proc/{me}"));
    let other = cri.run(&id, &pod, &Container { name: "other".to_owned(), ..container.clone() });
    cri.exec(&host, "sleep 5432 & true");
    let own = cri.pids(&host);
    let of_other = cri.pids(&other);
    assert!(own.len() == 3 && !own.contains(&me), "{own:?}");
    assert!(own.iter().all(|pid| !of_other.contains(pid)), "{own:?} {of_other:?}");
    cri.stop(&host, 1);
    assert!(own.iter().all(|pid| !process::is_alive(*pid)), "{own:?}");
    assert_eq!(cri.pids(&other), of_other);
    assert_eq!(cri.output(&other, "echo untouched"), "untouched");
    // A sysctl of the network would be the node's.
    pod.name = "unsafe".to_owned();
    pod.sysctls = vec![("net.ipv4.ip_forward", "1")];
    let refused = cri.try_run_pod(&pod).expect_err("it is the node's");
    assert!(refused.message.contains("net.ipv4.ip_forward"), "{refused:?}");
    finish(&cri);
}

fn namespaces_are_shared_as_asked(t: &Test) {
    let cri = Cri { node: &t.node };
    let mut pod = Pod::new(&t.node, "processes");
    pod.namespaces = [NamespaceMode::Pod; 3];
    let id = cri.run_pod(&pod);
    let one = cri.run(&id, &pod, &Container::idle("one"));
    let two = cri.run(&id, &pod, &Container::idle("two"));
    assert_eq!(cri.output(&one, "cat /proc/1/comm"), "pod-sandbox");
    assert_eq!(cri.output(&one, "ps | grep -c '[s]leep 1000$'"), "2");
    cri.stop(&one, 0);
    assert!(cri.is_running(&two), "the other one runs");
    assert_eq!(cri.output(&two, "ps | grep -c '[s]leep 1000$'"), "1");

    // A debug container that joins another container's processes.
    let pod = Pod::new(&t.node, "debug");
    let id = cri.run_pod(&pod);
    let target = cri.run(&id, &pod, &Container::idle("target"));
    assert_eq!(cri.output(&target, "cat /proc/1/comm"), "sh");
    let mut container = Container::idle("debugger");
    container.target = Some(target.clone());
    let debugger = cri.run(&id, &pod, &container);
    assert_eq!(namespace(cri.pid(&debugger), "pid"), namespace(cri.pid(&target), "pid"));
    assert_eq!(cri.output(&debugger, "ps | grep -c '[s]leep 1000$'"), "2");
    let (of_target, of_debugger) = (cri.pids(&target), cri.pids(&debugger));
    assert!(of_debugger.contains(&cri.pid(&debugger)) && of_target.contains(&cri.pid(&target)));
    assert!(
        of_target.iter().all(|pid| !of_debugger.contains(pid)),
        "{of_target:?} {of_debugger:?}"
    );
    cri.stop(&debugger, 0);
    assert!(of_debugger.iter().all(|pid| !process::is_alive(*pid)), "{of_debugger:?}");
    assert_eq!(cri.output(&target, "echo untouched"), "untouched");
    // The processes of a target are those of the debugger's namespace: its end is the end of both.
    container.name = "second".to_owned();
    let second = cri.run(&id, &pod, &container);
    cri.stop(&target, 1);
    eventually("it ends with its target", Duration::from_secs(10), || {
        cri.has_exited(&second).then_some(())
    });
    assert_eq!(cri.status(&second).exit_code, 137);
    // And nobody can join what is not there any more.
    container.name = "late".to_owned();
    cri.try_create(&id, &pod, &container).expect_err("the target has ended");
    finish(&cri);
}

fn pods_survive_restarts_of_containerd(t: &Test) {
    let cri = Cri { node: &t.node };
    let pod = Pod::new(&t.node, "survivor");
    let id = cri.run_pod(&pod);
    let idle = cri.run(&id, &pod, &Container::idle("idle"));
    let ends = Container::new(
        "ends",
        &["sh", "-c", "while ! test -e /tmp/go; do sleep 0.1; done; exit 4"],
    );
    let ends = cri.run(&id, &pod, &ends);
    let pids = [holder(&id), cri.pid(&idle), cri.pid(&ends)];
    for signal in [libc::SIGTERM, libc::SIGKILL] {
        t.node.stop_containerd(signal);
        assert!(pids.iter().all(|pid| process::is_alive(*pid)), "the pod died with containerd");
        if signal == libc::SIGKILL {
            let go = fs::File::create(format!("/proc/{}/root/tmp/go", pids[2]));
            go.expect("tell it to end").write_all(b"").expect("write nothing");
            eventually("it ends meanwhile", Duration::from_secs(10), || {
                (!process::is_alive(pids[2])).then_some(())
            });
        }
        t.node.start_containerd();
        eventually("CRI is back", Duration::from_secs(20), || cri.is_up().then_some(()));
        assert!(cri.pod_status(&id).0, "not ready");
        assert_eq!(cri.output(&idle, "hostname"), "survivor");
    }
    eventually("its end is known", Duration::from_secs(20), || cri.has_exited(&ends).then_some(()));
    assert_eq!(cri.status(&ends).exit_code, 4);
    let late = cri.run(&id, &pod, &Container::idle("late"));
    assert_eq!(cri.output(&late, "hostname"), "survivor");
    assert_eq!(t.node.shims("").len(), 1);
    finish(&cri);
}

/// 30 pods of 3 containers each, all at once, and again. Fewer on an emulated machine.
fn thirty_pods_come_and_go_twice(t: &Test) {
    let cri = Cri { node: &t.node };
    for round in 0..2 {
        let removed: Vec<String> = std::thread::scope(|scope| {
            let pods: Vec<_> = (0..process::at_once(30))
                .map(|number| {
                    let cri = &cri;
                    scope.spawn(move || {
                        let pod = Pod::new(cri.node, &format!("load-{round}-{number}"));
                        let id = cri.run_pod(&pod);
                        let containers = ["one", "two", "three"]
                            .map(|name| cri.run(&id, &pod, &Container::idle(name)));
                        for container in &containers {
                            assert_eq!(cri.output(container, "hostname"), pod.name);
                        }
                        cri.stop(&containers[0], 5);
                        assert_eq!(cri.status(&containers[0]).exit_code, 0);
                        // With the other two still running.
                        cri.remove_pod(&id);
                        id
                    })
                })
                .collect();
            let ended = pods.into_iter().map(|pod| pod.join());
            ended.map(|id| id.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
        });
        assert_eq!(removed.len(), process::at_once(30) as usize);
        nothing_is_left_of(&cri, &removed);
    }
}
