//! `pve-container@VMID.service`: what runs a CT's `lxc-start`.

use std::ffi::CString;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::sys;

const ENVIRONMENT: [&str; 2] =
    ["LANG=C.UTF-8", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"];

/// Who supervises the main processes of units.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Supervisor {
    /// The simulator itself, wherever it runs.
    Simulator,
    /// The host's systemd, by transient units with the settings of the node's.
    Systemd,
}

/// The main process of a unit.
#[derive(Debug)]
pub struct Main<'a> {
    /// The CT.
    pub vmid: u32,
    /// The program and its arguments.
    pub command: &'a [&'a str],
    /// The file for its standard error, emptied first.
    pub stderr: &'a Path,
}

impl Supervisor {
    /// Starts a unit. The process whose pid is returned is a child of this one, ends when the unit
    /// is inactive, and with the main process's status.
    pub fn start(self, main: &Main<'_>) -> io::Result<u32> {
        let stderr = main.stderr.to_str().ok_or(io::ErrorKind::InvalidFilename)?;
        let mut command: Vec<String> = Vec::new();
        let file = match self {
            Self::Simulator => stderr.to_owned(),
            Self::Systemd => {
                command.extend(["systemd-run", "--quiet", "--wait", "--collect"].map(Into::into));
                command.push(format!("--unit={}", name(main.vmid)));
                for property in ["Type=simple", "Delegate=yes", "KillMode=mixed"] {
                    command.push(format!("--property={property}"));
                }
                command.push("--property=StandardOutput=null".into());
                command.push(format!("--property=StandardError=truncate:{stderr}"));
                command.extend(ENVIRONMENT.map(|variable| format!("--setenv={variable}")));
                "/dev/null".to_owned()
            }
        };
        command.extend(main.command.iter().map(|word| (*word).to_owned()));
        let strings = |list: Vec<String>| -> io::Result<Vec<CString>> {
            list.into_iter().map(|s| CString::new(s).map_err(io::Error::from)).collect()
        };
        let (args, env) = (strings(command)?, strings(ENVIRONMENT.map(Into::into).to_vec())?);
        let program = args.first().ok_or(io::ErrorKind::InvalidInput)?;
        let stderr = CString::new(file)?;
        sys::spawn(&sys::Unit { program, args: &args, env: &env, stderr: &stderr })
    }

    /// Kills the main process of a unit, which `start` has returned `pid` for.
    pub fn kill(self, vmid: u32, pid: u32) {
        let _ = match self {
            Self::Simulator => sys::kill(pid, libc::SIGKILL),
            Self::Systemd => Command::new("systemctl")
                .args(["kill", "--signal=SIGKILL", &name(vmid)])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .map(drop),
        };
    }
}

fn name(vmid: u32) -> String {
    format!("pve-container@{vmid}.service")
}
