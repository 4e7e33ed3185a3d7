//! `hooks`.

use std::path::Path;

use proxmox_shim_init::protocol::Hook;

use super::Error;
use super::document::Document;
use super::plan::Hooks;

pub(super) fn read(spec: &Document) -> Result<Hooks, Error> {
    Ok(Hooks {
        prestart: list(spec, "hooks.prestart")?,
        create_runtime: list(spec, "hooks.createRuntime")?,
        create_container: list(spec, "hooks.createContainer")?,
        start_container: list(spec, "hooks.startContainer")?,
        poststart: list(spec, "hooks.poststart")?,
        poststop: list(spec, "hooks.poststop")?,
    })
}

fn list(spec: &Document, path: &str) -> Result<Vec<Hook>, Error> {
    spec.list::<oci_spec::runtime::Hook>(path)?
        .into_iter()
        .map(|item| {
            let (field, hook) = (item.field, item.value);
            if !Path::new(hook.path()).is_absolute() {
                return Err(Error::invalid(format!("{field}.path"), "must be absolute"));
            }
            let timeout = match hook.timeout() {
                None => None,
                Some(seconds @ 1..) => Some(seconds.unsigned_abs()),
                Some(_) => {
                    return Err(Error::invalid(
                        format!("{field}.timeout"),
                        "must be greater than zero",
                    ));
                }
            };
            let env = hook.env().clone().unwrap_or_default();
            if let Some(index) = env.iter().position(|entry| !entry.contains('=')) {
                // The value may be a secret, so it is not repeated here.
                return Err(Error::invalid(
                    format!("{field}.env[{index}]"),
                    "must have the form NAME=value",
                ));
            }
            Ok(Hook {
                path: hook.path().to_string_lossy().into_owned(),
                args: hook.args().clone().unwrap_or_default(),
                env,
                timeout,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_json(json: &str) -> Result<Hooks, String> {
        read(&Document::parse(json.as_bytes()).unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn each_moment_keeps_its_hooks_in_order() {
        let hooks = read_json(
            r#"{"hooks":{"prestart":[{"path":"/a"}],
            "createRuntime":[{"path":"/b","args":["b","-x"],"env":["A=1"],"timeout":5},{"path":"/c"}],
            "createContainer":[{"path":"/g"}],"startContainer":[{"path":"/d"}],"poststart":[{"path":"/e"}],"poststop":[{"path":"/f"}]}}"#,
        )
        .unwrap();
        let plain =
            |path: &str| Hook { path: path.to_owned(), args: vec![], env: vec![], timeout: None };
        assert_eq!(
            hooks,
            Hooks {
                prestart: vec![plain("/a")],
                create_runtime: vec![
                    Hook {
                        path: "/b".to_owned(),
                        args: vec!["b".to_owned(), "-x".to_owned()],
                        env: vec!["A=1".to_owned()],
                        timeout: Some(5),
                    },
                    plain("/c"),
                ],
                create_container: vec![plain("/g")],
                start_container: vec![plain("/d")],
                poststart: vec![plain("/e")],
                poststop: vec![plain("/f")],
            }
        );
        assert_eq!(read_json("{}").unwrap(), Hooks::default());
    }

    #[test]
    fn wrong_hooks_are_refused() {
        for (json, expected) in [
            (r#"{"hooks":{"poststop":[{"path":"a"}]}}"#, "hooks.poststop[0].path must be absolute"),
            (
                r#"{"hooks":{"prestart":[{"path":"/a","env":["A=","B"]}]}}"#,
                "hooks.prestart[0].env[1] must have the form NAME=value",
            ),
            (
                r#"{"hooks":{"poststart":[{"path":"/a","timeout":0}]}}"#,
                "hooks.poststart[0].timeout must be greater than zero",
            ),
        ] {
            assert_eq!(read_json(json).unwrap_err(), expected);
        }
    }
}
