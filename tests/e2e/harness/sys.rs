//! The system calls the harness needs and that have no safe wrapper. All `unsafe` of the suites is
//! here.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicI32, Ordering};

/// Write end of the pipe that carries termination signals out of the handler.
static SIGNAL_PIPE: AtomicI32 = AtomicI32::new(-1);

extern "C" fn forward(signal: libc::c_int) {
    let byte = signal as u8;
    // SAFETY: write(2) is async-signal-safe; the descriptor stays open for the process's life.
    unsafe { libc::write(SIGNAL_PIPE.load(Ordering::Relaxed), (&raw const byte).cast(), 1) };
}

/// Runs `then` on a thread of its own when SIGINT, SIGTERM or SIGHUP arrives.
pub fn on_termination(then: impl FnOnce(i32) + Send + 'static) {
    let (read, write) = pipe();
    SIGNAL_PIPE.store(write.as_raw_fd(), Ordering::Relaxed);
    std::mem::forget(write);
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler is async-signal-safe and the structure is fully initialised.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = forward as extern "C" fn(libc::c_int) as usize;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
    std::thread::spawn(move || {
        let mut byte = [0u8];
        let mut file = std::fs::File::from(read);
        if std::io::Read::read_exact(&mut file, &mut byte).is_ok() {
            then(i32::from(byte[0]));
        }
    });
}

/// The ids that containers with a user namespace have in these suites.
pub const SUBORDINATE_IDS: &str = "root:100000:65536\nroot:1000000:1000000\n";

/// Lets LXC use [`SUBORDINATE_IDS`], as a Proxmox node does: with files that only this process and what
/// it starts see in place of `/etc/subuid` and `/etc/subgid`. The machine's may be empty. What they write
/// below `/etc` only they see, too.
pub fn give_root_subordinate_ids(directory: &Path) {
    let c = |text: &str| CString::new(text).expect("no NUL");
    let check = |rc: i32, what: &str| {
        assert_eq!(rc, 0, "{what}: {}", std::io::Error::last_os_error());
    };
    let file = directory.join(format!("e2e-{}-subids", std::process::id()));
    std::fs::write(&file, SUBORDINATE_IDS).expect("write subordinate ids");
    let source = c(file.to_str().expect("path is UTF-8"));
    // SAFETY: plain system calls on NUL-terminated strings; null where there is nothing to say.
    unsafe {
        check(libc::unshare(libc::CLONE_NEWNS), "unshare the mounts");
        let none = std::ptr::null();
        let slave = libc::MS_REC | libc::MS_SLAVE;
        check(libc::mount(none, c("/").as_ptr(), none, slave, none.cast()), "separate the mounts");
        let layers = directory.join(format!("e2e-{}-etc", std::process::id()));
        std::fs::create_dir_all(&layers).expect("make a directory for the layers of /etc");
        let place = c(layers.to_str().expect("path is UTF-8"));
        let tmpfs = c("tmpfs");
        let rc = libc::mount(tmpfs.as_ptr(), place.as_ptr(), tmpfs.as_ptr(), 0, none.cast());
        check(rc, "mount a tmpfs");
        for layer in ["upper", "work"] {
            std::fs::create_dir(layers.join(layer)).expect("make a layer of /etc");
        }
        let options =
            c(&format!("lowerdir=/etc,upperdir={0}/upper,workdir={0}/work", layers.display()));
        let (overlay, etc) = (c("overlay"), c("/etc"));
        let options = options.as_ptr().cast();
        let rc = libc::mount(overlay.as_ptr(), etc.as_ptr(), overlay.as_ptr(), 0, options);
        check(rc, "mount an overlay at /etc");
        check(libc::umount2(place.as_ptr(), libc::MNT_DETACH), "hide the layers of /etc");
        std::fs::remove_dir(&layers).expect("remove the directory of the layers");
        for path in ["/etc/subuid", "/etc/subgid"].iter().filter(|path| Path::new(path).exists()) {
            let flags = libc::MS_BIND;
            let rc = libc::mount(source.as_ptr(), c(path).as_ptr(), none, flags, none.cast());
            check(rc, path);
        }
    }
    std::fs::remove_file(&file).expect("remove the file behind the mounts");
}

/// A close-on-exec pipe: read end, write end.
pub fn pipe() -> (OwnedFd, OwnedFd) {
    let mut fds: [RawFd; 2] = [-1; 2];
    // SAFETY: the array has room for the two descriptors, which become owned here only.
    unsafe {
        assert_eq!(libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC), 0, "pipe2");
        (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1]))
    }
}

/// Accepts one connection of a stream socket and reads the first message: its bytes and the
/// descriptor that came with it.
pub fn receive_with_descriptor(
    listener: &std::os::unix::net::UnixListener,
) -> (Vec<u8>, Option<OwnedFd>) {
    let (stream, _) = listener.accept().expect("accept");
    let mut data = vec![0u8; 1 << 16];
    let mut control = [0u64; 8];
    let mut part = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
    // SAFETY: an all-zero msghdr is valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control) as _;
    // SAFETY: everything `message` points to is alive and as long as it says.
    let length = unsafe { libc::recvmsg(stream.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC) };
    data.truncate(usize::try_from(length).expect("recvmsg"));
    // SAFETY: the kernel has set msg_controllen to what it wrote; the descriptor is new and ours.
    let descriptor = unsafe {
        let header = libc::CMSG_FIRSTHDR(&message);
        (!header.is_null())
            .then(|| OwnedFd::from_raw_fd(libc::CMSG_DATA(header).cast::<RawFd>().read_unaligned()))
    };
    (data, descriptor)
}

/// Answers the next notification of a seccomp listener with an error number: the number of the system
/// call. `None` when no process is left that could be notified of.
pub fn answer_notification(listener: &OwnedFd, errno: i32) -> Option<i32> {
    // _IOWR('!', 0, struct seccomp_notif) and _IOWR('!', 1, struct seccomp_notif_resp).
    const RECEIVE: libc::c_ulong = 0xc050_2100;
    const SEND: libc::c_ulong = 0xc018_2101;
    // struct seccomp_notif: id, pid and flags, then struct seccomp_data, which begins with the
    // number of the system call.
    let mut notification = [0u64; 10];
    // SAFETY: the request's number says 80 bytes.
    if unsafe { libc::ioctl(listener.as_raw_fd(), RECEIVE, notification.as_mut_ptr()) } != 0 {
        return None;
    }
    // struct seccomp_notif_resp: id, val, error and flags.
    let answer = [notification[0], 0, u64::from((-errno) as u32)];
    // SAFETY: the request's number says 24 bytes.
    unsafe { libc::ioctl(listener.as_raw_fd(), SEND, answer.as_ptr()) };
    Some(notification[2] as i32)
}

/// A FIFO at `path`.
pub fn mkfifo(path: &Path) {
    let c = CString::new(path.to_str().expect("path is UTF-8")).expect("path has no NUL");
    // SAFETY: a valid NUL-terminated string.
    let rc = unsafe { libc::mkfifo(c.as_ptr(), 0o600) };
    assert_eq!(rc, 0, "mkfifo {}: {}", path.display(), std::io::Error::last_os_error());
}

/// Clears `O_NONBLOCK` and all other status flags.
pub fn set_blocking(fd: impl AsFd) {
    // SAFETY: F_SETFL on a descriptor that is open for the call.
    let rc = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_SETFL, 0) };
    assert_eq!(rc, 0, "F_SETFL");
}

/// A pseudo-terminal of the given size: the master and the slave.
pub fn openpty(rows: u16, columns: u16) -> (OwnedFd, OwnedFd) {
    let (mut master, mut slave) = (-1, -1);
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: both out pointers are valid; name and termios may be null.
    unsafe {
        let rc = libc::openpty(
            &mut master,
            &mut slave,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            &raw const size as *mut _,
        );
        assert_eq!(rc, 0, "openpty");
        for fd in [master, slave] {
            libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC);
        }
        (OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(slave))
    }
}

/// Changes the window size; the kernel tells the foreground process group by SIGWINCH.
pub fn set_window_size(tty: impl AsFd, rows: u16, columns: u16) {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize.
    let rc = unsafe { libc::ioctl(tty.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &size) };
    assert_eq!(rc, 0, "TIOCSWINSZ");
}

/// The command gets a session of its own with its stdin as controlling terminal.
pub fn with_controlling_terminal(command: &mut Command) {
    // SAFETY: only system calls between fork and exec.
    unsafe {
        command.pre_exec(|| {
            if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
}

/// systemd's `DefaultLimitNOFILESoft`.
pub const SERVICE_DESCRIPTORS: u64 = 1024;

/// Gives the command what systemd gives services. The default signal dispositions: a shell without job
/// control lets its background commands ignore SIGINT and SIGQUIT, and containers inherit that. And its
/// soft limit on descriptors.
pub fn as_a_service(command: &mut Command) {
    // SAFETY: only system calls between fork and exec.
    unsafe {
        command.pre_exec(|| {
            for signal in 1..32 {
                libc::signal(signal, libc::SIG_DFL);
            }
            let mut limit: libc::rlimit = std::mem::zeroed();
            let soft = SERVICE_DESCRIPTORS;
            if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) < 0
                || libc::setrlimit(libc::RLIMIT_NOFILE, &libc::rlimit { rlim_cur: soft, ..limit })
                    < 0
            {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
}

/// Makes `PIDFD_GET_INFO` fail with ENOTTY in the command and all its descendants, as on a kernel
/// that does not know it. The filter is installed as root without `no_new_privs`, which would
/// change what containers see.
pub fn without_pidfd_info(command: &mut Command) {
    const LD_W_ABS: u16 = 0x20;
    const AND_K: u16 = 0x54;
    const JEQ_K: u16 = 0x15;
    const RET_K: u16 = 0x06;
    const ALLOW: u32 = 0x7fff_0000;
    const ERRNO: u32 = 0x0005_0000;
    const NR: u32 = 0;
    // Low half of args[1], the ioctl's request, on a little-endian machine.
    const REQUEST: u32 = 24;
    // _IOWR(0xFF, 11, …) without direction and size.
    const PIDFD_GET_INFO: u32 = 0xFF0B;
    let insn = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let filter = [
        insn(LD_W_ABS, 0, 0, NR),
        insn(JEQ_K, 0, 4, libc::SYS_ioctl as u32),
        insn(LD_W_ABS, 0, 0, REQUEST),
        insn(AND_K, 0, 0, 0xFFFF),
        insn(JEQ_K, 0, 1, PIDFD_GET_INFO),
        insn(RET_K, 0, 0, ERRNO | libc::ENOTTY as u32),
        insn(RET_K, 0, 0, ALLOW),
    ];
    // SAFETY: only a system call between fork and exec; the program outlives the call.
    unsafe {
        command.pre_exec(move || {
            let program = libc::sock_fprog {
                len: filter.len() as u16,
                filter: filter.as_ptr() as *mut libc::sock_filter,
            };
            if libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
}

/// Sends a signal; `false` if the process is gone.
pub fn kill(pid: u32, signal: i32) -> bool {
    // SAFETY: plain system call on a positive pid.
    pid > 1 && unsafe { libc::kill(pid as libc::pid_t, signal) } == 0
}

/// Lazily detaches one mount.
pub fn detach(path: &Path) {
    if let Ok(c) = CString::new(path.as_os_str().as_encoded_bytes()) {
        // SAFETY: a valid NUL-terminated string.
        unsafe { libc::umount2(c.as_ptr(), libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW) };
    }
}

/// The version of the kernel's Landlock ABI, 0 without it.
pub fn landlock_abi() -> i64 {
    // SAFETY: with the flag 1 the kernel reads nothing and returns a number.
    let abi = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0usize, 1u32)
    };
    abi.max(0)
}

/// Moves this process, which must have one thread, and all that it starts into a network namespace
/// with nothing but a loopback interface: CNI's bridges and rules must not meet the host's.
pub fn enter_own_network() {
    // SAFETY: numbers only.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(result, 0, "unshare: {}", std::io::Error::last_os_error());
    let status = Command::new("ip").args(["link", "set", "lo", "up"]).status();
    assert!(status.is_ok_and(|status| status.success()), "ip cannot bring lo up");
}
