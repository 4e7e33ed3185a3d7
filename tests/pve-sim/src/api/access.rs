//! `/access`: the caller's rights.

use serde_json::{Map, Value as Json, json};

use super::{Answer, Context};
use crate::error::ApiError;
use crate::params::{Kind, opt};

/// `GET /access/permissions`
pub fn permissions(cx: &Context<'_>) -> Result<Answer, ApiError> {
    cx.verify(&[opt("path", Kind::Text(4096)), opt("userid", Kind::Text(255))])?;
    let acl = cx.node.acl();
    let of = |path: &str| -> Json {
        let list = acl.privileges(cx.who, path);
        Json::Object(list.iter().map(|p| ((*p).to_owned(), json!(1))).collect())
    };
    if let Some(userid) = cx.params().get("userid").filter(|u| *u != cx.who.auth_id()) {
        cx.node.acl().require(cx.who, "/access", "Sys.Audit")?;
        return Err(ApiError::Failed(format!("no such user ('{userid}')")));
    }
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
