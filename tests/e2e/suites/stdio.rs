//! Standard streams in every form containerd knows.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::time::{Duration, Instant};

use crate::harness::process::{self, Running, eventually};
use crate::harness::sys;
use crate::harness::test::Test;
use crate::suites::cases;

cases!("stdio":
    streams_are_kept_apart,
    stdin_reaches_the_workload_and_ends,
    an_eight_mebibyte_burst_arrives_whole,
    a_burst_from_an_exec_arrives_whole,
    the_last_line_is_there_when_the_task_has_ended,
    null_io_runs,
    file_uri_appends_both_streams,
    file_uri_makes_its_parents,
    binary_uri_feeds_a_logger,
    binary_uri_that_cannot_run_is_an_error,
    a_logger_that_waits_for_the_exit_does_not_hold_it,
    detached_output_is_read_later_by_attach,
    a_client_that_goes_away_does_not_end_stdin,
    a_reader_that_comes_late_gets_everything,
    a_grandchild_that_keeps_stdout_does_not_hold_the_exit,
    without_a_pid_namespace_a_grandchild_does_not_hold_the_exit,
);

/// The sequence that `probe burst` prints.
fn burst(bytes: usize) -> Vec<u8> {
    let mut state: u32 = 2_463_534_242;
    let mut all = Vec::with_capacity(bytes);
    while all.len() < bytes {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        all.extend_from_slice(&state.to_ne_bytes());
    }
    all
}

#[track_caller]
fn assert_burst(got: &[u8], bytes: usize) {
    assert_eq!(got.len(), bytes, "length");
    let wanted = burst(bytes);
    let at = got.iter().zip(&wanted).position(|(a, b)| a != b);
    assert_eq!(at, None, "first differing byte");
}

/// What a log file holds once the exit is known. Our shim has written all of it by then; others
/// may still be copying.
fn read_log(t: &Test, path: &str) -> String {
    if !t.node.has_pve() {
        std::thread::sleep(Duration::from_millis(500));
    }
    fs::read_to_string(path).unwrap_or_default()
}

fn streams_are_kept_apart(t: &Test) {
    let out = t.sh(&[], &t.id("a"), "echo one; echo two >&2; echo three").ok();
    assert_eq!(out.text(), "one\nthree");
    assert_eq!(out.stderr, "two\n");
}

fn stdin_reaches_the_workload_and_ends(t: &Test) {
    let input: Vec<u8> = (0..=255).cycle().take(300_000).collect();
    let mut command = t.run_command(&["--rm"], &t.id("a"), &["cat"]);
    let out = Running::spawn(&mut command, Some(&input)).wait().ok();
    assert!(out.stdout == input, "{} of {} bytes came back", out.stdout.len(), input.len());
}

fn an_eight_mebibyte_burst_arrives_whole(t: &Test) {
    let bytes = 8 << 20;
    let out = t.run(&[], &t.id("a"), &["probe", "burst", &bytes.to_string(), "4096"]).ok();
    assert_burst(&out.stdout, bytes);
}

fn a_burst_from_an_exec_arrives_whole(t: &Test) {
    let (id, bytes) = (t.id("a"), 8 << 20);
    t.start_idle(&[], &id);
    let out = t.exec(&[], &id, &["probe", "burst", &bytes.to_string(), "1048576"]).ok();
    assert_burst(&out.stdout, bytes);
}

fn the_last_line_is_there_when_the_task_has_ended(t: &Test) {
    for round in 0..10 {
        let id = t.id(&format!("r{round}"));
        let log = t.file(&format!("log{round}"));
        t.start(
            &["--log-uri", &format!("file://{log}")],
            &id,
            &["sh", "-c", "echo last words; exit 1"],
        );
        t.wait_exit(&id);
        assert_eq!(read_log(t, &log), "last words\n", "round {round}");
    }
}

fn null_io_runs(t: &Test) {
    let id = t.id("a");
    let out = t.run(&["--null-io"], &id, &["sh", "-c", "echo lost; cat; exit 6"]).expect(6);
    assert_eq!(out.text(), "");
}

fn file_uri_appends_both_streams(t: &Test) {
    let log = t.file("log");
    fs::write(&log, "before\n").expect("write the log");
    let id = t.id("a");
    t.start(&["--log-uri", &format!("file://{log}")], &id, &["sh", "-c", "echo out; echo err >&2"]);
    assert_eq!(t.wait_exit(&id).exit_status(), 0);
    let mut lines: Vec<_> = read_log(t, &log).lines().map(str::to_owned).collect();
    assert_eq!(lines.first().map(String::as_str), Some("before"));
    lines.sort_unstable();
    assert_eq!(lines, ["before", "err", "out"]);
}

fn file_uri_makes_its_parents(t: &Test) {
    let (id, log) = (t.id("a"), t.file("deep/er/log"));
    t.start(&["--log-uri", &format!("file://{log}")], &id, &["echo", "here"]);
    assert_eq!(t.wait_exit(&id).exit_status(), 0);
    assert_eq!(read_log(t, &log), "here\n");
}

fn binary_uri_feeds_a_logger(t: &Test) {
    let (logger, out) = (t.file("logger"), t.file("logged"));
    // Ready by closing descriptor 5; stdout is 3, stderr 4. At the end it gets SIGTERM and some
    // seconds to finish what is still in its pipes.
    let script = format!(
        "#!/bin/sh\ntrap '' TERM\nexec 5>&-\n(sed 's/^/out: /' <&3; sed 's/^/err: /' <&4) > {out}.part\n\
         echo \"id=$CONTAINER_ID ns=$CONTAINER_NAMESPACE\" >> {out}.part\nmv {out}.part {out}\n"
    );
    fs::write(&logger, script).expect("write the logger");
    fs::set_permissions(&logger, fs::Permissions::from_mode(0o755)).expect("chmod");
    let id = t.id("a");
    t.start(
        &["--log-uri", &format!("binary://{logger}")],
        &id,
        &["sh", "-c", "echo a; echo b >&2; echo c"],
    );
    assert_eq!(t.wait_exit(&id).exit_status(), 0);
    // runc's shim holds the logger's pipes until the task is deleted.
    t.wait_status(&id, "STOPPED");
    t.delete(&id);
    let text = eventually("the logger has written", Duration::from_secs(10), || {
        fs::read_to_string(&out).ok()
    });
    let names = format!("id={id} ns={}\n", t.node.namespace);
    assert_eq!(text, format!("out: a\nout: c\nerr: b\n{names}"));
}

/// As nerdctl's does.
fn a_logger_that_waits_for_the_exit_does_not_hold_it(t: &Test) {
    let logger = t.file("logger");
    fs::write(&logger, "#!/bin/sh\nexec 5>&-\ncat <&3\nexec sleep 1000\n")
        .expect("write the logger");
    fs::set_permissions(&logger, fs::Permissions::from_mode(0o755)).expect("chmod");
    let id = t.id("a");
    t.start_idle(&["--log-uri", &format!("binary://{logger}")], &id);
    t.kill(&id, "SIGKILL").ok();
    let start = Instant::now();
    assert_eq!(t.wait_exit(&id).exit_status(), 137);
    let taken = start.elapsed();
    assert!(taken < process::scaled(Duration::from_secs(1)), "{taken:?}");
}

fn binary_uri_that_cannot_run_is_an_error(t: &Test) {
    let id = t.id("a");
    let missing = t.file("missing-logger");
    let mut all = vec!["--detach"];
    let uri = format!("binary://{missing}");
    all.extend(["--log-uri", &uri]);
    let out = t.spawn(t.run_command(&all, &id, &["true"])).wait();
    assert_ne!(out.code, 0, "a container without its log must not run");
    assert!(out.stderr.contains("missing-logger"), "{}", out.stderr);
}

fn detached_output_is_read_later_by_attach(t: &Test) {
    let id = t.id("a");
    // Waits for its input, so that nothing is printed before somebody is attached.
    t.start(&[], &id, &["sh", "-c", "read line; echo \"got $line\"; exit 11"]);
    let mut command = t.node.ctr_command();
    command.args(["tasks", "attach", &id]);
    let out = Running::spawn(&mut command, Some(b"text\n")).wait();
    assert_eq!(out.text(), "got text");
    assert_eq!(t.wait_exit(&id).exit_status(), 11);
}

/// A container created and started through containerd's API with FIFOs of the test's own.
fn a_client_that_goes_away_does_not_end_stdin(t: &Test) {
    use crate::harness::direct::Stdio3;
    let driver = t.driver();
    let id = t.id("a");
    let io = Stdio3 {
        stdin: t.file("in"),
        stdout: t.file("out"),
        stderr: t.file("err"),
        terminal: false,
    };
    for path in [&io.stdin, &io.stdout, &io.stderr] {
        sys::mkfifo(path.as_ref());
    }
    // O_RDWR: the reader stays while writers come and go.
    let mut output = fs::File::options().read(true).write(true).open(&io.stdout).expect("open");
    let _errors = fs::File::options().read(true).write(true).open(&io.stderr).expect("open");
    let shim = driver.start(&id, &driver.spec(&id, &["cat"]));
    // The client's end must be open, as containerd's is, or the shim would wait for it.
    let mut reader = fs::File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&io.stdin)
        .expect("open stdin for reading");
    let mut first = fs::File::options().write(true).open(&io.stdin).expect("open stdin");
    shim.create(&io).expect("create");
    let mut nothing = [0u8; 1];
    let _ = reader.read(&mut nothing);
    drop(reader);
    shim.start("").expect("start");
    let mut buffer = [0u8; 4];
    first.write_all(b"one\n").expect("write");
    output.read_exact(&mut buffer).expect("read");
    assert_eq!(&buffer, b"one\n");
    drop(first);
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(shim.state("").expect("state").status.value(), 2, "still running");
    let mut second = fs::File::options().write(true).open(&io.stdin).expect("open stdin again");
    second.write_all(b"two\n").expect("write");
    output.read_exact(&mut buffer).expect("read");
    assert_eq!(&buffer, b"two\n");
    shim.close_stdin("").expect("CloseIO");
    drop(second);
    assert_eq!(shim.wait("").expect("wait").exit_status, 0);
    shim.finish();
    driver.remove_bundle(&id);
}

fn a_grandchild_that_keeps_stdout_does_not_hold_the_exit(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    let started = std::time::Instant::now();
    let out = t.exec_sh(&id, "sleep 1000 & echo parent; exit 8").expect(8);
    assert_eq!(out.text(), "parent");
    assert!(
        started.elapsed() < process::scaled(Duration::from_secs(15)),
        "took {:?}",
        started.elapsed()
    );
}

fn without_a_pid_namespace_a_grandchild_does_not_hold_the_exit(t: &Test) {
    let id = t.id("a");
    let hosts = format!("pid:/proc/{}/ns/pid", std::process::id());
    let script = "sleep 1000 & echo parent; exit 8";
    let started = std::time::Instant::now();
    let out = t.run(&["--with-ns", &hosts], &id, &["sh", "-c", script]).expect(8);
    assert_eq!(out.text(), "parent");
    assert!(
        started.elapsed() < process::scaled(Duration::from_secs(15)),
        "took {:?}",
        started.elapsed()
    );
}

// containerd's client opens its end of a FIFO in the background: on a busy machine a short process
// has ended by then. runc's shim waits for the reader before it starts the process.
fn a_reader_that_comes_late_gets_everything(t: &Test) {
    use crate::harness::direct::Stdio3;
    let (id, driver) = (t.id("a"), t.driver());
    let fifos = |name: &str| {
        let io = Stdio3 {
            stdout: t.file(&format!("{name}-out")),
            stderr: t.file(&format!("{name}-err")),
            ..Stdio3::default()
        };
        for path in [&io.stdout, &io.stderr] {
            sys::mkfifo(path.as_ref());
        }
        io
    };
    let late = |path: &str| {
        let mut reader = fs::File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .expect("open the FIFO");
        let mut text = String::new();
        eventually("output in the FIFO", Duration::from_secs(10), || {
            let mut buffer = [0u8; 64];
            if let Ok(count @ 1..) = reader.read(&mut buffer) {
                text.push_str(&String::from_utf8_lossy(&buffer[..count]));
            }
            text.ends_with('\n').then_some(())
        });
        text
    };
    let pause = || std::thread::sleep(Duration::from_millis(700));

    let shim = driver.start(&id, &driver.spec(&id, &["sh", "-c", "echo first; sleep 1000"]));
    let io = fifos("container");
    let (other, streams) = (shim.clone(), io.clone());
    let starting = std::thread::spawn(move || {
        other.create(&streams).expect("create");
        other.start("").expect("start");
    });
    pause();
    let _errors = fs::File::options().read(true).write(true).open(&io.stderr).expect("open");
    assert_eq!(late(&io.stdout), "first\n");
    starting.join().expect("the container starts");

    let short = serde_json::json!({
        "args": ["echo", "short"], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0},
    });
    let io = fifos("exec");
    let (other, streams, process) = (shim.clone(), io.clone(), short.clone());
    let starting = std::thread::spawn(move || {
        other.exec("late", &process, &streams).expect("exec");
        other.start("late").expect("start of the exec");
    });
    pause();
    let _errors = fs::File::options().read(true).write(true).open(&io.stderr).expect("open");
    assert_eq!(late(&io.stdout), "short\n");
    starting.join().expect("the exec starts");

    // A client deletes what has ended at once.
    let io = fifos("deleted");
    let (other, streams) = (shim.clone(), io.clone());
    let running = std::thread::spawn(move || {
        other.exec("deleted", &short, &streams).expect("exec");
        other.start("deleted").expect("start of the exec");
        other.wait("deleted").expect("wait for the exec");
        other.delete("deleted").expect("delete the exec");
    });
    pause();
    let _errors = fs::File::options().read(true).write(true).open(&io.stderr).expect("open");
    assert_eq!(late(&io.stdout), "short\n");
    running.join().expect("the exec ends");
    shim.finish();
    driver.remove_bundle(&id);
}
