//! `/access`: logins, users, tokens, roles and rights.

use serde_json::{Map, Value as Json, json};

use super::{Answer, Context};
use crate::acl::{Acl, Identity, Token, User};
use crate::cluster::uuid;
use crate::error::ApiError;
use crate::params::{Kind, Params, Spec, opt, req, split_list, verify};
use crate::profile::Call;
use crate::roles::{self, Role};
use crate::ticket::same;

const USER_ID: Spec = req("userid", Kind::Format(check_user_id));
const TOKEN_ID: Spec = req("tokenid", Kind::Pattern(is_token_id));

/// `NAME@REALM`.
fn check_user_id(text: &str) -> Result<(), String> {
    let valid = text.len() <= 64
        && text.rsplit_once('@').is_some_and(|(name, realm)| {
            !name.is_empty()
                && !name.contains(|c: char| c.is_whitespace() || ":/!".contains(c))
                && is_token_id(realm)
        });
    if valid { Ok(()) } else { Err(format!("value '{text}' does not look like a valid user name")) }
}

fn is_token_id(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.len() > 1
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_".contains(&b))
}

/// Checks the parameters together with those of the path.
fn verify_with(cx: &Context<'_>, path: &[(&str, &str)], specs: &[&[Spec]]) -> Result<(), ApiError> {
    let mut all: Params = cx.params().clone();
    for (name, value) in path {
        all.0.insert((*name).to_owned(), (*value).to_owned());
    }
    verify(specs, &all)
}

/// Fails unless the caller is this very user, or may change users.
fn require_self_or_admin(cx: &Context<'_>, user: &str) -> Result<(), ApiError> {
    if cx.who.auth_id() == user {
        return Ok(());
    }
    cx.require("/access/groups", "User.Modify")
}

fn no_user(user: &str) -> ApiError {
    ApiError::Failed(format!("no such user ('{user}')"))
}

/// `POST /access/ticket`
pub fn login(cx: &Context<'_>) -> Result<Answer, ApiError> {
    cx.verify(&[
        opt("new-format", Kind::Bool),
        opt("otp", Kind::Text(64)),
        req("password", Kind::Text(1024)),
        opt("path", Kind::Text(64)),
        opt("privs", Kind::Text(64)),
        opt("realm", Kind::Text(32)),
        opt("tfa-challenge", Kind::Text(1024)),
        req("username", Kind::Text(64)),
    ])?;
    let params = cx.params();
    let text = |name: &str| params.get(name).unwrap_or_default();
    let user = match params.get("realm") {
        Some(realm) if !text("username").contains('@') => format!("{}@{realm}", text("username")),
        _ => text("username").to_owned(),
    };
    let dc = &cx.cluster.dc;
    let password = text("password");
    let acl = cx.acl();
    let failed = ApiError::LoginFailed("authentication failure");
    let known = acl.users.get(&user).filter(|u| !u.disabled).ok_or(failed.clone())?;
    // An old ticket is as good as a password, which renews it.
    let right = dc.tickets.user(password) == Some(&user)
        || known.password.as_ref().is_some_and(|p| same(p, password));
    if !right {
        return Err(failed);
    }
    let who = Identity::user(&user);
    if let Some(path) = params.get("path") {
        let privileges = split_list(text("privs"));
        acl.require_any(&who, path, &privileges).map_err(|_| failed)?;
    }
    let data = json!({
        "username": user,
        "ticket": dc.tickets.issue(&user),
        "CSRFPreventionToken": dc.tickets.csrf(&user),
        "cap": capabilities(&acl, &who),
    });
    Ok(Answer::protected(data, Call::Plain))
}

/// What the web interface shows and hides by: privileges by area.
fn capabilities(acl: &Acl, who: &Identity) -> Json {
    const AREAS: [(&str, &str, &[&str]); 7] = [
        ("access", "/access", &["Group.", "Permissions.Modify", "User."]),
        ("dc", "/", &["SDN.", "Sys.Audit", "Sys.Modify"]),
        ("mapping", "/mapping", &["Mapping.", "Permissions.Modify"]),
        ("nodes", "/nodes", &["Permissions.Modify", "Sys."]),
        ("sdn", "/sdn", &["Permissions.Modify", "SDN."]),
        ("storage", "/storage", &["Datastore.", "Permissions.Modify"]),
        ("vms", "/vms", &["Permissions.Modify", "VM."]),
    ];
    let area = |path: &str, wanted: &[&str]| -> Json {
        let have = acl.privileges(who, path);
        let shown = have.iter().filter(|p| wanted.iter().any(|w| p.starts_with(w)));
        Json::Object(shown.map(|p| ((*p).to_owned(), json!(1))).collect())
    };
    AREAS.iter().map(|(name, path, wanted)| ((*name).to_owned(), area(path, wanted))).collect()
}

/// `GET /access/permissions`
pub fn permissions(cx: &Context<'_>) -> Result<Answer, ApiError> {
    cx.verify(&[opt("path", Kind::Text(4096)), opt("userid", Kind::Text(255))])?;
    let acl = cx.acl();
    let mut who = cx.who.clone();
    if let Some(userid) = cx.params().get("userid").filter(|u| *u != cx.who.auth_id()) {
        let own_token = userid.strip_prefix(&who.user).is_some_and(|rest| rest.starts_with('!'));
        if who.token.is_some() || !own_token {
            acl.require(cx.who, "/access", "Sys.Audit")?;
        }
        who = acl.by_name(userid).ok_or_else(|| no_user(userid))?;
    }
    let of = |path: &str| -> Json {
        let list = acl.privileges(&who, path);
        Json::Object(list.iter().map(|p| ((*p).to_owned(), json!(1))).collect())
    };
    let mut data = Map::new();
    match cx.params().get("path") {
        // A path that was asked for is shown even without rights.
        Some(path) => {
            data.insert(path.to_owned(), of(path));
        }
        None => {
            for path in acl.listed_paths() {
                let rights = of(&path);
                if rights != json!({}) {
                    data.insert(path, rights);
                }
            }
        }
    }
    Ok(Answer::plain(Json::Object(data)))
}

/// `GET /access/roles`
pub fn roles(cx: &Context<'_>) -> Result<Answer, ApiError> {
    cx.verify(&[])?;
    let row = |(name, role): (&String, &Role)| {
        let privileges: Vec<&str> = role.privileges.iter().copied().collect();
        json!({
            "roleid": name, "privs": privileges.join(","), "special": i32::from(role.special),
        })
    };
    Ok(Answer::plain(cx.acl().roles.iter().map(row).collect()))
}

/// `POST /access/roles`
pub fn create_role(cx: &Context<'_>) -> Result<Answer, ApiError> {
    cx.require("/access", "Sys.Modify")?;
    cx.verify(&[opt("privs", Kind::Text(4096)), req("roleid", Kind::Pattern(is_token_id))])?;
    let mut privileges = std::collections::BTreeSet::new();
    for name in split_list(cx.params().get("privs").unwrap_or_default()) {
        let known = roles::privilege(name);
        let text = format!("invalid format - invalid privilege '{name}'\n");
        privileges.insert(known.ok_or_else(|| ApiError::param("privs", text))?);
    }
    let name = cx.params().get("roleid").unwrap_or_default().to_owned();
    let mut acl = cx.cluster.dc.acl_mut();
    if acl.roles.contains_key(&name) {
        return Err(ApiError::Failed(format!("create role failed: role '{name}' already exists")));
    }
    acl.roles.insert(name, Role { privileges, special: false });
    Ok(Answer::protected(Json::Null, Call::Plain))
}

/// `GET /access/acl`: the entries that the caller may change.
pub fn acl(cx: &Context<'_>) -> Result<Answer, ApiError> {
    cx.verify(&[])?;
    let acl = cx.acl();
    let rows =
        acl.entries.iter().filter(|e| acl.may(cx.who, &e.path, "Permissions.Modify")).map(|e| {
            json!({
                "path": e.path, "propagate": i32::from(e.propagate), "roleid": e.role,
                "type": if e.subject.contains('!') { "token" } else { "user" },
                "ugid": e.subject,
            })
        });
    Ok(Answer::plain(rows.collect()))
}

/// `PUT /access/acl`
pub fn change_acl(cx: &Context<'_>) -> Result<Answer, ApiError> {
    cx.verify(&[
        opt("delete", Kind::Bool),
        opt("groups", Kind::Text(4096)),
        req("path", Kind::Pattern(|p| p.starts_with('/'))),
        opt("propagate", Kind::Bool),
        req("roles", Kind::Text(4096)),
        opt("tokens", Kind::Text(4096)),
        opt("users", Kind::Text(4096)),
    ])?;
    let params = cx.params();
    let path = match params.get("path").unwrap_or_default().trim_end_matches('/') {
        "" => "/",
        path => path,
    };
    cx.require(path, "Permissions.Modify")?;
    let list = |name: &str| split_list(params.get(name).unwrap_or_default());
    let (users, tokens, groups) = (list("users"), list("tokens"), list("groups"));
    if users.is_empty() && tokens.is_empty() && groups.is_empty() {
        let text = "either 'users', 'groups' or 'tokens' is required.";
        return Err(ApiError::param("users", text));
    }
    let mut acl = cx.cluster.dc.acl_mut();
    let failed = |text: String| ApiError::Failed(format!("ACL update failed: {text}"));
    if let Some(group) = groups.first() {
        return Err(failed(format!("no such group '{group}'")));
    }
    for role in list("roles") {
        if !acl.roles.contains_key(role) {
            return Err(failed(format!("role '{role}' does not exist")));
        }
    }
    for subject in users.iter().chain(&tokens) {
        if acl.by_name(subject).is_none() {
            return Err(failed(format!("no such user or token '{subject}'")));
        }
    }
    let propagate = params.get("propagate").is_none() || params.flag("propagate");
    for role in list("roles") {
        for subject in users.iter().chain(&tokens) {
            acl.set_entry(path, subject, role, propagate, params.flag("delete"));
        }
    }
    Ok(Answer::protected(Json::Null, Call::Plain))
}

fn user_row(name: &str, user: &User) -> Json {
    let realm = name.rsplit_once('@').map_or("", |(_, realm)| realm);
    let mut row = json!({
        "userid": name, "enable": i32::from(!user.disabled), "expire": 0, "realm-type": realm,
    });
    if let Some(comment) = &user.comment {
        row["comment"] = json!(comment);
    }
    row
}

/// `GET /access/users`
pub fn users(cx: &Context<'_>) -> Result<Answer, ApiError> {
    cx.verify(&[opt("enabled", Kind::Bool), opt("full", Kind::Bool)])?;
    let acl = cx.acl();
    let all = acl.may(cx.who, "/access/groups", "User.Modify")
        || acl.may(cx.who, "/access/groups", "Sys.Audit");
    let wanted = cx.params().get("enabled").map(|_| cx.params().flag("enabled"));
    let rows = acl
        .users
        .iter()
        .filter(|(name, _)| all || **name == cx.who.user)
        .filter(|(_, user)| wanted.is_none_or(|enabled| enabled != user.disabled))
        .map(|(name, user)| user_row(name, user));
    Ok(Answer::protected(rows.collect(), Call::Plain))
}

/// `POST /access/users`
pub fn create_user(cx: &Context<'_>) -> Result<Answer, ApiError> {
    cx.verify(&[
        opt("comment", Kind::Text(2048)),
        opt("email", Kind::Text(254)),
        opt("enable", Kind::Bool),
        opt("expire", Kind::Int(0, i64::MAX)),
        opt("firstname", Kind::Text(1024)),
        opt("lastname", Kind::Text(1024)),
        opt("password", Kind::Text(64)),
        USER_ID,
    ])?;
    let params = cx.params();
    let id = params.get("userid").unwrap_or_default();
    let realm = id.rsplit_once('@').map_or("", |(_, realm)| realm);
    cx.require(&format!("/access/realm/{realm}"), "Realm.AllocateUser")?;
    cx.require("/access/groups", "User.Modify")?;
    if !matches!(realm, "pam" | "pve") {
        return Err(ApiError::Failed(format!(
            "create user failed: domain '{realm}' does not exist"
        )));
    }
    let mut acl = cx.cluster.dc.acl_mut();
    if acl.users.contains_key(id) {
        return Err(ApiError::Failed(format!("create user failed: user '{id}' already exists")));
    }
    let user = User {
        password: params.get("password").map(str::to_owned),
        comment: params.get("comment").map(str::to_owned),
        disabled: params.get("enable").is_some() && !params.flag("enable"),
        ..User::default()
    };
    acl.users.insert(id.to_owned(), user);
    Ok(Answer::protected(Json::Null, Call::Plain))
}

/// `GET /access/users/{userid}`
pub fn user(cx: &Context<'_>, id: &str) -> Result<Answer, ApiError> {
    cx.acl().require_any(cx.who, "/access/groups", &["User.Modify", "Sys.Audit"])?;
    verify_with(cx, &[("userid", id)], &[&[USER_ID]])?;
    let acl = cx.acl();
    let user = acl.users.get(id).ok_or_else(|| no_user(id))?;
    let mut row = user_row(id, user);
    let tokens: Map<String, Json> =
        user.tokens.iter().map(|(name, token)| (name.clone(), token_info(token))).collect();
    row["tokens"] = json!(tokens);
    if let Some(row) = row.as_object_mut() {
        row.remove("userid");
        row.remove("realm-type");
    }
    Ok(Answer::plain(row))
}

/// `DELETE /access/users/{userid}`
pub fn delete_user(cx: &Context<'_>, id: &str) -> Result<Answer, ApiError> {
    cx.require("/access/groups", "User.Modify")?;
    verify_with(cx, &[("userid", id)], &[&[USER_ID]])?;
    let mut acl = cx.cluster.dc.acl_mut();
    if id == "root@pam" {
        return Err(ApiError::Failed("delete user failed: unable to delete root@pam".into()));
    }
    acl.users.remove(id).ok_or_else(|| no_user(id))?;
    acl.entries.retain(|e| e.subject.split('!').next() != Some(id));
    Ok(Answer::protected(Json::Null, Call::Plain))
}

fn token_info(token: &Token) -> Json {
    let mut info = json!({"privsep": i32::from(token.privsep), "expire": 0});
    if let Some(comment) = &token.comment {
        info["comment"] = json!(comment);
    }
    info
}

/// `GET /access/users/{userid}/token`
pub fn tokens(cx: &Context<'_>, id: &str) -> Result<Answer, ApiError> {
    require_self_or_admin(cx, id)?;
    verify_with(cx, &[("userid", id)], &[&[USER_ID]])?;
    let acl = cx.acl();
    let user = acl.users.get(id).ok_or_else(|| no_user(id))?;
    let rows = user.tokens.iter().map(|(name, token)| {
        let mut row = token_info(token);
        row["tokenid"] = json!(name);
        row
    });
    Ok(Answer::plain(rows.collect()))
}

/// `POST /access/users/{userid}/token/{tokenid}`
pub fn create_token(cx: &Context<'_>, id: &str, name: &str) -> Result<Answer, ApiError> {
    require_self_or_admin(cx, id)?;
    let own = [
        USER_ID,
        TOKEN_ID,
        opt("comment", Kind::Text(1024)),
        opt("expire", Kind::Int(0, i64::MAX)),
        opt("privsep", Kind::Bool),
    ];
    verify_with(cx, &[("userid", id), ("tokenid", name)], &[&own])?;
    let params = cx.params();
    let token = Token {
        secret: uuid(),
        privsep: params.get("privsep").is_none() || params.flag("privsep"),
        comment: params.get("comment").map(str::to_owned),
    };
    let mut acl = cx.cluster.dc.acl_mut();
    let user = acl.users.get_mut(id).ok_or_else(|| no_user(id))?;
    if user.tokens.contains_key(name) {
        return Err(ApiError::param("tokenid", "Token already exists."));
    }
    // What was given comes back as it came, so the flag is a text; a default is not shown.
    let mut info = json!({"privsep": u8::from(token.privsep).to_string()});
    if let Some(comment) = &token.comment {
        info["comment"] = json!(comment);
    }
    let data = json!({
        "full-tokenid": format!("{id}!{name}"), "info": info, "value": token.secret,
    });
    user.tokens.insert(name.to_owned(), token);
    Ok(Answer::protected(data, Call::Plain))
}

/// `DELETE /access/users/{userid}/token/{tokenid}`
pub fn delete_token(cx: &Context<'_>, id: &str, name: &str) -> Result<Answer, ApiError> {
    require_self_or_admin(cx, id)?;
    verify_with(cx, &[("userid", id), ("tokenid", name)], &[&[USER_ID, TOKEN_ID]])?;
    let full = format!("{id}!{name}");
    let mut acl = cx.cluster.dc.acl_mut();
    if !acl.remove_token(&full) {
        return Err(ApiError::Failed(format!("no such token '{name}' for user '{id}'")));
    }
    acl.entries.retain(|e| e.subject != full);
    Ok(Answer::protected(Json::Null, Call::Plain))
}
