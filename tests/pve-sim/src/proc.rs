//! What `/proc` says about processes and the host.

use std::fs;
use std::sync::OnceLock;

/// Clock ticks per second in `/proc`.
const HZ: u64 = 100;

/// Seconds since the boot.
pub fn uptime() -> f64 {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    text.split(' ').next().and_then(|t| t.parse().ok()).unwrap_or(0.0)
}

/// Clock ticks since the boot.
pub fn uptime_ticks() -> u64 {
    (uptime() * HZ as f64) as u64
}

/// The start of a process in clock ticks since the boot; `None` if it does not exist.
pub fn start_ticks(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may contain anything, so count from its closing parenthesis.
    let rest = text.rsplit_once(") ")?.1;
    rest.split(' ').nth(19)?.parse().ok()
}

/// Whole seconds that a process has existed.
pub fn age(pid: u32) -> Option<u64> {
    start_ticks(pid).map(|start| uptime_ticks().saturating_sub(start) / HZ)
}

/// The number of CPUs of the host, asked once: it is slow to find out.
pub fn cpus() -> usize {
    static CPUS: OnceLock<usize> = OnceLock::new();
    *CPUS.get_or_init(|| std::thread::available_parallelism().map_or(1, |n| n.get()))
}

/// A value of `/proc/meminfo` in bytes.
pub fn meminfo(text: &str, key: &str) -> u64 {
    text.lines()
        .find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))
        .and_then(|v| v.trim().trim_end_matches(" kB").parse::<u64>().ok())
        .unwrap_or(0)
        * 1024
}

/// Bytes received and sent by the host's end of a CT's interfaces, as the CT sees them.
pub fn net_traffic(vmid: u32) -> (u64, u64) {
    let text = fs::read_to_string("/proc/net/dev").unwrap_or_default();
    let prefix = format!("veth{vmid}i");
    let mut total = (0, 0);
    for line in text.lines().filter(|l| l.trim_start().starts_with(&prefix)) {
        let Some((_, figures)) = line.split_once(':') else { continue };
        let figures: Vec<u64> = figures.split_whitespace().filter_map(|n| n.parse().ok()).collect();
        // What the host receives is what the CT sends.
        total.0 += figures.get(8).unwrap_or(&0);
        total.1 += figures.first().unwrap_or(&0);
    }
    total
}
