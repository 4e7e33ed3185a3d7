//! The REST client.
//!
//! # Connections
//!
//! HTTP/1.1 only, because a 401 has its text in the reason phrase alone. Idle connections are
//! dropped after [`POOL_IDLE`], before the server does it after 5 s, which also frees their
//! memory. Proxmox marks the answers of its privileged calls with `Connection: close` *and*
//! `Connection: Keep-Alive`; hyper takes the first word for it and connects anew. TLS sessions are
//! resumed then, so that this costs a short handshake without certificates.
//!
//! # What is repeated
//!
//! - A request that was never written, because its pooled connection turned out closed: always, by
//!   hyper.
//! - GET: up to [`GET_ATTEMPTS`] times when its connection broke. Not after a time-out: its caller
//!   has waited long enough.
//! - POST and DELETE: never. When it is unclear whether one took effect, the node is asked: for the
//!   task that it would have started, then for the state that it would have changed. What is found
//!   is the answer ([`Client::start`], [`Client::stop`], [`Client::destroy`]); if nothing is found,
//!   the first error is.
//! - [`Client::stop_ours`] and [`Client::destroy_ours`] may be repeated as a whole, because they
//!   verify the CT's identity anew before each call and what they ask for is idempotent.
//! - PUT: never. Proxmox stores some changes although it answers with an error, so after any error
//!   the caller reads the configuration again.
//!
//! A 401 is never repeated: Proxmox holds each back for 3 s.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use hyper::ext::ReasonPhrase;
use reqwest::header::{AUTHORIZATION, HeaderValue};
use secrecy::ExposeSecret;
use serde_json::Value;
use tokio::time::{Instant, sleep, timeout_at};

use super::error::{self, Call, Context, Error, Failure};
use super::identity::Identity;
use super::tls;
use super::types::{CtConfig, CtStatus, Loose, TaskStatus, Version, log_lines, upids};
use super::upid::Upid;
use crate::config::{ApiToken, Config, Proxmox, Vmid};

/// Below the 5 s after which pveproxy closes an idle connection.
const POOL_IDLE: Duration = Duration::from_secs(3);
const GET_ATTEMPTS: u32 = 3;
/// Far above any answer the shim asks for; a server gone mad must not fill the memory.
const MAX_BODY: usize = 16 << 20;
/// Lines of a failed task's log that its error carries.
const LOG_LINES: usize = 10;
/// How long a CT may read as running after its init was seen to end.
const STOPPING: Duration = Duration::from_secs(2);

/// A client of one node's API. Cloning is cheap; clones share connections.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    http: reqwest::Client,
    settings: Proxmox,
    /// `USER@REALM!TOKENID`
    token: String,
    /// The secret's only copy in this process; marked sensitive.
    authorization: HeaderValue,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let settings = &self.inner.settings;
        f.debug_struct("Client")
            .field("endpoint", &settings.endpoint)
            .field("node", &settings.node)
            .field("token", &self.inner.token)
            .finish_non_exhaustive()
    }
}

/// What a call on a CT of ours found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It did it.
    Done,
    /// There was nothing left to do.
    AlreadySo,
}

/// One request that changes something, and how to find out whether it did.
struct Change {
    call: Call,
    vmid: Vmid,
    /// The task's type.
    task: &'static str,
}

impl Client {
    /// Reads the token and the certificates that `config` names and prepares the client. Does not
    /// connect yet.
    pub fn new(config: &Config) -> Result<Client, Error> {
        let token = ApiToken::load(&config.proxmox.token_file)?;
        Client::with_token(config.proxmox.clone(), &token)
    }

    fn with_token(settings: Proxmox, token: &ApiToken) -> Result<Client, Error> {
        let setup = |reason: String| Error::Setup { reason };
        let header = token.authorization();
        let mut authorization =
            HeaderValue::from_str(header.expose_secret()).map_err(|e| setup(e.to_string()))?;
        authorization.set_sensitive(true);
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls::client_config(&settings.trust)?)
            .https_only(true)
            .http1_only()
            // containerd's environment often names a proxy for registries.
            .no_proxy()
            // The token must not follow a redirection.
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(settings.connect_timeout)
            .timeout(settings.request_timeout)
            .pool_idle_timeout(POOL_IDLE)
            .pool_max_idle_per_host(2)
            .build()
            .map_err(|e| setup(e.to_string()))?;
        let token = token.id().to_owned();
        Ok(Client { inner: Arc::new(Inner { http, settings, token, authorization }) })
    }

    /// Proves with one cheap call that the endpoint, TLS, the token and the node are right.
    ///
    /// `GET /nodes`: any token may ask it, and the front end answers it without the privileged
    /// daemon, so that the connection stays open for the next call.
    pub async fn check(&self) -> Result<(), Error> {
        let call = self.call("GET", "/nodes".into(), None);
        let data = self.get(&call).await?;
        let known: Vec<String> =
            Loose(&data).items().filter_map(|node| node.text("node")).collect();
        if known.is_empty() {
            return Err(self.protocol(call, 200, "the list of nodes is empty"));
        }
        if known.iter().any(|node| *node == self.inner.settings.node) {
            return Ok(());
        }
        let Proxmox { endpoint, node, .. } = self.inner.settings.clone();
        Err(Error::NodeUnknown { endpoint, node, known })
    }

    /// `GET /version`
    pub async fn version(&self) -> Result<Version, Error> {
        let call = self.call("GET", "/version".into(), None);
        let data = self.get(&call).await?;
        Version::from_json(&data)
            .ok_or_else(|| self.protocol(call, 200, "no version in the answer"))
    }

    /// The node's CTs that the token may see (`VM.Audit`), with live states. 66 ms on a real node.
    pub async fn list(&self) -> Result<Vec<CtStatus>, Error> {
        let call = self.call("GET", self.node_path("lxc"), None);
        let data = self.get(&call).await?;
        if !data.is_array() {
            return Err(self.protocol(call, 200, "the list of CTs is not a list"));
        }
        Ok(Loose(&data).items().filter_map(|entry| CtStatus::from_json(entry.0, None)).collect())
    }

    /// A CT's state. 41 ms on a real node.
    pub async fn status(&self, vmid: Vmid) -> Result<CtStatus, Error> {
        let call = self.ct_call("GET", vmid, "/status/current");
        let data = self.get(&call).await?;
        let status = CtStatus::from_json(&data, Some(vmid));
        status.ok_or_else(|| self.protocol(call, 200, "no state in the answer"))
    }

    /// A CT's configuration, pending changes merged. 7 ms on a real node.
    pub async fn config(&self, vmid: Vmid) -> Result<CtConfig, Error> {
        let call = self.ct_call("GET", vmid, "/config");
        let data = self.get(&call).await?;
        let config = CtConfig::from_json(&data);
        config.ok_or_else(|| self.protocol(call, 200, "no configuration in the answer"))
    }

    /// Sets keys of a CT's configuration; with `digest`, only if the file is still that one.
    ///
    /// After any error some of the changes may be stored: read the configuration again.
    pub async fn put_config(
        &self,
        vmid: Vmid,
        changes: &[(&str, &str)],
        digest: Option<&str>,
    ) -> Result<(), Error> {
        let call = self.ct_call("PUT", vmid, "/config");
        let mut form = changes.to_vec();
        form.extend(digest.map(|digest| ("digest", digest)));
        self.send(&call, Some(&form)).await.map(drop)
    }

    /// Starts a CT; answers with the task.
    ///
    /// If it is unclear whether the request took effect, looks for the task; without one, a CT that
    /// runs gives [`Failure::AlreadyRunning`]. Never asks twice.
    pub async fn start(&self, vmid: Vmid) -> Result<Upid, Error> {
        self.change(self.ct_call("POST", vmid, "/status/start"), vmid, "vzstart").await
    }

    /// Kills a CT's processes; answers with the task. Use [`Client::stop_ours`].
    ///
    /// If it is unclear whether the request took effect, looks for the task; without one, a CT that
    /// does not run gives [`Failure::NotRunning`].
    pub async fn stop(&self, vmid: Vmid) -> Result<Upid, Error> {
        self.change(self.ct_call("POST", vmid, "/status/stop"), vmid, "vzstop").await
    }

    /// Destroys a stopped CT; answers with the task. Use [`Client::destroy_ours`].
    ///
    /// Without `force`, so that Proxmox refuses a running CT. If it is unclear whether the request
    /// took effect, looks for the task; without one, a missing CT gives [`Failure::NotFound`].
    pub async fn destroy(&self, vmid: Vmid) -> Result<Upid, Error> {
        self.change(self.ct_call("DELETE", vmid, ""), vmid, "vzdestroy").await
    }

    /// Whether the CT of `identity` exists and is ours.
    pub async fn is_ours(&self, identity: &Identity) -> Result<bool, Error> {
        match self.config(identity.vmid).await {
            Ok(config) => Ok(identity.verify(&config).is_ok()),
            Err(error) if error.failure() == Some(&Failure::NotFound) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Stops the CT of `identity` and waits for the task, until `deadline`.
    ///
    /// Verifies the identity right before the call, so that no other CT is stopped: then the error
    /// is [`Error::NotOurs`]. Locks are waited for, never forced. A CT that is gone or stopped is
    /// [`Outcome::AlreadySo`].
    pub async fn stop_ours(
        &self,
        identity: &Identity,
        deadline: Instant,
    ) -> Result<Outcome, Error> {
        let done = |failure: &Failure| matches!(failure, Failure::NotFound | Failure::NotRunning);
        self.on_ours("POST", identity, deadline, done, |vmid| self.stop(vmid)).await
    }

    /// Destroys the stopped CT of `identity` and waits for the task, until `deadline`.
    ///
    /// Verifies the identity right before the call. The API has no digest for this call, so a CT
    /// that takes the VMID within the milliseconds between the two is not recognised; a running one
    /// is safe even then. Locks are waited for; a CT that still reads as running is, for a moment,
    /// because that is what a stopping one does. A CT that is gone is [`Outcome::AlreadySo`].
    pub async fn destroy_ours(
        &self,
        identity: &Identity,
        deadline: Instant,
    ) -> Result<Outcome, Error> {
        let done = |failure: &Failure| matches!(failure, Failure::NotFound);
        self.on_ours("DELETE", identity, deadline, done, |vmid| self.destroy(vmid)).await
    }

    async fn on_ours<F>(
        &self,
        method: &'static str,
        identity: &Identity,
        deadline: Instant,
        done: impl Fn(&Failure) -> bool,
        act: impl Fn(Vmid) -> F,
    ) -> Result<Outcome, Error>
    where
        F: Future<Output = Result<Upid, Error>>,
    {
        let vmid = identity.vmid;
        let begun = Instant::now();
        let mut pause = Duration::from_millis(50);
        loop {
            let attempt = async {
                let asked = timeout_at(deadline, async {
                    let config = self.config(vmid).await?;
                    identity.verify(&config).map_err(|reason| Error::NotOurs { vmid, reason })?;
                    act(vmid).await
                });
                // A request that is cut off may still be carried out; it was meant to be.
                let late = |_| Error::Timeout {
                    endpoint: self.inner.settings.endpoint.clone(),
                    call: Box::new(self.ct_call(method, vmid, "")),
                    sent: true,
                    after: begun.elapsed(),
                };
                let upid = asked.await.map_err(late)??;
                self.wait(&upid, deadline).await
            };
            let error = match attempt.await {
                Ok(()) => return Ok(Outcome::Done),
                Err(error) => error,
            };
            let again = match (&error, error.failure()) {
                (_, Some(failure)) if done(failure) => return Ok(Outcome::AlreadySo),
                (_, Some(Failure::Locked { .. } | Failure::LockTimeout)) => true,
                (_, Some(Failure::Running)) => begun.elapsed() < STOPPING,
                // Nothing was found to have happened, and the identity is verified again.
                (Error::TaskTimeout { .. }, _) => false,
                _ => error.is_unclear(),
            };
            if !again || Instant::now() + pause >= deadline {
                return Err(error);
            }
            log::debug!(vmid = vmid.get(), error = error.to_string().as_str(); "trying again");
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }

    /// `GET …/tasks/{upid}/status`
    pub async fn task_status(&self, upid: &Upid) -> Result<TaskStatus, Error> {
        let call = self.task_call(upid, "status");
        let data = self.get(&call).await?;
        TaskStatus::from_json(&data)
            .ok_or_else(|| self.protocol(call, 200, "no task state in the answer"))
    }

    /// The first 500 lines of a task's log.
    pub async fn task_log(&self, upid: &Upid) -> Result<Vec<String>, Error> {
        let call = self.task_call(upid, "log?start=0&limit=500");
        Ok(log_lines(&self.get(&call).await?))
    }

    /// Waits for the end of a task, at most until `deadline`.
    ///
    /// Asks often at first, then ever more rarely: the pause is an eighth of the time waited so
    /// far, from 4 to 400 ms. A connection that breaks meanwhile does not end the wait. The error
    /// of a failed task is its meaning, or [`Error::TaskFailed`] with the last lines of its log.
    pub async fn wait(&self, upid: &Upid, deadline: Instant) -> Result<(), Error> {
        let begun = Instant::now();
        let mut last = None;
        loop {
            let pause = pause(begun.elapsed());
            if Instant::now() + pause > deadline {
                break;
            }
            sleep(pause).await;
            match timeout_at(deadline, self.task_status(upid)).await {
                Err(_) => break,
                Ok(Ok(TaskStatus::Running)) => last = None,
                Ok(Ok(TaskStatus::Stopped { exitstatus })) => {
                    return self.ended(upid, &exitstatus).await;
                }
                Ok(Err(error))
                    if matches!(error, Error::Unreachable { .. } | Error::Timeout { .. }) =>
                {
                    last = Some(error);
                }
                Ok(Err(error)) => return Err(error),
            }
        }
        Err(last.unwrap_or_else(|| Error::TaskTimeout {
            upid: Box::new(upid.clone()),
            waited: begun.elapsed(),
        }))
    }

    async fn ended(&self, upid: &Upid, exitstatus: &str) -> Result<(), Error> {
        if exitstatus == "OK" || exitstatus.starts_with("WARNINGS: ") {
            return Ok(());
        }
        // The log is context; without it the error is still true.
        let mut log = self.task_log(upid).await.unwrap_or_default();
        if log.last().is_some_and(|line| line.starts_with("TASK ERROR: ")) {
            log.pop();
        }
        log.drain(..log.len().saturating_sub(LOG_LINES));
        Err(error::from_task(upid, exitstatus, log))
    }

    async fn change(&self, call: Call, vmid: Vmid, task: &'static str) -> Result<Upid, Error> {
        let change = Change { call, vmid, task };
        let since = unix_time();
        let answer = self.send(&change.call, None).await.and_then(|data| {
            let upid = Loose(&data).as_text().and_then(|text| text.parse().ok());
            upid.ok_or_else(|| self.protocol(change.call.clone(), 200, "no task id in the answer"))
        });
        match answer {
            Err(error) if error.is_unclear() => self.read_back(&change, since, error).await,
            answer => answer,
        }
    }

    /// Finds out what became of a request whose answer was lost.
    async fn read_back(&self, change: &Change, since: u64, lost: Error) -> Result<Upid, Error> {
        log::warn!(
            vmid = change.vmid.get(), task = change.task, error = lost.to_string().as_str();
            "answer lost, reading back"
        );
        // The daemon may still be at work on the request when its connection is gone.
        for pause in [0, 100, 400, 1000] {
            sleep(Duration::from_millis(pause)).await;
            match self.find_task(change, since).await {
                Ok(Some(upid)) => return Ok(upid),
                Ok(None) => {}
                // It cannot be told: the first error says more.
                Err(_) => return Err(lost),
            }
        }
        let meaning = match change.task {
            "vzdestroy" => match self.config(change.vmid).await {
                Err(error) if error.failure() == Some(&Failure::NotFound) => {
                    Some(Failure::NotFound)
                }
                _ => None,
            },
            task => match (self.status(change.vmid).await.map(|status| status.running), task) {
                (Ok(true), "vzstart") => Some(Failure::AlreadyRunning),
                (Ok(false), "vzstop") => Some(Failure::NotRunning),
                _ => None,
            },
        };
        match meaning {
            Some(failure) => Err(Error::Api { call: Box::new(change.call.clone()), failure }),
            None => Err(lost),
        }
    }

    /// The newest task that `change` can have started. A token sees its own tasks.
    async fn find_task(&self, change: &Change, since: u64) -> Result<Option<Upid>, Error> {
        // The clocks are one, as the node is local; the seconds may just have been rounded apart.
        let since = since.saturating_sub(1);
        let Change { vmid, task, .. } = change;
        let query =
            format!("tasks?source=all&vmid={vmid}&typefilter={task}&since={since}&limit=20");
        let call = self.call("GET", self.node_path(&query), Some(*vmid));
        let data = self.get(&call).await?;
        let id = vmid.to_string();
        // Checked here as well: not every release honours every filter.
        let ours = |upid: &Upid| {
            upid.kind() == *task
                && upid.id() == id
                && upid.starttime() >= since
                && upid.user() == self.inner.token
        };
        Ok(upids(&data)
            .into_iter()
            .filter(ours)
            .max_by_key(|upid| (upid.starttime(), upid.pstart())))
    }

    fn call(&self, method: &'static str, path: String, vmid: Option<Vmid>) -> Call {
        Call { method, path, vmid }
    }

    fn ct_call(&self, method: &'static str, vmid: Vmid, below: &str) -> Call {
        self.call(method, self.node_path(&format!("lxc/{vmid}{below}")), Some(vmid))
    }

    /// A UPID needs no escaping: its parser refuses what would.
    fn task_call(&self, upid: &Upid, below: &str) -> Call {
        let path = format!("/nodes/{}/tasks/{upid}/{below}", upid.node());
        self.call("GET", path, upid.id().parse().ok())
    }

    fn node_path(&self, below: &str) -> String {
        format!("/nodes/{}/{below}", self.inner.settings.node)
    }

    fn protocol(&self, call: Call, status: u16, reason: &str) -> Error {
        let endpoint = self.inner.settings.endpoint.clone();
        Error::Protocol { endpoint, call: Box::new(call), status, reason: reason.to_owned() }
    }

    async fn get(&self, call: &Call) -> Result<Value, Error> {
        let mut attempt = 1;
        loop {
            match self.send(call, None).await {
                Err(Error::Unreachable { sent: true, .. }) if attempt < GET_ATTEMPTS => {
                    attempt += 1
                }
                result => return result,
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Sends one request once and answers with its `data`.
    async fn send(&self, call: &Call, form: Option<&[(&str, &str)]>) -> Result<Value, Error> {
        let Inner { http, settings, authorization, .. } = &*self.inner;
        let begun = Instant::now();
        let transport = |e: reqwest::Error| {
            error::from_transport(&settings.endpoint, call.clone(), begun.elapsed(), &e)
        };
        let method = match call.method {
            "GET" => reqwest::Method::GET,
            "POST" => reqwest::Method::POST,
            "PUT" => reqwest::Method::PUT,
            _ => reqwest::Method::DELETE,
        };
        let url = format!("{}/api2/json{}", settings.endpoint, call.path);
        let mut request = http.request(method, url).header(AUTHORIZATION, authorization.clone());
        if let Some(form) = form {
            request = request.form(form);
        }
        let mut response = request.send().await.map_err(transport)?;
        let status = response.status().as_u16();
        let reason = response
            .extensions()
            .get::<ReasonPhrase>()
            .map(|r| String::from_utf8_lossy(r.as_bytes()).into_owned());
        let reason = reason
            .or_else(|| response.status().canonical_reason().map(str::to_owned))
            .unwrap_or_default();
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(transport)? {
            if body.len() + chunk.len() > MAX_BODY {
                return Err(self.protocol(call.clone(), status, "the answer is too long"));
            }
            body.extend_from_slice(&chunk);
        }
        let micros = begun.elapsed().as_micros() as u64;
        log::trace!(method = call.method, path = call.path.as_str(), status, micros; "proxmox call");
        if !(200..300).contains(&status) {
            let context = Context {
                endpoint: &settings.endpoint,
                node: &settings.node,
                token: &self.inner.token,
                token_file: &settings.token_file,
            };
            return Err(error::from_answer(&context, call.clone(), status, &reason, &body));
        }
        match serde_json::from_slice::<Value>(&body) {
            // `data` may be missing.
            Ok(Value::Object(mut answer)) => Ok(answer.remove("data").unwrap_or_default()),
            _ => Err(self.protocol(call.clone(), status, "the answer is not Proxmox's JSON")),
        }
    }
}

/// The pause before the next question about a task that has been waited for so long.
fn pause(waited: Duration) -> Duration {
    (waited / 8).clamp(Duration::from_millis(4), Duration::from_millis(400))
}

fn unix_time() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map(|now| now.as_secs()).unwrap_or_default()
}

#[cfg(test)]
mod tests;
