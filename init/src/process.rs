//! Becoming an OCI process: shared by PID 1 and `exec`, so that an exec'd process can never have
//! more than the container's.
//!
//! The order matters. What needs privileges comes first; then the user changes; then whatever must
//! be seen with the user's eyes (working directory, lookup of the executable); the seccomp filter
//! comes as late as the kernel allows, because it must not hit what init still has to do.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::error::{Attempt, Error, Result, errno_text, quote};
use crate::protocol::{Process, Reply, Request, Seccomp};
use crate::rootfs::Root;
use crate::socket::Channel;
use crate::sys;

/// `/etc/passwd` comes from the image: a huge one must not cost memory or time.
const MAX_PASSWD: u64 = 1 << 20;
/// runc's default.
const DEFAULT_UMASK: u32 = 0o022;
const CAP_SYS_ADMIN: u64 = 1 << 21;

/// Turns this process into `process`. Returns only if that failed.
///
/// `before` runs last, with all of the process's restrictions: what it executes comes from the
/// image.
///
/// `procfs` is used as [`needs_procfs`] says, instead of the container's: that may be missing, or
/// covered by the image or by another process of the container.
pub fn execute(
    process: &Process,
    root: Root,
    procfs: Option<OwnedFd>,
    channel: &Channel,
    before: impl FnOnce() -> Result<()>,
) -> Error {
    match apply(process, root, procfs, channel, before) {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

enum Never {}

fn apply(
    process: &Process,
    root: Root,
    procfs: Option<OwnedFd>,
    channel: &Channel,
    before: impl FnOnce() -> Result<()>,
) -> Result<Never> {
    let file = process.args.first().ok_or(Error::Protocol("a process without arguments"))?;
    let args = c_strings(&process.args).attempt(|| "arguments of the process")?;
    let env = environment(&process.env, || home(&root, process.uid));
    let env_strings = c_strings(&env).attempt(|| "environment of the process")?;
    // Nothing of a directory may stay open: it would be reachable as /proc/self/fd/N by `cwd`.
    drop(root);

    set_privileged(process, procfs.as_ref())?;
    drop(procfs);
    match sys::new_session_keyring() {
        // Kernels without keys, and policies against them: nothing to separate then.
        Err(e) if !matches!(e.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) => {
            return Err(e).attempt(|| "join a session keyring");
        }
        _ => {}
    }
    if process.scope_abstract_sockets {
        sys::scope_abstract_sockets()
            .attempt(|| "scope the abstract Unix sockets (Landlock, kernel 6.12)")?;
    }
    sys::umask(process.umask.unwrap_or(DEFAULT_UMASK));

    if let Some(scheduler) = &process.scheduler {
        sys::set_scheduler(scheduler).attempt(|| "error setting scheduler")?;
    }
    if let Some(priority) = process.io_priority {
        sys::set_io_priority(priority).attempt(|| "error setting IO priority")?;
    }
    if let Some(policy) = &process.memory_policy {
        sys::set_memory_policy(policy.mode, &policy.nodes.0)
            .attempt(|| "error setting memory policy")?;
    }
    if let Some(personality) = process.personality {
        sys::set_personality(personality).attempt(|| "error setting personality")?;
    }

    let cwd = sys::c_string(&process.cwd).attempt(|| "working directory")?;
    let entered = sys::chdir(&cwd);
    let privileged_filter = process.seccomp.as_ref().filter(|_| !process.no_new_privileges);
    become_user(process, privileged_filter.is_some())?;
    match entered {
        // A directory on a network file system may admit the user but not root.
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => sys::chdir(&cwd),
        other => other,
    }
    .attempt(|| format!("chdir to cwd ({}) set in config.json failed", quote(&process.cwd)))?;
    verify_cwd()?;

    let path = variable(&env, "PATH").unwrap_or_default();
    let found = look_up(file, path)?;
    let executable = sys::c_string(&found).attempt(|| "path of the executable")?;

    sys::cloexec_all().attempt(|| "set close-on-exec")?;
    sys::reset_signals();
    if process.no_new_privileges {
        sys::set_no_new_privileges().attempt(|| "set no_new_privs")?;
        if let Some(seccomp) = &process.seccomp {
            load(seccomp, channel)?;
        }
    } else if let Some(seccomp) = privileged_filter {
        load(seccomp, channel)?;
        let wanted = &process.capabilities;
        sys::set_capabilities(wanted.effective, wanted.permitted, wanted.inheritable)
            .attempt(|| "drop CAP_SYS_ADMIN after loading the seccomp filter")?;
    }
    before()?;
    let source = sys::execve(&executable, &args, &env_strings);
    Err(Error::Execute { path: found, source })
}

/// Whether the process has settings that exist only as files of procfs.
pub fn needs_procfs(process: &Process) -> bool {
    process.oom_score_adj.is_some() || process.apparmor_profile.is_some()
}

/// The settings that take privileges on the node: root of a user namespace has none of them.
pub fn set_privileged(process: &Process, procfs: Option<&OwnedFd>) -> Result<()> {
    for limit in &process.rlimits {
        sys::set_rlimit(limit.resource, limit.soft, limit.hard)
            .attempt(|| format!("error setting rlimit type {}", limit.resource))?;
    }
    if !needs_procfs(process) {
        return Ok(());
    }
    let proc = procfs.ok_or(Error::Protocol("a procfs is missing"))?;
    if let Some(score) = process.oom_score_adj {
        let path = c"thread-self/oom_score_adj";
        let text = score.to_string();
        // Lowering needs CAP_SYS_RESOURCE even if the value does not change.
        let current = read_at(proc, path).unwrap_or_default();
        if current.trim() != text {
            write_at(proc, path, &text).attempt(|| {
                format!("write oom_score_adj {text} (lowering needs CAP_SYS_RESOURCE)")
            })?;
        }
    }
    if let Some(profile) = &process.apparmor_profile {
        let text = format!("exec {profile}");
        write_at(proc, c"thread-self/attr/apparmor/exec", &text)
            .or_else(|e| match e.kind() {
                io::ErrorKind::NotFound => write_at(proc, c"thread-self/attr/exec", &text),
                _ => Err(e),
            })
            .attempt(|| format!("unable to apply apparmor profile {}", quote(profile)))?;
    }
    Ok(())
}

/// A procfs mount that is attached nowhere.
pub fn private_procfs() -> Result<OwnedFd> {
    let mount = || {
        let fs = sys::fs_open(c"proc")?;
        sys::fs_mount(fs.as_fd(), 0)
    };
    mount().attempt(|| "mount a private procfs")
}

fn read_at(dir: &OwnedFd, path: &CStr) -> io::Result<String> {
    let mut text = String::new();
    File::from(sys::openat(dir.as_fd(), path, libc::O_RDONLY, 0)?).read_to_string(&mut text)?;
    Ok(text)
}

/// One `write(2)`: files of procfs do not take a value in pieces.
pub fn write_at(dir: &OwnedFd, path: &CStr, text: &str) -> io::Result<()> {
    let mut file = File::from(sys::openat(dir.as_fd(), path, libc::O_WRONLY, 0)?);
    match file.write(text.as_bytes())? {
        n if n == text.len() => Ok(()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}

/// Bounding set, groups, user, and the other capability sets. With `keep_admin`, CAP_SYS_ADMIN
/// stays until the filter is loaded: without no_new_privs the kernel demands it. So the filter has
/// to allow only `capset` and `execve`, not the calls made here.
pub(crate) fn become_user(process: &Process, keep_admin: bool) -> Result<()> {
    let wanted = &process.capabilities;
    for capability in 0..64 {
        match sys::bounding_has(capability) {
            None => break,
            Some(true) if wanted.bounding & (1 << capability) == 0 => {
                sys::bounding_drop(capability)
                    .attempt(|| format!("drop capability {capability} from the bounding set"))?;
            }
            Some(_) => {}
        }
    }
    // A change of user clears what kills the CT together with lxc-start; see prctl(2).
    let death_signal = sys::parent_death_signal().attempt(|| "read the parent death signal")?;
    if process.uid != 0 {
        sys::keep_capabilities(true).attempt(|| "set keep caps")?;
    }
    sys::set_groups(&process.additional_gids).attempt(|| "setgroups")?;
    sys::set_gid(process.gid).attempt(|| format!("setgid {}", process.gid))?;
    sys::set_uid(process.uid).attempt(|| format!("setuid {}", process.uid))?;
    if process.uid != 0 {
        sys::keep_capabilities(false).attempt(|| "clear keep caps")?;
    }
    if death_signal != 0 {
        sys::set_parent_death_signal(death_signal).attempt(|| "set the parent death signal")?;
    }
    let extra = if keep_admin { CAP_SYS_ADMIN } else { 0 };
    sys::set_capabilities(wanted.effective | extra, wanted.permitted | extra, wanted.inheritable)
        .attempt(|| "unable to apply caps (is one of them not available on this node?)")?;
    sys::ambient_clear().attempt(|| "clear the ambient capabilities")?;
    for capability in (0..64).filter(|c| wanted.ambient & (1 << c) != 0) {
        sys::ambient_raise(capability)
            .attempt(|| format!("can't raise ambient capability {capability}"))?;
    }
    Ok(())
}

/// With a listener, nothing may follow before its agent has it: the shim's word is waited for.
fn load(seccomp: &Seccomp, channel: &Channel) -> Result<()> {
    let listener = sys::load_seccomp(seccomp.flags, &seccomp.program)
        .attempt(|| "error loading seccomp filter into kernel")?;
    let Some(listener) = listener else { return Ok(()) };
    channel.send(&Reply::Listener, &[listener.as_fd()])?;
    match channel.receive()? {
        (Request::Listening, _) => Ok(()),
        _ => Err(Error::Protocol("expected Listening")),
    }
}

/// A working directory outside the root would be a way out of the container.
fn verify_cwd() -> Result<()> {
    let cwd = sys::getcwd().attempt(|| "failed to verify if current working directory is safe")?;
    if cwd.first() == Some(&b'/') {
        return Ok(());
    }
    Err(Error::Refused {
        object: "current working directory".to_owned(),
        reason: "is outside of container mount namespace root -- possible container breakout \
                 detected",
    })
}

fn c_strings(list: &[String]) -> io::Result<Vec<CString>> {
    list.iter().map(sys::c_string).collect()
}

/// The value of the last assignment, as `getenv` in Go sees it.
fn variable<'a>(env: &'a [String], name: &str) -> Option<&'a str> {
    env.iter().rev().find_map(|e| e.strip_prefix(name)?.strip_prefix('='))
}

/// The environment with HOME. An empty HOME counts as missing, as in runc.
fn environment(env: &[String], home: impl FnOnce() -> String) -> Vec<String> {
    if variable(env, "HOME").is_some_and(|h| !h.is_empty()) {
        return env.to_vec();
    }
    let mut env: Vec<String> = env.iter().filter(|e| !e.starts_with("HOME=")).cloned().collect();
    env.push(format!("HOME={}", home()));
    env
}

/// The user's home directory in the container's `/etc/passwd`, else `/`.
fn home(root: &Root, uid: u32) -> String {
    // Not blocking: the image may have put a FIFO there.
    let flags = libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOCTTY;
    root.open_at("/etc/passwd", flags)
        .ok()
        .filter(|fd| {
            sys::fstat(fd.as_fd()).is_ok_and(|s| s.st_mode & libc::S_IFMT == libc::S_IFREG)
        })
        .and_then(|fd| find_home(File::from(fd), uid))
        .unwrap_or_else(|| "/".to_owned())
}

fn find_home(passwd: impl Read, uid: u32) -> Option<String> {
    let mut reader = BufReader::new(passwd.take(MAX_PASSWD));
    let mut line = Vec::new();
    loop {
        line.clear();
        if reader.read_until(b'\n', &mut line).ok()? == 0 {
            return None;
        }
        let Ok(text) = std::str::from_utf8(&line) else {
            continue;
        };
        let mut fields = text.trim().split(':');
        let (Some(_), Some(_), Some(id)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        if id.parse() == Ok(uid) {
            return fields
                .nth(2)
                .filter(|home| !home.is_empty() && !home.contains('\0'))
                .map(str::to_owned);
        }
    }
}

/// Finds the executable as Go's `exec.LookPath` does, with its error texts.
fn look_up(file: &str, path: &str) -> Result<String> {
    let fail = |reason: String| Error::Lookup { file: file.to_owned(), reason };
    if file.contains('/') {
        return match check_executable(file) {
            Ok(()) => Ok(file.to_owned()),
            Err(reason) => Err(fail(reason)),
        };
    }
    if !file.is_empty() && !path.is_empty() {
        for directory in path.split(':') {
            let directory = if directory.is_empty() { "." } else { directory };
            let candidate = Path::new(directory).join(file);
            let Some(candidate) = candidate.to_str() else {
                continue;
            };
            if check_executable(candidate).is_ok() {
                if !candidate.starts_with('/') {
                    let reason = "cannot run executable found relative to current directory";
                    return Err(fail(reason.to_owned()));
                }
                return Ok(candidate.to_owned());
            }
        }
    }
    Err(fail("executable file not found in $PATH".to_owned()))
}

fn check_executable(path: &str) -> std::result::Result<(), String> {
    let c_path =
        sys::c_string(Path::new(path).as_os_str().as_bytes()).map_err(|e| errno_text(&e))?;
    let status = sys::stat(&c_path).map_err(|e| format!("stat {path}: {}", errno_text(&e)))?;
    if status.st_mode & libc::S_IFMT == libc::S_IFDIR {
        return Err(errno_text(&io::Error::from_raw_os_error(libc::EISDIR)));
    }
    match sys::may_execute(&c_path) {
        // Root "may" execute a file without any x bit according to some file systems.
        Ok(()) if status.st_mode & 0o111 != 0 => Ok(()),
        Ok(()) => Err(errno_text(&io::Error::from_raw_os_error(libc::EACCES))),
        Err(e) => Err(errno_text(&e)),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn lookup_speaks_like_go() {
        let dir = std::env::temp_dir().join(format!("init-lookup-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(dir.join("bin/sub")).unwrap();
        fs::create_dir_all(dir.join("other")).unwrap();
        for (name, mode) in [("bin/plain", 0o644), ("other/tool", 0o755), ("bin/tool", 0o644)] {
            fs::write(dir.join(name), "").unwrap();
            fs::set_permissions(dir.join(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        let at = |name: &str| dir.join(name).to_str().unwrap().to_owned();
        let path = format!("{}:/nowhere:{}", at("bin"), at("other"));
        let absent = at("foo");
        let table = [
            // A file that is not executable does not end the search.
            ("tool".to_owned(), Ok(at("other/tool"))),
            (at("other/tool"), Ok(at("other/tool"))),
            ("foo".to_owned(), Err("executable file not found in $PATH".to_owned())),
            (String::new(), Err("executable file not found in $PATH".to_owned())),
            ("sub".to_owned(), Err("executable file not found in $PATH".to_owned())),
            (absent.clone(), Err(format!("stat {absent}: no such file or directory"))),
            (at("bin/plain"), Err("permission denied".to_owned())),
            (at("bin/sub"), Err("is a directory".to_owned())),
            (at("bin/plain/x"), Err(format!("stat {}: not a directory", at("bin/plain/x")))),
        ];
        for (file, wanted) in table {
            let got = look_up(&file, &path).map_err(|e| e.to_string());
            let wanted = wanted.map_err(|reason| format!("exec: \"{file}\": {reason}"));
            assert_eq!(got, wanted);
        }
        assert!(look_up("tool", "").is_err());
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn home_comes_from_passwd() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\n\
                      # comment\n\
                      :::\n\
                      broken:x:5\n\
                      web:x:33:33::/srv:/bin/false\n\
                      web2:x:33:33::/second:/bin/false\n\
                      none:x:7:7:::\n\
                      plus:x:+8:8::/plus:\n";
        let find = |uid| find_home(passwd.as_bytes(), uid);
        assert_eq!(find(0).as_deref(), Some("/root"));
        assert_eq!(find(33).as_deref(), Some("/srv"));
        assert_eq!(find(7), None);
        assert_eq!(find(5), None);
        assert_eq!(find(99), None);
    }

    #[test]
    fn a_huge_passwd_is_not_read_to_its_end() {
        let late = io::repeat(b'x').take(MAX_PASSWD).chain(&b"\nu:x:1:1::/late:\n"[..]);
        assert_eq!(find_home(late, 1), None);
        let binary = b"\xff\xfe:x:1:1::/no:\nu:x:1:1::/yes:\n";
        assert_eq!(find_home(&binary[..], 1).as_deref(), Some("/yes"));
    }

    #[test]
    fn home_is_added_only_if_missing() {
        let add = |env: &[&str]| {
            let env: Vec<String> = env.iter().map(|e| (*e).to_owned()).collect();
            environment(&env, || "/h".to_owned())
        };
        assert_eq!(add(&["A=1", "HOME=/x"]), ["A=1", "HOME=/x"]);
        assert_eq!(add(&["HOME=", "A=1"]), ["A=1", "HOME=/h"]);
        assert_eq!(add(&[]), ["HOME=/h"]);
    }
}
