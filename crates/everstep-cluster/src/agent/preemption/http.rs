//! Requests to a metadata service: plain HTTP on a link-local address, never through a proxy.

use std::time::Duration;

use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// An answer is complete after this long, beyond what the request itself asks the service to wait.
const PATIENCE: Duration = Duration::from_secs(5);
/// Answers are small.
const BODY_BYTES_MAX: usize = 256 * 1024;

/// Why a service could not be asked.
#[derive(Debug, thiserror::Error)]
pub(super) enum HttpError {
    /// The endpoint is not `http://host:port`.
    #[error("endpoint {0} is not understood; allowed is http://HOST or http://HOST:PORT")]
    Endpoint(String),
    /// It cannot be reached, or breaks off.
    #[error("{endpoint}: {reason}")]
    Unreachable {
        /// The service.
        endpoint: String,
        /// Why.
        reason: String,
    },
    /// It answers something else than it is documented to.
    #[error("{path}: {reason}")]
    Answer {
        /// What was asked for.
        path: String,
        /// What is wrong.
        reason: String,
    },
}

/// A metadata service.
#[derive(Clone, Debug)]
pub(super) struct Service {
    endpoint: String,
}

/// Its answer.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) etag: Option<String>,
    pub(super) body: String,
}

impl Service {
    pub(super) fn new(endpoint: String) -> Self {
        Self { endpoint }
    }

    pub(super) async fn get(
        &self,
        path: &str,
        headers: &[(&str, &str)],
    ) -> Result<Answer, HttpError> {
        self.ask(Method::GET, path, headers, Duration::ZERO).await
    }

    /// Asks, where the service may take `wait` longer to answer.
    pub(super) async fn ask(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        wait: Duration,
    ) -> Result<Answer, HttpError> {
        let unreachable = |reason: String| HttpError::Unreachable {
            endpoint: self.endpoint.clone(),
            reason,
        };
        match tokio::time::timeout(PATIENCE + wait, self.exchange(method, path, headers)).await {
            Ok(answer) => answer,
            Err(_) => Err(unreachable("does not answer in time".to_owned())),
        }
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
    ) -> Result<Answer, HttpError> {
        let endpoint = || HttpError::Endpoint(self.endpoint.clone());
        let url = url::Url::parse(&self.endpoint).map_err(|_| endpoint())?;
        let (Some(host), "http") = (url.host_str(), url.scheme()) else {
            return Err(endpoint());
        };
        let port = url.port().unwrap_or(80);
        let unreachable = |error: &dyn std::fmt::Display| HttpError::Unreachable {
            endpoint: self.endpoint.clone(),
            reason: error.to_string(),
        };
        let stream = TcpStream::connect((host.trim_matches(['[', ']']), port))
            .await
            .map_err(|e| unreachable(&e))?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| unreachable(&e))?;
        let exchange = async {
            let mut request = Request::builder()
                .method(method)
                .uri(path)
                .header("Host", format!("{host}:{port}"))
                .header("Connection", "close");
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            let request = request
                .body(Empty::<Bytes>::new())
                .map_err(|e| unreachable(&e))?;
            let response = sender
                .send_request(request)
                .await
                .map_err(|e| unreachable(&e))?;
            let status = response.status();
            let etag = response.headers().get("etag");
            let etag = etag.and_then(|etag| etag.to_str().ok()).map(str::to_owned);
            let body = Limited::new(response.into_body(), BODY_BYTES_MAX)
                .collect()
                .await
                .map_err(|e| unreachable(&e))?
                .to_bytes();
            Ok(Answer {
                status,
                etag,
                body: String::from_utf8_lossy(&body).trim().to_owned(),
            })
        };
        // The connection moves the bytes; it ends with the exchange.
        tokio::pin!(exchange);
        tokio::select! {
            answer = &mut exchange => answer,
            _ = connection => exchange.await,
        }
    }
}

impl Answer {
    /// The body, if the service says that all is well.
    pub(super) fn ok(self, path: &str) -> Result<Self, HttpError> {
        if self.status == StatusCode::OK {
            return Ok(self);
        }
        Err(HttpError::Answer {
            path: path.to_owned(),
            reason: format!("status {}", self.status),
        })
    }

    /// The body as JSON.
    pub(super) fn json<T: serde::de::DeserializeOwned>(&self, path: &str) -> Result<T, HttpError> {
        serde_json::from_str(&self.body).map_err(|error| HttpError::Answer {
            path: path.to_owned(),
            reason: error.to_string(),
        })
    }
}
