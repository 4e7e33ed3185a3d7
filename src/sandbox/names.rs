//! The files by which the containers of a pod know names: `/etc/hostname`, `/etc/hosts` and
//! `/etc/resolv.conf`.
//!
//! For a pod whose pause container is a task, containerd's CRI plugin writes and mounts them. If it asks
//! for the pod through the Sandbox service it leaves them to the shim: without them the containers would
//! have what happens to be in their images, and no name server.

use std::fs::{OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, fchown};
use std::path::Path;

/// What a pod's files tell. `None`: what the node's own do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names {
    pub hostname: Option<String>,
    /// The whole `resolv.conf`.
    pub resolver: Option<String>,
}

/// One file: its name in `/etc`, and what is in it.
pub type File = (&'static str, Vec<u8>);

impl Names {
    /// The files; one that is to be like the node's is left out if the node has none. Blocks.
    ///
    /// # Errors
    /// A file of the node can't be read.
    pub fn files(&self) -> io::Result<Vec<File>> {
        let hostname = match &self.hostname {
            Some(name) => format!("{name}\n").into_bytes(),
            None => std::fs::read("/proc/sys/kernel/hostname")?,
        };
        let resolver = match &self.resolver {
            Some(text) => Some(text.clone().into_bytes()),
            None => of_node("/etc/resolv.conf")?,
        };
        let files = [
            ("hostname", Some(hostname)),
            ("hosts", of_node("/etc/hosts")?),
            ("resolv.conf", resolver),
        ];
        Ok(files.into_iter().filter_map(|(name, content)| Some((name, content?))).collect())
    }
}

/// Writes the files to an empty directory; they belong to the pod's root. Blocks.
///
/// # Errors
/// Of the file system.
pub fn write(directory: &Path, files: &[File], (uid, gid): (u32, u32)) -> io::Result<()> {
    for (name, content) in files {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(directory.join(name))?;
        file.write_all(content)?;
        fchown(&file, Some(uid), Some(gid))?;
        file.set_permissions(Permissions::from_mode(0o644))?;
    }
    Ok(())
}

fn of_node(path: &str) -> io::Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
