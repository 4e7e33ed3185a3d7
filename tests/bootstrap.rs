//! containerd's protocol with the binary itself: `start`, `delete`, `-info`, `-v`, and the server's
//! life, as containerd 1.6 to 2.4 see it.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::ShutdownRequest;
use containerd_shim_protos::api::{ConnectRequest, ConnectResponse, DeleteResponse, Empty};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult, Extension};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::types::introspection::RuntimeInfo;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const SHIM: &str = env!("CARGO_BIN_EXE_containerd-shim-proxmox-v2");
const NAMESPACE: &str = "boot-test";

/// A directory with everything a start needs; ends whatever was started with it.
struct Host {
    dir: tempfile::TempDir,
    node: Option<Child>,
}

impl Host {
    fn new() -> Host {
        let dir = tempfile::Builder::new().prefix("boot").tempdir().unwrap();
        let mut host = Host { dir, node: None };
        let proxmox = host.start_node();
        let config = format!(
            "[proxmox]\n{proxmox}\n[paths]\nrun_dir = \"{0}/run\"\nstate_dir = \"{0}/state\"\n",
            host.path("").display()
        );
        fs::write(host.path("config.toml"), config).unwrap();
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The simulated node, which was built beside the shim, and the configuration for it.
    fn start_node(&mut self) -> String {
        let program = Path::new(SHIM).with_file_name("pve-sim");
        let root = self.path("node");
        let ready = root.join("ready.json");
        let node = Command::new(program)
            .arg("--root")
            .arg(&root)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(self.path("node.log")).unwrap())
            .spawn();
        let mut node = node.expect("start the simulator: cargo build -p pve-sim");
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(10) && node.try_wait().unwrap().is_none() {
            if let Ok(json) = fs::read(&ready) {
                let info: serde_json::Value = serde_json::from_slice(&json).unwrap();
                self.node = Some(node);
                return ["endpoint", "node", "fingerprint", "token_file", "pmxcfs"]
                    .map(|key| format!("{key} = {}", info[key]))
                    .join("\n");
            }
            sleep(Duration::from_millis(10));
        }
        let _ = node.kill();
        let end = node.wait().unwrap();
        let log = fs::read_to_string(self.path("node.log")).unwrap();
        panic!("the simulator does not listen ({end}): {log}");
    }

    fn bundle(&self, id: &str) -> PathBuf {
        let bundle = self.path(&format!("bundles/{id}"));
        fs::create_dir_all(&bundle).unwrap();
        bundle
    }

    /// `runtimeoptions.v1.Options` with the path of a configuration file, as CRI and `ctr` send it.
    fn options(&self, config: &Path) -> Any {
        let path = config.as_os_str().as_encoded_bytes();
        let mut any = Any::new();
        any.type_url = "runtimeoptions.v1.Options".into();
        any.value = [&[0x12, u8::try_from(path.len()).unwrap()], path].concat();
        any
    }

    fn legacy_input(&self) -> Vec<u8> {
        self.options(&self.path("config.toml")).write_to_bytes().unwrap()
    }

    fn bootstrap_input(&self, id: &str) -> Vec<u8> {
        let mut extension = Extension::new();
        extension.value = MessageField::some(self.options(&self.path("config.toml")));
        let mut params = BootstrapParams::new();
        params.instance_id = id.into();
        params.namespace = NAMESPACE.into();
        params.containerd_version = "2.3.0".into();
        params.containerd_grpc_address = "/run/none.sock".into();
        params.containerd_ttrpc_address = "unix:///run/none.sock.ttrpc".into();
        params.socket_dir = Some(self.path("s2").display().to_string());
        params.extensions = vec![extension];
        params.write_to_bytes().unwrap()
    }

    /// The action as containerd calls it.
    fn action(&self, id: &str, action: &[&str]) -> Command {
        let mut command = Command::new(SHIM);
        command
            .args(["-namespace", NAMESPACE, "-id", id, "-address", "/run/none.sock"])
            .args(action)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap())
            .env("TTRPC_ADDRESS", "/run/none.sock.ttrpc")
            .env("GOMAXPROCS", "2")
            .env("MAX_SHIM_VERSION", "2")
            .env("HTTPS_PROXY", "http://planted-secret@proxy")
            .env("SHIM_SOCKET_DIR", self.path("s"))
            .current_dir(self.bundle(id))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn start(&self, id: &str, input: &[u8]) -> Output {
        run(&mut self.action(id, &["start"]), input)
    }

    /// Processes of this host: those with its sockets' directory or a bundle as working directory.
    fn processes(&self) -> Vec<i32> {
        let bundles = self.path("bundles");
        let of = |pid: i32| fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
        let pids = fs::read_dir("/proc").unwrap().flatten();
        let pids = pids.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
        pids.filter(|pid| of(*pid).starts_with(&bundles)).collect()
    }

    fn sockets(&self) -> usize {
        let count = |name| fs::read_dir(self.path(name)).map_or(0, |entries| entries.count());
        count("s") + count("s2")
    }

    fn assert_empty(&self) {
        within(Duration::from_secs(2), "processes end", || self.processes().is_empty());
        within(Duration::from_secs(2), "sockets go", || self.sockets() == 0);
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for pid in self.processes() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        if let Some(node) = &mut self.node {
            let _ = kill(Pid::from_raw(node.id() as i32), Signal::SIGTERM);
            let _ = node.wait();
        }
    }
}

fn run(command: &mut Command, input: &[u8]) -> Output {
    let mut child = command.spawn().unwrap();
    // The program may fail before it reads.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

fn within(limit: Duration, what: &str, done: impl Fn() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < limit, "not within {limit:?}: {what}");
        sleep(Duration::from_millis(5));
    }
}

/// The reply of a successful action; nothing may stand on stderr beside it.
fn reply(output: Output) -> Vec<u8> {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && stderr.is_empty(), "{:?}: {stderr}", output.status);
    output.stdout
}

fn address(output: Output) -> String {
    String::from_utf8(reply(output)).unwrap()
}

/// The single sentence of a failed action.
fn sentence(output: &Output) -> String {
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(output.stdout.is_empty(), "{:?}", output.stdout);
    assert!(!stderr.is_empty() && !stderr.contains('\n'), "{stderr:?}");
    stderr
}

/// One call of the task service.
fn call<T: Message>(address: &str, version: &str, method: &str, request: &impl Message) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let client = ttrpc::r#async::Client::connect(address).await.unwrap();
        let mut call = ttrpc::Request::new();
        call.service = format!("containerd.task.{version}.Task");
        call.method = method.into();
        call.payload = request.write_to_bytes().unwrap();
        call.timeout_nano = 5_000_000_000;
        T::parse_from_bytes(&client.request(call).await.unwrap().payload).unwrap()
    })
}

fn shim_pid(address: &str, version: &str) -> i32 {
    call::<ConnectResponse>(address, version, "Connect", &ConnectRequest::new()).shim_pid as i32
}

fn socket_of(address: &str) -> &Path {
    Path::new(address.strip_prefix("unix://").unwrap())
}

fn status_field(pid: i32, name: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line[name.len() + 1..].trim().to_string()
}

#[test]
fn an_old_containerd_gets_the_bare_address_of_a_shim_that_serves_both_versions() {
    let host = Host::new();
    let address = address(host.start("c1", &host.legacy_input()));
    assert!(address.starts_with(&format!("unix://{}/", host.path("s").display())), "{address}");
    assert_eq!(fs::read_to_string(host.bundle("c1").join("address")).unwrap(), address);
    assert_eq!(fs::metadata(socket_of(&address)).unwrap().mode() & 0o777, 0o600);
    let pid = shim_pid(&address, "v2");
    assert_eq!(shim_pid(&address, "v3"), pid);
    assert_eq!(host.processes(), [pid]);
    kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
    host.assert_empty();
}

#[test]
fn a_new_containerd_gets_a_bootstrap_result_and_its_socket_directory() {
    let host = Host::new();
    let bytes = reply(host.start("c1", &host.bootstrap_input("c1")));
    let result = BootstrapResult::parse_from_bytes(&bytes).unwrap();
    assert_eq!((result.version, result.protocol.as_str()), (3, "ttrpc"));
    assert!(socket_of(&result.address).starts_with(host.path("s2")));
    let pid = shim_pid(&result.address, "v3");
    kill(Pid::from_raw(pid), Signal::SIGINT).unwrap();
    host.assert_empty();
}

#[test]
fn the_server_is_detached_and_carries_nothing_over() {
    let host = Host::new();
    let address = address(host.start("c1", &host.legacy_input()));
    let pid = shim_pid(&address, "v2");
    let read = |name: &str| fs::read(format!("/proc/{pid}/{name}")).unwrap();
    let words = |name: &str| {
        let text = String::from_utf8(read(name)).unwrap();
        text.split('\0').filter(|w| !w.is_empty()).map(String::from).collect::<Vec<_>>()
    };
    let line =
        format!("containerd-shim-proxmox-v2 -namespace {NAMESPACE} -id c1 -address /run/none.sock");
    assert_eq!(words("cmdline").join(" "), line);
    assert_eq!(String::from_utf8(read("comm")).unwrap(), "containerd-shim\n");
    let environment = words("environ");
    let kept = ["PATH=", "SSL_CERT_FILE=", "SSL_CERT_DIR="];
    assert!(
        environment.iter().all(|v| kept.iter().any(|name| v.starts_with(name))),
        "{environment:?}"
    );
    assert_eq!(fs::read_link(format!("/proc/{pid}/cwd")).unwrap(), host.bundle("c1"));
    for fd in 0..3 {
        let target = fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap();
        assert_eq!(target, Path::new("/dev/null"), "descriptor {fd}");
    }
    // A session of its own.
    let stat = String::from_utf8(read("stat")).unwrap();
    let session = stat.rsplit(") ").next().unwrap().split(' ').nth(3).unwrap().to_string();
    assert_eq!(session, pid.to_string());
    let threads: usize = status_field(pid, "Threads").parse().unwrap();
    assert!(threads <= 4, "{threads} threads");
    let own: i32 = fs::read_to_string("/proc/self/oom_score_adj").unwrap().trim().parse().unwrap();
    let score = String::from_utf8(read("oom_score_adj")).unwrap();
    assert_eq!(score.trim(), (own + 1).min(1000).to_string());
    kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
    host.assert_empty();
}

#[test]
fn shutdown_is_answered_and_the_process_is_gone_at_once() {
    let host = Host::new();
    let address = address(host.start("c1", &host.legacy_input()));
    let pid = shim_pid(&address, "v2");
    // Another client that stays connected must not delay the end.
    let idle = std::os::unix::net::UnixStream::connect(socket_of(&address)).unwrap();
    let mut request = ShutdownRequest::new();
    request.id = "c1".into();
    let begin = Instant::now();
    call::<Empty>(&address, "v2", "Shutdown", &request);
    within(Duration::from_millis(500), "the process ends", || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
        stat.map_or(true, |stat| stat.contains(") Z "))
    });
    println!("shutdown to end: {:?}", begin.elapsed());
    assert!(!socket_of(&address).exists());
    drop(idle);
    host.assert_empty();
}

#[test]
fn a_configuration_that_is_missing_or_wrong_fails_start_with_one_sentence_and_leaves_nothing() {
    let host = Host::new();
    fs::write(host.path("broken.toml"), "[proxmox\nendpoint = 1\n").unwrap();
    fs::write(host.path("empty.toml"), "").unwrap();
    for name in ["none.toml", "broken.toml", "empty.toml"] {
        let config = host.path(name);
        let output = host.start("c1", &host.options(&config).write_to_bytes().unwrap());
        let sentence = sentence(&output);
        assert!(sentence.contains(config.to_str().unwrap()), "{sentence}");
        assert!(!host.bundle("c1").join("address").exists());
        host.assert_empty();
    }
}

#[test]
fn a_wrong_command_line_or_bundle_fails_with_one_sentence() {
    let host = Host::new();
    let bad_id = run(host.action("c1", &[]).args(["-id", "../x", "start"]), b"");
    assert!(sentence(&bad_id).contains("\"../x\""));
    let unknown = run(&mut host.action("c1", &["-nonsense", "start"]), b"");
    assert!(sentence(&unknown).contains("nonsense"));
    let by_hand = run(&mut host.action("c1", &[]), b"");
    assert!(by_hand.stdout.is_empty() && by_hand.status.code() == Some(1));
    fs::write(host.bundle("c1").join("config.json"), "{\"annotations\": 7}").unwrap();
    let output = host.start("c1", &host.legacy_input());
    assert!(sentence(&output).contains("config.json"));
    host.assert_empty();
}

#[test]
fn input_without_end_is_refused() {
    let host = Host::new();
    let output = host.start("c1", &vec![0; 5 << 20]);
    assert!(sentence(&output).contains("stdin"));
    host.assert_empty();
}

#[test]
fn a_second_container_of_a_pod_gets_the_first_ones_address() {
    let host = Host::new();
    let spec = r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod"}}"#;
    for id in ["c1", "c2"] {
        fs::write(host.bundle(id).join("config.json"), spec).unwrap();
    }
    let first = address(host.start("c1", &host.legacy_input()));
    let second = address(host.start("c2", &host.legacy_input()));
    assert_eq!(first, second);
    assert_eq!(fs::read_to_string(host.bundle("c2").join("address")).unwrap(), second);
    assert_eq!(host.processes().len(), 1);
    // Cleaning up after one of them leaves the living shim alone.
    let bundle = host.bundle("c2");
    let delete = ["-bundle", bundle.to_str().unwrap(), "delete"];
    run(&mut host.action("c2", &delete), b"");
    let pid = shim_pid(&first, "v2");
    kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
    host.assert_empty();
}

#[test]
fn after_a_crash_delete_answers_and_a_new_start_replaces_the_dead_socket() {
    let host = Host::new();
    for _ in 0..2 {
        let address = address(host.start("c1", &host.legacy_input()));
        let pid = shim_pid(&address, "v2");
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        within(Duration::from_secs(2), "the shim dies", || host.processes().is_empty());
        assert!(socket_of(&address).exists());
    }
    let bundle = host.bundle("c1");
    for _ in 0..2 {
        let delete = ["-bundle", bundle.to_str().unwrap(), "delete"];
        let bytes = reply(run(&mut host.action("c1", &delete), b""));
        DeleteResponse::parse_from_bytes(&bytes).unwrap();
        host.assert_empty();
    }
}

#[test]
fn a_server_whose_address_containerd_never_got_ends() {
    let host = Host::new();
    let (closed, pipe) = std::os::unix::net::UnixStream::pair().unwrap();
    drop(closed);
    let mut command = host.action("c1", &["start"]);
    let mut child = command.stdout(std::os::fd::OwnedFd::from(pipe)).spawn().unwrap();
    drop(command);
    child.stdin.take().unwrap().write_all(&host.legacy_input()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(sentence(&output).contains("reply"));
    host.assert_empty();
}

#[test]
fn a_start_that_is_killed_leaves_no_server() {
    let host = Host::new();
    for delay in [0, 2, 5, 10, 20] {
        let mut child = host.action("c1", &["start"]).spawn().unwrap();
        child.stdin.take().unwrap().write_all(&host.legacy_input()).unwrap();
        sleep(Duration::from_millis(delay));
        child.kill().unwrap();
        let output = child.wait_with_output().unwrap();
        if output.status.success() {
            // It was faster than the kill: the server stays, as it should.
            let address = String::from_utf8(output.stdout).unwrap();
            kill(Pid::from_raw(shim_pid(&address, "v2")), Signal::SIGTERM).unwrap();
        }
        within(Duration::from_secs(20), "the server ends", || host.processes().is_empty());
    }
    // A killed start may leave the socket file itself; the next one replaces it.
    let address = address(host.start("c1", &host.legacy_input()));
    kill(Pid::from_raw(shim_pid(&address, "v2")), Signal::SIGTERM).unwrap();
    host.assert_empty();
}

#[test]
fn the_log_goes_to_containerds_fifo() {
    let host = Host::new();
    let fifo = host.bundle("c1").join("log");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let reading = std::thread::spawn({
        let fifo = fifo.clone();
        move || {
            let mut text = String::new();
            fs::File::open(fifo).unwrap().read_to_string(&mut text).unwrap();
            text
        }
    });
    let address = address(host.start("c1", &host.legacy_input()));
    kill(Pid::from_raw(shim_pid(&address, "v2")), Signal::SIGTERM).unwrap();
    // The end of the file shows that the shim closed it.
    let text = reading.join().unwrap();
    let fields = format!("namespace={NAMESPACE} shim=c1");
    assert!(text.lines().count() >= 2, "{text}");
    for line in text.lines() {
        assert!(line.starts_with("time=\"") && line.ends_with(&fields), "{line}");
    }
    assert!(text.contains("msg=\"shim started\"") && text.contains("msg=\"shim stops\""), "{text}");
    host.assert_empty();
}

#[test]
fn a_stranger_on_the_socket_path_is_an_error_that_names_it() {
    let host = Host::new();
    let first = address(host.start("c1", &host.legacy_input()));
    let path = socket_of(&first).to_path_buf();
    kill(Pid::from_raw(shim_pid(&first, "v2")), Signal::SIGTERM).unwrap();
    host.assert_empty();
    fs::write(&path, "not a socket").unwrap();
    let output = host.start("c1", &host.legacy_input());
    assert!(sentence(&output).contains(path.to_str().unwrap()));
    assert!(path.exists());
    fs::remove_file(&path).unwrap();
    // A shim that answers, whoever it is, is what containerd will talk to.
    let _other = UnixListener::bind(&path).unwrap();
    assert_eq!(address(host.start("c1", &host.legacy_input())), first);
    assert!(host.processes().is_empty());
}

#[test]
fn info_names_the_runtime_and_its_features() {
    let mut options = Any::new();
    options.type_url = "containerd.runc.v1.Options".into();
    let mut command = Command::new(SHIM);
    command.arg("-info").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let bytes = reply(run(&mut command, &options.write_to_bytes().unwrap()));
    let info = RuntimeInfo::parse_from_bytes(&bytes).unwrap();
    assert_eq!(info.name, "io.containerd.proxmox.v2");
    assert_eq!(info.version.version, env!("CARGO_PKG_VERSION"));
    assert_eq!(info.options.as_ref(), Some(&options));
    let features = info.features.unwrap();
    assert_eq!(
        features.type_url,
        "types.containerd.io/opencontainers/runtime-spec/1/features/Features"
    );
    let features: serde_json::Value = serde_json::from_slice(&features.value).unwrap();
    assert_eq!(features["ociVersionMin"], "1.0.0");
    let has = |list: &serde_json::Value, word: &str| {
        list.as_array().unwrap().iter().any(|entry| entry == word)
    };
    assert!(has(&features["mountOptions"], "rro"));
    assert!(has(&features["hooks"], "createRuntime"));
    assert!(has(&features["linux"]["namespaces"], "pid"));
    assert!(has(&features["linux"]["capabilities"], "CAP_SYS_ADMIN"));
    assert_eq!(features["linux"]["mountExtensions"]["idmap"]["enabled"], true);
    assert_eq!(features["linux"]["selinux"]["enabled"], false);
    assert_eq!(features["linux"]["cgroup"]["v2"], true);
}

#[test]
fn version_and_help_are_for_people() {
    let text = |flag: &str| {
        let output = Command::new(SHIM).arg(flag).stdin(Stdio::null()).output().unwrap();
        String::from_utf8(reply(output)).unwrap()
    };
    for flag in ["-v", "-version"] {
        let version = text(flag);
        assert!(version.starts_with("containerd-shim-proxmox-v2:\n  Version:  "), "{version}");
        assert!(
            version.contains(env!("CARGO_PKG_VERSION")) && version.contains("Rust version: 1.")
        );
    }
    for flag in ["-h", "--help"] {
        let help = text(flag);
        assert!(help.contains("/etc/containerd-shim-proxmox/config.toml"), "{help}");
        assert!(help.contains("man 8 containerd-shim-proxmox-v2"), "{help}");
    }
}

#[test]
fn starts_in_parallel_do_not_disturb_each_other() {
    let host = Host::new();
    let input = host.legacy_input();
    let addresses: Vec<String> = std::thread::scope(|scope| {
        let starts: Vec<_> = (0..8)
            .map(|n| {
                let (host, input) = (&host, &input);
                scope.spawn(move || address(host.start(&format!("p{n}"), input)))
            })
            .collect();
        starts.into_iter().map(|start| start.join().unwrap()).collect()
    });
    assert_eq!(host.processes().len(), 8);
    for address in &addresses {
        kill(Pid::from_raw(shim_pid(address, "v2")), Signal::SIGTERM).unwrap();
    }
    host.assert_empty();
}
