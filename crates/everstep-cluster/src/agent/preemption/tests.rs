//! Against real HTTP servers on loopback that answer as the providers' documentation says.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::*;

/// What a server was asked, and its headers in lower case.
struct Asked {
    line: String,
    headers: Vec<String>,
}

impl Asked {
    fn has(&self, header: &str) -> bool {
        self.headers.iter().any(|own| own == header)
    }
}

/// A server that answers with a status line's end, more headers and a body. It serves until the test ends.
fn serve(answer: impl FnMut(&Asked) -> (String, String, String) + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let answer = Arc::new(Mutex::new(answer));
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let answer = answer.clone();
            std::thread::spawn(move || {
                let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
                let line = lines.next().unwrap_or_default();
                let headers = lines
                    .take_while(|line| !line.is_empty())
                    .map(|line| line.to_lowercase())
                    .collect();
                let (status, more, body) = (answer.lock().unwrap())(&Asked { line, headers });
                let text = format!(
                    "HTTP/1.1 {status}\r\nContent-Length: {}\r\n{more}\r\n{body}",
                    body.len()
                );
                let _ = (&stream).write_all(text.as_bytes());
            });
        }
    });
    format!("http://{address}")
}

fn reply(status: &str, body: &str) -> (String, String, String) {
    (status.to_owned(), String::new(), body.to_owned())
}

/// The first `count` notices that come from the service.
async fn notices(
    source: PreemptionSource,
    endpoint: String,
    count: usize,
) -> Vec<PreemptionNotice> {
    let (agent, mut signals) = mpsc::channel(4);
    let watcher = tokio::spawn(watch_preemption(source, Some(endpoint), agent));
    let mut notices = Vec::new();
    let all = async {
        while notices.len() < count {
            match signals.recv().await {
                Some(AgentSignal::Preempted(notice)) => notices.push(notice),
                other => panic!("{other:?}"),
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), all)
        .await
        .unwrap();
    watcher.abort();
    notices
}

fn in_seconds(seconds: u64) -> SystemTime {
    SystemTime::now() + Duration::from_secs(seconds)
}

#[tokio::test]
async fn aws_takes_a_token_and_renews_one_that_is_refused() {
    let mut tokens = 0;
    let mut refused = false;
    let endpoint = serve(move |asked| {
        if asked.line == "PUT /latest/api/token HTTP/1.1" {
            assert!(asked.has("x-aws-ec2-metadata-token-ttl-seconds: 21600"));
            tokens += 1;
            return reply("200 OK", &format!("token-{tokens}"));
        }
        // The first token has run out by the time it is used.
        if !asked.has("x-aws-ec2-metadata-token: token-2") {
            refused = true;
            return reply("401 Unauthorized", "");
        }
        assert!(refused);
        if asked.line == "GET /latest/meta-data/spot/instance-action HTTP/1.1" {
            let time = humantime::format_rfc3339_seconds(in_seconds(121));
            return reply(
                "200 OK",
                &format!(r#"{{"action": "terminate", "time": "{time}"}}"#),
            );
        }
        reply("404 Not Found", "")
    });
    let notice = notices(PreemptionSource::Aws, endpoint, 1).await.remove(0);
    assert_eq!(notice.source, "aws");
    let seconds = notice.seconds_left.unwrap();
    assert!((110..=121).contains(&seconds), "{seconds}");
}

#[tokio::test]
async fn aws_recommends_to_leave() {
    let endpoint = serve(|asked| match asked.line.as_str() {
        "PUT /latest/api/token HTTP/1.1" => reply("200 OK", "token"),
        "GET /latest/meta-data/events/recommendations/rebalance HTTP/1.1" => {
            reply("200 OK", r#"{"noticeTime": "2020-10-27T08:22:00Z"}"#)
        }
        _ => reply("404 Not Found", ""),
    });
    let notice = notices(PreemptionSource::Aws, endpoint, 1).await.remove(0);
    assert_eq!(notice.seconds_left, None);
}

#[tokio::test]
async fn gcp_waits_for_a_change() {
    let endpoint = serve(|asked| {
        if !asked.has("metadata-flavor: google") {
            return reply("403 Forbidden", "");
        }
        let path = asked.line.split_whitespace().nth(1).unwrap_or_default();
        let tagged = |tag: &str, body: &str| {
            (
                "200 OK".to_owned(),
                format!("ETag: {tag}\r\n"),
                body.to_owned(),
            )
        };
        let is_waiting = path.contains("wait_for_change=true");
        match path.split('?').next().unwrap_or_default() {
            "/computeMetadata/v1/instance/preempted"
                if is_waiting && path.ends_with("last_etag=before") =>
            {
                tagged("after", "TRUE")
            }
            "/computeMetadata/v1/instance/preempted" if is_waiting => tagged("after", "TRUE"),
            "/computeMetadata/v1/instance/preempted" => tagged("before", "FALSE"),
            "/computeMetadata/v1/instance/maintenance-event" => tagged("one", "NONE"),
            _ => reply("404 Not Found", ""),
        }
    });
    let notice = notices(PreemptionSource::Gcp, endpoint, 1).await.remove(0);
    let expected = PreemptionNotice {
        source: "gcp".to_owned(),
        seconds_left: Some(30),
    };
    assert_eq!(notice, expected);
}

#[tokio::test]
async fn azure_tells_own_events_from_others_and_each_once() {
    let endpoint = serve(|asked| {
        assert!(asked.has("metadata: true"));
        if asked
            .line
            .starts_with("GET /metadata/instance/compute/name?")
        {
            return reply("200 OK", "own-vm");
        }
        assert_eq!(
            asked.line,
            "GET /metadata/scheduledevents?api-version=2020-07-01 HTTP/1.1"
        );
        let event = |id: u32, kind: &str, machine: &str, time: &str| {
            format!(
                r#"{{"EventId": "{id}", "EventType": "{kind}", "ResourceType": "VirtualMachine", "Resources": ["{machine}"], "EventStatus": "Scheduled", "NotBefore": "{time}"}}"#
            )
        };
        let soon = httpdate::fmt_http_date(in_seconds(31));
        let later = httpdate::fmt_http_date(in_seconds(601));
        let events = [
            event(1, "Preempt", "other-vm", &soon),
            event(2, "Reboot", "own-vm", &soon),
            event(3, "Terminate", "own-vm", &later),
            event(4, "Preempt", "own-vm", &soon),
        ];
        let body = format!(
            r#"{{"DocumentIncarnation": 1, "Events": [{}]}}"#,
            events.join(", ")
        );
        reply("200 OK", &body)
    });
    let notices = notices(PreemptionSource::Azure, endpoint, 2).await;
    let seconds: Vec<u64> = notices.iter().map(|n| n.seconds_left.unwrap()).collect();
    assert!((590..=601).contains(&seconds[0]), "{seconds:?}");
    assert!((20..=31).contains(&seconds[1]), "{seconds:?}");
}

#[tokio::test]
async fn nobody_there_is_no_notice_and_a_wrong_endpoint_is_named() {
    let service = Service::new("ftp://somewhere".to_owned());
    let error = service.get("/", &[]).await.unwrap_err().to_string();
    assert!(
        error.contains("ftp://somewhere is not understood"),
        "{error}"
    );
    let closed = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let service = Service::new(format!("http://{closed}"));
    let error = service.get("/", &[]).await.unwrap_err().to_string();
    assert!(error.contains("refused"), "{error}");
}
