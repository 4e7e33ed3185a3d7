//! Who may reach liblxc's command sockets.
//!
//! The monitor of each CT listens at the abstract Unix socket `@<lxcpath>/<vmid>/command` in the node's
//! network namespace and obeys every peer with uid 0: whoever can connect stops the CT or, on
//! cgroup2, changes its device program. A container in the node's network namespace could, so it gets a
//! Landlock domain that ends at its own abstract sockets.

use std::path::Path;

use crate::config::AbstractSockets;
use crate::oci::plan::{Namespace, Plan};

/// The first with `LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET` (kernel 6.12).
const LANDLOCK_ABI: u32 = 6;
const CAP_SYS_ADMIN: u64 = 1 << 21;

/// Keeps the container away from the command sockets if it could reach them. Returns what a person
/// should know.
///
/// A container with `CAP_SYS_ADMIN` is left alone, as it has other ways to the node anyway.
/// `is_nodes` says whether a path names the node's network namespace: a pod's sandbox may have been
/// given that one by its path. Blocks.
pub fn guard(
    plan: &mut Plan,
    wish: AbstractSockets,
    landlock_abi: u32,
    is_nodes: impl Fn(&Path) -> bool,
) -> Option<&'static str> {
    let shares = match &plan.namespaces.network {
        Namespace::Host => true,
        Namespace::New => false,
        Namespace::Path(path) => is_nodes(path),
    };
    let trusted = plan.process.capabilities.bounding & CAP_SYS_ADMIN != 0;
    if !shares || trusted || wish == AbstractSockets::Shared {
        return None;
    }
    plan.process.scope_abstract_sockets = landlock_abi >= LANDLOCK_ABI;
    (!plan.process.scope_abstract_sockets).then_some(
        "the container shares the node's network and this kernel has no Landlock scopes (6.12): root \
         in it can reach the sockets by which LXC is controlled",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    use crate::oci::{self, Cgroups, Host};

    fn plan() -> Plan {
        let host = Host {
            cgroups: Cgroups::V2,
            apparmor: false,
            lacks_profile: |_| false,
            last_capability: 40,
            kcore: false,
            unprivileged: false,
            is_own_namespace: |_, _| false,
        };
        let spec = include_bytes!("../oci/fixtures/ctr-default.json");
        oci::plan(spec, Path::new("/bundle"), &host).unwrap()
    }

    #[test]
    fn who_shares_the_network_and_has_no_other_way_to_the_node_is_confined() {
        use AbstractSockets::{Isolated, Shared};
        let host = || Namespace::Host;
        // network, CAP_SYS_ADMIN, wish, Landlock's ABI -> confined, warned
        for (why, network, admin, wish, abi, expected) in [
            ("host network", host(), false, Isolated, 6, (true, false)),
            ("a later kernel", host(), false, Isolated, 9, (true, false)),
            ("an older kernel", host(), false, Isolated, 5, (false, true)),
            ("as the administrator says", host(), false, Shared, 6, (false, false)),
            ("privileged", host(), true, Isolated, 6, (false, false)),
            ("own network", Namespace::New, false, Isolated, 6, (false, false)),
            (
                "by its path",
                Namespace::Path(PathBuf::from("/node")),
                false,
                Isolated,
                6,
                (true, false),
            ),
            ("another's", Namespace::Path(PathBuf::from("/n")), false, Isolated, 0, (false, false)),
        ] {
            let mut plan = plan();
            plan.namespaces.network = network;
            plan.process.capabilities.bounding = if admin { CAP_SYS_ADMIN } else { 0 };
            let warning = guard(&mut plan, wish, abi, |path| path == Path::new("/node"));
            assert_eq!((plan.process.scope_abstract_sockets, warning.is_some()), expected, "{why}");
        }
    }
}
