//! Ids of Proxmox's asynchronous tasks.

use std::fmt;
use std::str::FromStr;

/// A task's id: `UPID:NODE:PID:PSTART:STARTTIME:TYPE:ID:USER:`, the middle three in hexadecimal.
///
/// Displays exactly as it was received, because Proxmox looks the task up by that text.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Upid {
    text: String,
    node: String,
    pid: u32,
    pstart: u64,
    starttime: u64,
    kind: String,
    id: String,
    user: String,
}

/// The text is not a UPID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a Proxmox task id (UPID)")]
pub struct InvalidUpid(String);

impl Upid {
    /// The node that runs the task.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// The worker's process id on that node.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The worker's start time in clock ticks since the node's boot, as in `/proc/PID/stat`.
    pub fn pstart(&self) -> u64 {
        self.pstart
    }

    /// When the task was started, in seconds since the epoch by the node's clock.
    pub fn starttime(&self) -> u64 {
        self.starttime
    }

    /// The task's type, such as `vzstart`.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// What the task acts on: a VMID for the types the shim starts; may be empty for others.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// `USER@REALM` or `USER@REALM!TOKENID`.
    pub fn user(&self) -> &str {
        &self.user
    }
}

impl fmt::Display for Upid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for Upid {
    type Err = InvalidUpid;

    fn from_str(s: &str) -> Result<Upid, InvalidUpid> {
        parse(s)
            .ok_or_else(|| InvalidUpid(s.chars().take(256).flat_map(char::escape_debug).collect()))
    }
}

fn parse(s: &str) -> Option<Upid> {
    // The text goes into a request's path as it is, so nothing may pass that has a meaning there.
    let safe = |b: u8| b.is_ascii_graphic() && !b"/?#%\\".contains(&b);
    if s.len() > 1024 || !s.bytes().all(safe) {
        return None;
    }
    let mut parts = s.split(':');
    if parts.next()? != "UPID" {
        return None;
    }
    let node = parts.next().filter(|node| is_node(node))?;
    let pid = hex(parts.next()?, 8..=8)?;
    // Nine digits after 497 days of uptime.
    let pstart = hex(parts.next()?, 8..=9)?;
    let starttime = hex(parts.next()?, 8..=8)?;
    let kind = parts.next().filter(|kind| !kind.is_empty())?;
    let id = parts.next()?;
    let user = parts.next().filter(|user| !user.is_empty())?;
    if parts.next() != Some("") || parts.next().is_some() {
        return None;
    }
    Some(Upid {
        text: s.to_owned(),
        node: node.to_owned(),
        pid: u32::try_from(pid).ok()?,
        pstart,
        starttime,
        kind: kind.to_owned(),
        id: id.to_owned(),
        user: user.to_owned(),
    })
}

fn is_node(s: &str) -> bool {
    !s.is_empty()
        && !s.starts_with('-')
        && !s.ends_with('-')
        && s.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

fn hex(s: &str, digits: std::ops::RangeInclusive<usize>) -> Option<u64> {
    let good = digits.contains(&s.len()) && s.bytes().all(|b| b.is_ascii_hexdigit());
    if good { u64::from_str_radix(s, 16).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn takes_a_recorded_one_apart() {
        let text = "UPID:pve1:00000500:000500F1:6B01F13F:vzstart:110:root@pam!full:";
        let upid: Upid = text.parse().unwrap();
        assert_eq!(upid.to_string(), text);
        assert_eq!(upid.node(), "pve1");
        assert_eq!((upid.pid(), upid.pstart(), upid.starttime()), (1280, 327_921, 1_795_289_407));
        assert_eq!((upid.kind(), upid.id(), upid.user()), ("vzstart", "110", "root@pam!full"));
    }

    #[test]
    fn the_id_may_be_empty_and_pstart_long() {
        let text = "UPID:pve1:00000500:1000500F1:6B01F13F:imgcopy::root@pam:";
        assert_eq!(text.parse::<Upid>().unwrap().id(), "");
    }

    #[test]
    fn refuses_what_is_none_or_could_leave_its_place_in_a_path() {
        let good = "UPID:pve1:00000500:000500F1:6B01F13F:vzstart:110:root@pam:";
        good.parse::<Upid>().unwrap();
        let cases = [
            "",
            "UPID",
            "garbage",
            &good[..good.len() - 1],
            &format!("{good}x"),
            &format!("{good}:"),
            &good.replace("pve1", ""),
            &good.replace("pve1", "../x"),
            &good.replace("110", "../../x"),
            &good.replace("110", "a b"),
            &good.replace("110", "a%2f"),
            &good.replace("110", "a?b"),
            &good.replace("00000500", "0000050"),
            &good.replace("00000500", "+0000500"),
            &good.replace("root@pam", ""),
            &good.replace("vzstart", ""),
            &good.replace("110", "1\n"),
        ];
        for case in cases {
            assert!(case.parse::<Upid>().is_err(), "{case}");
        }
    }

    proptest! {
        #[test]
        fn any_upid_comes_back(
            node in "[a-zA-Z0-9]([a-zA-Z0-9-]{0,10}[a-zA-Z0-9])?",
            pid: u32, pstart in 0u64..1 << 36, starttime: u32,
            kind in "[a-z]{1,12}", id in "[a-z0-9.-]{0,12}", user in "[a-z]{1,8}@[a-z]{1,5}(![a-z]{1,5})?",
        ) {
            let text = format!("UPID:{node}:{pid:08X}:{pstart:08X}:{starttime:08X}:{kind}:{id}:{user}:");
            let upid: Upid = text.parse().unwrap();
            prop_assert_eq!(upid.to_string(), text);
            prop_assert_eq!((upid.pid(), upid.pstart(), upid.starttime()), (pid, pstart, u64::from(starttime)));
            prop_assert_eq!((upid.node(), upid.kind()), (node.as_str(), kind.as_str()));
            prop_assert_eq!((upid.id(), upid.user()), (id.as_str(), user.as_str()));
        }

        #[test]
        fn what_parses_displays_the_same(text in "(UPID)?[:0-9A-F\\PC]{0,80}") {
            if let Ok(upid) = text.parse::<Upid>() {
                prop_assert_eq!(upid.to_string(), text);
            }
        }
    }
}
