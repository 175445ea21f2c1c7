//! Azure: Scheduled Events name machines and the time before which nothing happens to them.
//!
//! A machine sees the events of its whole scale set, so it must know its own name. Microsoft advises to ask every second.

use std::time::Duration;

use serde::Deserialize;

use super::{HttpError, Service, Teller, seconds_until};

const EVENTS: &str = "/metadata/scheduledevents?api-version=2020-07-01";
const NAME: &str = "/metadata/instance/compute/name?api-version=2021-02-01&format=text";
const HEADERS: [(&str, &str); 1] = [("Metadata", "true")];
const POLL: Duration = Duration::from_secs(1);

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Events {
    events: Vec<ScheduledEvent>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ScheduledEvent {
    event_id: String,
    event_type: String,
    resources: Vec<String>,
    /// `Mon, 19 Sep 2016 18:29:47 GMT`; empty once it has begun.
    #[serde(default)]
    not_before: String,
}

/// Ends when the agent is gone.
pub(super) async fn watch(service: &Service, teller: &Teller) -> Result<(), HttpError> {
    let name = service.get(NAME, &HEADERS).await?.ok(NAME)?.body;
    let mut known: Vec<String> = Vec::new();
    loop {
        let answer = service.get(EVENTS, &HEADERS).await?.ok(EVENTS)?;
        for event in answer.json::<Events>(EVENTS)?.events {
            let is_end = matches!(event.event_type.as_str(), "Preempt" | "Terminate");
            if !is_end || !event.resources.contains(&name) || known.contains(&event.event_id) {
                continue;
            }
            known.push(event.event_id);
            let time = httpdate::parse_http_date(&event.not_before).ok();
            let seconds_left = time.map_or(0, seconds_until);
            if teller.tell(Some(seconds_left)).await.is_err() {
                return Ok(());
            }
        }
        tokio::time::sleep(POLL).await;
    }
}
