//! Placeholder of the configuration: enough for the bootstrap to be built and tested against.

use containerd_shim_protos::protobuf::CodedInputStream;
use serde::Deserialize;

/// What is wrong with it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Cannot be read.
    #[error("cannot read the configuration {0}: {1}")]
    Read(String, std::io::Error),
    /// Cannot be parsed.
    #[error("the configuration {0} is wrong: {1}")]
    Parse(String, toml::de::Error),
}

/// The configuration.
#[derive(Debug, Deserialize)]
pub struct Config {
    /// `[log]`.
    #[serde(default)]
    pub log: Log,
    /// `[proxmox]`.
    pub proxmox: toml::Table,
}

/// `[log]`.
#[derive(Debug, Deserialize)]
pub struct Log {
    /// A level.
    pub level: String,
}

impl Default for Log {
    fn default() -> Log {
        Log { level: "info".into() }
    }
}

impl Config {
    /// Loads it.
    pub fn load(options: Option<(&str, &[u8])>) -> Result<Config, Error> {
        let mut path = "/etc/containerd-shim-proxmox/config.toml".to_string();
        if let Some((_, value)) = options {
            let mut stream = CodedInputStream::from_bytes(value);
            while let Ok(Some(tag)) = stream.read_raw_tag_or_eof() {
                let Ok(text) = stream.read_string() else { break };
                if tag >> 3 == 2 {
                    path = text;
                }
            }
        }
        let text = std::fs::read_to_string(&path).map_err(|e| Error::Read(path.clone(), e))?;
        toml::from_str(&text).map_err(|e| Error::Parse(path, e))
    }
}
