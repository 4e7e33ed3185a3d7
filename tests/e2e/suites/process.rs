//! `process` of the OCI specification, seen from inside: for the container's own process and for
//! an exec.

use std::fs;
use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::direct::Stdio3;
use crate::harness::process::eventually;
use crate::harness::test::Test;
use crate::suites::cases;

cases!("process":
    working_directory_is_created_inside,
    working_directory_by_a_descriptor_is_refused,
    terminal_has_its_first_size,
    unknown_capability_is_left_out_with_a_warning;
    proxmox:
    scheduler_and_io_priority,
    impossible_scheduler_fails_the_start,
    memory_policy_and_personality,
    exec_has_the_containers_scheduling_and_limits,
    exec_has_its_own_scheduling_and_limits,
    exec_runs_on_the_processors_it_asks_for,
    exec_has_its_own_umask_and_groups,
    exec_gets_no_capability_that_the_container_lacks,
    exec_does_not_create_a_working_directory,
);

/// Fields 19 and 41 of /proc/PID/stat are the nice value and the policy.
const SCHEDULING: &str = "cut -d' ' -f19,41 /proc/$$/stat; ionice -p $$";

fn scheduler_and_io_priority(t: &Test) {
    let (status, text) = t
        .run_spec(&t.id("a"), &["sh", "-c", SCHEDULING], |spec| {
            spec["process"]["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": -3});
            spec["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_BE", "priority": 6});
        })
        .expect("runs");
    assert_eq!((status, text.as_str()), (0, "-3 3\nbest-effort: prio 6"));
}

fn impossible_scheduler_fails_the_start(t: &Test) {
    // The kernel wants runtime <= deadline.
    let refusal = t
        .run_spec(&t.id("a"), &["true"], |spec| {
            spec["process"]["scheduler"] = json!({"policy": "SCHED_DEADLINE",
                "runtime": 10_000_000, "deadline": 5_000_000, "period": 5_000_000});
        })
        .expect_err("refused by the kernel");
    assert!(refusal.message.contains("error setting scheduler"), "{}", refusal.message);
}

fn memory_policy_and_personality(t: &Test) {
    // The second field of a line of numa_maps is the policy.
    let script = ["sh", "-c", "uname -m; cut -d' ' -f2 /proc/self/numa_maps | sort -u"];
    let change = |spec: &mut Value| {
        spec["linux"]["personality"] = json!({"domain": "LINUX32"});
        spec["linux"]["memoryPolicy"] =
            json!({"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"]});
    };
    let machine = if cfg!(target_arch = "x86_64") { "i686" } else { "armv8l" };
    let of_container = t.run_spec(&t.id("a"), &script, change).expect("runs");
    let of_exec = t.exec_spec(&t.id("b"), &script, change, |_| ()).expect("runs");
    for (status, text) in [of_container, of_exec] {
        assert_eq!(status, 0, "{text}");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], machine);
        assert!(lines[1..].contains(&"bind=static:0"), "{text}");
    }
    let refusal = t
        .run_spec(&t.id("c"), &["true"], |spec| {
            spec["linux"]["memoryPolicy"] = json!({"mode": "MPOL_BIND", "nodes": "1000"});
        })
        .expect_err("there is no such node");
    assert!(refusal.message.contains("error setting memory policy"), "{}", refusal.message);
}

fn schedule(process: &mut Value) {
    process["scheduler"] = json!({"policy": "SCHED_IDLE"});
    process["ioPriority"] = json!({"class": "IOPRIO_CLASS_IDLE"});
    process["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}]);
}

const SCHEDULING_AND_LIMITS: &str =
    "cut -d' ' -f19,41 /proc/$$/stat; ionice -p $$; probe limits | grep nofile";

fn exec_has_the_containers_scheduling_and_limits(t: &Test) {
    let clear = |process: &mut Value| {
        for key in ["scheduler", "ioPriority", "rlimits"] {
            process[key] = Value::Null;
        }
    };
    let script = ["sh", "-c", SCHEDULING_AND_LIMITS];
    let (status, text) = t
        .exec_spec(&t.id("a"), &script, |spec| schedule(&mut spec["process"]), clear)
        .expect("runs");
    assert_eq!((status, text.as_str()), (0, "0 5\nidle\nnofile 100 200"));
}

fn exec_has_its_own_scheduling_and_limits(t: &Test) {
    let own = |process: &mut Value| {
        process["scheduler"] = json!({"policy": "SCHED_OTHER", "nice": 7});
        process["ioPriority"] = json!({"class": "IOPRIO_CLASS_BE", "priority": 1});
        process["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 50, "hard": 60}]);
    };
    let script = ["sh", "-c", SCHEDULING_AND_LIMITS];
    let (status, text) =
        t.exec_spec(&t.id("a"), &script, |spec| schedule(&mut spec["process"]), own).expect("runs");
    assert_eq!((status, text.as_str()), (0, "7 0\nbest-effort: prio 1\nnofile 50 60"));
}

fn exec_runs_on_the_processors_it_asks_for(t: &Test) {
    let script = "for p in 1 $$; do sed -n 's/^Cpus_allowed_list:\t//p' /proc/$p/status; done";
    let online = fs::read_to_string("/sys/devices/system/cpu/online").expect("online");
    let affinity = |process: &mut Value| {
        process["execCPUAffinity"] = json!({"initial": "0", "final": "0"});
    };
    // As of the container, for which it means nothing, and as of the exec itself.
    let of_container = t
        .exec_spec(
            &t.id("a"),
            &["sh", "-c", script],
            |spec| affinity(&mut spec["process"]),
            |process| process["execCPUAffinity"] = Value::Null,
        )
        .expect("runs");
    let of_exec = t.exec_spec(&t.id("b"), &["sh", "-c", script], |_| (), affinity).expect("runs");
    for (status, text) in [of_container, of_exec] {
        assert_eq!((status, text), (0, format!("{}\n0", online.trim())));
    }
    let absent = t
        .exec_spec(
            &t.id("c"),
            &["true"],
            |_| (),
            |process| process["execCPUAffinity"] = json!({"initial": "8000"}),
        )
        .expect_err("no such processor");
    assert!(absent.message.contains("error setting CPU affinity"), "{}", absent.message);
}

fn exec_has_its_own_umask_and_groups(t: &Test) {
    let (status, text) = t
        .exec_spec(
            &t.id("a"),
            &["sh", "-c", "umask; id -u; id -g; sed -n 's/^Groups:\t//p' /proc/$$/status"],
            |spec| spec["process"]["user"]["umask"] = json!(0o077),
            |process| {
                process["user"] =
                    json!({"uid": 5, "gid": 6, "umask": 0o027, "additionalGids": [7, 8]});
            },
        )
        .expect("runs");
    assert_eq!((status, text.as_str()), (0, "0027\n5\n6\n7 8"));
}

fn exec_gets_no_capability_that_the_container_lacks(t: &Test) {
    let id = t.id("a");
    let sets = ["bounding", "effective", "permitted", "inheritable", "ambient"];
    let (status, text) = t
        .exec_spec(
            &id,
            &["sh", "-c", "grep -c '^Cap.*0000000000000021$' /proc/$$/status"],
            |spec| {
                for set in sets {
                    spec["process"]["capabilities"][set] = json!(["CAP_CHOWN", "CAP_KILL"]);
                }
            },
            |process| {
                for set in sets {
                    process["capabilities"][set] =
                        json!(["CAP_CHOWN", "CAP_KILL", "CAP_SYS_ADMIN", "CAP_SYS_MODULE"]);
                }
            },
        )
        .expect("runs");
    assert_eq!((status, text.as_str()), (0, "5"));
    let log = t.shim_log(&id);
    assert!(log.contains("limited to the bounding set of the container"), "{log}");
}

fn unknown_capability_is_left_out_with_a_warning(t: &Test) {
    let id = t.id("a");
    let (status, text) = t
        .run_spec(&id, &["sh", "-c", "sed -n 's/^CapBnd:\t//p' /proc/$$/status"], |spec| {
            for set in ["bounding", "effective", "permitted"] {
                spec["process"]["capabilities"][set] = json!(["CAP_KILL", "CAP_OF_TOMORROW"]);
            }
        })
        .expect("runs");
    assert_eq!((status, text.as_str()), (0, "0000000000000020"));
    let log = eventually("the warning is logged", Duration::from_secs(5), || {
        Some(t.shim_log(&id)).filter(|log| log.contains("CAP_OF_TOMORROW"))
    });
    assert!(log.contains("warn"), "{log}");
}

fn working_directory_is_created_inside(t: &Test) {
    let run = |name: &str, cwd: &str| {
        t.run_spec(&t.id(name), &["sh", "-c", "pwd -P; stat -c '%a %u %g' ."], |spec| {
            spec["process"]["cwd"] = json!(cwd);
            spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        })
        .expect("runs")
    };
    assert_eq!(run("a", "/new/deep"), (0, "/new/deep\n755 0 0".to_owned()));
    // The image's /evil is a link to ../../../../tmp.
    let name = t.id("dir");
    assert_eq!(run("b", &format!("/evil/{name}")), (0, format!("/tmp/{name}\n755 0 0")));
    assert!(!std::path::Path::new("/tmp").join(&name).exists(), "made on the host");
}

fn exec_does_not_create_a_working_directory(t: &Test) {
    let refusal = t
        .exec_spec(&t.id("a"), &["pwd"], |_| (), |process| process["cwd"] = json!("/no/such"))
        .expect_err("it is missing");
    assert!(
        refusal.message.contains("chdir to cwd (\"/no/such\") set in config.json failed"),
        "{}",
        refusal.message
    );
}

fn working_directory_by_a_descriptor_is_refused(t: &Test) {
    for number in 0..12 {
        for (name, prefix) in [("a", "/proc/self/fd"), ("b", "/proc/1/fd")] {
            let cwd = format!("{prefix}/{number}");
            let outcome = t.run_spec(&t.id(&format!("{name}{number}")), &["ls", "/"], |spec| {
                spec["process"]["cwd"] = json!(cwd);
            });
            assert!(outcome.is_err(), "{cwd}: {outcome:?}");
        }
    }
}

fn terminal_has_its_first_size(t: &Test) {
    let id = t.id("a");
    let driver = t.driver();
    let mut spec = driver.spec(&id, &["sh", "-c", "stty size; tty; stty size < /dev/console"]);
    spec["process"]["terminal"] = json!(true);
    spec["process"]["consoleSize"] = json!({"height": 33, "width": 111});
    let log = t.file("out");
    let io = Stdio3 { stdout: format!("file://{log}"), terminal: true, ..Stdio3::default() };
    let shim = driver.start(&id, &spec);
    let outcome = shim.create(&io).and_then(|_| shim.start("")).and_then(|_| shim.wait(""));
    shim.finish();
    driver.remove_bundle(&id);
    let text = fs::read_to_string(&log).unwrap_or_default();
    assert_eq!(outcome.expect("runs").exit_status, 0, "{text}");
    assert_eq!(text.replace('\r', ""), "33 111\n/dev/pts/0\n33 111\n");
}
