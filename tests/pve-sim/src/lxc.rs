//! liblxc's command socket: the abstract socket by which `lxc-start` can be asked and told.
//!
//! The messages are those of `lxc-info` and `lxc-stop`: 16 bytes each way, of which the first
//! eight are two integers (command and length, or result and length) and the rest is a value.

use std::collections::HashSet;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream as StdStream};
use std::path::Path;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use crate::sys;

const STOP: i32 = 2;
const GET_STATE: i32 = 3;
const GET_INIT_PID: i32 = 4;

/// A container's state in liblxc.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Its init runs, or is frozen.
    Running,
    /// Anything before or after.
    Other,
}

/// A connection to the command socket of a container.
#[derive(Debug)]
pub struct Command(UnixStream);

impl Command {
    /// Connects. `ConnectionRefused` means that there is no such socket, so no container.
    pub fn connect(lxc_path: &Path, vmid: u32) -> io::Result<Self> {
        let name = lxc_path.join(vmid.to_string()).join("command");
        let addr = SocketAddr::from_abstract_name(name.as_os_str().as_encoded_bytes())?;
        let stream = StdStream::connect_addr(&addr)?;
        stream.set_nonblocking(true)?;
        Ok(Self(UnixStream::from_std(stream)?))
    }

    fn send(&self, command: i32) -> io::Result<()> {
        let mut request = [0u8; 16];
        request[..4].copy_from_slice(&command.to_ne_bytes());
        // A command without credentials is refused; so few bytes always fit into the buffer.
        sys::send_with_credentials(&self.0, &request)
    }

    async fn ask(&mut self, command: i32) -> io::Result<i32> {
        self.send(command)?;
        let mut reply = [0u8; 16];
        self.0.read_exact(&mut reply).await?;
        let int = |at: usize| {
            let mut bytes = [0u8; 4];
            bytes.copy_from_slice(&reply[at..at + 4]);
            i32::from_ne_bytes(bytes)
        };
        // The value stands where a pointer would be; the result is 0 or a negative errno.
        if int(0) < 0 { Err(io::Error::from_raw_os_error(-int(0))) } else { Ok(int(8)) }
    }

    /// Asks for the state. `lxc-start` answers only once its container runs.
    pub async fn state(&mut self) -> io::Result<State> {
        const RUNNING: i32 = 2;
        const FREEZING_TO_THAWED: std::ops::RangeInclusive<i32> = 5..=7;
        let state = self.ask(GET_STATE).await?;
        Ok(if state == RUNNING || FREEZING_TO_THAWED.contains(&state) {
            State::Running
        } else {
            State::Other
        })
    }

    /// Asks for init's pid on the host.
    pub async fn init_pid(&mut self) -> io::Result<u32> {
        match u32::try_from(self.ask(GET_INIT_PID).await?) {
            Ok(pid) if pid > 0 => Ok(pid),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Kills init, as `lxc-stop --kill` does. There is no answer to wait for.
    pub fn stop(&self) -> io::Result<()> {
        self.send(STOP)
    }

    /// Waits until `lxc-start` has closed the connection, which is when it ends.
    pub async fn closed(&mut self) {
        let mut buffer = [0u8; 64];
        while matches!(self.0.read(&mut buffer).await, Ok(n) if n > 0) {}
    }
}

/// The pid of a container's init, if `lxc-start` answers in time. While it is starting its
/// container it does not, and when it ends the connection is closed.
pub async fn init_pid(lxc_path: &Path, vmid: u32, wait: Duration) -> Option<u32> {
    let ask = async { Command::connect(lxc_path, vmid)?.init_pid().await };
    tokio::time::timeout(wait, ask).await.ok()?.ok()
}

/// The containers whose command socket exists. This is all that `running` means in the API.
pub fn active(lxc_path: &Path) -> HashSet<u32> {
    // Socket names are bytes; a foreign one need not be UTF-8.
    let table = std::fs::read("/proc/net/unix").unwrap_or_default();
    active_in(&String::from_utf8_lossy(&table), lxc_path)
}

fn active_in(table: &str, lxc_path: &Path) -> HashSet<u32> {
    let prefix = format!("@{}/", lxc_path.display());
    table
        .lines()
        .filter_map(|line| line.split_once(&prefix)?.1.strip_suffix("/command")?.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_containers_are_read_from_the_socket_table() {
        let table = "Num RefCount Protocol Flags Type St Inode Path\n\
            00: 00000002 00000000 00010000 0001 01 46185 @/x/lxc/100/command\n\
            00: 00000003 00000000 00000000 0001 03 46186 @/x/lxc/100/command\n\
            00: 00000002 00000000 00010000 0001 01 46187 @/y/lxc/101/command\n\
            00: 00000002 00000000 00010000 0001 01 46188 /x/lxc/102/command\n\
            00: 00000002 00000000 00010000 0001 01 46189 @/x/lxc/abc/command\n\
            00: 00000002 00000000 00010000 0001 01 46189 @/x/lxc/103/command/more\n";
        assert_eq!(active_in(table, Path::new("/x/lxc")), HashSet::from([100]));
    }

    #[test]
    fn a_missing_socket_is_refused() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _guard = runtime.enter();
        let error = Command::connect(Path::new("/nonexistent-lxc"), 1).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
}
