//! What stands for `/usr/share/lxc`: the configuration and the hooks that Proxmox VE brings along,
//! and what the generator of LXC configurations must know about the host.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::cgroup::Cgroups;
use crate::generate::Host;
use crate::node::{Paths, StartError, make_dir, write_file};
use crate::proc;
use crate::profile::{Profile, Step};

/// Where LXC's own files are.
const SYSTEM_LXC_CONFIG: &str = "/usr/share/lxc/config";

/// Writes what stands for `/usr/share/lxc`: the system's files with Proxmox VE's hooks added, so
/// that liblxc itself decides whether an include of the CT has cleared them.
pub fn write_share(paths: &Paths, profile: &Profile, cgroups: &Cgroups) -> Result<(), StartError> {
    let config = paths.share.join("config");
    let hooks = paths.share.join("hooks");
    make_dir(&config)?;
    make_dir(&hooks)?;
    for name in ["common.conf", "userns.conf"] {
        let system = Path::new(SYSTEM_LXC_CONFIG).join(name);
        let mut text = String::new();
        if system.exists() {
            text.push_str(&format!("lxc.include = {}\n", system.display()));
        }
        if name == "common.conf" {
            for hook in ["pre-start", "post-stop"] {
                text.push_str(&format!("lxc.hook.{hook} = {}\n", hooks.join(hook).display()));
            }
        }
        write_file(&config.join(name), &text, 0o644)?;
    }
    let pause = |step: Step| match profile.step(step).as_secs_f64() {
        0.0 => ":".to_owned(),
        seconds => format!("sleep {seconds:.3}"),
    };
    let pre_start = format!(
        "#!/bin/sh\n\
         # Removes cgroups that a killed lxc-start has left, and mounts the CT's rootfs and mount\n\
         # points, as Proxmox VE's hook of this name does.\n\
         {pause}\n\
         for base in {bases}; do\n\
         \tfor dir in \"$base/lxc/$LXC_NAME\" \"$base/lxc.monitor/$LXC_NAME\"; do\n\
         \t\t[ ! -d \"$dir\" ] || find \"$dir\" -depth -type d -exec rmdir {{}} \\;\n\
         \tdone\n\
         done\n\
         root='{lxc}'/\"$LXC_NAME\"/rootfs\n\
         while IFS='\t' read -r kind source target mode; do\n\
         \tpath=$root\n\
         \tif [ \"$target\" != / ]; then\n\
         \t\tIFS=/\n\
         \t\tset -f\n\
         \t\tfor part in $target; do\n\
         \t\t\t[ -n \"$part\" ] || continue\n\
         \t\t\t[ \"$part\" != .. ] || exit 2\n\
         \t\t\tpath=$path/$part\n\
         \t\t\t[ ! -L \"$path\" ] || exit 2\n\
         \t\t\t[ -d \"$path\" ] || mkdir \"$path\" || exit 2\n\
         \t\tdone\n\
         \t\tunset IFS\n\
         \tfi\n\
         \tcase $kind in\n\
         \tbind) [ -d \"$source\" ] && mount --bind \"$source\" \"$path\" || exit 2 ;;\n\
         \tloop) mount -o loop \"$source\" \"$path\" || exit 2 ;;\n\
         \tdevice) mount \"$source\" \"$path\" || exit 2 ;;\n\
         \t*) exit 2 ;;\n\
         \tesac\n\
         \t[ \"$mode\" = rw ] || mount -o remount,bind,ro \"$path\" || exit 2\n\
         done <'{lxc}'/\"$LXC_NAME\"/mounts\n",
        pause = pause(Step::HookPreStart),
        bases = cgroups.bases().map(|b| format!("'{}'", b.display())).collect::<Vec<_>>().join(" "),
        lxc = paths.lxc.display(),
    );
    let post_stop = format!(
        "#!/bin/sh\n\
         # Asks for a restart if the CT rebooted itself, as Proxmox VE's hook of this name does.\n\
         {pause}\n\
         [ \"$LXC_TARGET\" != reboot ] || {{ : >'{lxc}'/\"$LXC_NAME\"/reboot; exit 1; }}\n",
        pause = pause(Step::HookPostStop),
        lxc = paths.lxc.display(),
    );
    write_file(&hooks.join("pre-start"), &pre_start, 0o755)?;
    write_file(&hooks.join("post-stop"), &post_stop, 0o755)
}

/// The host as the generator sees it.
pub fn host(paths: &Paths, cgroups: &Cgroups) -> Host {
    let config_dir = paths.share.join("config");
    let files = fs::read_dir(&config_dir).into_iter().flatten().flatten();
    let controllers = cgroups.v2_controllers();
    let has = |name: &str| controllers.iter().any(|c| c == name);
    let cpus = proc::cpus() as u32;
    Host {
        lxc_path: paths.lxc.clone(),
        config_files: files.filter_map(|f| f.file_name().into_string().ok()).collect(),
        config_dir,
        memory: has("memory"),
        cpu: has("cpu"),
        cpus: if has("cpuset") { (0..cpus).collect() } else { Vec::new() },
        bridge_mtu: |bridge| {
            let plain = !bridge.contains('/') && !bridge.starts_with('.');
            let path = Path::new("/sys/class/net").join(bridge).join("mtu");
            plain.then(|| fs::read_to_string(path).ok()?.trim().parse().ok()).flatten()
        },
        device: |path| {
            let meta = fs::metadata(path).ok()?;
            let block = meta.mode() & libc::S_IFMT == libc::S_IFBLK;
            let character = meta.mode() & libc::S_IFMT == libc::S_IFCHR;
            (block || character)
                .then(|| (block, libc::major(meta.rdev()), libc::minor(meta.rdev())))
        },
    }
}
