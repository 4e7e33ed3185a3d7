//! What the OCI specification asks for is what the container gets.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::process::{self, eventually};
use crate::harness::sys;
use crate::harness::test::Test;
use crate::suites::cases;

cases!("oci":
    default_capabilities,
    added_and_dropped_capabilities,
    privileged_has_every_capability_of_the_host,
    no_new_privileges_by_default,
    default_seccomp_profile_filters,
    own_seccomp_profile_filters,
    read_only_root,
    bind_mount_reads_and_writes_the_host,
    read_only_bind_mount,
    bind_mount_of_a_file,
    tmpfs_mount_with_options,
    missing_bind_source_is_named,
    mount_target_through_a_hostile_symlink_stays_inside,
    host_mounts_propagate_into_a_slave_bind,
    bind_propagation_is_not_that_of_the_root,
    bind_propagation_is_of_the_mounts_below_only_if_asked,
    default_devices,
    added_device_is_usable_and_others_are_not,
    host_network,
    joins_namespaces_of_another_container,
    resource_limits_of_the_process,
    hostname_and_sysctl,
    masked_and_read_only_paths,
    umask_and_oom_score,
    host_hooks_see_the_state,
    failing_hook_fails_the_create,
    root_file_system_of_its_own_without_a_snapshot;
    proxmox:
    unsupported_field_is_refused_by_its_name,
    start_container_hook_runs_inside,
    id_mapped_bind_mount,
    root_propagation_is_set,
    device_rules_with_a_hole_are_refused,
    exec_is_no_harder_to_kill_than_the_container,
    limits_stay_below_the_cgroups_path,
    lxc_is_out_of_reach_on_the_host_network,
);

fn status(t: &Test, flags: &[&str], field: &str) -> String {
    let script = format!("sed -n 's/^{field}:[[:space:]]*//p' /proc/self/status");
    t.sh(flags, &t.id(&format!("s{}", flags.concat().len())), &script).ok().text()
}

/// The host's own bounding set.
fn host_capabilities() -> String {
    process::status_field(std::process::id(), "CapBnd").expect("CapBnd")
}

fn default_capabilities(t: &Test) {
    assert_eq!(status(t, &[], "CapEff"), "00000000a80425fb");
    assert_eq!(status(t, &["--env", "B=1"], "CapBnd"), "00000000a80425fb");
}

fn added_and_dropped_capabilities(t: &Test) {
    let flags = ["--cap-add", "CAP_NET_ADMIN", "--cap-drop", "CAP_CHOWN"];
    assert_eq!(status(t, &flags, "CapEff"), "00000000a80435fa");
    t.sh(&flags, &t.id("chown"), "chown 1:1 /etc/passwd").expect(1);
}

fn privileged_has_every_capability_of_the_host(t: &Test) {
    assert_eq!(status(t, &["--privileged"], "CapEff"), host_capabilities());
    t.sh(&["--privileged"], &t.id("mount"), "mount -t tmpfs none /mnt && test -w /proc/sys/kernel")
        .ok();
}

fn no_new_privileges_by_default(t: &Test) {
    assert_eq!(status(t, &[], "NoNewPrivs"), "1");
    assert_eq!(status(t, &["--allow-new-privs"], "NoNewPrivs"), "0");
}

fn default_seccomp_profile_filters(t: &Test) {
    assert_eq!(status(t, &[], "Seccomp"), "0");
    assert_eq!(status(t, &["--seccomp"], "Seccomp"), "2");
    // containerd's default profile forbids it without CAP_SYS_ADMIN.
    let call = libc::SYS_unshare.to_string();
    let out = t.run(&["--seccomp"], &t.id("u"), &["probe", "errno", &call]).ok();
    assert_eq!(out.text(), libc::EPERM.to_string());
}

fn own_seccomp_profile_filters(t: &Test) {
    let profile = t.file("profile.json");
    let architecture =
        if cfg!(target_arch = "x86_64") { "SCMP_ARCH_X86_64" } else { "SCMP_ARCH_AARCH64" };
    let text = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": [architecture],
        "syscalls": [{"names": ["mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": libc::EBADMSG}],
    });
    fs::write(&profile, text.to_string()).expect("write the profile");
    let call = libc::SYS_mkdirat.to_string();
    for (name, flags) in [
        ("nnp", &["--seccomp", "--seccomp-profile", &profile][..]),
        ("new", &["--allow-new-privs", "--seccomp", "--seccomp-profile", &profile]),
    ] {
        let out = t.run(flags, &t.id(name), &["probe", "errno", &call]).ok();
        assert_eq!(out.text(), libc::EBADMSG.to_string(), "{name}");
    }
    let id = t.id("exec");
    t.start_idle(&["--seccomp", "--seccomp-profile", &profile], &id);
    let out = t.exec(&[], &id, &["probe", "errno", &call]).ok();
    assert_eq!(out.text(), libc::EBADMSG.to_string(), "exec");
}

fn read_only_root(t: &Test) {
    let out = t.sh(
        &["--read-only"],
        &t.id("a"),
        "echo x > /new 2>&1; echo x > /dev/shm/new && echo shm works",
    );
    assert!(out.ok().text().contains("shm works"));
    let out = t.sh(&["--read-only"], &t.id("b"), "echo x > /new");
    assert_ne!(out.code, 0);
    assert!(out.stderr.contains("Read-only file system"), "{}", out.stderr);
}

fn bind(source: &str, target: &str, options: &str) -> String {
    format!("type=bind,src={source},dst={target},options={options}")
}

fn bind_mount_reads_and_writes_the_host(t: &Test) {
    fs::write(t.directory().join("from-host"), "host").expect("write");
    let mount = bind(&t.file(""), "/deep/er/target", "rbind:rw");
    let script = "cat /deep/er/target/from-host; echo guest > /deep/er/target/from-guest";
    assert_eq!(t.sh(&["--mount", &mount], &t.id("a"), script).ok().text(), "host");
    assert_eq!(fs::read_to_string(t.directory().join("from-guest")).expect("read"), "guest\n");
}

fn read_only_bind_mount(t: &Test) {
    fs::write(t.directory().join("file"), "host").expect("write");
    let mount = bind(&t.file(""), "/target", "rbind:ro");
    let out = t.sh(&["--mount", &mount], &t.id("a"), "cat /target/file; echo x > /target/new");
    assert_ne!(out.code, 0);
    assert_eq!(out.text(), "host");
    assert!(out.stderr.contains("Read-only file system"), "{}", out.stderr);
    assert!(!t.directory().join("new").exists());
}

fn bind_mount_of_a_file(t: &Test) {
    fs::write(t.directory().join("file"), "from the host").expect("write");
    let mount = bind(&t.file("file"), "/etc/passwd", "bind:ro");
    assert_eq!(
        t.run(&["--mount", &mount], &t.id("a"), &["cat", "/etc/passwd"]).ok().text(),
        "from the host"
    );
    let mount = bind(&t.file("file"), "/new/place/file", "bind:ro");
    assert_eq!(
        t.run(&["--mount", &mount], &t.id("b"), &["cat", "/new/place/file"]).ok().text(),
        "from the host"
    );
}

fn tmpfs_mount_with_options(t: &Test) {
    let mount = "type=tmpfs,src=tmpfs,dst=/scratch,options=nosuid:noexec:size=4m:mode=0750";
    let script = "grep ' /scratch ' /proc/mounts; stat -c %a /scratch; df -k /scratch | tail -n 1";
    let out = t.sh(&["--mount", mount], &t.id("a"), script).ok().text();
    let lines: Vec<_> = out.lines().collect();
    for option in ["tmpfs", "nosuid", "noexec", "size=4096k"] {
        assert!(lines[0].contains(option), "{option}: {out}");
    }
    assert_eq!(lines[1], "750");
}

fn missing_bind_source_is_named(t: &Test) {
    let missing = t.file("missing");
    t.run(&["--mount", &bind(&missing, "/target", "rbind:ro")], &t.id("a"), &["true"])
        .expect_error(&missing);
    assert!(!Path::new(&missing).exists());
}

fn mount_target_through_a_hostile_symlink_stays_inside(t: &Test) {
    fs::write(t.directory().join("file"), "inside").expect("write");
    let name = t.id("target");
    // The image's /evil is a link to ../../../../tmp.
    let mount = bind(&t.file(""), &format!("/evil/{name}"), "rbind:ro");
    let out = t.sh(&["--mount", &mount], &t.id("a"), &format!("cat /tmp/{name}/file")).ok().text();
    assert_eq!(out, "inside");
    assert!(!Path::new("/tmp").join(&name).exists(), "a directory was made on the host");
}

fn host_mounts_propagate_into_a_slave_bind(t: &Test) {
    let (id, source) = (t.id("a"), t.file("shared"));
    fs::create_dir_all(format!("{source}/sub")).expect("create");
    let mount = |arguments: &[&str]| process::run(Command::new("mount").args(arguments)).ok();
    mount(&["--bind", &source, &source]);
    mount(&["--make-rshared", &source]);
    t.start_idle(&["--mount", &bind(&source, "/slave", "rbind:rslave")], &id);
    mount(&["-t", "tmpfs", "late", &format!("{source}/sub")]);
    fs::write(format!("{source}/sub/file"), "late").expect("write");
    let seen = t.exec_sh(&id, "cat /slave/sub/file");
    t.remove(&id);
    for path in [format!("{source}/sub"), source.clone()] {
        process::run(Command::new("umount").arg(&path)).ok();
    }
    assert_eq!(seen.ok().text(), "late");
}

fn bind_propagation_is_not_that_of_the_root(t: &Test) {
    let script =
        "sed -n 's,^[^ ]* [^ ]* [^ ]* [^ ]* /volume \\(.*\\) - .*,\\1,p' /proc/self/mountinfo";
    for (root, own, shared) in [("rshared", "rprivate", false), ("rslave", "rshared", true)] {
        let (status, text) = t
            .run_spec(&t.id(own), &["sh", "-c", script], |spec| {
                spec["linux"]["rootfsPropagation"] = json!(root);
                let mounts = spec["mounts"].as_array_mut().expect("a list");
                mounts.push(json!({"destination": "/volume", "type": "bind",
                    "source": t.file(""), "options": ["rbind", own]}));
            })
            .expect("runs");
        assert_eq!((status, text.contains("shared:")), (0, shared), "{root} {own}: {text:?}");
    }
}

fn bind_propagation_is_of_the_mounts_below_only_if_asked(t: &Test) {
    let source = t.file("tree");
    fs::create_dir_all(format!("{source}/sub")).expect("create");
    process::run(Command::new("mount").args(["-t", "tmpfs", "sub", &format!("{source}/sub")])).ok();
    let script = "sed -n 's,^[^ ]* [^ ]* [^ ]* [^ ]* \\(/volume[^ ]*\\) [^ ]* \\(.*\\)- .*,\\1 \\2,p' \
                  /proc/self/mountinfo";
    let seen = ["shared", "rshared"].map(|option| {
        t.run_spec(&t.id(option), &["sh", "-c", script], |spec| {
            let mounts = spec["mounts"].as_array_mut().expect("a list");
            mounts.push(json!({"destination": "/volume", "type": "bind",
                "source": source, "options": ["rbind", option]}));
        })
    });
    process::run(Command::new("umount").arg(format!("{source}/sub"))).ok();
    for (outcome, below) in seen.into_iter().zip([false, true]) {
        let (status, text) = outcome.expect("runs");
        let shared: Vec<_> = text.lines().map(|line| line.contains("shared:")).collect();
        assert_eq!((status, shared), (0, vec![true, below]), "{text}");
    }
}

// runc applies it before the pivot only, where nothing of it may remain.
fn root_propagation_is_set(t: &Test) {
    let script = "sed -n 's,^[^ ]* [^ ]* [^ ]* / / \\(.*\\) - .*,\\1,p' /proc/self/mountinfo";
    let shared = t.sh(&["--rootfs-propagation", "rshared"], &t.id("a"), script).ok().text();
    assert!(shared.contains("shared:"), "{shared:?}");
    let private = t.sh(&["--rootfs-propagation", "rprivate"], &t.id("b"), script).ok().text();
    assert!(!private.contains("shared:") && !private.contains("master:"), "{private:?}");
}

fn default_devices(t: &Test) {
    let script = "for d in null zero full random urandom tty; do test -c /dev/$d && echo $d; done; \
                  for l in fd stdin stdout stderr ptmx; do test -L /dev/$l && echo $l; done; \
                  echo x > /dev/null; head -c 4 /dev/zero | od -An -tx1; \
                  for m in pts shm mqueue; do grep -q \" /dev/$m \" /proc/mounts && echo $m; done";
    let out = t.sh(&[], &t.id("a"), script).ok().text();
    let words: Vec<_> = out.split_whitespace().collect();
    assert_eq!(
        words,
        [
            "null", "zero", "full", "random", "urandom", "tty", "fd", "stdin", "stdout", "stderr",
            "ptmx", "00", "00", "00", "00", "pts", "shm", "mqueue"
        ]
    );
}

fn added_device_is_usable_and_others_are_not(t: &Test) {
    let script = "test -c /dev/fuse && (: < /dev/fuse) && echo open; \
                  mknod /tmp/loop b 7 0 && (: < /tmp/loop) 2>&1 || echo closed";
    let out = t.sh(&["--device", "/dev/fuse"], &t.id("a"), script).ok().text();
    assert!(out.starts_with("open") && out.ends_with("closed"), "{out}");
    assert!(out.contains("Operation not permitted"), "{out}");
    let out = t.sh(
        &[],
        &t.id("b"),
        "test -e /dev/fuse || echo absent; mknod /tmp/fuse c 10 229; (: < /tmp/fuse)",
    );
    assert_eq!(out.text(), "absent");
    assert!(out.stderr.contains("Operation not permitted"), "{}", out.stderr);
}

fn namespace(pid: &str, kind: &str) -> Option<std::path::PathBuf> {
    fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok()
}

fn host_network(t: &Test) {
    let id = t.id("a");
    t.start_idle(&["--net-host"], &id);
    let pid = t.pid(&id).to_string();
    assert_eq!(namespace(&pid, "net"), namespace("self", "net"));
    assert_ne!(namespace(&pid, "pid"), namespace("self", "pid"));
    // Not /sys/class/net, which shows the network of whoever mounted it.
    let names = |table: &str| -> std::collections::BTreeSet<String> {
        let lines = table.lines().filter_map(|line| line.split_once(':'));
        lines.map(|(name, _)| name.trim().to_owned()).collect()
    };
    // Bridges of other tests come and go.
    let stable = |names: std::collections::BTreeSet<String>| -> Vec<String> {
        names.into_iter().filter(|name| !name.starts_with("e2e")).collect()
    };
    let inside = t.exec_sh(&id, "cat /proc/net/dev").ok().text();
    let host = fs::read_to_string("/proc/thread-self/net/dev").expect("read the interfaces");
    assert_eq!(stable(names(&inside)), stable(names(&host)));
}

fn joins_namespaces_of_another_container(t: &Test) {
    let (first, second) = (t.id("first"), t.id("second"));
    t.start_idle(&[], &first);
    let pid = t.pid(&first).to_string();
    let kinds = [("network", "net"), ("ipc", "ipc"), ("uts", "uts"), ("pid", "pid")];
    let flags: Vec<String> = kinds
        .iter()
        .flat_map(|(oci, proc)| ["--with-ns".to_owned(), format!("{oci}:/proc/{pid}/ns/{proc}")])
        .collect();
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    t.start_idle(&flags, &second);
    let joined = t.pid(&second).to_string();
    for (_, kind) in kinds {
        assert_eq!(namespace(&joined, kind), namespace(&pid, kind), "{kind}");
    }
    assert_ne!(namespace(&joined, "mnt"), namespace(&pid, "mnt"));
    // It is not the first process there: an ordinary signal ends it, and the other one lives on.
    assert!(t.exec_sh(&second, "cat /proc/1/comm").ok().text().contains("sh"));
    t.kill(&second, "SIGTERM").ok();
    assert_eq!(t.wait_exit(&second).exit_status(), 0);
    t.wait_status(&second, "STOPPED");
    t.delete(&second);
    assert_eq!(t.task(&first).map(|(_, s)| s).as_deref(), Some("RUNNING"));
}

fn resource_limits_of_the_process(t: &Test) {
    let limits = json!([
        {"type": "RLIMIT_NOFILE", "soft": 256, "hard": 512},
        {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
        {"type": "RLIMIT_NPROC", "soft": 777, "hard": 888},
    ]);
    let (status, text) = t
        .run_spec(&t.id("a"), &["probe", "limits"], |spec| spec["process"]["rlimits"] = limits)
        .expect("runs");
    assert_eq!(status, 0, "{text}");
    for line in ["nofile 256 512", "core 0 0", "nproc 777 888"] {
        assert!(text.contains(line), "{line}: {text}");
    }
}

fn hostname_and_sysctl(t: &Test) {
    let (status, text) = t
        .run_spec(&t.id("a"), &["sh", "-c", "hostname; cat /proc/sys/kernel/msgmax"], |spec| {
            spec["hostname"] = json!("name.of.it");
            spec["linux"]["sysctl"] = json!({"kernel.msgmax": "4242"});
        })
        .expect("runs");
    assert_eq!((status, text.as_str()), (0, "name.of.it\n4242"));
}

fn masked_and_read_only_paths(t: &Test) {
    // Which of them exist depends on the kernel.
    let script = "for f in kcore keys timer_list sched_debug; do \
                  test -e /proc/$f && cat /proc/$f; done; ls /sys/firmware; \
                  echo 1 > /proc/sys/kernel/domainname";
    let out = t.sh(&[], &t.id("a"), script);
    assert_eq!(out.text(), "");
    assert!(out.stderr.contains("Read-only file system"), "{}", out.stderr);
}

fn umask_and_oom_score(t: &Test) {
    let (status, text) = t
        .run_spec(&t.id("a"), &["sh", "-c", "umask; cat /proc/self/oom_score_adj"], |spec| {
            spec["process"]["user"]["umask"] = json!(0o027);
            spec["process"]["oomScoreAdj"] = json!(500);
        })
        .expect("runs");
    assert_eq!((status, text.as_str()), (0, "0027\n500"));
}

fn script(t: &Test, name: &str, body: &str) -> String {
    let path = t.file(name);
    fs::write(&path, format!("#!/bin/sh\n{body}\n")).expect("write the script");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("chmod");
    path
}

fn host_hooks_see_the_state(t: &Test) {
    let id = t.id("a");
    let mut hooks = json!({});
    for stage in ["createRuntime", "poststart", "poststop"] {
        let file = t.file(stage);
        // The network namespace by pid, as CNI plugins use it.
        let body = format!(
            "cat > {file}.json; echo \"$1 $VAR\" > {file}.args; ls /proc/$(sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/' {file}.json)/ns/net > {file}.ns 2>&1; true"
        );
        let path = script(t, &format!("{stage}.sh"), &body);
        hooks[stage] =
            json!([{"path": path, "args": ["hook", stage], "env": ["VAR=value"], "timeout": 10}]);
    }
    let (status, _) = t
        .run_spec(&id, &["true"], |spec| {
            spec["hooks"] = hooks;
            spec["annotations"] = json!({"key/of": "a value"});
        })
        .expect("runs");
    assert_eq!(status, 0);
    let pid_of = |stage: &str| {
        let text = fs::read_to_string(t.file(&format!("{stage}.json")))
            .unwrap_or_else(|e| panic!("the hook {stage} did not run: {e}"));
        let state: Value = serde_json::from_str(&text).expect("the state is JSON");
        assert_eq!(state["id"], id.as_str(), "{stage}");
        assert!(
            state["bundle"].as_str().is_some_and(|path| path.ends_with(&id)),
            "{stage}: {state}"
        );
        assert_eq!(state["annotations"]["key/of"], "a value", "{stage}");
        assert!(state["ociVersion"].is_string(), "{stage}");
        let arguments = fs::read_to_string(t.file(&format!("{stage}.args"))).expect("arguments");
        assert_eq!(arguments, format!("{stage} value\n"));
        state["pid"].as_u64().unwrap_or(0)
    };
    assert!(pid_of("createRuntime") > 1);
    assert!(fs::read_to_string(t.file("createRuntime.ns")).expect("ns").starts_with("/proc/"));
    pid_of("poststart");
    pid_of("poststop");
}

fn failing_hook_fails_the_create(t: &Test) {
    let id = t.id("a");
    let hook = script(t, "bad-hook.sh", "echo the reason >&2; exit 3");
    let refusal = t
        .run_spec(&id, &["true"], |spec| {
            spec["hooks"] = json!({"createRuntime": [{"path": hook}]});
        })
        .expect_err("a failing hook must fail the create");
    assert!(refusal.message.contains("the reason"), "{}", refusal.message);
}

fn root_file_system_of_its_own_without_a_snapshot(t: &Test) {
    // `ctr run --rootfs`: a directory instead of a snapshot, so Create carries no mounts.
    let (id, directory) = (t.id("a"), t.file("rootfs"));
    process::run(Command::new("cp").arg("-a").arg(t.node.root.join("rootfs")).arg(&directory)).ok();
    let mut ctr = t.node.ctr_command();
    ctr.arg("run").args(t.node.runtime_flags()).arg("--fifo-dir").arg(t.node.root.join("fifo"));
    ctr.args([
        "--rm",
        "--rootfs",
        &directory,
        &id,
        "/bin/sh",
        "-c",
        "echo in $(pwd); echo x > /made",
    ]);
    assert_eq!(process::run(&mut ctr).ok().text(), "in /");
    eventually("the write arrived", Duration::from_secs(1), || {
        Path::new(&directory).join("made").exists().then_some(())
    });
}

fn unsupported_field_is_refused_by_its_name(t: &Test) {
    for (name, field, change) in [
        ("rdt", "linux.intelRdt", json!({"intelRdt": {"closID": "x"}})),
        ("net", "linux.netDevices", json!({"netDevices": {"eth0": {"name": "eth0"}}})),
    ] {
        let id = t.id(name);
        let refusal = t
            .run_spec(&id, &["true"], |spec| {
                for (key, value) in change.as_object().expect("an object") {
                    spec["linux"][key] = value.clone();
                }
            })
            .expect_err("refused");
        assert!(refusal.message.contains(field), "{field}: {}", refusal.message);
    }
}

fn id_mapped_bind_mount(t: &Test) {
    use std::os::unix::fs::{MetadataExt, chown};
    let directory = t.file("volume");
    fs::create_dir_all(format!("{directory}/below")).expect("create the volume");
    fs::write(format!("{directory}/of-1000"), "").expect("write");
    for path in [directory.clone(), format!("{directory}/of-1000")] {
        chown(path, Some(1000), Some(1001)).expect("chown");
    }
    // Files of 1000 on the disk are those of 0 in the container.
    let mappings = |id: u32| json!([{"containerID": id, "hostID": 0, "size": 1}]);
    let script = "stat -c %u:%g /v/of-1000; stat -c %u:%g /v/below; echo x > /v/new";
    let (status, text) = t
        .run_spec(&t.id("a"), &["sh", "-c", script], |spec| {
            spec["mounts"].as_array_mut().expect("a list").push(json!({
                "destination": "/v", "type": "bind", "source": directory,
                "options": ["rbind", "ridmap"],
                "uidMappings": mappings(1000), "gidMappings": mappings(1001),
            }));
        })
        .expect("runs");
    // What has no mapping belongs to nobody.
    assert_eq!((status, text.as_str()), (0, "0:0\n65534:65534"));
    let made = fs::metadata(format!("{directory}/new")).expect("written");
    assert_eq!((made.uid(), made.gid()), (1000, 1001));
    let refusal = t
        .run_spec(&t.id("b"), &["true"], |spec| {
            spec["mounts"].as_array_mut().expect("a list").push(json!({
                "destination": "/v", "type": "bind", "source": directory,
                "options": ["bind", "idmap"],
            }));
        })
        .expect_err("nothing to map by");
    assert!(refusal.message.contains("uidMappings is missing"), "{}", refusal.message);
}

fn start_container_hook_runs_inside(t: &Test) {
    let (_, text) = t
        .run_spec(&t.id("a"), &["cat", "/tmp/from-hook"], |spec| {
            let hook = json!({"path": "/bin/sh", "args": ["sh", "-c", "cat > /tmp/from-hook"]});
            spec["hooks"] = json!({"startContainer": [hook]});
        })
        .expect("runs");
    assert!(text.contains("ociVersion"), "{text}");
}

// The last rule that matches wins in OCI, but the kernel cannot take a device back from a wildcard.
fn device_rules_with_a_hole_are_refused(t: &Test) {
    let refusal = t
        .run_spec(&t.id("a"), &["true"], |spec| {
            spec["linux"]["resources"]["devices"] = json!([
                {"allow": false, "access": "rwm"},
                {"allow": true, "type": "c", "major": 10, "access": "rwm"},
                {"allow": false, "type": "c", "major": 10, "minor": 229, "access": "rwm"},
            ]);
        })
        .expect_err("a rule that cannot be honoured");
    assert!(refusal.message.contains("c 10:229"), "{refusal:?}");
}

fn exec_is_no_harder_to_kill_than_the_container(t: &Test) {
    let id = t.id("a");
    let script = "echo 345 > /proc/self/oom_score_adj; trap 'exit 0' TERM; \
                  while :; do sleep 1000 & wait; done";
    t.start(&[], &id, &["sh", "-c", script]);
    eventually("the container has its score", Duration::from_secs(5), || {
        (t.exec_sh(&id, "cat /proc/1/oom_score_adj").ok().text() == "345").then_some(())
    });
    assert_eq!(t.exec_sh(&id, "cat /proc/self/oom_score_adj").ok().text(), "345");
}

// A path of the client's choice may hold a directory that is called like LXC's own.
fn limits_stay_below_the_cgroups_path(t: &Test) {
    let path = format!("/{}/x/ns/{}", t.node.namespace, t.id("a"));
    let script = "cat /proc/self/cgroup; sleep 1";
    let (status, _) = t
        .run_spec(&t.id("a"), &["sh", "-c", script], |spec| {
            spec["linux"]["cgroupsPath"] = json!(path);
            spec["linux"]["resources"]["pids"] = json!({"limit": 77});
            // Seen from the host while it runs.
            let file = t.file("limits.sh");
            let find = format!(
                "for f in $(find /sys/fs/cgroup -path '*/{}/x*' -name pids.max); do \
                 echo \"${{f##*/x}} $(cat $f)\"; done > {}",
                t.node.namespace,
                t.file("limits")
            );
            fs::write(&file, format!("#!/bin/sh\n{find}\n")).expect("write the hook");
            fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).expect("chmod");
            spec["hooks"] = json!({"poststart": [{"path": file}]});
        })
        .expect("runs");
    assert_eq!(status, 0);
    let seen = fs::read_to_string(t.file("limits")).expect("the hook ran");
    let limited: Vec<_> = seen.lines().filter(|line| line.ends_with(" 77")).collect();
    assert_eq!(limited, [format!("/ns/{}/pids.max 77", t.id("a"))], "{seen}");
    process::run(Command::new("sh").arg("-c").arg(format!(
        "find /sys/fs/cgroup -depth -type d -path '*/{}/x*' -exec rmdir {{}} + 2>/dev/null; true",
        t.node.namespace
    )));
}

/// liblxc obeys whoever has uid 0 and can connect to a CT's command socket in the node's network.
fn lxc_is_out_of_reach_on_the_host_network(t: &Test) {
    let (id, trusted) = (t.id("a"), t.id("trusted"));
    t.start_idle(&["--net-host"], &id);
    let end = format!("/{}/command", t.node.pve().vmid_of(&id).expect("its CT"));
    let sockets = fs::read_to_string("/proc/net/unix").expect("read the sockets");
    let socket = sockets
        .lines()
        .filter_map(|line| line.split_once('@').map(|(_, name)| name))
        .find(|name| name.ends_with(&end))
        .expect("LXC listens");
    // EPERM. A kernel before 6.12 can't do it, and the log says so.
    let refused = if sys::landlock_abi() >= 6 { "1" } else { "0" };
    assert_eq!(t.exec(&[], &id, &["probe", "abstract", socket]).ok().text(), refused);
    let first = t.sh(&["--net-host"], &t.id("first"), &format!("probe abstract {socket}"));
    assert_eq!(first.ok().text(), refused);
    // Its own sockets are its own affair.
    let own = format!("{id}-own");
    assert_eq!(t.exec(&[], &id, &["probe", "abstract", &own, "own"]).ok().text(), "0");
    // Who has the node's capabilities needs no socket to harm it.
    t.start_idle(&["--net-host", "--privileged"], &trusted);
    assert_eq!(t.exec(&[], &trusted, &["probe", "abstract", socket]).ok().text(), "0");
}
