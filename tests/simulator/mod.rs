//! A simulator of its own for each test: its process, what it says of itself, and its control
//! socket.

// Each of the programs that include this module uses its own part of it.
#![allow(dead_code)]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

pub struct Simulator {
    child: Child,
    ready: Value,
    pub dir: tempfile::TempDir,
}

/// As for the end-to-end suites: in `E2E_BIN`, or where cargo builds it.
fn binary() -> PathBuf {
    let built = || Some(std::env::current_exe().ok()?.parent()?.parent()?.to_owned());
    let dir = std::env::var_os("E2E_BIN").map(PathBuf::from).or_else(built);
    let path = dir.unwrap_or_default().join("pve-sim");
    assert!(path.exists(), "{}: run `cargo build -p pve-sim`", path.display());
    path
}

impl Simulator {
    /// Starts one with these arguments and waits until it listens.
    pub fn start(arguments: &[&str]) -> Simulator {
        let dir = tempfile::tempdir().expect("a directory");
        let log = std::fs::File::create(dir.path().join("log")).expect("a log");
        let mut command = Command::new(binary());
        command.arg("--root").arg(dir.path().join("node")).args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        let mut child = command.spawn().expect("the simulator starts");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("stdout is piped");
        // Its end too is seen here.
        let _ = BufReader::new(stdout).read_line(&mut line);
        let ready = serde_json::from_str(&line).unwrap_or_else(|_| {
            let log = std::fs::read_to_string(dir.path().join("log")).unwrap_or_default();
            panic!("the simulator does not listen: {line}{log}")
        });
        Simulator { child, ready, dir }
    }

    /// What it says of itself.
    pub fn get(&self, key: &str) -> &str {
        self.ready[key].as_str().unwrap_or_else(|| panic!("it says nothing of {key}"))
    }

    /// Where a node of the cluster listens.
    pub fn endpoint_of(&self, node: &str) -> &str {
        self.ready["endpoints"][node]
            .as_str()
            .unwrap_or_else(|| panic!("it says nothing of {node}"))
    }

    /// The configurations of the node's CTs.
    pub fn confs(&self) -> PathBuf {
        Path::new(self.get("pmxcfs")).join("lxc")
    }

    /// `[proxmox]` of the shim's configuration, as an administrator.
    pub fn configuration(&self) -> String {
        format!(
            "[proxmox]\nendpoint = \"{}\"\nnode = \"{}\"\ntoken_file = \"{}\"\nfingerprint = \"{}\"\n",
            self.get("endpoint"),
            self.get("node"),
            self.get("admin_token_file"),
            self.get("fingerprint"),
        )
    }

    /// Carries out a command for making things go wrong.
    pub fn try_control(&self, command: &Value) -> Result<Value, String> {
        let mut socket = UnixStream::connect(self.get("control")).map_err(|e| e.to_string())?;
        writeln!(socket, "{command}").map_err(|e| e.to_string())?;
        let mut line = String::new();
        BufReader::new(socket).read_line(&mut line).map_err(|e| e.to_string())?;
        let mut answer: Value = serde_json::from_str(&line).map_err(|e| e.to_string())?;
        match answer["error"].as_str() {
            Some(error) => Err(error.to_owned()),
            None => Ok(answer["ok"].take()),
        }
    }
}

impl Drop for Simulator {
    /// It ends its containers too.
    fn drop(&mut self) {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let _ = self.child.wait();
    }
}
