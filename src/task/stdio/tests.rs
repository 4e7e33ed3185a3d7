use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio as ProcessStdio};
use std::time::Instant;

use nix::pty::openpty;
use nix::sys::stat::Mode;
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::mkfifo;
use sha2::{Digest, Sha256};
use tokio::task::spawn_blocking;
use tokio::time::sleep;

use super::*;

const BURST: usize = 8 << 20;
const SOON: Duration = Duration::from_secs(10);

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn fifo(&self, name: &str) -> String {
        let path = self.path(name);
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// The rest of a URI that runs a shell script as a logger. The script itself is not executed: a
    /// file that was just written may be busy in a child of another test.
    fn script(&self, name: &str, text: &str) -> String {
        let path = self.path(name);
        fs::write(&path, text).unwrap();
        format!("/bin/sh?{}=", path.display())
    }

    fn context(&self) -> Context {
        Context {
            container_id: "box".into(),
            exec_id: None,
            namespace: "testing".into(),
            bundle: self.0.path().to_owned(),
        }
    }

    async fn open(
        &self,
        stdin: &str,
        stdout: &str,
        stderr: &str,
        terminal: bool,
    ) -> Result<Stdio, Error> {
        self.open_as(None, stdin, stdout, stderr, terminal).await
    }

    /// An exec, the streams of which are relayed.
    async fn open_exec(&self, stdin: &str, stdout: &str, stderr: &str) -> Stdio {
        self.open_as(Some("extra"), stdin, stdout, stderr, false).await.unwrap()
    }

    async fn open_as(
        &self,
        exec_id: Option<&str>,
        stdin: &str,
        stdout: &str,
        stderr: &str,
        terminal: bool,
    ) -> Result<Stdio, Error> {
        let request = StdioRequest {
            stdin: stdin.into(),
            stdout: stdout.into(),
            stderr: stderr.into(),
            terminal,
        };
        let context = Context { exec_id: exec_id.map(str::to_owned), ..self.context() };
        // No open may ever wait for somebody.
        timeout(SOON, Stdio::open(&request, &context)).await.expect("open blocked")
    }

    async fn text_of(&self, name: &str) -> String {
        let path = self.path(name);
        for _ in 0..500 {
            match fs::read_to_string(&path) {
                Ok(text) if !text.is_empty() => return text,
                _ => sleep(Duration::from_millis(10)).await,
            }
        }
        panic!("nothing in {}", path.display());
    }
}

/// Runs a shell command as the shim would have init run it.
fn workload(script: &str, fds: [OwnedFd; 3]) -> std::process::Child {
    let [stdin, stdout, stderr] = fds.map(ProcessStdio::from);
    Command::new("/bin/sh")
        .args(["-c", script])
        .stdin(stdin)
        .stdout(stdout)
        .stderr(stderr)
        .spawn()
        .unwrap()
}

async fn end_of(mut child: std::process::Child) -> i32 {
    let status = spawn_blocking(move || child.wait().unwrap());
    timeout(SOON, status).await.expect("the workload hangs").unwrap().code().unwrap_or(-1)
}

/// Reads a FIFO to its end, as containerd does.
fn client(path: &str) -> tokio::task::JoinHandle<Vec<u8>> {
    let path = path.to_owned();
    spawn_blocking(move || fs::read(path).unwrap())
}

async fn all(reading: tokio::task::JoinHandle<Vec<u8>>) -> Vec<u8> {
    timeout(SOON, reading).await.expect("no end of file").unwrap()
}

fn pattern() -> Vec<u8> {
    (0..BURST).map(|n| (n * 31 + n / 251) as u8).collect()
}

fn is_blocking(fd: &OwnedFd) -> bool {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    !OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL).unwrap()).contains(OFlag::O_NONBLOCK)
}

#[tokio::test]
async fn empty_streams_are_dev_null() {
    let place = Place::new();
    let mut stdio = place.open("", "", "", false).await.unwrap();
    let fds = stdio.child_fds().unwrap();
    assert!(stdio.child_fds().is_none(), "they are given once");
    assert_eq!(end_of(workload("cat; echo lost; echo lost >&2", fds)).await, 0);
}

#[tokio::test]
async fn output_goes_to_the_fifos_and_ends_with_finish() {
    output_arrives(None).await;
}

#[tokio::test]
async fn output_of_an_exec_goes_to_the_fifos_and_ends_with_finish() {
    output_arrives(Some("extra")).await;
}

async fn output_arrives(exec_id: Option<&str>) {
    let place = Place::new();
    let (out, err) = (place.fifo("out"), place.fifo("err"));
    let err_uri = format!("fifo://{err}");
    let mut stdio = place.open_as(exec_id, "", &out, &err_uri, false).await.unwrap();
    let readers = [client(&out), client(&err)];
    let fds = stdio.child_fds().unwrap();
    assert!(fds.iter().all(is_blocking), "a workload must see blocking descriptors");
    assert_eq!(end_of(workload("echo one; echo two >&2", fds)).await, 0);
    sleep(Duration::from_millis(20)).await;
    assert!(readers.iter().all(|r| !r.is_finished()), "the shim holds the FIFOs");
    stdio.drain(SOON).await;
    stdio.finish();
    stdio.finish();
    let [out, err] = readers;
    assert_eq!((all(out).await, all(err).await), (b"one\n".to_vec(), b"two\n".to_vec()));
}

#[tokio::test]
async fn a_burst_arrives_whole_although_the_reader_comes_and_goes() {
    burst_arrives(None).await;
}

#[tokio::test]
async fn a_burst_from_an_exec_arrives_whole_although_the_reader_comes_and_goes() {
    burst_arrives(Some("extra")).await;
}

async fn burst_arrives(exec_id: Option<&str>) {
    let place = Place::new();
    let out = place.fifo("out");
    let data = pattern();
    fs::write(place.path("data"), &data).unwrap();
    let mut stdio = place.open_as(exec_id, "", &out, "", false).await.unwrap();
    let script = format!("cat {}", place.path("data").display());
    let child = workload(&script, stdio.child_fds().unwrap());
    // Three readers, one after the other, with nobody in between: a restart of containerd.
    let mut received = Vec::new();
    for share in [100_000, 3 << 20] {
        let path = out.clone();
        let part = spawn_blocking(move || {
            let mut part = vec![0; share];
            fs::File::open(path).unwrap().read_exact(&mut part).unwrap();
            part
        });
        received.extend(timeout(SOON, part).await.unwrap().unwrap());
        sleep(Duration::from_millis(30)).await;
    }
    let rest = client(&out);
    assert_eq!(end_of(child).await, 0);
    let start = Instant::now();
    stdio.drain(SOON).await;
    assert!(start.elapsed() < SOON, "drain gave up");
    stdio.finish();
    received.extend(all(rest).await);
    assert_eq!(received.len(), data.len());
    assert_eq!(Sha256::digest(&received), Sha256::digest(&data));
}

#[tokio::test]
async fn what_an_exec_leaves_behind_loses_the_output_when_the_exec_has_ended() {
    let place = Place::new();
    let out = place.fifo("out");
    let mut stdio = place.open_exec("", &out, "").await;
    let reader = client(&out);
    let script = format!(
        "(trap '' PIPE; read go < {}; echo late; echo status $? > {}) & echo parent; exit 8",
        place.fifo("go"),
        place.path("grandchild").display()
    );
    assert_eq!(end_of(workload(&script, stdio.child_fds().unwrap())).await, 8);
    let start = Instant::now();
    stdio.drain(SOON).await;
    assert!(start.elapsed() < SOON / 2, "{:?}", start.elapsed());
    assert!(!reader.is_finished(), "the end must not be seen before the exit");
    stdio.finish();
    assert_eq!(all(reader).await, b"parent\n");
    fs::write(place.path("go"), "\n").unwrap();
    assert_ne!(place.text_of("grandchild").await, "status 0\n");
}

#[tokio::test]
async fn what_ends_right_after_an_exec_is_still_heard() {
    let place = Place::new();
    let out = place.fifo("out");
    let mut stdio = place.open_exec("", &out, "").await;
    let reader = client(&out);
    let script = "(sleep 0.03; echo child) & echo parent";
    assert_eq!(end_of(workload(script, stdio.child_fds().unwrap())).await, 0);
    stdio.drain(SOON).await;
    stdio.finish();
    assert_eq!(all(reader).await, b"parent\nchild\n");
}

#[tokio::test]
async fn drain_gives_up_on_a_process_that_never_stops_to_write() {
    let place = Place::new();
    let out = place.fifo("out");
    let mut stdio = place.open_exec("", &out, "").await;
    let reader = client(&out);
    let script = "while echo x; do :; done & exit 3";
    assert_eq!(end_of(workload(script, stdio.child_fds().unwrap())).await, 3);
    let drained = stdio.drain(Duration::from_millis(300));
    tokio::time::timeout(Duration::from_secs(10), drained).await.expect("it gives up");
    stdio.finish();
    assert!(all(reader).await.starts_with(b"x\n"));
}

#[tokio::test]
async fn an_exec_whose_output_nobody_reads_ends_and_is_waited_for_within_bounds() {
    let place = Place::new();
    let out = place.fifo("out");
    let mut stdio = place.open_exec("", &out, "").await;
    // More than the FIFO takes, less than the FIFO and the pipe.
    let child = workload("head -c 300000 /dev/zero", stdio.child_fds().unwrap());
    assert_eq!(end_of(child).await, 0);
    let start = Instant::now();
    stdio.drain(Duration::from_millis(300)).await;
    assert!(start.elapsed() >= Duration::from_millis(300), "{:?}", start.elapsed());
    // Nothing is lost before `finish`.
    let reading = spawn_blocking(move || fs::File::open(out)?.read_exact(&mut [1; 300_000]));
    timeout(SOON, reading).await.expect("bytes are missing").unwrap().unwrap();
}

#[tokio::test]
async fn words_that_nobody_reads_yet_do_not_hold_an_exec() {
    let place = Place::new();
    let out = place.fifo("out");
    let mut stdio = place.open_exec("", &out, "").await;
    // One after the other: each is relayed alone.
    let script = "i=0; while [ $i -lt 40 ]; do echo word; sleep 0.01; i=$((i+1)); done";
    assert_eq!(end_of(workload(script, stdio.child_fds().unwrap())).await, 0);
    let start = Instant::now();
    stdio.drain(SOON).await;
    assert!(start.elapsed() < SOON, "the FIFO is full");
    let mut reader = fs::File::open(out).unwrap();
    stdio.finish();
    let reading = spawn_blocking(move || {
        let mut received = Vec::new();
        reader.read_to_end(&mut received).map(|_| received)
    });
    assert_eq!(
        timeout(SOON, reading).await.expect("no end of file").unwrap().unwrap(),
        b"word\n".repeat(40)
    );
}

#[tokio::test]
async fn stdin_ends_by_close_only_and_survives_a_detach() {
    let place = Place::new();
    let (input, out) = (place.fifo("in"), place.fifo("out"));
    let mut stdio = place.open(&input, &out, "", false).await.unwrap();
    let reader = client(&out);
    let child = workload("cat", stdio.child_fds().unwrap());
    for word in ["first ", "second "] {
        let path = input.clone();
        spawn_blocking(move || {
            fs::OpenOptions::new().write(true).open(path).unwrap().write_all(word.as_bytes())
        })
        .await
        .unwrap()
        .unwrap();
        sleep(Duration::from_millis(30)).await;
    }
    let mut child = child;
    assert!(child.try_wait().unwrap().is_none(), "a client that detaches is no end of file");
    stdio.close_stdin();
    stdio.close_stdin();
    assert_eq!(end_of(child).await, 0);
    stdio.finish();
    assert_eq!(all(reader).await, b"first second ");
}

#[tokio::test]
async fn close_before_the_process_exists_gives_what_was_written_and_the_end() {
    let place = Place::new();
    let (input, out) = (place.fifo("in"), place.fifo("out"));
    let mut stdio = place.open(&input, &out, "", false).await.unwrap();
    let reader = client(&out);
    fs::OpenOptions::new().write(true).open(&input).unwrap().write_all(b"early").unwrap();
    stdio.close_stdin();
    assert_eq!(end_of(workload("cat", stdio.child_fds().unwrap())).await, 0);
    stdio.finish();
    assert_eq!(all(reader).await, b"early");
}

#[tokio::test]
async fn a_file_gets_both_streams_appended() {
    let place = Place::new();
    let uri = format!("file://{}", place.path("logs/a/log").display());
    for word in ["1", "2"] {
        let mut stdio = place.open("", &uri, "", false).await.unwrap();
        let script = format!("echo out{word}; echo err{word} >&2");
        let fds = stdio.child_fds().unwrap();
        for fd in &fds[1..] {
            let held = File::from(fd.try_clone().unwrap()).metadata().unwrap();
            assert!(held.file_type().is_fifo(), "the process holds the log itself");
        }
        assert_eq!(end_of(workload(&script, fds)).await, 0);
        stdio.drain(SOON).await;
        stdio.finish();
    }
    assert_eq!(place.text_of("logs/a/log").await, "out1\nerr1\nout2\nerr2\n");
    let mode = |name: &str| fs::metadata(place.path(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("logs"), mode("logs/a/log")), (0o755, 0o644));
}

#[tokio::test]
async fn stderr_may_have_a_file_of_its_own() {
    let place = Place::new();
    let uri = |name: &str| format!("file://{}", place.path(name).display());
    let mut stdio = place.open("", &uri("o"), &uri("e"), false).await.unwrap();
    assert_eq!(end_of(workload("echo o; echo e >&2", stdio.child_fds().unwrap())).await, 0);
    assert_eq!((place.text_of("o").await, place.text_of("e").await), ("o\n".into(), "e\n".into()));
}

#[tokio::test]
async fn wrong_streams_are_refused_by_name() {
    let place = Place::new();
    for (stdin, stdout, expected) in [
        ("", "npipe:///x", "\"npipe:///x\""),
        ("", "/no/such/fifo", "open stdout /no/such/fifo: no such file or directory"),
        ("/no/such/fifo", "", "open stdin /no/such/fifo"),
        ("file:///x", "", "stdin cannot come from \"file:///x\""),
        ("", "binary:///no/such/logger", "start logging program /no/such/logger: no such file"),
    ] {
        let error = place.open(stdin, stdout, "", false).await.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

/// Answers as a logger does, then copies descriptors 3 and 4 into files.
const LOGGER: &str = r#"
echo "$CONTAINER_NAMESPACE/$CONTAINER_ID $*" > who
env | grep -cv -e PWD= -e _= -e SHLVL= > variables
exec 5>&-
sleep 0.5
cat <&4 > stderr &
cat <&3 > stdout
"#;

#[tokio::test]
async fn a_logger_gets_both_streams_to_the_end_before_drain_is_done() {
    let place = Place::new();
    let logger = place.script("logger", LOGGER);
    let mut stdio =
        place.open("", &format!("binary://{logger}&key=some%20value"), "", false).await.unwrap();
    assert_eq!(place.text_of("who").await, "testing/box  key some value\n");
    let script = "i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done; echo bad >&2";
    assert_eq!(end_of(workload(script, stdio.child_fds().unwrap())).await, 0);
    stdio.drain(SOON).await;
    // What it has read it may not have written yet.
    let lines = async {
        while fs::read_to_string(place.path("stdout")).unwrap().lines().count() < 2000 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(SOON, lines).await.unwrap();
    assert_eq!(place.text_of("stderr").await, "bad\n");
    assert_eq!(fs::read_to_string(place.path("variables")).unwrap(), "2\n");
}

#[tokio::test]
async fn a_logger_that_goes_on_running_does_not_hide_the_exit_and_is_terminated() {
    let place = Place::new();
    let logger = place.script(
        "logger",
        "trap 'echo terminated > end; exit' TERM\nexec 5>&-\ncat <&3 > /dev/null\nwhile :; do sleep 0.05; done",
    );
    let mut stdio = place.open("", &format!("binary://{logger}"), "", false).await.unwrap();
    assert_eq!(end_of(workload("echo x", stdio.child_fds().unwrap())).await, 0);
    let start = Instant::now();
    stdio.drain(SOON).await;
    assert!(start.elapsed() < READ_LIMIT, "{:?}", start.elapsed());
    assert!(!place.path("end").exists());
    stdio.finish();
    assert_eq!(place.text_of("end").await, "terminated\n");
}

#[tokio::test]
async fn binary_v2_must_confirm_with_a_byte() {
    let place = Place::new();
    let good = place.script("good", "printf x >&5\nexec 5>&-\ncat <&3 > out");
    let mut stdio = place.open("", &format!("binary-v2://{good}"), "", false).await.unwrap();
    assert_eq!(end_of(workload("echo hi", stdio.child_fds().unwrap())).await, 0);
    stdio.drain(SOON).await;
    assert_eq!(place.text_of("out").await, "hi\n");

    let dead = place.script("dead", "exit 3");
    let error = place.open("", &format!("binary-v2://{dead}"), "", false).await.unwrap_err();
    let error = error.to_string();
    assert!(error.contains("/bin/sh") && error.contains("status 3"), "{error}");
    // For the first version that is the sign of being ready.
    place.open("", &format!("binary://{dead}"), "", false).await.unwrap();
}

#[tokio::test]
async fn dropping_everything_early_ends_the_logger() {
    let place = Place::new();
    let logger = place.script("logger", "exec 5>&-\ncat <&3 >/dev/null\necho ended > end");
    let mut stdio = place.open("", &format!("binary://{logger}"), "", false).await.unwrap();
    let supervised = stdio.loggers[0].done(SOON);
    drop(stdio);
    timeout(SOON, supervised).await.unwrap();
}

/// A terminal in raw mode: (master, slave).
fn terminal() -> (OwnedFd, OwnedFd) {
    let pty = openpty(None, None).unwrap();
    let mut modes = tcgetattr(&pty.slave).unwrap();
    cfmakeraw(&mut modes);
    tcsetattr(&pty.slave, SetArg::TCSANOW, &modes).unwrap();
    (pty.master, pty.slave)
}

fn on_terminal(script: &str, slave: OwnedFd) -> std::process::Child {
    let clone = || slave.try_clone().unwrap();
    workload(script, [clone(), clone(), clone()])
}

#[tokio::test]
async fn a_terminal_is_copied_to_the_last_byte_before_drain_is_done() {
    let place = Place::new();
    let out = place.fifo("out");
    let data = pattern();
    fs::write(place.path("data"), &data).unwrap();
    let mut stdio = place.open("", &out, "", true).await.unwrap();
    assert!(stdio.is_terminal() && stdio.child_fds().is_none());
    let (master, slave) = terminal();
    stdio.attach_terminal(master).unwrap();
    let reader = client(&out);
    let child = on_terminal(&format!("cat {}", place.path("data").display()), slave);
    assert_eq!(end_of(child).await, 0);
    let start = Instant::now();
    stdio.drain(SOON).await;
    assert!(start.elapsed() < SOON, "drain gave up");
    stdio.finish();
    let received = all(reader).await;
    assert_eq!(received.len(), data.len());
    assert_eq!(Sha256::digest(&received), Sha256::digest(&data));
}

#[tokio::test]
async fn a_terminal_takes_input_from_clients_that_come_and_go() {
    let place = Place::new();
    let (input, out) = (place.fifo("in"), place.fifo("out"));
    let mut stdio = place.open(&input, &out, "", true).await.unwrap();
    let (master, slave) = terminal();
    stdio.attach_terminal(master).unwrap();
    let reader = client(&out);
    let child = on_terminal("head -c 200000 | sha256sum", slave);
    let data: Vec<u8> = pattern()[..200_000].to_vec();
    for part in data.chunks(100_000) {
        let (path, part) = (input.clone(), part.to_vec());
        let writing = spawn_blocking(move || {
            fs::OpenOptions::new().write(true).open(path).unwrap().write_all(&part)
        });
        timeout(SOON, writing).await.expect("input is stuck").unwrap().unwrap();
        sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(end_of(child).await, 0);
    stdio.drain(SOON).await;
    stdio.finish();
    let expected: String = Sha256::digest(&data).iter().map(|b| format!("{b:02x}")).collect();
    let received = String::from_utf8(all(reader).await).unwrap();
    assert!(received.starts_with(&expected), "{received}");
}

#[tokio::test]
async fn a_resize_before_and_after_the_terminal_exists_arrives() {
    let place = Place::new();
    let out = place.fifo("out");
    let mut stdio = place.open("", &out, "", true).await.unwrap();
    let reader = client(&out);
    stdio.resize(81, 26).unwrap();
    let (master, slave) = terminal();
    stdio.attach_terminal(master).unwrap();
    assert_eq!(end_of(on_terminal("stty size", slave.try_clone().unwrap())).await, 0);
    stdio.resize(100, 40).unwrap();
    assert_eq!(end_of(on_terminal("stty size", slave.try_clone().unwrap())).await, 0);
    drop(slave);
    stdio.drain(SOON).await;
    stdio.finish();
    assert_eq!(all(reader).await, b"26 81\n40 100\n");
    assert!(place.open("", "", "", false).await.unwrap().resize(1, 1).is_ok());
}

#[tokio::test]
async fn a_terminal_may_log_to_a_file_or_a_logger_or_nowhere() {
    let place = Place::new();
    let file = format!("file://{}", place.path("log").display());
    let logger = place.script("logger", LOGGER);
    for stdout in [file.clone(), format!("binary://{logger}"), String::new()] {
        let mut stdio = place.open("", &stdout, "", true).await.unwrap();
        let (master, slave) = terminal();
        stdio.attach_terminal(master).unwrap();
        assert_eq!(end_of(on_terminal("echo on a tty", slave)).await, 0);
        let start = Instant::now();
        stdio.drain(SOON).await;
        assert!(start.elapsed() < SOON);
        stdio.finish();
    }
    assert_eq!(place.text_of("log").await, "on a tty\n");
    assert_eq!(place.text_of("stdout").await, "on a tty\n");
}

#[tokio::test]
async fn drain_gives_up_on_a_terminal_that_stays_open() {
    let place = Place::new();
    let out = place.fifo("out");
    let mut stdio = place.open("", &out, "", true).await.unwrap();
    let (master, slave) = terminal();
    stdio.attach_terminal(master).unwrap();
    let reader = client(&out);
    assert_eq!(end_of(on_terminal("echo x", slave.try_clone().unwrap())).await, 0);
    let start = Instant::now();
    stdio.drain(Duration::from_millis(200)).await;
    assert!((200..2000).contains(&start.elapsed().as_millis()));
    stdio.finish();
    assert_eq!(all(reader).await, b"x\n");
    drop(slave);
}

#[tokio::test]
async fn a_terminal_is_attached_once_and_only_if_asked_for() {
    let place = Place::new();
    let mut plain = place.open("", "", "", false).await.unwrap();
    assert!(matches!(plain.attach_terminal(terminal().0), Err(Error::NoTerminal)));
    let mut stdio = place.open("", "", "", true).await.unwrap();
    let (master, _slave) = terminal();
    let again = master.as_fd().try_clone_to_owned().unwrap();
    stdio.attach_terminal(master).unwrap();
    assert!(matches!(stdio.attach_terminal(again), Err(Error::NoTerminal)));
}

#[tokio::test]
async fn nothing_stays_open() {
    let place = Place::new();
    let (input, out) = (place.fifo("in"), place.fifo("out"));
    let open_here = |dir: &Path| {
        fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|e| fs::read_link(e.unwrap().path()).ok())
            .filter(|target| target.starts_with(dir))
            .count()
    };
    for (exec_id, terminal_wanted) in [(None, false), (None, true), (Some("extra"), false)] {
        let mut stdio = place.open_as(exec_id, &input, &out, "", terminal_wanted).await.unwrap();
        if terminal_wanted {
            let (master, slave) = terminal();
            stdio.attach_terminal(master).unwrap();
            drop(slave);
        }
        // Without a reader, something of an output stays until the process is deleted.
        stdio.finish();
        drop(stdio);
        sleep(Duration::from_millis(20)).await;
        assert_eq!(open_here(place.0.path()), 0, "{exec_id:?}, terminal: {terminal_wanted}");
    }
}
