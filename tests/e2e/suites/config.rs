//! A wrong configuration ends in one sentence that names it, shown by `ctr`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use crate::harness::process;
use crate::harness::test::Test;
use crate::suites::cases;

cases!("config":;
    proxmox:
    missing_file_is_named,
    broken_toml_is_named_with_its_line,
    unknown_key_is_named,
    missing_key_is_named,
    wrong_value_is_named,
    missing_token_file_is_named,
    readable_token_file_is_refused,
    malformed_token_is_refused_without_showing_it,
    wrong_token_is_refused_without_showing_it,
    wrong_fingerprint_is_named,
    wrong_authority_is_refused,
    plain_http_is_refused,
    unknown_node_is_named,
    unreachable_endpoint_is_named,
    missing_init_is_named,
    full_vmid_range_is_named,
    info_and_version_answer,
);

/// Runs with a configuration made from the node's own by replacing `from` (a whole line's
/// beginning) with `to`. Returns the message.
#[track_caller]
fn refused(t: &Test, name: &str, from: &str, to: &str, needles: &[&str]) -> String {
    let good = t.node.shim_config_text();
    let mut replaced = false;
    let bad: String = good
        .lines()
        .map(|line| {
            if line.starts_with(from) {
                replaced = true;
                format!("{to}\n")
            } else {
                format!("{line}\n")
            }
        })
        .collect();
    assert!(replaced, "no line begins with {from:?}");
    refused_text(t, name, &bad, needles)
}

#[track_caller]
fn refused_text(t: &Test, name: &str, text: &str, needles: &[&str]) -> String {
    let path = t.file(&format!("{name}.toml"));
    fs::write(&path, text).expect("write the configuration");
    refused_path(t, name, &path, needles)
}

#[track_caller]
fn refused_path(t: &Test, name: &str, path: &str, needles: &[&str]) -> String {
    let id = t.id(name);
    let started = Instant::now();
    // The last occurrence of a flag counts.
    let out = t.run(&["--runtime-config-path", path], &id, &["true"]);
    assert_ne!(out.code, 0, "{name}: it runs");
    assert!(
        started.elapsed() < process::scaled(Duration::from_secs(15)),
        "{name}: took {:?}",
        started.elapsed()
    );
    let message = out.stderr.trim().to_owned();
    for needle in needles {
        assert!(message.contains(needle), "{name}: {needle:?} is not in {message:?}");
    }
    assert_eq!(message.lines().count(), 1, "{name}: more than a sentence: {message}");
    assert!(!message.contains("panicked"), "{name}: {message}");
    message
}

fn missing_file_is_named(t: &Test) {
    let path = t.file("absent.toml");
    refused_path(t, "a", &path, &[&path]);
}

fn broken_toml_is_named_with_its_line(t: &Test) {
    let good = t.node.shim_config_text();
    let before = good.lines().take_while(|line| !line.starts_with("endpoint")).count();
    let line = format!("line {}:", before + 1);
    refused(t, "a", "endpoint", "endpoint = not quoted", &["a.toml", &line]);
}

fn unknown_key_is_named(t: &Test) {
    refused(t, "a", "tags", "tags = []\ncolour = \"red\"", &["a.toml", "colour"]);
    refused(t, "b", "[log]", "[unknown-section]\nx = 1\n[log]", &["unknown-section"]);
}

fn missing_key_is_named(t: &Test) {
    refused(t, "a", "endpoint", "", &["endpoint"]);
}

fn wrong_value_is_named(t: &Test) {
    refused(t, "a", "vmid_range", "vmid_range = \"900-100\"", &["vmid_range"]);
    refused(t, "b", "vmid_range", "vmid_range = \"few\"", &["vmid_range"]);
    refused(t, "c", "tags", "tags = []\nrootfs = \"volume\"", &["rootfs"]);
    refused(t, "d", "level", "level = \"loud\"", &["level"]);
}

fn token(t: &Test, name: &str, text: &str, mode: u32) -> String {
    let path = t.file(name);
    fs::write(&path, text).expect("write the token");
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("chmod");
    path
}

fn real_token(t: &Test) -> String {
    let path = t.node.pve().get("token_file").to_owned();
    fs::read_to_string(path).expect("read the token").trim().to_owned()
}

fn missing_token_file_is_named(t: &Test) {
    let path = t.file("absent-token");
    refused(t, "a", "token_file", &format!("token_file = \"{path}\""), &[&path]);
}

fn readable_token_file_is_refused(t: &Test) {
    let path = token(t, "open-token", &real_token(t), 0o644);
    refused(t, "a", "token_file", &format!("token_file = \"{path}\""), &[&path, "0600"]);
}

fn malformed_token_is_refused_without_showing_it(t: &Test) {
    let path = token(t, "odd-token", "this-is-no-token\n", 0o600);
    let message = refused(t, "a", "token_file", &format!("token_file = \"{path}\""), &[&path]);
    assert!(!message.contains("this-is-no-token"), "{message}");
}

fn wrong_token_is_refused_without_showing_it(t: &Test) {
    let real = real_token(t);
    let (name, secret) = real.split_once('=').expect("a token");
    let wrong = "00000000-1111-2222-3333-444444444444";
    let path = token(t, "wrong-token", &format!("{name}={wrong}\n"), 0o600);
    let message = refused(t, "a", "token_file", &format!("token_file = \"{path}\""), &["token"]);
    assert!(!message.contains(wrong) && !message.contains(secret), "{message}");
}

fn wrong_fingerprint_is_named(t: &Test) {
    let wrong = ["AB"; 32].join(":");
    let line = format!("fingerprint = \"{wrong}\"");
    refused(t, "a", "ca_file", &line, &["fingerprint"]);
}

fn wrong_authority_is_refused(t: &Test) {
    // The system's roots do not know the simulator's certificate.
    refused(t, "a", "ca_file", "", &["certificate"]);
    let missing = t.file("absent-ca.pem");
    refused(t, "b", "ca_file", &format!("ca_file = \"{missing}\""), &[&missing]);
}

fn plain_http_is_refused(t: &Test) {
    refused(t, "a", "endpoint", "endpoint = \"http://127.0.0.1:8006\"", &["endpoint", "https"]);
}

fn unknown_node_is_named(t: &Test) {
    refused(t, "a", "node", "node = \"atlantis\"", &["atlantis"]);
}

fn unreachable_endpoint_is_named(t: &Test) {
    // Nothing listens on port 1.
    refused(t, "a", "endpoint", "endpoint = \"https://127.0.0.1:1\"", &["127.0.0.1:1"]);
}

fn missing_init_is_named(t: &Test) {
    let missing = t.file("absent-init");
    refused(t, "a", "init", &format!("init = \"{missing}\""), &[&missing]);
}

fn full_vmid_range_is_named(t: &Test) {
    // The last of this node's VMIDs, which nothing else reaches.
    let vmid = t.node.vmids.1;
    let line = format!("vmid_range = \"{vmid}-{vmid}\"");
    let text: String = t
        .node
        .shim_config_text()
        .lines()
        .map(|l| if l.starts_with("vmid_range") { format!("{line}\n") } else { format!("{l}\n") })
        .collect();
    let path = t.file("one.toml");
    fs::write(&path, &text).expect("write");
    let first = t.id("first");
    t.start(&["--runtime-config-path", &path], &first, &["sleep", "1000"]);
    assert_eq!(t.node.pve().vmid_of(&first), Some(vmid));
    refused_path(t, "second", &path, &[&vmid.to_string()]);
    assert_eq!(t.task(&first).map(|(_, status)| status).as_deref(), Some("RUNNING"));
}

fn info_and_version_answer(t: &Test) {
    use crate::harness::process::Running;
    use std::process::Command;
    let shim = t.node.setting.shim_binary(&t.node.setting.runtime);
    let out = Running::spawn(Command::new(&shim).arg("-v"), None).wait().ok();
    assert!(out.text().contains(env!("CARGO_PKG_VERSION")), "{}", out.text());
    let out = Running::spawn(Command::new(&shim).arg("-info"), Some(b"")).wait().ok();
    assert_eq!(out.stderr, "");
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(text.contains("io.containerd.proxmox.v2"), "{text:?}");
}
