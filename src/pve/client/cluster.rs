//! `/version`, `/cluster`, `/nodes` and `/pools`: what there is besides CTs.

use super::{Client, query};
use crate::config::Vmid;
use crate::pve::error::{Error, Failure};
use crate::pve::types::{
    ClusterStatus, Loose, NodeStatus, NodeSummary, Pool, Resource, Version, list,
};

impl Client {
    /// Proves with one cheap call that the endpoint, TLS, the token and the node are right.
    ///
    /// `GET /nodes`: any token may ask it, and the front end answers it without the privileged
    /// daemon.
    pub async fn check(&self) -> Result<(), Error> {
        let known: Vec<String> = self.nodes().await?.into_iter().map(|node| node.name).collect();
        if known.contains(&self.inner.settings.node) {
            return Ok(());
        }
        let (endpoint, node) = (self.endpoint(), self.inner.settings.node.clone());
        Err(Error::NodeUnknown { endpoint, node, known })
    }

    /// `GET /version`
    pub async fn version(&self) -> Result<Version, Error> {
        let call = self.call("GET", "/version".into(), None);
        let data = self.get(&call).await?;
        Version::from_json(&data).ok_or_else(|| self.unlike(call, "no version in the answer"))
    }

    /// The cluster's nodes, at least one: `GET /nodes`. Figures are up to 10 s old.
    pub async fn nodes(&self) -> Result<Vec<NodeSummary>, Error> {
        let call = self.call("GET", "/nodes".into(), None);
        let data = self.get(&call).await?;
        let nodes = list(&data, NodeSummary::from_json).unwrap_or_default();
        if nodes.is_empty() {
            Err(self.unlike(call, "the list of nodes is empty"))
        } else {
            Ok(nodes)
        }
    }

    /// The shim's node: `GET /nodes/{node}/status`. Needs `Sys.Audit` on it.
    pub async fn node_status(&self) -> Result<NodeStatus, Error> {
        let call = self.call("GET", self.node_path("status"), None);
        let data = self.get(&call).await?;
        NodeStatus::from_json(&data).ok_or_else(|| self.unlike(call, "no state in the answer"))
    }

    /// Members and quorum: `GET /cluster/status`.
    pub async fn cluster_status(&self) -> Result<ClusterStatus, Error> {
        let call = self.call("GET", "/cluster/status".into(), None);
        let data = self.get(&call).await?;
        ClusterStatus::from_json(&data).ok_or_else(|| self.unlike(call, "no state in the answer"))
    }

    /// The lowest free VMID: `GET /cluster/nextid`. It reserves nothing; two callers get the same.
    pub async fn next_id(&self) -> Result<Vmid, Error> {
        let call = self.call("GET", "/cluster/nextid".into(), None);
        let data = self.get(&call).await?;
        Loose(&data).as_vmid().ok_or_else(|| self.unlike(call, "no VMID in the answer"))
    }

    /// Whether no guest of the cluster has `vmid`, right now.
    pub async fn is_free(&self, vmid: Vmid) -> Result<bool, Error> {
        let path = format!("/cluster/nextid{}", query(&[("vmid", &vmid.to_string())]));
        match self.get(&self.call("GET", path, Some(vmid))).await {
            Ok(_) => Ok(true),
            Err(error) if error.failure() == Some(&Failure::Exists) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Everything in the cluster that the token may see: `GET /cluster/resources`. States are up to
    /// 10 s old; [`Client::list`] and [`Client::status`] are live.
    pub async fn resources(&self) -> Result<Vec<Resource>, Error> {
        let call = self.call("GET", "/cluster/resources".into(), None);
        let data = self.get(&call).await?;
        list(&data, Resource::from_json).ok_or_else(|| self.unlike(call, "no list in the answer"))
    }

    /// The pools that the token may see: `GET /pools`.
    pub async fn pools(&self) -> Result<Vec<Pool>, Error> {
        let call = self.call("GET", "/pools".into(), None);
        let data = self.get(&call).await?;
        list(&data, Pool::from_json).ok_or_else(|| self.unlike(call, "no list in the answer"))
    }
}
