//! `linux.sysctl`: only what belongs to a namespace of the container may be set.

use std::collections::BTreeMap;

use super::Error;
use super::document::Document;
use super::plan::{Namespace, Namespaces};

/// Those of the ipc namespace besides `fs.mqueue.*`.
const IPC: [&str; 8] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

pub(super) fn read(
    spec: &Document,
    namespaces: &Namespaces,
) -> Result<Vec<(String, String)>, Error> {
    let sysctls: BTreeMap<String, String> = spec.read("linux.sysctl")?.unwrap_or_default();
    for key in sysctls.keys() {
        let field = || format!("linux.sysctl {key:?}");
        let dotted = dotted(key);
        let own = |namespace: &Namespace, name: &str| match namespace {
            Namespace::Host => {
                Err(Error::invalid(field(), format!("would change the host's {name} namespace")))
            }
            Namespace::New | Namespace::Path(_) => Ok(()),
        };
        if dotted.split(['.', '/']).any(|part| part.is_empty() || part == "..") {
            return Err(Error::invalid(field(), "is not the name of a sysctl"));
        }
        if IPC.contains(&dotted.as_str()) || dotted.starts_with("fs.mqueue.") {
            own(&namespaces.ipc, "ipc")?;
        } else if dotted.starts_with("net.") {
            own(&namespaces.network, "network")?;
        } else if dotted == "kernel.domainname" {
            own(&namespaces.uts, "uts")?;
        } else if dotted == "kernel.hostname" {
            return Err(Error::invalid(field(), "conflicts with the field hostname"));
        } else {
            return Err(Error::invalid(field(), "does not belong to a namespace of the container"));
        }
    }
    Ok(sysctls.into_iter().collect())
}

/// sysctl(8): if the first separator is a slash, slashes separate and dots belong to names.
fn dotted(key: &str) -> String {
    match key.find(['.', '/']) {
        Some(first) if key[first..].starts_with('/') => key
            .chars()
            .map(|c| match c {
                '/' => '.',
                '.' => '/',
                c => c,
            })
            .collect(),
        _ => key.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_one(key: &str, namespace: Namespace) -> Result<Vec<(String, String)>, String> {
        let json = serde_json::json!({ "linux": { "sysctl": { key: "1" } } }).to_string();
        let namespaces = Namespaces {
            pid: namespace.clone(),
            network: namespace.clone(),
            ipc: namespace.clone(),
            uts: namespace.clone(),
            cgroup: namespace.clone(),
            time: namespace,
        };
        read(&Document::parse(json.as_bytes()).unwrap(), &namespaces)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn namespaced_sysctls_need_their_namespace() {
        for key in [
            "net.ipv4.ip_unprivileged_port_start",
            "net/ipv4/conf/eth0.100/rp_filter",
            "kernel.shmmax",
            "fs.mqueue.msg_max",
            "kernel.domainname",
        ] {
            let expected = vec![(key.to_owned(), "1".to_owned())];
            assert_eq!(read_one(key, Namespace::New), Ok(expected), "{key}");
            assert!(read_one(key, Namespace::Path("/x".into())).is_ok());
            let error = read_one(key, Namespace::Host).unwrap_err();
            assert!(error.contains("would change the host's"), "{error}");
        }
    }

    #[test]
    fn all_others_are_refused() {
        for key in [
            "kernel.hostname",
            "kernel.panic",
            "vm.swappiness",
            "user.max_user_namespaces",
            "net../../kernel/panic",
            "net/../kernel.panic",
            "",
            ".",
        ] {
            let error = read_one(key, Namespace::New).unwrap_err();
            assert!(error.starts_with(&format!("linux.sysctl {key:?}")), "{error}");
        }
    }
}
