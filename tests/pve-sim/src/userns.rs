//! The user namespace of unprivileged CTs, for programs that unpack into their volumes.
//!
//! A real node runs `lxc-usernsexec`, which needs a range for root in `/etc/subuid`. Here the same
//! mapping is written directly, so that nothing of the host has to be changed.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::{Child, Command};
use tokio::time::sleep;

/// The first host id of unprivileged CTs, which is their root.
pub const ROOT: u32 = 100_000;
/// How many ids they have.
const COUNT: u32 = 65_536;

/// A user namespace with the mapping of unprivileged CTs, as long as this exists.
#[derive(Debug)]
pub struct UserNs {
    // Killed on drop, and with it the last reference to the namespace goes.
    holder: Child,
    pid: u32,
}

impl UserNs {
    /// Makes the namespace.
    pub async fn new() -> io::Result<Self> {
        let holder = Command::new("unshare")
            .args(["--user", "sleep", "infinity"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        let pid = holder.id().ok_or(io::ErrorKind::NotFound)?;
        let namespace = |pid: &str| fs::read_link(PathBuf::from(format!("/proc/{pid}/ns/user")));
        let own = namespace("self")?;
        let mut tries = 0;
        while namespace(&pid.to_string())? == own {
            tries += 1;
            if tries > 2000 {
                return Err(io::ErrorKind::TimedOut.into());
            }
            sleep(Duration::from_millis(1)).await;
        }
        for map in ["uid_map", "gid_map"] {
            fs::write(format!("/proc/{pid}/{map}"), format!("0 {ROOT} {COUNT}"))?;
        }
        Ok(Self { holder, pid })
    }

    /// A command that runs as the root of the namespace.
    pub fn command(&self, program: &str) -> Command {
        debug_assert_eq!(self.holder.id(), Some(self.pid), "it is not waited for");
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.pid.to_string(), "--user", "--", program]);
        command
    }
}
