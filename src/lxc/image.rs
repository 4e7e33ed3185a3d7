//! What LXC needs of an image before init can take over.

use std::io;
use std::path::{Path, PathBuf};

/// LXC mounts on these by itself, or opens them, and follows no symbolic link of an image there.
const DIRECTORIES: [&str; 2] = ["proc", "dev"];

/// Why LXC cannot start a CT with this root file system.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A link or a file. The first words are those of runc, which has the same rule for `/proc`.
    #[error(
        "\"/{name}\" must be mounted on ordinary directory: it is {what} in the image, and LXC \
         follows none there; give the image a directory"
    )]
    NotADirectory { name: &'static str, what: &'static str },
    /// The root file system could not be read.
    #[error("look at {}", path.display())]
    Look { path: PathBuf, source: io::Error },
}

/// Checks the mounted root file system. LXC creates what is missing.
///
/// # Errors
/// [`Error`].
pub fn check(root: &Path) -> Result<(), Error> {
    for name in DIRECTORIES {
        let path = root.join(name);
        let what = match path.symlink_metadata() {
            Ok(meta) if meta.is_dir() => continue,
            Ok(meta) if meta.is_symlink() => "a symbolic link",
            Ok(_) => "a file",
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => return Err(Error::Look { path, source }),
        };
        return Err(Error::NotADirectory { name, what });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn only_directories_and_what_is_missing_will_do() {
        for name in DIRECTORIES {
            let root = tempfile::tempdir().unwrap();
            let path = root.path().join(name);
            check(root.path()).unwrap();
            fs::create_dir(&path).unwrap();
            check(root.path()).unwrap();
            fs::remove_dir(&path).unwrap();
            // Also one that leads to a directory.
            symlink("/", &path).unwrap();
            let error = check(root.path()).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("a symbolic link"), "{error}");
            fs::remove_file(&path).unwrap();
            fs::write(&path, "").unwrap();
            assert!(check(root.path()).unwrap_err().to_string().contains("a file"));
        }
    }
}
