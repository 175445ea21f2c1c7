//! EC2: a Spot instance is told two minutes before it is interrupted, and perhaps earlier that it may be.
//!
//! IMDSv2: a session token is put first and named in every request; without one the service answers 401. Both notices are 404 while there is
//! none. AWS advises to ask every five seconds.

use std::time::Duration;

use hyper::{Method, StatusCode};
use serde::Deserialize;

use super::{HttpError, Service, Teller, seconds_until};

const TOKEN: &str = "/latest/api/token";
const INTERRUPTION: &str = "/latest/meta-data/spot/instance-action";
const REBALANCE: &str = "/latest/meta-data/events/recommendations/rebalance";
const POLL: Duration = Duration::from_secs(5);

/// `{"action": "terminate", "time": "2017-09-18T08:22:00Z"}`
#[derive(Deserialize)]
struct Interruption {
    time: String,
}

/// Ends when the agent is gone.
pub(super) async fn watch(service: &Service, teller: &Teller) -> Result<(), HttpError> {
    let mut token = session(service).await?;
    let (mut is_interrupted, mut is_recommended) = (false, false);
    loop {
        let headers = [("X-aws-ec2-metadata-token", token.as_str())];
        let interruption = service.get(INTERRUPTION, &headers).await?;
        let rebalance = service.get(REBALANCE, &headers).await?;
        if [interruption.status, rebalance.status].contains(&StatusCode::UNAUTHORIZED) {
            token = session(service).await?;
            continue;
        }
        let mut told = Ok(());
        if interruption.status == StatusCode::OK && !is_interrupted {
            is_interrupted = true;
            let notice: Interruption = interruption.json(INTERRUPTION)?;
            let time = humantime::parse_rfc3339(&notice.time).ok();
            told = teller.tell(Some(time.map_or(0, seconds_until))).await;
        } else if rebalance.status == StatusCode::OK && !is_recommended && !is_interrupted {
            // The risk is high, the time is open: leaving in good order now costs least.
            is_recommended = true;
            told = teller.tell(None).await;
        }
        if told.is_err() {
            return Ok(());
        }
        tokio::time::sleep(POLL).await;
    }
}

async fn session(service: &Service) -> Result<String, HttpError> {
    let life = [("X-aws-ec2-metadata-token-ttl-seconds", "21600")];
    let answer = service
        .ask(Method::PUT, TOKEN, &life, Duration::ZERO)
        .await?;
    Ok(answer.ok(TOKEN)?.body)
}
