//! Making CTs: from a template, and as a copy of another.

use std::fs;
use std::os::unix::fs::lchown;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use tokio::process::Command;

use crate::archive::{Target, unpack};
use crate::conf::{ARCHS, Config, OSTYPES, Section};
use crate::mounts::{self, Mount, Source};
use crate::node::Node;
use crate::oci::{Image, shell_line};
use crate::storage::{VolumeId, format_size};
use crate::task::Task;
use crate::userns;

/// A CT to be made.
#[derive(Debug)]
pub struct NewCt {
    /// Its VMID.
    pub claim: Claim,
    /// Its configuration without `rootfs` and mount points.
    pub config: Section,
    /// `rootfs` and mount points.
    pub mounts: Vec<(String, Mount)>,
    /// The template.
    pub template: VolumeId,
}

/// A CT to be copied.
#[derive(Debug)]
pub struct NewClone {
    /// The CT to copy.
    pub from: u32,
    /// The VMID of the copy.
    pub claim: Claim,
    /// The configuration of the copy, still with the volumes of the original.
    pub config: Section,
    /// Where its volumes go; where those of the original are if absent.
    pub storage: Option<String>,
}

/// A VMID that nobody else can have: a configuration that only says so. It is given back, with the
/// volumes that were made for it, unless the CT is finished.
#[derive(Debug)]
pub struct Claim {
    node: Arc<Node>,
    vmid: u32,
    volumes: Vec<VolumeId>,
    finished: bool,
}

impl Claim {
    /// Stores the configuration of the CT, which is real from now on.
    fn finish(mut self, config: &Config) -> Result<(), String> {
        self.node.store(self.vmid, config)?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for Claim {
    // Not a function to call at the end, as a task may be interrupted at any await.
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        for volume in &self.volumes {
            if let Err(error) = self.node.free_volume(volume) {
                self.node.note(&error);
            }
        }
        let _ = self.node.remove_conf(self.vmid);
        self.node.dc.acl_mut().forget_guest(self.vmid);
    }
}

impl Node {
    /// Claims a VMID.
    pub fn claim(self: &Arc<Self>, vmid: u32) -> Result<Claim, String> {
        let _guard = self.dc.claims();
        self.dc.check_quorum()?;
        self.check_unused(vmid)?;
        let mut config = Config::default();
        config.current.set("lock", "create");
        self.store(vmid, &config)?;
        Ok(Claim { node: self.clone(), vmid, volumes: Vec::new(), finished: false })
    }

    /// Fails if a VMID is in use on any node, by a CT or a virtual machine.
    pub fn check_unused(&self, vmid: u32) -> Result<(), String> {
        match self.dc.owner(vmid) {
            Some((node, kind)) => Err(format!("{kind} {vmid} already exists on node '{node}'")),
            None => Ok(()),
        }
    }

    /// Removes a volume.
    pub fn free_volume(&self, volume: &VolumeId) -> Result<(), String> {
        self.storage(&volume.storage)?.backend().free(&volume.name)
    }

    /// The body of a create task.
    pub async fn create_ct(self: Arc<Self>, task: Arc<Task>, new: NewCt) -> Result<(), String> {
        let vmid = new.claim.vmid;
        self.make_ct(&task, new).await.map_err(|e| format!("unable to create CT {vmid} - {e}"))
    }

    async fn make_ct(self: Arc<Self>, task: &Task, new: NewCt) -> Result<(), String> {
        let mut claim = new.claim;
        let vmid = claim.vmid;
        let _lock = self.lock_ct(vmid).await?;
        task.reach("locked")?;
        let template = self.volume_path(&new.template)?;
        if !template.is_file() {
            let text = format!("volume '{}' does not exist", new.template);
            task.log(&text);
            return Err(text);
        }
        let unprivileged = new.config.flag("unprivileged");
        let mut config = Config { current: new.config, ..Config::default() };
        let mut rootfs = None;
        for (key, mut mount) in new.mounts {
            if let Some(volume) = self.allocate(vmid, &mut mount, unprivileged).await? {
                if volume.name.ends_with(".raw") {
                    let path = self.volume_path(&volume)?;
                    task.log(&format!("Formatting '{}', fmt=raw", path.display()));
                }
                claim.volumes.push(volume);
            }
            config.current.set(&key, &mount.to_string());
            if key == "rootfs" {
                rootfs = Some(mount);
            }
        }
        task.reach("allocated")?;
        let rootfs = rootfs.ok_or("no root file system")?;
        let shown = self.paths.lxc.join(vmid.to_string()).join("rootfs");
        let dir = self.rootfs_dir(&rootfs)?;
        let staging = Staging::new(&dir)?;
        let target = Target { dir: staging.dir(), shown: &shown, unprivileged };
        if unprivileged && staging.is_own() {
            lchown(target.dir, Some(userns::ROOT), Some(userns::ROOT))
                .map_err(|e| e.to_string())?;
        }
        if let Some(storage) = rootfs.storage() {
            self.storage(storage)?.check_room()?;
        }
        let image = unpack(&template, target, task).await?;
        complete(&mut config.current, image, target.dir, task);
        staging.finish(unprivileged).await?;
        task.reach("extracted")?;
        claim.finish(&config)
    }

    /// Makes the volume that a mount point asks for. Gives it if it is new.
    pub async fn allocate(
        &self,
        vmid: u32,
        mount: &mut Mount,
        unprivileged: bool,
    ) -> Result<Option<VolumeId>, String> {
        let Source::New { storage, size } = &mount.source else { return Ok(None) };
        let volume = self.storage(storage)?.allocate(vmid, *size)?;
        let size = *size;
        mount.source = Source::Volume(volume.clone());
        mount.set_prop("size", format_size(size));
        let path = self.volume_path(&volume)?;
        let owner = if unprivileged { userns::ROOT } else { 0 };
        if size == 0 {
            lchown(&path, Some(owner), Some(owner)).map_err(|e| e.to_string())?;
        } else {
            format_image(&path, None, owner).await?;
        }
        Ok(Some(volume))
    }

    /// What becomes of volumes that a change has taken out of a configuration: they are kept as
    /// unused, and removed if they were unused already.
    pub fn settle_volumes(&self, before: &Config, after: &mut Config) -> Result<(), String> {
        let kept = mounts::volumes(after);
        for volume in mounts::volumes(before).into_iter().filter(|v| !kept.contains(v)) {
            let name = volume.to_string();
            let unused = |(key, value): (&String, &crate::conf::Value)| {
                key.starts_with("unused") && value.to_text() == name
            };
            if before.current.values.iter().any(unused) {
                self.free_volume(&volume)?;
                continue;
            }
            let free = (0..256).map(|n| format!("unused{n}")).find(|k| !after.current.has(k));
            after.current.set(&free.ok_or("too many unused volumes")?, &name);
        }
        Ok(())
    }

    /// The directory or image of a rootfs.
    fn rootfs_dir(&self, rootfs: &Mount) -> Result<PathBuf, String> {
        match &rootfs.source {
            Source::Bind(path) | Source::Device(path) => Ok(path.clone()),
            Source::Volume(volume) => self.volume_path(volume),
            Source::New { .. } => Err("the root file system was not made".into()),
        }
    }

    /// The body of a clone task. On storages without snapshots every clone is a full copy.
    pub async fn clone_ct(self: Arc<Self>, task: Arc<Task>, new: NewClone) -> Result<(), String> {
        let mut claim = new.claim;
        let (from, to) = (new.from, claim.vmid);
        task.log(&format!("creating a clone of container {from} with ID {to}"));
        let _lock = self.lock_ct(from).await?;
        task.reach("locked")?;
        let mut config = Config { current: new.config, ..Config::default() };
        for key in mounts::keys(&config.current) {
            let mut mount = Mount::parse(&config.current.text(&key).unwrap_or_default())?;
            let Some(volume) = mount.volume().cloned() else { continue };
            task.log(&format!("create full clone of mountpoint {key} ({volume})"));
            let storage = new.storage.as_deref().unwrap_or(&volume.storage);
            let copy = self.copy_volume(&task, &volume, to, storage).await?;
            claim.volumes.push(copy.clone());
            mount.source = Source::Volume(copy);
            config.current.set(&key, &mount.to_string());
        }
        claim.finish(&config)
    }

    /// Copies a volume for a guest into a storage.
    pub async fn copy_volume(
        &self,
        task: &Task,
        volume: &VolumeId,
        vmid: u32,
        storage: &str,
    ) -> Result<VolumeId, String> {
        let from = self.volume_path(volume)?;
        self.import_volume(task, &from, volume, vmid, storage).await
    }

    /// Copies a volume, which may be one of another node.
    pub async fn import_volume(
        &self,
        task: &Task,
        from: &Path,
        volume: &VolumeId,
        vmid: u32,
        storage: &str,
    ) -> Result<VolumeId, String> {
        let size = if volume.name.ends_with(".raw") {
            fs::metadata(from).map_err(|e| format!("unable to read '{volume}' - {e}"))?.len()
        } else {
            0
        };
        let storage = self.storage(storage)?;
        let copy = storage.allocate(vmid, size)?;
        let to = self.volume_path(&copy)?;
        let mut command = Command::new("cp");
        command.args(["--archive", "--reflink=auto", "--sparse=always", "--no-target-directory"]);
        let command = command.arg("--").arg(from).arg(&to).stdin(Stdio::null());
        task.running(Some(format!("cp --archive {} {}", from.display(), to.display())));
        let output = command.kill_on_drop(true).output().await;
        task.running(None);
        let failed = match output {
            Ok(output) if output.status.success() => return Ok(copy),
            Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            Err(e) => e.to_string(),
        };
        let _ = storage.backend().free(&copy.name);
        Err(format!("unable to copy '{volume}' - {failed}"))
    }
}

/// Where a template is unpacked: the directory itself, or one whose content then fills an image.
struct Staging {
    image: Option<PathBuf>,
    dir: PathBuf,
}

impl Staging {
    fn new(volume: &Path) -> Result<Self, String> {
        let failed = |e: std::io::Error| format!("unable to use '{}' - {e}", volume.display());
        if fs::metadata(volume).map_err(failed)?.is_dir() {
            return Ok(Self { image: None, dir: volume.to_owned() });
        }
        let dir = volume.with_extension("staging");
        fs::create_dir(&dir).map_err(failed)?;
        Ok(Self { image: Some(volume.to_owned()), dir })
    }

    fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether nobody else has anything in the directory.
    fn is_own(&self) -> bool {
        self.image.is_some()
    }

    async fn finish(self, unprivileged: bool) -> Result<(), String> {
        let Some(image) = &self.image else { return Ok(()) };
        let owner = if unprivileged { userns::ROOT } else { 0 };
        format_image(image, Some(&self.dir), owner).await
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.image.is_some() {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

/// Makes a filesystem in an image, with the content of a directory.
async fn format_image(image: &Path, content: Option<&Path>, owner: u32) -> Result<(), String> {
    let mut command = Command::new("mkfs.ext4");
    command.args(["-q", "-F", "-E", &format!("root_owner={owner}:{owner}")]);
    if let Some(dir) = content {
        command.arg("-d").arg(dir);
    }
    let output = command.arg(image).stdin(Stdio::null()).kill_on_drop(true).output().await;
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!(
            "command 'mkfs.ext4 {}' failed: {}",
            image.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        )),
        Err(e) => Err(format!("unable to run mkfs.ext4 - {e}")),
    }
}

/// Adds what follows from the template to what was asked for.
fn complete(conf: &mut Section, image: Option<Image>, rootfs: &Path, task: &Task) {
    if let Some(image) = image {
        if !conf.has("entrypoint") && !image.command.is_empty() {
            conf.set("entrypoint", &shell_line(&image.command));
        }
        if !conf.has("cmode") {
            conf.set("cmode", "console");
        }
        if !conf.has("env") && !image.env.is_empty() {
            conf.set("env", &image.env.join("\0"));
        }
        let user = image.user.filter(|user| *user != (0, 0));
        let raw = [
            ("lxc.init.cwd", image.cwd),
            ("lxc.init.uid", user.map(|(uid, _)| uid.to_string())),
            ("lxc.init.gid", user.map(|(_, gid)| gid.to_string())),
            ("lxc.signal.halt", image.stop_signal),
        ];
        for (key, value) in raw {
            // A line break would become a line of its own.
            if let Some(value) = value.filter(|v| !v.chars().any(char::is_control)) {
                conf.raw.push((key.to_owned(), value));
            }
        }
    }
    if !conf.has("ostype") {
        let ostype = detect_ostype(rootfs).unwrap_or_else(|| {
            task.log(
                "/etc/os-release file not found and autodetection failed, falling back to \
                 'unmanaged'",
            );
            "unmanaged"
        });
        conf.set("ostype", ostype);
    }
    if !conf.has("arch") {
        let arch = detect_arch(rootfs).unwrap_or_else(|| {
            task.log("Falling back to amd64.\nUse `pct set VMID --arch ARCH` to change.");
            "amd64"
        });
        conf.set("arch", arch);
    }
}

/// The beginning of a plain file in a directory of the rootfs, without following links.
fn read_start(rootfs: &Path, dir: &str, file: &str) -> Option<Vec<u8>> {
    use std::io::Read;
    let dir = rootfs.join(dir);
    let path = dir.join(file);
    let plain =
        fs::symlink_metadata(&dir).ok()?.is_dir() && fs::symlink_metadata(&path).ok()?.is_file();
    let mut bytes = Vec::new();
    let file = fs::File::open(path).ok().filter(|_| plain)?;
    file.take(16 * 1024).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// The kind of system, from its os-release.
fn detect_ostype(rootfs: &Path) -> Option<&'static str> {
    let bytes = read_start(rootfs, "etc", "os-release")
        .or_else(|| read_start(rootfs, "usr/lib", "os-release"))?;
    let text = String::from_utf8_lossy(&bytes);
    let id = text.lines().find_map(|l| l.strip_prefix("ID="))?.trim_matches(['"', '\'']);
    let id = match id {
        "arch" => "archlinux",
        "opensuse-leap" | "opensuse-tumbleweed" => "opensuse",
        "rocky" | "almalinux" | "rhel" => "centos",
        id => id,
    };
    OSTYPES.iter().copied().find(|known| *known == id)
}

/// The architecture, from the header of the shell.
fn detect_arch(rootfs: &Path) -> Option<&'static str> {
    let bytes = read_start(rootfs, "bin", "sh").or_else(|| read_start(rootfs, "usr/bin", "sh"))?;
    let header = bytes.get(..20).filter(|h| h.starts_with(b"\x7fELF"))?;
    let (wide, machine) = (header[4] == 2, u16::from_le_bytes([header[18], header[19]]));
    let arch = match (machine, wide) {
        (62, true) => "amd64",
        (3, false) => "i386",
        (183, true) => "arm64",
        (40, false) => "armhf",
        (243, false) => "riscv32",
        (243, true) => "riscv64",
        _ => return None,
    };
    ARCHS.iter().copied().find(|known| *known == arch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_and_architecture_are_detected() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!((detect_ostype(dir.path()), detect_arch(dir.path())), (None, None));
        fs::create_dir_all(dir.path().join("etc")).unwrap();
        fs::create_dir_all(dir.path().join("bin")).unwrap();
        fs::write(dir.path().join("etc/os-release"), "NAME=x\nID=\"debian\"\n").unwrap();
        let mut elf = vec![0; 64];
        elf[..5].copy_from_slice(b"\x7fELF\x02");
        elf[18] = 183;
        fs::write(dir.path().join("bin/sh"), elf).unwrap();
        assert_eq!(detect_ostype(dir.path()), Some("debian"));
        assert_eq!(detect_arch(dir.path()), Some("arm64"));
    }
}
