//! LXC's hooks, on the host.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{ExitStatusExt, parent_id};
use std::path::Path;
use std::process::{ExitCode, ExitStatus};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::{sys, watch};

/// The version of `exit.json`.
const RECORD_VERSION: u32 = 1;
/// The end of the log that can hold the line about the exit: liblxc writes it just before the hook.
const LOG_TAIL: u64 = 64 * 1024;
/// liblxc's log in the run directory.
const LOG: &str = "lxc.log";
/// lxc-start runs a hook by `sh -c`, which may or may not be replaced by the hook.
const MAX_ANCESTORS: usize = 4;

/// `hook start-host`: starts a watcher, unless lxc-start's log will tell the exit status. Never
/// fails: without a status a CT is still a CT.
pub fn start_host(run_dir: &Path) -> ExitCode {
    let log = read_tail(&run_dir.join(LOG)).unwrap_or_default();
    if !lines(&log).any(is_information)
        && let Err(e) = watch::start(run_dir)
    {
        // lxc-start writes this into its log.
        let _ = writeln!(io::stderr(), "watch the CT for {}: {e}", run_dir.display());
    }
    ExitCode::SUCCESS
}

/// `hook stop`: writes the exit record. Never fails: LXC would log it, and has to clean up anyway.
pub fn stop(run_dir: &Path) -> ExitCode {
    let target = std::env::var_os("LXC_TARGET");
    let exit = find_exit(run_dir, target.as_deref());
    let record = render(&exit, now(), oom_kills(run_dir));
    if let Err(e) = write_record(run_dir, &record) {
        // lxc-start writes this into its log.
        let _ = writeln!(io::stderr(), "write {}/exit.json: {e}", run_dir.display());
    }
    ExitCode::SUCCESS
}

/// `hook post-stop`: a failure here makes LXC stop instead of starting the CT again.
pub fn post_stop() -> ExitCode {
    match std::env::var_os("LXC_TARGET") {
        Some(target) if target == "reboot" => ExitCode::FAILURE,
        _ => ExitCode::SUCCESS,
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Exit {
    /// 0..255, or 128+n.
    status: u32,
    source: &'static str,
}

/// What containerd says of a process whose end nobody saw.
const UNKNOWN: Exit = Exit { status: 255, source: "unknown" };

/// [`UNKNOWN`] if nobody knows: a record of that is better than none, for which its reader would
/// wait.
fn find_exit(run_dir: &Path, target: Option<&OsStr>) -> Exit {
    // Also if it is not needed: its end must not be in the way of the cgroup's removal.
    let heard = watch::wait_status(run_dir).and_then(from_wait);
    let logged = || parse_log(&read_tail(&run_dir.join(LOG))?);
    let kernel = reaped_wait_status().and_then(from_wait);
    let parent = || match heard {
        Some(status) => Some(Exit { status, source: "monitor" }),
        None => logged().map(|status| Exit { status, source: "log" }),
    };
    decide(target, kernel, parent).unwrap_or(UNKNOWN)
}

/// 0..255 or 128+n, of a wait status.
fn from_wait(status: i32) -> Option<u32> {
    let status = ExitStatus::from_raw(status);
    let signal = || status.signal().map(|signal| 128 + signal as u32);
    status.code().map(|code| code as u32).or_else(signal)
}

/// The rule of all sources: what the kernel says to everybody, and what it has said to the parent,
/// lxc-start.
///
/// After `reboot(2)` the parent's wait status is SIGHUP (restart) or SIGINT (halt, power off), and
/// only the parent's. A pidfd shows how PID 1 really ended: 0 if it made the call itself, SIGKILL
/// if another process of the CT did. So these two are compared with what lxc-start saw.
fn decide(
    target: Option<&OsStr>,
    kernel: Option<u32>,
    parent: impl FnOnce() -> Option<Exit>,
) -> Option<Exit> {
    if target == Some(OsStr::new("reboot")) {
        return Some(Exit { status: 128 + libc::SIGHUP as u32, source: "reboot" });
    }
    let Some(status) = kernel else {
        return parent();
    };
    if matches!(status, 0 | 137) {
        let reboot = [libc::SIGHUP, libc::SIGINT].map(|s| 128 + s as u32);
        if let Some(seen) = parent().filter(|exit| reboot.contains(&exit.status)) {
            return Some(seen);
        }
    }
    Some(Exit { status, source: "pidfd" })
}

/// The status of the CT's PID 1, by the pidfd that lxc-start holds of it.
fn reaped_wait_status() -> Option<i32> {
    let mut pid = parent_id();
    for _ in 0..MAX_ANCESTORS {
        if pid <= 1 {
            break;
        }
        if let Some(status) = wait_status_from(pid) {
            return Some(status);
        }
        pid = parent_of(pid)?;
    }
    None
}

fn wait_status_from(pid: u32) -> Option<i32> {
    // First the pidfd, so that the numbers read below belong to the process we ask.
    let process = sys::pidfd_open(pid).ok()?;
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo")).ok()? {
        let Some(fd) = entry.ok().and_then(|e| e.file_name().to_str()?.parse().ok()) else {
            continue;
        };
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).unwrap_or_default();
        if !is_reaped_pidfd(&info) {
            continue;
        }
        let status = sys::pidfd_getfd(process.as_fd(), fd)
            .and_then(|pidfd| sys::pidfd_wait_status(pidfd.as_fd()));
        if let Ok(Some(status)) = status {
            return Some(status);
        }
    }
    None
}

fn is_reaped_pidfd(fdinfo: &str) -> bool {
    fdinfo.lines().any(|l| l.strip_prefix("Pid:").is_some_and(|v| v.trim() == "-1"))
}

fn parent_of(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("PPid:"))?;
    line.trim().parse().ok()
}

fn read_tail(path: &Path) -> Option<Vec<u8>> {
    let mut file = File::open(path).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL))).ok()?;
    let mut tail = Vec::new();
    file.take(LOG_TAIL).read_to_end(&mut tail).ok()?;
    Some(tail)
}

/// The status in liblxc's log: the last line ` - Child <PID> ended on error (N)` or `… on signal
/// NAME(N)`. liblxc writes none for the status 0, so a log without such a line means 0, but only if
/// it was written after the end: the line that announces this very hook proves it.
///
/// Only whole lines of exactly this form count: other lines quote text that the container can
/// influence, such as names.
fn parse_log(log: &[u8]) -> Option<u32> {
    let zero = || lines(log).any(announces_stop).then_some(0);
    lines(log).rev().find_map(parse_log_line).or_else(zero)
}

fn lines(log: &[u8]) -> impl DoubleEndedIterator<Item = &str> {
    log.split(|b| *b == b'\n').filter_map(|line| std::str::from_utf8(line).ok())
}

/// `lxc-start NAME TIME INFO …`
fn is_information(line: &str) -> bool {
    line.split_whitespace().nth(3) == Some("INFO")
}

fn announces_stop(line: &str) -> bool {
    is_information(line)
        && line.contains("conf.c:run_script_argv:")
        && line
            .split_once(" - Executing script \"")
            .is_some_and(|(_, rest)| rest.contains(" hook stop "))
}

fn parse_log_line(line: &str) -> Option<u32> {
    let (head, tail) = line.split_once(" - Child <")?;
    // The head ends with liblxc's place in its source, `error.c:function:line`.
    if !head.contains("error.c:lxc_error_set_and_log:") {
        return None;
    }
    let (pid, tail) = tail.split_once("> ended on ")?;
    pid.parse::<u32>().ok()?;
    let (kind, number) = tail.strip_suffix(')')?.split_once('(')?;
    let number: u32 = number.parse().ok()?;
    // "error (7)", "signal Killed(9)", in older versions "signal (9)".
    match kind.split_once(' ')? {
        ("error", "") if number <= 255 => Some(number),
        ("signal", _) if (1..=64).contains(&number) => Some(128 + number),
        _ => None,
    }
}

/// The kills that the CT's memory cgroup counted; 0 if that is not known.
fn oom_kills(run_dir: &Path) -> u64 {
    let Ok(text) = fs::read_to_string(run_dir.join("cgroup")) else {
        return 0;
    };
    let directory = Path::new(text.trim_end_matches('\n'));
    if !directory.is_absolute() {
        return 0;
    }
    ["memory.events", "memory.oom_control"]
        .iter()
        .find_map(|file| parse_oom_kills(&fs::read_to_string(directory.join(file)).ok()?))
        .unwrap_or(0)
}

/// The line `oom_kill N` of cgroup2's `memory.events` and v1's `memory.oom_control`.
fn parse_oom_kills(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")).and_then(|n| n.trim().parse().ok())
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}

/// The record that the holder of a pod's namespaces writes of itself.
pub(crate) fn holder_record(status: u32) -> String {
    render(&Exit { status, source: "holder" }, now(), 0)
}

/// By hand: every field is a number or one of six words, and serde_json would double the binary.
fn render(exit: &Exit, time: u64, oom_kills: u64) -> String {
    format!(
        "{{\"version\":{RECORD_VERSION},\"status\":{},\"time\":{time},\"oom_kills\":{oom_kills},\
         \"source\":\"{}\"}}\n",
        exit.status, exit.source
    )
}

fn write_record(run_dir: &Path, record: &str) -> io::Result<()> {
    let temporary = run_dir.join("exit.json.tmp");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&temporary)?;
    file.write_all(record.as_bytes())?;
    fs::rename(&temporary, run_dir.join("exit.json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "lxc-start 70001 20250101000000.000 INFO     error - \
                        ../src/lxc/error.c:lxc_error_set_and_log:31";

    #[test]
    fn the_log_gives_the_last_status() {
        let log = |lines: &[&str]| parse_log(lines.join("\n").as_bytes());
        assert_eq!(log(&[&format!("{HEAD} - Child <12> ended on error (7)")]), Some(7));
        let signal = format!("{HEAD} - Child <12> ended on signal Killed(9)");
        assert_eq!(
            log(&[&format!("{HEAD} - Child <1> ended on error (3)"), &signal, "x", ""]),
            Some(137)
        );
    }

    #[test]
    fn only_a_log_that_is_complete_says_zero_by_silence() {
        assert_eq!(parse_log(b""), None);
        assert_eq!(parse_log(b"lxc-start 70001 20250101000000.000 ERROR    conf - x\n"), None);
        let hook = "lxc-start 70001 20250101000000.000 INFO     conf - \
                    ../src/lxc/conf.c:run_script_argv:340 - Executing script \"/x/init hook";
        let announced = format!("{hook} stop /run/x\" for container \"70001\"\n");
        assert_eq!(parse_log(announced.as_bytes()), Some(0));
        // A log that a full disk has cut short.
        let before = format!("{hook} start-host /run/x\" for container \"70001\"\n");
        assert_eq!(parse_log(before.as_bytes()), None);
    }

    #[test]
    fn signals_are_read_with_and_without_a_name() {
        for (text, status) in [("(2)", 130), ("Interrupt(2)", 130), ("Real-time signal 6(40)", 168)]
        {
            let line = format!("{HEAD} - Child <12> ended on signal {text}");
            assert_eq!(parse_log(line.as_bytes()), Some(status));
        }
    }

    #[test]
    fn hostile_log_lines_are_not_believed() {
        for line in [
            "Child <12> ended on error (7)".to_owned(),
            " - Child <12> ended on error (7)".to_owned(),
            format!("{HEAD} - Child <12> ended on error (7) "),
            format!("{HEAD} - Child <12> ended on error (256)"),
            format!("{HEAD} - Child <12> ended on error x(7)"),
            format!("{HEAD} - Child <12> ended on error 3 (7)"),
            format!("{HEAD} - Child <12> ended on signal A(1)(2)"),
            format!("{HEAD} - Child <12> ended on signal"),
            format!("{HEAD} - Child <12> ended on signal (0)"),
            format!("{HEAD} - Child <12> ended on signal (65)"),
            format!("{HEAD} - Child <12> ended on error (-1)"),
            format!("{HEAD} - Child <x> ended on error (1)"),
            format!("{HEAD} - Child <12> ended on error (99999999999999999999)"),
            format!("{HEAD} - Child <12> ended on error ()"),
            format!("{HEAD} - Child <"),
            "conf.c:run:1 - Executing \"x - Child <1> ended on error (9)\"".to_owned(),
        ] {
            assert!(matches!(parse_log(line.as_bytes()), None | Some(0)), "{line}");
        }
        let mut bytes = vec![0xff, 0xfe, b'\n'];
        bytes.extend_from_slice(format!("{HEAD} - Child <1> ended on error (4)").as_bytes());
        assert_eq!(parse_log(&bytes), Some(4));
    }

    #[test]
    fn the_sources_are_weighed() {
        let reboot = Some(OsStr::new("reboot"));
        let stop = Some(OsStr::new("stop"));
        let exit = |status, source| Some(Exit { status, source });
        let table = [
            (reboot, Some(0), Some(129), exit(129, "reboot")),
            (stop, Some(7), Some(0), exit(7, "pidfd")),
            (stop, Some(137), None, exit(137, "pidfd")),
            (stop, Some(0), Some(0), exit(0, "pidfd")),
            (stop, Some(0), None, exit(0, "pidfd")),
            // reboot(RB_POWER_OFF): the pidfd does not know.
            (stop, Some(0), Some(130), exit(130, "log")),
            (stop, Some(137), Some(130), exit(130, "log")),
            (stop, Some(137), Some(137), exit(137, "pidfd")),
            // The parent's word cannot turn a clean exit into another one.
            (stop, Some(0), Some(3), exit(0, "pidfd")),
            (None, None, Some(5), exit(5, "log")),
            (None, None, None, None),
        ];
        for (target, kernel, parent, wanted) in table {
            assert_eq!(decide(target, kernel, || exit(parent?, "log")), wanted);
        }
    }

    #[test]
    fn wait_statuses_are_read_as_containerd_reports_them() {
        for (wait, status) in [(0, 0), (7 << 8, 7), (255 << 8, 255), (9, 137), (0x80 | 11, 139)] {
            assert_eq!(from_wait(wait), Some(status));
        }
        // Stopped is not ended.
        assert_eq!(from_wait(0x137f), None);
    }

    #[test]
    fn oom_kills_are_read_from_both_versions() {
        let v2 = "low 0\nhigh 3\nmax 20\noom 2\noom_kill 1\noom_group_kill 0\n";
        let v1 = "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n";
        assert_eq!(parse_oom_kills(v2), Some(1));
        assert_eq!(parse_oom_kills(v1), Some(4));
        assert_eq!(parse_oom_kills("oom_kill_disable 0\n"), None);
        assert_eq!(parse_oom_kills("oom_kill x\n"), None);
    }

    #[test]
    fn a_pidfd_of_a_reaped_process_is_recognised() {
        assert!(is_reaped_pidfd("pos:\t0\nflags:\t02\nPid:\t-1\nNSpid:\t-1\n"));
        assert!(!is_reaped_pidfd("pos:\t0\nPid:\t17\nNSpid:\t17\n"));
        assert!(!is_reaped_pidfd("pos:\t0\nNSpid:\t-1\n"));
    }

    #[test]
    fn the_record_has_the_fields_of_the_protocol() {
        let exit = Exit { status: 137, source: "pidfd" };
        assert_eq!(
            render(&exit, 5, 1),
            "{\"version\":1,\"status\":137,\"time\":5,\"oom_kills\":1,\"source\":\"pidfd\"}\n"
        );
    }
}
