//! Containers whose root is not the node's root.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::direct::{Driver, Shim, Stdio3, mount};
use crate::harness::process::{self, eventually};
use crate::harness::terminal::Terminal;
use crate::harness::test::Test;
use crate::harness::{image, sys};
use crate::suites::cases;

cases!("userns":;
    proxmox:
    root_of_the_container_is_not_that_of_the_node,
    files_keep_their_ids_on_the_disk,
    mounts_and_devices_work,
    process_settings_are_applied,
    volumes_are_mapped_only_when_asked,
    exec_enters_the_user_namespace,
    terminals_work,
    pipes_can_be_opened_by_their_paths,
    network_namespace_of_the_node_can_be_joined,
    user_namespace_of_another_container_is_joined,
    rootfs_without_mounts_is_mapped,
    images_are_mapped,
    snapshot_that_containerd_has_chowned_is_not_mapped_again,
    unprivileged_containers_of_containerd,
    unprivileged_members_of_a_pod_share_namespaces_of_the_node,
    ids_that_lxc_may_not_use_are_named,
    what_lxc_cannot_reach_is_named,
    create_container_hooks_run,
    what_a_user_namespace_cannot_have_is_named,
    crash_leaves_nothing,
);

const HOST_ROOT: u32 = 1_000_000;
const SIZE: u32 = 65_536;

/// Gives a specification a user namespace: 0 of the container is [`HOST_ROOT`].
pub fn in_user_namespace(spec: &mut Value) {
    let linux = &mut spec["linux"];
    linux["namespaces"].as_array_mut().expect("a list").push(json!({"type": "user"}));
    for field in ["uidMappings", "gidMappings"] {
        linux[field] = json!([{"containerID": 0, "hostID": HOST_ROOT, "size": SIZE}]);
    }
}

fn push(spec: &mut Value, mount: Value) {
    spec["mounts"].as_array_mut().expect("a list").push(mount);
}

/// Runs a script in a user namespace: its output.
#[track_caller]
fn run(t: &Test, id: &str, script: &str, change: impl FnOnce(&mut Value)) -> String {
    let (status, text) = t
        .run_spec(id, &["sh", "-c", script], |spec| {
            in_user_namespace(spec);
            change(spec);
        })
        .expect("it runs");
    assert_eq!(status, 0, "{text}");
    text
}

/// A container in the background.
fn idle<'a>(
    t: &Test,
    driver: &Driver<'a>,
    id: &str,
    change: impl FnOnce(&mut Value),
) -> (Shim, u32) {
    let mut spec = driver.spec(id, &["sleep", "1000"]);
    in_user_namespace(&mut spec);
    change(&mut spec);
    let shim = driver.start(id, &spec);
    let pid = shim.create(&Stdio3::default()).expect("create");
    shim.start("").expect("start");
    assert!(t.node.has_pve());
    (shim, pid)
}

/// Runs an exec to its end: its status and output.
fn exec(t: &Test, shim: &Shim, exec: &str, process: Value) -> (u32, String) {
    let log = t.file(&format!("{}-{exec}.out", shim.id));
    let uri = format!("file://{log}");
    let io = Stdio3 { stdout: uri.clone(), stderr: uri, ..Stdio3::default() };
    shim.exec(exec, &process, &io).expect("exec");
    shim.start(exec).expect("start the exec");
    let status = shim.wait(exec).expect("wait").exit_status;
    shim.delete(exec).expect("delete the exec");
    (status, fs::read_to_string(log).unwrap_or_default().trim_end().to_owned())
}

fn command(arguments: &[&str]) -> Value {
    json!({"args": arguments, "env": ["PATH=/bin"], "cwd": "/", "user": {"uid": 0, "gid": 0}})
}

fn root_of_the_container_is_not_that_of_the_node(t: &Test) {
    let driver = t.driver();
    let id = t.id("a");
    let (shim, pid) = idle(t, &driver, &id, |_| {});
    let uids = process::status_field(pid, "Uid").expect("Uid");
    assert_eq!(uids, ["1000000"; 4].join("\t"));
    let map = fs::read_to_string(format!("/proc/{pid}/uid_map")).expect("uid_map");
    let map: Vec<_> = map.split_whitespace().collect();
    assert_eq!(map, ["0", "1000000", "65536"]);
    // Proxmox knows it.
    let config = {
        let pve = t.node.pve();
        let vmid = pve.vmid_of(&id).expect("a CT");
        pve.call("GET", &pve.lxc(&format!("/{vmid}/config")), &[])
    };
    assert_eq!(config["unprivileged"].to_string().trim_matches('"'), "1");
    // Its group may write to its cgroup, but not to the limits. (cgroup v1 cannot be delegated.)
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("cgroup");
    let path = cgroups.lines().find_map(|line| line.strip_prefix("0::/")).expect("cgroup2");
    let root = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .into_iter()
        .find(|root| Path::new(root).join("cgroup.procs").exists())
        .expect("cgroup2 is mounted");
    let cgroup = Path::new(root).join(path);
    let group_and_mode = |directory: &Path| {
        let file = fs::metadata(directory.join("cgroup.procs")).expect("cgroup.procs");
        (file.gid(), file.mode() & 0o777)
    };
    assert_eq!(group_and_mode(&cgroup), (HOST_ROOT, 0o664), "{}", cgroup.display());
    assert_eq!(group_and_mode(cgroup.parent().expect("a parent")), (0, 0o644));
    let (status, text) = exec(t, &shim, "id", command(&["sh", "-c", "id -u; id -g"]));
    assert_eq!((status, text.as_str()), (0, "0\n0"));
    shim.finish();
    driver.remove_bundle(&id);
}

fn files_keep_their_ids_on_the_disk(t: &Test) {
    let driver = t.driver();
    let id = t.id("a");
    let script = "stat -c %u:%g /bin/busybox /; echo new > /new; mkdir /made; chown 1000:1001 /new; \
                  echo changed >> /etc/passwd; rm /etc/group; ln -s x /link; mkfifo /fifo; \
                  chown 5 /link -h 2>/dev/null || busybox chown -h 5 /link";
    let mut spec = driver.spec(&id, &["sh", "-c", script]);
    in_user_namespace(&mut spec);
    let shim = driver.start(&id, &spec);
    let uri = format!("file://{}", t.file("out"));
    let io = Stdio3 { stdout: uri.clone(), stderr: uri, ..Stdio3::default() };
    shim.create(&io).and_then(|_| shim.start("")).expect("it runs");
    assert_eq!(shim.wait("").expect("wait").exit_status, 0);
    let upper = shim.bundle.join("upper");
    shim.finish();
    assert_eq!(fs::read_to_string(t.file("out")).expect("output"), "0:0\n0:0\n");
    let owner = |path: &str| {
        let file = upper.join(path).symlink_metadata().expect(path);
        (file.uid(), file.gid())
    };
    assert_eq!(owner("new"), (1000, 1001));
    assert_eq!(owner("link").0, 5);
    for path in ["", "made", "etc", "etc/passwd", "etc/group", "fifo"] {
        assert_eq!(owner(path), (0, 0), "{path}");
    }
    // What is removed is a whiteout.
    let removed = upper.join("etc/group").symlink_metadata().expect("whiteout");
    assert_eq!((removed.mode() & libc::S_IFMT, removed.rdev()), (libc::S_IFCHR, 0));
    driver.remove_bundle(&id);
}

fn mounts_and_devices_work(t: &Test) {
    let script = "set -e; for fs in proc sysfs mqueue devpts cgroup; do \
                  grep -q \" - $fs\" /proc/self/mountinfo || echo no $fs; done; \
                  echo x > /dev/null; head -c 3 /dev/zero | wc -c; ls /sys/class/net; \
                  stat -c '%u:%g %a %t:%T' /dev/null /dev/fuse; readlink /dev/fd; readlink /dev/ptmx; \
                  touch /dev/shm/x; grep -c . /proc/1/status > /tmp/n; \
                  cat /proc/sys/net/ipv4/ip_unprivileged_port_start; \
                  ip link set lo up; ! mknod /made c 1 3 2>/dev/null";
    let text = run(t, &t.id("a"), script, |spec| {
        spec["linux"]["devices"] = json!([{
            "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o640,
            "uid": 7, "gid": 8,
        }]);
        spec["linux"]["sysctl"] = json!({"net.ipv4.ip_unprivileged_port_start": "77"});
        let capabilities = &mut spec["process"]["capabilities"];
        for set in ["bounding", "effective", "permitted"] {
            capabilities[set].as_array_mut().expect("a list").push(json!("CAP_NET_ADMIN"));
        }
        push(
            spec,
            json!({
                "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                "options": ["ro", "nosuid", "noexec", "nodev"],
            }),
        );
    });
    assert_eq!(
        text.lines().collect::<Vec<_>>(),
        ["3", "lo", "0:0 666 1:3", "7:8 640 a:e5", "/proc/self/fd", "pts/ptmx", "77"],
        "{text}"
    );
}

fn process_settings_are_applied(t: &Test) {
    let status = "grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp|Groups):' /proc/self/status | tr -d '\\t'; \
                  cat /proc/self/oom_score_adj; ulimit -n; ulimit -Hn; id -u; id -g; umask; pwd; hostname";
    let text = run(t, &t.id("a"), status, |spec| {
        let process = &mut spec["process"];
        process["user"] =
            json!({"uid": 1000, "gid": 1001, "additionalGids": [1234], "umask": 0o77});
        process["oomScoreAdj"] = json!(321);
        process["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}]);
        process["cwd"] = json!("/made/here");
        let sets = ["bounding", "effective", "permitted", "inheritable", "ambient"];
        process["capabilities"] =
            sets.iter().map(|set| ((*set).to_owned(), json!(["CAP_KILL"]))).collect();
        spec["hostname"] = json!("mapped");
        spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW"});
    });
    assert_eq!(
        text.lines().collect::<Vec<_>>(),
        [
            "Groups:1234 ",
            "CapEff:0000000000000020",
            "CapBnd:0000000000000020",
            "NoNewPrivs:1",
            "Seccomp:2",
            "321",
            "100",
            "200",
            "1000",
            "1001",
            "0077",
            "/made/here",
            "mapped"
        ],
        "{text}"
    );
}

fn volumes_are_mapped_only_when_asked(t: &Test) {
    let directory = t.file("volume");
    fs::create_dir(&directory).expect("create");
    fs::write(format!("{directory}/of-root"), "").expect("write");
    let script = "for v in plain mapped; do stat -c %u /$v/of-root; done; \
                  ! touch /plain/new 2>/dev/null; touch /mapped/new; chown 1000 /mapped/new";
    let text = run(t, &t.id("a"), script, |spec| {
        for (name, options) in [("plain", &["rbind"][..]), ("mapped", &["rbind", "idmap"])] {
            push(
                spec,
                json!({
                    "destination": format!("/{name}"), "type": "bind", "source": directory,
                    "options": options,
                }),
            );
        }
    });
    assert_eq!(text, "65534\n0");
    assert_eq!(fs::metadata(format!("{directory}/new")).expect("written").uid(), 1000);
}

fn exec_enters_the_user_namespace(t: &Test) {
    let driver = t.driver();
    let id = t.id("a");
    let (shim, pid) = idle(t, &driver, &id, |spec| {
        spec["process"]["oomScoreAdj"] = json!(200);
        spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW"});
    });
    let script = "readlink /proc/self/ns/user; id -u; id -G; cat /proc/self/oom_score_adj; \
                  ulimit -n; grep -E '^(CapEff|Seccomp):' /proc/self/status | tr -d '\\t'; \
                  cat /proc/self/uid_map | tr -s ' '; touch /by-exec";
    let mut process = command(&["sh", "-c", script]);
    process["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 64, "hard": 64}]);
    let (status, text) = exec(t, &shim, "root", process);
    let namespace = fs::read_link(format!("/proc/{pid}/ns/user")).expect("user namespace");
    assert_eq!(
        text.lines().map(str::trim).collect::<Vec<_>>(),
        [
            namespace.to_str().expect("text"),
            "0",
            "0",
            "200",
            "64",
            "CapEff:00000000a80425fb",
            "Seccomp:2",
            "0 1000000 65536"
        ]
    );
    assert_eq!(status, 0);
    assert_eq!(fs::metadata(shim.bundle.join("upper/by-exec")).expect("made").uid(), 0);
    let mut process = command(&["sh", "-c", "id -u; touch /tmp/mine; kill -0 1 2>&1"]);
    process["user"] = json!({"uid": 1000, "gid": 1000});
    let (status, text) = exec(t, &shim, "user", process.clone());
    assert_eq!((status, text.lines().next()), (1, Some("1000")), "{text}");
    assert_eq!(fs::metadata(shim.bundle.join("upper/tmp/mine")).expect("made").uid(), 1000);
    process["user"] = json!({"uid": 70_000, "gid": 0});
    let io = Stdio3::default();
    shim.exec("strange", &process, &io).expect("added");
    let refusal = shim.start("strange").expect_err("not mapped");
    assert!(refusal.message.contains("process.user.uid: is 70000"), "{}", refusal.message);
    shim.finish();
    driver.remove_bundle(&id);
}

/// `ctr run` of a specification with a user namespace, for which `ctr` replaces the runtime's options by
/// runc's: the configuration is that of the default path.
fn ctr_run(t: &Test, id: &str, flags: &[&str], change: impl FnOnce(&mut Value)) -> Command {
    let root = t.file("root");
    if !Path::new(&root).exists() {
        let image = t.node.root.join("rootfs");
        process::run(Command::new("cp").arg("-a").arg(image).arg(&root)).ok();
    }
    let mut spec = t.driver().spec(id, &["true"]);
    in_user_namespace(&mut spec);
    spec["root"]["path"] = json!(root);
    change(&mut spec);
    let config = t.file(&format!("{id}.json"));
    fs::write(&config, spec.to_string()).expect("write the specification");
    let mut ctr = t.node.ctr_command();
    ctr.args(["run", "--runtime", &t.node.setting.runtime]);
    ctr.arg("--fifo-dir").arg(t.node.root.join("fifo"));
    ctr.args(flags).args(["--config", &config, id]);
    ctr
}

fn terminals_work(t: &Test) {
    let id = t.id("a");
    let script = "tty; stat -c %u:%g $(tty); test -c /dev/console && echo has-console; \
                  echo direct > /dev/tty; read line";
    let command = ctr_run(t, &id, &["--rm", "--tty"], |spec| {
        spec["process"]["terminal"] = json!(true);
        spec["process"]["args"] = json!(["sh", "-c", script]);
    });
    let mut terminal = Terminal::spawn(command, 24, 80);
    for expected in ["/dev/pts/0", "0:5", "has-console", "direct"] {
        terminal.expect(expected);
    }
    let script = ["sh", "-c", "stat -c %u:%g $(tty); read line"];
    let exec = t.exec_command(&["--tty", "--user", "1000"], &id, &script);
    let mut exec = Terminal::spawn(exec, 24, 80);
    exec.expect("1000:5");
    exec.send("\n");
    assert_eq!(exec.wait(), 0);
    terminal.send("\n");
    assert_eq!(terminal.wait(), 0);
}

fn pipes_can_be_opened_by_their_paths(t: &Test) {
    for (name, uid) in [("root", 0), ("user", 1000)] {
        let out = process::run(&mut ctr_run(t, &t.id(name), &["--rm"], |spec| {
            let script = "echo out > /dev/stdout; echo err > /dev/stderr";
            spec["process"]["args"] = json!(["sh", "-c", script]);
            spec["process"]["user"] = json!({"uid": uid, "gid": uid});
        }))
        .ok();
        assert_eq!((out.text().as_str(), out.stderr.trim()), ("out", "err"));
    }
    let id = t.id("exec");
    process::run(&mut ctr_run(t, &id, &["--detach"], |spec| {
        spec["process"]["args"] = json!(["sleep", "1000"]);
    }))
    .ok();
    let out = t.exec(&["--user", "1000"], &id, &["sh", "-c", "echo x > /dev/stdout"]).ok();
    assert_eq!(out.text(), "x");
}

fn network_namespace_of_the_node_can_be_joined(t: &Test) {
    let mut other = Command::new("unshare");
    other.args([
        "--net",
        "sh",
        "-c",
        "ip link add probe0 type veth peer name probe1; exec sleep 1000",
    ]);
    let other = t.spawn(other);
    let path = format!("/proc/{}/ns/net", other.pid());
    eventually("the network namespace is there", Duration::from_secs(5), || {
        let devices = fs::read_to_string(format!("/proc/{}/net/dev", other.pid())).ok()?;
        devices.contains("probe1").then_some(())
    });
    let text =
        run(t, &t.id("a"), "ls /sys/class/net; grep -o probe0 /proc/net/dev; id -u", |spec| {
            for namespace in spec["linux"]["namespaces"].as_array_mut().expect("a list") {
                if namespace["type"] == "network" {
                    namespace["path"] = json!(path);
                }
            }
        });
    sys::kill(other.pid(), libc::SIGKILL);
    assert_eq!(text, "lo\nprobe0\nprobe1\nprobe0\n0");
}

fn user_namespace_of_another_container_is_joined(t: &Test) {
    let driver = t.driver();
    let first = t.id("first");
    let (shim, pid) = idle(t, &driver, &first, |_| {});
    let join = |spec: &mut Value| {
        for namespace in spec["linux"]["namespaces"].as_array_mut().expect("a list") {
            let kind = match namespace["type"].as_str() {
                Some("network") => "net",
                Some(kind @ ("user" | "ipc" | "uts")) => kind,
                _ => continue,
            };
            namespace["path"] = json!(format!("/proc/{pid}/ns/{kind}"));
        }
    };
    let script = "for ns in user net ipc uts pid; do readlink /proc/self/ns/$ns; done; id -u; \
                  touch /new; ls /sys/class/net";
    let text = run(t, &t.id("second"), script, join);
    let lines: Vec<_> = text.lines().collect();
    let namespace = |kind: &str| {
        let link = fs::read_link(format!("/proc/{pid}/ns/{kind}")).expect("namespace");
        link.to_str().expect("text").to_owned()
    };
    let shared = ["user", "net", "ipc", "uts"].map(namespace);
    assert_eq!(lines[..4], shared, "{text}");
    assert_ne!(lines[4], namespace("pid"));
    assert_eq!(lines[5..], ["0", "lo"]);
    let refusal = t
        .run_spec(&t.id("third"), &["true"], |spec| {
            in_user_namespace(spec);
            join(spec);
            spec["linux"]["gidMappings"][0]["size"] = json!(1000);
        })
        .expect_err("other mappings");
    assert!(refusal.message.contains("linux.gidMappings"), "{}", refusal.message);
    shim.finish();
    driver.remove_bundle(&first);
}

fn rootfs_without_mounts_is_mapped(t: &Test) {
    let driver = t.driver();
    let (id, root) = (t.id("a"), t.file("root"));
    process::run(Command::new("cp").arg("-a").arg(t.node.root.join("rootfs")).arg(&root)).ok();
    let mut spec = driver.spec(&id, &["sh", "-c", "stat -c %u /bin && echo x > /made"]);
    in_user_namespace(&mut spec);
    spec["root"]["path"] = json!(root);
    let mut shim = driver.start(&id, &spec);
    shim.rootfs = Vec::new();
    shim.create(&Stdio3::default()).and_then(|_| shim.start("")).expect("it runs");
    assert_eq!(shim.wait("").expect("wait").exit_status, 0);
    shim.finish();
    assert_eq!(fs::metadata(format!("{root}/made")).expect("written").uid(), 0);
    driver.remove_bundle(&id);
}

fn images_are_mapped(t: &Test) {
    let driver = t.driver();
    let (id, upper, layer) = (t.id("a"), t.file("upper.img"), t.file("layer.erofs"));
    fs::create_dir(t.file("empty")).expect("create");
    image::ext4(Path::new(&upper), 16, Path::new(&t.file("empty")));
    image::erofs(Path::new(&layer), "from-erofs", b"immutable\n");
    let overlay = [
        "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
        "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
        "workdir={{ mount 0 }}/work",
        "upperdir={{ mount 0 }}/upper",
        "lowerdir={{ overlay 1 2 }}",
    ];
    let lower = t.node.root.join("rootfs").display().to_string();
    let script = "stat -c %u /from-erofs && chown 7 /from-erofs && touch /new";
    let mut spec = driver.spec(&id, &["sh", "-c", script]);
    in_user_namespace(&mut spec);
    let mut shim = driver.start(&id, &spec);
    shim.rootfs = vec![
        mount("ext4", &upper, &["rw", "loop"]),
        mount("erofs", &layer, &["ro", "loop"]),
        mount("bind", &lower, &["ro", "rbind"]),
        mount("format/mkdir/overlay", "overlay", &overlay),
    ];
    shim.create(&Stdio3::default()).and_then(|_| shim.start("")).expect("it runs");
    assert_eq!(shim.wait("").expect("wait").exit_status, 0);
    shim.finish();
    image::loop_devices_are_freed(&[&upper, &layer]);
    driver.remove_bundle(&id);
}

/// What `ctr run --uidmap` and CRI without id-mapped mounts do: every file is chowned beforehand.
fn snapshot_that_containerd_has_chowned_is_not_mapped_again(t: &Test) {
    let driver = t.driver();
    let (id, lower) = (t.id("a"), t.file("lower"));
    process::run(Command::new("cp").arg("-a").arg(t.node.root.join("rootfs")).arg(&lower)).ok();
    let owner = format!("{HOST_ROOT}:{HOST_ROOT}");
    process::run(Command::new("chown").args(["-R", "-h", &owner, &lower])).ok();
    let script = "stat -c %u:%g / /bin/busybox | sort -u; touch /new; stat -c %u:%g /new";
    let mut spec = driver.spec(&id, &["sh", "-c", script]);
    in_user_namespace(&mut spec);
    let mut shim = driver.start(&id, &spec);
    let upper = shim.bundle.join("upper");
    chown(&upper, Some(HOST_ROOT), Some(HOST_ROOT)).expect("chown");
    let options = [
        format!("workdir={}", shim.bundle.join("work").display()),
        format!("upperdir={}", upper.display()),
        format!("lowerdir={lower}"),
    ];
    shim.rootfs = vec![mount("overlay", "overlay", &options)];
    let uri = format!("file://{}", t.file("out"));
    let io = Stdio3 { stdout: uri.clone(), stderr: uri, ..Stdio3::default() };
    shim.create(&io).and_then(|_| shim.start("")).expect("it runs");
    assert_eq!(shim.wait("").expect("wait").exit_status, 0);
    assert_eq!(fs::metadata(upper.join("new")).expect("made").uid(), HOST_ROOT);
    shim.finish();
    assert_eq!(fs::read_to_string(t.file("out")).expect("output"), "0:0\n0:0\n");
    driver.remove_bundle(&id);
}

/// The node's configuration with `unprivileged = true`.
fn unprivileged(t: &Test) -> String {
    let path = t.file("unprivileged.toml");
    let text = t.node.shim_config_text().replace("[ct]\n", "[ct]\nunprivileged = true\n");
    fs::write(&path, text).expect("write the configuration");
    path
}

fn unprivileged_containers_of_containerd(t: &Test) {
    let config = unprivileged(t);
    let flags = ["--runtime-config-path", &config];
    let id = t.id("a");
    let script = "cat /proc/self/uid_map; stat -c %u:%g /bin/busybox; echo new > /made; \
                  chown 1000:1001 /made; rm /etc/group; cat /proc/1/status | grep -c Uid";
    t.start(&flags, &id, &["sh", "-c", &format!("({script}) > /out 2>&1; exec sleep 1000")]);
    eventually("the script has run", Duration::from_secs(10), || {
        (t.exec_sh(&id, "tail -n 1 /out").text() == "1").then_some(())
    });
    let text = t.exec_sh(&id, "cat /out").ok().text();
    let words: Vec<_> = text.split_whitespace().collect();
    assert_eq!(words, ["0", "100000", "65536", "0:0", "1"]);
    let uid = process::status_field(t.pid(&id), "Uid").expect("Uid");
    assert_eq!(uid, ["100000"; 4].join("\t"));
    assert_eq!(t.exec(&["--user", "1000"], &id, &["id", "-u"]).ok().text(), "1000");
    // The layer that would be committed has the container's ids.
    let layer = t.file("layer.tar");
    let diff = format!(
        "'{}' --address '{}' --namespace '{}' snapshots diff '{id}' > '{layer}'",
        t.node.setting.program("ctr").display(),
        t.node.socket().display(),
        t.node.namespace
    );
    process::run(Command::new("sh").args(["-c", &diff])).ok();
    let list = ["--numeric-owner", "-tvf", &layer];
    let list = process::run(Command::new("tar").args(list)).ok().text();
    let owner = |file: &str| {
        let line = list.lines().find(|line| line.ends_with(&format!(" {file}")));
        line.and_then(|line| line.split_whitespace().nth(1)).unwrap_or_default().to_owned()
    };
    assert_eq!(owner("made"), "1000/1001", "{list}");
    assert_eq!([owner("out"), owner("etc/"), owner("etc/.wh.group")], ["0/0"; 3], "{list}");
    // What only root of the node may have.
    let mount = "type=debugfs,src=debugfs,dst=/d,options=ro";
    let out = t.sh(&[&flags[..], &["--mount", mount]].concat(), &t.id("b"), "true");
    assert!(out.code != 0 && out.stderr.contains("ct.unprivileged"), "{}", out.stderr);
}

/// As in Kubernetes, where the sandbox has been made by somebody who knows nothing of it.
fn unprivileged_members_of_a_pod_share_namespaces_of_the_node(t: &Test) {
    let mut other = Command::new("unshare");
    other.args(["--net", "--ipc", "--uts", "sh", "-c", "ipcmk -Q; exec sleep 1000"]);
    let other = t.spawn(other);
    let path = |kind: &str| format!("/proc/{}/ns/{kind}", other.pid());
    let kinds = [("network", "net"), ("ipc", "ipc"), ("uts", "uts")];
    eventually("the namespaces are there", Duration::from_secs(5), || {
        let own = fs::read_link("/proc/self/ns/uts").ok()?;
        let command = fs::read_to_string(format!("/proc/{}/comm", other.pid())).ok()?;
        (fs::read_link(path("uts")).ok()? != own && command.trim() == "sleep").then_some(())
    });
    let script = "for ns in net ipc uts; do readlink /proc/self/ns/$ns; done; ls /sys/class/net; \
                  grep -c ' - mqueue ' /proc/self/mountinfo; id -u";
    let text = run(t, &t.id("a"), script, |spec| {
        for namespace in spec["linux"]["namespaces"].as_array_mut().expect("a list") {
            let kind = kinds.iter().find(|(name, _)| namespace["type"] == *name);
            if let Some((_, kind)) = kind {
                namespace["path"] = json!(path(kind));
            }
        }
    });
    let mut expected: Vec<_> = kinds
        .iter()
        .map(|(_, kind)| fs::read_link(path(kind)).expect("link").display().to_string())
        .collect();
    sys::kill(other.pid(), libc::SIGKILL);
    expected.extend(["lo", "1", "0"].map(str::to_owned));
    assert_eq!(text.lines().collect::<Vec<_>>(), expected);
}

fn ids_that_lxc_may_not_use_are_named(t: &Test) {
    if !Path::new("/usr/bin/newuidmap").exists() {
        // LXC writes the mappings itself then, and any will do.
        run(t, &t.id("a"), "true", |spec| {
            spec["linux"]["uidMappings"][0]["hostID"] = json!(5_000_000)
        });
        return;
    }
    let refusal = t
        .run_spec(&t.id("a"), &["true"], |spec| {
            in_user_namespace(spec);
            spec["linux"]["uidMappings"][0]["hostID"] = json!(5_000_000);
        })
        .expect_err("the ids are nobody's");
    let remedy = "add the line \"root:5000000:65536\" to /etc/subuid";
    assert!(refusal.message.contains(remedy), "{}", refusal.message);
}

fn what_a_user_namespace_cannot_have_is_named(t: &Test) {
    let refused = |name: &str, field: &str, change: &dyn Fn(&mut Value)| {
        let refusal = t
            .run_spec(&t.id(name), &["true"], |spec| {
                in_user_namespace(spec);
                change(spec);
            })
            .expect_err("refused");
        assert!(refusal.message.contains(field), "{field}: {}", refusal.message);
    };
    refused("debugfs", "mounts[7].type \"debugfs\"", &|spec| {
        push(spec, json!({"destination": "/d", "type": "debugfs", "source": "debugfs"}));
    });
    refused("uid", "process.user.uid", &|spec| spec["process"]["user"]["uid"] = json!(100_000));
    refused("pid", "\"proc\" in a user namespace needs an own pid namespace", &|spec| {
        let list = spec["linux"]["namespaces"].as_array_mut().expect("a list");
        list.retain(|namespace| namespace["type"] != "pid");
    });
    refused("root", "linux.uidMappings must map", &|spec| {
        spec["linux"]["uidMappings"][0]["containerID"] = json!(1);
    });
    // A volume on a file system that the kernel cannot map.
    refused("map", "can its file system be id-mapped?", &|spec| {
        push(
            spec,
            json!({
                "destination": "/v", "type": "bind", "source": "/proc/bus", "options": ["bind", "idmap"],
            }),
        );
    });
}

fn crash_leaves_nothing(t: &Test) {
    let driver = t.driver();
    let id = t.id("a");
    let (shim, _) = idle(t, &driver, &id, |_| {});
    let pid = shim.connect().expect("connect").shim_pid;
    sys::kill(pid, libc::SIGKILL);
    assert_eq!(driver.delete_after_crash(&id).exit_status, 137);
    let left = t.node.remains(&id, std::slice::from_ref(&id));
    assert!(left.is_empty(), "{left:#?}");
    let table = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    assert!(!table.contains(&shim.bundle.display().to_string()));
    // For removing the bundle, whose directories belong to the mapped root's group.
    let _ = chown(&shim.bundle, Some(0), Some(0));
    driver.remove_bundle(&id);
}

fn what_lxc_cannot_reach_is_named(t: &Test) {
    use std::os::unix::fs::PermissionsExt;
    let hidden = t.file("hidden");
    fs::create_dir(&hidden).expect("make a directory");
    fs::set_permissions(&hidden, fs::Permissions::from_mode(0o700)).expect("hide it");
    let init = format!("{hidden}/proxmox-shim-init");
    fs::copy(t.node.root.join("proxmox-shim-init"), &init).expect("copy init");
    let config = unprivileged(t);
    let text = fs::read_to_string(&config).expect("read the configuration");
    let usual = t.node.root.join("proxmox-shim-init").display().to_string();
    assert!(text.contains(&usual), "{text}");
    fs::write(&config, text.replace(&usual, &init)).expect("write the configuration");
    let out = t.run(&["--runtime-config-path", &config], &t.id("a"), &["true"]);
    assert_ne!(out.code, 0);
    for part in [hidden.as_str(), init.as_str(), "user 100000"] {
        assert!(out.stderr.contains(part), "{part}: {}", out.stderr);
    }
}

// With the node's files, as root of the container.
fn create_container_hooks_run(t: &Test) {
    let directory = t.file("shared");
    fs::create_dir(&directory).expect("make a directory");
    chown(&directory, Some(HOST_ROOT), Some(HOST_ROOT)).expect("give it away");
    let script = format!(
        "{{ cat /proc/self/uid_map; id -u; pwd; }} > {directory}/report 2>&1; cat > {directory}/state; \
         echo made by the hook > etc/made"
    );
    let id = t.id("a");
    let text = run(t, &id, "cat /etc/made; stat -c %u /etc/made", |spec| {
        spec["hooks"] = json!({"createContainer": [
            {"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"]},
        ]});
    });
    assert_eq!(text, "made by the hook\n0");
    let report = fs::read_to_string(format!("{directory}/report")).expect("the hook ran");
    let words: Vec<_> = report.split_whitespace().collect();
    assert_eq!(words[..4], ["0", "1000000", "65536", "0"], "{report}");
    assert!(words[4].ends_with("/rootfs"), "{report}");
    let state = fs::read_to_string(format!("{directory}/state")).expect("it got the state");
    assert!(state.contains(&id) && state.contains("\"creating\""), "{state}");
}
