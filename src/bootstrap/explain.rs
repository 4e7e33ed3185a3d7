//! The action `explain`: what becomes of each field that a bundle sets.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use super::Error;
use crate::lxc::config::{self, Layout};
use crate::lxc::detached;
use crate::oci::plan::{Plan, PlannedMount};
use crate::oci::{self, Explanation, Verdict};

/// The answer.
pub(super) struct Explained {
    /// A line per field, then the warnings.
    pub text: String,
    /// Why Create would refuse the bundle.
    pub refusal: Option<String>,
}

/// Reads the bundle and asks this host; nothing is changed, and Proxmox is not asked.
pub(super) fn run(bundle: &Path) -> Result<Explained, Error> {
    let bundle = std::path::absolute(bundle).map_err(|source| Error::Bundle {
        verb: "find",
        path: bundle.to_owned(),
        source,
    })?;
    Ok(render(&oci::explain(&bundle)?))
}

fn render(explanation: &Explanation) -> Explained {
    let lines = lines(explanation);
    let width = lines.iter().map(|(path, _)| path.len()).max().unwrap_or(0);
    let mut text = String::new();
    let mut line = |arguments: std::fmt::Arguments<'_>| {
        writeln!(text, "{arguments}")
            .unwrap_or_else(|_| unreachable!("writing to a string cannot fail"));
    };
    for (path, verdict) in lines {
        line(format_args!("{path:width$}  {verdict}"));
    }
    let refusal = match &explanation.plan {
        Err(error) => Some(error.to_string()),
        Ok(plan) => {
            for warning in &plan.warnings {
                line(format_args!("warning: {}", warning.escape_debug()));
            }
            // Only what the bundle brings into LXC's configuration matters: the other paths are
            // good ones.
            let layout = Layout {
                vmid: 100,
                rootfs: plan.root_path.clone(),
                run_dir: PathBuf::from("/run"),
                init: PathBuf::from("/init"),
                keeps_exit_status: true,
                cgroups: (&explanation.host.cgroups).into(),
                apparmor: explanation.host.apparmor,
            };
            let rendered = config::render(plan, &layout).err().map(|error| error.to_string());
            rendered.or_else(|| missing_source(plan))
        }
    };
    Explained { text, refusal }
}

/// The first bind mount of something that is not there.
fn missing_source(plan: &Plan) -> Option<String> {
    plan.mounts.iter().find_map(|mount| match mount {
        PlannedMount::Bind { source, destination, .. } => {
            detached::check_source(source, destination).err().map(|error| error.to_string())
        }
        _ => None,
    })
}

/// Elements of a list share a line unless something is wrong with one of them.
fn lines(explanation: &Explanation) -> Vec<(String, String)> {
    let mut lines: Vec<(String, String)> = Vec::new();
    for set in &explanation.fields {
        // A key of the document may hold anything, such as a terminal's control sequences.
        let concrete = set.path.escape_debug().to_string();
        let line = match set.field {
            None => (concrete, "unknown: not a field of the specification, no effect".to_owned()),
            Some(field) => match field.verdict {
                Verdict::Refused(_) | Verdict::Warned(_) => (concrete, field.verdict.to_string()),
                verdict => (field.path.to_owned(), verdict.to_string()),
            },
        };
        if !lines.contains(&line) {
            lines.push(line);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn explain(config: &str) -> Explained {
        let bundle = tempfile::tempdir().unwrap();
        std::fs::write(bundle.path().join("config.json"), config).unwrap();
        run(bundle.path()).unwrap()
    }

    fn minimal(linux: &str, more: &str) -> String {
        format!(
            r#"{{"ociVersion":"1.2.0","root":{{"path":"rootfs"}},
            "process":{{"args":["a"],"cwd":"/"}},
            "linux":{{"namespaces":[{{"type":"mount"}}]{linux}}}{more}}}"#
        )
    }

    #[test]
    fn each_field_is_told_once_with_its_verdict() {
        let mounts = r#","mounts":[{"destination":"/a","type":"tmpfs"},
            {"destination":"/b","type":"tmpfs"}],"vm":{"x":1},"new\u001bField":1"#;
        let Explained { text, refusal } = explain(&minimal("", mounts));
        assert_eq!(refusal, None);
        let find = |path: &str| -> Vec<&str> {
            text.lines().filter(|line| line.split_whitespace().next() == Some(path)).collect()
        };
        assert_eq!(find("mounts[].destination").len(), 1, "{text}");
        assert!(find("process.args")[0].ends_with("  applied by init, in the container"), "{text}");
        assert!(find("vm")[0].contains("ignored: a CT is not"), "{text}");
        assert!(find("new\\u{1b}Field")[0].contains("unknown"), "{text}");
        assert!(text.contains("warning: ") && !text.contains('\u{1b}'), "{text}");
    }

    #[test]
    fn all_that_is_refused_is_told_and_the_first_is_the_reason() {
        let linux = r#","mountLabel":"x","resources":{"rdma":{"a":{"hcaHandles":1}}}"#;
        let Explained { text, refusal } = explain(&minimal(linux, ""));
        assert_eq!(text.matches("  refused: ").count(), 2, "{text}");
        let refusal = refusal.unwrap();
        assert!(refusal.starts_with("linux.mountLabel is not supported: "), "{refusal}");
    }

    #[test]
    fn values_are_looked_at_too_and_what_lxc_cannot_express() {
        let value = explain(&minimal(r#","cgroupsPath":"/a b""#, "")).refusal.unwrap();
        assert!(value.starts_with("linux.cgroupsPath contains white space"), "{value}");
        let rules = r#","resources":{"devices":[
            {"allow":true,"type":"c","major":10,"access":"rwm"},
            {"allow":false,"type":"c","major":10,"minor":229,"access":"rwm"}]}"#;
        let rule = explain(&minimal(rules, "")).refusal.unwrap();
        assert!(rule.contains("c 10:229"), "{rule}");
    }

    #[test]
    fn a_bundle_that_is_none_is_an_error() {
        let empty = tempfile::tempdir().unwrap();
        let error = run(empty.path()).err().unwrap().to_string();
        assert!(error.contains("config.json"), "{error}");
    }

    #[test]
    fn a_bind_mount_of_nothing_is_refused() {
        let mount = |source: &str| {
            let mount = r#""destination":"/m","type":"bind","options":["rbind"]"#;
            minimal("", &format!(r#","mounts":[{{{mount},"source":"{source}"}}]"#))
        };
        assert_eq!(explain(&mount("/proc")).refusal, None);
        let refusal = explain(&mount("/no/such/file")).refusal.unwrap();
        assert!(refusal.contains("/no/such/file") && refusal.contains("\"/m\""), "{refusal}");
    }
}
