//! When and where a process runs: `process.scheduler`, `process.ioPriority`,
//! `process.execCPUAffinity` and `linux.memoryPolicy`.
//!
//! Read name by name: the OCI crate misspells two of the scheduler's flags.

use proxmox_shim_init::protocol::{BitSet, ExecCpuAffinity, MemoryPolicy, Scheduler};

use super::Error;
use super::document::Document;

/// `SCHED_*` of sched(7).
const POLICIES: [(&str, u32); 6] = [
    ("SCHED_OTHER", 0),
    ("SCHED_FIFO", FIFO),
    ("SCHED_RR", RR),
    ("SCHED_BATCH", 3),
    ("SCHED_IDLE", 5),
    ("SCHED_DEADLINE", DEADLINE),
];
const FIFO: u32 = 1;
const RR: u32 = 2;
const DEADLINE: u32 = 6;

/// `SCHED_FLAG_*` of sched_setattr(2), by the names of the OCI specification.
const FLAGS: [(&str, u64); 7] = [
    ("SCHED_FLAG_RESET_ON_FORK", 0x01),
    ("SCHED_FLAG_RECLAIM", 0x02),
    ("SCHED_FLAG_DL_OVERRUN", 0x04),
    ("SCHED_FLAG_KEEP_POLICY", 0x08),
    ("SCHED_FLAG_KEEP_PARAMS", 0x10),
    ("SCHED_FLAG_UTIL_CLAMP_MIN", 0x20),
    ("SCHED_FLAG_UTIL_CLAMP_MAX", 0x40),
];

/// `IOPRIO_CLASS_*` of ioprio_set(2).
const IO_CLASSES: [(&str, u16); 3] =
    [("IOPRIO_CLASS_RT", 1), ("IOPRIO_CLASS_BE", 2), ("IOPRIO_CLASS_IDLE", 3)];
const IO_CLASS_SHIFT: u16 = 13;

/// `MPOL_*` of set_mempolicy(2).
const MEMORY_MODES: [(&str, u32); 7] = [
    ("MPOL_DEFAULT", 0),
    ("MPOL_PREFERRED", 1),
    ("MPOL_BIND", 2),
    ("MPOL_INTERLEAVE", 3),
    ("MPOL_LOCAL", 4),
    ("MPOL_PREFERRED_MANY", 5),
    ("MPOL_WEIGHTED_INTERLEAVE", 6),
];
const MEMORY_FLAGS: [(&str, u32); 3] = [
    ("MPOL_F_STATIC_NODES", 1 << 15),
    ("MPOL_F_RELATIVE_NODES", 1 << 14),
    ("MPOL_F_NUMA_BALANCING", 1 << 13),
];

/// The kernel's largest `NR_CPUS`.
const MAX_CPUS: u32 = 8192;
/// The kernel's largest `MAX_NUMNODES`.
const MAX_NODES: u32 = 1024;

pub(super) fn scheduler(spec: &Document) -> Result<Option<Scheduler>, Error> {
    if spec.get("process.scheduler").is_none() {
        return Ok(None);
    }
    const POLICY: &str = "process.scheduler.policy";
    let policy = match spec.string(POLICY)? {
        None => return Err(Error::invalid(POLICY, "is missing")),
        Some(name) if name == "SCHED_ISO" => {
            return Err(Error::unsupported(
                "process.scheduler.policy SCHED_ISO",
                "the kernel has no such policy; use SCHED_OTHER with a nice value",
            ));
        }
        Some(name) => known(&POLICIES, POLICY, &name)?,
    };
    let mut flags = 0;
    for item in spec.list::<String>("process.scheduler.flags")? {
        flags |= known(&FLAGS, &item.field, &item.value)?;
    }
    let nice: i32 = spec.read("process.scheduler.nice")?.unwrap_or(0);
    if !(-20..=19).contains(&nice) {
        return Err(Error::invalid("process.scheduler.nice", "is not within -20 to 19"));
    }
    let priority: i32 = spec.read("process.scheduler.priority")?.unwrap_or(0);
    let priority = u32::try_from(priority)
        .map_err(|_| Error::invalid("process.scheduler.priority", "is negative"))?;
    if priority != 0 && !matches!(policy, FIFO | RR) {
        return Err(Error::invalid(
            "process.scheduler.priority",
            "needs the policy SCHED_FIFO or SCHED_RR",
        ));
    }
    let nanoseconds = |name: &str| -> Result<u64, Error> {
        let field = format!("process.scheduler.{name}");
        match spec.read(&field)?.unwrap_or(0) {
            0 => Ok(0),
            _ if policy != DEADLINE => {
                Err(Error::invalid(field, "needs the policy SCHED_DEADLINE"))
            }
            value => Ok(value),
        }
    };
    Ok(Some(Scheduler {
        policy,
        flags,
        nice,
        priority,
        runtime: nanoseconds("runtime")?,
        deadline: nanoseconds("deadline")?,
        period: nanoseconds("period")?,
    }))
}

/// The value for ioprio_set(2).
pub(super) fn io_priority(spec: &Document) -> Result<Option<u16>, Error> {
    if spec.get("process.ioPriority").is_none() {
        return Ok(None);
    }
    const CLASS: &str = "process.ioPriority.class";
    let class = match spec.string(CLASS)? {
        None => return Err(Error::invalid(CLASS, "is missing")),
        Some(name) => known(&IO_CLASSES, CLASS, &name)?,
    };
    match spec.read::<i64>("process.ioPriority.priority")?.unwrap_or(0) {
        priority @ 0..=7 => Ok(Some(class << IO_CLASS_SHIFT | priority as u16)),
        _ => Err(Error::invalid("process.ioPriority.priority", "is not within 0 to 7")),
    }
}

/// Which processors an exec may use, before and after it enters the container's cgroup.
pub(super) fn exec_cpu_affinity(spec: &Document) -> Result<ExecCpuAffinity, Error> {
    let read = |name: &str| {
        let field = format!("process.execCPUAffinity.{name}");
        spec.string(&field)?.map(|list| set(&field, &list, MAX_CPUS)).transpose()
    };
    Ok(ExecCpuAffinity { initial: read("initial")?, last: read("final")? })
}

pub(super) fn memory_policy(spec: &Document) -> Result<Option<MemoryPolicy>, Error> {
    if spec.get("linux.memoryPolicy").is_none() {
        return Ok(None);
    }
    const MODE: &str = "linux.memoryPolicy.mode";
    const NODES: &str = "linux.memoryPolicy.nodes";
    let mut mode = match spec.string(MODE)? {
        None => return Err(Error::invalid(MODE, "is missing")),
        Some(name) => known(&MEMORY_MODES, MODE, &name)?,
    };
    for item in spec.list::<String>("linux.memoryPolicy.flags")? {
        mode |= known(&MEMORY_FLAGS, &item.field, &item.value)?;
    }
    let nodes = spec.string(NODES)?.map(|list| set(NODES, &list, MAX_NODES)).transpose()?;
    Ok(Some(MemoryPolicy { mode, nodes: nodes.unwrap_or_default() }))
}

fn known<T: Copy>(table: &[(&str, T)], field: &str, name: &str) -> Result<T, Error> {
    match table.iter().find(|(known, _)| *known == name) {
        Some((_, value)) => Ok(*value),
        None => Err(Error::invalid(field, format!("has the unknown value {name:?}"))),
    }
}

/// A list of numbers below `limit`.
fn set(field: &str, list: &str, limit: u32) -> Result<BitSet, Error> {
    let wrong = || Error::invalid(field, "is not a list such as 0-3,7");
    let mut set = BitSet::default();
    for range in list.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let number = |text: &str| -> Result<u32, Error> {
            let text = text.trim();
            match text.parse() {
                Ok(number) if text.bytes().all(|b| b.is_ascii_digit()) => Ok(number),
                _ => Err(wrong()),
            }
        };
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return Err(wrong());
        }
        if last >= limit {
            return Err(Error::invalid(field, format!("has a number above {}", limit - 1)));
        }
        for number in first..=last {
            let word = (number / u64::BITS) as usize;
            set.0.resize(set.0.len().max(word + 1), 0);
            set.0[word] |= 1 << (number % u64::BITS);
        }
    }
    Ok(set)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(process: &str) -> Document {
        Document::parse(format!(r#"{{"process":{process}}}"#).as_bytes()).unwrap()
    }

    fn scheduler_of(json: &str) -> Result<Option<Scheduler>, String> {
        scheduler(&spec(&format!(r#"{{"scheduler":{json}}}"#))).map_err(|error| error.to_string())
    }

    #[test]
    fn each_policy_and_flag_has_the_kernel_s_number() {
        for (name, number) in [("SCHED_OTHER", 0), ("SCHED_BATCH", 3), ("SCHED_IDLE", 5)] {
            let read = scheduler_of(&format!(r#"{{"policy":"{name}","nice":-20}}"#)).unwrap();
            let wanted = Scheduler { policy: number, nice: -20, ..Scheduler::default() };
            assert_eq!(read, Some(wanted));
        }
        let read = scheduler_of(
            r#"{"policy":"SCHED_DEADLINE","runtime":1,"deadline":2,"period":3,
            "flags":["SCHED_FLAG_RESET_ON_FORK","SCHED_FLAG_DL_OVERRUN"]}"#,
        );
        let wanted = Scheduler {
            policy: 6,
            flags: 5,
            runtime: 1,
            deadline: 2,
            period: 3,
            ..Scheduler::default()
        };
        assert_eq!(read.unwrap(), Some(wanted));
        let read = scheduler_of(r#"{"policy":"SCHED_RR","priority":7}"#).unwrap();
        assert_eq!(read, Some(Scheduler { policy: 2, priority: 7, ..Scheduler::default() }));
        assert_eq!(scheduler(&spec("{}")).unwrap(), None);
    }

    #[test]
    fn contradictions_are_refused_by_name() {
        for (json, expected) in [
            ("{}", "process.scheduler.policy is missing"),
            (r#"{"policy":"SCHED_NEW"}"#, "process.scheduler.policy has the unknown value"),
            (r#"{"policy":"SCHED_ISO"}"#, "process.scheduler.policy SCHED_ISO is not supported"),
            (r#"{"policy":"SCHED_OTHER","nice":20}"#, "process.scheduler.nice is not"),
            (r#"{"policy":"SCHED_OTHER","priority":1}"#, "process.scheduler.priority needs"),
            (r#"{"policy":"SCHED_RR","priority":-1}"#, "process.scheduler.priority is negative"),
            (r#"{"policy":"SCHED_RR","period":1}"#, "process.scheduler.period needs"),
            (r#"{"policy":"SCHED_RR","flags":["X"]}"#, "process.scheduler.flags[0] has the"),
        ] {
            let error = scheduler_of(json).unwrap_err();
            assert!(error.starts_with(expected), "{json}: {error}");
        }
    }

    #[test]
    fn io_priority_is_class_and_level() {
        let read = |json: &str| {
            io_priority(&spec(&format!(r#"{{"ioPriority":{json}}}"#))).map_err(|e| e.to_string())
        };
        assert_eq!(read(r#"{"class":"IOPRIO_CLASS_BE","priority":5}"#), Ok(Some(0x4005)));
        assert_eq!(read(r#"{"class":"IOPRIO_CLASS_IDLE"}"#), Ok(Some(0x6000)));
        assert!(read(r#"{"class":"IOPRIO_CLASS_RT","priority":8}"#).is_err());
        assert!(read(r#"{"class":"RT"}"#).is_err());
        assert!(read("{}").unwrap_err().starts_with("process.ioPriority.class is missing"));
    }

    #[test]
    fn lists_become_masks() {
        let set = |list| set("f", list, MAX_CPUS).map(|set| set.0).map_err(|e| e.to_string());
        assert_eq!(set("0"), Ok(vec![1]));
        assert_eq!(set("0-1, 3,64"), Ok(vec![0b1011, 1]));
        for wrong in ["", ",", "1-", "-1", "2-1", "a", "+1", "0-8192", "99999999999"] {
            assert!(set(wrong).is_err(), "{wrong}");
        }
        let read =
            exec_cpu_affinity(&spec(r#"{"execCPUAffinity":{"initial":"1","final":""}}"#)).unwrap();
        assert_eq!(read, ExecCpuAffinity { initial: Some(BitSet(vec![2])), last: None });
    }

    #[test]
    fn memory_policies_have_the_kernel_s_numbers() {
        let read = |json: &str| {
            let json = format!(r#"{{"linux":{{"memoryPolicy":{json}}}}}"#);
            memory_policy(&Document::parse(json.as_bytes()).unwrap()).map_err(|e| e.to_string())
        };
        let bind = r#"{"mode":"MPOL_BIND","nodes":"0,2","flags":["MPOL_F_STATIC_NODES"]}"#;
        let wanted = MemoryPolicy { mode: 2 | 1 << 15, nodes: BitSet(vec![5]) };
        assert_eq!(read(bind), Ok(Some(wanted)));
        assert_eq!(read(r#"{"mode":"MPOL_DEFAULT"}"#), Ok(Some(MemoryPolicy::default())));
        for (json, expected) in [
            (r#"{"nodes":"0"}"#, "linux.memoryPolicy.mode is missing"),
            (r#"{"mode":"BIND"}"#, "linux.memoryPolicy.mode has the unknown value"),
            (r#"{"mode":"MPOL_BIND","nodes":"x"}"#, "linux.memoryPolicy.nodes is not a list"),
            (r#"{"mode":"MPOL_BIND","nodes":"1024"}"#, "linux.memoryPolicy.nodes has a number"),
            (r#"{"mode":"MPOL_BIND","flags":["X"]}"#, "linux.memoryPolicy.flags[0] has the"),
        ] {
            let error = read(json).unwrap_err();
            assert!(error.starts_with(expected), "{json}: {error}");
        }
    }
}
