//! `linux.cgroupsPath`.

use super::Error;
use super::document::Document;

const FIELD: &str = "linux.cgroupsPath";
/// Where Proxmox VE has its guests, by VMID, and LXC its own processes. A container there would share
/// limits, and its end, with a guest of that number.
const RESERVED: [&str; 4] = ["lxc", "lxc.monitor", "lxc.pivot", "qemu.slice"];

/// The path below each hierarchy's mount point, without a leading slash.
///
/// Two forms exist: a plain path, and `slice:prefix:name` of clients that use systemd (kubelet's
/// default), which becomes the path that systemd itself would use.
pub(super) fn path(spec: &Document) -> Result<Option<String>, Error> {
    let Some(path) = spec.string(FIELD)? else { return Ok(None) };
    let parts: Vec<&str> = path.split(':').collect();
    let path = match parts.as_slice() {
        [slice, prefix, name] if !path.starts_with('/') => systemd(slice, prefix, name)?,
        _ => path,
    };

    // The path becomes a line of LXC's configuration and a directory on the host.
    if path.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err(Error::invalid(FIELD, "contains white space or control characters"));
    }
    let components: Vec<&str> =
        path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if components.contains(&"..") {
        return Err(Error::invalid(FIELD, "contains \"..\""));
    }
    if components.first().is_some_and(|first| RESERVED.contains(first)) {
        return Err(Error::invalid(FIELD, "is in the cgroups of Proxmox VE's own guests"));
    }
    if components.iter().any(|part| part.len() > 255) || path.len() > 4000 {
        return Err(Error::invalid(FIELD, "is too long for a directory name"));
    }
    match components.is_empty() {
        true => Err(Error::invalid(FIELD, "names the root of the cgroup hierarchy")),
        false => Ok(Some(components.join("/"))),
    }
}

/// `kubepods-pod1.slice`, `cri-containerd`, `abc` to
/// `kubepods.slice/kubepods-pod1.slice/cri-containerd-abc.scope`: systemd.slice(5) says that the
/// dashes of a slice's name are its ancestors.
fn systemd(slice: &str, prefix: &str, name: &str) -> Result<String, Error> {
    let invalid = || Error::invalid(FIELD, format!("has the invalid slice {slice:?}"));
    let slice = if slice.is_empty() { "system.slice" } else { slice };
    let stem = slice.strip_suffix(".slice").ok_or_else(invalid)?;
    if slice.contains('/') || prefix.contains('/') || name.contains('/') || name.is_empty() {
        return Err(Error::invalid(FIELD, "must have the form slice:prefix:name"));
    }
    let mut path = String::new();
    if stem != "-" {
        let components: Vec<&str> = stem.split('-').collect();
        if components.iter().any(|component| component.is_empty()) {
            return Err(invalid());
        }
        for depth in 1..=components.len() {
            path.push_str(&components[..depth].join("-"));
            path.push_str(".slice/");
        }
    }
    match name.ends_with(".slice") {
        true => path.push_str(name),
        false => path.push_str(&format!("{prefix}-{name}.scope")),
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn convert(path: &str) -> Result<Option<String>, String> {
        let json = serde_json::json!({ "linux": { "cgroupsPath": path } }).to_string();
        super::path(&Document::parse(json.as_bytes()).unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn both_forms() {
        for (path, expected) in [
            ("/default/web", "default/web"),
            ("default//./web/", "default/web"),
            ("/kubepods/burstable/pod1/abc", "kubepods/burstable/pod1/abc"),
            ("/a:b:c", "a:b:c"),
            ("a:b", "a:b"),
            ("system.slice:docker:1", "system.slice/docker-1.scope"),
            (":runc:1", "system.slice/runc-1.scope"),
            ("-.slice:p:1", "p-1.scope"),
            (
                "kubepods-burstable-pod_1.slice:cri-containerd:abc",
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod_1.slice/\
                 cri-containerd-abc.scope",
            ),
            ("a.slice:p:b.slice", "a.slice/b.slice"),
        ] {
            assert_eq!(convert(path), Ok(Some(expected.to_owned())), "{path}");
        }
        assert_eq!(convert(""), Ok(None));
    }

    #[test]
    fn paths_that_leave_or_break_the_hierarchy_are_refused() {
        for path in [
            "/",
            "/a/../../b",
            "..",
            "/a b",
            "/a\nlxc.hook.start = /bin/sh",
            "/a\u{85}b",
            "x:p:n",
            "a--b.slice:p:n",
            "a/b.slice:p:n",
            "a.slice:p:../n",
            "a.slice:p:",
            "/lxc/100",
            "lxc",
            "//./lxc.monitor/x",
            "qemu.slice:p:1",
            &"x".repeat(256),
        ] {
            let error = convert(path).unwrap_err();
            assert!(error.starts_with("linux.cgroupsPath "), "{path:?}: {error}");
        }
    }
}
