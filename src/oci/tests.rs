//! Whole specifications, as real clients write them.

use std::path::Path;

use nix::libc;
use proxmox_shim_init::protocol::{CgroupHierarchy, MountSource};

use super::plan::{DeviceKind, Limit, Namespace, PlannedMount};
use super::*;

/// A hybrid cgroup v1 host without AppArmor; `/host/ns/*` are its namespaces.
pub(super) fn host() -> Host {
    let hierarchy = |name: &str, options: &str, unified| CgroupHierarchy {
        name: name.to_owned(),
        options: options.to_owned(),
        unified,
    };
    Host {
        cgroups: Cgroups::V1 {
            hierarchies: vec![
                hierarchy("memory", "memory", false),
                hierarchy("unified", "", true),
            ],
        },
        apparmor: false,
        last_capability: 40,
        kcore: true,
        is_own_namespace: |kind, path| path == Path::new("/host/ns").join(kind),
    }
}
