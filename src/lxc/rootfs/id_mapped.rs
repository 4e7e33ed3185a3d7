//! A rootfs for a container with a user namespace: nothing is chowned, and what is on the disk keeps
//! the ids of the image, so that a snapshot of it is right.
//!
//! The kernel does not map the ids of an overlay. It takes layers whose ids are mapped, though, also
//! the upper one, if the overlay is mounted by somebody who may create files there: with the ids of the
//! container's root, and with all capabilities.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{Error, Options, RootfsMount, classic_overlay, split_unescaped, unescaped};
use crate::lxc::workshop::Workshop;
use crate::oci::plan::IdMappings;
use crate::sys::{credentials, mount as api, user_namespace};

/// Whose the files of a rootfs are.
#[derive(Debug)]
pub struct UserIds {
    mappings: IdMappings,
    /// Carries the mappings.
    user_namespace: OwnedFd,
}

impl UserIds {
    /// # Errors
    /// The kernel does not take the mappings.
    pub fn new(mappings: IdMappings) -> io::Result<Self> {
        let (uids, gids) = (mappings.uid_map(), mappings.gid_map());
        Ok(Self { mappings, user_namespace: user_namespace::with_mappings(&uids, &gids)? })
    }

    /// Whether a root directory of this owner belongs to the container already: a client that knows
    /// of the user namespace may have prepared the snapshot for it.
    fn own(&self, owner: u32) -> bool {
        let root = self.mappings.host_uid(0);
        let mapped = |first: u32, size: u32| (first..first.saturating_add(size)).contains(&owner);
        root == Some(owner)
            || (owner != 0 && self.mappings.uids.iter().any(|m| mapped(m.host, m.size)))
    }
}

/// Which layers of an overlay are mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layers {
    /// As containerd does it: the upper directory belongs to the container's root by itself.
    Lower,
    All,
}

/// Makes one mount, detached, for `ids` if there are any. containerd's own options `uidmap` and
/// `gidmap` come first: then it has seen to the rest.
pub(super) fn make(
    mount: &RootfsMount,
    ids: Option<&UserIds>,
    workshop: &mut Workshop,
) -> Result<OwnedFd, Error> {
    let (mount, of_client) = of_client(mount)?;
    let (ids, of_client) = match (&of_client, ids) {
        (Some(ids), _) => (ids, true),
        (None, Some(ids)) => (ids, false),
        (None, None) => return make_plain(&mount, workshop),
    };
    if mount.fstype == "overlay" {
        let layers = if of_client { Layers::Lower } else { Layers::All };
        let root = Overlay::of(&mount).root();
        let owner = |path: PathBuf| {
            path.metadata().map(|root| root.uid()).map_err(|source| Error::MapIds { path, source })
        };
        return match !of_client && root.map(owner).transpose()?.is_none_or(|uid| ids.own(uid)) {
            true => make_plain(&mount, workshop),
            false => overlay(&mount, ids, layers, workshop),
        };
    }
    let tree = File::from(make_plain(&mount, workshop)?);
    let map = || match !of_client && ids.own(tree.metadata()?.uid()) {
        true => Ok(()),
        false => api::map_ids(tree.as_fd(), is_recursive(&mount), ids.user_namespace.as_fd()),
    };
    map().map_err(|source| Error::MapIds { path: mount.source.clone().into(), source })?;
    Ok(tree.into())
}

fn make_plain(mount: &RootfsMount, workshop: &mut Workshop) -> Result<OwnedFd, Error> {
    match super::make(mount) {
        Err(error) if error.is_old_kernel() => classic_overlay(mount, workshop),
        result => result,
    }
}

fn is_recursive(mount: &RootfsMount) -> bool {
    Options::parse(&mount.options).bind.unwrap_or(false)
}

/// The directories of an overlay.
struct Overlay {
    /// Empty between the layers and those of data only.
    lower: Vec<String>,
    upper: Option<String>,
    work: Option<String>,
    other: Vec<String>,
}

impl Overlay {
    fn of(mount: &RootfsMount) -> Self {
        let mut overlay = Self { lower: Vec::new(), upper: None, work: None, other: Vec::new() };
        for option in mount.options.iter().flat_map(|o| split_unescaped(o, ',')) {
            match option.split_once('=') {
                Some(("lowerdir", layers)) => {
                    let layers = split_unescaped(layers, ':');
                    overlay.lower = layers.iter().map(|layer| unescaped(layer)).collect();
                }
                Some(("upperdir", path)) => overlay.upper = Some(unescaped(path)),
                Some(("workdir", path)) => overlay.work = Some(unescaped(path)),
                _ => overlay.other.push(option),
            }
        }
        overlay
    }

    /// The directory whose owner is that of the merged root.
    fn root(&self) -> Option<PathBuf> {
        self.upper.as_ref().or(self.lower.first()).map(PathBuf::from)
    }
}

fn overlay(
    mount: &RootfsMount,
    ids: &UserIds,
    layers: Layers,
    workshop: &mut Workshop,
) -> Result<OwnedFd, Error> {
    let Overlay { lower, upper, work, mut other } = Overlay::of(mount);
    let mut mapped = |path: &Path| -> Result<String, Error> {
        let failed = |source| Error::MapIds { path: path.to_owned(), source };
        let tree = api::clone_tree(path, false).map_err(failed)?;
        api::map_ids(tree.as_fd(), false, ids.user_namespace.as_fd()).map_err(failed)?;
        Ok(workshop.attach(tree)?)
    };
    let mut points = Vec::new();
    for layer in &lower {
        points.push(match layer.as_str() {
            "" => String::new(),
            layer => mapped(Path::new(layer))?,
        });
    }
    other.push(format!("lowerdir={}", points.join(":")));
    match (upper, work) {
        // The kernel wants both in one mount.
        (Some(upper), Some(work)) if layers == Layers::All => {
            let (parent, upper, work) = common_parent(Path::new(&upper), Path::new(&work));
            let point = mapped(&parent)?;
            let below = |name: &Path| Path::new(&point).join(name).display().to_string();
            other.push(format!("upperdir={}", escaped(&below(&upper))));
            other.push(format!("workdir={}", escaped(&below(&work))));
        }
        (upper, work) => {
            let directories = [("upperdir", upper), ("workdir", work)];
            let given = directories.into_iter().filter_map(|(key, path)| Some((key, path?)));
            other.extend(given.map(|(key, path)| format!("{key}={}", escaped(&path))));
        }
    }
    let root = (ids.mappings.host_uid(0), ids.mappings.host_gid(0));
    if let (Layers::All, (Some(uid), Some(gid))) = (layers, root) {
        let source = Path::new(&mount.source);
        credentials::become_file_user(uid, gid)
            .map_err(|error| Error::MapIds { path: source.to_owned(), source: error })?;
    }
    make_plain(&RootfsMount { options: other, ..mount.clone() }, workshop)
}

/// The deepest directory that holds both, and where they are in it.
fn common_parent(one: &Path, other: &Path) -> (PathBuf, PathBuf, PathBuf) {
    let shared = one.components().zip(other.components()).take_while(|(a, b)| a == b);
    let parent: PathBuf = shared.map(|(component, _)| component).collect();
    let below = |path: &Path| path.strip_prefix(&parent).unwrap_or(path).to_owned();
    let (one, other) = (below(one), below(other));
    (parent, one, other)
}

/// As overlay's options have it.
fn escaped(path: &str) -> String {
    path.replace('\\', "\\\\").replace(',', "\\,").replace(':', "\\:")
}

/// Whether a mount has to be made in a [`Workshop`] because of a client's options.
pub(super) fn is_of_client(mount: &RootfsMount) -> bool {
    mount.options.iter().any(|o| o.starts_with("uidmap=") || o.starts_with("gidmap="))
}

/// Takes containerd's options for ids out. Each is a list of `CONTAINER:HOST:SIZE` with commas.
fn of_client(mount: &RootfsMount) -> Result<(RootfsMount, Option<UserIds>), Error> {
    if !is_of_client(mount) {
        return Ok((mount.clone(), None));
    }
    let value = |prefix: &str| mount.options.iter().find_map(|o| o.strip_prefix(prefix));
    let unsupported = || Error::UnsupportedOption {
        fstype: mount.fstype.clone(),
        option: format!("uidmap={:?} with gidmap={:?}", value("uidmap="), value("gidmap=")),
    };
    let mappings = value("uidmap=")
        .zip(value("gidmap="))
        .and_then(|(uids, gids)| IdMappings::parse(uids, gids))
        .ok_or_else(unsupported)?;
    let mut rest = mount.clone();
    rest.options.retain(|o| !o.starts_with("uidmap=") && !o.starts_with("gidmap="));
    let ids = UserIds::new(mappings)
        .map_err(|source| Error::MapIds { path: mount.source.clone().into(), source })?;
    Ok((rest, Some(ids)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::plan::IdMapping;

    #[test]
    fn the_parent_of_upper_and_work_is_found() {
        for (upper, work, expected) in [
            ("/s/12/fs", "/s/12/work", ("/s/12", "fs", "work")),
            ("/upper", "/work", ("/", "upper", "work")),
            ("/proc/self/fd/7/upper", "/proc/self/fd/7/work", ("/proc/self/fd/7", "upper", "work")),
            ("/s/1/a/b", "/s/2", ("/s", "1/a/b", "2")),
        ] {
            let found = common_parent(Path::new(upper), Path::new(work));
            assert_eq!(found, (expected.0.into(), expected.1.into(), expected.2.into()));
        }
    }

    #[test]
    fn a_root_that_is_mapped_already_is_known() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let mapping = |container, host, size| IdMapping { container, host, size };
        let ids =
            |uids: Vec<IdMapping>| UserIds::new(IdMappings { gids: uids.clone(), uids }).unwrap();
        let usual = ids(vec![mapping(0, 100_000, 65_536)]);
        let own = [0, 99_999, 100_000, 101_000, 165_535, 165_536].map(|uid| usual.own(uid));
        assert_eq!(own, [false, false, true, true, true, false]);
        assert!(ids(vec![mapping(0, 0, 10)]).own(0));
        assert!(!ids(vec![mapping(0, 5, 1), mapping(1, 0, 1)]).own(0));
    }
}
