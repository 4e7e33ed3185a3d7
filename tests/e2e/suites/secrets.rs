//! No secret of a workload, and no token, is where others can read it.

use std::fs;
use std::path::Path;

use crate::harness::process;
use crate::harness::test::Test;
use crate::suites::cases;

cases!("secrets":;
    proxmox:
    environment_and_arguments_stay_out_of_proxmox_and_logs,
    the_token_is_in_no_argument_environment_or_log,
    run_directory_is_private,
);

/// All regular files below `root` that contain one of the texts.
fn files_with(root: &Path, needles: &[&str], found: &mut Vec<String>) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let path = entry.path();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => files_with(&path, needles, found),
            Ok(kind) if kind.is_file() => {
                let bytes = fs::read(&path).unwrap_or_default();
                let text = String::from_utf8_lossy(&bytes);
                for needle in needles.iter().filter(|needle| text.contains(**needle)) {
                    found.push(format!("{needle} in {}", path.display()));
                }
            }
            _ => {}
        }
    }
}

/// What the suite's own processes on the host show of a text, except those of the container.
fn processes_with(t: &Test, needle: &str, environment: bool) -> Vec<String> {
    let container = format!("/{}/", t.node.namespace);
    process::processes()
        .into_iter()
        .filter(|(pid, line)| {
            let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
            let ours = line.contains("containerd-shim-")
                || line.contains("lxc")
                || line.contains("proxmox");
            ours && !groups.contains(&container)
                && !line.starts_with("ctr")
                && !line.contains("/ctr ")
        })
        .filter(|(pid, line)| {
            let file = if environment { "environ" } else { "cmdline" };
            let text = fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
            String::from_utf8_lossy(&text).contains(needle)
                || (!environment && line.contains(needle))
        })
        .map(|(pid, line)| format!("{pid} {line}"))
        .collect()
}

fn environment_and_arguments_stay_out_of_proxmox_and_logs(t: &Test) {
    let id = t.id("a");
    let (env, argument, exec) = ("planted-env-7f3a", "planted-arg-91bc", "planted-exec-44de");
    t.start(&["--env", &format!("SECRET={env}")], &id, &["sh", "-c", "sleep 1000; true", argument]);
    t.exec(&[], &id, &["sh", "-c", "true", exec]).ok();
    // An error that quotes its input would leak too.
    t.exec(&[], &id, &["/missing", exec]);
    let needles = [env, argument, exec];
    let mut found = Vec::new();
    for directory in ["sim/pve", "sim/log", "sim/lxc"] {
        files_with(&t.node.root.join(directory), &needles, &mut found);
    }
    for log in ["containerd.log", "sim.log"] {
        let text = fs::read(t.node.root.join(log)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        for needle in needles.iter().filter(|needle| text.contains(**needle)) {
            // containerd quotes the command of a failed exec itself, as with any runtime.
            if *needle != exec {
                found.push(format!("{needle} in {log}"));
            }
        }
    }
    let run = t.node.run_dir().join(&t.node.namespace).join(&id);
    files_with(&run, &[env, exec], &mut found);
    for needle in needles {
        found.extend(processes_with(t, needle, false));
    }
    found.extend(processes_with(t, env, true));
    assert!(found.is_empty(), "{found:#?}");
}

fn the_token_is_in_no_argument_environment_or_log(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    let file = t.node.pve().get("token_file").to_owned();
    let token = fs::read_to_string(file).expect("read the token");
    let secret = token.trim().split_once('=').expect("a token").1;
    let mut found = processes_with(t, secret, false);
    found.extend(processes_with(t, secret, true));
    for directory in ["sim/pve/nodes", "sim/log", "sim/lxc", "run", "var", "state"] {
        files_with(&t.node.root.join(directory), &[secret], &mut found);
    }
    let log = fs::read(t.node.root.join("containerd.log")).unwrap_or_default();
    if String::from_utf8_lossy(&log).contains(secret) {
        found.push("containerd.log".to_owned());
    }
    assert!(found.is_empty(), "{found:#?}");
    let inside = t.exec_sh(&id, "env; cat /proc/1/environ /proc/mounts").ok().text();
    assert!(!inside.contains(secret));
}

fn run_directory_is_private(t: &Test) {
    use std::os::unix::fs::PermissionsExt;
    let id = t.id("a");
    t.start_idle(&[], &id);
    let directory = t.node.run_dir().join(&t.node.namespace).join(&id);
    let mode = |path: &Path| {
        fs::metadata(path)
            .unwrap_or_else(|e| panic!("{}: {e}", path.display()))
            .permissions()
            .mode()
    };
    assert_eq!(mode(&directory) & 0o077, 0, "{}", directory.display());
}
