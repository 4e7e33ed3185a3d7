//! The node's lxc-monitord, which every `lxc-start` tells the states of its CT and its exit status.
//!
//! On a node it is a service of its own. It knows one LXC path, and a simulator has its own.

use std::ffi::CString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::sys::{self, Unit};

const PROGRAM: &str = "/usr/libexec/lxc/lxc-monitord";
/// Where LXC has its FIFOs.
const RUN_DIR: &str = "/run/lxc";
const START_LIMIT: Duration = Duration::from_secs(10);
const STOP_LIMIT: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(1);

/// The running daemon; ended when dropped.
#[derive(Debug)]
pub struct Monitord {
    pid: u32,
    lxc_path: PathBuf,
}

impl Monitord {
    /// Starts it and waits until it listens.
    pub fn start(lxc_path: &Path, stderr: &Path) -> io::Result<Self> {
        let string = |text: &Path| CString::new(text.as_os_str().as_encoded_bytes());
        let program = CString::new(PROGRAM)?;
        let args = [program.clone(), c"--daemon".to_owned(), string(lxc_path)?];
        let stderr = string(stderr)?;
        let unit = Unit { program: &program, args: &args, env: &[], stderr: &stderr };
        let pid = sys::spawn(&unit)?;
        let deadline = Instant::now() + START_LIMIT;
        while !listens(lxc_path) {
            if sys::try_wait(pid)?.is_some() {
                return Err(io::Error::other("it ended at once"));
            }
            if Instant::now() >= deadline {
                end(pid);
                return Err(io::Error::other("it does not listen"));
            }
            std::thread::sleep(POLL);
        }
        Ok(Self { pid, lxc_path: lxc_path.to_owned() })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.pid
    }
}

fn listens(lxc_path: &Path) -> bool {
    let end = format!("/{}", lxc_path.display());
    let table = fs::read("/proc/net/unix").unwrap_or_default();
    let table = String::from_utf8_lossy(&table);
    table.lines().any(|line| line.contains(" @lxc/") && line.ends_with(&end))
}

/// Ends and reaps it.
fn end(pid: u32) {
    let _ = sys::kill(pid, libc::SIGTERM);
    let deadline = Instant::now() + STOP_LIMIT;
    while matches!(sys::try_wait(pid), Ok(None)) {
        if Instant::now() >= deadline {
            let _ = sys::kill(pid, libc::SIGKILL);
        }
        std::thread::sleep(POLL);
    }
}

impl Drop for Monitord {
    fn drop(&mut self) {
        // It removes its FIFO.
        end(self.pid);
        let fifo_dir = format!("{RUN_DIR}/{}", self.lxc_path.display());
        let made = Path::new(&fifo_dir).ancestors().take_while(|dir| *dir != Path::new(RUN_DIR));
        // Others may have the outer ones in use.
        let _ = made.map(fs::remove_dir).find(io::Result::is_err);
    }
}
