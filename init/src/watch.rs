//! The watcher: a process beside the CT that hears from lxc-monitord how PID 1 ended.
//!
//! Only its parent, lxc-start, knows the wait status of PID 1, unless the kernel keeps it for the
//! stop hook (6.15). The lxc-start of LXC 5 tells it in its log. That of LXC 6 has a logger of its
//! own, which has neither the file nor the level of the configuration, and tells it to lxc-monitord
//! only, just before it runs the stop hook: who wants to know must be connected by then.
//!
//! lxc-monitord serves a whole node and waits for slow listeners, so the watcher does nothing but
//! listen. It holds the lock of its file until it knows, or has no hope left.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::sys;

/// The watcher's file in the run directory: locked while it listens, then the wait status.
const FILE: &str = "watch";
/// How long it may take until the watcher hears what lxc-start tells at once when it has reaped PID 1.
const GRACE: Duration = Duration::from_secs(3);
/// How long the stop hook waits for the watcher, which has to give up first.
const PATIENCE: Duration = Duration::from_secs(4);
/// Between two looks for an lxc-monitord that is being restarted, and for the reaping of PID 1.
const INTERVAL: Duration = Duration::from_millis(50);
const LOCK_POLL: Duration = Duration::from_millis(1);

/// LXC's `struct lxc_msg`: the type, the container's name, and a value that depends on the type.
const MESSAGE: usize = 4 + NAME + 4;
const NAME: usize = 256;
const EXIT_CODE: i32 = 2;

/// Starts a watcher of the CT whose hook this is; returns when it listens.
pub fn start(run_dir: &Path) -> io::Result<()> {
    let variable =
        |name| std::env::var(name).map_err(|_| io::Error::other(format!("LXC has not set {name}")));
    let name = variable("LXC_NAME")?;
    let config = variable("LXC_CONFIG_FILE")?;
    // PATH/NAME/config
    let lxc_path = Path::new(&config).ancestors().nth(2).and_then(Path::to_str);
    let lxc_path = lxc_path.ok_or_else(|| io::Error::other(format!("no LXC path: {config}")))?;
    let pid = variable("LXC_PID")?.parse().map_err(io::Error::other)?;
    let init = sys::pidfd_open(pid)?;
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(run_dir.join(FILE))?;
    sys::lock(file.as_fd(), libc::LOCK_EX | libc::LOCK_NB)?;
    let socket = socket_name(lxc_path);
    let connection = Connection::new(&socket).ok();
    let null = File::options().read(true).write(true).open("/dev/null")?;
    if !sys::fork()? {
        return Ok(());
    }
    // LXC reads the output of a hook to its end.
    let detach = || -> io::Result<()> {
        (0..3).try_for_each(|number| sys::become_stdio(null.as_fd(), number))?;
        sys::new_session()?;
        sys::chdir(c"/")
    };
    let heard = detach().and_then(|()| listen(connection, &socket, &name, &init));
    if let Ok(Some(status)) = heard {
        let _ = writeln!(file, "{status}");
    }
    std::process::exit(0)
}

/// The wait status that the watcher has heard; `None` if there is no watcher, or it heard nothing.
pub fn wait_status(run_dir: &Path) -> Option<i32> {
    let mut file = File::open(run_dir.join(FILE)).ok()?;
    let deadline = Instant::now() + PATIENCE;
    while sys::lock(file.as_fd(), libc::LOCK_SH | libc::LOCK_NB).is_err() {
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(LOCK_POLL);
    }
    let mut text = String::new();
    file.read_to_string(&mut text).ok()?;
    text.trim_end().parse().ok()
}

/// Listens until the status is told, or PID 1 has been reaped and the status can't come any more.
fn listen(
    mut connection: Option<Connection>,
    socket: &[u8],
    name: &str,
    init: &OwnedFd,
) -> io::Result<Option<i32>> {
    let interval = INTERVAL.as_millis() as i32;
    // A pidfd stays readable for ever.
    let mut ended = false;
    let mut deadline: Option<Instant> = None;
    while deadline.is_none_or(|d| Instant::now() < d) {
        let told = match (&connection, ended) {
            (Some(monitor), false) => {
                let fds = [monitor.0.as_fd(), init.as_fd()];
                let [told, now_ended] = sys::poll_readable(fds, -1)?;
                ended = now_ended;
                told
            }
            (Some(monitor), true) => sys::poll_readable([monitor.0.as_fd()], interval)?[0],
            (None, false) => {
                [ended] = sys::poll_readable([init.as_fd()], interval)?;
                false
            }
            (None, true) => {
                std::thread::sleep(INTERVAL);
                false
            }
        };
        // Its parent may be slow, or stopped.
        if ended && deadline.is_none() && sys::pidfd_is_reaped(init.as_fd()) {
            deadline = Some(Instant::now() + GRACE);
        }
        match &mut connection {
            Some(monitor) if told => match monitor.receive() {
                Ok(messages) => {
                    if let Some(status) = messages.iter().find_map(|m| exit_code(m, name)) {
                        return Ok(Some(status));
                    }
                }
                // It has ended, or is being restarted.
                Err(_) => connection = None,
            },
            Some(_) => {}
            None => connection = Connection::new(socket).ok(),
        }
    }
    Ok(None)
}

/// A connection to lxc-monitord and what has come of the next message.
struct Connection(File, Vec<u8>);

impl Connection {
    fn new(socket: &[u8]) -> io::Result<Self> {
        Ok(Self(sys::connect_abstract(socket)?.into(), Vec::new()))
    }

    /// The whole messages that have come; an error at the end of the connection.
    fn receive(&mut self) -> io::Result<Vec<[u8; MESSAGE]>> {
        let mut buffer = [0; 16 * MESSAGE];
        match self.0.read(&mut buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => self.1.extend_from_slice(&buffer[..n]),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
        let whole = self.1.len() - self.1.len() % MESSAGE;
        let rest = self.1.split_off(whole);
        let messages = std::mem::replace(&mut self.1, rest);
        Ok(messages.chunks_exact(MESSAGE).filter_map(|m| m.try_into().ok()).collect())
    }
}

/// The wait status, if the message tells that of the container.
fn exit_code(message: &[u8; MESSAGE], name: &str) -> Option<i32> {
    let number = |at: usize| {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&message[at..at + 4]);
        i32::from_ne_bytes(bytes)
    };
    let field = &message[4..4 + NAME];
    let length = field.iter().position(|b| *b == 0).unwrap_or(NAME);
    (number(0) == EXIT_CODE && &field[..length] == name.as_bytes()).then(|| number(4 + NAME))
}

/// The name of lxc-monitord's abstract socket: a hash, as a name has to be short, and as much of
/// the path as there is room for.
fn socket_name(lxc_path: &str) -> Vec<u8> {
    // sun_path less the leading NUL and LXC's two bytes for a C string's end.
    const LONGEST: usize = 105;
    let hash = fnv1a(format!("lxc/{lxc_path}/monitor-sock").as_bytes());
    let mut name = format!("lxc/{hash:016x}/{lxc_path}").into_bytes();
    name.truncate(LONGEST);
    name
}

/// The 64-bit FNV-1a hash.
fn fnv1a(bytes: &[u8]) -> u64 {
    const BASIS: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x100_0000_01b3;
    bytes.iter().fold(BASIS, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(PRIME))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: i32, name: &str, value: i32) -> [u8; MESSAGE] {
        let mut message = [0; MESSAGE];
        message[..4].copy_from_slice(&kind.to_ne_bytes());
        message[4..4 + name.len()].copy_from_slice(name.as_bytes());
        // What is behind the name's end need not be zero.
        message[5 + name.len()] = b'x';
        message[4 + NAME..].copy_from_slice(&value.to_ne_bytes());
        message
    }

    #[test]
    fn the_socket_has_the_name_that_lxc_gives_it() {
        // As seen in /proc/net/unix of a node.
        assert_eq!(socket_name("/var/lib/lxc"), b"lxc/ad055575fe28ddd5//var/lib/lxc");
        assert_eq!(fnv1a(b"a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(socket_name(&"/long".repeat(30)).len(), 105);
    }

    #[test]
    fn only_the_exit_code_of_the_container_is_believed() {
        assert_eq!(exit_code(&message(2, "101", 7 << 8), "101"), Some(7 << 8));
        assert_eq!(exit_code(&message(2, "101", 0), "101"), Some(0));
        assert_eq!(exit_code(&message(0, "101", 1), "101"), None);
        assert_eq!(exit_code(&message(2, "1011", 1), "101"), None);
        assert_eq!(exit_code(&message(2, "10", 1), "101"), None);
    }

    #[test]
    fn messages_are_put_together_from_pieces() {
        let (read, write) = sys::pipe().unwrap();
        sys::set_nonblocking(read.as_fd()).unwrap();
        let mut connection = Connection(read.into(), Vec::new());
        let mut write = File::from(write);
        let both = [message(0, "101", 2), message(2, "101", 9)].concat();
        write.write_all(&both[..300]).unwrap();
        assert_eq!(connection.receive().unwrap(), [message(0, "101", 2)]);
        assert!(connection.receive().unwrap().is_empty());
        write.write_all(&both[300..]).unwrap();
        assert_eq!(connection.receive().unwrap(), [message(2, "101", 9)]);
        drop(write);
        assert!(connection.receive().is_err());
    }
}
