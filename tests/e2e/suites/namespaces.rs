//! Namespaces: a new one, the host's, or that of another container.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};

use crate::harness::direct::{Driver, Shim, Stdio3};
use crate::harness::process;
use crate::harness::test::Test;
use crate::suites::cases;

cases!("namespaces":
    only_a_mount_namespace,
    loopback_is_up_in_a_new_network_namespace;
    proxmox:
    each_kind_is_new_or_the_hosts_or_joined,
    clocks_of_a_time_namespace,
    impossible_clock_offset_fails_the_create,
);

/// The specification's names and those of /proc/PID/ns.
const KINDS: [(&str, &str); 6] = [
    ("pid", "pid"),
    ("network", "net"),
    ("ipc", "ipc"),
    ("uts", "uts"),
    ("cgroup", "cgroup"),
    ("time", "time"),
];

fn namespace(pid: &str, kind: &str) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/ns/{kind}")).expect("the process runs")
}

fn start(driver: &Driver<'_>, id: &str, change: impl FnOnce(&mut Value)) -> (Shim, String) {
    let mut spec = driver.spec(id, &["sleep", "1000"]);
    change(&mut spec);
    let shim = driver.start(id, &spec);
    let pid = shim.create(&Stdio3::default()).expect("create");
    shim.start("").expect("start");
    (shim, pid.to_string())
}

fn list(spec: &mut Value, kinds: &[(&str, &str)], path: impl Fn(&str) -> Option<String>) {
    let mut list = vec![json!({"type": "mount"})];
    for (oci, proc) in kinds {
        list.push(match path(proc) {
            Some(path) => json!({"type": oci, "path": path}),
            None => json!({"type": oci}),
        });
    }
    spec["linux"]["namespaces"] = Value::Array(list);
}

fn each_kind_is_new_or_the_hosts_or_joined(t: &Test) {
    let driver = t.driver();
    let script = "for k in pid net ipc uts cgroup time; do readlink /proc/self/ns/$k; done";
    // Those of an exec, which must be the container's.
    let exec = |shim: &Shim, name: &str| -> Vec<String> {
        let mut process = driver.spec("x", &["sh", "-c", script])["process"].clone();
        process["cwd"] = json!("/");
        let log = t.file(name);
        let io = Stdio3 { stdout: format!("file://{log}"), ..Stdio3::default() };
        shim.exec("e", &process, &io).and_then(|()| shim.start("e")).expect("exec");
        assert_eq!(shim.wait("e").expect("wait").exit_status, 0);
        fs::read_to_string(log).expect("output").lines().map(str::to_owned).collect()
    };
    let of = |pid: &str| -> Vec<String> {
        KINDS.iter().map(|(_, kind)| namespace(pid, kind).display().to_string()).collect()
    };

    let (first, one) = start(&driver, &t.id("new"), |spec| list(spec, &KINDS, |_| None));
    for (_, kind) in KINDS {
        assert_ne!(namespace(&one, kind), namespace("self", kind), "{kind} of the host");
    }
    assert_eq!(exec(&first, "new.out"), of(&one));

    let (host, none) = start(&driver, &t.id("host"), |spec| list(spec, &[], |_| None));
    for (_, kind) in KINDS {
        assert_eq!(namespace(&none, kind), namespace("self", kind), "{kind} is the host's");
    }
    assert_ne!(namespace(&none, "mnt"), namespace("self", "mnt"));
    assert_eq!(exec(&host, "host.out"), of(&none));

    // LXC cannot join a cgroup namespace.
    let joined: Vec<_> = KINDS.into_iter().filter(|(oci, _)| *oci != "cgroup").collect();
    let (second, other) = start(&driver, &t.id("joined"), |spec| {
        list(spec, &joined, |kind| Some(format!("/proc/{one}/ns/{kind}")));
    });
    for (_, kind) in joined {
        assert_eq!(namespace(&other, kind), namespace(&one, kind), "{kind} is joined");
    }
    assert_eq!(exec(&second, "joined.out"), of(&other));

    for (shim, name) in [(second, "joined"), (host, "host"), (first, "new")] {
        shim.finish();
        driver.remove_bundle(&t.id(name));
    }
}

fn only_a_mount_namespace(t: &Test) {
    let id = t.id("a");
    let hostname = process::run(&mut Command::new("hostname")).ok().text();
    let (status, text) = t
        .run_spec(
            &id,
            &["sh", "-c", "hostname; sed -n 's/^CapEff:\t//p' /proc/self/status"],
            |spec| {
                spec["linux"]["namespaces"] = json!([{"type": "mount"}]);
                spec["process"]["capabilities"] = Value::Null;
                for key in ["cgroupsPath", "resources", "maskedPaths", "readonlyPaths"] {
                    spec["linux"][key] = Value::Null;
                }
                spec["mounts"] =
                    json!([{"destination": "/proc", "type": "proc", "source": "proc"}]);
            },
        )
        .expect("runs");
    assert_eq!((status, text), (0, format!("{hostname}\n0000000000000000")));
}

fn loopback_is_up_in_a_new_network_namespace(t: &Test) {
    let script = "cat /sys/class/net/lo/flags; (nc -l -p 8080 -e echo hello &) ; \
                  for n in 1 2 3 4 5 6 7 8 9; do sleep 0.2; nc 127.0.0.1 8080 < /dev/null && exit; done";
    let out = t.sh(&[], &t.id("a"), script).ok().text();
    // IFF_UP and IFF_LOOPBACK.
    assert_eq!(out, "0x9\nhello");
}

fn clocks_of_a_time_namespace(t: &Test) {
    let driver = t.driver();
    let day = 86_400;
    let change = |spec: &mut Value| {
        spec["linux"]["namespaces"].as_array_mut().expect("a list").push(json!({"type": "time"}));
        spec["linux"]["timeOffsets"] = json!({
            "boottime": {"secs": 100 * day, "nanosecs": 5},
            "monotonic": {"secs": 100 * day},
        });
    };
    let (shim, pid) = start(&driver, &t.id("a"), change);
    let offsets = fs::read_to_string(format!("/proc/{pid}/timens_offsets")).expect("offsets");
    let offsets: Vec<&str> = offsets.split_whitespace().collect();
    assert_eq!(offsets, ["monotonic", "8640000", "0", "boottime", "8640000", "5"]);

    let uptime = |change: &dyn Fn(&mut Value), name: &str| -> u64 {
        let script = ["sh", "-c", "cut -d. -f1 /proc/uptime"];
        let (status, text) = t.run_spec(&t.id(name), &script, |spec| change(spec)).expect("runs");
        assert_eq!(status, 0, "{text}");
        text.parse().expect("seconds")
    };
    let host = uptime(&|_| (), "host");
    let join = |spec: &mut Value| {
        let path = format!("/proc/{pid}/ns/time");
        spec["linux"]["namespaces"]
            .as_array_mut()
            .expect("a list")
            .push(json!({"type": "time", "path": path}));
    };
    for (name, seen) in [("new", uptime(&change, "new")), ("joined", uptime(&join, "joined"))] {
        let difference = seen - host;
        assert!((100 * day..100 * day + 60).contains(&difference), "{name}: {difference}");
    }
    shim.finish();
    driver.remove_bundle(&t.id("a"));
}

fn impossible_clock_offset_fails_the_create(t: &Test) {
    let refusal = t
        .run_spec(&t.id("a"), &["true"], |spec| {
            spec["linux"]["namespaces"]
                .as_array_mut()
                .expect("a list")
                .push(json!({"type": "time"}));
            // Before the beginning of time.
            spec["linux"]["timeOffsets"] = json!({"boottime": {"secs": -1_000_000_000_000_i64}});
        })
        .expect_err("the kernel refuses it");
    assert!(refusal.message.contains("set the clock offsets"), "{}", refusal.message);
}
