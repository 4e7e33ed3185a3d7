//! A simulator of its own for each test: its process, what it says of itself, its control socket, and
//! what a CT needs to run.

// Each of the programs that include this module uses its own part of it.
#![allow(dead_code)]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::symlink;
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

/// The `n`th VMID of this process's own, as all CTs of a host share the cgroup tree.
pub fn own_vmid(n: u32) -> u32 {
    assert!(n < 1000, "no more VMIDs");
    700_000_000 + std::process::id() % 100_000 * 1000 + n
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

    /// A root file system with busybox's sleep, which all CTs of a test may use.
    pub fn rootfs(&self) -> PathBuf {
        let needed = Path::new("/bin/busybox").exists() && Path::new("/usr/bin/lxc-start").exists();
        assert!(needed, "needs root, lxc-start and busybox: `make test` installs them");
        let rootfs = self.dir.path().join("rootfs");
        if !rootfs.exists() {
            for name in ["bin", "dev", "proc", "sys"] {
                std::fs::create_dir_all(rootfs.join(name)).expect("a directory");
            }
            std::fs::copy("/bin/busybox", rootfs.join("bin/busybox")).expect("busybox");
            symlink("busybox", rootfs.join("bin/sleep")).expect("a link");
        }
        rootfs
    }

    /// Writes a file for a CT's `lxc.include`, by which it sleeps in that root file system.
    pub fn write_include(&self, include: &Path) {
        let lines = format!(
            "lxc.hook.pre-start =\nlxc.rootfs.path = dir:{}\nlxc.init.cmd = /bin/sleep 1000\n",
            self.rootfs().display()
        );
        std::fs::create_dir_all(include.parent().expect("a directory")).expect("a directory");
        std::fs::write(include, lines).expect("a file");
    }

    /// What there still is of a CT on this host: processes, cgroups, files of the node.
    pub fn left_of(&self, vmid: u32) -> Vec<PathBuf> {
        let name = vmid.to_string();
        let files = [
            self.confs().join(format!("{name}.conf")),
            Path::new(self.get("lxc_path")).join(&name),
        ];
        let mut left: Vec<_> = files.into_iter().filter(|path| path.exists()).collect();
        let entries = |dir: &Path| std::fs::read_dir(dir).into_iter().flatten().flatten();
        for process in entries(Path::new("/proc")) {
            let line = std::fs::read_to_string(process.path().join("cmdline")).unwrap_or_default();
            if line.split('\0').any(|word| word == name) {
                left.push(process.path());
            }
        }
        let mut directories = vec![PathBuf::from("/sys/fs/cgroup")];
        while let Some(directory) = directories.pop() {
            if directory.file_name().is_some_and(|last| last == name.as_str()) {
                left.push(directory);
            } else {
                let below = entries(&directory).filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
                directories.extend(below.map(|entry| entry.path()));
            }
        }
        left
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
