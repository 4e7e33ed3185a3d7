//! OCI hooks that run on the host.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use proxmox_shim_init::protocol::Hook;
use tokio::io::AsyncWriteExt;

/// What a failing hook may say in the error.
const OUTPUT_LIMIT: usize = 1024;

/// A hook that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be run.
    #[error("run {kind} hook {path}")]
    Run { kind: &'static str, path: String, source: std::io::Error },
    /// It ended with another status than 0.
    #[error("{kind} hook {path} failed: {status}: {output}")]
    Failed { kind: &'static str, path: String, status: std::process::ExitStatus, output: String },
    /// It took longer than its timeout and was killed.
    #[error("{kind} hook {path} did not end within {seconds} s")]
    Timeout { kind: &'static str, path: String, seconds: u64 },
}

/// The OCI state that a hook reads on stdin (runtime specification, "State").
#[derive(Debug, Clone, Copy, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct State<'a> {
    pub oci_version: &'a str,
    pub id: &'a str,
    pub status: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
    pub bundle: &'a Path,
    pub annotations: &'a BTreeMap<String, String>,
}

/// Runs the hooks in order; the first that fails ends it.
///
/// # Errors
/// [`Error`].
pub async fn run(kind: &'static str, hooks: &[Hook], state: &State<'_>) -> Result<(), Error> {
    for hook in hooks {
        run_one(kind, hook, state).await?;
    }
    Ok(())
}

async fn run_one(kind: &'static str, hook: &Hook, state: &State<'_>) -> Result<(), Error> {
    let failed = |source| Error::Run { kind, path: hook.path.clone(), source };
    let input = serde_json::to_vec(state).map_err(|error| failed(error.into()))?;
    let mut command = tokio::process::Command::new(&hook.path);
    if let Some((name, arguments)) = hook.args.split_first() {
        command.arg0(name).args(arguments);
    }
    command
        .env_clear()
        .envs(hook.env.iter().filter_map(|entry| entry.split_once('=')))
        .current_dir(state.bundle)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let work = async {
        let mut child = command.spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            match stdin.write_all(&input).await {
                // It may end without reading its state.
                Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
                result => result?,
            }
        }
        child.wait_with_output().await
    };
    let output = match hook.timeout {
        Some(seconds) => match tokio::time::timeout(Duration::from_secs(seconds), work).await {
            Ok(output) => output,
            Err(_) => return Err(Error::Timeout { kind, path: hook.path.clone(), seconds }),
        },
        // The specification sets no limit; the client may give up by deleting the task.
        None => work.await,
    }
    .map_err(failed)?;
    if output.status.success() {
        return Ok(());
    }
    let said = if output.stderr.is_empty() { output.stdout } else { output.stderr };
    let said = &said[said.len().saturating_sub(OUTPUT_LIMIT)..];
    Err(Error::Failed {
        kind,
        path: hook.path.clone(),
        status: output.status,
        output: String::from_utf8_lossy(said).trim().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(script: &str, timeout: Option<u64>) -> Hook {
        Hook {
            path: "/bin/sh".into(),
            args: vec!["hook".into(), "-c".into(), script.into()],
            env: vec!["A=b=c".into()],
            timeout,
        }
    }

    async fn run_script(script: &str, timeout: Option<u64>) -> Result<(), Error> {
        let annotations = BTreeMap::from([("nerdctl/state-dir".to_owned(), "/s".to_owned())]);
        let state = State {
            oci_version: "1.0.2",
            id: "web",
            status: "creating",
            pid: Some(42),
            bundle: Path::new("/tmp"),
            annotations: &annotations,
        };
        run("createRuntime", &[hook(script, timeout)], &state).await
    }

    #[tokio::test]
    async fn a_hook_gets_the_state_and_exactly_its_environment() {
        run_script(
            r#"s=$(cat); case "$s" in *'"pid":42'*'"nerdctl/state-dir":"/s"'*) ;; *) exit 1;; esac
               test "$A" = b=c && test -z "$HOME" && test "$0" = hook"#,
            None,
        )
        .await
        .unwrap();
    }

    #[tokio::test]
    async fn a_failing_hook_is_named_with_its_words() {
        let error = run_script("echo no network >&2; exit 3", None).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "createRuntime hook /bin/sh failed: exit status: 3: no network"
        );
    }

    #[tokio::test]
    async fn a_hanging_hook_is_ended() {
        let error = run_script("exec sleep 60", Some(1)).await.unwrap_err();
        assert!(matches!(error, Error::Timeout { seconds: 1, .. }), "{error}");
    }
}
