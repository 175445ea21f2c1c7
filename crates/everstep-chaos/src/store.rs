//! The object store of the run that is disturbed: where it is, and how it is spoilt.
//!
//! ```text
//!  file://  processes ────────────────────────────▶ folder          taken away by renaming it
//!  s3://    processes ──▶ proxy, if a fault needs it ──▶ endpoint   slow, refused, away by the proxy's rules
//!                       driver ─────────────────────────▶           damaged directly, wherever it is
//! ```

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use everstep_protocol::random::Stream;
use everstep_store::RunStore;
use object_store::ObjectStoreExt as _;
use url::Url;

use crate::ChaosError;
use crate::proxy::http::HttpProxy;
use crate::scenario::{Action, Damage, Fault, Scenario, ScenarioError};

/// Environment variables that name the endpoint of S3; the first that is set is the one that is used.
const ENDPOINT_VARIABLES: [&str; 3] = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"];

/// Longest time that damaging one object may take; the run is not watched meanwhile.
const DAMAGE_DEADLINE: Duration = Duration::from_secs(10);

/// Where the disturbed run's objects are, and the proxy that its processes see instead.
#[derive(Debug)]
pub(crate) struct WorkloadStore {
    url: String,
    /// Name of the run, whose folder in the store it is.
    run: String,
    folder: Option<PathBuf>,
    /// Where requests go; or why they cannot be led through a proxy.
    endpoint: Result<Endpoint, String>,
    proxy: Option<HttpProxy>,
}

/// An S3 server that is spoken to over plain HTTP.
#[derive(Debug, PartialEq)]
struct Endpoint {
    server: SocketAddr,
    url: Url,
    /// Variables that name it.
    variables: Vec<&'static str>,
}

impl WorkloadStore {
    /// The store at `url` for the run called `run`; `variable` looks a variable of the environment up.
    pub(crate) fn new(
        url: &str,
        run: &str,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, String> {
        let parsed = Url::parse(url).map_err(|error| {
            format!("run.store: is {url}: {error}; allowed: file:///folder and s3://bucket/prefix")
        })?;
        let folder = match parsed.scheme() {
            "file" => parsed.to_file_path().ok(),
            _ => None,
        };
        let endpoint = match parsed.scheme() {
            "s3" => Endpoint::find(variable),
            _ => Err(format!("the run's store is {url}")),
        };
        Ok(Self {
            url: url.to_owned(),
            run: run.to_owned(),
            folder,
            endpoint,
            proxy: None,
        })
    }

    /// Refuses a scenario with a fault that this store cannot suffer.
    pub(crate) fn check(&self, scenario: &Scenario) -> Result<(), ScenarioError> {
        for fault in scenario.all_faults() {
            self.check_fault(fault)
                .map_err(|message| ScenarioError::Field {
                    file: scenario.file.display().to_string(),
                    field: format!("{}: kind", fault.place),
                    message,
                })?;
        }
        Ok(())
    }

    fn check_fault(&self, fault: &Fault) -> Result<(), String> {
        let action = &fault.action;
        let Err(reason) = &self.endpoint else {
            return Ok(());
        };
        let is_outage = matches!(action, Action::StoreOutage { .. });
        if !action.strikes_requests() || (is_outage && self.folder.is_some()) {
            return Ok(());
        }
        let folder = if is_outage { "a file:// store, " } else { "" };
        Err(format!(
            "{} needs a proxy before the store, and {reason}; allowed: {folder}an s3:// store (run.store) with AWS_ENDPOINT_URL=http://… in \
             the environment, or --simulate",
            action.kind()
        ))
    }

    /// Starts the proxy that the scenario needs, if it does. Equal seeds draw alike.
    pub(crate) fn start_proxy(&mut self, scenario: &Scenario, seed: u64) -> Result<(), ChaosError> {
        let mut faults = scenario.all_faults();
        if let Ok(endpoint) = &self.endpoint
            && faults.any(|fault| fault.action.strikes_requests())
        {
            let proxy = HttpProxy::start(endpoint.server, seed)
                .map_err(|error| ChaosError::Failed(format!("a proxy cannot start: {error}")))?;
            self.proxy = Some(proxy);
        }
        Ok(())
    }

    /// What the run's processes must find in their environment, so that their requests go through the proxy.
    pub(crate) fn environment(&self) -> Vec<(String, String)> {
        let (Some(proxy), Ok(endpoint)) = (&self.proxy, &self.endpoint) else {
            return Vec::new();
        };
        let path = endpoint.url.path().trim_end_matches('/');
        let url = format!("http://{}{path}", proxy.address());
        let variables = endpoint.variables.iter();
        variables
            .map(|variable| ((*variable).to_owned(), url.clone()))
            .collect()
    }

    pub(crate) fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    pub(crate) fn proxy(&self) -> Option<&HttpProxy> {
        self.proxy.as_ref()
    }

    /// Damages one object of the newest committed checkpoint and says which; the reason, if nothing has changed.
    pub(crate) fn damage_newest(&self, how: Damage, random: &mut Stream) -> Result<String, String> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| error.to_string())?;
        runtime.block_on(async {
            let damage = damage_newest(&self.url, &self.run, how, random);
            let deadline = tokio::time::timeout(DAMAGE_DEADLINE, damage);
            deadline
                .await
                .unwrap_or_else(|_| Err("the store takes too long".to_owned()))
        })
    }
}

impl Endpoint {
    fn find(variable: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        let set = |name: &&'static str| variable(name).map(|value| (*name, value));
        let found: Vec<(&str, String)> = ENDPOINT_VARIABLES.iter().filter_map(set).collect();
        let (name, value) = found.first().ok_or("AWS_ENDPOINT_URL is not set")?;
        let wrong = |why: &dyn std::fmt::Display| format!("{name}={value}: {why}");
        let url = Url::parse(value).map_err(|error| wrong(&error))?;
        if url.scheme() != "http" {
            return Err(wrong(&"is not plain http"));
        }
        let servers = url.socket_addrs(|| None).map_err(|error| wrong(&error))?;
        let server = servers.first().ok_or_else(|| wrong(&"has no address"))?;
        Ok(Self {
            server: *server,
            variables: found.iter().map(|(name, _)| *name).collect(),
            url,
        })
    }
}

async fn damage_newest(
    url: &str,
    run: &str,
    how: Damage,
    random: &mut Stream,
) -> Result<String, String> {
    let store = RunStore::open(url, run).map_err(|error| error.to_string())?;
    let committed = store.checkpoints().await;
    let committed = committed.map_err(|error| error.to_string())?;
    let newest = committed.last().ok_or("no checkpoint is committed")?;
    let manifest = store.load_manifest(*newest).await;
    let manifest = manifest.map_err(|error| error.to_string())?;
    let drawn = random.below(manifest.objects.len() as u64) as usize;
    let object = &manifest.objects[drawn];
    let refused = |error: object_store::Error| format!("{}: {error}", object.key);
    let objects = store.objects();
    let path = object_store::path::Path::from(object.key.as_str());
    let before = objects.get(&path).await.map_err(refused)?.bytes().await;
    let before = before.map_err(refused)?;
    if !object.is_intact(&before) {
        return Err(format!("{} is damaged already", object.key));
    }
    match how {
        Damage::Flip => {
            let mut bytes = before.to_vec();
            let at = random.below(bytes.len() as u64) as usize;
            bytes[at] ^= 1 << random.below(8);
            objects.put(&path, bytes.into()).await.map_err(refused)?;
        }
        Damage::Truncate => {
            let half = before.slice(..before.len() / 2);
            objects.put(&path, half.into()).await.map_err(refused)?;
        }
        Damage::Remove => objects.delete(&path).await.map_err(refused)?,
    }
    let after = match objects.get(&path).await {
        Ok(read) => Some(read.bytes().await.map_err(refused)?),
        Err(object_store::Error::NotFound { .. }) => None,
        Err(error) => return Err(refused(error)),
    };
    if after.is_some_and(|after| after == before) {
        return Err(format!("{} is as it was", object.key));
    }
    Ok(object.key.clone())
}

#[cfg(test)]
mod tests;
