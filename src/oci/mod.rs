//! From a bundle to a [`Plan`]: pure translation of the OCI runtime specification.
//!
//! Each concern of the specification has its own file, which reads what it needs from the
//! `document::Document` and knows the JSON path of everything it reads, so that an error names the
//! field. `fields` holds the verdict of every field in one table; it is checked before any
//! translation, so nothing that a bundle asks for can get lost on the way.
//!
//! The only I/O is [`load`], which reads `config.json`, [`Host::probe`], and what the compiler of
//! seccomp filters needs: a memfd, and the programs that [`load`] keeps.
//!
//! Reference for behaviour that the specification leaves open is runc, because containerd's clients
//! are written against it.

mod annotations;
mod capabilities;
mod cgroup;
mod devices;
mod document;
mod error;
mod fields;
mod hooks;
mod host;
mod id_mappings;
mod mounts;
mod namespaces;
pub mod plan;
mod process;
mod resources;
mod scheduling;
mod seccomp;
mod sysctl;
#[cfg(test)]
mod tests;
mod user_namespace;

use std::fs::File;
use std::io::Read;
use std::path::Path;

pub use annotations::Role;
pub use error::Error;
pub use fields::{FIELDS, Field, Place, SetField, Verdict};
pub use host::{Cgroups, Host, is_placeholder};
pub use process::Exec;
pub use resources::{Update, update};
pub use seccomp::Programs;

use document::Document;
use plan::Plan;

/// The largest `config.json` that is read, in bytes: a bound for memory, far above what clients
/// write.
pub const MAX_SPEC_BYTES: u64 = 16 * 1024 * 1024;

/// Reads `<bundle>/config.json` and translates it for this host. `unprivileged` is
/// [`Host::unprivileged`]; `programs` spares compiling a known seccomp profile again.
///
/// # Errors
/// [`Error::Read`] and [`Error::TooLarge`] for the file, else as [`plan()`].
pub fn load(bundle: &Path, unprivileged: bool, programs: &Programs) -> Result<Plan, Error> {
    let json = read(bundle)?;
    translate(&json, bundle, &Host { unprivileged, ..probe()? }, programs)
}

/// As [`load`], for a container of a Kubernetes pod: [placeholders](is_placeholder) stay paths, for the
/// caller to replace.
///
/// # Errors
/// As [`load`].
pub fn load_member(bundle: &Path, unprivileged: bool, programs: &Programs) -> Result<Plan, Error> {
    let json = read(bundle)?;
    let host = Host { unprivileged, ..probe()? };
    translate(&json, bundle, &host.with_placeholders(), programs)
}

/// What a bundle's container is to Kubernetes.
///
/// # Errors
/// As [`load`].
pub fn role(bundle: &Path) -> Result<Role, Error> {
    annotations::role(&Document::parse(&read(bundle)?)?)
}

fn read(bundle: &Path) -> Result<Vec<u8>, Error> {
    let path = bundle.join("config.json");
    let read = |path: &Path| {
        let mut json = Vec::new();
        File::open(path)?.take(MAX_SPEC_BYTES + 1).read_to_end(&mut json)?;
        Ok(json)
    };
    let json = read(&path).map_err(|source| Error::Read { path: path.clone(), source })?;
    match json.len() as u64 > MAX_SPEC_BYTES {
        true => Err(Error::TooLarge { path, limit: MAX_SPEC_BYTES }),
        false => Ok(json),
    }
}

fn probe() -> Result<Host, Error> {
    Host::probe().map_err(|source| Error::Probe { source })
}

/// What becomes of a bundle, field by field.
#[derive(Debug)]
pub struct Explanation {
    /// Every field that the bundle sets, in the order of their names.
    pub fields: Vec<SetField>,
    /// With the values looked at too.
    pub plan: Result<Plan, Error>,
    /// The host that the plan was made for.
    pub host: Host,
}

/// Says what would become of `<bundle>/config.json` on this host.
///
/// # Errors
/// The file cannot be read, or is not JSON.
pub fn explain(bundle: &Path) -> Result<Explanation, Error> {
    let json = read(bundle)?;
    let host = probe()?;
    let fields = fields::set_by(&Document::parse(&json)?);
    Ok(Explanation { fields, plan: plan(&json, bundle, &host), host })
}

/// Translates an OCI runtime specification. `bundle` is what relative host paths refer to.
///
/// # Errors
/// Names the field by its JSON path: [`Error::Unsupported`] with what to do instead, or
/// [`Error::Invalid`]. All are the fault of the specification, not of the node.
pub fn plan(spec_json: &[u8], bundle: &Path, host: &Host) -> Result<Plan, Error> {
    translate(spec_json, bundle, host, &Programs::default())
}

fn translate(
    spec_json: &[u8],
    bundle: &Path,
    host: &Host,
    programs: &Programs,
) -> Result<Plan, Error> {
    let spec = Document::parse(spec_json)?;
    let mut warnings = fields::check(&spec)?;

    let mut namespaces = namespaces::read(&spec, host)?;
    let user_namespace = user_namespace::read(&spec, host)?;
    let filter = seccomp::read(&spec, programs, &mut warnings)?;
    let process = process::container(&spec, host, filter.seccomp, &mut warnings)?;
    let root_propagation = mounts::root_propagation(&spec)?;
    let mappings = user_namespace.as_ref().map(|user| &user.mappings);
    let mut mounts = mounts::read(&spec, bundle, host, root_propagation, mappings, &mut warnings)?;
    let devices = devices::read(&spec, mounts::dev_is_bind(&mounts), host)?;
    let has_user_namespace = user_namespace.is_some();
    namespaces::hide_host_cgroups(
        &mut namespaces,
        &mounts,
        host,
        has_user_namespace,
        &mut warnings,
    );
    if let Some(user) = &user_namespace {
        user_namespace::adapt(user, &namespaces, &process, &devices.nodes, &mut mounts)?;
    }

    Ok(Plan {
        process,
        root_path: mounts::root_path(&spec, bundle)?,
        hostname: namespaces::host_name(&spec, "hostname", &namespaces.uts)?,
        domainname: namespaces::host_name(&spec, "domainname", &namespaces.uts)?,
        mounts,
        root_propagation,
        root_readonly: spec.flag("root.readonly")?,
        devices: devices.nodes,
        links: devices.links,
        sysctls: sysctl::read(&spec, &namespaces)?,
        time_offsets: namespaces::time_offsets(&spec, &namespaces.time)?,
        namespaces,
        user_namespace,
        masked_paths: mounts::paths(&spec, "linux.maskedPaths")?,
        readonly_paths: mounts::paths(&spec, "linux.readonlyPaths")?,
        resources: resources::read(&spec, host, &mut warnings)?,
        specified_device_rules: devices.specified,
        device_rules: devices.rules,
        cgroups_path: cgroup::path(&spec)?,
        seccomp_agent: filter.agent,
        hooks: hooks::read(&spec)?,
        name: annotations::name(&spec)?,
        image: annotations::image(&spec)?,
        pod: annotations::pod(&spec)?,
        annotations: annotations::read(&spec)?,
        oci_version: spec.string("ociVersion")?.unwrap_or_else(|| "1.0.0".to_owned()),
        warnings,
    })
}

/// Translates the OCI process of an exec request for a container whose own process is `container`.
///
/// As with runc, the filter and the oom score adjustment are the container's, and what the request
/// leaves out (capabilities, umask, AppArmor profile, limits, scheduling) is taken from the container.
///
/// # Errors
/// As [`plan()`].
pub fn exec_process(
    json: &[u8],
    container: &proxmox_shim_init::protocol::Process,
    host: &Host,
) -> Result<Exec, Error> {
    process::exec(json, container, host)
}
