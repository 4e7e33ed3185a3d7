//! Commands with a deadline, and what `/proc` says about other processes.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::sys;

/// No single command of a suite may take longer.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// What a finished command left behind.
#[derive(Debug, Clone)]
pub struct Output {
    /// Exit code, or 128 + signal.
    pub code: i32,
    pub stdout: Vec<u8>,
    pub stderr: String,
    /// For messages only.
    command: String,
}

impl Output {
    /// stdout as text, without the final newline.
    pub fn text(&self) -> String {
        let text = String::from_utf8_lossy(&self.stdout);
        text.strip_suffix('\n').unwrap_or(&text).to_owned()
    }

    /// Fails the test unless the command ended with `code`.
    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(
            self.code,
            code,
            "`{}` exited with {} instead of {code}\nstdout: {}\nstderr: {}",
            self.command,
            self.code,
            self.text().chars().take(2000).collect::<String>(),
            self.stderr
        );
        self
    }

    #[track_caller]
    pub fn ok(self) -> Self {
        self.expect(0)
    }

    /// Fails the test unless the command failed and said `needle` on stderr.
    #[track_caller]
    pub fn expect_error(self, needle: &str) -> Self {
        assert_ne!(self.code, 0, "`{}` succeeded: {}", self.command, self.text());
        assert!(
            self.stderr.contains(needle),
            "`{}` failed without saying {needle:?}: {}",
            self.command,
            self.stderr
        );
        self
    }
}

/// A command under way whose pipes are drained by threads, so it can never block on them.
pub struct Running {
    child: Child,
    command: String,
    stdout: Option<std::thread::JoinHandle<Vec<u8>>>,
    stderr: Option<std::thread::JoinHandle<Vec<u8>>>,
}

/// Set once a signal asked the run to end.
static ENDING: AtomicBool = AtomicBool::new(false);

/// From now on no command is started any more: what is cleaned up must not be used again.
pub fn start_no_more() {
    ENDING.store(true, Ordering::SeqCst);
}

/// Whether a signal asked the run to end.
pub fn is_ending() -> bool {
    ENDING.load(Ordering::SeqCst)
}

impl Running {
    pub fn spawn(command: &mut Command, stdin: Option<&[u8]>) -> Running {
        assert!(!is_ending(), "the run was asked to end");
        let text = describe(command);
        command.stdin(if stdin.is_some() { Stdio::piped() } else { Stdio::null() });
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|e| panic!("cannot run `{text}`: {e}"));
        if let (Some(input), Some(mut pipe)) = (stdin, child.stdin.take()) {
            let input = input.to_vec();
            std::thread::spawn(move || {
                // A command that ends without reading all of it is no error here.
                let _ = pipe.write_all(&input);
            });
        }
        let stdout = child.stdout.take().map(drain);
        let stderr = child.stderr.take().map(drain);
        Running { child, command: text, stdout, stderr }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    #[track_caller]
    pub fn wait(self) -> Output {
        self.wait_for(DEADLINE)
    }

    #[track_caller]
    pub fn wait_for(mut self, limit: Duration) -> Output {
        use std::os::unix::process::ExitStatusExt;
        let status = wait_child(&mut self.child, limit);
        let collect = |thread: Option<std::thread::JoinHandle<Vec<u8>>>| {
            thread.and_then(|t| t.join().ok()).unwrap_or_default()
        };
        let Some(status) = status else {
            let _ = self.child.kill();
            let _ = self.child.wait();
            let stderr = collect(self.stderr.take());
            panic!(
                "`{}` did not end within {limit:?}; stderr: {}",
                self.command,
                String::from_utf8_lossy(&stderr)
            );
        };
        Output {
            code: status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
            stdout: collect(self.stdout.take()),
            stderr: without_deprecations(&collect(self.stderr.take())),
            command: self.command,
        }
    }
}

/// What the command itself had to say: `ctr` 2.2 and later complains about cgroup v1 at each call.
fn without_deprecations(stderr: &[u8]) -> String {
    String::from_utf8_lossy(stderr)
        .split_inclusive('\n')
        .filter(|line| !line.contains("level=warning msg=\"DEPRECATION: "))
        .collect()
}

fn drain(mut pipe: impl Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut all = Vec::new();
        let _ = pipe.read_to_end(&mut all);
        all
    })
}

fn describe(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    text
}

/// Runs a command to its end.
#[track_caller]
pub fn run(command: &mut Command) -> Output {
    Running::spawn(command, None).wait()
}

/// Waits for a child with a limit; `None` if it still runs.
pub fn wait_child(child: &mut Child, limit: Duration) -> Option<std::process::ExitStatus> {
    let end = deadline(limit);
    let mut pause = Duration::from_millis(1);
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        if Instant::now() > end {
            return None;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(10));
    }
}

/// What a limit is on this machine. They are written for an ordinary one; `E2E_SLOW` is a factor for
/// an emulated one.
pub fn scaled(limit: Duration) -> Duration {
    limit * slowness()
}

/// How many of something at once are, on this machine, what `count` are on an ordinary one: containerd has
/// limits of its own, such as 2 s for the state of a task.
pub fn at_once(count: u32) -> u32 {
    count / slowness()
}

fn slowness() -> u32 {
    std::env::var("E2E_SLOW").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// The end of a wait.
pub fn deadline(limit: Duration) -> Instant {
    Instant::now() + scaled(limit)
}

/// Repeats `probe` until it answers, or fails the test naming what was waited for.
#[track_caller]
pub fn eventually<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Option<T>) -> T {
    let end = deadline(limit);
    loop {
        if let Some(value) = probe() {
            return value;
        }
        assert!(Instant::now() < end, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// SIGTERM, then SIGKILL after a grace, then the child is reaped.
pub fn terminate(child: &mut Child, grace: Duration) {
    sys::kill(child.id(), libc::SIGTERM);
    if wait_child(child, grace).is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// All processes: pid and command line with spaces between the arguments.
pub fn processes() -> Vec<(u32, String)> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter_map(|pid| {
            let raw = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let line = String::from_utf8_lossy(&raw).replace('\0', " ");
            Some((pid, line.trim_end().to_owned()))
        })
        .collect()
}

/// Is the process there and not a zombie?
pub fn is_alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|stat| stat.rsplit_once(')').map(|(_, rest)| rest.trim_start().to_owned()))
        .is_some_and(|rest| !rest.starts_with(['Z', 'X']))
}

/// One field of `/proc/<pid>/status`.
pub fn status_field(pid: u32, field: &str) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
        .map(|value| value.trim().to_owned())
}

/// Has the process a handler for the signal? Until its script has come to the `trap`, a first process
/// ignores it.
pub fn catches(pid: u32, signal: i32) -> bool {
    let caught = status_field(pid, "SigCgt").and_then(|mask| u64::from_str_radix(&mask, 16).ok());
    caught.is_some_and(|mask| mask & (1 << (signal - 1)) != 0)
}

/// The processes whose parent is `pid`.
pub fn children(pid: u32) -> Vec<u32> {
    processes()
        .into_iter()
        .map(|(child, _)| child)
        .filter(|child| status_field(*child, "PPid") == Some(pid.to_string()))
        .collect()
}

/// The paths in the cgroup hierarchies at or below `relative`, deepest first. On a hybrid or v1
/// machine each controller has a hierarchy of its own.
pub fn cgroup_directories(relative: &str) -> Vec<std::path::PathBuf> {
    let base = Path::new("/sys/fs/cgroup");
    let mut hierarchies = vec![base.to_path_buf()];
    if !base.join("cgroup.controllers").exists() {
        hierarchies = fs::read_dir(base)
            .map(|entries| {
                entries
                    .flatten()
                    // cpu and cpuacct are often links to one hierarchy: count it once.
                    .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
                    .map(|e| e.path())
                    .collect()
            })
            .unwrap_or_default();
    }
    let mut found = Vec::new();
    for hierarchy in hierarchies {
        collect_directories(&hierarchy.join(relative.trim_start_matches('/')), &mut found);
    }
    found
}

fn collect_directories(directory: &Path, found: &mut Vec<std::path::PathBuf>) {
    if !directory.is_dir() {
        return;
    }
    if let Ok(entries) = fs::read_dir(directory) {
        for entry in entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
            collect_directories(&entry.path(), found);
        }
    }
    found.push(directory.to_path_buf());
}

/// Is systemd this machine's service manager?
pub fn has_systemd() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// A slice as a kubelet has systemd make it for a pod, or as it is made here where there is no systemd.
pub struct Slice(String);

impl Slice {
    /// `name` has at most one dash, which systemd takes for a slash.
    pub fn new(name: &str) -> Slice {
        let slice = Slice(format!("{name}.slice"));
        if has_systemd() {
            run(Command::new("systemctl").args(["start", &slice.0])).ok();
        }
        slice
    }

    /// Its path in the hierarchies.
    pub fn path(&self) -> String {
        match self.0.split_once('-') {
            Some((parent, _)) => format!("{parent}.slice/{}", self.0),
            None => self.0.clone(),
        }
    }

    /// A file of the cgroup `below` it, in whichever hierarchy has it under one of these names.
    pub fn read(&self, below: &str, names: [&str; 2]) -> Option<String> {
        let path = format!("{}/{below}", self.path());
        let directories = cgroup_directories(path.trim_end_matches('/'));
        let mut files = directories.iter().flat_map(|d| names.map(|name| d.join(name)));
        let file = files.find(|file| {
            file.exists() && file.parent().is_some_and(|d| d.ends_with(path.trim_end_matches('/')))
        });
        fs::read_to_string(file?).ok().map(|text| text.trim().to_owned())
    }
}

impl Drop for Slice {
    fn drop(&mut self) {
        let top = self.path().split('/').next().unwrap_or_default().to_owned();
        if has_systemd() {
            let _ = Command::new("systemctl").args(["stop", &top]).status();
        }
        let directories = cgroup_directories(&top);
        // After a failed test its processes are still there.
        let inside = || -> Vec<u32> {
            let mut pids = Vec::new();
            for directory in &directories {
                let list = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
                pids.extend(list.lines().flat_map(str::parse::<u32>));
            }
            pids
        };
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline && !inside().is_empty() {
            for pid in inside() {
                sys::kill(pid, libc::SIGKILL);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        for directory in directories {
            let _ = fs::remove_dir(directory);
        }
    }
}

/// The value of a file in a container's cgroup: the nearest of the process's own cgroup and its
/// ancestors that is named after the container. The process itself may be in a leaf below it.
pub fn cgroup_value(pid: u32, id: &str, controller: &str, v1: &str, v2: &str) -> String {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let path_of = |wanted: &str| {
        groups.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':').skip(1);
            let names = parts.next()?;
            names.split(',').any(|name| name == wanted).then(|| parts.next()).flatten()
        })
    };
    let (hierarchy, path, name) = match (path_of(controller), path_of("")) {
        (Some(path), _) => (Path::new("/sys/fs/cgroup").join(controller), path, v1),
        (None, Some(path)) => (Path::new("/sys/fs/cgroup").to_path_buf(), path, v2),
        (None, None) => panic!("process {pid} has no cgroup: {groups:?}"),
    };
    let named = Path::new(path).ancestors().find(|path| path.ends_with(id));
    let named = named.unwrap_or_else(|| panic!("the cgroup {path} is not named after {id}"));
    let file = hierarchy.join(named.strip_prefix("/").unwrap_or(named)).join(name);
    let text = fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    text.trim().to_owned()
}
