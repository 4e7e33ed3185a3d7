//! The LXC configuration that a CT configuration turns into.
//!
//! Lines and their order are those of the golden pairs in `fixtures/lxc-config`. Everything the
//! node itself decides (controllers, bridges, files below `/usr/share/lxc`) comes from [`Host`].

use std::path::PathBuf;

use rand::seq::index::sample;

use crate::conf::{Config, Section};
use crate::params::{parse_bool, split_list, split_props};

/// What the generator must know about the node.
#[derive(Debug, Clone)]
pub struct Host {
    /// Parent of the CTs' directories; `/var/lib/lxc` on a real node.
    pub lxc_path: PathBuf,
    /// Where `common.conf` and its like are; `/usr/share/lxc/config` on a real node.
    pub config_dir: PathBuf,
    /// Names of the files in `config_dir`.
    pub config_files: Vec<String>,
    /// Whether cgroup2 has the memory controller. Without it Proxmox VE writes no such line.
    pub memory: bool,
    /// Whether cgroup2 has the cpu controller.
    pub cpu: bool,
    /// The CPUs to choose from for `cores`; empty if cgroup2 has no cpuset controller.
    pub cpus: Vec<u32>,
    /// Looks up the MTU of a bridge; `None` if there is no such bridge.
    pub bridge_mtu: fn(&str) -> Option<u32>,
    /// Looks up a device node as (is block device, major, minor).
    pub device: fn(&str) -> Option<(bool, u32, u32)>,
}

/// What a start needs besides the configuration file itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generated {
    /// Content of `LXCPATH/VMID/config`.
    pub config: String,
    /// Rules to add to `common.seccomp` for `LXCPATH/VMID/rules.seccomp`, if that is used.
    pub seccomp: Option<String>,
    /// Warnings for the log.
    pub warnings: Vec<String>,
}

const MIB: i64 = 1024 * 1024;

/// Generates the LXC configuration. The error is the text a start fails with.
pub fn generate(config: &Config, vmid: u32, host: &Host) -> Result<Generated, String> {
    let conf = &config.current;
    let mut g = Lines::default();
    let features = Features::parse(conf);
    let custom_idmap = conf.raw_values("lxc.idmap").next().is_some();
    let unprivileged = conf.flag("unprivileged") || custom_idmap;
    let ct_dir = host.lxc_path.join(vmid.to_string());
    let ct_dir = ct_dir.display();

    let internal = |key: &str, line: u32| {
        format!("missing '{key}' - internal error at /usr/share/perl5/PVE/LXC.pm line {line}.")
    };
    let arch = conf.text("arch").ok_or_else(|| internal("arch", 729))?;
    let ostype = conf.text("ostype").ok_or_else(|| internal("ostype", 735))?;
    if !conf.has("rootfs") {
        return Err("missing 'rootfs' configuration".into());
    }

    g.put("lxc.cgroup.relative", 0);
    g.put("lxc.cgroup.dir.monitor", format!("lxc.monitor/{vmid}"));
    g.put("lxc.cgroup.dir.container", format!("lxc/{vmid}"));
    g.put("lxc.cgroup.dir.container.inner", "ns");
    g.put("lxc.arch", arch);
    g.put("lxc.include", host.include(&ostype, "common.conf"));
    let mut seccomp = None;
    if unprivileged {
        g.put("lxc.include", host.include(&ostype, "userns.conf"));
        if conf.raw_values("lxc.seccomp.profile").next().is_none() {
            if features.mknod {
                g.put("lxc.seccomp.notify.proxy", "unix:/run/pve-lxc-syscalld/socket");
                g.put("lxc.seccomp.notify.cookie", vmid);
            }
            g.put("lxc.seccomp.profile", format!("{ct_dir}/rules.seccomp"));
            seccomp = Some(features.seccomp_rules());
        }
    }
    let warnings = apparmor(&mut g, conf, &features);
    if unprivileged && !features.force_rw_sys {
        g.put("lxc.mount.auto", "sys:mixed");
    }
    let entrypoint = conf.text("entrypoint");
    if entrypoint.as_deref().is_some_and(|e| e != "/sbin/init") {
        g.put("lxc.mount.entry", "shm dev/shm tmpfs rw,nosuid,nodev,create=dir 0 0");
    }
    devices(&mut g, conf, host)?;
    g.put("lxc.monitor.unshare", 1);
    if unprivileged && !custom_idmap {
        g.put("lxc.idmap", "u 0 100000 65536");
        g.put("lxc.idmap", "g 0 100000 65536");
    }
    if conf.int("console") == Some(0) {
        g.put("lxc.console.path", "none");
        g.put("lxc.cgroup2.devices.deny", "c 5:1 rwm");
    }
    g.put("lxc.tty.max", conf.int("tty").unwrap_or(2));
    g.put("lxc.environment", "TERM=linux");
    g.put("lxc.uts.name", conf.text("hostname").unwrap_or_else(|| format!("CT{vmid}")));
    resources(&mut g, conf, host);
    g.put("lxc.rootfs.path", format!("{ct_dir}/rootfs"));
    if let Some(cmd) = entrypoint {
        g.put("lxc.init.cmd", cmd);
    }
    networks(&mut g, conf, vmid, host)?;
    if let Some(env) = conf.text("env") {
        for entry in env.split('\0') {
            g.put("lxc.environment.runtime", entry);
        }
    }
    for (key, value) in &conf.raw {
        g.put(key, value);
    }
    cpuset(&mut g, conf, host);
    Ok(Generated { config: g.0, seccomp, warnings })
}

/// The limits that a running CT gets, in the form of cgroup2. `None` leaves the default.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Bytes of memory.
    pub memory: i64,
    /// Bytes of swap alone.
    pub swap: i64,
    /// CPUs' worth of time.
    pub cpulimit: Option<f64>,
    /// Weight, as configured.
    pub cpuunits: Option<i64>,
}

impl Limits {
    /// Reads the limits of a configuration, with Proxmox VE's defaults.
    pub fn of(conf: &Section) -> Self {
        // Perl takes a text that is no number as 0 here, and so do real nodes.
        let mib = |key: &str, default: i64| match conf.has(key) {
            true => conf.int(key).unwrap_or(0).saturating_mul(MIB),
            false => default * MIB,
        };
        Self {
            memory: mib("memory", 512),
            swap: mib("swap", 0),
            cpulimit: conf.text("cpulimit").and_then(|t| t.parse().ok()).filter(|n| *n > 0.0),
            cpuunits: conf.int("cpuunits"),
        }
    }

    /// The threshold from which the CT is throttled, in bytes.
    pub fn memory_high(&self) -> i64 {
        if self.memory >= 16 * 1024 * MIB {
            self.memory - 128 * MIB
        } else {
            (i128::from(self.memory) * 1016 / 1024) as i64
        }
    }

    /// The value of `cpu.max`, microseconds of time and of the period.
    pub fn cpu_max(&self) -> String {
        match self.cpulimit {
            Some(n) => format!("{} 100000", (n * 100_000.0) as i64),
            None => "max 100000".into(),
        }
    }

    /// The value of `cpu.weight`.
    pub fn cpu_weight(&self) -> i64 {
        self.cpuunits.unwrap_or(100).clamp(1, 10_000)
    }
}

#[derive(Default)]
struct Lines(String);

impl Lines {
    fn put(&mut self, key: &str, value: impl std::fmt::Display) {
        self.0.push_str(&format!("{key} = {value}\n"));
    }
}

impl Host {
    /// The include for an operating system, or the general one.
    fn include(&self, ostype: &str, kind: &str) -> String {
        let special = format!("{ostype}.{kind}");
        let name = if self.config_files.contains(&special) { special } else { kind.to_owned() };
        self.config_dir.join(name).display().to_string()
    }
}

#[derive(Debug, Default)]
struct Features {
    force_rw_sys: bool,
    fuse: bool,
    keyctl: bool,
    mknod: bool,
    nesting: bool,
    mount: Vec<String>,
    names: Vec<String>,
}

impl Features {
    fn parse(conf: &Section) -> Self {
        let mut features = Self::default();
        for (key, value) in split_props("", &conf.text("features").unwrap_or_default()) {
            let on = parse_bool(&value).unwrap_or(false);
            match key.as_str() {
                "force_rw_sys" => features.force_rw_sys = on,
                "fuse" => features.fuse = on,
                "keyctl" => features.keyctl = on,
                "mknod" => features.mknod = on,
                "nesting" => features.nesting = on,
                "mount" => {
                    features.mount = split_list(&value).iter().map(|s| (*s).to_owned()).collect();
                }
                _ => continue,
            }
            features.names.push(key);
        }
        features
    }

    fn seccomp_rules(&self) -> String {
        let mut rules = String::from("ioctl errno 1 [1,0x9400,SCMP_CMP_MASKED_EQ,0xff00]\n");
        if !self.keyctl {
            rules.push_str("keyctl errno 38\n");
        }
        if self.mknod {
            for (call, arg) in [("mknod", 1), ("mknodat", 2)] {
                for kind in [8192, 24576] {
                    rules.push_str(&format!(
                        "{call} notify [{arg},{kind},SCMP_CMP_MASKED_EQ,61440]\n"
                    ));
                }
            }
        }
        rules.push_str("socket errno 97 [0,38,SCMP_CMP_EQ]\n");
        rules
    }
}

fn apparmor(g: &mut Lines, conf: &Section, features: &Features) -> Vec<String> {
    let explicit = conf.raw_values("lxc.apparmor.profile").next().is_some();
    let mut warnings = Vec::new();
    if explicit {
        let lost: Vec<_> = features
            .names
            .iter()
            .filter(|n| matches!(n.as_str(), "nesting" | "fuse" | "mount"))
            .map(|n| format!("features:{n}"))
            .collect();
        if !lost.is_empty() {
            warnings.push(format!(
                "explicitly configured lxc.apparmor.profile overrides the following settings: {}",
                lost.join(", ")
            ));
        }
    } else {
        g.put("lxc.apparmor.profile", "generated");
        g.put("lxc.apparmor.raw", "allow mqueue,");
        if features.nesting {
            g.put("lxc.apparmor.allow_nesting", 1);
            g.put("lxc.apparmor.raw", "allow userns,");
        } else {
            g.put("lxc.apparmor.raw", "deny mount -> /proc/,");
            g.put("lxc.apparmor.raw", "deny mount -> /sys/,");
        }
        for fs in &features.mount {
            g.put("lxc.apparmor.raw", format!("mount fstype={fs},"));
        }
        if features.fuse {
            g.put("lxc.apparmor.raw", "mount fstype=fuse,");
        }
    }
    if features.fuse {
        g.put("lxc.mount.entry", "/dev/fuse dev/fuse none bind,create=file 0 0");
    }
    warnings
}

/// Keys of the form `PREFIXn` with their index, in ascending order.
fn indexed<'a>(conf: &'a Section, prefix: &'a str) -> Vec<(u32, String, String)> {
    let mut list: Vec<_> = conf
        .values
        .iter()
        .filter_map(|(key, value)| {
            let n = key.strip_prefix(prefix)?.parse().ok()?;
            Some((n, key.clone(), value.to_text()))
        })
        .collect();
    list.sort();
    list
}

fn devices(g: &mut Lines, conf: &Section, host: &Host) -> Result<(), String> {
    // A real node goes through a Perl hash here, so any order can occur; the recordings have the
    // last device first.
    for (_, key, value) in indexed(conf, "dev").into_iter().rev() {
        let props = split_props("path", &value);
        let get = |name: &str| props.iter().find(|(k, _)| k == name).map(|(_, v)| v.as_str());
        let path = get("path").unwrap_or_default();
        let (block, major, minor) =
            (host.device)(path).ok_or_else(|| format!("{key}: Device {path} does not exist"))?;
        let kind = if block { 'b' } else { 'c' };
        if get("deny-write").and_then(parse_bool).unwrap_or(false) {
            g.put("lxc.cgroup2.devices.allow", format!("{kind} {major}:{minor} r"));
            g.put("lxc.cgroup2.devices.deny", format!("{kind} {major}:{minor} w"));
        } else {
            g.put("lxc.cgroup2.devices.allow", format!("{kind} {major}:{minor} rw"));
        }
    }
    Ok(())
}

fn resources(g: &mut Lines, conf: &Section, host: &Host) {
    let limits = Limits::of(conf);
    if host.memory {
        g.put("lxc.cgroup2.memory.max", limits.memory);
        g.put("lxc.cgroup2.memory.high", limits.memory_high());
        g.put("lxc.cgroup2.memory.swap.max", limits.swap);
    }
    if host.cpu {
        if limits.cpulimit.is_some() {
            g.put("lxc.cgroup2.cpu.max", limits.cpu_max());
        }
        if limits.cpuunits.is_some() {
            g.put("lxc.cgroup2.cpu.weight", limits.cpu_weight());
        }
    }
}

fn networks(g: &mut Lines, conf: &Section, vmid: u32, host: &Host) -> Result<(), String> {
    for (n, key, value) in indexed(conf, "net") {
        let props = split_props("name", &value);
        let get = |name: &str| props.iter().find(|(k, _)| k == name).map(|(_, v)| v.as_str());
        let mut mtu = get("mtu").map(str::to_owned);
        if let Some(bridge) = get("bridge") {
            let limit = (host.bridge_mtu)(bridge)
                .ok_or_else(|| format!("bridge '{bridge}' does not exist"))?;
            if let Some(m) = mtu.as_deref().and_then(|m| m.parse::<u32>().ok())
                && m > limit
            {
                return Err(format!("{key}: MTU size '{m}' is bigger than bridge MTU '{limit}'"));
            }
            mtu = mtu.or_else(|| Some(limit.to_string()));
        }
        let mut put = |suffix: &str, value: &str| g.put(&format!("lxc.net.{n}.{suffix}"), value);
        put("type", "veth");
        put("veth.pair", &format!("veth{vmid}i{n}"));
        if let Some(mac) = get("hwaddr") {
            put("hwaddr", mac);
        }
        put("name", get("name").unwrap_or_default());
        if let Some(mtu) = mtu {
            put("mtu", &mtu);
        }
        put("script.up", "/usr/share/lxc/lxcnetaddbr");
        if get("host-managed").and_then(parse_bool).unwrap_or(false) {
            let fixed = |v: &&str| !matches!(*v, "dhcp" | "auto" | "manual");
            for (family, addr, gateway) in [("ipv4", "ip", "gw"), ("ipv6", "ip6", "gw6")] {
                if let Some(address) = get(addr).filter(fixed) {
                    put(&format!("{family}.address"), address);
                    if let Some(gateway) = get(gateway) {
                        put(&format!("{family}.gateway"), gateway);
                    }
                }
            }
            put("flags", "up");
        }
    }
    Ok(())
}

fn cpuset(g: &mut Lines, conf: &Section, host: &Host) {
    let raw = ["lxc.cgroup2.cpuset.cpus", "lxc.cgroup.cpuset.cpus"];
    let set = raw.iter().any(|k| conf.raw_values(k).next().is_some());
    let cores = conf.int("cores").unwrap_or(0).max(0) as usize;
    if set || cores == 0 || host.cpus.is_empty() {
        return;
    }
    let count = cores.min(host.cpus.len());
    let mut chosen: Vec<u32> = sample(&mut rand::rng(), host.cpus.len(), count)
        .into_iter()
        .map(|i| host.cpus[i])
        .collect();
    chosen.sort_unstable();
    g.put("lxc.cgroup2.cpuset.cpus", short_list(&chosen));
}

/// `0,2-3` for 0, 2 and 3.
fn short_list(cpus: &[u32]) -> String {
    let mut parts: Vec<String> = Vec::new();
    let mut i = 0;
    while i < cpus.len() {
        let mut j = i;
        while j + 1 < cpus.len() && cpus[j + 1] == cpus[j] + 1 {
            j += 1;
        }
        parts.push(if i == j { cpus[i].to_string() } else { format!("{}-{}", cpus[i], cpus[j]) });
        i = j + 1;
    }
    parts.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{conf, golden};

    /// The node of the recordings, with all controllers.
    fn stock() -> Host {
        let special = [
            "alpine",
            "archlinux",
            "centos",
            "debian",
            "devuan",
            "fedora",
            "gentoo",
            "opensuse",
            "ubuntu",
        ];
        Host {
            lxc_path: "/var/lib/lxc".into(),
            config_dir: "/usr/share/lxc/config".into(),
            config_files: special
                .iter()
                .flat_map(|o| [format!("{o}.common.conf"), format!("{o}.userns.conf")])
                .collect(),
            memory: true,
            cpu: true,
            cpus: (0..8).collect(),
            bridge_mtu: |bridge| (bridge == "vmbr0").then_some(1500),
            device: |path| match path {
                "/dev/fuse" => Some((false, 10, 229)),
                "/dev/null" => Some((false, 1, 3)),
                _ => None,
            },
        }
    }

    fn count(list: &str) -> usize {
        list.split(',')
            .map(|part| match part.split_once('-') {
                Some((a, b)) => b.parse::<usize>().unwrap() - a.parse::<usize>().unwrap() + 1,
                None => 1,
            })
            .sum()
    }

    /// Replaces the random choice of CPUs by the placeholder of the recordings.
    fn normalised(text: &str, conf: &str) -> String {
        text.lines()
            .map(|line| match line.strip_prefix("lxc.cgroup2.cpuset.cpus = ") {
                Some(list) if !conf.contains("cpuset") => {
                    format!("lxc.cgroup2.cpuset.cpus = @CPUSET:{}@\n", count(list))
                }
                _ => format!("{line}\n"),
            })
            .collect()
    }

    #[test]
    fn every_golden_file_generates_the_recorded_lxc_configuration() {
        for case in golden::cases() {
            let (config, _) = conf::parse(&case.conf, 500);
            let got = generate(&config, 500, &stock());
            match (case.text("lxc"), case.text("error")) {
                (Some(lxc), None) => {
                    let got = got.unwrap();
                    assert_eq!(normalised(&got.config, &case.conf), lxc, "{}", case.name);
                    assert_eq!(got.seccomp, case.text("seccomp"), "{}", case.name);
                    let warn = case.text("warn").unwrap_or_default();
                    for warning in got.warnings {
                        assert!(warn.contains(&warning), "{}: {warning}", case.name);
                    }
                }
                (None, Some(error)) => {
                    assert_eq!(got.unwrap_err(), error.trim_end(), "{}", case.name);
                }
                // A template has no generated file.
                (None, None) => {
                    assert_eq!(config.current.int("template"), Some(1), "{}", case.name)
                }
                (Some(_), Some(_)) => panic!("{}: both a result and an error", case.name),
            }
        }
    }

    #[test]
    fn without_controllers_their_lines_are_left_out() {
        let case = golden::case("resources-all");
        let (config, _) = conf::parse(&case.conf, 500);
        let host = Host { memory: false, cpu: false, cpus: Vec::new(), ..stock() };
        let got = generate(&config, 500, &host).unwrap().config;
        let expected: String = case
            .text("lxc")
            .unwrap()
            .lines()
            .filter(|l| !l.starts_with("lxc.cgroup2."))
            .map(|l| format!("{l}\n"))
            .collect();
        assert_eq!(got, expected);
    }

    #[test]
    fn cpu_lists_are_short() {
        assert_eq!(short_list(&[0, 2, 3, 4, 6]), "0,2-4,6");
        assert_eq!(short_list(&[1]), "1");
    }
}
