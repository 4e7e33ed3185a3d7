//! Compiled programs, kept for the next container with the same profile: compiling a client's
//! default profile takes as long as the rest of a container's creation.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::enosys::INSTRUCTION;
use super::{Error, MAX_INSTRUCTIONS};

/// Programs on disk before all are thrown away; each is at most 32 KiB.
const MAX_KEPT: usize = 64;

/// A directory of programs that only root can write to, or nothing. It is a cache: whatever goes
/// wrong with it costs time only.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Programs {
    directory: Option<PathBuf>,
}

impl Programs {
    /// Keeps programs in `directory`, which is created if need be.
    #[must_use]
    pub fn at(directory: PathBuf) -> Self {
        Self { directory: Some(directory) }
    }

    /// The program of a profile.
    pub(super) fn get(
        &self,
        profile: &serde_json::Value,
        compile: impl FnOnce() -> Result<Vec<u8>, Error>,
    ) -> Result<Vec<u8>, Error> {
        let file = self.directory.as_ref().and_then(|directory| {
            let name = key(profile)?;
            Some(directory.join(name))
        });
        let Some(file) = file else { return compile() };
        match fs::read(&file) {
            Ok(program) if is_whole(&program) => Ok(program),
            _ => {
                let program = compile()?;
                if let Err(error) = keep(&file, &program) {
                    log::debug!("keep a seccomp program in {}: {error}", file.display());
                }
                Ok(program)
            }
        }
    }
}

/// Everything that the program depends on: the profile, both compilers, and so this executable.
fn key(profile: &serde_json::Value) -> Option<String> {
    let library = libseccomp::ScmpVersion::current().ok()?;
    let executable = fs::metadata("/proc/self/exe").ok()?;
    let mut hash = Sha256::new();
    hash.update(format!(
        "{library} {} {} {} {}.{}\n",
        executable.dev(),
        executable.ino(),
        executable.size(),
        executable.mtime(),
        executable.mtime_nsec()
    ));
    hash.update(profile.to_string());
    Some(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn is_whole(program: &[u8]) -> bool {
    let instructions = program.len() / INSTRUCTION;
    program.len().is_multiple_of(INSTRUCTION) && (1..=MAX_INSTRUCTIONS).contains(&instructions)
}

/// Others see all of the program or none of it.
fn keep(file: &Path, program: &[u8]) -> std::io::Result<()> {
    let Some(directory) = file.parent() else { return Ok(()) };
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let kept: Vec<_> = fs::read_dir(directory)?.flatten().collect();
    if kept.len() >= MAX_KEPT {
        for other in kept {
            let _ = fs::remove_file(other.path());
        }
    }
    let temporary = file.with_extension(std::process::id().to_string());
    fs::write(&temporary, program)?;
    fs::rename(&temporary, file)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn a_profile_is_compiled_once_and_a_damaged_program_again() {
        let directory = tempfile::tempdir().unwrap();
        let programs = Programs::at(directory.path().join("new"));
        let compiled = Cell::new(0);
        let get = |programs: &Programs, profile: &str| {
            let profile = serde_json::from_str(profile).unwrap();
            let program = programs.get(&profile, || {
                compiled.set(compiled.get() + 1);
                Ok(vec![7; INSTRUCTION])
            });
            assert_eq!(program.unwrap(), [7; INSTRUCTION]);
            compiled.get()
        };
        assert_eq!(get(&programs, r#"{"a":1,"b":2}"#), 1);
        assert_eq!(get(&programs, r#"{"b":2,"a":1}"#), 1);
        assert_eq!(get(&programs, r#"{"a":1}"#), 2);
        for file in fs::read_dir(directory.path().join("new")).unwrap() {
            fs::write(file.unwrap().path(), [7; INSTRUCTION - 1]).unwrap();
        }
        assert_eq!(get(&programs, r#"{"a":1}"#), 3);
        assert_eq!(get(&programs, r#"{"a":1}"#), 3);
        assert_eq!(get(&Programs::default(), r#"{"a":1}"#), 4);
        // A place that cannot be written to.
        assert_eq!(get(&Programs::at("/proc/no".into()), r#"{"a":1}"#), 5);
    }

    #[test]
    fn their_number_is_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let programs = Programs::at(directory.path().to_owned());
        for number in 0..3 * MAX_KEPT {
            programs.get(&number.into(), || Ok(vec![0; INSTRUCTION])).unwrap();
        }
        assert!(fs::read_dir(directory.path()).unwrap().count() <= MAX_KEPT);
    }
}
