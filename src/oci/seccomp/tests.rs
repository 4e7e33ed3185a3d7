//! Programs are run by a small interpreter of classic BPF, so that what is tested is the verdict
//! on a system call and not the shape of the code.

use super::*;

const X86_64: u32 = 0xc000_003e;
const I386: u32 = 0x4000_0003;
const ALLOW: u32 = 0x7fff_0000;
const KILL_THREAD: u32 = 0;

fn errno(number: i32) -> u32 {
    0x0005_0000 | number.unsigned_abs()
}

fn compile(seccomp: &str) -> Result<(Option<Seccomp>, Vec<String>), String> {
    let json = format!(r#"{{"linux":{{"seccomp":{seccomp}}}}}"#);
    let mut warnings = Vec::new();
    read(&Document::parse(json.as_bytes()).unwrap(), &Programs::default(), &mut warnings)
        .map(|filter| (filter.seccomp, warnings))
        .map_err(|error| error.to_string())
}

fn program(seccomp: &str) -> Vec<u8> {
    compile(seccomp).unwrap().0.unwrap().program
}

/// What the kernel would do: the subset of classic BPF that libseccomp emits.
fn run(program: &[u8], arch: u32, number: u32, args: &[u64]) -> u32 {
    let load = |offset: u32| match offset {
        0 => number,
        4 => arch,
        16.. => {
            let (index, half) = ((offset - 16) / 8, (offset - 16) % 8);
            let value = args.get(index as usize).copied().unwrap_or(0);
            if half == 0 { value as u32 } else { (value >> 32) as u32 }
        }
        other => panic!("load from {other}"),
    };
    let (mut pc, mut a) = (0, 0u32);
    loop {
        let i = &program[pc * 8..pc * 8 + 8];
        let code = u16::from_ne_bytes([i[0], i[1]]);
        let k = u32::from_ne_bytes([i[4], i[5], i[6], i[7]]);
        pc += 1;
        let jump = |taken: bool| usize::from(if taken { i[2] } else { i[3] });
        match code {
            0x20 => a = load(k),
            0x54 => a &= k,
            0x05 => pc += k as usize,
            0x15 => pc += jump(a == k),
            0x25 => pc += jump(a > k),
            0x35 => pc += jump(a >= k),
            0x06 => return k,
            other => panic!("instruction {other:#x}"),
        }
    }
}

fn native(program: &[u8], name: &str, args: &[u64]) -> u32 {
    let number = ScmpSyscall::from_name(name).unwrap().as_raw_syscall();
    run(program, X86_64, number.try_into().unwrap(), args)
}

#[test]
fn no_filter_without_a_profile() {
    assert_eq!(compile("null").unwrap().0, None);
    assert_eq!(compile("{}").unwrap().0, None);
    assert_eq!(
        compile(r#"{"syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW"}]}"#).unwrap_err(),
        "linux.seccomp.defaultAction is missing"
    );
}

#[test]
fn all_actions() {
    for (action, expected) in [
        ("SCMP_ACT_KILL", KILL_THREAD),
        ("SCMP_ACT_KILL_THREAD", KILL_THREAD),
        ("SCMP_ACT_KILL_PROCESS", 0x8000_0000),
        ("SCMP_ACT_TRAP", 0x0003_0000),
        ("SCMP_ACT_ERRNO", errno(libc::EPERM)),
        ("SCMP_ACT_TRACE", 0x7ff0_0001),
        ("SCMP_ACT_LOG", 0x7ffc_0000),
    ] {
        let program = program(&format!(
            r#"{{"defaultAction":"SCMP_ACT_ALLOW",
                "syscalls":[{{"names":["chroot"],"action":"{action}"}}]}}"#
        ));
        assert_eq!(native(&program, "chroot", &[]), expected, "{action}");
        assert_eq!(native(&program, "read", &[]), ALLOW, "{action}");
    }
}

#[test]
fn an_agent_is_asked_where_a_rule_says_so() {
    let read_agent = |more: &str, call: &str| {
        let json = format!(
            r#"{{"linux":{{"seccomp":{{"defaultAction":"SCMP_ACT_ALLOW",
                "syscalls":[{{"names":["chroot","{call}"],"action":"SCMP_ACT_NOTIFY"}}]{more}}}}}}}"#
        );
        read(&Document::parse(json.as_bytes()).unwrap(), &Programs::default(), &mut Vec::new())
            .map_err(|error| error.to_string())
    };
    let path = r#","listenerPath":"/run/agent""#;
    let filter = read_agent(&format!(r#"{path},"listenerMetadata":"m""#), "mkdir").unwrap();
    let seccomp = filter.seccomp.unwrap();
    assert_eq!(native(&seccomp.program, "chroot", &[]), 0x7fc0_0000);
    assert_eq!(seccomp.flags, 4 | 8);
    assert_eq!(
        filter.agent,
        Some(SeccompAgent { socket: "/run/agent".into(), metadata: "m".to_owned() })
    );
    let flags = r#","flags":["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]"#;
    let filter = read_agent(&format!("{path}{flags}"), "mkdir").unwrap();
    assert_eq!(filter.seccomp.unwrap().flags, 8 | 32);

    for (more, call, expected) in [
        ("", "mkdir", "linux.seccomp.listenerPath is missing"),
        (r#","listenerPath":"agent""#, "mkdir", "linux.seccomp.listenerPath must be absolute"),
        (r#","listenerMetadata":"m""#, "mkdir", "linux.seccomp.listenerMetadata needs"),
        (path, "sendmsg", "linux.seccomp.syscalls[0]: SCMP_ACT_NOTIFY for sendmsg is not"),
    ] {
        let error = read_agent(more, call).unwrap_err();
        assert!(error.starts_with(expected), "{more}: {error}");
    }
    let default = compile(r#"{"defaultAction":"SCMP_ACT_NOTIFY","listenerPath":"/a"}"#);
    assert!(default.unwrap_err().starts_with("linux.seccomp.defaultAction is SCMP_ACT_NOTIFY"));
    let flag = compile(
        r#"{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/a",
            "flags":["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]}"#,
    );
    assert!(flag.unwrap_err().contains("needs a rule with SCMP_ACT_NOTIFY"));
}

#[test]
fn errno_values() {
    let program = program(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":38,
            "syscalls":[{"names":["chroot"],"action":"SCMP_ACT_ERRNO","errnoRet":13},
                {"names":["read","write"],"action":"SCMP_ACT_ALLOW"}]}"#,
    );
    assert_eq!(native(&program, "chroot", &[]), errno(libc::EACCES));
    assert_eq!(native(&program, "close", &[]), errno(libc::ENOSYS));
    assert_eq!(native(&program, "write", &[]), ALLOW);
    assert!(compile(r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":65536}"#).is_err());
}

#[test]
fn all_operators() {
    for (op, value, two, matching, other) in [
        ("SCMP_CMP_EQ", 5, 0, 5, 6),
        ("SCMP_CMP_NE", 5, 0, 6, 5),
        ("SCMP_CMP_LT", 5, 0, 4, 5),
        ("SCMP_CMP_LE", 5, 0, 5, 6),
        ("SCMP_CMP_GE", 5, 0, 5, 4),
        ("SCMP_CMP_GT", 5, 0, 6, 5),
        ("SCMP_CMP_MASKED_EQ", 0xf0, 0x10, 0x1f, 0x2f),
        ("SCMP_CMP_EQ", 1u64 << 40, 0, 1 << 40, 0),
    ] {
        let program = program(&format!(
            r#"{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{{"names":["clone"],
                "action":"SCMP_ACT_ALLOW",
                "args":[{{"index":1,"value":{value},"valueTwo":{two},"op":"{op}"}}]}}]}}"#
        ));
        assert_eq!(native(&program, "clone", &[0, matching]), ALLOW, "{op}");
        assert_eq!(native(&program, "clone", &[0, other]), errno(libc::EPERM), "{op}");
    }
}

#[test]
fn different_arguments_are_anded_and_one_argument_twice_is_ored() {
    let rule = |args: &str| {
        program(&format!(
            r#"{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{{"names":["socket"],
                "action":"SCMP_ACT_ALLOW","args":[{args}]}}]}}"#
        ))
    };
    let both = rule(
        r#"{"index":0,"value":1,"op":"SCMP_CMP_EQ"},{"index":1,"value":2,"op":"SCMP_CMP_EQ"}"#,
    );
    assert_eq!(native(&both, "socket", &[1, 2]), ALLOW);
    assert_eq!(native(&both, "socket", &[1, 3]), errno(libc::EPERM));
    let either = rule(
        r#"{"index":0,"value":1,"op":"SCMP_CMP_EQ"},{"index":0,"value":2,"op":"SCMP_CMP_EQ"}"#,
    );
    assert_eq!(native(&either, "socket", &[1]), ALLOW);
    assert_eq!(native(&either, "socket", &[2]), ALLOW);
    assert_eq!(native(&either, "socket", &[3]), errno(libc::EPERM));
    let error = compile(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["socket"],
            "action":"SCMP_ACT_ALLOW","args":[{"index":6,"value":0,"op":"SCMP_CMP_EQ"}]}]}"#,
    );
    assert!(error.unwrap_err().starts_with("linux.seccomp.syscalls[0].args has an index above 5"));
}

#[test]
fn unknown_names_and_redundant_rules_are_skipped() {
    let program = program(
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
            {"names":["from_the_future","chroot"],"action":"SCMP_ACT_KILL_PROCESS"},
            {"names":["read"],"action":"SCMP_ACT_ALLOW"}]}"#,
    );
    assert_eq!(native(&program, "chroot", &[]), 0x8000_0000);
    assert_eq!(native(&program, "read", &[]), ALLOW);
}

#[test]
fn architectures() {
    let syscalls = r#""syscalls":[{"names":["read","exit"],"action":"SCMP_ACT_ALLOW"}]"#;
    let native_only = program(&format!(r#"{{"defaultAction":"SCMP_ACT_ERRNO",{syscalls}}}"#));
    assert_eq!(run(&native_only, X86_64, 0, &[]), ALLOW);
    assert_eq!(run(&native_only, I386, 3, &[]), KILL_THREAD, "not in the profile");
    let both = program(&format!(
        r#"{{"defaultAction":"SCMP_ACT_ERRNO",
            "architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86","SCMP_ARCH_X32"],{syscalls}}}"#
    ));
    assert_eq!(run(&both, X86_64, 0, &[]), ALLOW);
    assert_eq!(run(&both, I386, 3, &[]), ALLOW);
    assert_eq!(run(&both, I386, 2, &[]), errno(libc::EPERM));
    assert_eq!(run(&both, X86_64, 0x4000_0000, &[]), ALLOW, "x32 read");
    assert_eq!(run(&both, X86_64, 0x4000_0000 + 500, &[]), errno(libc::ENOSYS));
    assert!(
        compile(r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_Z80"]}"#)
            .unwrap_err()
            .starts_with("linux.seccomp.architectures[0]: unknown variant `SCMP_ARCH_Z80`")
    );
}

#[test]
fn calls_newer_than_the_profile_get_enosys() {
    // openat2 is 437 on every architecture.
    let restrictive = program(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86"],
            "syscalls":[{"names":["read","openat2"],"action":"SCMP_ACT_ALLOW"}]}"#,
    );
    for arch in [X86_64, I386] {
        assert_eq!(run(&restrictive, arch, 437, &[]), ALLOW);
        assert_eq!(run(&restrictive, arch, 436, &[]), errno(libc::EPERM));
        assert_eq!(run(&restrictive, arch, 438, &[]), errno(libc::ENOSYS));
    }
    assert_eq!(run(&restrictive, X86_64, 0x4000_0001, &[]), KILL_THREAD, "x32 not in the profile");
    let permissive = program(
        r#"{"defaultAction":"SCMP_ACT_ALLOW",
            "syscalls":[{"names":["chroot"],"action":"SCMP_ACT_ERRNO"}]}"#,
    );
    assert_eq!(run(&permissive, X86_64, 438, &[]), ALLOW);
}

#[test]
fn flags() {
    let flags = |flags: &str| {
        compile(&format!(r#"{{"defaultAction":"SCMP_ACT_ALLOW","flags":{flags}}}"#))
            .map(|(seccomp, warnings)| (seccomp.unwrap().flags, warnings.len()))
    };
    assert_eq!(flags("null"), Ok((4, 0)));
    assert_eq!(flags("[]"), Ok((0, 0)));
    assert_eq!(
        flags(r#"["SECCOMP_FILTER_FLAG_LOG","SECCOMP_FILTER_FLAG_SPEC_ALLOW"]"#),
        Ok((6, 0))
    );
    assert_eq!(flags(r#"["SECCOMP_FILTER_FLAG_TSYNC"]"#), Ok((0, 1)));
    assert!(flags(r#"["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]"#).is_err());
}
