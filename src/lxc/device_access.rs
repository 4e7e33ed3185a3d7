//! Which devices the processes of a CT may use.
//!
//! In OCI the last rule that matches wins. Neither family of LXC's keys works like that: cgroup v1
//! forgets an exception only if a later rule names exactly the same devices, and the program that LXC
//! makes for cgroup2 obeys the first match. So rules become a default and exceptions from it, each
//! device named by one of them at most, whose order does not matter.

use crate::lxc::config::CgroupVersion;
use crate::oci::plan::{DeviceKind, DeviceRule};

/// Why rules cannot be kept.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A device rule takes back a part of an earlier one.
    #[error(
        "linux.resources.devices: the rule for {later} takes back a part of the one for {earlier}, \
         which the kernel cannot express; list what is wanted instead"
    )]
    Hole { earlier: String, later: String },
    /// LXC's program would let through who opens the device for both.
    #[error(
        "linux.resources.devices: on cgroup2 LXC cannot deny only reading or only writing of {devices} \
         while all devices are allowed; deny both, or list what is allowed"
    )]
    Half { devices: String },
    /// The default of a running CT stays what it is.
    #[error(
        "linux.resources.devices in an update cannot change what becomes of devices that no rule \
         names; create the container again with these rules"
    )]
    Default,
}

/// A default for all devices, and exceptions from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceAccess {
    /// Without the exceptions.
    pub allows_all: bool,
    /// Rules that say the opposite.
    pub exceptions: Vec<DeviceRule>,
}

/// What changes for the devices of one exception.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Its devices, as [`DeviceRule::devices`] has them.
    pub devices: String,
    /// Which access was excepted, and which is to be. One of them may be empty.
    pub former: String,
    pub wanted: String,
}

impl DeviceAccess {
    /// What rules amount to. Without one for all devices none is allowed, as with runc.
    ///
    /// # Errors
    /// [`Error::Hole`] and [`Error::Half`].
    pub fn of(rules: &[DeviceRule], version: CgroupVersion) -> Result<Self, Error> {
        // A rule for all devices makes everything before it void.
        let last_all = rules.iter().rposition(|rule| rule.kind == DeviceKind::All);
        let mut access = Self {
            allows_all: last_all.is_some_and(|index| rules[index].allow),
            exceptions: Vec::new(),
        };
        for rule in &rules[last_all.map_or(0, |index| index + 1)..] {
            match rule.allow == access.allows_all {
                true => access.take_back(rule)?,
                false => access.except(rule),
            }
        }
        let half = |rule: &&DeviceRule| rule.access.contains('r') != rule.access.contains('w');
        match access.exceptions.iter().find(half) {
            Some(rule) if access.allows_all && version == CgroupVersion::V2 => {
                Err(Error::Half { devices: rule.devices() })
            }
            _ => Ok(access),
        }
    }

    fn except(&mut self, rule: &DeviceRule) {
        // Two of them would not allow to open a device for reading and writing at once.
        match self.exceptions.iter_mut().find(|exception| exception.is_for_devices_of(rule)) {
            Some(exception) => {
                exception.access =
                    letters(|c| exception.access.contains(c) || rule.access.contains(c))
            }
            None => self.exceptions.push(rule.clone()),
        }
    }

    /// Back to the default.
    fn take_back(&mut self, rule: &DeviceRule) -> Result<(), Error> {
        for earlier in self.exceptions.iter_mut().filter(|earlier| earlier.kind == rule.kind) {
            let covers = |wide: Option<u32>, narrow| wide.is_none() || wide == narrow;
            let overlaps = |a: Option<u32>, b| covers(a, b) || b.is_none();
            let shares = earlier.access.contains(|c| rule.access.contains(c));
            if covers(rule.major, earlier.major) && covers(rule.minor, earlier.minor) {
                earlier.access.retain(|c| !rule.access.contains(c));
            } else if shares
                && overlaps(rule.major, earlier.major)
                && overlaps(rule.minor, earlier.minor)
            {
                return Err(Error::Hole { earlier: earlier.devices(), later: rule.devices() });
            }
        }
        self.exceptions.retain(|exception| !exception.access.is_empty());
        Ok(())
    }

    /// What has to change for `wanted`, which has the same default.
    #[must_use]
    pub fn changes(&self, wanted: &Self) -> Vec<Change> {
        let access_in = |exceptions: &[DeviceRule], rule: &DeviceRule| {
            let exception = exceptions.iter().find(|exception| exception.is_for_devices_of(rule));
            exception.map(|exception| exception.access.clone()).unwrap_or_default()
        };
        let new = wanted.exceptions.iter();
        let new = new.filter(|rule| access_in(&self.exceptions, rule).is_empty());
        let changes = self.exceptions.iter().chain(new).map(|rule| Change {
            devices: rule.devices(),
            former: access_in(&self.exceptions, rule),
            wanted: access_in(&wanted.exceptions, rule),
        });
        changes.filter(|change| change.former != change.wanted).collect()
    }

    /// The same with another default. LXC and cgroup v1 change that one only by forgetting all
    /// exceptions, and the latter not at all while there are cgroups below.
    ///
    /// # Errors
    /// [`Error::Default`] if it cannot be said that way.
    pub fn with_default(&self, allows_all: bool) -> Result<Self, Error> {
        if self.allows_all == allows_all {
            return Ok(self.clone());
        }
        if !self.exceptions.is_empty() {
            return Err(Error::Default);
        }
        let all_of = |kind| DeviceRule {
            allow: self.allows_all,
            kind,
            major: None,
            minor: None,
            access: letters(|_| true),
        };
        Ok(Self {
            allows_all,
            exceptions: vec![all_of(DeviceKind::Char), all_of(DeviceKind::Block)],
        })
    }
}

impl Change {
    /// The access that becomes an exception.
    #[must_use]
    pub fn added(&self) -> String {
        letters(|c| self.wanted.contains(c) && !self.former.contains(c))
    }

    /// The way back.
    #[must_use]
    pub fn reversed(self) -> Self {
        Self { former: self.wanted, wanted: self.former, ..self }
    }

    /// The access that ceases to be one.
    #[must_use]
    pub fn removed(&self) -> String {
        letters(|c| self.former.contains(c) && !self.wanted.contains(c))
    }
}

impl DeviceRule {
    /// The devices in the syntax of both families of keys.
    #[must_use]
    pub fn devices(&self) -> String {
        let number = |number: Option<u32>| number.map_or("*".to_owned(), |n| n.to_string());
        let kind = if self.kind == DeviceKind::Block { 'b' } else { 'c' };
        format!("{kind} {}:{}", number(self.major), number(self.minor))
    }

    fn is_for_devices_of(&self, other: &Self) -> bool {
        (self.kind, self.major, self.minor) == (other.kind, other.major, other.minor)
    }
}

/// Access in the order in which everybody writes it, because LXC compares it as text.
fn letters(wanted: impl Fn(char) -> bool) -> String {
    "rwm".chars().filter(|&c| wanted(c)).collect()
}

#[cfg(test)]
mod tests {
    use CgroupVersion::{V1, V2};
    use DeviceKind::{All, Block, Char};

    use super::*;

    fn rule(allow: bool, kind: DeviceKind, major: Option<u32>, access: &str) -> DeviceRule {
        DeviceRule { allow, kind, major, minor: None, access: access.to_owned() }
    }

    fn access(rules: &[DeviceRule]) -> (bool, Vec<String>) {
        let access = DeviceAccess::of(rules, V1).unwrap();
        assert!(access.exceptions.iter().all(|rule| rule.allow != access.allows_all));
        let line = |rule: &DeviceRule| format!("{} {}", rule.devices(), rule.access);
        (access.allows_all, access.exceptions.iter().map(line).collect())
    }

    fn list(lines: &[&str]) -> Vec<String> {
        lines.iter().map(|line| (*line).to_owned()).collect()
    }

    #[test]
    fn rules_keep_their_meaning() {
        assert_eq!(access(&[]), (false, vec![]));
        assert_eq!(
            access(&[
                rule(true, Char, Some(9), "r"),
                rule(false, All, None, "rwm"),
                rule(false, Char, Some(1), "rwm"),
                rule(true, Char, Some(1), "rwm"),
                rule(true, Block, None, "m"),
                rule(false, Char, Some(1), "w"),
            ]),
            (false, list(&["c 1:* rm", "b *:* m"]))
        );
        assert_eq!(
            access(&[
                rule(false, All, None, "rwm"),
                rule(true, All, None, "rwm"),
                rule(true, Char, Some(1), "rwm"),
                rule(false, Block, Some(8), "w"),
            ]),
            (true, list(&["b 8:* w"]))
        );
        assert_eq!(
            access(&[
                rule(true, All, None, "rwm"),
                rule(false, Char, Some(1), "rw"),
                rule(false, Block, Some(8), "rwm"),
                rule(true, Char, None, "r"),
                rule(true, Block, Some(8), "rwm"),
            ]),
            (true, list(&["c 1:* w"]))
        );
    }

    #[test]
    fn rules_for_the_same_devices_become_one() {
        let rules = [
            rule(true, Char, Some(1), "w"),
            rule(true, Block, Some(1), "m"),
            rule(true, Char, Some(1), "rw"),
        ];
        assert_eq!(access(&rules), (false, list(&["c 1:* rw", "b 1:* m"])));
    }

    // Last must not silently become first.
    #[test]
    fn no_part_of_a_wildcard_can_be_taken_back() {
        let hole = DeviceRule { minor: Some(229), ..rule(false, Char, Some(10), "rw") };
        let error = DeviceAccess::of(&[rule(true, Char, Some(10), "rwm"), hole.clone()], V2);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("c 10:229") && error.contains("c 10:*"), "{error}");
        let other_access = [rule(true, Char, Some(10), "m"), hole];
        assert_eq!(access(&other_access), (false, list(&["c 10:* m"])));
    }

    // LXC's program compares the whole access that is asked for with that of a rule.
    #[test]
    fn half_of_what_an_open_asks_for_cannot_be_denied_on_cgroup2() {
        let all = rule(true, All, None, "rwm");
        for (access, kept) in
            [("r", false), ("wm", false), ("rw", true), ("rwm", true), ("m", true)]
        {
            let rules = [all.clone(), rule(false, Char, Some(1), access)];
            assert_eq!(DeviceAccess::of(&rules, V2).is_ok(), kept, "{access}");
            assert!(DeviceAccess::of(&rules, V1).is_ok());
            assert!(DeviceAccess::of(&[rule(true, Char, Some(1), access)], V2).is_ok());
        }
    }

    fn changes(from: &[DeviceRule], to: &[DeviceRule]) -> Result<Vec<[String; 3]>, Error> {
        let (from, to) = (DeviceAccess::of(from, V1)?, DeviceAccess::of(to, V1)?);
        let changes = from.changes(&to.with_default(from.allows_all)?);
        Ok(changes.into_iter().map(|c| [c.devices, c.former, c.wanted]).collect())
    }

    #[test]
    fn only_what_differs_is_changed() {
        let from = [
            rule(true, Char, Some(1), "rwm"),
            rule(true, Char, Some(2), "rw"),
            rule(true, Block, Some(3), "m"),
        ];
        let to = [
            rule(true, Block, Some(1), "r"),
            rule(true, Char, Some(1), "rwm"),
            rule(true, Char, Some(2), "rm"),
        ];
        let expected = [["c 2:*", "rw", "rm"], ["b 3:*", "m", ""], ["b 1:*", "", "r"]];
        assert_eq!(changes(&from, &to).unwrap(), expected);
        assert_eq!(changes(&from, &from).unwrap(), Vec::<[String; 3]>::new());
        let change =
            Change { devices: String::new(), former: "rw".to_owned(), wanted: "rm".to_owned() };
        assert_eq!((change.added(), change.removed()), ("m".to_owned(), "w".to_owned()));
    }

    #[test]
    fn the_default_stays() {
        let (all, some) = (rule(true, All, None, "rwm"), rule(true, Char, Some(1), "r"));
        let expected = [["c 1:*", "r", ""], ["c *:*", "", "rwm"], ["b *:*", "", "rwm"]];
        let (all, some) = ([all], [some]);
        assert_eq!(changes(&some, &all).unwrap(), expected);
        assert_eq!(changes(&all, &some), Err(Error::Default));
        let all_but_one = [all[0].clone(), rule(false, Char, Some(1), "r")];
        assert_eq!(changes(&some, &all_but_one), Err(Error::Default));
        let lifted = changes(&all_but_one, &all).unwrap();
        assert_eq!(lifted, [["c 1:*", "r", ""]]);
    }
}
