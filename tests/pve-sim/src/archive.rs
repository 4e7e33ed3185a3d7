//! Templates: unpacking an archive into the volume of a CT.

use std::fs;
use std::path::Path;
use std::process::Stdio;

use tokio::process::Command;

use crate::oci;
use crate::task::Task;
use crate::userns::{self, UserNs};

/// Where a template goes.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// The directory.
    pub dir: &'a Path,
    /// The directory as the error names it: the mount point of the CT.
    pub shown: &'a Path,
    /// Whether its files belong to the ids of unprivileged CTs.
    pub unprivileged: bool,
}

/// The options of tar that a node uses.
const OPTIONS: [&str; 10] = [
    "--totals",
    "--one-file-system",
    "-p",
    "--sparse",
    "--numeric-owner",
    "--acls",
    "--xattrs",
    "--xattrs-include=user.*",
    "--xattrs-include=security.capability",
    "--warning=no-file-ignored",
];

/// What an archive is compressed with, as an option of tar.
fn compression(name: &str) -> Option<&'static str> {
    const OPTIONS: [(&str, &str); 4] =
        [(".gz", "-z"), (".xz", "-J"), (".zst", "--zstd"), (".bz2", "-j")];
    OPTIONS.iter().find(|(ending, _)| name.ends_with(ending)).map(|(_, option)| *option)
}

/// Unpacks a template. For an OCI archive, gives the configuration of its image.
pub async fn unpack(
    archive: &Path,
    target: Target<'_>,
    task: &Task,
) -> Result<Option<oci::Image>, String> {
    if archive.extension().is_some_and(|e| e == "tar") && oci::is_oci(archive).await? {
        task.log("Detected OCI archive");
        return oci::unpack(archive, target, task).await.map(Some);
    }
    task.log(&format!("extracting archive '{}'", archive.display()));
    untar(archive, compression(&archive.display().to_string()), target, task).await?;
    Ok(None)
}

/// Runs tar in the target as root, or as the root of unprivileged CTs.
pub(crate) async fn untar(
    archive: &Path,
    compression: Option<&str>,
    target: Target<'_>,
    task: &Task,
) -> Result<(), String> {
    let failed = |e: std::io::Error| format!("unable to unpack '{}' - {e}", archive.display());
    let file = fs::File::open(archive).map_err(failed)?;
    let namespace = match target.unprivileged {
        true => Some(UserNs::new().await.map_err(failed)?),
        false => None,
    };
    let mut command = match &namespace {
        Some(namespace) => namespace.command("tar"),
        None => Command::new("tar"),
    };
    command.args(["xpf", "-"]).args(compression).args(OPTIONS);
    command.args(["--warning=no-xattr-write", "--skip-old-files", "--anchored"]);
    command.args(["--exclude", "./dev/*"]);
    // Not -C: in the namespace the directories above may be out of reach.
    command.current_dir(target.dir).stdin(file).stdout(Stdio::null()).stderr(Stdio::piped());
    let shown = shown_command(compression, target);
    task.running(Some(shown.clone()));
    let output = command.env("LC_ALL", "C").kill_on_drop(true).output().await.map_err(failed)?;
    task.running(None);
    let text = String::from_utf8_lossy(&output.stderr);
    text.lines().for_each(|line| task.log(line));
    match output.status.code() {
        Some(0) => Ok(()),
        Some(code) => Err(format!("command '{shown}' failed: exit code {code}")),
        None => Err(format!("command '{shown}' failed: got signal")),
    }
}

/// The command as a node would run and name it.
fn shown_command(compression: Option<&str>, target: Target<'_>) -> String {
    let root = userns::ROOT;
    let mut text = String::new();
    if target.unprivileged {
        text = format!("lxc-usernsexec -m u:0:{root}:65536 -m g:0:{root}:65536 -- ");
    }
    text.push_str("tar xpf - ");
    if let Some(option) = compression {
        text.push_str(&format!("{option} "));
    }
    for option in OPTIONS {
        let quote = if option.contains('=') { "'" } else { "" };
        text.push_str(&format!("{quote}{option}{quote} "));
    }
    text.push_str(&format!(
        "'--warning=no-xattr-write' -C {} --skip-old-files --anchored --exclude './dev/*'",
        target.shown.display()
    ));
    text
}
