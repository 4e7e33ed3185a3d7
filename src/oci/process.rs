//! `process`, for a container's first process and for an exec.

use std::path::Path;

use nix::libc;
use oci_spec::runtime::{Box as ConsoleSize, PosixRlimit, PosixRlimitType as Type, User};
use proxmox_shim_init::protocol::{ExecCpuAffinity, Process, Rlimit, Seccomp, WindowSize};

use super::document::Document;
use super::{Error, Host, capabilities, fields, scheduling};

/// What a process gets that says nothing about it.
const DEFAULT_UMASK: u32 = 0o022;
/// runc's bound: ids above it are reserved (`-1` means "no change" to the kernel).
const MAX_ID: u32 = i32::MAX as u32;

/// The translation of an exec request.
#[derive(Debug, Clone, PartialEq)]
pub struct Exec {
    pub process: Process,
    /// As [`super::plan::Plan::warnings`].
    pub warnings: Vec<String>,
}

pub(super) fn container(
    spec: &Document,
    host: &Host,
    seccomp: Option<Seccomp>,
    warnings: &mut Vec<String>,
) -> Result<Process, Error> {
    if spec.get("process").is_none() {
        return Err(Error::invalid("process", "is missing"));
    }
    let user = user(spec)?;
    Ok(Process {
        args: args(spec)?,
        env: env(spec)?,
        cwd: cwd(spec)?,
        uid: user.uid(),
        gid: user.gid(),
        additional_gids: user.additional_gids().clone().unwrap_or_default(),
        umask: Some(user.umask().unwrap_or(DEFAULT_UMASK)),
        capabilities: capabilities::read(spec, host, warnings)?.unwrap_or_default(),
        rlimits: rlimits(spec)?,
        no_new_privileges: spec.flag("process.noNewPrivileges")?,
        oom_score_adj: oom_score_adj(spec)?,
        apparmor_profile: apparmor_profile(spec, host)?,
        seccomp,
        scope_abstract_sockets: false,
        terminal: terminal(spec)?,
        scheduler: scheduling::scheduler(spec)?,
        io_priority: scheduling::io_priority(spec)?,
        exec_cpu_affinity: scheduling::exec_cpu_affinity(spec)?,
        memory_policy: scheduling::memory_policy(spec)?,
        personality: personality(spec)?,
    })
}

pub(super) fn exec(json: &[u8], container: &Process, host: &Host) -> Result<Exec, Error> {
    let spec = Document::parse_process(json)?;
    let mut warnings = fields::check(&spec)?;
    let own_umask = user(&spec)?.umask();
    let own_capabilities = capabilities::read(&spec, host, &mut warnings)?;

    let mut process = self::container(&spec, host, None, &mut Vec::new())?;
    process.seccomp = container.seccomp.clone();
    process.scope_abstract_sockets = container.scope_abstract_sockets;
    process.oom_score_adj = container.oom_score_adj;
    process.memory_policy = container.memory_policy.clone();
    process.personality = container.personality;
    process.umask = own_umask.or(container.umask);
    if process.apparmor_profile.is_none() {
        process.apparmor_profile = container.apparmor_profile.clone();
    }
    if process.rlimits.is_empty() {
        process.rlimits = container.rlimits.clone();
    }
    process.scheduler = process.scheduler.or(container.scheduler);
    process.io_priority = process.io_priority.or(container.io_priority);
    if process.exec_cpu_affinity == ExecCpuAffinity::default() {
        process.exec_cpu_affinity = container.exec_cpu_affinity.clone();
    }
    process.capabilities = own_capabilities.unwrap_or(container.capabilities);
    let bounding = container.capabilities.bounding;
    let sets = &mut process.capabilities;
    let asked = sets.bounding | sets.effective | sets.inheritable | sets.permitted | sets.ambient;
    if asked & !bounding != 0 {
        warnings
            .push("process.capabilities: limited to the bounding set of the container".to_owned());
    }
    for set in [
        &mut sets.bounding,
        &mut sets.effective,
        &mut sets.inheritable,
        &mut sets.permitted,
        &mut sets.ambient,
    ] {
        *set &= bounding;
    }
    Ok(Exec { process, warnings })
}

fn args(spec: &Document) -> Result<Vec<String>, Error> {
    let args: Vec<String> = spec.read("process.args")?.unwrap_or_default();
    match args.is_empty() {
        true => Err(Error::invalid("process.args", "must not be empty")),
        false => Ok(args),
    }
}

/// One entry per name, the last one wins, as with every runtime that sets variables one by one.
fn env(spec: &Document) -> Result<Vec<String>, Error> {
    let mut env: Vec<String> = Vec::new();
    let mut index = std::collections::HashMap::new();
    for item in spec.list::<String>("process.env")? {
        match item.value.split_once('=') {
            Some((name, _)) if !name.is_empty() => match index.entry(name.to_owned()) {
                std::collections::hash_map::Entry::Occupied(first) => {
                    env[*first.get()] = item.value;
                }
                std::collections::hash_map::Entry::Vacant(free) => {
                    free.insert(env.len());
                    env.push(item.value);
                }
            },
            // The value may be a secret, so it is not repeated here.
            _ => return Err(Error::invalid(item.field, "must have the form NAME=value")),
        }
    }
    Ok(env)
}

fn cwd(spec: &Document) -> Result<String, Error> {
    match spec.string("process.cwd")? {
        Some(cwd) if Path::new(&cwd).is_absolute() => Ok(cwd),
        _ => Err(Error::invalid("process.cwd", "must be an absolute path")),
    }
}

fn user(spec: &Document) -> Result<User, Error> {
    let user: User = spec.read("process.user")?.unwrap_or_default();
    let additional = user.additional_gids().iter().flatten();
    for (field, id) in [("uid", user.uid()), ("gid", user.gid())]
        .into_iter()
        .chain(additional.map(|gid| ("additionalGids", *gid)))
    {
        if id > MAX_ID {
            return Err(Error::invalid(
                format!("process.user.{field}"),
                format!("is {id}: ids are at most {MAX_ID}"),
            ));
        }
    }
    match user.umask() {
        Some(umask) if umask > 0o777 => {
            Err(Error::invalid("process.user.umask", "is greater than 0777"))
        }
        _ => Ok(user),
    }
}

fn rlimits(spec: &Document) -> Result<Vec<Rlimit>, Error> {
    let mut rlimits: Vec<Rlimit> = Vec::new();
    for item in spec.list::<PosixRlimit>("process.rlimits")? {
        let (field, rlimit) = (item.field, item.value);
        let rlimit =
            Rlimit { resource: resource(rlimit.typ()), soft: rlimit.soft(), hard: rlimit.hard() };
        if rlimits.iter().any(|other| other.resource == rlimit.resource) {
            return Err(Error::invalid(format!("{field}.type"), "appears twice"));
        }
        if rlimit.soft > rlimit.hard {
            return Err(Error::invalid(format!("{field}.soft"), "is greater than the hard limit"));
        }
        rlimits.push(rlimit);
    }
    Ok(rlimits)
}

fn resource(typ: Type) -> u32 {
    match typ {
        Type::RlimitCpu => libc::RLIMIT_CPU,
        Type::RlimitFsize => libc::RLIMIT_FSIZE,
        Type::RlimitData => libc::RLIMIT_DATA,
        Type::RlimitStack => libc::RLIMIT_STACK,
        Type::RlimitCore => libc::RLIMIT_CORE,
        Type::RlimitRss => libc::RLIMIT_RSS,
        Type::RlimitNproc => libc::RLIMIT_NPROC,
        Type::RlimitNofile => libc::RLIMIT_NOFILE,
        Type::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        Type::RlimitAs => libc::RLIMIT_AS,
        Type::RlimitLocks => libc::RLIMIT_LOCKS,
        Type::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        Type::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        Type::RlimitNice => libc::RLIMIT_NICE,
        Type::RlimitRtprio => libc::RLIMIT_RTPRIO,
        Type::RlimitRttime => libc::RLIMIT_RTTIME,
    }
}

fn oom_score_adj(spec: &Document) -> Result<Option<i32>, Error> {
    match spec.read("process.oomScoreAdj")? {
        Some(value) if !(-1000..=1000).contains(&value) => {
            Err(Error::invalid("process.oomScoreAdj", "is not within -1000 to 1000"))
        }
        value => Ok(value),
    }
}

fn apparmor_profile(spec: &Document, host: &Host) -> Result<Option<String>, Error> {
    const FIELD: &str = "process.apparmorProfile";
    match spec.string(FIELD)? {
        // Written to a file of /proc as one line.
        Some(profile) if profile.chars().any(char::is_control) => {
            Err(Error::invalid(FIELD, "contains control characters"))
        }
        Some(profile) if host.apparmor => match (host.lacks_profile)(&profile) {
            false => Ok(Some(profile)),
            true => {
                let problem =
                    format!("is {profile:?}, which is not loaded here: use apparmor_parser(8)");
                Err(Error::invalid(FIELD, problem))
            }
        },
        None => Ok(None),
        Some(profile) if profile == "unconfined" => Ok(None),
        Some(_) => Err(Error::unsupported(
            FIELD,
            "AppArmor is not enabled on this host; enable it or leave the profile out",
        )),
    }
}

fn terminal(spec: &Document) -> Result<Option<WindowSize>, Error> {
    if !spec.flag("process.terminal")? {
        return Ok(None);
    }
    const FIELD: &str = "process.consoleSize";
    let Some(size) = spec.read::<ConsoleSize>(FIELD)? else {
        return Ok(Some(WindowSize::default()));
    };
    match (u16::try_from(size.height()), u16::try_from(size.width())) {
        (Ok(rows), Ok(columns)) => Ok(Some(WindowSize { rows, columns })),
        _ => Err(Error::invalid(FIELD, "is greater than 65535")),
    }
}

/// `PER_*` of personality(2).
fn personality(spec: &Document) -> Result<Option<u32>, Error> {
    const FIELD: &str = "linux.personality.domain";
    match spec.string(FIELD)?.as_deref() {
        None => Ok(None),
        Some("LINUX") => Ok(Some(0x0)),
        Some("LINUX32") => Ok(Some(0x8)),
        Some(_) => Err(Error::invalid(FIELD, "must be LINUX or LINUX32")),
    }
}

#[cfg(test)]
mod tests {
    use proxmox_shim_init::protocol::{BitSet, Capabilities, MemoryPolicy, Scheduler};

    use super::super::tests::host;
    use super::*;

    fn read_json(process: &str) -> Result<Process, String> {
        let json = format!(r#"{{"process":{process}}}"#);
        let spec = Document::parse(json.as_bytes()).unwrap();
        container(&spec, &host(), None, &mut Vec::new()).map_err(|error| error.to_string())
    }

    fn minimal(extra: &str) -> String {
        format!(r#"{{"args":["/init"],"cwd":"/"{extra}}}"#)
    }

    #[test]
    fn a_minimal_process_has_no_capabilities() {
        assert_eq!(
            read_json(&minimal("")).unwrap(),
            Process {
                args: vec!["/init".to_owned()],
                env: vec![],
                cwd: "/".to_owned(),
                uid: 0,
                gid: 0,
                additional_gids: vec![],
                umask: Some(0o022),
                capabilities: Capabilities::default(),
                rlimits: vec![],
                no_new_privileges: false,
                oom_score_adj: None,
                apparmor_profile: None,
                seccomp: None,
                scope_abstract_sockets: false,
                terminal: None,
                scheduler: None,
                io_priority: None,
                exec_cpu_affinity: ExecCpuAffinity::default(),
                memory_policy: None,
                personality: None,
            }
        );
    }

    #[test]
    fn every_field_arrives() {
        let process = read_json(
            r#"{"terminal":true,"consoleSize":{"height":24,"width":80},
            "user":{"uid":1,"gid":2,"umask":63,"additionalGids":[3,4],"username":"x"},
            "args":["a","b\nc"],"env":["A=1","B=multi\nline","A=2","C="],"cwd":"/w",
            "capabilities":{"bounding":["CAP_KILL"]},
            "rlimits":[{"type":"RLIMIT_NOFILE","soft":1,"hard":2},
                {"type":"RLIMIT_CORE","soft":18446744073709551615,"hard":18446744073709551615}],
            "noNewPrivileges":true,"apparmorProfile":"unconfined","oomScoreAdj":-999}"#,
        )
        .unwrap();
        assert_eq!(process.args, ["a", "b\nc"]);
        assert_eq!(process.env, ["A=2", "B=multi\nline", "C="]);
        assert_eq!(process.cwd, "/w");
        assert_eq!((process.uid, process.gid, process.umask), (1, 2, Some(0o77)));
        assert_eq!(process.additional_gids, [3, 4]);
        assert_eq!(process.capabilities.bounding, 1 << 5);
        assert_eq!(
            process.rlimits,
            [
                Rlimit { resource: 7, soft: 1, hard: 2 },
                Rlimit { resource: 4, soft: u64::MAX, hard: u64::MAX },
            ]
        );
        assert!(process.no_new_privileges);
        assert_eq!(process.oom_score_adj, Some(-999));
        assert_eq!(process.apparmor_profile, None);
        assert_eq!(process.terminal, Some(WindowSize { rows: 24, columns: 80 }));
    }

    #[test]
    fn wrong_values_are_refused_by_name() {
        for (extra, expected) in [
            (r#","args":[]"#, "process.args must not be empty"),
            (r#","cwd":"x""#, "process.cwd must be"),
            (r#","cwd":"""#, "process.cwd must be"),
            (r#","env":["A"]"#, "process.env[0] must have the form NAME=value"),
            (r#","env":["A=1","=x"]"#, "process.env[1] must have the form NAME=value"),
            (r#","user":{"uid":2147483648}"#, "process.user.uid is 2147483648"),
            (r#","user":{"gid":4294967295}"#, "process.user.gid is 4294967295"),
            (r#","user":{"uid":4294967296}"#, "process.user: invalid value"),
            (r#","user":{"uid":"root\n"}"#, "process.user: invalid type"),
            (r#","user":{"additionalGids":[1,4294967295]}"#, "process.user.additionalGids is"),
            (r#","user":{"umask":512}"#, "process.user.umask is greater"),
            (r#","oomScoreAdj":1001"#, "process.oomScoreAdj is not"),
            (r#","apparmorProfile":"docker-default""#, "process.apparmorProfile is not supported"),
            (r#","apparmorProfile":"a\nb""#, "process.apparmorProfile contains"),
            (
                r#","terminal":true,"consoleSize":{"height":65536,"width":1}"#,
                "process.consoleSize is",
            ),
            (
                r#","rlimits":[{"type":"RLIMIT_X","soft":1,"hard":1}]"#,
                "process.rlimits[0]: unknown",
            ),
            (
                r#","rlimits":[{"type":"RLIMIT_CPU","soft":2,"hard":1}]"#,
                "process.rlimits[0].soft is",
            ),
            (
                r#","rlimits":[{"type":"RLIMIT_CPU","soft":1,"hard":1},{"type":"RLIMIT_CPU","soft":1,"hard":1}]"#,
                "process.rlimits[1].type appears twice",
            ),
        ] {
            let error = read_json(&minimal(extra)).unwrap_err();
            assert!(error.starts_with(expected), "{extra}: {error}");
        }
    }

    #[test]
    fn personalities_have_the_kernel_s_numbers() {
        let read = |domain: &str| {
            let json = format!(r#"{{"linux":{{"personality":{{"domain":"{domain}"}}}}}}"#);
            personality(&Document::parse(json.as_bytes()).unwrap())
        };
        assert_eq!(read("LINUX").unwrap(), Some(0));
        assert_eq!(read("LINUX32").unwrap(), Some(8));
        assert!(matches!(read("BSD"), Err(Error::Invalid { .. })));
    }

    fn exec_json(process: &str, container: &Process) -> Exec {
        let host = Host { apparmor: true, ..host() };
        exec(process.as_bytes(), container, &host).unwrap()
    }

    #[test]
    fn exec_inherits_what_confines_the_container() {
        let capabilities = Capabilities { bounding: 0b111, effective: 0b11, ..Default::default() };
        let container = Process {
            capabilities,
            umask: Some(0o77),
            oom_score_adj: Some(5),
            apparmor_profile: Some("profile".to_owned()),
            seccomp: Some(Seccomp { flags: 4, program: vec![1; 8] }),
            terminal: Some(WindowSize::default()),
            rlimits: vec![Rlimit { resource: 7, soft: 1, hard: 2 }],
            scheduler: Some(Scheduler { policy: 3, ..Scheduler::default() }),
            io_priority: Some(0x4005),
            memory_policy: Some(MemoryPolicy { mode: 2, nodes: BitSet(vec![1]) }),
            personality: Some(8),
            exec_cpu_affinity: ExecCpuAffinity { initial: Some(BitSet(vec![1])), last: None },
            ..read_json(&minimal("")).unwrap()
        };
        let Exec { process, warnings } =
            exec_json(&minimal(r#","oomScoreAdj":-5,"noNewPrivileges":true"#), &container);
        assert_eq!(process.capabilities, capabilities);
        assert_eq!(process.umask, Some(0o77));
        assert_eq!(process.oom_score_adj, Some(5));
        assert_eq!(process.apparmor_profile.as_deref(), Some("profile"));
        assert_eq!(process.seccomp, container.seccomp);
        assert_eq!(process.terminal, None);
        assert!(process.no_new_privileges && warnings.is_empty());
        assert_eq!(process.rlimits, container.rlimits);
        assert_eq!(process.scheduler, container.scheduler);
        assert_eq!(process.io_priority, container.io_priority);
        assert_eq!(process.exec_cpu_affinity, container.exec_cpu_affinity);
        assert_eq!(process.memory_policy, container.memory_policy);
        assert_eq!(process.personality, container.personality);

        let Exec { process, .. } = exec_json(
            &minimal(
                r#","user":{"umask":18},"apparmorProfile":"unconfined","terminal":true,
                "rlimits":[{"type":"RLIMIT_CORE","soft":0,"hard":0}],
                "scheduler":{"policy":"SCHED_IDLE"},"ioPriority":{"class":"IOPRIO_CLASS_IDLE"},
                "execCPUAffinity":{"final":"1"}"#,
            ),
            &container,
        );
        assert_eq!(process.umask, Some(0o22));
        assert_eq!(process.rlimits, [Rlimit { resource: 4, soft: 0, hard: 0 }]);
        assert_eq!(process.scheduler.unwrap().policy, 5);
        assert_eq!(process.io_priority, Some(0x6000));
        let affinity = ExecCpuAffinity { initial: None, last: Some(BitSet(vec![2])) };
        assert_eq!(process.exec_cpu_affinity, affinity);
        assert_eq!(process.apparmor_profile.as_deref(), Some("unconfined"));
        assert_eq!(process.terminal, Some(WindowSize::default()));
    }

    #[test]
    fn exec_cannot_widen_the_bounding_set() {
        let container = Process {
            capabilities: Capabilities { bounding: 1 << 5, ..Default::default() },
            ..read_json(&minimal("")).unwrap()
        };
        let asked = minimal(
            r#","capabilities":{"bounding":["CAP_KILL","CAP_SYS_ADMIN"],
                "effective":["CAP_SYS_ADMIN"],"permitted":["CAP_KILL"]}"#,
        );
        let Exec { process, warnings } = exec_json(&asked, &container);
        assert_eq!(
            process.capabilities,
            Capabilities { bounding: 1 << 5, permitted: 1 << 5, ..Default::default() }
        );
        assert_eq!(warnings.len(), 1);
    }

    #[test]
    fn exec_refuses_what_a_container_s_process_refuses() {
        let container = read_json(&minimal("")).unwrap();
        let error = exec(minimal(r#","selinuxLabel":"x""#).as_bytes(), &container, &host());
        assert!(
            error.unwrap_err().to_string().starts_with("process.selinuxLabel is not supported")
        );
    }
}
