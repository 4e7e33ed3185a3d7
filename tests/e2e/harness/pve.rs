//! A private Proxmox VE simulator and an administrator's view of its API.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use reqwest::Method;
use reqwest::blocking::Client;
use reqwest::header::AUTHORIZATION;
use serde_json::Value;

use super::process;
use super::sys;
use crate::trust;

/// The simulator's process and what it says about itself.
pub struct Pve {
    child: Child,
    ready: Value,
    client: Client,
}

impl Pve {
    /// Starts `pve-sim` below `root` and waits until it listens.
    pub fn start(
        binary: &Path,
        root: &Path,
        profile: &str,
        prepare: impl FnOnce(&mut Command),
    ) -> Pve {
        use std::os::unix::process::CommandExt;
        fs::create_dir_all(root).expect("create the simulator's directory");
        let log = fs::File::create(root.with_extension("log")).expect("create the simulator's log");
        let mut command = Command::new(binary);
        command.arg("--root").arg(root).args(["--listen", "127.0.0.1:0", "--profile", profile]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).process_group(0);
        sys::as_a_service(&mut command);
        prepare(&mut command);
        let mut child = command
            .spawn()
            .unwrap_or_else(|e| panic!("cannot run the simulator {}: {e}", binary.display()));
        let stdout = child.stdout.take().expect("stdout is piped");
        std::thread::spawn(move || BufReader::new(stdout).lines().map_while(Result::ok).count());
        let file = root.join("ready.json");
        let ready: Value =
            process::eventually("the simulator listens", Duration::from_secs(20), || {
                if process::is_ending() {
                    process::terminate(&mut child, Duration::from_secs(5));
                    panic!("the run was asked to end");
                }
                if let Ok(Some(status)) = child.try_wait() {
                    let log = fs::read_to_string(root.with_extension("log")).unwrap_or_default();
                    panic!("the simulator ended at once: {status}: {log}");
                }
                serde_json::from_str(&fs::read_to_string(&file).ok()?).ok()
            });
        let ca_file = ready["ca_file"].as_str().expect("ready.json names the authority");
        let client = Client::builder()
            .tls_backend_preconfigured(trust::authority(Path::new(ca_file)))
            .no_proxy()
            .timeout(Duration::from_secs(30))
            // Below the 5 s after which the server closes an idle connection.
            .pool_idle_timeout(Duration::from_secs(3))
            .build()
            .expect("a client");
        Pve { child, ready, client }
    }

    pub fn stop(&mut self) {
        process::terminate(&mut self.child, Duration::from_secs(20));
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn get(&self, key: &str) -> &str {
        self.ready[key].as_str().unwrap_or_else(|| panic!("ready.json has no {key}"))
    }

    pub fn node(&self) -> &str {
        self.get("node")
    }

    pub fn pmxcfs(&self) -> PathBuf {
        PathBuf::from(self.get("pmxcfs"))
    }

    pub fn lxc_path(&self) -> PathBuf {
        PathBuf::from(self.get("lxc_path"))
    }

    /// One request as the administrator: the HTTP status and `data`.
    pub fn request(&self, method: &str, path: &str, form: &[(&str, &str)]) -> (u16, Value) {
        let method = Method::from_bytes(method.as_bytes()).expect("a method");
        let url = format!("{}/api2/json{path}", self.get("endpoint"));
        let token = fs::read_to_string(self.get("admin_token_file")).expect("read the token");
        let mut request = self
            .client
            .request(method.clone(), url)
            .header(AUTHORIZATION, format!("PVEAPIToken={}", token.trim()));
        if !form.is_empty() {
            request = request.form(form);
        }
        let answer = request.send().unwrap_or_else(|e| panic!("{method} {path}: {e:?}"));
        let status = answer.status().as_u16();
        let body = answer.bytes().unwrap_or_else(|e| panic!("{method} {path}: {e:?}"));
        let body: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
        (status, body["data"].clone())
    }

    /// A request that must succeed.
    #[track_caller]
    pub fn call(&self, method: &str, path: &str, form: &[(&str, &str)]) -> Value {
        let (status, data) = self.request(method, path, form);
        assert_eq!(status, 200, "{method} {path}: {data}");
        data
    }

    /// A path below this node's CTs.
    pub fn lxc(&self, tail: &str) -> String {
        format!("/nodes/{}/lxc{tail}", self.node())
    }

    /// The CTs as the API lists them.
    pub fn cts(&self) -> Vec<Value> {
        self.call("GET", &self.lxc(""), &[]).as_array().cloned().unwrap_or_default()
    }

    /// Posts and waits for the task; its exit status.
    #[track_caller]
    pub fn task(&self, method: &str, path: &str, form: &[(&str, &str)]) -> String {
        let upid = self.call(method, path, form);
        let upid = upid.as_str().expect("the call answers a UPID").to_owned();
        let status = format!("/nodes/{}/tasks/{upid}/status", self.node());
        process::eventually(&format!("task {upid} ends"), Duration::from_secs(30), || {
            let status = self.call("GET", &status, &[]);
            (status["status"] == "stopped")
                .then(|| status["exitstatus"].as_str().unwrap_or_default().to_owned())
        })
    }

    /// The configuration files: VMID and text.
    pub fn configurations(&self) -> Vec<(u32, String)> {
        let directory = self.pmxcfs().join("nodes").join(self.node()).join("lxc");
        let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
        entries
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name();
                let vmid = name.to_str()?.strip_suffix(".conf")?.parse().ok()?;
                Some((vmid, fs::read_to_string(entry.path()).ok()?))
            })
            .collect()
    }

    /// The VMID of the CT that carries a container.
    pub fn vmid_of(&self, container: &str) -> Option<u32> {
        self.configurations()
            .into_iter()
            .find(|(_, text)| text.contains(&format!(" id={container} ")))
            .map(|(vmid, _)| vmid)
    }
}
