//! Mounts that refer to those before them, as containerd's mount manager defines them: a type such as
//! `format/mkdir/overlay` names what is done with the other fields before the mount is made.
//!
//! `format` replaces `{{ mount 0 }}`, `{{ overlay 1 3 }}` and the like; `mkdir` makes the directories
//! of the options `X-containerd.mkdir.path=PATH[:MODE[:UID:GID]]`. containerd makes such mounts itself
//! for a shim that does not ask for them; other clients leave them to the shim.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use super::{Error, RootfsMount};

const MKDIR_OPTION: &str = "X-containerd.mkdir.";
/// Of a directory whose option names none.
const DEFAULT_MODE: u32 = 0o700;

/// What is done with a mount's fields before it is made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Transformers {
    pub format: bool,
    pub mkdir: bool,
}

impl Transformers {
    /// The transformers of a type, and the type that remains.
    pub fn of(fstype: &str) -> Result<(Self, &str), Error> {
        let mut found = Self::default();
        let mut rest = fstype;
        while let Some((transformer, inner)) = rest.split_once('/') {
            match transformer {
                "format" => found.format = true,
                "mkdir" => found.mkdir = true,
                _ => return Err(Error::Type { fstype: fstype.to_owned() }),
            }
            rest = inner;
        }
        match rest {
            "" => Err(Error::Type { fstype: fstype.to_owned() }),
            rest => Ok((found, rest)),
        }
    }

    pub fn any(self) -> bool {
        self != Self::default()
    }
}

/// An earlier mount, as a template sees it.
#[derive(Debug)]
pub(super) struct Active {
    /// After its own transformation.
    pub source: String,
    pub target: String,
    /// Where it is mounted.
    pub point: String,
}

/// Replaces the templates in all fields of `mount`.
pub(super) fn format(mount: &mut RootfsMount, active: &[Active]) -> Result<(), Error> {
    mount.source = expand(&mount.source, active)?;
    mount.target = expand(&mount.target, active)?;
    for option in &mut mount.options {
        *option = expand(option, active)?;
    }
    Ok(())
}

fn expand(text: &str, active: &[Active]) -> Result<String, Error> {
    let error = |reason| Error::Template { text: text.to_owned(), reason };
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, template)) = rest.split_once("{{") {
        let (action, after) =
            template.split_once("}}").ok_or_else(|| error("lacks its closing braces"))?;
        out.push_str(before);
        let number = |word: &str| {
            let index: usize = word
                .parse()
                .map_err(|_| error("names an earlier mount by something else than a number"))?;
            match index < active.len() {
                true => Ok(index),
                false => Err(error("names a mount that does not come before it")),
            }
        };
        match action.split_whitespace().collect::<Vec<_>>()[..] {
            ["source", index] => out.push_str(&active[number(index)?].source),
            ["target", index] => out.push_str(&active[number(index)?].target),
            ["mount", index] => out.push_str(&active[number(index)?].point),
            ["overlay", start, end] => {
                let (start, end) = (number(start)?, number(end)?);
                let range = &active[start.min(end)..=start.max(end)];
                let mut points: Vec<&str> = range.iter().map(|a| a.point.as_str()).collect();
                if start > end {
                    points.reverse();
                }
                out.push_str(&points.join(":"));
            }
            _ => return Err(error("is none of source, target, mount and overlay")),
        }
        rest = after;
    }
    out.push_str(rest);
    Ok(out)
}

/// A directory to make.
#[derive(Debug, PartialEq, Eq)]
struct Directory {
    path: PathBuf,
    mode: u32,
    owner: Option<(u32, u32)>,
}

/// Makes the directories that the options of `mount` name, and takes these options out.
///
/// One that exists stays as it is: the mode of overlay's upper directory is that of the container's
/// root, which the container may have changed before it was stopped.
pub(super) fn make_directories(mount: &mut RootfsMount) -> Result<(), Error> {
    let (ours, others) = mount.options.drain(..).partition(|o| o.starts_with(MKDIR_OPTION));
    mount.options = others;
    let ours: Vec<String> = ours;
    ours.iter().try_for_each(|option| {
        let directory = parse_directory(option).ok_or_else(|| Error::UnsupportedOption {
            fstype: mount.fstype.clone(),
            option: option.clone(),
        })?;
        directory
            .make()
            .map_err(|source| Error::MakeDirectory { path: directory.path.clone(), source })
    })
}

fn parse_directory(option: &str) -> Option<Directory> {
    let value = option.strip_prefix(MKDIR_OPTION)?.strip_prefix("path=")?;
    let mode = |text: &str| u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777);
    let (path, mode, owner) = match value.split(':').collect::<Vec<_>>()[..] {
        [path] => (path, DEFAULT_MODE, None),
        [path, bits] => (path, mode(bits)?, None),
        [path, bits, uid, gid] => (path, mode(bits)?, Some((uid.parse().ok()?, gid.parse().ok()?))),
        _ => return None,
    };
    Path::new(path).is_absolute().then(|| Directory { path: path.into(), mode, owner })
}

impl Directory {
    fn make(&self) -> io::Result<()> {
        match DirBuilder::new().mode(self.mode).create(&self.path) {
            Ok(()) => {
                // The umask may have taken bits away.
                std::fs::set_permissions(&self.path, PermissionsExt::from_mode(self.mode))?;
                match self.owner {
                    Some((uid, gid)) => chown(&self.path, Some(uid), Some(gid)),
                    None => Ok(()),
                }
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                match self.path.symlink_metadata()?.is_dir() {
                    true => Ok(()),
                    false => Err(io::ErrorKind::NotADirectory.into()),
                }
            }
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn active() -> Vec<Active> {
        let active = |n: u32| Active {
            source: format!("/s{n}"),
            target: format!("/t{n}"),
            point: format!("/m{n}"),
        };
        (0..4).map(active).collect()
    }

    #[test]
    fn templates_are_replaced() {
        for (text, expected) in [
            ("plain", "plain"),
            ("{{ mount 0 }}/upper", "/m0/upper"),
            ("a{{mount 1}}b{{ source 2 }}c{{ target  3 }}", "a/m1b/s2c/t3"),
            ("lowerdir={{ overlay 1 3 }}", "lowerdir=/m1:/m2:/m3"),
            ("{{ overlay 2 0 }}", "/m2:/m1:/m0"),
            ("{{ overlay 1 1 }}", "/m1"),
        ] {
            assert_eq!(expand(text, &active()).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn wrong_templates_are_named() {
        for (text, expected) in [
            ("{{ mount 4 }}", "does not come before"),
            ("{{ overlay 0 4 }}", "does not come before"),
            ("{{ mount -1 }}", "something else than a number"),
            ("{{ mount", "closing braces"),
            ("{{ }}", "none of"),
            ("{{ env HOME }}", "none of"),
            ("{{ overlay 1 }}", "none of"),
        ] {
            let error = expand(text, &active()).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains(text), "{text}: {error}");
        }
    }

    #[test]
    fn types_are_split() {
        let both = Transformers { format: true, mkdir: true };
        assert_eq!(Transformers::of("overlay").unwrap(), (Transformers::default(), "overlay"));
        assert_eq!(Transformers::of("format/mkdir/overlay").unwrap(), (both, "overlay"));
        assert_eq!(Transformers::of("mkdir/format/bind").unwrap(), (both, "bind"));
        for wrong in ["mkfs/ext4", "format/mkfs/ext4", "/overlay", "format/", ""] {
            assert!(matches!(Transformers::of(wrong), Err(Error::Type { .. })), "{wrong}");
        }
    }

    #[test]
    fn directories_are_made_once_with_their_mode() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("upper");
        let mut mount = RootfsMount {
            options: vec![
                format!("X-containerd.mkdir.path={}:0771", path.display()),
                "index=off".to_owned(),
            ],
            ..RootfsMount::default()
        };
        let asked = mount.clone();
        make_directories(&mut mount).unwrap();
        assert_eq!(mount.options, ["index=off"]);
        let mode = || path.metadata().unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode(), 0o771);
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o700)).unwrap();
        make_directories(&mut asked.clone()).unwrap();
        assert_eq!(mode(), 0o700, "the container's own change is kept");
        std::fs::remove_dir(&path).unwrap();
        std::os::unix::fs::symlink("/", &path).unwrap();
        let error = make_directories(&mut asked.clone()).unwrap_err();
        assert!(matches!(error, Error::MakeDirectory { .. }), "{error}");
    }

    #[test]
    fn options_for_directories_are_read_strictly() {
        let parse = |value: &str| parse_directory(&format!("X-containerd.mkdir.{value}"));
        let directory = |mode, owner| Some(Directory { path: "/d".into(), mode, owner });
        assert_eq!(parse("path=/d"), directory(0o700, None));
        assert_eq!(parse("path=/d:0755"), directory(0o755, None));
        assert_eq!(parse("path=/d:755:5:6"), directory(0o755, Some((5, 6))));
        for wrong in
            ["path=d", "path=/d:9", "path=/d:7777", "path=/d:755:5", "path=/d:755:5:x", "mode=5"]
        {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }
}
