//! `linux.seccomp`: compiled to the program that init loads.
//!
//! libseccomp compiles; nothing is loaded here. The rules for what a profile means where the
//! specification is silent are runc's, because profiles are written for it.

mod programs;

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::Path;

use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use oci_spec::runtime::{
    Arch, LinuxSeccompAction as Action, LinuxSeccompArg, LinuxSeccompFilterFlag as Flag,
    LinuxSeccompOperator as Operator, LinuxSyscall,
};
use proxmox_shim_init::protocol::Seccomp;

pub use programs::Programs;

use super::Error;
use super::document::{Document, Item};
use super::plan::SeccompAgent;

const FIELD: &str = "linux.seccomp";
/// From this number of rules on, libseccomp's binary tree makes shorter paths through the program.
const MANY_RULES: usize = 32;

/// `BPF_MAXINSNS`; the kernel counts them in 16 bits.
const MAX_INSTRUCTIONS: usize = 4096;
/// System calls that init makes between the load of a filter with a listener and the moment when
/// the agent has the listener: nobody would answer for them.
const BEFORE_THE_AGENT: [&str; 2] = ["sendmsg", "recvmsg"];

/// What init loads, and who answers for what the filter leaves to an agent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Filter {
    pub seccomp: Option<Seccomp>,
    pub agent: Option<SeccompAgent>,
}

pub(super) fn read(
    spec: &Document,
    programs: &Programs,
    warnings: &mut Vec<String>,
) -> Result<Filter, Error> {
    let Some(profile) = spec.get(FIELD) else { return Ok(Filter::default()) };
    let syscalls = spec.list::<LinuxSyscall>("linux.seccomp.syscalls")?;
    let Some(default) = spec.read::<Action>("linux.seccomp.defaultAction")? else {
        // Nothing at all means no filter; rules without a default are a mistake.
        return match syscalls.is_empty() {
            true => Ok(Filter::default()),
            false => Err(Error::invalid("linux.seccomp.defaultAction", "is missing")),
        };
    };
    let default = action("linux.seccomp", default, spec.read("linux.seccomp.defaultErrnoRet")?)?;
    if default == ScmpAction::Notify {
        return Err(Error::invalid(
            "linux.seccomp.defaultAction",
            "is SCMP_ACT_NOTIFY, which only a rule can have: nothing could run before its agent does",
        ));
    }
    let agent = agent(spec, &syscalls)?;
    let flags = flags(spec, agent.is_some(), warnings)?;
    let program = programs.get(profile, || compile(spec, &syscalls, default))?;
    Ok(Filter { seccomp: Some(Seccomp { flags, program }), agent })
}

fn compile(
    spec: &Document,
    syscalls: &[Item<LinuxSyscall>],
    default: ScmpAction,
) -> Result<Vec<u8>, Error> {
    let mut filter = ScmpFilterContext::new(default).map_err(failed(FIELD))?;
    let mut architectures = vec![ScmpArch::native()];
    for item in spec.list::<Arch>("linux.seccomp.architectures")? {
        let architecture = architecture(item.value);
        filter.add_arch(architecture).map_err(failed(&item.field))?;
        if !architectures.contains(&architecture) && architecture != ScmpArch::Native {
            architectures.push(architecture);
        }
    }
    let rules: usize = syscalls.iter().map(|item| item.value.names().len()).sum();
    if rules > MANY_RULES {
        filter.set_ctl_optimize(2).map_err(failed(FIELD))?;
    }
    for item in syscalls {
        add_rules(&mut filter, item, default)?;
    }

    let program = export(&filter)?;
    let program = match may_reach_enosys(default) {
        true => enosys::prepend(program, &architectures, syscalls),
        false => program,
    };
    match program.len() / enosys::INSTRUCTION > MAX_INSTRUCTIONS {
        true => Err(Error::invalid(FIELD, "is longer than the kernel's 4096 instructions")),
        false => Ok(program),
    }
}

/// Who gets the listener; `None` if no rule asks for one.
fn agent(spec: &Document, syscalls: &[Item<LinuxSyscall>]) -> Result<Option<SeccompAgent>, Error> {
    const PATH: &str = "linux.seccomp.listenerPath";
    const METADATA: &str = "linux.seccomp.listenerMetadata";
    let socket = spec.string(PATH)?;
    let metadata = spec.string(METADATA)?;
    if socket.is_none() && metadata.is_some() {
        return Err(Error::invalid(METADATA, "needs a listenerPath"));
    }
    let mut asked = false;
    for item in syscalls.iter().filter(|item| item.value.action() == Action::ScmpActNotify) {
        asked = true;
        if let Some(name) =
            item.value.names().iter().find(|name| BEFORE_THE_AGENT.contains(&name.as_str()))
        {
            return Err(Error::unsupported(
                format!("{}: SCMP_ACT_NOTIFY for {name}", item.field),
                "the container's agent is reached by this system call; give it another action",
            ));
        }
    }
    match socket {
        // A profile that leaves nothing to the agent has no listener.
        _ if !asked => Ok(None),
        None => Err(Error::invalid(PATH, "is missing, and SCMP_ACT_NOTIFY needs it")),
        Some(socket) if !Path::new(&socket).is_absolute() => {
            Err(Error::invalid(PATH, "must be absolute"))
        }
        Some(socket) => {
            Ok(Some(SeccompAgent { socket: socket.into(), metadata: metadata.unwrap_or_default() }))
        }
    }
}

fn failed(field: &str) -> impl FnOnce(libseccomp::error::SeccompError) -> Error + use<> {
    let field = field.to_owned();
    |source| Error::Seccomp { field, source }
}

/// libseccomp before 2.6 writes programs to a descriptor only.
fn export(filter: &ScmpFilterContext) -> Result<Vec<u8>, Error> {
    let io = |source: io::Error| Error::Export { source };
    let file = memfd_create(c"seccomp", MFdFlags::MFD_CLOEXEC).map_err(|errno| io(errno.into()))?;
    filter.export_bpf(&file).map_err(failed(FIELD))?;
    let mut file = File::from(file);
    let mut program = Vec::new();
    file.rewind().and_then(|()| file.read_to_end(&mut program)).map_err(io)?;
    Ok(program)
}

fn flags(spec: &Document, listener: bool, warnings: &mut Vec<String>) -> Result<u32, Error> {
    const FLAGS: &str = "linux.seccomp.flags";
    let new_listener = match listener {
        true => libc::SECCOMP_FILTER_FLAG_NEW_LISTENER as u32,
        false => 0,
    };
    // Missing is not empty: runc's default, because the mitigation it switches off is slow and
    // not needed on today's kernels.
    if spec.get(FLAGS).is_none() {
        return Ok(libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW as u32 | new_listener);
    }
    let mut flags = new_listener;
    for item in spec.list::<Flag>(FLAGS)? {
        match item.value {
            Flag::SeccompFilterFlagLog => flags |= libc::SECCOMP_FILTER_FLAG_LOG as u32,
            Flag::SeccompFilterFlagSpecAllow => {
                flags |= libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW as u32;
            }
            Flag::SeccompFilterFlagTsync => warnings.push(format!(
                "{} SECCOMP_FILTER_FLAG_TSYNC has no effect: the process has one thread",
                item.field
            )),
            Flag::SeccompFilterFlagWaitKillableRecv if listener => {
                flags |= libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV as u32;
            }
            Flag::SeccompFilterFlagWaitKillableRecv => {
                return Err(Error::invalid(
                    item.field,
                    "is SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, which needs a rule with SCMP_ACT_NOTIFY",
                ));
            }
        }
    }
    Ok(flags)
}

/// `errno` is also the message of a trace action.
fn action(field: &str, action: Action, errno: Option<u32>) -> Result<ScmpAction, Error> {
    // The kernel takes 16 bits (SECCOMP_RET_DATA).
    let errno = u16::try_from(errno.unwrap_or(libc::EPERM.unsigned_abs()))
        .map_err(|_| Error::invalid(format!("{field}: the errno"), "is greater than 65535"))?;
    Ok(match action {
        Action::ScmpActKill | Action::ScmpActKillThread => ScmpAction::KillThread,
        Action::ScmpActKillProcess => ScmpAction::KillProcess,
        Action::ScmpActTrap => ScmpAction::Trap,
        Action::ScmpActErrno => ScmpAction::Errno(errno.into()),
        Action::ScmpActTrace => ScmpAction::Trace(errno),
        Action::ScmpActLog => ScmpAction::Log,
        Action::ScmpActAllow => ScmpAction::Allow,
        Action::ScmpActNotify => ScmpAction::Notify,
    })
}

fn add_rules(
    filter: &mut ScmpFilterContext,
    item: &Item<LinuxSyscall>,
    default: ScmpAction,
) -> Result<(), Error> {
    let (field, call) = (&item.field, &item.value);
    let action = action(field, call.action(), call.errno_ret())?;
    let comparisons = call
        .args()
        .iter()
        .flatten()
        .map(|arg| comparison(field, arg))
        .collect::<Result<Vec<_>, Error>>()?;
    // libseccomp joins comparisons by "and" but refuses two of one argument; those have always
    // been alternatives, each a rule of its own.
    let indexes: Vec<usize> = call.args().iter().flatten().map(LinuxSeccompArg::index).collect();
    let repeats = (1..indexes.len()).any(|n| indexes[..n].contains(&indexes[n]));

    // libseccomp refuses a rule that says what happens anyway.
    if action == default {
        return Ok(());
    }
    for name in call.names() {
        if name.is_empty() {
            return Err(Error::invalid(format!("{field}.names"), "contains an empty name"));
        }
        // A profile is written for all kernels and architectures: what does not exist here needs
        // no rule.
        let Ok(syscall) = ScmpSyscall::from_name(name) else { continue };
        let failed = || failed(&format!("{field} ({name})"));
        if comparisons.is_empty() {
            filter.add_rule(action, syscall).map_err(failed())?;
        } else if repeats {
            for comparison in &comparisons {
                filter.add_rule_conditional(action, syscall, &[*comparison]).map_err(failed())?;
            }
        } else {
            filter.add_rule_conditional(action, syscall, &comparisons).map_err(failed())?;
        }
    }
    Ok(())
}

fn comparison(field: &str, arg: &LinuxSeccompArg) -> Result<ScmpArgCompare, Error> {
    let index = u32::try_from(arg.index()).ok().filter(|index| *index < 6).ok_or_else(|| {
        Error::invalid(format!("{field}.args"), "has an index above 5: a system call has six")
    })?;
    let (op, value) = match arg.op() {
        Operator::ScmpCmpNe => (ScmpCompareOp::NotEqual, arg.value()),
        Operator::ScmpCmpLt => (ScmpCompareOp::Less, arg.value()),
        Operator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, arg.value()),
        Operator::ScmpCmpEq => (ScmpCompareOp::Equal, arg.value()),
        Operator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, arg.value()),
        Operator::ScmpCmpGt => (ScmpCompareOp::Greater, arg.value()),
        Operator::ScmpCmpMaskedEq => {
            (ScmpCompareOp::MaskedEqual(arg.value()), arg.value_two().unwrap_or(0))
        }
    };
    Ok(ScmpArgCompare::new(index, op, value))
}

fn architecture(architecture: Arch) -> ScmpArch {
    match architecture {
        Arch::ScmpArchNative => ScmpArch::Native,
        Arch::ScmpArchX86 => ScmpArch::X86,
        Arch::ScmpArchX86_64 => ScmpArch::X8664,
        Arch::ScmpArchX32 => ScmpArch::X32,
        Arch::ScmpArchArm => ScmpArch::Arm,
        Arch::ScmpArchAarch64 => ScmpArch::Aarch64,
        Arch::ScmpArchMips => ScmpArch::Mips,
        Arch::ScmpArchMips64 => ScmpArch::Mips64,
        Arch::ScmpArchMips64n32 => ScmpArch::Mips64N32,
        Arch::ScmpArchMipsel => ScmpArch::Mipsel,
        Arch::ScmpArchMipsel64 => ScmpArch::Mipsel64,
        Arch::ScmpArchMipsel64n32 => ScmpArch::Mipsel64N32,
        Arch::ScmpArchPpc => ScmpArch::Ppc,
        Arch::ScmpArchPpc64 => ScmpArch::Ppc64,
        Arch::ScmpArchPpc64le => ScmpArch::Ppc64Le,
        Arch::ScmpArchS390 => ScmpArch::S390,
        Arch::ScmpArchS390x => ScmpArch::S390X,
        Arch::ScmpArchParisc => ScmpArch::Parisc,
        Arch::ScmpArchParisc64 => ScmpArch::Parisc64,
        Arch::ScmpArchRiscv64 => ScmpArch::Riscv64,
        Arch::ScmpArchLoongarch64 => ScmpArch::Loongarch64,
        Arch::ScmpArchM68k => ScmpArch::M68k,
        Arch::ScmpArchSh => ScmpArch::Sh,
        Arch::ScmpArchSheb => ScmpArch::Sheb,
    }
}

/// A default that lets the system call through reaches the kernel's own ENOSYS.
fn may_reach_enosys(default: ScmpAction) -> bool {
    !matches!(default, ScmpAction::Allow | ScmpAction::Log | ScmpAction::Trace(_))
}

/// System calls newer than the profile.
///
/// A C library tries a new system call first and falls back on ENOSYS only; a profile that does
/// not know the call would answer with its default, usually EPERM. So, as with runc, everything
/// above the highest number that the profile names gets ENOSYS before the profile is asked.
mod enosys {
    use super::*;

    /// Size of `struct sock_filter`.
    pub(super) const INSTRUCTION: usize = 8;

    const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
    const JUMP_IF_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
    const JUMP_IF_GREATER: u16 = 0x25; // BPF_JMP | BPF_JGT | BPF_K
    const JUMP_IF_AT_LEAST: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K
    const RETURN: u16 = 0x06; // BPF_RET | BPF_K
    /// Offsets in `struct seccomp_data`.
    const NUMBER: u32 = 0;
    const ARCHITECTURE: u32 = 4;
    /// `__X32_SYSCALL_BIT`: x32 shares its architecture with x86-64.
    const X32_BIT: u32 = 0x4000_0000;

    /// The `AUDIT_ARCH_*` of those architectures that a Proxmox VE node runs.
    fn audit_arch(architecture: ScmpArch) -> Option<u32> {
        match architecture {
            ScmpArch::X8664 | ScmpArch::X32 => Some(0xc000_003e),
            ScmpArch::X86 => Some(0x4000_0003),
            ScmpArch::Aarch64 => Some(0xc000_00b7),
            ScmpArch::Arm => Some(0x4000_0028),
            ScmpArch::Riscv64 => Some(0xc000_00f3),
            _ => None,
        }
    }

    pub(super) fn prepend(
        program: Vec<u8>,
        architectures: &[ScmpArch],
        syscalls: &[Item<LinuxSyscall>],
    ) -> Vec<u8> {
        let mut stub = Vec::new();
        for architecture in architectures.iter().filter(|a| **a != ScmpArch::X32) {
            let (Some(audit), Some(last)) =
                (audit_arch(*architecture), last_named(*architecture, syscalls))
            else {
                continue;
            };
            let x32 = match architecture {
                ScmpArch::X8664 if architectures.contains(&ScmpArch::X32) => {
                    last_named(ScmpArch::X32, syscalls)
                }
                _ => None,
            };
            stub.extend(block(audit, last, *architecture == ScmpArch::X8664, x32));
        }
        [stub, program].concat()
    }

    /// The highest number among the system calls that the profile names.
    fn last_named(architecture: ScmpArch, syscalls: &[Item<LinuxSyscall>]) -> Option<u32> {
        syscalls
            .iter()
            .flat_map(|item| item.value.names())
            .filter_map(|name| ScmpSyscall::from_name_by_arch(name, architecture).ok())
            // Negative numbers are libseccomp's for calls that the architecture lacks.
            .filter_map(|syscall| u32::try_from(syscall.as_raw_syscall()).ok())
            .max()
    }

    /// Checks one architecture and falls through to what follows for all others.
    fn block(audit: u32, last: u32, has_x32: bool, last_x32: Option<u32>) -> Vec<u8> {
        let enosys = 0x0005_0000 | libc::ENOSYS.unsigned_abs(); // SECCOMP_RET_ERRNO
        // The jumps are relative to the next instruction.
        let checks = match (has_x32, last_x32) {
            (false, _) => vec![(JUMP_IF_GREATER, 0, 1, last), (RETURN, 0, 0, enosys)],
            // x32 is not in the profile: the filter's own check of the architecture decides.
            (true, None) => vec![
                (JUMP_IF_AT_LEAST, 2, 0, X32_BIT),
                (JUMP_IF_GREATER, 0, 1, last),
                (RETURN, 0, 0, enosys),
            ],
            (true, Some(last_x32)) => vec![
                (JUMP_IF_AT_LEAST, 1, 0, X32_BIT),
                (JUMP_IF_GREATER, 1, 2, last),
                (JUMP_IF_GREATER, 0, 1, last_x32),
                (RETURN, 0, 0, enosys),
            ],
        };
        let mut block = vec![
            (LOAD, 0, 0, ARCHITECTURE),
            (JUMP_IF_EQUAL, 0, checks.len() as u8 + 1, audit),
            (LOAD, 0, 0, NUMBER),
        ];
        block.extend(checks);
        block
            .into_iter()
            .flat_map(|(code, if_true, if_false, k): (u16, u8, u8, u32)| {
                let mut instruction = [0; INSTRUCTION];
                instruction[..2].copy_from_slice(&code.to_ne_bytes());
                instruction[2] = if_true;
                instruction[3] = if_false;
                instruction[4..].copy_from_slice(&k.to_ne_bytes());
                instruction
            })
            .collect()
    }
}

#[cfg(test)]
mod tests;
