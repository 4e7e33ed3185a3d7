//! `termproxy`, `vncproxy` and `vncwebsocket` of `/nodes/{node}/lxc/{vmid}`

use serde_json::{Value as Json, json};
use tokio::time::sleep;

use super::{Answer, Context};
use crate::error::ApiError;
use crate::params::{Kind, opt, req};
use crate::profile::Call;

/// `POST …/termproxy`: a port where a terminal waits, and the ticket for it.
pub fn term_proxy(cx: &Context<'_>, vmid: &str) -> Result<Answer, ApiError> {
    let path = format!("/vms/{vmid}");
    cx.require(&path, "VM.Console")?;
    let vmid = cx.verify_ct(vmid, &[])?;
    let config = cx.node.load(vmid)?;
    let cmode = config.current.text("cmode").unwrap_or_else(|| "tty".into());
    let port = cx.node.reserve_port();
    let port =
        port.ok_or_else(|| ApiError::Failed("unable to find free port (5900-5999)".into()))?;
    let number = port.number;
    let user = cx.who.auth_id();
    let ticket = cx.cluster.dc.tickets.vnc(&user, &path);
    let node = cx.node.clone();
    let upid = cx.node.tasks.spawn(&cx.node.name, "vncproxy", &vmid.to_string(), cx.who, |task| {
        node.wait_for_client(task, vmid, port, cmode)
    });
    // The port as text, as the real server does.
    let data = json!({
        "port": number.to_string(), "ticket": ticket, "upid": upid, "user": user,
    });
    Ok(Answer::protected(data, Call::Status))
}

/// `POST …/vncproxy`: there is no VNC server here, as on the recording node.
pub async fn vnc_proxy(cx: &Context<'_>, vmid: &str) -> Result<Answer, ApiError> {
    cx.require(&format!("/vms/{vmid}"), "VM.Console")?;
    let own = [
        opt("height", Kind::Int(16, 2160)),
        opt("websocket", Kind::Bool),
        opt("width", Kind::Int(16, 4096)),
    ];
    let vmid = cx.verify_ct(vmid, &[&own])?;
    cx.node.load(vmid)?;
    let port = cx.node.reserve_port();
    let port =
        port.ok_or_else(|| ApiError::Failed("unable to find free port (5900-5999)".into()))?;
    sleep(cx.node.profile.vnc_timeout()).await;
    Err(ApiError::Failed(format!("Timeout while waiting for port '{}' to get ready!", port.number)))
}

/// `GET …/vncwebsocket`: the way to a terminal that waits.
pub async fn websocket(cx: &Context<'_>, vmid: &str) -> Result<Answer, ApiError> {
    let path = format!("/vms/{vmid}");
    cx.require(&path, "VM.Console")?;
    let own = [req("port", Kind::Int(5900, 5999)), req("vncticket", Kind::Text(512))];
    let vmid = cx.verify_ct(vmid, &[&own])?;
    let user = cx.who.auth_id();
    let ticket = cx.params().get("vncticket").unwrap_or_default();
    if !cx.cluster.dc.tickets.vnc_is_valid(ticket, &user, &path) {
        return Err(ApiError::LoginFailed("permission denied - invalid PVEVNC ticket"));
    }
    let handshake = cx.request.websocket.clone();
    let handshake =
        handshake.ok_or_else(|| ApiError::BadRequest("this is for websockets only".into()))?;
    let port = cx.params().number("port").unwrap_or(0);
    let client = cx.node.take_terminal(vmid, port, format!("{user}:{ticket}"), handshake);
    let Some(client) = client else {
        // A real front end tries to reach the port for longer than a client waits.
        sleep(cx.node.profile.terminal_timeout()).await;
        return Err(ApiError::Gateway { code: 599, reason: "Connection timed out".into() });
    };
    Ok(Answer { websocket: Some(client), ..Answer::plain(Json::Null) })
}
