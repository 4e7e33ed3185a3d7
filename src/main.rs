//! `containerd-shim-proxmox-v2`: see `--help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    shim_proxmox::bootstrap::main()
}
