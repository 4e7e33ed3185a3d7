//! `/access`: who may do what.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hyper::header::HeaderMap;
use tokio::time::{Instant, sleep};

use super::{Client, GET_ATTEMPTS, GET_PAUSE, Payload, Server};
use crate::pve::error::Error;
use crate::pve::types::permissions;

impl Client {
    /// The privileges of this token or user, by ACL path: `GET /access/permissions`.
    ///
    /// A privilege-separated token has what it *and* its user have; one without any rights gets an
    /// answer too.
    pub async fn permissions(&self) -> Result<BTreeMap<String, BTreeSet<String>>, Error> {
        let call = self.call("GET", "/access/permissions".into(), None);
        let data = self.get(&call).await?;
        permissions(&data).ok_or_else(|| self.unlike(call, "no permissions in the answer"))
    }

    /// Gets a ticket for the password, or for the ticket that is to be renewed: `POST
    /// /access/ticket`.
    pub(super) async fn log_in(
        &self,
        server: &Arc<Server>,
        secret: &str,
        until: Instant,
    ) -> Result<(), Error> {
        let call = self.call("POST", "/access/ticket".into(), None);
        let who = self.inner.credentials.who();
        let form = Payload::form(&[("username", who), ("password", secret)]);
        let asked = Instant::now();
        let mut attempts = GET_ATTEMPTS;
        let reply = loop {
            attempts -= 1;
            match self.once(server, &call, &form, HeaderMap::new(), until).await {
                Err(error) if attempts > 0 && error.is_broken() && Instant::now() < until => {
                    sleep(GET_PAUSE).await;
                }
                result => break result?,
            }
        };
        let kept = self.inner.credentials.logged_in(&reply.data, asked);
        kept.map_err(|reason| self.unlike(call, reason))
    }
}
