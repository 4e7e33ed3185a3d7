//! Plays the shim: starts the built binary as PID 1 of a real CT of the system's `lxc-start`.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use proxmox_shim_init::protocol::*;
use proxmox_shim_init::sys;

pub const BINARY: &str = env!("CARGO_BIN_EXE_proxmox-shim-init");
const PATIENCE: Duration = Duration::from_secs(30);
/// Docker's default set.
pub const DEFAULT_CAPS: u64 = 0xa804_25fb;

/// What is missing to run CTs here.
pub fn missing() -> Option<&'static str> {
    // SAFETY: no arguments.
    if unsafe { libc::geteuid() } != 0 {
        return Some("needs root");
    }
    for program in ["/usr/bin/lxc-start", "/bin/busybox"] {
        if !Path::new(program).exists() {
            return Some("needs the packages lxc and busybox-static");
        }
    }
    None
}

fn check(result: i32) -> i32 {
    assert!(result >= 0, "{}", std::io::Error::last_os_error());
    result
}

fn own(fd: i32) -> OwnedFd {
    // SAFETY: made by the call whose result this is.
    unsafe { OwnedFd::from_raw_fd(check(fd)) }
}

pub fn pair() -> (OwnedFd, OwnedFd) {
    let mut fds = [0; 2];
    // SAFETY: two descriptors are written.
    check(unsafe {
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
        libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr())
    });
    (own(fds[0]), own(fds[1]))
}

pub fn memfd<T: serde::Serialize>(value: &T) -> OwnedFd {
    // SAFETY: the name is a C string.
    let fd = own(unsafe { libc::memfd_create(c"setup".as_ptr(), libc::MFD_CLOEXEC) });
    let mut file = File::from(fd);
    file.write_all(&postcard::to_allocvec(value).unwrap()).unwrap();
    file.into()
}

pub fn send(socket: &OwnedFd, request: &Request, fds: &[BorrowedFd<'_>]) {
    sys::send(socket.as_fd(), &postcard::to_allocvec(request).unwrap(), fds).unwrap();
}

/// `None` at the end of the connection.
pub fn receive(socket: &OwnedFd) -> Option<(Reply, Vec<OwnedFd>)> {
    let [ready] = sys::poll_readable([socket.as_fd()], PATIENCE.as_millis() as i32).unwrap();
    assert!(ready, "init says nothing");
    let mut buffer = vec![0; MAX_DATAGRAM];
    match sys::receive(socket.as_fd(), &mut buffer) {
        Ok((0, _)) => None,
        Err(e) if e.raw_os_error() == Some(libc::ECONNRESET) => None,
        other => {
            let (length, fds) = other.unwrap();
            Some((postcard::from_bytes(&buffer[..length]).unwrap(), fds))
        }
    }
}

/// A detached clone of `path`, private, as the shim makes it.
pub fn detached(path: impl AsRef<Path>, attributes: u64) -> OwnedFd {
    let file = File::open(path).unwrap();
    let mount = sys::clone_mount(file.as_fd(), false).unwrap();
    sys::change_mount(mount.as_fd(), attributes, libc::MS_PRIVATE, false).unwrap();
    mount
}

/// A pipe whose write end the workload gets, and its reader.
pub struct Output(OwnedFd);

impl Output {
    pub fn new() -> (Self, OwnedFd) {
        let (read, write) = sys::pipe().unwrap();
        (Self(read), write)
    }

    pub fn read(self) -> String {
        let mut text = Vec::new();
        File::from(self.0).read_to_end(&mut text).unwrap();
        String::from_utf8_lossy(&text).into_owned()
    }
}

fn root() -> File {
    File::open("/").unwrap()
}

pub fn null() -> OwnedFd {
    File::options().read(true).write(true).open("/dev/null").unwrap().into()
}

pub fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|s| (*s).to_owned()).collect()
}

pub fn process(args: &[&str]) -> Process {
    Process {
        args: strings(args),
        env: strings(&["PATH=/bin:/usr/bin", "A=b"]),
        cwd: "/".to_owned(),
        uid: 0,
        gid: 0,
        additional_gids: vec![],
        umask: None,
        capabilities: Capabilities {
            bounding: DEFAULT_CAPS,
            effective: DEFAULT_CAPS,
            permitted: DEFAULT_CAPS,
            inheritable: 0,
            ambient: 0,
        },
        rlimits: vec![],
        no_new_privileges: true,
        oom_score_adj: None,
        apparmor_profile: None,
        seccomp: None,
        scope_abstract_sockets: false,
        terminal: None,
        scheduler: None,
        io_priority: None,
        exec_cpu_affinity: ExecCpuAffinity::default(),
        memory_policy: None,
        personality: None,
    }
}

pub fn filesystem(destination: &str, fstype: &str, flags: u64, data: &str) -> Mount {
    Mount {
        destination: destination.to_owned(),
        source: MountSource::Filesystem {
            source: fstype.to_owned(),
            fstype: fstype.to_owned(),
            flags,
            data: data.to_owned(),
        },
        copy_up: false,
        propagation: vec![],
    }
}

pub fn bind(destination: &str, directory: bool) -> Mount {
    Mount {
        destination: destination.to_owned(),
        source: MountSource::Detached { directory },
        copy_up: false,
        propagation: vec![],
    }
}

fn device(path: &str, major: u32, minor: u32) -> Device {
    Device { path: path.to_owned(), mode: libc::S_IFCHR | 0o666, major, minor, uid: 0, gid: 0 }
}

/// What containerd asks for by default.
pub fn setup(args: &[&str]) -> ContainerSetup {
    let guarded = libc::MS_NOSUID | libc::MS_NOEXEC | libc::MS_NODEV;
    ContainerSetup {
        version: VERSION,
        hostname: Some("box".to_owned()),
        domainname: None,
        time_namespace: TimeNamespace::Host,
        loopback_up: true,
        mounts: vec![
            filesystem("/proc", "proc", guarded, ""),
            filesystem(
                "/dev",
                "tmpfs",
                libc::MS_NOSUID | libc::MS_STRICTATIME,
                "mode=755,size=65536k",
            ),
            filesystem(
                "/dev/pts",
                "devpts",
                libc::MS_NOSUID | libc::MS_NOEXEC,
                "newinstance,ptmxmode=0666,mode=0620,gid=5",
            ),
            filesystem("/dev/shm", "tmpfs", guarded, "mode=1777,size=65536k"),
            filesystem("/dev/mqueue", "mqueue", guarded, ""),
            filesystem("/sys", "sysfs", guarded | libc::MS_RDONLY, ""),
        ],
        root_propagation: None,
        root_readonly: false,
        devices: vec![
            device("/dev/null", 1, 3),
            device("/dev/zero", 1, 5),
            device("/dev/full", 1, 7),
            device("/dev/random", 1, 8),
            device("/dev/urandom", 1, 9),
            device("/dev/tty", 5, 0),
        ],
        links: [
            ("/proc/self/fd", "/dev/fd"),
            ("/proc/self/fd/0", "/dev/stdin"),
            ("/proc/self/fd/1", "/dev/stdout"),
            ("/proc/self/fd/2", "/dev/stderr"),
            ("pts/ptmx", "/dev/ptmx"),
        ]
        .map(|(from, to)| (from.to_owned(), to.to_owned()))
        .into(),
        sysctls: vec![],
        masked_paths: strings(&["/proc/acpi", "/proc/kcore", "/proc/keys", "/nowhere"]),
        readonly_paths: strings(&["/proc/bus", "/proc/sys", "/proc/irq", "/proc/nowhere"]),
        create_container: ContainerHooks::default(),
        rootfs: "/".to_owned(),
        start_container: ContainerHooks { hooks: vec![], state_json: "{\"id\":\"x\"}".to_owned() },
        process: process(args),
    }
}

/// One CT and the directory with everything that belongs to it.
pub struct Ct {
    pub dir: PathBuf,
    pub name: String,
    /// Of the CT's PID 1, on the host; 0 before it has connected.
    pub pid: i32,
    lxc: Option<Child>,
    listener: OwnedFd,
    socket: Option<OwnedFd>,
}

impl Ct {
    /// A rootfs of busybox and what the test build of the binary links to, and an LXC
    /// configuration as the shim writes it.
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("init-test-{}-{number}", std::process::id());
        let dir = std::env::temp_dir().join(&name);
        let rootfs = dir.join("rootfs");
        for path in ["bin", "etc", "tmp", "proc", "sys", "root"] {
            fs::create_dir_all(rootfs.join(path)).unwrap();
        }
        fs::create_dir_all(dir.join("lxc").join(&name)).unwrap();
        fs::create_dir_all(dir.join("ctl")).unwrap();
        fs::set_permissions(rootfs.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
        fs::copy("/bin/busybox", rootfs.join("bin/busybox")).unwrap();
        for applet in fs::read_to_string(applets()).unwrap().lines() {
            symlink("busybox", rootfs.join("bin").join(applet)).ok();
        }
        let ldd = Command::new("ldd").arg(BINARY).output().unwrap();
        for library in
            String::from_utf8_lossy(&ldd.stdout).split_whitespace().filter(|w| w.starts_with('/'))
        {
            let copy = rootfs.join(&library[1..]);
            fs::create_dir_all(copy.parent().unwrap()).unwrap();
            fs::copy(library, copy).unwrap();
        }
        fs::copy(BINARY, dir.join("ctl").join(BINARY_NAME)).unwrap();
        let config = format!(
            "lxc.autodev = 0\nlxc.pty.max = 0\nlxc.tty.max = 0\nlxc.console.path = none\n\
             lxc.rootfs.path = dir:{rootfs}\n\
             lxc.mount.entry = none dev tmpfs nosuid,mode=755,size=64k,create=dir 0 0\n\
             lxc.mount.entry = {dir}/ctl dev/.proxmox-shim none bind,create=dir 0 0\n\
             lxc.init.cmd = /dev/.proxmox-shim/init init\n\
             lxc.hook.version = 1\n\
             lxc.hook.stop = {BINARY} hook stop {dir}\n\
             lxc.hook.start-host = {BINARY} hook start-host {dir}\n\
             lxc.hook.post-stop = {BINARY} hook post-stop\n\
             lxc.log.level = INFO\nlxc.log.file = {dir}/lxc.log\n",
            rootfs = rootfs.display(),
            dir = dir.display(),
        );
        let listener = listen(&dir.join("ctl").join(SOCKET_NAME));
        let ct = Self { dir, name, pid: 0, lxc: None, listener, socket: None };
        fs::write(ct.config(), config).unwrap();
        ct
    }

    /// One whose lxc-start writes no log, as that of LXC 6.
    pub fn without_log() -> Self {
        let ct = Self::new();
        let config = fs::read_to_string(ct.config()).unwrap();
        let (config, _) = config.split_once("lxc.log.").unwrap();
        fs::write(ct.config(), config).unwrap();
        ct
    }

    fn lxc_path(&self) -> PathBuf {
        self.dir.join("lxc")
    }

    fn config(&self) -> PathBuf {
        self.lxc_path().join(&self.name).join("config")
    }

    pub fn rootfs(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    /// Starts LXC without waiting for init.
    pub fn spawn(&mut self) {
        let output = File::create(self.dir.join("lxc-start.out")).unwrap();
        let child = Command::new("lxc-start")
            .args(["-F", "-n", &self.name, "-P"])
            .arg(self.lxc_path())
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap();
        self.lxc = Some(child);
    }

    /// Starts LXC, accepts init and takes its Hello.
    pub fn connect(&mut self) {
        self.spawn();
        let [ready] =
            sys::poll_readable([self.listener.as_fd()], PATIENCE.as_millis() as i32).unwrap();
        assert!(ready, "init did not connect: {}", self.output());
        // SAFETY: no address is asked for.
        let socket = own(unsafe {
            let (address, length) = (std::ptr::null_mut(), std::ptr::null_mut());
            libc::accept4(self.listener.as_raw_fd(), address, length, libc::SOCK_CLOEXEC)
        });
        let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
        let mut length = size_of::<libc::ucred>() as libc::socklen_t;
        // SAFETY: the kernel writes one ucred.
        check(unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERCRED,
                (&raw mut peer).cast(),
                &mut length,
            )
        });
        self.pid = peer.pid;
        let (reply, _) = receive(&socket).unwrap();
        assert!(matches!(reply, Reply::Hello { version: VERSION }), "{reply:?}");
        self.socket = Some(socket);
    }

    fn socket(&self) -> &OwnedFd {
        self.socket.as_ref().unwrap()
    }

    /// Sends the setup, the detached mounts, and takes the next reply.
    pub fn set_up(
        &mut self,
        setup: &ContainerSetup,
        mounts: &[OwnedFd],
        stdio: &[OwnedFd],
    ) -> (Reply, Vec<OwnedFd>) {
        self.connect();
        self.describe(setup, mounts, stdio)
    }

    /// [`Ct::set_up`] of a CT that is connected.
    pub fn describe(
        &mut self,
        setup: &ContainerSetup,
        mounts: &[OwnedFd],
        stdio: &[OwnedFd],
    ) -> (Reply, Vec<OwnedFd>) {
        let memory = memfd(setup);
        let fds: Vec<BorrowedFd<'_>> =
            std::iter::once(&memory).chain(stdio).map(AsFd::as_fd).collect();
        let request = Request::Container { stdio: !stdio.is_empty() };
        send(self.socket(), &request, &fds);
        for batch in mounts.chunks(DESCRIPTORS_PER_MESSAGE) {
            let fds: Vec<BorrowedFd<'_>> = batch.iter().map(AsFd::as_fd).collect();
            send(self.socket(), &Request::Descriptors, &fds);
        }
        let mounted = receive(self.socket()).expect("init ended before it had mounted");
        if !matches!(mounted.0, Reply::Mounted) {
            return mounted;
        }
        let host = (!setup.create_container.hooks.is_empty())
            .then(|| sys::clone_mount(root().as_fd(), true).unwrap());
        if let Some(host) = &host {
            sys::change_mount(host.as_fd(), 0, libc::MS_SLAVE, true).unwrap();
        }
        let fds: Vec<BorrowedFd<'_>> = host.iter().map(AsFd::as_fd).collect();
        send(self.socket(), &Request::Finish, &fds);
        receive(self.socket()).expect("init ended before it was ready")
    }

    /// `Err` is the message of a failure.
    pub fn go(&mut self) -> Result<(), String> {
        send(self.socket(), &Request::Go, &[]);
        let reply = receive(self.socket());
        self.socket = None;
        match reply {
            None => Ok(()),
            Some((Reply::Failed { message }, _)) => Err(message),
            Some((other, _)) => panic!("{other:?}"),
        }
    }

    /// Runs a workload to its end and returns what it printed.
    pub fn run(&mut self, setup: &ContainerSetup, mounts: &[OwnedFd]) -> String {
        let (output, writer) = Output::new();
        let stdio = [null(), writer.try_clone().unwrap(), writer];
        let (reply, _) = self.set_up(setup, mounts, &stdio);
        drop(stdio);
        assert!(matches!(reply, Reply::Ready { terminal: false }), "{reply:?}");
        self.go().unwrap();
        let text = output.read();
        self.wait();
        text
    }

    /// The message with which setting up fails.
    pub fn refusal(&mut self, setup: &ContainerSetup, mounts: &[OwnedFd]) -> String {
        match self.set_up(setup, mounts, &[null(), null(), null()]).0 {
            Reply::Failed { message } => message,
            other => panic!("{other:?}"),
        }
    }

    /// Starts a workload that stays, and returns when it has been executed.
    pub fn start(&mut self, setup: &ContainerSetup) {
        let (reply, _) = self.set_up(setup, &[], &[null(), null(), null()]);
        assert!(matches!(reply, Reply::Ready { .. }), "{reply:?}");
        self.go().unwrap();
    }

    pub fn disconnect(&mut self) {
        self.socket = None;
    }

    /// Waits until lxc-start has ended.
    pub fn wait(&mut self) {
        let end = Instant::now() + PATIENCE;
        let lxc = self.lxc.as_mut().unwrap();
        while lxc.try_wait().unwrap().is_none() {
            assert!(Instant::now() < end, "lxc-start does not end");
            std::thread::sleep(Duration::from_millis(2));
        }
        self.lxc = None;
    }

    pub fn output(&self) -> String {
        fs::read_to_string(self.dir.join("lxc-start.out")).unwrap_or_default()
    }

    /// `exit.json`.
    pub fn record(&self) -> String {
        fs::read_to_string(self.dir.join("exit.json")).expect("no exit.json")
    }

    /// The watcher's pid, if there is one.
    pub fn watcher(&self) -> Option<u32> {
        let line = format!("{BINARY}\0hook\0start-host\0{}\0", self.dir.display());
        let processes = fs::read_dir("/proc").unwrap().flatten();
        processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find(|pid: &u32| {
            fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|l| l == line.as_bytes())
        })
    }

    /// The record as the stop hook writes it where the kernel says nothing: its caller is not
    /// lxc-start here.
    pub fn record_without_pidfd(&self) -> String {
        let mut hook = Command::new(BINARY);
        hook.args(["hook", "stop"]).arg(&self.dir).env("LXC_TARGET", "stop");
        assert!(hook.status().unwrap().success());
        self.record()
    }

    pub fn signal_lxc(&self, signal: i32) {
        // SAFETY: numbers only; it is this process's child.
        check(unsafe { libc::kill(self.lxc.as_ref().unwrap().id() as i32, signal) });
    }

    pub fn kill(&self, signal: i32) {
        // SAFETY: numbers only.
        check(unsafe { libc::kill(self.pid, signal) });
    }

    /// Has PID 1 a handler for the signal? Without one it ignores all that can be ignored.
    pub fn catches(&self, signal: i32) -> bool {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap();
        let caught = status.lines().find_map(|l| l.strip_prefix("SigCgt:")).unwrap().trim();
        u64::from_str_radix(caught, 16).unwrap() & (1 << (signal - 1)) != 0
    }

    /// `exec` mode. `Err` is the message of a failure.
    pub fn exec(&self, process: &Process, stdio: &[OwnedFd]) -> Result<Exec, String> {
        let (ours, theirs) = pair();
        let mut command = Command::new(BINARY);
        command.arg("exec").stdin(Stdio::null());
        // SAFETY: dup2 is async-signal-safe.
        unsafe {
            command.pre_exec(move || {
                check(libc::dup2(theirs.as_raw_fd(), EXEC_SOCKET_FD));
                // Something of the host that must not reach the workload.
                check(libc::open(c"/".as_ptr(), libc::O_RDONLY));
                if theirs.as_raw_fd() == EXEC_SOCKET_FD {
                    check(libc::fcntl(EXEC_SOCKET_FD, libc::F_SETFD, 0));
                }
                Ok(())
            });
        }
        let mut helper = command.spawn().unwrap();
        drop(command);
        let setup = ExecSetup {
            version: VERSION,
            namespaces: (libc::CLONE_NEWNS
                | libc::CLONE_NEWPID
                | libc::CLONE_NEWNET
                | libc::CLONE_NEWIPC
                | libc::CLONE_NEWUTS
                | libc::CLONE_NEWCGROUP) as u32,
            process: process.clone(),
        };
        let (directory, tasks) = cgroup_files(self.pid);
        let mut fds = vec![memfd(&setup), sys::pidfd_open(self.pid as u32).unwrap()];
        let request = Request::Exec {
            cgroup: match directory {
                Some(_) => ExecCgroup::Directory,
                None => ExecCgroup::Tasks,
            },
            cgroup_files: tasks.len() + usize::from(directory.is_some()),
            stdio: !stdio.is_empty(),
        };
        fds.extend(directory);
        fds.extend(tasks);
        let all: Vec<BorrowedFd<'_>> = fds.iter().chain(stdio).map(AsFd::as_fd).collect();
        send(&ours, &request, &all);

        let (reply, mut fds) = receive(&ours).expect("no reply");
        let pid = match reply {
            Reply::Spawned { pid } => pid,
            Reply::Failed { message } => {
                helper.wait().unwrap();
                return Err(message);
            }
            other => panic!("{other:?}"),
        };
        let pidfd = fds.pop().expect("a pidfd");
        assert!(helper.wait().unwrap().success());
        let mut exec = Exec { pid, pidfd, terminal: None };
        match receive(&ours) {
            Some((Reply::Ready { terminal }, mut fds)) => {
                exec.terminal = fds.pop();
                assert_eq!(exec.terminal.is_some(), terminal);
            }
            Some((Reply::Failed { message }, _)) => {
                assert_eq!(exec.wait(), 127 << 8);
                return Err(message);
            }
            other => panic!("{other:?}"),
        }
        match receive(&ours) {
            None => Ok(exec),
            Some((Reply::Failed { message }, _)) => {
                assert_eq!(exec.wait(), 127 << 8);
                Err(message)
            }
            Some(other) => panic!("{other:?}"),
        }
    }

    /// Runs a shell script by `exec` mode: what it printed and its wait status.
    pub fn exec_script(&self, script: &str) -> (String, i32) {
        self.exec_output(&process(&["sh", "-c", script]))
    }

    pub fn exec_output(&self, process: &Process) -> (String, i32) {
        let (output, writer) = Output::new();
        let stdio = [null(), writer.try_clone().unwrap(), writer];
        let exec = self.exec(process, &stdio).unwrap();
        drop(stdio);
        (output.read(), exec.wait())
    }
}

impl Drop for Ct {
    fn drop(&mut self) {
        self.socket = None;
        if let Some(mut lxc) = self.lxc.take() {
            if self.pid != 0 {
                // SAFETY: numbers only; PID 1 is not reaped before lxc-start ends.
                unsafe { libc::kill(self.pid, libc::SIGKILL) };
            }
            let end = Instant::now() + Duration::from_secs(10);
            while lxc.try_wait().unwrap().is_none() && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(5));
            }
            let _ = lxc.kill();
            let _ = lxc.wait();
        }
        if std::thread::panicking() {
            eprintln!("{}", fs::read_to_string(self.dir.join("lxc.log")).unwrap_or_default());
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// The lxc-monitord of a CT's LXC path.
pub struct Monitor(Child, PathBuf);

impl Monitor {
    pub fn start(ct: &Ct) -> Self {
        let path = ct.lxc_path();
        let mut command = Command::new("/usr/libexec/lxc/lxc-monitord");
        let child = command.arg("--daemon").arg(&path).spawn().unwrap();
        let monitor = Self(child, path);
        eventually("lxc-monitord listens", || monitor.sockets() > 0);
        monitor
    }

    /// The listening one and one for each listener.
    pub fn sockets(&self) -> usize {
        let end = format!("/{}", self.1.display());
        let table = fs::read_to_string("/proc/net/unix").unwrap();
        table.lines().filter(|l| l.contains(" @lxc/") && l.ends_with(&end)).count()
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // SAFETY: numbers only. SIGTERM makes it remove its FIFO.
        unsafe { libc::kill(self.0.id() as i32, libc::SIGTERM) };
        let _ = self.0.wait();
        let run = format!("/run/lxc/{}", self.1.display());
        for directory in Path::new(&run).ancestors().take_while(|d| *d != Path::new("/run/lxc")) {
            if fs::remove_dir(directory).is_err() {
                break;
            }
        }
    }
}

pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A process that `exec` mode has started: a child of the test, as it would be of the shim.
pub struct Exec {
    pub pid: i32,
    pub pidfd: OwnedFd,
    pub terminal: Option<OwnedFd>,
}

impl Exec {
    /// The wait status.
    pub fn wait(&self) -> i32 {
        let mut status = 0;
        // SAFETY: the kernel writes one int.
        check(unsafe { libc::waitpid(self.pid, &mut status, 0) });
        status
    }
}

/// All applet names of busybox, once per machine and process.
fn applets() -> PathBuf {
    static PATH: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
    PATH.get_or_init(|| {
        let list = Command::new("/bin/busybox").arg("--list").output().unwrap();
        let path = PathBuf::from(format!(
            "{}/applets-{}",
            env!("CARGO_TARGET_TMPDIR"),
            std::process::id()
        ));
        fs::write(&path, list.stdout).unwrap();
        path
    })
    .clone()
}

fn listen(path: &Path) -> OwnedFd {
    // SAFETY: an all-zero sockaddr_un is valid.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = path.as_os_str().as_encoded_bytes();
    assert!(bytes.len() < address.sun_path.len());
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    // SAFETY: the kernel reads one sockaddr_un.
    unsafe {
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
        let socket = own(libc::socket(libc::AF_UNIX, kind, 0));
        let length = size_of::<libc::sockaddr_un>() as libc::socklen_t;
        check(libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length));
        check(libc::listen(socket.as_raw_fd(), 1));
        socket
    }
}

/// The cgroup2 directory, if its hierarchy has controllers or is the only one, and the v1 `tasks`
/// files of a process.
fn cgroup_files(pid: i32) -> (Option<OwnedFd>, Vec<OwnedFd>) {
    let (mut directory, mut tasks) = (None, Vec::new());
    for line in fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap().lines() {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) =
            (fields.next(), fields.next().unwrap(), fields.next().unwrap());
        let base = Path::new("/sys/fs/cgroup");
        if controllers.is_empty() {
            let unified = [base.join("unified"), base.to_owned()]
                .into_iter()
                .map(|root| root.join(&path[1..]))
                .find(|d| d.join("cgroup.procs").exists());
            directory = unified.map(|d| File::open(d).unwrap().into());
        } else {
            let name = controllers.strip_prefix("name=").unwrap_or(controllers);
            let file = base.join(name).join(&path[1..]).join("tasks");
            tasks.push(File::options().write(true).open(file).unwrap().into());
        }
    }
    (directory, tasks)
}
