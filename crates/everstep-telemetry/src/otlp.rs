//! Span export over OTLP that training never waits for.
//!
//! Spans go through a bounded queue to a thread of their own, from there to a small runtime of their own: the caller's
//! runtime may be busy, single-threaded or absent. What the queue cannot hold, or what the collector does not take in
//! time, is dropped. A collector that does not answer is said once, not once per batch.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use opentelemetry::KeyValue;
use opentelemetry_otlp::WithExportConfig as _;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, SdkTracerProvider, SpanData, SpanExporter,
};
use tokio::runtime::Runtime;

use crate::error::TelemetryError;
use crate::names::resource;

/// Spans that wait for export at most; some hundred steps of one process.
const QUEUE_SPANS_MAX: usize = 16_384;
/// Spans per request at most.
const BATCH_SPANS_MAX: usize = 512;
/// How long finished spans wait for company.
const BATCH_DELAY: Duration = Duration::from_millis(500);
/// How long one request may take, connecting included.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a collector that failed is left alone.
const BACK_OFF: Duration = Duration::from_secs(5);
/// The least time between two log lines about the same trouble.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(60);
/// How long the end of the process waits for the last spans at most.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// The variables that switch export on, the more special one first.
const ENDPOINT_VARIABLES: [&str; 2] = [
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
];
const PROTOCOL_VARIABLES: [&str; 2] = [
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
    "OTEL_EXPORTER_OTLP_PROTOCOL",
];

/// Who the spans are from.
#[derive(Debug)]
pub(crate) struct Origin<'a> {
    pub(crate) process: &'a str,
    pub(crate) node: &'a str,
    pub(crate) run: &'a str,
}

/// The running export. Dropping it sends what is queued, waiting a bounded time.
#[derive(Debug)]
pub(crate) struct Otlp {
    pub(crate) provider: SdkTracerProvider,
    endpoint: String,
    closing: Arc<AtomicBool>,
    /// Taken by `drop` only: a runtime must not be dropped inside another one.
    runtime: Option<Runtime>,
}

impl Otlp {
    /// Starts the export if the environment names a collector.
    pub(crate) fn from_environment(origin: &Origin<'_>) -> Result<Option<Self>, TelemetryError> {
        if variable(&["OTEL_SDK_DISABLED"])
            .is_some_and(|(_, value)| value.eq_ignore_ascii_case("true"))
        {
            return Ok(None);
        }
        let Some((name, endpoint)) = variable(&ENDPOINT_VARIABLES) else {
            return Ok(None);
        };
        if let Some((variable, value)) = variable(&PROTOCOL_VARIABLES)
            && value != "grpc"
        {
            let reason = "only `grpc` is built in".to_owned();
            return Err(TelemetryError::Variable {
                variable,
                value,
                reason,
            });
        }
        if !(endpoint.starts_with("http://") || endpoint.starts_with("https://")) {
            let reason =
                "it must be http://HOST:PORT or https://HOST:PORT (usually port 4317)".to_owned();
            return Err(TelemetryError::Variable {
                variable: name,
                value: endpoint,
                reason,
            });
        }
        Self::start(name, endpoint, origin).map(Some)
    }

    fn start(
        variable_name: String,
        endpoint: String,
        origin: &Origin<'_>,
    ) -> Result<Self, TelemetryError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("otlp-export")
            .enable_all()
            .build()
            .map_err(|error| TelemetryError::Exporter(error.to_string()))?;
        let closing = Arc::new(AtomicBool::new(false));
        let exporter = {
            // The channel starts its tasks on the runtime that is entered here.
            let _entered = runtime.enter();
            opentelemetry_otlp::SpanExporter::builder()
                .with_tonic()
                .with_endpoint(endpoint.clone())
                .with_timeout(EXPORT_TIMEOUT)
                .build()
                .map_err(|error| TelemetryError::Variable {
                    variable: variable_name,
                    value: endpoint.clone(),
                    reason: error.to_string(),
                })?
        };
        let exporter = PatientExporter {
            inner: Arc::new(Mutex::new(Some(Arc::new(exporter)))),
            runtime: runtime.handle().clone(),
            endpoint: endpoint.clone(),
            closing: closing.clone(),
            health: Mutex::new(Health::default()),
        };
        let batches = BatchConfigBuilder::default()
            .with_max_queue_size(QUEUE_SPANS_MAX)
            .with_max_export_batch_size(BATCH_SPANS_MAX)
            .with_scheduled_delay(BATCH_DELAY)
            .build();
        let provider = SdkTracerProvider::builder()
            .with_resource(resource_of(origin))
            .with_span_processor(
                BatchSpanProcessor::builder(exporter)
                    .with_batch_config(batches)
                    .build(),
            )
            .build();
        Ok(Self {
            provider,
            endpoint,
            closing,
            runtime: Some(runtime),
        })
    }
}

impl Drop for Otlp {
    fn drop(&mut self) {
        let Some(runtime) = self.runtime.take() else {
            return;
        };
        self.closing.store(true, Ordering::Relaxed);
        if let Err(error) = self.provider.shutdown_with_timeout(FLUSH_TIMEOUT) {
            tracing::warn!(
                endpoint = self.endpoint,
                "the last spans were not exported: {error}"
            );
        }
        runtime.shutdown_background();
    }
}

/// The first of the variables that is set to something, and its value.
fn variable(names: &[&str]) -> Option<(String, String)> {
    names.iter().find_map(|&name| {
        let value = std::env::var(name).ok()?;
        let value = value.trim();
        (!value.is_empty()).then(|| (name.to_owned(), value.to_owned()))
    })
}

fn resource_of(origin: &Origin<'_>) -> Resource {
    let mut builder = Resource::builder();
    if variable(&["OTEL_SERVICE_NAME"]).is_none() {
        builder = builder.with_service_name("everstep");
    }
    builder
        .with_attributes([
            KeyValue::new(resource::SERVICE_INSTANCE, origin.process.to_owned()),
            KeyValue::new(resource::SERVICE_VERSION, env!("CARGO_PKG_VERSION")),
            KeyValue::new(resource::HOST, origin.node.to_owned()),
            KeyValue::new(resource::RUN, origin.run.to_owned()),
        ])
        .build()
}

/// What is known of the collector.
#[derive(Debug, Default)]
struct Health {
    /// When it failed last; none while it answers.
    failed: Option<Instant>,
    /// When the last line about a failure was logged.
    complained: Option<Instant>,
    /// Spans lost since it last answered.
    num_lost: usize,
}

/// An exporter that bounds the time of a request, leaves a failing collector alone for a while, and complains rarely.
struct PatientExporter<E> {
    /// Shared with requests in flight. Taken at shutdown.
    inner: Arc<Mutex<Option<Arc<E>>>>,
    runtime: tokio::runtime::Handle,
    endpoint: String,
    closing: Arc<AtomicBool>,
    health: Mutex<Health>,
}

impl<E> std::fmt::Debug for PatientExporter<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PatientExporter")
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}

impl<E> PatientExporter<E> {
    fn inner(&self) -> Option<Arc<E>> {
        self.inner
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Whether the collector failed a moment ago. At the process's end it gets a last chance.
    fn is_left_alone(&self, num_spans: usize) -> bool {
        let mut health = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        let alone = health
            .failed
            .is_some_and(|failed| failed.elapsed() < BACK_OFF);
        if alone && !self.closing.load(Ordering::Relaxed) {
            health.num_lost += num_spans;
            return true;
        }
        false
    }

    fn note(&self, num_spans: usize, result: &OTelSdkResult) {
        let mut health = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        match result {
            Ok(()) => {
                if health.failed.take().is_some() {
                    let lost = std::mem::take(&mut health.num_lost);
                    tracing::info!(
                        endpoint = self.endpoint,
                        lost,
                        "the trace collector answers again"
                    );
                }
            }
            Err(error) => {
                health.num_lost += num_spans;
                health.failed = Some(Instant::now());
                if health
                    .complained
                    .is_none_or(|complained| complained.elapsed() >= COMPLAINT_INTERVAL)
                {
                    health.complained = Some(Instant::now());
                    let lost = health.num_lost;
                    tracing::warn!(
                        endpoint = self.endpoint,
                        lost,
                        "spans cannot be exported and are dropped; training goes on: {error}"
                    );
                }
            }
        }
    }
}

impl<E: SpanExporter + 'static> SpanExporter for PatientExporter<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let num_spans = batch.len();
        if self.is_left_alone(num_spans) {
            return Ok(());
        }
        let Some(inner) = self.inner() else {
            return Err(OTelSdkError::AlreadyShutdown);
        };
        // The thread that asks for the export has no runtime, and timers need one.
        let request = self
            .runtime
            .spawn(async move { tokio::time::timeout(EXPORT_TIMEOUT, inner.export(batch)).await });
        let result = match request.await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(OTelSdkError::Timeout(EXPORT_TIMEOUT)),
            Err(error) => Err(OTelSdkError::InternalFailure(error.to_string())),
        };
        self.note(num_spans, &result);
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        match self
            .inner
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
        {
            Some(inner) => inner.shutdown_with_timeout(timeout),
            None => Ok(()),
        }
    }

    fn set_resource(&mut self, resource: &Resource) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        // Called before the first export, so nobody else holds the exporter.
        if let Some(inner) = inner.as_mut().and_then(Arc::get_mut) {
            inner.set_resource(resource);
        }
    }
}
