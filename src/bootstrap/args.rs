//! The command line, as containerd writes it.

use std::ffi::OsString;
use std::path::PathBuf;

/// `--help`.
pub(super) const HELP: &str = "\
containerd-shim-proxmox-v2: runs containers of containerd as Proxmox VE LXC containers

containerd starts this program by itself; name the runtime and it will be found in the PATH:

    ctr run --runtime io.containerd.proxmox.v2 IMAGE NAME
    nerdctl run --runtime io.containerd.proxmox.v2 IMAGE

Usage (by containerd):
    containerd-shim-proxmox-v2 -namespace NS -id ID -address SOCKET [FLAGS] start
    containerd-shim-proxmox-v2 -namespace NS -id ID -address SOCKET -bundle DIR [FLAGS] delete
    containerd-shim-proxmox-v2 -info | -v | -h

Usage (by people):
    containerd-shim-proxmox-v2 explain BUNDLE

Actions:
    start                 start a shim for the bundle in the working directory; prints its address
    delete                remove what a dead shim left behind; prints the exit status
    explain BUNDLE        tell for each field that BUNDLE/config.json sets what becomes of it here;
                          fails, with the reason, if the container would be refused
Flags:
    -namespace NS         containerd's namespace
    -id ID                the container
    -address SOCKET       containerd's gRPC socket
    -publish-binary PATH  accepted and not used: events are sent over containerd's ttrpc socket
    -bundle DIR           the bundle, if it is not the working directory
    -socket PATH          accepted and not used
    -debug                log more
    -info                 print the runtime's features for containerd (protobuf)
    -v, -version          print the version
    -h, -help             print this

Configuration: /etc/containerd-shim-proxmox/config.toml, or the file that the runtime's option
config_path names. Manual: man 8 containerd-shim-proxmox-v2.
";

/// The longest identifier of containerd (`pkg/identifiers`).
const MAX_IDENTIFIER: usize = 76;

/// What is wrong with a command line.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// Unknown or incomplete flag.
    #[error("{0}; see {name} -help", name = super::NAME)]
    Flag(String),
    /// Neither of the actions.
    #[error("unknown action {0:?}; containerd calls \"start\" and \"delete\", see {name} -help", name = super::NAME)]
    Action(String),
    /// More than the action.
    #[error("unexpected argument {0:?} after the action")]
    Extra(String),
    /// `explain` needs a directory.
    #[error("explain needs the directory of a bundle, which holds its config.json")]
    NoBundle,
    /// A flag that is needed.
    #[error("the flag -{0} is missing; containerd starts this program, see {name} -help", name = super::NAME)]
    Missing(&'static str),
    /// A value that could be taken for something else in a path or a configuration file.
    #[error(
        "-{flag} {value:?} is not an identifier of containerd: letters and digits, separated by single . _ or -, at most 76 bytes"
    )]
    Identifier {
        /// `id` or `namespace`.
        flag: &'static str,
        /// As given.
        value: String,
    },
}

/// A container's id or a namespace: a name that is safe in paths, messages and configuration files.
///
/// Syntax: containerd's `pkg/identifiers`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Identifier(String);

impl Identifier {
    /// `None` if `text` is not an identifier.
    pub fn new(text: impl Into<String>) -> Option<Identifier> {
        let text = text.into();
        let well_formed = !text.is_empty()
            && text.len() <= MAX_IDENTIFIER
            && text
                .split(['.', '_', '-'])
                .all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric()));
        well_formed.then_some(Identifier(text))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for Identifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// What an action is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// containerd's namespace.
    pub namespace: Identifier,
    /// The container the action was called for.
    pub id: Identifier,
    /// containerd's gRPC socket, as given; it only distinguishes several containerds.
    pub address: String,
    /// If given and not the working directory.
    pub bundle: Option<PathBuf>,
    /// Log more.
    pub debug: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Invocation {
    Help,
    Version,
    Info,
    Start(Target),
    Delete(Target),
    /// For people: what becomes of a bundle.
    Explain(PathBuf),
    /// No action: the server, which `start` runs.
    Serve(Target),
}

pub(super) fn parse(args: impl Iterator<Item = OsString>) -> Result<Invocation, Error> {
    let args: Vec<OsString> = args.collect();
    let is_help = |arg: &OsString| ["-h", "--h", "-help", "--help"].iter().any(|help| arg == help);
    if args.iter().any(is_help) {
        return Ok(Invocation::Help);
    }
    if args.first().is_some_and(|action| action == "explain") {
        return match &args[1..] {
            [bundle] => Ok(Invocation::Explain(bundle.into())),
            [] => Err(Error::NoBundle),
            [_, extra, ..] => Err(Error::Extra(extra.to_string_lossy().into_owned())),
        };
    }
    // The library's parser forgets what follows the action.
    if let Some(at) = args.iter().position(|arg| arg == "start" || arg == "delete")
        && let Some(extra) = args.get(at + 1).filter(|_| is_action(&args, at))
    {
        return Err(Error::Extra(extra.to_string_lossy().into_owned()));
    }
    let flags = containerd_shim::parse(&args).map_err(|e| Error::Flag(flag_problem(&e)))?;
    if flags.version {
        return Ok(Invocation::Version);
    }
    if flags.info {
        return Ok(Invocation::Info);
    }
    let action: fn(Target) -> Invocation = match flags.action.as_str() {
        "start" => Invocation::Start,
        "delete" => Invocation::Delete,
        "" => Invocation::Serve,
        other => return Err(Error::Action(other.to_string())),
    };
    Ok(action(Target {
        namespace: identifier("namespace", flags.namespace)?,
        id: identifier("id", flags.id)?,
        address: flags.address,
        bundle: (!flags.bundle.is_empty()).then(|| PathBuf::from(flags.bundle)),
        debug: flags.debug,
    }))
}

/// Whether the word at `at` is the action and not a flag's value, such as an id "start".
fn is_action(args: &[OsString], at: usize) -> bool {
    let before = containerd_shim::parse(&args[..at]);
    before.is_ok_and(|flags| flags.action.is_empty())
}

fn identifier(flag: &'static str, value: String) -> Result<Identifier, Error> {
    if value.is_empty() {
        return Err(Error::Missing(flag));
    }
    Identifier::new(value.clone()).ok_or(Error::Identifier { flag, value })
}

/// The library's words without its prefix.
fn flag_problem(error: &containerd_shim::Error) -> String {
    match error {
        containerd_shim::Error::InvalidArgument(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Invocation, Error> {
        parse(line.split(' ').filter(|word| !word.is_empty()).map(OsString::from))
    }

    fn target() -> Target {
        Target {
            namespace: Identifier::new("default").unwrap(),
            id: Identifier::new("c1").unwrap(),
            address: "/run/containerd/containerd.sock".into(),
            bundle: None,
            debug: false,
        }
    }

    #[test]
    fn containerds_command_lines_are_understood() {
        let common = "-namespace default -id c1 -address /run/containerd/containerd.sock";
        assert_eq!(parsed(&format!("{common} start")), Ok(Invocation::Start(target())));
        assert_eq!(parsed(common), Ok(Invocation::Serve(target())));
        let old = format!("{common} -publish-binary /usr/bin/containerd -debug start");
        assert_eq!(parsed(&old), Ok(Invocation::Start(Target { debug: true, ..target() })));
        let delete = format!("{common} -bundle /run/b delete");
        let bundle = Some(PathBuf::from("/run/b"));
        assert_eq!(parsed(&delete), Ok(Invocation::Delete(Target { bundle, ..target() })));
        let go = "--namespace=default --id=c1 -address=/run/containerd/containerd.sock start";
        assert_eq!(parsed(go), Ok(Invocation::Start(target())));
        let named = "-namespace default -id start -address /run/containerd/containerd.sock start";
        let id = Identifier::new("start").unwrap();
        assert_eq!(parsed(named), Ok(Invocation::Start(Target { id, ..target() })));
        assert_eq!(parsed("-info"), Ok(Invocation::Info));
        assert_eq!(parsed("-v"), Ok(Invocation::Version));
        assert_eq!(parsed("-version"), Ok(Invocation::Version));
        assert_eq!(parsed("explain /run/b"), Ok(Invocation::Explain("/run/b".into())));
        for help in ["-h", "--help", "-help", "-namespace default --help start"] {
            assert_eq!(parsed(help), Ok(Invocation::Help), "{help}");
        }
    }

    #[test]
    fn other_command_lines_are_refused_with_the_reason() {
        for (line, error) in [
            ("", Error::Missing("namespace")),
            ("start", Error::Missing("namespace")),
            ("-namespace default start", Error::Missing("id")),
            ("explain", Error::NoBundle),
            ("explain /run/b -v", Error::Extra("-v".into())),
            ("-namespace default -id c1 stop", Error::Action("stop".into())),
            ("-namespace default -id c1 start now", Error::Extra("now".into())),
            (
                "-namespace default -id ../c1 start",
                Error::Identifier { flag: "id", value: "../c1".into() },
            ),
            (
                "-namespace a/b -id c1 start",
                Error::Identifier { flag: "namespace", value: "a/b".into() },
            ),
        ] {
            assert_eq!(parsed(line), Err(error), "{line}");
        }
        let unknown = parsed("-frobnicate start").unwrap_err().to_string();
        assert!(unknown.contains("frobnicate") && unknown.contains("-help"), "{unknown}");
    }

    #[test]
    fn identifiers_are_those_of_containerd() {
        let longest = "a".repeat(76);
        for good in ["a", "1", "k8s.io", "a-b_c.d", "A1-b2", longest.as_str()] {
            assert!(Identifier::new(good).is_some(), "{good}");
        }
        let too_long = "a".repeat(77);
        for bad in
            ["", ".", "..", "a..b", "a--b", "-a", "a-", "a/b", "a b", "a\n", "ä", "a\0", &too_long]
        {
            assert!(Identifier::new(bad).is_none(), "{bad:?}");
        }
    }
}
