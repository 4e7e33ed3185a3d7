//! Tickets: what a login gives, the token against cross-site requests that belongs to it, and the
//! one-time password of a terminal.
//!
//! Their shapes are those of Proxmox VE; the signature is of another kind but of the same length.

use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use sha2::{Digest, Sha256};

/// Seconds that a ticket lives.
const LIFE: u64 = 2 * 3600;
/// Seconds that a terminal's ticket lives.
const VNC_LIFE: u64 = 40;
/// Seconds by which a ticket may come from the future.
const SKEW: u64 = 300;

/// The key of all tickets of a datacenter.
#[derive(Debug)]
pub struct Tickets([u8; 32]);

impl Default for Tickets {
    fn default() -> Self {
        Self(rand::random())
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Compares in a time that does not depend on where the difference is.
pub fn same(a: &str, b: &str) -> bool {
    a.len() == b.len() && a.bytes().zip(b.bytes()).fold(0, |d, (x, y)| d | (x ^ y)) == 0
}

impl Tickets {
    /// A code that only the holder of the key can make, `blocks` times 32 bytes.
    fn code(&self, text: &str, blocks: u8) -> Vec<u8> {
        let inner = Sha256::new().chain_update(self.0).chain_update(text).finalize();
        (0..blocks)
            .flat_map(|n| {
                Sha256::new().chain_update(self.0).chain_update([n]).chain_update(inner).finalize()
            })
            .collect()
    }

    fn signed(&self, plain: &str, secret_part: &str) -> String {
        let code = self.code(&format!("{plain}\n{secret_part}"), 8);
        format!("{plain}::{}", STANDARD.encode(code))
    }

    /// The seconds in the last field of a ticket, if its signature is right.
    fn verified(&self, ticket: &str, secret_part: &str) -> Option<u64> {
        let (plain, _) = ticket.split_once("::")?;
        if !same(&self.signed(plain, secret_part), ticket) {
            return None;
        }
        u64::from_str_radix(plain.rsplit_once(':')?.1, 16).ok()
    }

    /// A ticket for a user: `PVE:USER:HEX8::SIGNATURE`.
    pub fn issue(&self, user: &str) -> String {
        self.issue_at(user, now())
    }

    fn issue_at(&self, user: &str, time: u64) -> String {
        self.signed(&format!("PVE:{user}:{time:08X}"), "")
    }

    /// The user of a ticket that is right and not too old.
    pub fn user<'a>(&self, ticket: &'a str) -> Option<&'a str> {
        let time = self.verified(ticket, "")?;
        let (user, _) = ticket.strip_prefix("PVE:")?.split_once("::")?.0.rsplit_once(':')?;
        alive(time, LIFE).then_some(user)
    }

    /// The `CSRFPreventionToken` of a user: `HEX8:CODE`.
    pub fn csrf(&self, user: &str) -> String {
        self.csrf_at(user, now())
    }

    fn csrf_at(&self, user: &str, time: u64) -> String {
        let code = self.code(&format!("CSRF:{time:08X}:{user}"), 1);
        format!("{time:08X}:{}", STANDARD_NO_PAD.encode(code))
    }

    /// Whether a `CSRFPreventionToken` belongs to the user.
    pub fn csrf_is_valid(&self, token: &str, user: &str) -> bool {
        let time = token.split_once(':').and_then(|(t, _)| u64::from_str_radix(t, 16).ok());
        time.is_some_and(|t| alive(t, LIFE) && same(&self.csrf_at(user, t), token))
    }

    /// The password of a terminal on a path: `PVEVNC:HEX8::SIGNATURE`.
    pub fn vnc(&self, user: &str, path: &str) -> String {
        self.signed(&format!("PVEVNC:{:08X}", now()), &format!("{user}:{path}"))
    }

    /// Whether it is one for this user and path.
    pub fn vnc_is_valid(&self, ticket: &str, user: &str, path: &str) -> bool {
        let time = self.verified(ticket, &format!("{user}:{path}"));
        ticket.starts_with("PVEVNC:") && time.is_some_and(|t| alive(t, VNC_LIFE))
    }
}

fn alive(time: u64, life: u64) -> bool {
    let now = now();
    time <= now + SKEW && now.saturating_sub(time) <= life
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tickets_have_the_recorded_shape() {
        let tickets = Tickets::default();
        assert_eq!(tickets.issue("root@pam").len(), 367);
        assert_eq!(tickets.csrf("root@pam").len(), 52);
        assert_eq!(tickets.vnc("root@pam!full", "/vms/500").len(), 361);
    }

    #[test]
    fn only_a_right_and_young_ticket_names_its_user() {
        let tickets = Tickets::default();
        let ticket = tickets.issue("root@pam");
        assert_eq!(tickets.user(&ticket), Some("root@pam"));
        assert_eq!(Tickets::default().user(&ticket), None);
        assert_eq!(tickets.user(&ticket.replace("root@pam", "joe@pve")), None);
        assert_eq!(tickets.user(&tickets.issue_at("root@pam", now() - LIFE - 1)), None);
        assert_eq!(tickets.user(&tickets.vnc("root@pam", "/vms/1")), None);
        for text in ["", "PVE", "PVE:::", "PVE:a:00000000::", "::"] {
            assert_eq!(tickets.user(text), None, "{text}");
        }
    }

    #[test]
    fn the_other_tokens_belong_to_one_user_and_path() {
        let tickets = Tickets::default();
        let csrf = tickets.csrf("root@pam");
        assert!(tickets.csrf_is_valid(&csrf, "root@pam"));
        assert!(!tickets.csrf_is_valid(&csrf, "joe@pve"));
        assert!(!tickets.csrf_is_valid("CSRF-TOKEN", "root@pam"));
        let vnc = tickets.vnc("root@pam", "/vms/1");
        assert!(tickets.vnc_is_valid(&vnc, "root@pam", "/vms/1"));
        assert!(!tickets.vnc_is_valid(&vnc, "root@pam", "/vms/2"));
        assert!(!tickets.vnc_is_valid(&tickets.issue("root@pam"), "root@pam", "/vms/1"));
    }
}
