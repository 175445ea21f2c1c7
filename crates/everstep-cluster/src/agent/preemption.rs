//! Notices that the machine will be taken away, from the services that cloud providers run for their machines.
//!
//! Each source is a task beside the agent that asks its service and passes on what it says; a service that does not answer is asked again.
//!
//! - `aws`: EC2 Spot interruption notices and rebalance recommendations, by IMDSv2
//! - `gcp`: preemption and host maintenance, by the metadata server
//! - `azure`: Scheduled Events
//! - `http`: the requests

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::requests::{AgentSignal, PreemptionNotice};

mod aws;
mod azure;
mod gcp;
mod http;

use http::{HttpError, Service};

/// Waits between failures; a machine of another provider, or of none, has no such service.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(60);

/// Whose notices are looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PreemptionSource {
    /// EC2 Spot instances.
    Aws,
    /// Google Compute Engine.
    Gcp,
    /// Azure virtual machines.
    Azure,
}

impl PreemptionSource {
    /// Its name, as on the command line and in events.
    pub fn name(self) -> &'static str {
        match self {
            PreemptionSource::Aws => "aws",
            PreemptionSource::Gcp => "gcp",
            PreemptionSource::Azure => "azure",
        }
    }

    /// The source with this name.
    pub fn named(name: &str) -> Option<Self> {
        let all = [Self::Aws, Self::Gcp, Self::Azure];
        all.into_iter().find(|source| source.name() == name)
    }

    /// Where its service is, on every machine of the provider.
    fn endpoint(self) -> &'static str {
        match self {
            PreemptionSource::Aws | PreemptionSource::Azure => "http://169.254.169.254",
            PreemptionSource::Gcp => "http://metadata.google.internal",
        }
    }
}

/// Passes on the notices of `source` until the agent is gone. `endpoint` replaces the provider's, as `http://host:port`.
pub async fn watch_preemption(
    source: PreemptionSource,
    endpoint: Option<String>,
    agent: mpsc::Sender<AgentSignal>,
) {
    let service = Service::new(endpoint.unwrap_or_else(|| source.endpoint().to_owned()));
    let teller = Teller { source, agent };
    let mut retry = RETRY_FIRST;
    loop {
        let began = tokio::time::Instant::now();
        let outcome = match source {
            PreemptionSource::Aws => aws::watch(&service, &teller).await,
            PreemptionSource::Gcp => gcp::watch(&service, &teller).await,
            PreemptionSource::Azure => azure::watch(&service, &teller).await,
        };
        let Err(error) = outcome else {
            return;
        };
        // It had worked for a while: a hiccup.
        if began.elapsed() > RETRY_MAX {
            retry = RETRY_FIRST;
        }
        let seconds = retry.as_secs();
        tracing::warn!(source = source.name(), %error, seconds, "no preemption notices now; asked again later");
        tokio::time::sleep(retry).await;
        retry = (retry * 2).min(RETRY_MAX);
    }
}

/// Tells the agent.
struct Teller {
    source: PreemptionSource,
    agent: mpsc::Sender<AgentSignal>,
}

/// The agent is gone, so nobody needs notices any more.
struct Over;

impl Teller {
    async fn tell(&self, seconds_left: Option<u64>) -> Result<(), Over> {
        let notice = PreemptionNotice {
            source: self.source.name().to_owned(),
            seconds_left,
        };
        let signal = AgentSignal::Preempted(notice);
        self.agent.send(signal).await.map_err(|_| Over)
    }
}

/// Seconds from now to `time`; 0 if it has passed.
fn seconds_until(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::now())
        .map_or(0, |left| left.as_secs())
}

#[cfg(test)]
mod tests;
