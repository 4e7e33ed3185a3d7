//! A container runs: what it sees of its image, arguments, environment, identity and host.

use crate::harness::test::Test;
use crate::suites::cases;

cases!("run":
    prints_and_exits_with_zero,
    sees_arguments_unchanged,
    sees_the_environment_of_image_and_flags,
    starts_in_the_working_directory,
    runs_as_a_user_by_number,
    is_pid_one_in_its_own_namespaces,
    writes_to_its_own_layer_only,
    has_no_descriptor_but_its_streams,
    leaves_no_trace_of_the_runtime_inside,
    missing_executable_is_named,
    not_executable_is_named,
    a_second_container_of_that_id_is_refused,
    a_64_character_id_runs,
    pid_file_holds_the_host_pid,
    detached_container_is_listed_running,
);

fn prints_and_exits_with_zero(t: &Test) {
    let out = t.run(&[], &t.id("a"), &["echo", "hello world"]).ok();
    assert_eq!(out.text(), "hello world");
    assert_eq!(out.stderr, "");
}

fn sees_arguments_unchanged(t: &Test) {
    let odd = ["", " ", "a b", "\"quoted\"", "it's", "new\nline", "$HOME", "ümlaut", "\\"];
    let mut command = vec!["sh", "-c", "for a; do printf '<%s>' \"$a\"; done", "sh"];
    command.extend(odd);
    let expected: String = odd.iter().map(|a| format!("<{a}>")).collect();
    assert_eq!(t.run(&[], &t.id("a"), &command).ok().text(), expected);
}

fn sees_the_environment_of_image_and_flags(t: &Test) {
    let out = t.run(&["--env", "A=1 2", "--env", "EMPTY="], &t.id("a"), &["env"]).ok().text();
    let mut lines: Vec<_> = out.lines().filter(|l| !l.starts_with("HOSTNAME=")).collect();
    lines.sort_unstable();
    assert_eq!(lines, ["A=1 2", "EMPTY=", "FROM_IMAGE=yes", "HOME=/root", "PATH=/bin"]);
}

fn starts_in_the_working_directory(t: &Test) {
    assert_eq!(t.run(&["--cwd", "/home/user"], &t.id("a"), &["pwd"]).ok().text(), "/home/user");
    // A directory that the image does not have is made, as runc does.
    assert_eq!(t.run(&["--cwd", "/new/place"], &t.id("b"), &["pwd"]).ok().text(), "/new/place");
}

fn runs_as_a_user_by_number(t: &Test) {
    let user = serde_json::json!({"uid": 4711, "gid": 4712, "additionalGids": [5, 1234]});
    let (status, text) =
        t.run_spec(&t.id("a"), &["id"], |spec| spec["process"]["user"] = user).expect("runs");
    assert_eq!((status, text.as_str()), (0, "uid=4711 gid=4712 groups=5,1234(extra)"));
}

fn is_pid_one_in_its_own_namespaces(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    let pid = t.pid(&id);
    assert_eq!(
        t.exec_sh(&id, "head -n 1 /proc/1/comm; ls -d /proc/[0-9]* | wc -l")
            .ok()
            .text()
            .lines()
            .next(),
        Some("sh")
    );
    for kind in ["pid", "mnt", "net", "ipc", "uts"] {
        let link = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok();
        assert_ne!(link(&pid.to_string()), link("self"), "namespace {kind}");
    }
    // No process but the workload and its child exists in the container.
    let seen = t.exec_sh(&id, "for p in /proc/[0-9]*; do cat $p/comm; done").ok().text();
    assert!(seen.lines().all(|name| ["sh", "sleep", "cat"].contains(&name)), "{seen}");
}

fn writes_to_its_own_layer_only(t: &Test) {
    t.sh(&[], &t.id("a"), "echo changed > /etc/passwd && test -s /etc/passwd").ok();
    assert_eq!(t.sh(&[], &t.id("b"), "head -c 4 /etc/passwd").ok().text(), "root");
}

fn has_no_descriptor_but_its_streams(t: &Test) {
    // The descriptor on the directory itself is the listing's own.
    let out = t.run(&[], &t.id("a"), &["ls", "/proc/self/fd"]).ok().text();
    assert_eq!(out.lines().collect::<Vec<_>>(), ["0", "1", "2", "3"]);
}

fn leaves_no_trace_of_the_runtime_inside(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    for file in ["/proc/1/environ", "/proc/1/cmdline", "/proc/mounts", "/proc/1/maps"] {
        let text = t.exec_sh(&id, &format!("cat {file}")).ok().text();
        assert!(!text.contains("proxmox"), "{file}: {text}");
        assert!(!text.contains("container=lxc"), "{file}: {text}");
    }
    let found = t.exec_sh(&id, "find / -xdev -name '*proxmox*'; ls -A /dev | sort").ok().text();
    assert!(!found.contains("proxmox"), "{found}");
}

fn missing_executable_is_named(t: &Test) {
    let id = t.id("a");
    let out = t.run(&[], &id, &["/no/such/program"]).expect_error("/no/such/program");
    assert!(out.stderr.contains("no such file or directory"), "{}", out.stderr);
    assert!(t.task(&id).is_none(), "a task is left after the failed start");
}

fn not_executable_is_named(t: &Test) {
    let out = t.run(&[], &t.id("a"), &["/etc/not-executable"]).expect_error("/etc/not-executable");
    assert!(out.stderr.contains("permission denied"), "{}", out.stderr);
}

fn a_second_container_of_that_id_is_refused(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    let pid = t.pid(&id);
    t.run(&[], &id, &["true"]).expect_error("already exists");
    assert_eq!(t.task(&id), Some((pid, "RUNNING".to_owned())), "the first one is not touched");
}

fn a_64_character_id_runs(t: &Test) {
    let short = t.id("");
    let id = t.id(&"x".repeat(64 - short.len()));
    assert_eq!(id.len(), 64);
    assert_eq!(t.run(&[], &id, &["echo", "long"]).ok().text(), "long");
}

fn pid_file_holds_the_host_pid(t: &Test) {
    let (id, file) = (t.id("a"), t.file("pid"));
    t.start_idle(&["--pid-file", &file], &id);
    let pid: u32 = std::fs::read_to_string(&file).expect("pid file").trim().parse().expect("a pid");
    assert_eq!(pid, t.pid(&id));
    let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).expect("the process exists");
    assert_eq!(comm.trim(), "sh");
}

fn detached_container_is_listed_running(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    assert_eq!(t.task(&id).map(|(_, status)| status).as_deref(), Some("RUNNING"));
    t.kill(&id, "SIGTERM").ok();
    assert_eq!(t.wait_exit(&id).exit_status(), 0);
    t.wait_status(&id, "STOPPED");
    t.delete(&id);
}
