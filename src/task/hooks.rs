//! OCI hooks that run on the host.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use proxmox_shim_init::protocol::Hook;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;

use crate::sys::limits;

/// What a failing hook may say in the error.
const OUTPUT_LIMIT: usize = 1024;
/// What the kernel keeps of a pipe at most by default (pipe(7)).
const PIPE_CAPACITY: usize = 64 * 1024;

/// A hook that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be run.
    #[error("run {kind} hook {path}")]
    Run { kind: &'static str, path: String, source: io::Error },
    /// It ended with another status than 0.
    #[error("{kind} hook {path} failed: {status}: {output}")]
    Failed { kind: &'static str, path: String, status: ExitStatus, output: String },
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
    let mut said = Tail::default();
    // Hooks of poststop may run after containerd has removed the bundle.
    let directory = if state.bundle.is_dir() { state.bundle } else { Path::new("/") };
    let work = execute(hook, directory, &input, &mut said);
    let status = match hook.timeout {
        Some(seconds) => match tokio::time::timeout(Duration::from_secs(seconds), work).await {
            Ok(status) => status,
            Err(_) => return Err(Error::Timeout { kind, path: hook.path.clone(), seconds }),
        },
        // The specification sets no limit; the client may give up by deleting the task.
        None => work.await,
    }
    .map_err(failed)?;
    match status.success() {
        true => Ok(()),
        false => {
            Err(Error::Failed { kind, path: hook.path.clone(), status, output: said.into_text() })
        }
    }
}

/// Runs the program; it is killed when this is dropped. Its end is waited for, not that of what it
/// leaves behind, which may keep its output open.
async fn execute(
    hook: &Hook,
    directory: &Path,
    input: &[u8],
    said: &mut Tail,
) -> io::Result<ExitStatus> {
    let (writer, mut output) = pipe::pipe()?;
    let writer = writer.into_blocking_fd()?;
    let mut command = tokio::process::Command::new(&hook.path);
    if let Some((name, arguments)) = hook.args.split_first() {
        command.arg0(name).args(arguments);
    }
    command
        .env_clear()
        .envs(hook.env.iter().filter_map(|entry| entry.split_once('=')))
        .current_dir(directory)
        .stdin(Stdio::piped())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .kill_on_drop(true);
    limits::restore_descriptors_in(&mut command);
    let mut child = command.spawn()?;
    // It holds ends of the output.
    drop(command);
    let stdin = child.stdin.take();
    let feed = async move {
        // A hook may end without reading its state.
        if let Some(mut stdin) = stdin {
            let _ = stdin.write_all(input).await;
        }
    };
    tokio::pin!(feed);
    let (mut fed, mut open) = (false, true);
    let mut buffer = [0; 1024];
    let status = loop {
        tokio::select! {
            status = child.wait() => break status?,
            () = &mut feed, if !fed => fed = true,
            read = output.read(&mut buffer), if open => match read? {
                0 => open = false,
                n => said.push(&buffer[..n]),
            },
        }
    };
    // What is in the pipe already; more than it holds comes from somebody who goes on writing.
    for _ in 0..PIPE_CAPACITY / buffer.len() {
        match output.try_read(&mut buffer) {
            Ok(n @ 1..) => said.push(&buffer[..n]),
            _ => break,
        }
    }
    Ok(status)
}

/// The end of a text of any length.
#[derive(Default)]
struct Tail(Vec<u8>);

impl Tail {
    fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
        let excess = self.0.len().saturating_sub(OUTPUT_LIMIT);
        self.0.drain(..excess);
    }

    fn into_text(self) -> String {
        String::from_utf8_lossy(&self.0).trim().to_owned()
    }
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

    #[tokio::test]
    async fn much_output_is_read_and_its_end_kept() {
        let script = "yes 0123456789 | head -c 3000000; echo the end; exit 4";
        let error = run_script(script, Some(30)).await.unwrap_err();
        let Error::Failed { output, .. } = error else { panic!("{error}") };
        assert!(output.len() <= OUTPUT_LIMIT && output.ends_with("the end"), "{output}");
    }

    #[tokio::test]
    async fn a_process_that_stays_does_not_keep_the_hook() {
        let begin = std::time::Instant::now();
        run_script("sleep 20 & exit 0", None).await.unwrap();
        let error = run_script("echo said; (sleep 20; echo late) & exit 1", None).await;
        assert!(error.unwrap_err().to_string().ends_with("said"));
        assert!(begin.elapsed() < Duration::from_secs(10));
    }

    #[tokio::test]
    async fn a_hook_need_not_read_a_long_state() {
        let annotations = BTreeMap::from([("a".to_owned(), "x".repeat(1 << 20))]);
        let state = State {
            oci_version: "1.0.2",
            id: "web",
            status: "creating",
            pid: None,
            bundle: Path::new("/tmp"),
            annotations: &annotations,
        };
        run("prestart", &[hook("exec 0<&-; sleep 0.1", Some(20))], &state).await.unwrap();
    }
}
