//! The binary in a real CT: `lxc-start` below, the test in the shim's place.
//!
//! Needs root, lxc and busybox-static.
#![allow(clippy::unwrap_used)]

#[path = "ct/mod.rs"]
mod ct;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::process::Command;

use ct::*;
use proxmox_shim_init::protocol::*;
use proxmox_shim_init::sys::{self, attr};

/// Ends the test with a word about what is missing.
macro_rules! needs_ct {
    () => {
        if let Some(why) = missing() {
            panic!("{why}: `make test` installs it");
        }
    };
}

fn field<'a>(text: &'a str, name: &str) -> &'a str {
    text.lines()
        .find_map(|l| l.strip_prefix(name))
        .unwrap_or_else(|| panic!("no {name} in {text}"))
        .trim()
}

/// The line of `/proc/self/mountinfo` for a mount point; the last one, which is on top.
fn mount_line<'a>(mountinfo: &'a str, point: &str) -> &'a str {
    mountinfo
        .lines()
        .rfind(|l| l.split(' ').nth(4) == Some(point))
        .unwrap_or_else(|| panic!("no mount on {point} in {mountinfo}"))
}

#[test]
fn every_setting_of_the_process_is_applied() {
    needs_ct!();
    let mut ct = Ct::new();
    fs::write(ct.rootfs().join("etc/passwd"), "u:x:1000:1000::/home/u:\n").unwrap();
    let script = "id; umask; pwd; echo env; env; echo endenv; ulimit -n; \
                  cat /proc/self/status /proc/self/oom_score_adj; hostname; \
                  ls /proc/self/fd | wc -l; ls -l /proc/self/fd";
    let mut setup = setup(&["sh", "-c", script]);
    let p = &mut setup.process;
    p.uid = 1000;
    p.gid = 1001;
    p.additional_gids = vec![5, 7];
    p.umask = Some(0o077);
    p.cwd = "/made/for/me".to_owned();
    p.rlimits = vec![Rlimit { resource: libc::RLIMIT_NOFILE, soft: 99, hard: 100 }];
    p.oom_score_adj = Some(500);
    p.capabilities = Capabilities {
        bounding: 0x4c1,
        effective: 0x401,
        permitted: 0x441,
        inheritable: 0x400,
        ambient: 0x400,
    };
    let text = ct.run(&setup, &[]);
    assert!(
        text.contains("uid=1000 gid=1001 groups=5,7")
            || text.contains("uid=1000(u) gid=1001 groups=5,7"),
        "{text}"
    );
    assert!(text.contains("\n0077\n/made/for/me\n"), "{text}");
    let env = text.split("env\n").nth(1).unwrap();
    let mut env: Vec<&str> = env.lines().filter(|l| *l != "end").collect();
    env.sort_unstable();
    // PWD, OLDPWD and SHLVL are the shell's own.
    env.retain(|e| !e.starts_with("PWD=") && !e.starts_with("SHLVL=") && !e.starts_with("OLDPWD="));
    assert_eq!(env, ["A=b", "HOME=/home/u", "PATH=/bin:/usr/bin"]);
    assert!(text.contains("\n99\n"), "{text}");
    // The shell's children: execve of a program without file capabilities keeps ambient ones.
    assert_eq!(field(&text, "CapBnd:"), "00000000000004c1");
    assert_eq!(field(&text, "CapInh:"), "0000000000000400");
    assert_eq!(field(&text, "CapPrm:"), "0000000000000400");
    assert_eq!(field(&text, "CapAmb:"), "0000000000000400");
    assert_eq!(field(&text, "NoNewPrivs:"), "1");
    assert_eq!(field(&text, "SigIgn:"), "0000000000000000");
    assert_eq!(field(&text, "SigBlk:"), "0000000000000000");
    assert!(text.contains("\n500\n"), "{text}");
    assert!(text.contains("\nbox\n"), "{text}");
    // 0, 1, 2 and the directory that ls reads.
    assert!(text.contains("\n4\n"), "{text}");
    assert!(!text.contains("socket:"), "{text}");
}

#[test]
fn nothing_of_the_helper_remains() {
    needs_ct!();
    let mut ct = Ct::new();
    let script = "cat /proc/self/mountinfo; ls -a /dev; cat /proc/1/comm; ls /proc";
    let text = ct.run(&setup(&["sh", "-c", script]), &[]);
    assert!(!text.contains("proxmox"), "{text}");
    assert!(!text.contains("shared:") && !text.contains("master:"), "{text}");
    let points: Vec<&str> = text
        .lines()
        .filter_map(|l| l.split(' ').nth(4).filter(|p| p.starts_with('/')))
        .filter(|p| !p.starts_with("/proc/"))
        .collect();
    let wanted = ["/", "/proc", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue", "/sys"];
    assert_eq!(points, wanted);
    // The image's file system has the mount point and nothing in it.
    assert_eq!(fs::read_dir(ct.rootfs().join("dev")).unwrap().count(), 0);
    assert!(ct.record().contains("\"status\":0,"));
}

#[test]
fn default_mounts_devices_and_links_are_as_runc_makes_them() {
    needs_ct!();
    let mut ct = Ct::new();
    let script = "cat /proc/self/mountinfo; ls -l /dev; echo x > /dev/null; ls -ld /dev/shm /tmp; \
                  cat /proc/keys | wc -c; ls /proc/acpi | wc -l; \
                  echo 1 > /proc/sys/kernel/domainname; ip addr show lo";
    let text = ct.run(&setup(&["sh", "-c", script]), &[]);
    let options = |point| mount_line(&text, point).split(' ').nth(5).unwrap().to_owned();
    assert_eq!(options("/proc"), "rw,nosuid,nodev,noexec,relatime");
    assert_eq!(options("/dev"), "rw,nosuid");
    assert_eq!(options("/sys"), "ro,nosuid,nodev,noexec,relatime");
    assert!(mount_line(&text, "/dev").contains("size=65536k,mode=755"));
    assert!(mount_line(&text, "/dev/pts").contains("gid=5,mode=620,ptmxmode=666"));
    assert_eq!(options("/proc/sys"), "ro,nosuid,nodev,noexec,relatime");
    assert!(mount_line(&text, "/proc/keys").contains(" /null /proc/keys "));
    assert!(text.contains("\n0\n0\n"), "{text}");
    assert!(text.contains("crw-rw-rw-    1 0        0           1,   3"), "{text}");
    assert!(text.contains("ptmx -> pts/ptmx"), "{text}");
    assert!(text.contains("domainname: Read-only file system"), "{text}");
    assert!(text.contains("LOOPBACK,UP"), "{text}");
}

#[test]
fn mounts_of_every_kind_arrive_where_they_belong() {
    needs_ct!();
    let mut ct = Ct::new();
    let source = ct.dir.join("volume");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("f"), "content").unwrap();
    fs::create_dir_all(ct.rootfs().join("data/sub")).unwrap();
    fs::write(ct.rootfs().join("data/sub/file"), "up").unwrap();
    fs::set_permissions(ct.rootfs().join("data/sub"), fs::Permissions::from_mode(0o711)).unwrap();
    symlink("sub/file", ct.rootfs().join("data/link")).unwrap();
    // Targets through links, absolute, relative and dangling.
    symlink("/run", ct.rootfs().join("var")).unwrap();
    symlink("../../../../etc", ct.rootfs().join("conf")).unwrap();

    let script = "cat /proc/self/mountinfo; cat /run/lib/x/f /etc/one; stat -c '%a %n' /tmp /fresh \
                  /data/sub; cat /data/link; touch /rotmp/x /vol/x; touch /data/new; ls /rotmp";
    let mut setup = setup(&["sh", "-c", script]);
    let mut copy_up = filesystem("/data", "tmpfs", 0, "size=1m");
    copy_up.copy_up = true;
    let mut shared = bind("/vol", true);
    shared.propagation = vec![libc::MS_SHARED];
    setup.mounts.extend([
        bind("/var/lib/x", true),
        bind("/conf/one", false),
        shared,
        filesystem("/tmp", "tmpfs", 0, ""),
        filesystem("/fresh", "tmpfs", 0, "mode=700"),
        filesystem("/rotmp", "tmpfs", libc::MS_RDONLY, ""),
        bind("/rotmp/inside", true),
        copy_up,
    ]);
    let fds = [
        detached(&source, 0),
        detached(source.join("f"), 0),
        detached(&source, attr::RDONLY | attr::NOSUID),
        detached(&source, 0),
    ];
    let text = ct.run(&setup, &fds);
    assert!(text.contains("contentcontent"), "{text}");
    assert!(text.contains("1777 /tmp\n700 /fresh\n711 /data/sub\nup"), "{text}");
    assert!(text.contains("/rotmp/x: Read-only file system"), "{text}");
    assert!(text.contains("/vol/x: Read-only file system"), "{text}");
    assert!(text.contains("\ninside\n"), "{text}");
    assert!(mount_line(&text, "/vol").contains("ro,nosuid"), "{text}");
    assert!(mount_line(&text, "/vol").contains("shared:"), "{text}");
    assert!(!mount_line(&text, "/run/lib/x").contains("shared:"), "{text}");
    assert!(!ct.rootfs().join("data/new").exists());
    assert!(ct.rootfs().join("run/lib/x").is_dir());
}

#[test]
fn many_detached_mounts_come_in_batches() {
    needs_ct!();
    let mut ct = Ct::new();
    let count = 2 * DESCRIPTORS_PER_MESSAGE + 3;
    let mut setup = setup(&["sh", "-c", "cat /m/*/n"]);
    let mut fds = Vec::new();
    for n in 0..count {
        let dir = ct.dir.join(format!("s{n}"));
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("n"), format!("{n}\n")).unwrap();
        fds.push(detached(&dir, 0));
        setup.mounts.push(bind(&format!("/m/{n:03}"), true));
    }
    let text = ct.run(&setup, &fds);
    let wanted: String = (0..count).map(|n| format!("{n}\n")).collect();
    assert_eq!(text, wanted);
}

#[test]
fn cgroups_are_mounted_as_the_cts_own() {
    needs_ct!();
    let mut ct = Ct::new();
    let mut hierarchies = Vec::new();
    for line in fs::read_to_string("/proc/self/cgroup").unwrap().lines() {
        let controllers = line.split(':').nth(1).unwrap();
        let (name, options, unified) = match controllers {
            "" => ("unified", "", true),
            named if named.starts_with("name=") => (&named[5..], named, false),
            other => (other, other, false),
        };
        hierarchies.push(CgroupHierarchy {
            name: name.to_owned(),
            options: if options.starts_with("name=") {
                format!("none,{options}")
            } else {
                options.to_owned()
            },
            unified,
        });
    }
    if hierarchies.iter().all(|h| h.unified) {
        hierarchies.clear();
    }
    let names: Vec<String> = hierarchies.iter().map(|h| h.name.clone()).collect();
    let mut setup = setup(&["sh", "-c", "cat /proc/self/mountinfo; touch /sys/fs/cgroup/x"]);
    setup.mounts.push(Mount {
        destination: "/sys/fs/cgroup".to_owned(),
        source: MountSource::Cgroup {
            flags: libc::MS_NOSUID | libc::MS_NOEXEC | libc::MS_NODEV | libc::MS_RDONLY,
            hierarchies,
        },
        copy_up: false,
        propagation: vec![],
    });
    let text = ct.run(&setup, &[]);
    let wanted = "ro,nosuid,nodev,noexec,relatime";
    assert!(mount_line(&text, "/sys/fs/cgroup").contains(wanted), "{text}");
    for name in names {
        let line = mount_line(&text, &format!("/sys/fs/cgroup/{name}"));
        assert!(line.contains(wanted), "{line}");
        assert_eq!(line.split(' ').nth(3), Some("/"), "the CT's cgroup is the root: {line}");
    }
    assert!(text.contains("/sys/fs/cgroup/x: Read-only file system"), "{text}");
}

#[test]
fn hostile_images_are_refused() {
    needs_ct!();
    // (what the image contains, what is asked for, the message)
    type Case = (fn(&Ct), fn(&mut ContainerSetup), &'static str);
    let cases: [Case; 8] = [
        (
            |ct| {
                fs::remove_dir(ct.rootfs().join("sys")).unwrap();
                symlink("/tmp", ct.rootfs().join("sys")).unwrap();
            },
            |_| {},
            "error mounting \"sysfs\" to rootfs at \"/sys\": \"/sys\" must be mounted on ordinary \
             directory",
        ),
        (
            |ct| symlink("/proc/sys", ct.rootfs().join("evil")).unwrap(),
            |s| s.mounts.push(filesystem("/evil", "tmpfs", 0, "")),
            "error mounting \"tmpfs\" to rootfs at \"/evil\": \"/evil\" cannot be mounted because \
             it is inside /proc",
        ),
        (
            |_| {},
            |s| s.mounts.push(filesystem("/proc/self/attr", "tmpfs", 0, "")),
            "error mounting \"tmpfs\" to rootfs at \"/proc/self/attr\": \"/proc/self/attr\" cannot \
             be mounted because it is inside /proc",
        ),
        (
            |_| {},
            |s| s.mounts.push(filesystem("/x/..", "tmpfs", 0, "")),
            "error mounting \"tmpfs\" to rootfs at \"/x/..\": \"/\" is the container's root",
        ),
        (
            |ct| symlink("/", ct.rootfs().join("top")).unwrap(),
            |s| s.mounts.push(filesystem("/top", "tmpfs", 0, "")),
            "error mounting \"tmpfs\" to rootfs at \"/top\": \"/top\" is the container's root",
        ),
        (
            |ct| symlink("b", ct.rootfs().join("b")).unwrap(),
            |s| s.mounts.push(filesystem("/b/c", "tmpfs", 0, "")),
            "error mounting \"tmpfs\" to rootfs at \"/b/c\": open the mount's target: too many \
             levels of symbolic links",
        ),
        (
            // Without a tmpfs on /dev the image's /dev/null would be what masked files show.
            |ct| {
                fs::create_dir(ct.rootfs().join("dev")).unwrap();
                fs::write(ct.rootfs().join("dev/null"), "secret").unwrap();
            },
            |s| {
                s.mounts.retain(|m| !m.destination.starts_with("/dev"));
                s.devices.clear();
            },
            "\"/dev/null\" is not the null device",
        ),
        (
            |_| {},
            |s| s.mounts.push(filesystem("/t", "tmpfs", 0, "nonsense=1")),
            "error mounting \"tmpfs\" to rootfs at \"/t\": mount tmpfs with options \
             \"mode=",
        ),
    ];
    for (prepare, change, message) in cases {
        let mut ct = Ct::new();
        fs::create_dir(ct.rootfs().join("t")).unwrap();
        prepare(&ct);
        let mut setup = setup(&["true"]);
        change(&mut setup);
        let got = ct.refusal(&setup, &[]);
        assert!(got.starts_with(message), "{got}");
        ct.wait();
        assert!(ct.record().contains("\"status\":127,"), "{}", ct.record());
    }
}

#[test]
fn an_image_without_any_directory_works() {
    needs_ct!();
    let mut ct = Ct::new();
    for name in ["proc", "sys", "tmp", "etc", "root"] {
        fs::remove_dir(ct.rootfs().join(name)).unwrap();
    }
    let text = ct.run(
        &setup(&["sh", "-c", "ls -ld /proc /sys /dev | cut -c1-10; cat /proc/1/comm; true"]),
        &[],
    );
    assert_eq!(text, "drwxr-xr-x\ndr-xr-xr-x\ndr-xr-xr-x\nsh\n");
    for name in ["dev", "sys", "proc"] {
        let mode = fs::metadata(ct.rootfs().join(name)).unwrap().mode();
        assert_eq!(mode & 0o7777, 0o755, "{name}");
    }
}

#[test]
fn root_read_only_and_propagation_come_last() {
    needs_ct!();
    let mut ct = Ct::new();
    let mut setup = setup(&["sh", "-c", "cat /proc/self/mountinfo; touch /x; touch /dev/shm/y"]);
    setup.root_readonly = true;
    setup.root_propagation = Some(libc::MS_SHARED);
    setup.process.cwd = "/new/cwd".to_owned();
    let text = ct.run(&setup, &[]);
    assert!(text.contains("touch: /x: Read-only file system"), "{text}");
    assert!(!text.contains("/dev/shm/y"), "{text}");
    assert!(mount_line(&text, "/").contains("ro,relatime shared:"), "{text}");
    assert!(ct.rootfs().join("new/cwd").is_dir());
}

#[test]
fn sysctls_are_written_in_the_cts_namespaces() {
    needs_ct!();
    let mut ct = Ct::new();
    let mut with =
        setup(&["sh", "-c", "cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shmmni"]);
    with.sysctls = vec![
        ("net.ipv4.ip_forward".to_owned(), "1".to_owned()),
        ("kernel/shmmni".to_owned(), "77".to_owned()),
    ];
    assert_eq!(ct.run(&with, &[]), "1\n77\n");
    let mut wrong = setup(&["true"]);
    wrong.sysctls = vec![("kernel.nothing".to_owned(), "1".to_owned())];
    let message = Ct::new().refusal(&wrong, &[]);
    assert!(message.starts_with("set sysctl \"kernel.nothing\""), "{message}");
}

#[test]
fn a_terminal_is_the_cts_own() {
    needs_ct!();
    let mut ct = Ct::new();
    let script = "tty; stty size; stat -c '%u %g %t' $(tty); mount | grep -c /dev/console; \
                  echo to console > /dev/console; read -r line < /dev/tty; echo got $line";
    let mut setup = setup(&["sh", "-c", script]);
    setup.process.uid = 33;
    setup.process.terminal = Some(WindowSize { rows: 31, columns: 97 });
    let (reply, mut fds) = ct.set_up(&setup, &[], &[]);
    assert!(matches!(reply, Reply::Ready { terminal: true }), "{reply:?}");
    let mut master = File::from(fds.pop().unwrap());
    ct.go().unwrap();
    let mut text = Vec::new();
    let mut answered = false;
    let mut buffer = [0; 512];
    // The end of a terminal is EIO.
    while let Ok(n @ 1..) = master.read(&mut buffer) {
        text.extend_from_slice(&buffer[..n]);
        // Not before: the echo would appear in the middle of the output.
        if !answered && String::from_utf8_lossy(&text).contains("to console") {
            master.write_all(b"hello\n").unwrap();
            answered = true;
        }
    }
    let text = String::from_utf8_lossy(&text).replace('\r', "");
    assert!(text.contains("/dev/pts/0\n"), "{text}");
    assert!(text.contains("31 97\n33 5 88\n1\nto console\n"), "{text}");
    assert!(text.contains("got hello"), "{text}");
    ct.wait();
}

#[test]
fn a_linked_console_is_refused() {
    needs_ct!();
    let mut ct = Ct::new();
    let mut setup = setup(&["true"]);
    setup.links.push(("/proc/sys/kernel/core_pattern".to_owned(), "/dev/console".to_owned()));
    setup.process.terminal = Some(WindowSize::default());
    let (reply, _) = ct.set_up(&setup, &[], &[]);
    let Reply::Failed { message } = reply else { panic!("{reply:?}") };
    assert_eq!(message, "\"/dev/console\" is a symbolic link");
    ct.wait();
}

#[test]
fn stdio_pipes_belong_to_the_user() {
    needs_ct!();
    let mut ct = Ct::new();
    let mut setup = setup(&["sh", "-c", "echo a > /dev/stdout; echo b > /proc/self/fd/2"]);
    setup.process.uid = 1234;
    setup.process.capabilities = Capabilities::default();
    assert_eq!(ct.run(&setup, &[]), "a\nb\n");
}

const RET_EPERM: u32 = 0x0005_0000 | libc::EPERM as u32;

/// Bytes of `struct sock_filter`: `action` for the given system calls, everything else allowed.
fn filter(denied: &[libc::c_long], action: u32) -> Vec<u8> {
    let mut program = vec![(0x20u16, 0u8, 0u8, 0u32)]; // A = seccomp_data.nr
    for (n, call) in denied.iter().enumerate() {
        program.push((0x15, (denied.len() - n) as u8, 0, *call as u32));
    }
    program.push((0x06, 0, 0, 0x7fff_0000));
    program.push((0x06, 0, 0, action));
    program
        .into_iter()
        .flat_map(|(code, jt, jf, k)| {
            let mut bytes = code.to_ne_bytes().to_vec();
            bytes.extend([jt, jf]);
            bytes.extend(k.to_ne_bytes());
            bytes
        })
        .collect()
}

#[test]
fn a_seccomp_filter_hits_the_workload_and_not_init() {
    needs_ct!();
    // What init itself still needs after the user has changed, or just before.
    let denied = [
        libc::SYS_mkdir,
        libc::SYS_setresuid,
        libc::SYS_setgroups,
        libc::SYS_chdir,
        libc::SYS_prctl,
        libc::SYS_close_range,
        libc::SYS_rt_sigaction,
    ];
    for no_new_privileges in [false, true] {
        for uid in [0, 1000] {
            let mut ct = Ct::new();
            let script = "grep -E 'Seccomp:|NoNewPrivs|CapEff' /proc/self/status; mkdir /tmp/d";
            let mut setup = setup(&["sh", "-c", script]);
            let p = &mut setup.process;
            p.uid = uid;
            p.no_new_privileges = no_new_privileges;
            p.capabilities =
                Capabilities { bounding: 1, effective: 1, permitted: 1, ..Capabilities::default() };
            p.seccomp = Some(Seccomp { flags: 0, program: filter(&denied, RET_EPERM) });
            let text = ct.run(&setup, &[]);
            assert_eq!(field(&text, "Seccomp:"), "2");
            assert_eq!(field(&text, "NoNewPrivs:"), if no_new_privileges { "1" } else { "0" });
            let caps = if uid == 0 { "0000000000000001" } else { "0000000000000000" };
            assert_eq!(field(&text, "CapEff:"), caps);
            assert!(text.contains("Operation not permitted"), "{text}");
        }
    }
}

#[test]
fn start_hooks_run_before_the_workload() {
    needs_ct!();
    let hook = |script: &str| Hook {
        path: "/bin/sh".to_owned(),
        args: strings(&["sh", "-c", script]),
        env: strings(&["PATH=/bin", "H=1"]),
        timeout: Some(10),
    };
    // With the restrictions of the workload: what a hook executes comes from the image.
    let script = "cat > /tmp/hook; echo $H; id -u; ls /proc/self/fd | wc -l; mkdir /tmp/d; \
                  grep -E 'CapEff|NoNew' /proc/self/status";
    for no_new_privileges in [false, true] {
        let mut ct = Ct::new();
        let mut good = setup(&["cat", "/tmp/hook", "/tmp/out"]);
        good.start_container.hooks = vec![hook(&format!("({script}) > /tmp/out 2>&1"))];
        good.process.uid = 77;
        good.process.no_new_privileges = no_new_privileges;
        good.process.seccomp =
            Some(Seccomp { flags: 0, program: filter(&[libc::SYS_mkdir], RET_EPERM) });
        let wanted = format!(
            "{{\"pid\":1,\"id\":\"x\"}}1\n77\n4\nmkdir: can't create directory '/tmp/d': Operation not \
             permitted\nCapEff:\t0000000000000000\nNoNewPrivs:\t{}\n",
            u32::from(no_new_privileges)
        );
        assert_eq!(ct.run(&good, &[]), wanted);
    }

    let mut ct = Ct::new();
    let mut bad = setup(&["touch", "/tmp/ran"]);
    bad.start_container.hooks = vec![hook("echo because; exit 4")];
    let (reply, _) = ct.set_up(&bad, &[], &[null(), null(), null()]);
    assert!(matches!(reply, Reply::Ready { .. }));
    assert_eq!(
        ct.go().unwrap_err(),
        "error running startContainer hook #0: exit status 4, output: because"
    );
    ct.wait();
    assert!(!ct.rootfs().join("tmp/ran").exists());
}

fn bad_executables(ct: &Ct) {
    for (name, content, mode) in [
        ("bad", "xx", 0o755),
        ("orphan", "#!/nope\n", 0o755),
        ("plain", "x", 0o644),
        ("root/hidden", "#!/bin/sh\n", 0o755),
    ] {
        let path = ct.rootfs().join(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }
    fs::set_permissions(ct.rootfs().join("root"), fs::Permissions::from_mode(0o700)).unwrap();
}

/// As runc 1.1 says it; for a directory as runc built with a newer Go.
const EXEC_ERRORS: [(&str, u32, &str, &str); 10] = [
    ("foo", 0, "/", "exec: \"foo\": executable file not found in $PATH"),
    ("", 0, "/", "exec: \"\": executable file not found in $PATH"),
    ("/foo", 0, "/", "exec: \"/foo\": stat /foo: no such file or directory"),
    ("./foo", 0, "/", "exec: \"./foo\": stat ./foo: no such file or directory"),
    ("/plain", 0, "/", "exec: \"/plain\": permission denied"),
    ("/bin", 0, "/", "exec: \"/bin\": is a directory"),
    ("/root/hidden", 1000, "/", "exec: \"/root/hidden\": stat /root/hidden: permission denied"),
    ("/bad", 0, "/", "exec /bad: exec format error"),
    ("/orphan", 0, "/", "exec /orphan: no such file or directory"),
    ("sh", 0, "/plain", "chdir to cwd (\"/plain\") set in config.json failed: not a directory"),
];

#[test]
fn pid_1_says_why_it_cannot_execute() {
    needs_ct!();
    for (file, uid, cwd, message) in EXEC_ERRORS {
        let mut ct = Ct::new();
        bad_executables(&ct);
        let mut setup = setup(&[file]);
        setup.process.uid = uid;
        setup.process.cwd = cwd.to_owned();
        setup.process.capabilities = Capabilities::default();
        let (reply, _) = ct.set_up(&setup, &[], &[null(), null(), null()]);
        if let Reply::Failed { message } = reply {
            // The working directory is created, which fails here already; runc's words.
            assert_eq!((cwd, message.as_str()), ("/plain", "mkdir /plain: not a directory"));
            continue;
        }
        assert_eq!(ct.go().unwrap_err(), message);
        ct.wait();
        assert!(ct.record().contains("\"status\":127,"), "{}", ct.record());
    }
}

#[test]
fn exec_says_why_it_cannot_execute() {
    needs_ct!();
    let mut ct = Ct::new();
    bad_executables(&ct);
    ct.start(&setup(&["sleep", "1000"]));
    for (file, uid, cwd, message) in EXEC_ERRORS {
        let mut process = process(&[file]);
        process.uid = uid;
        process.cwd = cwd.to_owned();
        process.capabilities = Capabilities::default();
        let error = ct.exec(&process, &[null(), null(), null()]).err();
        assert_eq!(error.as_deref(), Some(message));
    }
}

#[test]
fn exec_enters_every_namespace_and_cgroup_of_the_ct() {
    needs_ct!();
    let mut ct = Ct::new();
    ct.start(&setup(&["sleep", "1000"]));
    let script = "cmp /proc/1/cgroup /proc/self/cgroup && echo same; ls -l /proc/self/fd; \
                  grep -E 'Cap|NoNew|SigIgn' /proc/self/status; hostname; id -u; pwd";
    let namespaces = "for n in mnt pid net ipc uts cgroup; do [ \"$(readlink /proc/1/ns/$n)\" = \
                      \"$(readlink /proc/self/ns/$n)\" ] || echo differs $n; done";
    assert_eq!(ct.exec_script(namespaces), (String::new(), 0));
    let mut wanted = process(&["sh", "-c", script]);
    wanted.uid = 12;
    wanted.cwd = "/tmp".to_owned();
    let (text, status) = ct.exec_output(&wanted);
    assert_eq!(status, 0, "{text}");
    assert!(text.contains("same\n"), "{text}");
    assert_eq!(field(&text, "CapBnd:"), format!("{DEFAULT_CAPS:016x}"));
    assert_eq!(field(&text, "CapEff:"), "0000000000000000");
    assert_eq!(field(&text, "SigIgn:"), "0000000000000000");
    assert!(text.ends_with("box\n12\n/tmp\n"), "{text}");
    assert!(!text.contains("socket:") && !text.contains("pidfd"), "{text}");
    assert_eq!(text.lines().filter(|l| l.contains(" -> ")).count(), 3, "{text}");
}

#[test]
fn exec_reports_exact_statuses_and_dies_with_pid_1() {
    needs_ct!();
    let mut ct = Ct::new();
    ct.start(&setup(&["sleep", "1000"]));
    for code in [0, 1, 42, 127, 255] {
        assert_eq!(ct.exec_script(&format!("exit {code}")).1, code << 8);
    }
    for signal in [1, 2, 9, 15, 34, 64] {
        assert_eq!(ct.exec_script(&format!("kill -{signal} $$")).1 & 0x7f, signal);
    }
    let exec = ct.exec(&process(&["sleep", "1000"]), &[null(), null(), null()]).unwrap();
    assert!(fs::metadata(format!("/proc/{}", exec.pid)).is_ok());
    ct.kill(libc::SIGKILL);
    assert_eq!(exec.wait(), libc::SIGKILL);
    let [dead] = sys::poll_readable([exec.pidfd.as_fd()], 0).unwrap();
    assert!(dead);
    ct.wait();
    let error = ct_gone(&ct);
    assert!(error.contains("no such process") || error.contains("namespaces"), "{error}");
}

/// The pid is free now; its pidfd cannot be opened any more.
fn ct_gone(ct: &Ct) -> String {
    match sys::pidfd_open(ct.pid as u32) {
        Ok(_) => "namespaces".to_owned(),
        Err(e) => e.to_string().to_lowercase(),
    }
}

#[test]
fn exec_with_a_descriptor_as_working_directory_is_refused() {
    needs_ct!();
    let mut ct = Ct::new();
    ct.start(&setup(&["sleep", "1000"]));
    for number in 0..64 {
        let mut process = process(&["true"]);
        process.cwd = format!("/proc/self/fd/{number}");
        let error = ct
            .exec(&process, &[null(), null(), null()])
            .err()
            .unwrap_or_else(|| panic!("descriptor {number} was entered"));
        assert!(error.starts_with("chdir to cwd"), "{error}");
    }
}

#[test]
fn exec_with_a_terminal() {
    needs_ct!();
    let mut ct = Ct::new();
    ct.start(&setup(&["sleep", "1000"]));
    let mut wanted = process(&["sh", "-c", "tty; stty size; exit 9"]);
    wanted.terminal = Some(WindowSize { rows: 10, columns: 20 });
    let exec = ct.exec(&wanted, &[]).unwrap();
    let mut master = File::from(exec.terminal.as_ref().unwrap().try_clone().unwrap());
    let mut text = Vec::new();
    let mut buffer = [0; 512];
    while let Ok(n @ 1..) = master.read(&mut buffer) {
        text.extend_from_slice(&buffer[..n]);
    }
    assert_eq!(String::from_utf8_lossy(&text), "/dev/pts/0\r\n10 20\r\n");
    assert_eq!(exec.wait(), 9 << 8);
}

#[test]
fn exec_applies_the_seccomp_filter() {
    needs_ct!();
    let mut ct = Ct::new();
    ct.start(&setup(&["sleep", "1000"]));
    let mut wanted = process(&["sh", "-c", "mkdir /tmp/d; grep Seccomp: /proc/self/status"]);
    wanted.seccomp = Some(Seccomp { flags: 0, program: filter(&[libc::SYS_mkdir], RET_EPERM) });
    let (text, _) = ct.exec_output(&wanted);
    assert!(text.contains("Operation not permitted"), "{text}");
    assert_eq!(field(&text, "Seccomp:"), "2");
}

#[test]
fn the_stop_hook_records_the_exact_status() {
    needs_ct!();
    for (script, status) in [("exit 0", 0), ("exit 7", 7), ("exit 130", 130), ("exit 255", 255)] {
        let mut ct = Ct::new();
        ct.run(&setup(&["sh", "-c", script]), &[]);
        assert_record(&ct, status, &["pidfd", "log"]);
    }
    let mut ct = Ct::new();
    ct.start(&setup(&["sleep", "1000"]));
    ct.kill(libc::SIGKILL);
    ct.wait();
    assert_record(&ct, 137, &["pidfd", "log"]);
    // A fault is the only other signal that kills a PID 1 without handlers.
    let mut ct = Ct::new();
    let mut fault = setup(&["mkdir", "/tmp/d"]);
    fault.process.seccomp =
        Some(Seccomp { flags: 0, program: filter(&[libc::SYS_mkdir], 0x8000_0000) });
    ct.run(&fault, &[]);
    assert_record(&ct, 128 + libc::SIGSYS as u32, &["pidfd", "log"]);
}

fn assert_record(ct: &Ct, status: u32, sources: &[&str]) {
    let record = ct.record();
    let source = sources
        .iter()
        .find(|s| record.ends_with(&format!(",\"oom_kills\":0,\"source\":\"{s}\"}}\n")));
    assert!(source.is_some(), "{record}");
    assert!(
        record.starts_with(&format!("{{\"version\":1,\"status\":{status},\"time\":")),
        "{record}"
    );
    assert_eq!(fs::metadata(ct.dir.join("exit.json")).unwrap().mode() & 0o777, 0o600);
    assert!(!ct.dir.join("exit.json.tmp").exists());
}

#[test]
fn an_oom_kill_is_counted() {
    needs_ct!();
    let mut ct = Ct::new();
    let stdio = [null(), null(), null()];
    let (reply, _) = ct.set_up(&setup(&["tail", "/dev/zero"]), &[], &stdio);
    assert!(matches!(reply, Reply::Ready { .. }), "{reply:?}");
    let cgroups = fs::read_to_string(format!("/proc/{}/cgroup", ct.pid)).unwrap();
    let path = |controller: &str| {
        let line = cgroups.lines().find(|l| l.split(':').nth(1) == Some(controller))?;
        line.splitn(3, ':').nth(2)
    };
    let (directory, limit) = match path("memory") {
        Some(path) => (format!("/sys/fs/cgroup/memory{path}"), "memory.limit_in_bytes"),
        None => (format!("/sys/fs/cgroup{}", path("").unwrap()), "memory.max"),
    };
    fs::write(format!("{directory}/{limit}"), "8388608").unwrap();
    fs::write(ct.dir.join("cgroup"), &directory).unwrap();
    ct.go().unwrap();
    ct.wait();
    let record = ct.record();
    assert!(record.contains("\"status\":137,"), "{record}");
    assert!(record.contains("\"oom_kills\":1,"), "{record}");
}

/// A workload that may reboot its pid namespace and does so.
fn rebooting(command: &str) -> ContainerSetup {
    let mut setup = setup(&["sh", "-c", &format!("{command}; sleep 10")]);
    let boot = DEFAULT_CAPS | 1 << 22;
    setup.process.capabilities = Capabilities {
        bounding: boot,
        effective: boot,
        permitted: boot,
        ..Capabilities::default()
    };
    setup
}

#[test]
fn reboot_and_halt_are_exits() {
    needs_ct!();
    for (command, status, source) in
        [("reboot -f", 129, "reboot"), ("halt -f", 130, "log"), ("poweroff -f", 130, "log")]
    {
        let mut ct = Ct::new();
        ct.run(&rebooting(command), &[]);
        assert_record(&ct, status, &[source]);
    }
}

#[test]
fn the_watcher_hears_the_exact_status() {
    needs_ct!();
    for (script, status) in [("exit 0", 0), ("exit 7", 7), ("exit 137", 137), ("exit 255", 255)] {
        let mut ct = Ct::without_log();
        let _monitor = Monitor::start(&ct);
        ct.run(&setup(&["sh", "-c", script]), &[]);
        assert_eq!(ct.watcher(), None);
        ct.record_without_pidfd();
        assert_record(&ct, status, &["monitor"]);
    }
    let mut ct = Ct::without_log();
    let _monitor = Monitor::start(&ct);
    ct.start(&setup(&["sleep", "1000"]));
    ct.kill(libc::SIGKILL);
    ct.wait();
    ct.record_without_pidfd();
    assert_record(&ct, 137, &["monitor"]);
}

#[test]
fn the_watcher_knows_a_halt_that_the_pidfd_does_not() {
    needs_ct!();
    for (command, status, source) in [("reboot -f", 129, "reboot"), ("poweroff -f", 130, "monitor")]
    {
        let mut ct = Ct::without_log();
        let _monitor = Monitor::start(&ct);
        ct.run(&rebooting(command), &[]);
        assert_record(&ct, status, &[source]);
    }
}

#[test]
fn a_watcher_that_comes_too_late_for_the_zombie_has_the_status() {
    needs_ct!();
    let mut ct = Ct::without_log();
    let _monitor = Monitor::start(&ct);
    ct.start(&setup(&["sh", "-c", "trap 'exit 42' TERM; while :; do sleep 0.01; done"]));
    eventually("the script is past its trap", || ct.catches(libc::SIGTERM));
    let watcher = ct.watcher().expect("no watcher") as i32;
    // SAFETY: numbers only; the watcher does not end before PID 1 does.
    unsafe { libc::kill(watcher, libc::SIGSTOP) };
    ct.kill(libc::SIGTERM);
    let process = format!("/proc/{}", ct.pid);
    eventually("PID 1 is reaped", || !std::path::Path::new(&process).exists());
    // SAFETY: as above; it is stopped.
    unsafe { libc::kill(watcher, libc::SIGCONT) };
    ct.wait();
    ct.record_without_pidfd();
    assert_record(&ct, 42, &["monitor"]);
}

#[test]
fn a_slow_lxc_start_is_waited_for() {
    needs_ct!();
    let mut ct = Ct::without_log();
    let _monitor = Monitor::start(&ct);
    ct.start(&setup(&["sleep", "1000"]));
    ct.signal_lxc(libc::SIGSTOP);
    ct.kill(libc::SIGKILL);
    // Longer than the watcher waits for a status that is on its way.
    std::thread::sleep(std::time::Duration::from_secs(4));
    assert!(ct.watcher().is_some(), "the watcher has given up");
    ct.signal_lxc(libc::SIGCONT);
    ct.wait();
    ct.record_without_pidfd();
    assert_record(&ct, 137, &["monitor"]);
}

#[test]
fn the_watcher_outlives_lxc_monitord() {
    needs_ct!();
    let mut ct = Ct::without_log();
    let monitor = Monitor::start(&ct);
    ct.start(&setup(&["sleep", "1000"]));
    drop(monitor);
    let monitor = Monitor::start(&ct);
    eventually("the watcher is connected again", || monitor.sockets() == 2);
    ct.kill(libc::SIGKILL);
    ct.wait();
    ct.record_without_pidfd();
    assert_record(&ct, 137, &["monitor"]);
}

#[test]
fn what_nobody_tells_is_unknown() {
    needs_ct!();
    let mut ct = Ct::without_log();
    ct.run(&setup(&["sh", "-c", "exit 7"]), &[]);
    assert_eq!(ct.watcher(), None);
    ct.record_without_pidfd();
    assert_record(&ct, 255, &["unknown"]);
}

#[test]
fn a_log_needs_no_watcher() {
    needs_ct!();
    let mut ct = Ct::new();
    ct.start(&setup(&["sleep", "1000"]));
    assert_eq!(ct.watcher(), None);
    ct.kill(libc::SIGKILL);
    ct.wait();
    ct.record_without_pidfd();
    assert_record(&ct, 137, &["log"]);
    let mut ct = Ct::new();
    ct.run(&setup(&["true"]), &[]);
    ct.record_without_pidfd();
    assert_record(&ct, 0, &["log"]);
}

#[test]
fn without_a_pidfd_the_log_gives_the_status() {
    let dir = std::env::temp_dir().join(format!("init-hook-{}", std::process::id()));
    fs::create_dir_all(dir.join("cg")).unwrap();
    fs::write(dir.join("cgroup"), format!("{}\n", dir.join("cg").display())).unwrap();
    fs::write(dir.join("cg/memory.oom_control"), "under_oom 0\noom_kill 3\n").unwrap();
    let run = |target: &str| {
        let status = Command::new(BINARY)
            .args(["hook", "stop"])
            .arg(&dir)
            .env("LXC_TARGET", target)
            .status()
            .unwrap();
        assert!(status.success());
        fs::read_to_string(dir.join("exit.json"))
    };
    // Nobody knows: a record of that, and not a guess.
    let record = run("stop").unwrap();
    assert!(record.contains("\"status\":255,"), "{record}");
    assert!(record.ends_with("\"source\":\"unknown\"}\n"), "{record}");
    let line = "lxc-start x 1 INFO error - ../src/lxc/error.c:lxc_error_set_and_log:31 - Child \
                <9> ended on signal Segmentation fault(11)\n";
    fs::write(dir.join("lxc.log"), line).unwrap();
    let record = run("stop").unwrap();
    assert!(record.contains("\"status\":139,"), "{record}");
    assert!(record.ends_with("\"oom_kills\":3,\"source\":\"log\"}\n"), "{record}");
    assert!(run("reboot").unwrap().contains("\"status\":129,"));
    fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn post_stop_fails_only_for_a_reboot() {
    let run = |target: &str| {
        Command::new(BINARY)
            .args(["hook", "post-stop"])
            .env("LXC_TARGET", target)
            .status()
            .unwrap()
            .code()
    };
    assert_eq!(run("reboot"), Some(1));
    assert_eq!(run("stop"), Some(0));
}

#[test]
fn a_start_without_containerd_is_refused_with_an_explanation() {
    needs_ct!();
    let mut ct = Ct::new();
    fs::remove_file(ct.dir.join("ctl").join(SOCKET_NAME)).unwrap();
    ct.spawn();
    ct.wait();
    assert!(
        ct.output().contains(
            "this CT was not started by containerd; start the container with containerd instead"
        ),
        "{}",
        ct.output()
    );
    assert_record(&ct, 1, &["pidfd", "log"]);
}

#[test]
fn a_shim_that_goes_away_ends_the_ct() {
    needs_ct!();
    let mut ct = Ct::new();
    let (reply, _) = ct.set_up(&setup(&["touch", "/tmp/ran"]), &[], &[null(), null(), null()]);
    assert!(matches!(reply, Reply::Ready { .. }), "{reply:?}");
    ct.disconnect();
    ct.wait();
    assert!(!ct.rootfs().join("tmp/ran").exists());
    assert_record(&ct, 1, &["pidfd", "log"]);

    let mut ct = Ct::new();
    ct.connect();
    ct.disconnect();
    ct.wait();
    assert_record(&ct, 1, &["pidfd", "log"]);
}

#[test]
fn another_protocol_version_is_refused() {
    needs_ct!();
    let mut ct = Ct::new();
    let mut setup = setup(&["true"]);
    setup.version = VERSION + 1;
    let message = ct.refusal(&setup, &[]);
    assert!(message.contains("install both from the same release"), "{message}");
}

#[test]
fn help_and_version_are_answered() {
    let run = |arg: &str| Command::new(BINARY).arg(arg).output().unwrap();
    let help = String::from_utf8(run("--help").stdout).unwrap();
    for word in ["init", "exec", "hook stop", "hook post-stop", "exit.json", "EXIT STATUS"] {
        assert!(help.contains(word), "{word}");
    }
    let version = String::from_utf8(run("--version").stdout).unwrap();
    assert!(version.contains(env!("CARGO_PKG_VERSION")), "{version}");
    assert_eq!(run("nonsense").status.code(), Some(2));
}
