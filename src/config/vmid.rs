//! VMIDs and ranges of them.

use std::fmt;
use std::str::FromStr;

/// The id of a Proxmox guest, 100 to 999999999 (the API's `pve-vmid` format).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Vmid(u32);

impl Vmid {
    /// The lowest VMID; Proxmox keeps those below for itself.
    pub const MIN: u32 = 100;
    /// The highest VMID.
    pub const MAX: u32 = 999_999_999;

    /// `None` outside [`Vmid::MIN`]..=[`Vmid::MAX`].
    pub fn new(id: u32) -> Option<Vmid> {
        (Vmid::MIN..=Vmid::MAX).contains(&id).then_some(Vmid(id))
    }

    /// The plain number.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Vmid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The text is not a VMID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a VMID (100 to 999999999)")]
pub struct InvalidVmid(String);

impl FromStr for Vmid {
    type Err = InvalidVmid;

    /// Plain decimal digits without sign or leading zero, as in `<vmid>.conf`.
    fn from_str(s: &str) -> Result<Vmid, InvalidVmid> {
        let plain = !s.starts_with('0') && s.bytes().all(|b| b.is_ascii_digit());
        let number = if plain { s.parse().ok() } else { None };
        number.and_then(Vmid::new).ok_or_else(|| InvalidVmid(s.to_owned()))
    }
}

/// The VMIDs the shim may claim, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmidRange {
    first: Vmid,
    last: Vmid,
}

impl VmidRange {
    /// `None` if `first` is above `last`.
    pub fn new(first: Vmid, last: Vmid) -> Option<VmidRange> {
        (first <= last).then_some(VmidRange { first, last })
    }

    /// The lowest VMID of the range.
    pub fn first(self) -> Vmid {
        self.first
    }

    /// The highest VMID of the range.
    pub fn last(self) -> Vmid {
        self.last
    }

    /// How many VMIDs the range has; never 0.
    #[allow(clippy::len_without_is_empty)] // a range is never empty
    pub fn len(self) -> u32 {
        self.last.0 - self.first.0 + 1
    }

    /// Whether `id` is in the range.
    pub fn contains(self, id: Vmid) -> bool {
        (self.first..=self.last).contains(&id)
    }

    /// The VMID after `id`; wraps, and starts over for an id outside the range.
    pub fn after(self, id: Vmid) -> Vmid {
        if self.contains(id) && id < self.last { Vmid(id.0 + 1) } else { self.first }
    }
}

impl fmt::Display for VmidRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl FromStr for VmidRange {
    type Err = InvalidVmid;

    /// `FIRST-LAST`.
    fn from_str(s: &str) -> Result<VmidRange, InvalidVmid> {
        let invalid = || InvalidVmid(s.to_owned());
        let (first, last) = s.split_once('-').ok_or_else(invalid)?;
        VmidRange::new(first.trim().parse()?, last.trim().parse()?).ok_or_else(invalid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_only_what_proxmox_accepts() {
        for good in ["100", "90000", "999999999"] {
            assert_eq!(good.parse::<Vmid>().unwrap().to_string(), good);
        }
        for bad in ["", "99", "0100", "+100", "-100", " 100", "1000000000", "4294967396", "abc"] {
            assert!(bad.parse::<Vmid>().is_err(), "{bad}");
        }
    }

    #[test]
    fn range_wraps_at_its_end() {
        let range: VmidRange = "100-102".parse().unwrap();
        let id = |n| Vmid::new(n).unwrap();
        assert_eq!(range.len(), 3);
        assert_eq!(range.after(id(100)), id(101));
        assert_eq!(range.after(id(102)), id(100));
        assert_eq!(range.after(id(5000)), id(100));
        assert!("102-100".parse::<VmidRange>().is_err());
        assert!("100".parse::<VmidRange>().is_err());
        assert_eq!("100-100".parse::<VmidRange>().unwrap().len(), 1);
    }
}
