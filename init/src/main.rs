//! Argument handling of `proxmox-shim-init`.
#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::io::Write;
use std::process::ExitCode;

use proxmox_shim_init::{container, exec, holder, hook, protocol};

const HELP: &str = "\
proxmox-shim-init - PID 1, exec and hook helper of containerd-shim-proxmox-v2

USAGE
    proxmox-shim-init init
    proxmox-shim-init exec
    proxmox-shim-init holder
    proxmox-shim-init hook start-host RUN_DIR
    proxmox-shim-init hook stop RUN_DIR
    proxmox-shim-init hook post-stop
    proxmox-shim-init --version | --help

DESCRIPTION
    A container that containerd runs with the runtime io.containerd.proxmox.v2 is a Proxmox VE CT.
    This program is what LXC starts in it. Nobody needs to call it by hand: the shim writes the
    calls below into the CT's LXC configuration.

MODES
    init
        PID 1 of the CT (lxc.init.cmd). Connects to /dev/.proxmox-shim/init.sock, receives the
        container's description, removes every trace of itself, makes the mounts, devices and the
        terminal, reports ready, waits for the shim's go-ahead and becomes the user's process.
        Without a shim on the other end it says so and exits 1: such a CT cannot be started from
        the Proxmox web interface or with pct.

    exec
        Starts one more process in a running CT. Its socket is descriptor 0. The new process is a
        child of the program's parent, not of the program itself.

    holder
        Holds the namespaces of a Kubernetes pod, which outlive each of its containers, in place of
        a pause container. Its socket is descriptor 0. The holder is a child of the program's parent,
        has an empty root directory and no capabilities, and reaps the orphans of its pid namespace.
        SIGTERM and SIGINT end it with status 0.

    hook start-host RUN_DIR
        LXC's hook before the CT's first process (lxc.hook.start-host), used where the kernel does
        not keep exit statuses. If lxc-start does not write its log either (LXC 6), leaves a
        process behind that hears the exit status from lxc-monitord and ends with the CT.

    hook stop RUN_DIR
        LXC's hook after the CT's end (lxc.hook.stop). Writes RUN_DIR/exit.json: the exit status
        of PID 1 and the number of processes the kernel killed for lack of memory. Reads the
        status from lxc-start's pidfd (kernel 6.15 or later), else from RUN_DIR/watch or
        RUN_DIR/lxc.log, and the cgroup's path from RUN_DIR/cgroup if that file exists. Always
        exits 0, so that LXC finishes the clean-up.

    hook post-stop
        LXC's last hook (lxc.hook.post-stop). Fails if the CT asked for a reboot, which turns the
        reboot into a stop: whether a container is started again is containerd's decision.

EXIT STATUS
    init, exec
        1    init: not started by containerd, or the shim went away
        2    wrong arguments
        127  the workload could not be executed; the shim was told why
        otherwise that of the workload, which replaces this program
    exec, holder
        0    the process was started
    hook
        as described above

FILES
    /dev/.proxmox-shim/init.sock    the shim's socket, seen from the CT until it is removed
    RUN_DIR/exit.json               {\"version\",\"status\",\"time\",\"oom_kills\",\"source\"}; status is
                                    0..255, or 128+n for signal n; time in ns since the epoch;
                                    source is pidfd, monitor, log, reboot, holder or unknown
    RUN_DIR/watch                   what lxc-monitord told: a wait status
    RUN_DIR/lxc.log                 liblxc's log at level INFO
    RUN_DIR/cgroup                  one line: the absolute directory of the CT's memory cgroup

REQUIREMENTS
    Linux 5.12 or later on the node (mount_setattr).

SEE ALSO
    lxc.container.conf(5), pct(1), https://github.com/opencontainers/runtime-spec
";

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let args: Vec<&OsStr> = args.iter().map(|a| a.as_os_str()).collect();
    let text: Vec<Option<&str>> = args.iter().map(|a| a.to_str()).collect();
    match text.as_slice() {
        [Some("init")] => container::run(),
        [Some("exec")] => exec::run(),
        [Some("holder")] => holder::run(),
        [Some("hook"), Some("start-host"), _] => hook::start_host(args[2].as_ref()),
        [Some("hook"), Some("stop"), _] => hook::stop(args[2].as_ref()),
        [Some("hook"), Some("post-stop")] => hook::post_stop(),
        [Some("--version" | "-V")] => say(&format!(
            "proxmox-shim-init {} (protocol {})\n",
            env!("CARGO_PKG_VERSION"),
            protocol::VERSION
        )),
        [Some("--help" | "-h" | "help")] => say(HELP),
        _ => {
            let _ = std::io::stderr()
                .write_all(b"proxmox-shim-init: wrong arguments; see proxmox-shim-init --help\n");
            ExitCode::from(2)
        }
    }
}

/// A closed pipe is no reason to panic.
fn say(text: &str) -> ExitCode {
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
