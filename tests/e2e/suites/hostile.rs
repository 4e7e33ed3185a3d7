//! Images and bundles that try to reach the host or to confuse the runtime.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::direct::{Refusal, Stdio3};
use crate::harness::process;
use crate::harness::test::Test;
use crate::suites::cases;

cases!("hostile": ; proxmox:
    links_in_place_of_every_directory,
    linked_system_directories_are_refused,
    endless_links_are_an_error_that_names_the_mount,
    target_swapped_while_mounts_are_made,
    strings_that_could_be_lines,
    ten_thousand_mounts,
    environment_of_a_megabyte,
    environment_that_the_kernel_refuses,
);

/// Runs a command on top of an image that `build` changes: status and output.
fn run_image(
    t: &Test,
    name: &str,
    command: &[&str],
    build: impl FnOnce(&Path),
    change: impl FnOnce(&mut Value),
) -> Result<(u32, String), Refusal> {
    let id = t.id(name);
    let layer = t.directory().join(format!("{name}.layer"));
    fs::create_dir_all(&layer).expect("create the layer");
    build(&layer);
    let driver = t.driver();
    let mut spec = driver.spec(&id, command);
    change(&mut spec);
    let log = t.file(&format!("{name}.out"));
    let uri = format!("file://{log}");
    let io = Stdio3 { stdout: uri.clone(), stderr: uri, ..Stdio3::default() };
    let mut shim = driver.start(&id, &spec);
    shim.add_layer(&layer);
    let outcome = shim.create(&io).and_then(|_| shim.start("")).and_then(|_| shim.wait(""));
    shim.finish();
    driver.remove_bundle(&id);
    let text = fs::read_to_string(&log).unwrap_or_default();
    outcome.map(|reply| (reply.exit_status, text.trim_end().to_owned()))
}

/// An empty directory of the host, at a path that links can name.
fn outside(t: &Test) -> PathBuf {
    let outside = t.directory().join("outside");
    fs::create_dir_all(&outside).expect("create");
    outside
}

#[track_caller]
fn assert_untouched(outside: &Path) {
    let found: Vec<_> = fs::read_dir(outside).expect("list").flatten().collect();
    assert!(found.is_empty(), "made on the host: {found:?}");
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    let path = outside.display().to_string();
    assert!(!mounts.contains(&path), "mounted on the host below {path}");
}

fn links_in_place_of_every_directory(t: &Test) {
    let outside = outside(t);
    let masked = ["/masked-file", "/masked-directory"];
    for (number, target) in
        [outside.display().to_string(), format!("../../../../../../../..{}", outside.display())]
            .iter()
            .enumerate()
    {
        let build = |layer: &Path| {
            for name in ["etc", "run", "mnt", "home", "root", "evil"] {
                symlink(target, layer.join(name)).expect("link");
            }
            fs::create_dir(layer.join("var")).expect("create");
            symlink(target, layer.join("var/run")).expect("link");
            for path in masked {
                symlink(format!("{target}/x"), layer.join(&path[1..])).expect("link");
            }
        };
        let (status, text) = run_image(
            t,
            &format!("a{number}"),
            &["sh", "-c", "cat /mnt/file /run/new/file; ls -d /etc/made; id -u"],
            build,
            |spec| {
                fs::write(t.file("file"), "mounted\n").expect("write");
                let mounts = spec["mounts"].as_array_mut().expect("a list");
                mounts.push(json!({"destination": "/mnt", "type": "tmpfs", "source": "tmpfs"}));
                mounts.push(json!({"destination": "/mnt/file", "type": "bind",
                    "source": t.file("file"), "options": ["bind"]}));
                mounts.push(json!({"destination": "/run/new/file", "type": "bind",
                    "source": t.file("file"), "options": ["bind"]}));
                mounts
                    .push(json!({"destination": "/etc/made", "type": "tmpfs", "source": "tmpfs"}));
                spec["linux"]["devices"] = json!([
                    {"path": "/home/null", "type": "c", "major": 1, "minor": 3},
                    {"path": "/evil/deep/fifo", "type": "p"},
                ]);
                spec["process"]["cwd"] = json!("/root/cwd");
                for key in ["maskedPaths", "readonlyPaths"] {
                    let paths = spec["linux"][key].as_array_mut().expect("a list");
                    paths.extend(masked.iter().map(|path| json!(path)));
                }
            },
        )
        .unwrap_or_else(|refusal| panic!("{target}: {refusal:?}"));
        assert_eq!((status, text.as_str()), (0, "mounted\nmounted\n/etc/made\n0"), "{target}");
        assert_untouched(&outside);
    }
}

fn linked_system_directories_are_refused(t: &Test) {
    let outside = outside(t);
    for name in ["dev", "proc", "sys"] {
        let refusal = run_image(
            t,
            name,
            &["true"],
            |layer| symlink(&outside, layer.join(name)).expect("link"),
            |_| (),
        )
        .expect_err(name);
        assert!(
            refusal.message.contains("must be mounted on ordinary directory")
                && refusal.message.contains(&format!("\"/{name}\"")),
            "{name}: {}",
            refusal.message
        );
        assert_untouched(&outside);
    }
}

fn endless_links_are_an_error_that_names_the_mount(t: &Test) {
    let refusal = run_image(
        t,
        "a",
        &["true"],
        |layer| symlink("/mnt/deeper", layer.join("mnt")).expect("link"),
        |spec| {
            let mounts = spec["mounts"].as_array_mut().expect("a list");
            mounts.push(json!({"destination": "/mnt", "type": "tmpfs", "source": "tmpfs"}));
            // What comes later has been sent already when init gives up.
            mounts.push(json!({"destination": "/later", "type": "bind", "source": t.file(""),
                "options": ["bind"]}));
        },
    )
    .expect_err("a loop");
    assert!(
        refusal.message.contains("/mnt") && refusal.message.contains("symbolic links"),
        "{}",
        refusal.message
    );
}

fn target_swapped_while_mounts_are_made(t: &Test) {
    let (outside, stop) = (outside(t), AtomicBool::new(false));
    let volume = t.directory().join("volume");
    fs::create_dir_all(&volume).expect("create");
    fs::write(t.file("file"), "").expect("write");
    let up = format!("../../../../../../../..{}", outside.display());
    std::thread::scope(|scope| {
        // As another container with the same volume could.
        scope.spawn(|| {
            let swapped = volume.join("swapped");
            while !stop.load(Ordering::Relaxed) {
                for target in [outside.display().to_string().as_str(), up.as_str()] {
                    let _ = fs::create_dir(&swapped);
                    let _ = fs::remove_dir_all(&swapped);
                    let _ = symlink(target, &swapped);
                    let _ = fs::remove_file(&swapped);
                }
            }
        });
        for number in 0..8 {
            // It may fail while the other one is between two states; it must not escape.
            let outcome = t.run_spec(&t.id(&format!("a{number}")), &["true"], |spec| {
                let mounts = spec["mounts"].as_array_mut().expect("a list");
                mounts.push(json!({"destination": "/volume", "type": "bind",
                    "source": volume, "options": ["rbind", "rw"]}));
                for n in 0..20 {
                    mounts.push(json!({"destination": format!("/volume/swapped/d{n}"),
                        "type": "tmpfs", "source": "tmpfs"}));
                    mounts.push(json!({"destination": format!("/volume/swapped/f{n}"),
                        "type": "bind", "source": t.file("file"), "options": ["bind"]}));
                }
                spec["linux"]["maskedPaths"] = json!(["/volume/swapped/d0"]);
            });
            if let Err(refusal) = outcome {
                assert!(refusal.message.contains("/volume/swapped"), "{}", refusal.message);
            }
            assert_untouched(&outside);
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_untouched(&outside);
}

fn strings_that_could_be_lines(t: &Test) {
    let configuration = |id: &str| -> Vec<String> {
        let directory = t.node.run_dir().join(&t.node.namespace).join(id);
        let own = fs::read_to_string(directory.join("lxc.conf")).expect("lxc.conf");
        let vmid = t.node.pve().vmid_of(id).expect("its VMID");
        let configurations = t.node.pve().configurations();
        let (_, shown) = configurations.into_iter().find(|(v, _)| *v == vmid).expect("its file");
        own.lines()
            .map(|line| line.split(" =").next().unwrap_or_default().to_owned())
            .chain(
                shown
                    .lines()
                    .filter(|line| !line.starts_with('#'))
                    .map(|line| line.split(':').next().unwrap_or_default().to_owned()),
            )
            .collect()
    };
    let driver = t.driver();
    let keys = |name: &str, change: &dyn Fn(&mut Value), script: &str| {
        let id = t.id(name);
        let mut spec = driver.spec(&id, &["sh", "-c", &format!("{script}; sleep 1000")]);
        change(&mut spec);
        let log = t.file(&format!("{name}.out"));
        let io = Stdio3 { stdout: format!("file://{log}"), ..Stdio3::default() };
        let shim = driver.start(&id, &spec);
        shim.create(&io).expect("create");
        shim.start("").expect("start");
        let end = process::deadline(Duration::from_secs(10));
        while !fs::read_to_string(&log).unwrap_or_default().contains("done") {
            assert!(Instant::now() < end, "the container says nothing");
            std::thread::sleep(Duration::from_millis(20));
        }
        let keys = configuration(&id);
        shim.finish();
        driver.remove_bundle(&id);
        (keys, fs::read_to_string(&log).expect("output"))
    };
    let evil = "x\nlxc.hook.start = /bin/sh\nmp0: /,mp=/host\r\t,a=b \"q\" 'r' \\ # é";
    let plain = keys("plain", &|_| (), "echo done");
    let source = t.directory().join(evil.replace('/', "|"));
    fs::create_dir_all(&source).expect("create");
    fs::write(source.join("file"), "from the host").expect("write");
    let hostile = keys(
        "hostile",
        &|spec| {
            spec["process"]["env"] = json!(["PATH=/bin", format!("EVIL={evil}")]);
            spec["process"]["args"].as_array_mut().expect("a list").push(json!(evil));
            spec["process"]["cwd"] = json!(format!("/tmp/{evil}"));
            spec["hostname"] = json!("a\nlxc.hook.start = /bin/sh,b=c");
            spec["domainname"] = json!("a\nmp0: /,mp=/host");
            spec["annotations"] = json!({
                "io.kubernetes.cri.image-name": evil, evil: evil,
            });
            spec["mounts"].as_array_mut().expect("a list").push(json!({
                "destination": format!("/mnt/{evil}"), "type": "bind", "source": source,
                "options": ["rbind", "ro"],
            }));
            spec["linux"]["devices"] =
                json!([{"path": format!("/dev/{evil}"), "type": "c", "major": 1, "minor": 3}]);
            for key in ["maskedPaths", "readonlyPaths"] {
                spec["linux"][key].as_array_mut().expect("a list").push(json!(format!("/{evil}")));
            }
        },
        "cat \"/mnt/$EVIL/file\"; echo; test \"$0\" = \"$EVIL\" && echo argument; \
         test -c \"/dev/$EVIL\" && echo device; test \"$(pwd)\" = \"/tmp/$EVIL\" && echo cwd; \
         hostname | wc -l; echo done",
    );
    assert_eq!(hostile.1, "from the host\nargument\ndevice\ncwd\n2\ndone\n");
    assert_eq!(hostile.0, plain.0, "a string has become a line");

    // Where the string would have to be such a line, it is refused.
    for (name, change) in [
        ("cgroupsPath", json!({"cgroupsPath": format!("/{evil}")})),
        (
            "namespaces",
            json!({"namespaces": [{"type": "mount"}, {"type": "network", "path": format!("/{evil}")}]}),
        ),
    ] {
        let refusal = t
            .run_spec(&t.id(name), &["true"], |spec| {
                for (key, value) in change.as_object().expect("an object") {
                    spec["linux"][key] = value.clone();
                }
            })
            .expect_err(name);
        assert_eq!(refusal.message.lines().count(), 1, "{name}: {}", refusal.message);
    }
}

fn ten_thousand_mounts(t: &Test) {
    fs::write(t.file("file"), "x").expect("write");
    let (status, text) = t
        .run_spec(&t.id("a"), &["sh", "-c", "grep -c ' /many/' /proc/mounts"], |spec| {
            let mounts = spec["mounts"].as_array_mut().expect("a list");
            for n in 0..5_000 {
                mounts.push(json!({"destination": format!("/many/b{n}"), "type": "bind",
                    "source": t.file("file"), "options": ["bind", "ro"]}));
                mounts.push(json!({"destination": format!("/many/t{n}"), "type": "tmpfs",
                    "source": "tmpfs", "options": ["size=4k"]}));
            }
        })
        .expect("runs");
    assert_eq!((status, text.as_str()), (0, "10000"));
}

fn environment_of_a_megabyte(t: &Test) {
    let value = "v".repeat(100_000);
    let (status, text) = t
        .run_spec(&t.id("a"), &["sh", "-c", "env | wc -c"], |spec| {
            let env = spec["process"]["env"].as_array_mut().expect("a list");
            env.extend((0..10).map(|n| json!(format!("BIG{n}={value}"))));
        })
        .expect("runs");
    assert_eq!(status, 0, "{text}");
    assert!(text.trim().parse::<usize>().expect("a number") > 1_000_000, "{text}");
}

fn environment_that_the_kernel_refuses(t: &Test) {
    let refusal = t
        .run_spec(&t.id("a"), &["true"], |spec| {
            let env = spec["process"]["env"].as_array_mut().expect("a list");
            // MAX_ARG_STRLEN.
            env.push(json!(format!("BIG={}", "v".repeat(200_000))));
        })
        .expect_err("the kernel refuses it");
    assert!(refusal.message.contains("argument list too long"), "{}", refusal.message);
}
