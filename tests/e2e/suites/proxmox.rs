//! The Proxmox side: what an administrator sees, and what happens when one acts.

use std::fs;
use std::time::Duration;

use crate::harness::image::IMAGE;
use crate::harness::process::{self, eventually};
use crate::harness::test::Test;
use crate::suites::cases;

cases!("proxmox":;
    proxmox:
    ct_is_listed_with_name_tags_notes_and_pid,
    image_that_containerd_does_not_know_is_shown_by_its_name,
    name_that_nerdctl_gave_is_shown,
    ct_is_a_unit_of_the_node,
    configuration_is_conservative,
    stop_in_the_ui_is_status_137,
    shutdown_in_the_ui_sends_the_stop_signal,
    destroyed_ct_can_still_be_deleted,
    ct_of_an_ended_container_is_not_running,
    foreign_guests_in_the_range_are_not_touched,
    ct_that_changed_its_owner_is_not_destroyed,
    cts_of_an_earlier_boot_are_swept_and_only_ours,
    ct_start_in_the_ui_does_not_resurrect,
    unreachable_proxmox_does_not_disturb_a_running_container,
);

/// The VMID of a container.
#[track_caller]
fn vmid(t: &Test, id: &str) -> u32 {
    t.node.pve().vmid_of(id).unwrap_or_else(|| panic!("no CT of {id}"))
}

fn ct_is_listed_with_name_tags_notes_and_pid(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    let vmid = vmid(t, &id);
    assert!((t.node.vmids.0..=t.node.vmids.1).contains(&vmid));
    let pve = t.node.pve();
    let list = pve.cts();
    let ct = list
        .iter()
        .find(|ct| ct["vmid"].to_string().trim_matches('"') == vmid.to_string())
        .unwrap_or_else(|| panic!("CT {vmid} is not listed: {list:?}"));
    assert_eq!(ct["status"], "running");
    let tags = ct["tags"].as_str().unwrap_or_default();
    assert!(tags.contains("containerd") && tags.contains("e2e"), "tags: {tags}");
    let name = ct["name"].as_str().unwrap_or_default();
    assert!(!name.is_empty() && name.len() <= 63, "name: {name}");
    let current = pve.call("GET", &pve.lxc(&format!("/{vmid}/status/current")), &[]);
    let config = pve.call("GET", &pve.lxc(&format!("/{vmid}/config")), &[]);
    drop(pve);
    assert_eq!(current["pid"].to_string().trim_matches('"'), t.pid(&id).to_string());
    let notes = config["description"].as_str().unwrap_or_default();
    for part in [id.as_str(), t.node.namespace.as_str()] {
        assert!(notes.contains(part), "{part} is not in the notes: {notes}");
    }
    let digest = t.image_digest();
    assert!(notes.contains(&format!("\nimage: {IMAGE}\ndigest: {digest}\n")), "{notes}");
}

fn image_that_containerd_does_not_know_is_shown_by_its_name(t: &Test) {
    let id = t.id("a");
    let annotation = "io.kubernetes.cri.image-name=docker.io/library/unknown:1";
    t.start_idle(&["--annotation", annotation], &id);
    let vmid = vmid(t, &id);
    let pve = t.node.pve();
    let config = pve.call("GET", &pve.lxc(&format!("/{vmid}/config")), &[]);
    let notes = config["description"].as_str().unwrap_or_default();
    assert!(notes.contains("\nimage: docker.io/library/unknown:1\n"), "{notes}");
    assert!(!notes.contains("digest"), "{notes}");
}

fn name_that_nerdctl_gave_is_shown(t: &Test) {
    let id = t.id("a");
    t.start_idle(&["--annotation", "nerdctl/name=my_web\nlxc.init.cmd: x"], &id);
    let vmid = vmid(t, &id);
    let pve = t.node.pve();
    let config = pve.call("GET", &pve.lxc(&format!("/{vmid}/config")), &[]);
    let text = pve.configurations().into_iter().find(|(v, _)| *v == vmid).expect("its file").1;
    drop(pve);
    assert_eq!(config["hostname"], "my-web-lxc-init-cmd--x");
    let notes = config["description"].as_str().unwrap_or_default();
    assert!(notes.contains("my_web") && notes.contains(&id), "{notes}");
    assert!(!text.lines().any(|line| line.starts_with("lxc.init.cmd")), "{text}");
}

fn ct_is_a_unit_of_the_node(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    let parent = |pid: u32| {
        let parent = process::status_field(pid, "PPid").expect("a parent");
        parent.parse::<u32>().expect("a number")
    };
    let monitor = parent(t.pid(&id));
    // Another release's one is run by its own loader.
    let command = fs::read_to_string(format!("/proc/{monitor}/cmdline")).expect("its command line");
    assert!(command.contains("lxc-start\0"), "{command:?}");
    if t.node.setting.units != "systemd" {
        return assert_eq!(parent(monitor), t.node.pve().pid());
    }
    let unit = format!("pve-container@{}.service", vmid(t, &id));
    let show = || {
        let properties = "--property=MainPID,ActiveState,Delegate,KillMode,Type";
        let mut command = std::process::Command::new("systemctl");
        process::run(command.args(["show", properties, &unit])).ok().text()
    };
    let shown = show();
    for line in [
        &format!("MainPID={monitor}"),
        "ActiveState=active",
        "Delegate=yes",
        "KillMode=mixed",
        "Type=simple",
    ] {
        assert!(shown.lines().any(|shown| shown == line), "{line}: {shown}");
    }
    t.remove(&id);
    eventually("the unit has ended", Duration::from_secs(10), || {
        show().contains("ActiveState=inactive").then_some(())
    });
}

fn configuration_is_conservative(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    let vmid = vmid(t, &id);
    let pve = t.node.pve();
    let config = pve.call("GET", &pve.lxc(&format!("/{vmid}/config")), &[]);
    let text = pve.configurations().into_iter().find(|(v, _)| *v == vmid).expect("its file").1;
    drop(pve);
    assert_eq!(config["ostype"], "unmanaged");
    assert!(
        ["0", ""].contains(
            &config["onboot"].to_string().replace(['"'], "").replace("null", "").as_str()
        )
    );
    let raw: Vec<_> = text.lines().filter(|line| line.starts_with("lxc.")).collect();
    assert!(raw.iter().any(|line| line.starts_with("lxc.include")), "{raw:?}");
    assert!(raw.len() <= 2, "everything else belongs in the include: {raw:?}");
}

fn stop_in_the_ui_is_status_137(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    let vmid = vmid(t, &id);
    let pve = t.node.pve();
    let exit = pve.task("POST", &pve.lxc(&format!("/{vmid}/status/stop")), &[]);
    drop(pve);
    assert_eq!(exit, "OK");
    assert_eq!(t.wait_exit(&id).exit_status(), 137);
    t.wait_status(&id, "STOPPED");
    t.delete(&id);
}

fn shutdown_in_the_ui_sends_the_stop_signal(t: &Test) {
    let id = t.id("a");
    t.start_with_trap(&[], &id, "trap 'exit 12' TERM; while :; do sleep 0.1; done");
    let vmid = vmid(t, &id);
    let pve = t.node.pve();
    let exit =
        pve.task("POST", &pve.lxc(&format!("/{vmid}/status/shutdown")), &[("timeout", "10")]);
    drop(pve);
    assert_eq!(exit, "OK");
    assert_eq!(t.wait_exit(&id).exit_status(), 12);
}

fn destroyed_ct_can_still_be_deleted(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    let vmid = vmid(t, &id);
    let pve = t.node.pve();
    pve.task("POST", &pve.lxc(&format!("/{vmid}/status/stop")), &[]);
    drop(pve);
    t.wait_exit(&id);
    t.wait_status(&id, "STOPPED");
    let pve = t.node.pve();
    let still_there = pve.vmid_of(&id).is_some();
    if still_there {
        pve.task("DELETE", &pve.lxc(&format!("/{vmid}")), &[]);
    }
    drop(pve);
    t.delete(&id);
}

fn ct_of_an_ended_container_is_not_running(t: &Test) {
    let id = t.id("a");
    t.start(&[], &id, &["true"]);
    t.wait_exit(&id);
    eventually("Proxmox does not show it running", Duration::from_secs(10), || {
        let pve = t.node.pve();
        let Some(vmid) = pve.vmid_of(&id) else { return Some(()) };
        let (status, current) =
            pve.request("GET", &pve.lxc(&format!("/{vmid}/status/current")), &[]);
        (status != 200 || current["status"] == "stopped").then_some(())
    });
}

/// A guest that somebody else made, at the lowest free VMID of the range.
fn foreign(t: &Test, text: &str) -> (u32, std::path::PathBuf) {
    let pve = t.node.pve();
    let directory = pve.pmxcfs().join("nodes").join(pve.node()).join("lxc");
    drop(pve);
    for vmid in t.node.vmids.0..=t.node.vmids.1 {
        let path = directory.join(format!("{vmid}.conf"));
        if fs::OpenOptions::new().write(true).create_new(true).open(&path).is_ok() {
            fs::write(&path, text).expect("write the guest's configuration");
            return (vmid, path);
        }
    }
    panic!("no free VMID in the range");
}

const FOREIGN_CT: &str = "arch: amd64\nhostname: somebody-elses\nmemory: 512\nostype: debian\n\
                          rootfs: local:100/vm-100-disk-0.raw,size=4G\nswap: 512\n";

fn foreign_guests_in_the_range_are_not_touched(t: &Test) {
    // Only CTs: that a VM's VMID can't be claimed is the work of pmxcfs, which refuses one in any
    // directory of the cluster. The simulator's directory does not know of VMs.
    let (ct, ct_file) = foreign(t, FOREIGN_CT);
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        for round in 0..3 {
            let id = t.id(&format!("r{round}"));
            t.start_idle(&[], &id);
            let own = vmid(t, &id);
            assert!(own != ct, "VMID {own} belongs to another guest");
        }
        for round in 0..3 {
            t.remove(&t.id(&format!("r{round}")));
        }
        assert_eq!(fs::read_to_string(&ct_file).ok().as_deref(), Some(FOREIGN_CT));
    }));
    let _ = fs::remove_file(ct_file);
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}

fn ct_that_changed_its_owner_is_not_destroyed(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    let vmid = vmid(t, &id);
    let path = {
        let pve = t.node.pve();
        pve.pmxcfs().join("nodes").join(pve.node()).join("lxc").join(format!("{vmid}.conf"))
    };
    t.kill(&id, "SIGKILL").ok();
    t.wait_exit(&id);
    // Meanwhile somebody restored another guest under this VMID.
    fs::write(&path, FOREIGN_CT).expect("write the other guest");
    t.wait_status(&id, "STOPPED");
    t.ctr(&["tasks", "delete", &id]);
    std::thread::sleep(Duration::from_secs(2));
    let after = fs::read_to_string(&path);
    assert_eq!(after.ok().as_deref(), Some(FOREIGN_CT), "another owner's CT was changed");
    // Its owner removes it; then the task can be deleted, too.
    let pve = t.node.pve();
    let (status, _) = pve.request("DELETE", &pve.lxc(&format!("/{vmid}")), &[]);
    assert_eq!(status, 200);
    eventually("the other guest is gone", Duration::from_secs(10), || {
        (!path.exists()).then_some(())
    });
}

/// After a reboot the run directories are gone, but not the CTs' configuration.
fn cts_of_an_earlier_boot_are_swept_and_only_ours(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    let own = vmid(t, &id);
    let directory = {
        let pve = t.node.pve();
        pve.pmxcfs().join("nodes").join(pve.node()).join("lxc")
    };
    let text = fs::read_to_string(directory.join(format!("{own}.conf"))).expect("own CT");
    let field = |name: &str| {
        let at = text.find(&format!(" {name}=")).expect(name) + name.len() + 2;
        text[at..].split_whitespace().next().expect(name).to_owned()
    };
    let (install, boot) = (field("install"), field("boot"));
    let earlier = boot.chars().rev().collect::<String>();
    let other = install.chars().rev().collect::<String>();
    let leave = |vmid: u32, install: &str| {
        let copy = text
            .replace(&format!("vmid={own}"), &format!("vmid={vmid}"))
            .replace(&field("install"), install)
            .replace(&boot, &earlier);
        let path = directory.join(format!("{vmid}.conf"));
        fs::write(&path, copy).expect("write a CT of an earlier boot");
        path
    };
    let (first, last) = t.node.vmids;
    // The last one is that of another test.
    let (ours, theirs) = (leave(last - 1, &install), leave(last - 2, &other));
    assert!(first < last - 2 && own < last - 2);
    // As after the boot: no shim has looked yet.
    fs::remove_file(t.node.root.join("run/swept")).expect("the first shim has looked");
    let next = t.id("b");
    t.start_idle(&[], &next);
    eventually("our CT of the earlier boot is gone", Duration::from_secs(10), || {
        (!ours.exists()).then_some(())
    });
    assert!(theirs.exists(), "a CT of another installation was destroyed");
    assert_eq!(t.task(&id).map(|(_, status)| status).as_deref(), Some("RUNNING"));
    fs::remove_file(theirs).expect("remove the other installation's CT");
}

fn ct_start_in_the_ui_does_not_resurrect(t: &Test) {
    let id = t.id("a");
    t.start(&[], &id, &["true"]);
    t.wait_exit(&id);
    t.wait_status(&id, "STOPPED");
    let pve = t.node.pve();
    let Some(vmid) = pve.vmid_of(&id) else { return };
    let (status, upid) = pve.request("POST", &pve.lxc(&format!("/{vmid}/status/start")), &[]);
    if status == 200 {
        let path =
            format!("/nodes/{}/tasks/{}/status", pve.node(), upid.as_str().unwrap_or_default());
        eventually("the start task ends", Duration::from_secs(40), || {
            (pve.call("GET", &path, &[])["status"] == "stopped").then_some(())
        });
    }
    // Its init finds nobody to tell it what to run.
    eventually("the CT has stopped again", Duration::from_secs(20), || {
        let (_, current) = pve.request("GET", &pve.lxc(&format!("/{vmid}/status/current")), &[]);
        (current["status"] != "running").then_some(())
    });
    drop(pve);
    assert_eq!(t.task(&id).map(|(_, status)| status).as_deref(), Some("STOPPED"));
}

fn unreachable_proxmox_does_not_disturb_a_running_container(t: &Test) {
    use crate::harness::sys;
    let id = t.id("a");
    t.start_idle(&[], &id);
    // The API hangs: a stopped process accepts connections and never answers. Everything that
    // needs no Proxmox must go on at its usual pace.
    let sim = t.node.pve().pid();
    sys::kill(sim, libc::SIGSTOP);
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let started = std::time::Instant::now();
        t.exec(&[], &id, &["probe", "exit", "3"]).expect(3);
        assert!(t.task(&id).is_some_and(|(_, status)| status == "RUNNING"));
        t.ctr(&["tasks", "metrics", &id]).ok();
        t.ctr(&["tasks", "ps", &id]).ok();
        t.kill(&id, "SIGKILL").ok();
        assert_eq!(t.wait_exit(&id).exit_status(), 137);
        assert!(
            started.elapsed() < process::scaled(Duration::from_secs(5)),
            "took {:?}",
            started.elapsed()
        );
    }));
    sys::kill(sim, libc::SIGCONT);
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}
