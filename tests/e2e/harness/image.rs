//! The image every suite runs: Debian's static busybox and the static test programs, written as an
//! OCI layout without a daemon or network.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::json;
use sha2::{Digest, Sha256};

use super::process;

/// The image's name in containerd.
pub const IMAGE: &str = "docker.io/library/e2e:1";

/// An `Env` of the image's configuration, to be found in containers.
pub const IMAGE_ENV: &str = "FROM_IMAGE=yes";

const PROBE_SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/programs/probe.c");

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Builds the static test program (see its source for what it can do), unless `E2E_PROBE` names it:
/// a machine that only runs the suites need not have a compiler.
fn compile_probe(directory: &Path) -> PathBuf {
    if let Some(ready) = std::env::var_os("E2E_PROBE") {
        return ready.into();
    }
    let target = directory.join("probe");
    process::run(
        Command::new("cc")
            .args(["-static", "-O1", "-Wall", "-Werror", "-pthread", "-o"])
            .arg(&target)
            .arg(PROBE_SOURCE),
    )
    .ok();
    target
}

fn busybox() -> PathBuf {
    ["/bin/busybox", "/usr/bin/busybox"]
        .iter()
        .map(PathBuf::from)
        .find(|path| path.exists())
        .expect("busybox is missing: install the package busybox-static")
}

struct Layer(tar::Builder<Vec<u8>>);

impl Layer {
    fn entry(&mut self, kind: tar::EntryType, path: &str, mode: u32, data: &[u8]) {
        let mut header = self.header(kind, mode);
        header.set_size(data.len() as u64);
        self.0.append_data(&mut header, path, data).expect("append to the layer");
    }

    fn link(&mut self, path: &str, target: &str) {
        let mut header = self.header(tar::EntryType::Symlink, 0o777);
        header.set_size(0);
        self.0.append_link(&mut header, path, target).expect("append a link to the layer");
    }

    // Fixed owner and time: the layer's digest depends on the content only.
    fn header(&self, kind: tar::EntryType, mode: u32) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header
    }
}

/// The root file system as an uncompressed tar.
fn layer(scratch: &Path) -> Vec<u8> {
    use tar::EntryType::{Directory, Regular};
    let mut layer = Layer(tar::Builder::new(Vec::new()));
    for directory in ["bin", "dev", "etc", "home", "mnt", "proc", "root", "run", "sys", "var"] {
        layer.entry(Directory, directory, 0o755, b"");
    }
    layer.entry(Directory, "home/user", 0o755, b"");
    layer.entry(Directory, "tmp", 0o1777, b"");
    // A hostile image: whoever follows this on the host leaves the root file system.
    layer.link("evil", "../../../../tmp");
    layer.entry(
        Regular,
        "etc/passwd",
        0o644,
        b"root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\n",
    );
    layer.entry(Regular, "etc/group", 0o644, b"root:x:0:\nuser:x:1000:\nextra:x:1234:user\n");
    layer.entry(Regular, "etc/not-executable", 0o644, b"#!/bin/sh\n");
    let busybox = busybox();
    layer.entry(Regular, "bin/busybox", 0o755, &fs::read(&busybox).expect("read busybox"));
    let applets = process::run(Command::new(&busybox).arg("--list")).ok().text();
    for applet in applets.lines().filter(|name| *name != "busybox") {
        layer.link(&format!("bin/{applet}"), "busybox");
    }
    let probe = fs::read(compile_probe(scratch)).expect("read the probe");
    layer.entry(Regular, "bin/probe", 0o755, &probe);
    layer.0.into_inner().expect("finish the layer")
}

/// Writes the image as an OCI layout tar to `archive`, and unpacks its only layer to `rootfs` for
/// the tests that drive a shim without containerd.
pub fn write(scratch: &Path, archive: &Path, rootfs: &Path) {
    let layer = layer(scratch);
    tar::Archive::new(layer.as_slice()).unpack(rootfs).expect("unpack the layer");
    write_archive(IMAGE, json!(["sh"]), &layer, archive);
}

/// The name of the image for pod sandboxes.
pub const PAUSE_IMAGE: &str = "docker.io/library/e2e-pause:1";

/// Writes an image of which nothing can be executed: a pod sandbox needs nothing of it.
pub fn write_pause(archive: &Path) {
    let mut layer = Layer(tar::Builder::new(Vec::new()));
    layer.entry(tar::EntryType::Regular, "pause", 0o644, b"is never executed");
    let layer = layer.0.into_inner().expect("finish the layer");
    write_archive(PAUSE_IMAGE, json!(["/pause"]), &layer, archive);
}

/// Writes the image of [`write`] under another name, with another command.
pub fn write_as(name: &str, command: &[&str], rootfs: &Path, archive: &Path) {
    let mut layer = tar::Builder::new(Vec::new());
    layer.follow_symlinks(false);
    layer.append_dir_all(".", rootfs).expect("pack the root file system");
    let layer = layer.into_inner().expect("finish the layer");
    write_archive(name, json!(command), &layer, archive);
}

fn write_archive(name: &str, command: serde_json::Value, layer: &[u8], archive: &Path) {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let config = json!({
        "architecture": architecture,
        "os": "linux",
        "config": {
            "Env": ["PATH=/bin", IMAGE_ENV],
            "Cmd": command,
            "WorkingDir": "/",
        },
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", hex(layer))]},
    })
    .to_string();
    let descriptor = |media: &str, blob: &[u8]| json!({"mediaType": media, "digest": format!("sha256:{}", hex(blob)), "size": blob.len()});
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("application/vnd.oci.image.config.v1+json", config.as_bytes()),
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", layer)],
    })
    .to_string();
    let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", manifest.as_bytes());
    entry["platform"] = json!({"architecture": architecture, "os": "linux"});
    entry["annotations"] =
        json!({"io.containerd.image.name": name, "org.opencontainers.image.ref.name": "1"});
    let index = json!({"schemaVersion": 2, "manifests": [entry]}).to_string();

    let mut out = Layer(tar::Builder::new(Vec::new()));
    let regular = tar::EntryType::Regular;
    out.entry(regular, "oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#);
    for blob in [layer, config.as_bytes(), manifest.as_bytes()] {
        out.entry(regular, &format!("blobs/sha256/{}", hex(blob)), 0o644, blob);
    }
    out.entry(regular, "index.json", 0o644, index.as_bytes());
    fs::write(archive, out.0.into_inner().expect("finish the archive"))
        .expect("write the image archive");
}

/// An ext4 image of `megabytes` that holds a copy of `directory`.
pub fn ext4(image: &Path, megabytes: u64, directory: &Path) {
    let file = fs::File::create(image).expect("create the image");
    file.set_len(megabytes << 20).expect("size the image");
    let mut make = Command::new("/sbin/mkfs.ext4");
    process::run(make.args(["-q", "-d"]).arg(directory).arg(image)).ok();
}

/// The smallest EROFS image: a root directory with one file. (mkfs.erofs is in no package that every
/// Debian system has.) The layout is that of the kernel's documentation, without compression.
pub fn erofs(image: &Path, name: &str, content: &[u8]) {
    const BLOCK: usize = 4096;
    // Inodes are numbered in units of 32 bytes from the start of the metadata, here the image.
    const ROOT: u64 = 64;
    const FILE: u64 = 65;
    assert!(content.len() <= BLOCK);
    let mut bytes = vec![0u8; 3 * BLOCK];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    let superblock = 1024;
    put(superblock, &0xE0F5_E1E2_u32.to_le_bytes());
    put(superblock + 12, &[12]); // log2 of the block size
    put(superblock + 14, &(ROOT as u16).to_le_bytes());
    put(superblock + 16, &2u64.to_le_bytes()); // inodes
    put(superblock + 36, &3u32.to_le_bytes()); // blocks
    let mut inode = |number: u64, mode: u16, links: u16, size: usize, block: u32| {
        let at = number as usize * 32;
        put(at + 4, &mode.to_le_bytes());
        put(at + 6, &links.to_le_bytes());
        put(at + 8, &(size as u32).to_le_bytes());
        put(at + 16, &block.to_le_bytes());
        put(at + 20, &(number as u32).to_le_bytes());
    };
    // Entries of 12 bytes, in the order of their names, which follow.
    let entries = [(".", ROOT, 2u8), ("..", ROOT, 2), (name, FILE, 1)];
    let names: usize = entries.iter().map(|(name, ..)| name.len()).sum();
    inode(ROOT, 0o040_755, 2, entries.len() * 12 + names, 1);
    inode(FILE, 0o100_644, 1, content.len(), 2);
    let mut name_at = entries.len() * 12;
    for (index, (name, inode, kind)) in entries.iter().enumerate() {
        let at = BLOCK + index * 12;
        put(at, &inode.to_le_bytes());
        put(at + 8, &(name_at as u16).to_le_bytes());
        put(at + 10, &[*kind]);
        put(BLOCK + name_at, name.as_bytes());
        name_at += name.len();
    }
    put(2 * BLOCK, content);
    fs::write(image, bytes).expect("write the image");
}

/// Waits until no loop device has any of `images` behind it: other containers being made have copies of
/// all mounts for a moment.
#[track_caller]
pub fn loop_devices_are_freed(images: &[&str]) {
    process::eventually("the loop devices are freed", Duration::from_secs(5), || {
        images.iter().all(|image| loop_devices(image) == 0).then_some(())
    });
}

/// The files below a directory that loop devices have behind them.
pub fn loop_devices_below(directory: &str) -> impl Iterator<Item = String> {
    let start = format!("{directory}/");
    backing_files()
        .map(|file| file.trim_end().to_owned())
        .filter(move |file| file.starts_with(&start))
}

/// How many loop devices have `image` behind them. Of a file on a file system other than the root's, the
/// kernel may tell no more than the path there.
pub fn loop_devices(image: &str) -> usize {
    backing_files().filter(|file| image.ends_with(file.trim_end())).count()
}

fn backing_files() -> impl Iterator<Item = String> {
    let devices = fs::read_dir("/sys/block").expect("list block devices").flatten();
    let file = |d: fs::DirEntry| fs::read_to_string(d.path().join("loop/backing_file")).ok();
    devices.filter_map(file)
}
