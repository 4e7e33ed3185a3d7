//! The OCI hooks that run in the container's namespaces.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::error::{Attempt, Error, Result, errno_text, quote};
use crate::protocol::{ContainerHooks, Hook};
use crate::sys;

/// Milliseconds between two looks at a running hook.
const HOOK_INTERVAL: i32 = 5;
/// What is kept of a hook's output.
const MAX_OUTPUT: usize = 4096;

/// Runs the `startContainer` hooks: their programs are the container's.
pub fn start_container(hooks: &ContainerHooks) -> Result<()> {
    run("startContainer", hooks)
}

/// Runs the `createContainer` hooks: in the container's namespaces, but before its root is the root,
/// so that their programs are the host's and the container lies at its path there, `rootfs`.
///
/// LXC has changed the root already. `host` is a copy of the host's tree, which becomes the root
/// once more, with the container's own mounts (not a copy of them) in their place; what a hook
/// mounts there is in the container afterwards.
pub fn create_container(hooks: &ContainerHooks, rootfs: &str, host: OwnedFd) -> Result<()> {
    let absolute = sys::c_string(rootfs).attempt(|| "path of the root file system")?;
    // Relative: before the change of the root an absolute path would be one of the container.
    let relative = sys::c_string(rootfs.trim_start_matches('/')).attempt(|| "path of the root")?;
    let enter = || {
        let root = sys::openat(sys::cwd(), c"/", libc::O_PATH | libc::O_DIRECTORY, 0)?;
        sys::attach_mount(host.as_fd(), root.as_fd())?;
        sys::fchdir(host.as_fd())?;
        sys::pivot_root(c".", &relative)?;
        sys::chdir(&absolute)
    };
    enter().attempt(|| format!("show the host and {} to createContainer hooks", quote(rootfs)))?;
    drop(host);
    run("createContainer", hooks)?;
    // As in pivot_root(2): the old root lies on the new one, and goes with all that is on it.
    let leave = || {
        sys::pivot_root(c".", c".")?;
        sys::detach_mount(c".")?;
        sys::chdir(c"/")
    };
    leave().attempt(|| "return from the host's root after createContainer hooks")
}

/// In order; the first failure ends it.
fn run(kind: &'static str, hooks: &ContainerHooks) -> Result<()> {
    let state = with_pid(&hooks.state_json, std::process::id());
    for (index, hook) in hooks.hooks.iter().enumerate() {
        run_hook(hook, &state).map_err(|reason| Error::Hook { kind, index, reason })?;
    }
    Ok(())
}

/// The state with the pid as the container sees it: the first member of the object.
fn with_pid(state: &str, pid: u32) -> String {
    match state.strip_prefix('{') {
        Some(members) => format!("{{\"pid\":{pid},{members}"),
        None => state.to_owned(),
    }
}

/// Standard output and error are one pipe, which is also read for the message of a failure;
/// `/dev/null` need not exist in the container.
fn run_hook(hook: &Hook, state: &str) -> std::result::Result<(), String> {
    let io = |e: io::Error| errno_text(&e);
    let (output, output_end) = sys::pipe().map_err(io)?;
    sys::set_nonblocking(output.as_fd()).map_err(io)?;
    let mut command = Command::new(&hook.path);
    if let [name, rest @ ..] = hook.args.as_slice() {
        command.arg0(name).args(rest);
    }
    command
        .env_clear()
        .envs(hook.env.iter().filter_map(|e| e.split_once('=')))
        .stdin(Stdio::piped())
        .stdout(output_end.try_clone().map_err(io)?)
        .stderr(output_end);
    let mut child =
        command.spawn().map_err(|e| format!("fork/exec {}: {}", hook.path, errno_text(&e)))?;
    // The command holds the pipe's other end.
    drop(command);
    let deadline = hook.timeout.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let mut text = Vec::new();
    let status = match wait_hook(&mut child, state, output, deadline, &mut text) {
        Ok(Some(status)) => status,
        unfinished => {
            let _ = child.kill();
            let _ = child.wait();
            return Err(match unfinished {
                Err(e) => io(e),
                Ok(_) => format!(
                    "hook ran past specified timeout of {}s",
                    hook.timeout.unwrap_or_default()
                ),
            });
        }
    };
    if status.success() {
        return Ok(());
    }
    let how = match status.signal() {
        Some(signal) => format!("signal {signal}"),
        None => format!("exit status {}", status.code().unwrap_or(-1)),
    };
    Err(format!("{how}, output: {}", String::from_utf8_lossy(&text).trim_end()))
}

/// Feeds and drains the hook until it ends; `None` if the time is over.
///
/// Looks every few milliseconds and by `waitpid` alone, because the container's seccomp filter is
/// in force already and need not know of pidfds.
fn wait_hook(
    child: &mut Child,
    state: &str,
    output: OwnedFd,
    deadline: Option<Instant>,
    text: &mut Vec<u8>,
) -> io::Result<Option<ExitStatus>> {
    let mut stdin = child.stdin.take();
    if let Some(pipe) = &stdin {
        sys::set_nonblocking(pipe.as_fd())?;
    }
    let mut output = File::from(output);
    let mut rest = state.as_bytes();
    loop {
        // A hook need not read its input: the state is written as there is room, and the pipe is
        // closed when all of it is in or the hook has closed its end.
        if let Some(pipe) = &mut stdin {
            match pipe.write(rest) {
                Ok(n) => rest = &rest[n..],
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => rest = &[],
            }
            if rest.is_empty() {
                stdin = None;
            }
        }
        let status = child.try_wait()?;
        let open = drain(&mut output, text)?;
        if status.is_some() || deadline.is_some_and(|d| Instant::now() >= d) {
            return Ok(status);
        }
        // A closed output is always readable, and the hook may go on without it.
        if open {
            sys::poll_readable([output.as_fd()], HOOK_INTERVAL)?;
        } else {
            std::thread::sleep(Duration::from_millis(HOOK_INTERVAL as u64));
        }
    }
}

/// Reads what is there; what exceeds [`MAX_OUTPUT`] is dropped. Answers whether more may come.
fn drain(output: &mut File, text: &mut Vec<u8>) -> io::Result<bool> {
    let mut buffer = [0; 1024];
    loop {
        match output.read(&mut buffer) {
            Ok(0) => return Ok(false),
            Ok(n) => {
                let room = MAX_OUTPUT.saturating_sub(text.len());
                text.extend_from_slice(&buffer[..n.min(room)]);
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(true),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(script: &str, timeout: Option<u64>) -> Hook {
        Hook {
            path: "/bin/sh".to_owned(),
            args: vec!["sh".to_owned(), "-c".to_owned(), script.to_owned()],
            env: vec!["A=b c".to_owned()],
            timeout,
        }
    }

    #[test]
    fn the_pid_is_the_one_in_the_container() {
        assert_eq!(with_pid("{\"id\":\"x\"}", 7), "{\"pid\":7,\"id\":\"x\"}");
    }

    #[test]
    fn a_hook_gets_state_and_exact_environment() {
        let script = "read -r line; [ \"$line\" = '{\"pid\":1}' ] && [ \"$A\" = 'b c' ] && \
                      [ -z \"$HOME\" ]";
        run_hook(&hook(script, None), "{\"pid\":1}\n").unwrap();
    }

    #[test]
    fn a_failing_hook_tells_why() {
        let hooks = ContainerHooks {
            hooks: vec![hook("true", None), hook("echo no; exit 3", None)],
            state_json: String::new(),
        };
        let error = start_container(&hooks);
        assert_eq!(
            error.unwrap_err().to_string(),
            "error running startContainer hook #1: exit status 3, output: no"
        );
        let missing = Hook { path: "/no/such".to_owned(), ..hook("", None) };
        let error = run_hook(&missing, "").unwrap_err();
        assert_eq!(error, "fork/exec /no/such: no such file or directory");
    }

    #[test]
    fn a_hook_that_hangs_is_killed() {
        let begin = Instant::now();
        let error = run_hook(&hook("exec sleep 60", Some(1)), "").unwrap_err();
        assert_eq!(error, "hook ran past specified timeout of 1s");
        assert!(begin.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_hook_that_ignores_its_input_and_talks_a_lot_ends() {
        let state = "x".repeat(1 << 20);
        run_hook(&hook("exec 1>&- 2>&-; sleep 0.1", None), &state).unwrap();
        run_hook(&hook("yes | head -c 300000", None), &state).unwrap();
    }
}
