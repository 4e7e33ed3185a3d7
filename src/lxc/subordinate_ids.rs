//! Whether LXC may use the ids of a user namespace.
//!
//! liblxc writes the mappings of a CT by newuidmap(1) and newgidmap(1) wherever they are installed,
//! also as root, and these ask `/etc/subuid` and `/etc/subgid`. A range that is missing there would only
//! show as a CT that does not start.

use std::path::Path;

use crate::oci::plan::{IdMapping, IdMappings};

/// Where liblxc finds its helpers.
const PATH: [&str; 6] =
    ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// A range of ids that root may not use.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "user namespace: {file} does not give root the ids {first} to {last}, which newuidmap demands \
     for LXC; add the line \"root:{first}:{count}\" to {file} on the node"
)]
pub struct Error {
    file: &'static str,
    first: u32,
    last: u32,
    count: u32,
}

/// Checks the mappings of a new CT against the node's files.
///
/// # Errors
/// The first range that is not there.
pub fn check(mappings: &IdMappings) -> Result<(), Error> {
    let installed = |name: &str| PATH.iter().any(|dir| Path::new(dir).join(name).exists());
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    // With another source of ranges (nsswitch.conf(5)), the files say nothing.
    let other_source = read("/etc/nsswitch.conf")
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("subid:"))
        .any(|sources| sources.trim() != "files");
    if other_source || !installed("newuidmap") || !installed("newgidmap") {
        return Ok(());
    }
    check_with(mappings, &read("/etc/subuid"), &read("/etc/subgid"))
}

fn check_with(mappings: &IdMappings, subuid: &str, subgid: &str) -> Result<(), Error> {
    // liblxc writes the files itself then.
    let maps_root = |mapping: &IdMapping| mapping.host == 0;
    if mappings.uids.iter().any(maps_root) {
        return Ok(());
    }
    for (file, text, list) in
        [("/etc/subuid", subuid, &mappings.uids), ("/etc/subgid", subgid, &mappings.gids)]
    {
        let ranges: Vec<_> = text.lines().filter_map(range_of_root).collect();
        for IdMapping { host, size, .. } in list {
            let (first, end) = (u64::from(*host), u64::from(*host) + u64::from(*size));
            if !ranges.iter().any(|(start, count)| *start <= first && end <= start + count) {
                let last = host.saturating_add(size.saturating_sub(1));
                return Err(Error { file, first: *host, last, count: *size });
            }
        }
    }
    Ok(())
}

/// The start and the size of a line of subuid(5) that is about root.
fn range_of_root(line: &str) -> Option<(u64, u64)> {
    let mut fields = line.trim().split(':');
    let owner = fields.next()?;
    let range = (fields.next()?.parse().ok()?, fields.next()?.parse::<u32>().ok()?.into());
    matches!(owner, "root" | "0").then_some(range)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mappings(host: u32, size: u32) -> IdMappings {
        let mapping = IdMapping { container: 0, host, size };
        IdMappings { uids: vec![mapping], gids: vec![mapping] }
    }

    #[test]
    fn a_range_must_lie_in_one_of_root_s() {
        let files = "other:100000:65536\n# root:1:2\nroot:200000:65536\n0:400000:1000\nroot:x\n";
        let check = |host, size| check_with(&mappings(host, size), files, files);
        for (host, size) in [(200_000, 65_536), (200_100, 1), (400_999, 1), (0, 5)] {
            assert_eq!(check(host, size), Ok(()), "{host} {size}");
        }
        for (host, size) in [(100_000, 65_536), (200_000, 65_537), (399_999, 2), (1, 1)] {
            let error = check(host, size).unwrap_err();
            assert_eq!((error.first, error.count), (host, size));
        }
        let error = check_with(&mappings(200_000, 1000), files, "").unwrap_err().to_string();
        assert!(error.contains("add the line \"root:200000:1000\" to /etc/subgid"), "{error}");
    }
}
