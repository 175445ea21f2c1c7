//! Compute Engine: a Spot machine has thirty seconds once `preempted` is TRUE; a machine with GPUs is told of host maintenance an hour before.
//!
//! The metadata server answers at once, or, with `wait_for_change` and the tag of the last value, when the value changes.

use std::time::Duration;

use hyper::Method;

use super::{HttpError, Service, Teller};

const PREEMPTED: &str = "/computeMetadata/v1/instance/preempted";
const MAINTENANCE: &str = "/computeMetadata/v1/instance/maintenance-event";
/// How long the server may wait for a change.
const WAIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_secs(1);
const PREEMPTION_SECONDS: u64 = 30;
const MAINTENANCE_SECONDS: u64 = 3_600;

/// Ends when the agent is gone.
pub(super) async fn watch(service: &Service, teller: &Teller) -> Result<(), HttpError> {
    tokio::select! {
        outcome = value(service, teller, PREEMPTED, "TRUE", PREEMPTION_SECONDS) => outcome,
        outcome = value(service, teller, MAINTENANCE, "TERMINATE_ON_HOST_MAINTENANCE", MAINTENANCE_SECONDS) => outcome,
    }
}

/// Tells whenever the value at `path` becomes `alarm`.
async fn value(
    service: &Service,
    teller: &Teller,
    path: &str,
    alarm: &str,
    seconds_left: u64,
) -> Result<(), HttpError> {
    let flavor = [("Metadata-Flavor", "Google")];
    let mut answer = service.get(path, &flavor).await?.ok(path)?;
    let mut was_alarm = false;
    loop {
        let is_alarm = answer.body == alarm;
        if is_alarm && !was_alarm && teller.tell(Some(seconds_left)).await.is_err() {
            return Ok(());
        }
        was_alarm = is_alarm;
        let etag = answer.etag.as_deref().unwrap_or("0");
        let wait = WAIT.as_secs();
        let next = format!("{path}?wait_for_change=true&timeout_sec={wait}&last_etag={etag}");
        let asked = service
            .ask(Method::GET, &next, &flavor, WAIT)
            .await?
            .ok(path)?;
        // A server that does not wait must not be asked without end.
        if asked.etag == answer.etag {
            tokio::time::sleep(POLL).await;
        }
        answer = asked;
    }
}
