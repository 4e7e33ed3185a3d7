//! OCI archives as templates: the layers are flattened into the rootfs, and the image's
//! configuration becomes options of the CT.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::Value as Json;
use sha2::{Digest, Sha256};
use tokio::process::Command;

use crate::archive::{Target, untar};
use crate::conf::hex;
use crate::task::Task;

/// The part of an image's configuration that matters for a CT.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Image {
    /// Entrypoint and Cmd in one.
    pub command: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// WorkingDir.
    pub cwd: Option<String>,
    /// User and group, as numbers.
    pub user: Option<(u32, u32)>,
    /// StopSignal.
    pub stop_signal: Option<String>,
}

/// Whether a tar archive is an OCI archive.
pub async fn is_oci(archive: &Path) -> Result<bool, String> {
    let output = Command::new("tar")
        .args(["--list", "--file"])
        .arg(archive)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|e| format!("unable to read '{}' - {e}", archive.display()))?;
    let names = String::from_utf8_lossy(&output.stdout);
    Ok(names.lines().any(|name| name.trim_start_matches("./") == "oci-layout"))
}

/// Unpacks the image of an archive, and gives its configuration.
pub async fn unpack(archive: &Path, target: Target<'_>, task: &Task) -> Result<Image, String> {
    // Beside the target, so that files can be moved instead of copied.
    let parent = target.dir.parent().unwrap_or(Path::new("/"));
    let scratch = Scratch::new(parent)?;
    let image = scratch.0.join("image");
    make_dir(&image)?;
    let private = Target { dir: &image, shown: &image, unprivileged: false };
    let quiet = |result: Result<(), String>| {
        result.map_err(|e| format!("unable to unpack OCI archive - {e}"))
    };
    quiet(untar(archive, None, private, task).await)?;

    let layout = Layout(&image);
    let manifest = layout.manifest()?;
    let config = layout.json(&manifest["config"])?;
    for (n, layer) in manifest["layers"].as_array().into_iter().flatten().enumerate() {
        let dir = scratch.0.join(format!("layer{n}"));
        make_dir(&dir)?;
        let meta = fs::metadata(target.dir).map_err(|e| e.to_string())?;
        lchown(&dir, Some(meta.uid()), Some(meta.gid())).map_err(|e| e.to_string())?;
        let blob = layout.blob(layer)?;
        let compression = match layer["mediaType"].as_str().unwrap_or_default() {
            kind if kind.ends_with("gzip") => Some("-z"),
            kind if kind.ends_with("zstd") => Some("--zstd"),
            _ => None,
        };
        let unpacked = Target { dir: &dir, shown: &dir, ..target };
        quiet(untar(&blob, compression, unpacked, task).await)?;
        merge(&dir, target.dir).map_err(|e| format!("unable to merge layer {n} - {e}"))?;
    }
    let rootfs = target.dir;
    for volume in config["config"]["Volumes"].as_object().into_iter().flatten() {
        task.log(&format!("creating base directory for volume at {}", volume.0));
        make_below(rootfs, volume.0).map_err(|e| format!("unable to create {} - {e}", volume.0))?;
    }
    Ok(read_config(&config["config"], rootfs))
}

/// A directory that is removed with all that is in it.
struct Scratch(PathBuf);

impl Scratch {
    fn new(parent: &Path) -> Result<Self, String> {
        let dir = parent.join(format!(".oci-{:016x}", rand::random::<u64>()));
        make_dir(&dir)?;
        Ok(Self(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What is left lies in the storage's own directory, and is nobody's.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn make_dir(dir: &Path) -> Result<(), String> {
    fs::create_dir(dir).map_err(|e| format!("unable to create '{}' - {e}", dir.display()))
}

/// An unpacked OCI image layout.
struct Layout<'a>(&'a Path);

impl Layout<'_> {
    /// The manifest to use: the first, or of an index the one for this machine.
    fn manifest(&self) -> Result<Json, String> {
        let path = self.0.join("index.json");
        let text = read_file(&path)?;
        let mut index: Json =
            serde_json::from_slice(&text).map_err(|e| format!("invalid index.json - {e}"))?;
        for _ in 0..4 {
            let Some(list) = index["manifests"].as_array() else { return Ok(index) };
            let fits = |m: &&Json| m["platform"]["architecture"] == "amd64";
            let chosen = list.iter().find(fits).or(list.first());
            index = self.json(chosen.ok_or("OCI archive without a manifest")?)?;
        }
        Err("OCI archive with too many nested indexes".into())
    }

    fn json(&self, descriptor: &Json) -> Result<Json, String> {
        let path = self.blob(descriptor)?;
        serde_json::from_slice(&read_file(&path)?)
            .map_err(|e| format!("invalid blob {} - {e}", path.display()))
    }

    /// The file of a blob, with the digest that its name promises.
    fn blob(&self, descriptor: &Json) -> Result<PathBuf, String> {
        let digest = descriptor["digest"].as_str().unwrap_or_default();
        let code = digest
            .strip_prefix("sha256:")
            .filter(|d| d.len() == 64 && d.bytes().all(|b| b.is_ascii_hexdigit()))
            .ok_or_else(|| format!("unsupported digest '{digest}'"))?;
        let path = self.0.join("blobs/sha256").join(code);
        check_file(&path)?;
        let mut hash = Sha256::new();
        let copied = fs::File::open(&path).and_then(|mut f| io::copy(&mut f, &mut hash));
        copied.map_err(|e| format!("unable to read blob '{digest}' - {e}"))?;
        if hex(&hash.finalize()) != code {
            return Err(format!("blob '{digest}' is damaged"));
        }
        Ok(path)
    }
}

/// Fails for anything but a plain file: a link in the archive could name any file of the host.
fn check_file(path: &Path) -> Result<(), String> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_file() => Ok(()),
        Ok(_) => Err(format!("'{}' is no file", path.display())),
        Err(e) => Err(format!("unable to read '{}' - {e}", path.display())),
    }
}

fn read_file(path: &Path) -> Result<Vec<u8>, String> {
    const MAX: u64 = 16 << 20;
    check_file(path)?;
    let size = fs::metadata(path).map_or(0, |m| m.len());
    if size > MAX {
        return Err(format!("'{}' is too large", path.display()));
    }
    fs::read(path).map_err(|e| format!("unable to read '{}' - {e}", path.display()))
}

/// Moves a layer's content over what the layers below have made. Never follows a link: each
/// directory on the way is one of the rootfs itself.
fn merge(layer: &Path, rootfs: &Path) -> io::Result<()> {
    let mut names = Vec::new();
    for entry in fs::read_dir(layer)? {
        names.push(entry?.file_name());
    }
    // What a whiteout hides is what was there before this layer.
    for name in &names {
        match name.to_str().and_then(|n| n.strip_prefix(".wh.")) {
            Some(".wh..opq") => clear(rootfs)?,
            Some(hidden) if !hidden.is_empty() && !matches!(hidden, "." | "..") => {
                remove(&rootfs.join(hidden))?;
            }
            _ => {}
        }
    }
    for name in names {
        if name.to_str().is_some_and(|n| n.starts_with(".wh.")) {
            continue;
        }
        let (from, to) = (layer.join(&name), rootfs.join(&name));
        let meta = fs::symlink_metadata(&from)?;
        let is_dir = fs::symlink_metadata(&to).is_ok_and(|m| m.is_dir());
        if meta.is_dir() && is_dir {
            merge(&from, &to)?;
            lchown(&to, Some(meta.uid()), Some(meta.gid()))?;
            fs::set_permissions(&to, fs::Permissions::from_mode(meta.mode() & 0o7777))?;
            continue;
        }
        remove(&to)?;
        if meta.is_dir() {
            // It may hold whiteouts of its own, which are for nothing but must not stay.
            fs::create_dir(&to)?;
            merge(&from, &to)?;
            lchown(&to, Some(meta.uid()), Some(meta.gid()))?;
            fs::set_permissions(&to, fs::Permissions::from_mode(meta.mode() & 0o7777))?;
        } else {
            fs::rename(&from, &to)?;
        }
    }
    Ok(())
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

fn clear(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        remove(&entry?.path())?;
    }
    Ok(())
}

/// Makes a directory below the rootfs, with its parents and their owner. Refuses to go through
/// links and `..`.
fn make_below(rootfs: &Path, path: &str) -> io::Result<()> {
    let owner = fs::metadata(rootfs)?;
    let mut dir = rootfs.to_owned();
    for part in path.split('/').filter(|p| !p.is_empty() && *p != ".") {
        if part == ".." {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        dir.push(part);
        match fs::symlink_metadata(&dir) {
            Ok(meta) if meta.is_dir() => {}
            Ok(_) => return Err(io::ErrorKind::NotADirectory.into()),
            Err(_) => {
                fs::create_dir(&dir)?;
                lchown(&dir, Some(owner.uid()), Some(owner.gid()))?;
            }
        }
    }
    Ok(())
}

fn read_config(config: &Json, rootfs: &Path) -> Image {
    let list = |key: &str| -> Vec<String> {
        let items = config[key].as_array().into_iter().flatten();
        items.filter_map(|v| v.as_str().map(str::to_owned)).collect()
    };
    let text = |key: &str| config[key].as_str().filter(|s| !s.is_empty()).map(str::to_owned);
    Image {
        command: [list("Entrypoint"), list("Cmd")].concat(),
        env: list("Env"),
        cwd: text("WorkingDir"),
        user: text("User").and_then(|user| resolve(&user, rootfs)),
        stop_signal: text("StopSignal"),
    }
}

/// `USER[:GROUP]`, each a name or a number. A user without a group has that of its account.
fn resolve(user: &str, rootfs: &Path) -> Option<(u32, u32)> {
    let (user, group) = user.split_once(':').map_or((user, None), |(u, g)| (u, Some(g)));
    let lookup = |file: &str, name: &str| -> Option<Vec<String>> {
        let path = rootfs.join("etc").join(file);
        // A link could lead out of the rootfs.
        check_file(&path).ok()?;
        fs::symlink_metadata(rootfs.join("etc")).ok().filter(|m| m.is_dir())?;
        let text = fs::read_to_string(path).ok()?;
        text.lines()
            .map(|l| l.split(':').map(str::to_owned).collect::<Vec<_>>())
            .find(|fields| fields.first().is_some_and(|f| f == name))
    };
    let account = lookup("passwd", user);
    let field = |entry: &Option<Vec<String>>, n: usize| entry.as_ref()?.get(n)?.parse().ok();
    let uid = user.parse().ok().or_else(|| field(&account, 2))?;
    let gid = match group {
        Some(group) => group.parse().ok().or_else(|| field(&lookup("group", group), 2))?,
        None => field(&account, 3).unwrap_or(0),
    };
    Some((uid, gid))
}

/// Words as one line for a shell, which is how Proxmox VE writes `entrypoint`.
pub fn shell_line(words: &[String]) -> String {
    let quoted = words.iter().map(|word| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "!%+,-./:=@^_".contains(c);
        match !word.is_empty() && word.chars().all(plain) {
            true => word.clone(),
            false => format!("'{}'", word.replace('\'', "'\\''")),
        }
    });
    quoted.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: PathBuf, text: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn a_layer_hides_replaces_and_adds() {
        let dir = tempfile::tempdir().unwrap();
        let (rootfs, layer) = (dir.path().join("rootfs"), dir.path().join("layer"));
        write(rootfs.join("etc/old"), "1");
        write(rootfs.join("etc/kept"), "1");
        write(rootfs.join("opaque/old"), "1");
        write(rootfs.join("file/inside"), "1");
        write(layer.join("etc/.wh.old"), "");
        write(layer.join("etc/new"), "2");
        write(layer.join("opaque/.wh..wh..opq"), "");
        write(layer.join("opaque/new"), "2");
        write(layer.join("file"), "2");
        write(layer.join("fresh/.wh.nothing"), "");
        merge(&layer, &rootfs).unwrap();
        let exists = |name: &str| rootfs.join(name).exists();
        assert!(exists("etc/kept") && exists("etc/new") && exists("opaque/new"));
        assert!(!exists("etc/old") && !exists("opaque/old"));
        assert!(!exists("etc/.wh.old") && !exists("opaque/.wh..wh..opq"));
        assert!(!exists("fresh/.wh.nothing") && exists("fresh"));
        assert_eq!(fs::read_to_string(rootfs.join("file")).unwrap(), "2");
    }

    #[test]
    fn a_link_of_a_lower_layer_leads_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let (rootfs, layer) = (dir.path().join("rootfs"), dir.path().join("layer"));
        let outside = dir.path().join("outside");
        write(outside.join("victim"), "untouched");
        fs::create_dir_all(&rootfs).unwrap();
        std::os::unix::fs::symlink(&outside, rootfs.join("a")).unwrap();
        write(layer.join("a/victim"), "overwritten");
        write(layer.join("a/.wh.victim"), "");
        merge(&layer, &rootfs).unwrap();
        assert_eq!(fs::read_to_string(outside.join("victim")).unwrap(), "untouched");
        assert_eq!(fs::read_to_string(rootfs.join("a/victim")).unwrap(), "overwritten");
        std::os::unix::fs::symlink(&outside, rootfs.join("b")).unwrap();
        assert!(make_below(&rootfs, "/b/c").is_err());
        assert!(make_below(&rootfs, "/../c").is_err());
        make_below(&rootfs, "/c/d").unwrap();
        assert!(rootfs.join("c/d").is_dir() && !outside.join("c").exists());
    }

    #[test]
    fn users_are_resolved_in_the_image() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path().join("etc/passwd"), "root:x:0:0::/:/bin/sh\nweb:x:33:34::/:\n");
        write(dir.path().join("etc/group"), "root:x:0:\nadm:x:4:web\n");
        for (text, expected) in [
            ("web", Some((33, 34))),
            ("web:adm", Some((33, 4))),
            ("1000", Some((1000, 0))),
            ("1000:1001", Some((1000, 1001))),
            ("nobody", None),
            ("web:nogroup", None),
        ] {
            assert_eq!(resolve(text, dir.path()), expected, "{text}");
        }
    }

    #[test]
    fn words_are_quoted_for_a_shell() {
        let words = ["/bin/sh", "-c", "echo 'a b'", ""].map(str::to_owned);
        assert_eq!(shell_line(&words), r"/bin/sh -c 'echo '\''a b'\''' ''");
    }
}
