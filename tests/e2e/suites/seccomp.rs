//! System calls that an agent on the host answers.

use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::process::scaled;
use crate::harness::sys;
use crate::harness::test::Test;
use crate::suites::cases;

cases!("seccomp": ; proxmox:
    an_agent_answers_for_the_container_and_its_execs,
    without_an_agent_nothing_starts,
    a_filter_that_keeps_the_listener_fails_the_start,
    a_profile_is_compiled_once,
);

/// Answers every notification with EBADMSG, for one process after the other; tells what it was sent.
fn agent(path: &str) -> Receiver<(Value, bool)> {
    let socket = UnixListener::bind(path).expect("bind");
    let (tell, told) = channel();
    std::thread::spawn(move || {
        loop {
            let (state, listener) = sys::receive_with_descriptor(&socket);
            let state = serde_json::from_slice(&state).expect("the state is JSON");
            if tell.send((state, listener.is_some())).is_err() {
                return;
            }
            let Some(listener) = listener else { return };
            std::thread::spawn(move || {
                while sys::answer_notification(&listener, libc::EBADMSG).is_some() {}
            });
        }
    });
    told
}

fn profile(path: &str, privileged: bool) -> impl FnOnce(&mut Value) {
    let path = path.to_owned();
    move |spec: &mut Value| {
        spec["process"]["noNewPrivileges"] = json!(!privileged);
        spec["annotations"] = json!({"a": "b"});
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "listenerPath": path,
            "listenerMetadata": "for you",
            "flags": ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"],
            "syscalls": [{"names": ["mkdirat"], "action": "SCMP_ACT_NOTIFY"}],
        });
    }
}

fn an_agent_answers_for_the_container_and_its_execs(t: &Test) {
    let call = libc::SYS_mkdirat.to_string();
    let probe = ["probe", "errno", call.as_str()];
    for privileged in [false, true] {
        let socket = t.file(&format!("agent{privileged}"));
        let told = agent(&socket);
        let id = t.id(&format!("a{privileged}"));
        let (status, text) = t.run_spec(&id, &probe, profile(&socket, privileged)).expect("runs");
        assert_eq!((status, text), (0, libc::EBADMSG.to_string()));
        let (state, has_listener) =
            told.recv_timeout(scaled(Duration::from_secs(5))).expect("the agent was told");
        assert!(has_listener);
        assert_eq!(state["fds"], json!(["seccompFd"]));
        assert_eq!(state["metadata"], "for you");
        assert_eq!(state["state"]["id"], id.as_str());
        assert_eq!(state["state"]["status"], "created");
        assert_eq!(state["state"]["annotations"]["a"], "b");
        assert_eq!(state["pid"], state["state"]["pid"]);
        assert!(state["ociVersion"].is_string());
    }

    let socket = t.file("agent-of-exec");
    let told = agent(&socket);
    let outcome = t.exec_spec(&t.id("e"), &probe, profile(&socket, false), |_| ());
    assert_eq!(outcome.expect("runs"), (0, libc::EBADMSG.to_string()));
    let own = told.recv_timeout(scaled(Duration::from_secs(5))).expect("of the container");
    let exec = told.recv_timeout(scaled(Duration::from_secs(5))).expect("of the exec");
    assert_eq!(exec.0["state"]["status"], "running");
    assert_eq!(exec.0["state"]["pid"], own.0["pid"]);
    assert_ne!(exec.0["pid"], own.0["pid"]);
    assert!(exec.1, "each process has a listener of its own");
}

fn without_an_agent_nothing_starts(t: &Test) {
    let marker = t.file("ran");
    let socket = t.file("nobody");
    let refusal = t
        .run_spec(&t.id("a"), &["touch", "/shared/ran"], |spec| {
            profile(&socket, false)(spec);
            spec["mounts"].as_array_mut().expect("a list").push(json!({"destination": "/shared",
                "type": "bind", "source": t.file(""), "options": ["rbind"]}));
        })
        .expect_err("nobody listens");
    assert!(refusal.message.contains(&socket), "{}", refusal.message);
    assert!(!std::fs::exists(marker).expect("stat"), "it ran");
}

// Otherwise the end of the connection would look like a successful start.
fn a_filter_that_keeps_the_listener_fails_the_start(t: &Test) {
    let socket = t.file("agent");
    let _told = agent(&socket);
    let refusal = t
        .run_spec(&t.id("a"), &["true"], |spec| {
            profile(&socket, false)(spec);
            spec["linux"]["seccomp"]["syscalls"]
                .as_array_mut()
                .expect("a list")
                .push(json!({"names": ["sendmsg"], "action": "SCMP_ACT_ERRNO"}));
        })
        .expect_err("the listener cannot be sent");
    assert!(refusal.message.contains("must allow sendmsg"), "{}", refusal.message);
}

fn a_profile_is_compiled_once(t: &Test) {
    let kept = || {
        let programs = t.node.run_dir().join(".seccomp");
        std::fs::read_dir(programs)
            .into_iter()
            .flatten()
            .flatten()
            .map(|file| file.path())
            .collect()
    };
    let before: Vec<_> = kept();
    let call = libc::SYS_mkdirat.to_string();
    let mut files = Vec::new();
    for name in ["a", "b"] {
        let (status, text) = t
            .run_spec(&t.id(name), &["probe", "errno", &call], |spec| {
                spec["linux"]["seccomp"] = json!({
                    "defaultAction": "SCMP_ACT_ALLOW",
                    "syscalls": [
                        {"names": ["mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 74},
                        // Nobody else has this rule.
                        {"names": ["acct"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1234},
                    ],
                });
            })
            .expect("runs");
        assert_eq!((status, text.as_str()), (0, "74"), "{name}");
        let inodes: Vec<_> = kept()
            .into_iter()
            .filter(|path| !before.contains(path))
            .map(|path| std::fs::metadata(path).expect("stat").ino())
            .collect();
        files.push(inodes);
    }
    // Other tests run at the same time, but what was there after the first run still is.
    assert!(!files[0].is_empty());
    assert!(files[0].iter().all(|inode| files[1].contains(inode)), "{files:?}");
}
