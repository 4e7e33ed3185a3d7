//! AppArmor: which profile confines which process. A node without AppArmor refuses profiles by name.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::harness::direct::{Refusal, Stdio3};
use crate::harness::test::Test;
use crate::suites::pods::{exec, refused};
use crate::suites::{cases, userns};

cases!("apparmor":
    without_a_profile_processes_have_the_labels_they_have_with_runc;
    proxmox:
    a_profile_confines_the_workload_and_its_execs,
    a_profile_confines_a_user_namespace,
    an_exec_may_have_a_profile_of_its_own,
    a_profile_that_is_not_loaded_is_refused_by_name,
    a_profile_that_vanishes_before_the_start_is_named,
);

pub fn is_enabled() -> bool {
    fs::read("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.starts_with(b"Y"))
}

/// What confines a process; nothing where there is no AppArmor.
pub fn label(pid: u32) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/attr/current")).ok()?;
    Some(text.trim_end_matches(['\n', '\0']).to_owned())
}

const OWN_LABEL: &str = "cat /proc/self/attr/current 2>/dev/null || echo none";

/// A profile that forbids one file; unloaded at the end.
struct Profile(String);

impl Profile {
    fn load(t: &Test, name: &str) -> Profile {
        let profile = Profile(format!("{}-{name}", t.node.tag));
        let text = format!(
            "profile {} flags=(attach_disconnected,mediate_deleted) {{\n  file,\n  capability,\n  network,\n  \
             mount,\n  umount,\n  signal,\n  ptrace,\n  deny /tmp/secret rw,\n}}\n",
            profile.0
        );
        profile.parse("--replace", &text);
        profile
    }

    fn parse(&self, action: &str, text: &str) {
        let mut command = Command::new("apparmor_parser");
        command.args([action, "--skip-cache"]).stdin(Stdio::piped()).stderr(Stdio::piped());
        let mut parser = command.spawn().expect("run apparmor_parser");
        let mut input = parser.stdin.take().expect("is piped");
        input.write_all(text.as_bytes()).expect("hand over the profile");
        drop(input);
        let output = parser.wait_with_output().expect("wait for apparmor_parser");
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{action} {text}: {message}");
    }

    fn enforced(&self) -> Option<String> {
        Some(format!("{} (enforce)", self.0))
    }
}

impl Drop for Profile {
    fn drop(&mut self) {
        self.parse("--remove", &format!("profile {} {{}}\n", self.0));
    }
}

/// Where there is no AppArmor, what the test asks for must not be dropped silently.
#[track_caller]
fn is_refused_without_apparmor<T: std::fmt::Debug>(result: Result<T, Refusal>) {
    refused(result, "InvalidArgument", "process.apparmorProfile is not supported: AppArmor");
}

fn with_profile(name: &str) -> impl FnOnce(&mut Value) {
    move |spec| spec["process"]["apparmorProfile"] = json!(name)
}

fn without_a_profile_processes_have_the_labels_they_have_with_runc(t: &Test) {
    let labels = ["io.containerd.runc.v2", t.node.setting.runtime.as_str()].map(|runtime| {
        let id = t.id(if runtime.contains("runc") { "runc" } else { "ours" });
        let mut ctr = t.node.ctr_command();
        ctr.args(["run", "--detach"]).args(t.node.flags_for(runtime));
        ctr.args([crate::harness::image::IMAGE, &id, "sleep", "1000"]);
        crate::harness::process::run(&mut ctr).ok();
        let of_exec = t.exec_sh(&id, OWN_LABEL).ok().text();
        let labels = (label(t.pid(&id)), of_exec);
        t.remove(&id);
        labels
    });
    // Distributions have a profile for runc that confines nothing, which its containers inherit.
    let [(runc, runc_exec), (ours, our_exec)] = labels;
    let unnamed = |label: String| label.replace("runc (unconfined)", "unconfined");
    assert_eq!((&ours, &our_exec), (&runc.map(unnamed), &unnamed(runc_exec)));
    let expected = is_enabled().then(|| "unconfined".to_owned());
    assert_eq!((ours, our_exec), (expected.clone(), expected.unwrap_or("none".to_owned())));
}

fn a_profile_confines_the_workload_and_its_execs(t: &Test) {
    let (id, driver) = (t.id("a"), t.driver());
    let script = "echo x > /tmp/free; echo x > /tmp/secret; exec sleep 1000";
    let mut spec = driver.spec(&id, &["sh", "-c", script]);
    if !is_enabled() {
        return is_refused_without_apparmor(t.run_spec(&id, &["true"], with_profile("any")));
    }
    let profile = Profile::load(t, "a");
    with_profile(&profile.0)(&mut spec);
    let shim = driver.start(&id, &spec);
    let pid = shim.create(&Stdio3::default()).expect("create");
    assert_eq!(label(pid).as_deref(), Some("unconfined"), "while init prepares the container");
    shim.start("").expect("start");
    assert_eq!(label(pid), profile.enforced());
    let (_, of_exec) = exec(t, &shim, "label", OWN_LABEL);
    assert_eq!(Some(of_exec), profile.enforced());
    let (status, text) = exec(t, &shim, "write", "ls /tmp; echo x > /tmp/secret");
    assert_ne!(status, 0);
    assert!(text.contains("free") && text.contains("Permission denied"), "{text}");
    let (_, text) = exec(t, &shim, "look", "test -e /tmp/secret || echo absent");
    assert_eq!(text, "absent", "the first process could write to it");
    shim.finish();
    driver.remove_bundle(&id);
}

fn a_profile_confines_a_user_namespace(t: &Test) {
    let id = t.id("a");
    let change = |name: &str| {
        let name = name.to_owned();
        move |spec: &mut Value| {
            userns::in_user_namespace(spec);
            with_profile(&name)(spec);
        }
    };
    if !is_enabled() {
        return is_refused_without_apparmor(t.run_spec(&id, &["true"], change("any")));
    }
    let profile = Profile::load(t, "user");
    let own_label = ["sh", "-c", OWN_LABEL];
    let (_, text) = t.run_spec(&id, &own_label, change(&profile.0)).expect("runs");
    assert_eq!(Some(text), profile.enforced());
    let (_, text) = t.exec_spec(&t.id("e"), &own_label, change(&profile.0), |_| ()).expect("runs");
    assert_eq!(Some(text), profile.enforced());
}

fn an_exec_may_have_a_profile_of_its_own(t: &Test) {
    let own_label = ["sh", "-c", OWN_LABEL];
    if !is_enabled() {
        let with = |process: &mut Value| process["apparmorProfile"] = json!("any");
        return is_refused_without_apparmor(t.exec_spec(&t.id("a"), &own_label, |_| (), with));
    }
    let (first, second) = (Profile::load(t, "first"), Profile::load(t, "second"));
    let label_with = |name: &str, own: Option<&str>| {
        let profile = own.unwrap_or(&first.0).to_owned();
        let process = |process: &mut Value| process["apparmorProfile"] = json!(profile);
        let outcome = t.exec_spec(&t.id(name), &own_label, with_profile(&first.0), process);
        Some(outcome.expect("runs").1)
    };
    assert_eq!(label_with("a", None), first.enforced());
    assert_eq!(label_with("b", Some(&second.0)), second.enforced());
    assert_eq!(label_with("c", Some("unconfined")).as_deref(), Some("unconfined"));
}

fn a_profile_that_is_not_loaded_is_refused_by_name(t: &Test) {
    let (id, driver) = (t.id("a"), t.driver());
    let words = match is_enabled() {
        true => "process.apparmorProfile is \"e2e-absent\", which is not loaded here",
        false => "process.apparmorProfile is not supported: AppArmor is not enabled",
    };
    let shim = driver.start(&id, &{
        let mut spec = driver.spec(&id, &["true"]);
        with_profile("e2e-absent")(&mut spec);
        spec
    });
    refused(shim.create(&Stdio3::default()), "InvalidArgument", words);
    shim.finish();
    assert_eq!(t.node.pve().vmid_of(&id), None, "no CT was made for it");
    driver.remove_bundle(&id);

    let shim = driver.start(&id, &driver.spec(&id, &["sleep", "1000"]));
    shim.create(&Stdio3::default()).expect("create");
    shim.start("").expect("start");
    let process = json!({"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0},
        "apparmorProfile": "e2e-absent"});
    let added = shim.exec("e", &process, &Stdio3::default());
    refused(added.and_then(|()| shim.start("e")), "InvalidArgument", words);
    assert_eq!(exec(t, &shim, "alive", "echo alive").1, "alive");
    shim.finish();
    driver.remove_bundle(&id);
}

fn a_profile_that_vanishes_before_the_start_is_named(t: &Test) {
    let (id, driver) = (t.id("a"), t.driver());
    if !is_enabled() {
        return is_refused_without_apparmor(t.run_spec(&id, &["true"], with_profile("any")));
    }
    let profile = Profile::load(t, "vanishing");
    let name = profile.0.clone();
    let mut spec = driver.spec(&id, &["sleep", "1000"]);
    with_profile(&name)(&mut spec);
    let shim = driver.start(&id, &spec);
    shim.create(&Stdio3::default()).expect("create");
    drop(profile);
    let refusal = shim.start("").expect_err("it must not run without its profile");
    assert!(refusal.message.contains(&name), "{refusal:?}");
    assert!(refusal.message.contains("apparmor"), "{refusal:?}");
    shim.finish();
    driver.remove_bundle(&id);
}
