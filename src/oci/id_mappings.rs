//! Id mappings of user namespaces and of mounts.

use std::fmt::Write;

use oci_spec::runtime::LinuxIdMapping;

use super::Error;
use super::plan::{IdMapping, IdMappings};

/// The kernel's limit of lines in `/proc/<pid>/uid_map` (user_namespaces(7)).
const MAX_MAPPINGS: usize = 340;

/// The two lists below `field`; `None` if neither is there.
pub(super) fn convert(
    field: &str,
    uids: &[LinuxIdMapping],
    gids: &[LinuxIdMapping],
) -> Result<Option<IdMappings>, Error> {
    let names = [format!("{field}.uidMappings"), format!("{field}.gidMappings")];
    match (uids, gids) {
        ([], []) => Ok(None),
        ([], _) => Err(Error::invalid(&names[0], "is missing beside gidMappings")),
        (_, []) => Err(Error::invalid(&names[1], "is missing beside uidMappings")),
        _ => Ok(Some(IdMappings { uids: list(&names[0], uids)?, gids: list(&names[1], gids)? })),
    }
}

fn list(field: &str, mappings: &[LinuxIdMapping]) -> Result<Vec<IdMapping>, Error> {
    if mappings.len() > MAX_MAPPINGS {
        let problem = format!("has more than {MAX_MAPPINGS} entries, which is the kernel's limit");
        return Err(Error::invalid(field, problem));
    }
    let mut list: Vec<IdMapping> = Vec::new();
    for (index, mapping) in mappings.iter().enumerate() {
        let mapping = IdMapping {
            container: mapping.container_id(),
            host: mapping.host_id(),
            size: mapping.size(),
        };
        let error = |problem| Err(Error::invalid(format!("{field}[{index}]"), problem));
        // The id -1 means none.
        let ends = [mapping.container, mapping.host].map(|first| first.checked_add(mapping.size));
        if mapping.size == 0 || ends.contains(&None) {
            return error("has an impossible size");
        }
        let overlap = |a: u32, b: u32, size: u32| {
            a < b.saturating_add(size) && b < a.saturating_add(mapping.size)
        };
        if list.iter().any(|other| {
            overlap(mapping.container, other.container, other.size)
                || overlap(mapping.host, other.host, other.size)
        }) {
            return error("overlaps an earlier one");
        }
        list.push(mapping);
    }
    Ok(list)
}

impl IdMappings {
    /// Lists of `CONTAINER:HOST:SIZE` with commas between them, as containerd writes them.
    #[must_use]
    pub fn parse(uids: &str, gids: &str) -> Option<Self> {
        let list = |text: &str| -> Option<Vec<IdMapping>> {
            let mapping = |text: &str| match text.split(':').collect::<Vec<_>>()[..] {
                [container, host, size] => Some(IdMapping {
                    container: container.parse().ok()?,
                    host: host.parse().ok()?,
                    size: size.parse().ok()?,
                }),
                _ => None,
            };
            text.split(',').map(mapping).collect()
        };
        Some(Self { uids: list(uids)?, gids: list(gids)? })
    }

    /// The outer user id of `uid`; `None` if it has none.
    #[must_use]
    pub fn host_uid(&self, uid: u32) -> Option<u32> {
        host(&self.uids, uid)
    }

    /// The outer group id of `gid`; `None` if it has none.
    #[must_use]
    pub fn host_gid(&self, gid: u32) -> Option<u32> {
        host(&self.gids, gid)
    }

    /// As `/proc/<pid>/uid_map` takes them.
    #[must_use]
    pub fn uid_map(&self) -> String {
        map(&self.uids)
    }

    /// As `/proc/<pid>/gid_map` takes them.
    #[must_use]
    pub fn gid_map(&self) -> String {
        map(&self.gids)
    }
}

fn host(mappings: &[IdMapping], id: u32) -> Option<u32> {
    mappings.iter().find_map(|mapping| {
        let offset = id.checked_sub(mapping.container)?;
        (offset < mapping.size).then(|| mapping.host + offset)
    })
}

fn map(mappings: &[IdMapping]) -> String {
    mappings.iter().fold(String::new(), |mut text, IdMapping { container, host, size }| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{container} {host} {size}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Vec<IdMapping>, String> {
        let mappings: Vec<LinuxIdMapping> = serde_json::from_str(json).unwrap();
        list("f", &mappings).map_err(|error| error.to_string())
    }

    #[test]
    fn impossible_mappings_are_refused() {
        for (json, expected) in [
            (r#"[{"containerID":0,"hostID":1,"size":0}]"#, "f[0] has an impossible size"),
            (r#"[{"containerID":0,"hostID":4294967290,"size":6}]"#, "f[0] has an impossible size"),
            (r#"[{"containerID":4294967295,"hostID":0,"size":1}]"#, "f[0] has an impossible size"),
            (
                r#"[{"containerID":0,"hostID":10,"size":10},{"containerID":9,"hostID":30,"size":1}]"#,
                "f[1] overlaps an earlier one",
            ),
            (
                r#"[{"containerID":0,"hostID":10,"size":10},{"containerID":50,"hostID":5,"size":6}]"#,
                "f[1] overlaps an earlier one",
            ),
        ] {
            assert_eq!(read(json).unwrap_err(), expected, "{json}");
        }
        let many: Vec<_> =
            (0..341).map(|n| format!(r#"{{"containerID":{n},"hostID":{n},"size":1}}"#)).collect();
        assert!(read(&format!("[{}]", many.join(","))).unwrap_err().contains("more than 340"));
    }

    #[test]
    fn containerd_s_form_is_read() {
        let parsed = IdMappings::parse("0:100000:1000,1000:5:1", "0:7:1").unwrap();
        assert_eq!(parsed.uid_map(), "0 100000 1000\n1000 5 1\n");
        assert_eq!(parsed.gid_map(), "0 7 1\n");
        for wrong in ["", "0:1", "0:1:2:3", "0:1:x", "0:1:1,"] {
            assert_eq!(IdMappings::parse(wrong, "0:7:1"), None, "{wrong}");
        }
    }

    #[test]
    fn ids_are_translated() {
        let uids = read(
            r#"[{"containerID":0,"hostID":100000,"size":1000},
                {"containerID":1000,"hostID":5,"size":1}]"#,
        )
        .unwrap();
        let mappings = IdMappings { gids: vec![uids[1]], uids };
        for (uid, host) in [(0, Some(100_000)), (999, Some(100_999)), (1000, Some(5)), (1001, None)]
        {
            assert_eq!(mappings.host_uid(uid), host, "{uid}");
        }
        assert_eq!((mappings.host_gid(0), mappings.host_gid(1000)), (None, Some(5)));
        assert_eq!(mappings.uid_map(), "0 100000 1000\n1000 5 1\n");
        assert_eq!(mappings.gid_map(), "1000 5 1\n");
    }
}
