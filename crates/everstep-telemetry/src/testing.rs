//! Real peers for tests: an OTLP collector as a child process.
//!
//! The collector is [Rotel](https://github.com/streamfold/rotel), whose binary its PyPI package carries; see
//! [`OtlpReceiver::INSTALL`]. It prints every span that it receives, and this module reads what it prints.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A span as the collector printed it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ReceivedSpan {
    /// 32 hexadecimal digits.
    pub trace_id: String,
    /// 16 hexadecimal digits.
    pub span_id: String,
    /// The parent's id; empty for a root.
    pub parent_id: String,
    /// Its name, see [`names::span`](crate::names::span).
    pub name: String,
    /// The resource's attributes: who sent it.
    pub resource: BTreeMap<String, String>,
    /// Its own attributes.
    pub attributes: BTreeMap<String, String>,
}

impl ReceivedSpan {
    /// The process that sent it.
    #[must_use]
    pub fn process(&self) -> &str {
        self.resource
            .get(crate::names::resource::SERVICE_INSTANCE)
            .map_or("", String::as_str)
    }
}

/// A running collector. It is killed when this is dropped.
#[derive(Debug)]
pub struct OtlpReceiver {
    child: Child,
    endpoint: String,
    output: Arc<Output>,
}

/// What the collector has printed so far.
#[derive(Debug, Default)]
struct Output {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lines: Vec<String>,
    num_open: usize,
}

impl Output {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl OtlpReceiver {
    /// How to install the collector, from the repository's root.
    pub const INSTALL: &str = "python3 -m pip install --no-deps --only-binary=:all: --target third_party/rotel rotel==0.0.1a15";

    /// Starts the collector on free ports of this machine, and returns when it listens.
    ///
    /// # Errors
    /// One line that says what is wrong and, if the collector is not installed, how to install it.
    pub fn start() -> Result<Self, String> {
        let binary = match std::env::var_os("EVERSTEP_ROTEL") {
            Some(path) => PathBuf::from(path),
            None => PathBuf::from(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/../../third_party/rotel/rotel/rotel-agent"
            )),
        };
        if !binary.exists() {
            return Err(format!(
                "the OTLP collector is not installed; run `cargo xtask setup --tests`, or: {}",
                Self::INSTALL
            ));
        }
        // Both are held until the collector is about to start, so that they differ.
        let ports = [free_port()?, free_port()?];
        let [grpc, http] = ports.each_ref().map(|(address, _)| address.clone());
        drop(ports);
        let mut child = Command::new(&binary)
            .args([
                "start",
                "--exporter",
                "blackhole",
                "--debug-log",
                "traces",
                "--debug-log-verbosity",
                "detailed",
            ])
            .args(["--otlp-grpc-endpoint", &grpc, "--otlp-http-endpoint", &http])
            .env("LD_LIBRARY_PATH", python_library_path())
            .env("RUST_LOG", "info")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("cannot start {}: {error}", binary.display()))?;
        let output = Arc::new(Output::default());
        let streams: [Option<Box<dyn std::io::Read + Send>>; 2] = [
            child.stdout.take().map(|s| Box::new(s) as _),
            child.stderr.take().map(|s| Box::new(s) as _),
        ];
        for stream in streams.into_iter().flatten() {
            output.lock().num_open += 1;
            let output = output.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(stream).lines().map_while(Result::ok) {
                    output.lock().lines.push(line);
                    output.changed.notify_all();
                }
                output.lock().num_open -= 1;
                output.changed.notify_all();
            });
        }
        let receiver = Self {
            child,
            endpoint: format!("http://{grpc}"),
            output,
        };
        // It binds its sockets before it says so.
        receiver.wait_lines(Duration::from_secs(30), |lines| {
            lines.iter().any(|line| line.contains("Starting Rotel"))
        })?;
        Ok(receiver)
    }

    /// The value for `OTEL_EXPORTER_OTLP_ENDPOINT`.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The spans that have arrived so far, in the order of arrival.
    #[must_use]
    pub fn spans(&self) -> Vec<ReceivedSpan> {
        parse(&self.output.lock().lines)
    }

    /// Waits until the spans that have arrived satisfy `enough`, and returns them. The last span may be seen before
    /// its attributes are: a caller that reads attributes makes `enough` ask for them.
    ///
    /// # Errors
    /// What did arrive, if `enough` is not reached within `limit` or the collector dies.
    pub fn wait_for(
        &self,
        limit: Duration,
        mut enough: impl FnMut(&[ReceivedSpan]) -> bool,
    ) -> Result<Vec<ReceivedSpan>, String> {
        self.wait_lines(limit, |lines| enough(&parse(lines)))
            .map(|lines| parse(&lines))
    }

    /// Waits until what was printed satisfies `enough`.
    fn wait_lines(
        &self,
        limit: Duration,
        mut enough: impl FnMut(&[String]) -> bool,
    ) -> Result<Vec<String>, String> {
        let end = Instant::now() + limit;
        let mut state = self.output.lock();
        loop {
            if enough(&state.lines) {
                return Ok(state.lines.clone());
            }
            let rest = end.saturating_duration_since(Instant::now());
            if rest.is_zero() || state.num_open == 0 {
                let cause = if rest.is_zero() {
                    "did not print what was waited for"
                } else {
                    "ended"
                };
                return Err(format!(
                    "the OTLP collector {cause}; it printed:\n{}",
                    state.lines.join("\n")
                ));
            }
            state = self
                .output
                .changed
                .wait_timeout(state, rest)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl Drop for OtlpReceiver {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An address on which nobody listens, and the socket that keeps it so.
fn free_port() -> Result<(String, TcpListener), String> {
    let cannot = |error: std::io::Error| format!("cannot find a free port: {error}");
    let listener = TcpListener::bind("127.0.0.1:0").map_err(cannot)?;
    let address = listener.local_addr().map_err(cannot)?;
    Ok((address.to_string(), listener))
}

/// Where the Python is whose shared library the collector is linked to (it can run Python processors; we use none).
fn python_library_path() -> String {
    let own = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
    let print = "import sysconfig; print(sysconfig.get_config_var('LIBDIR') or '')";
    let python = Command::new("python3").args(["-c", print]).output().ok();
    let folder = python
        .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
        .unwrap_or_default();
    [own, folder]
        .into_iter()
        .filter(|path| !path.is_empty())
        .collect::<Vec<_>>()
        .join(":")
}

/// Reads the collector's detailed debug output. A span counts once its name is there, which its ids precede.
fn parse(lines: &[String]) -> Vec<ReceivedSpan> {
    /// Which list of attributes a line belongs to.
    enum Part {
        Resource,
        Span,
        Other,
    }
    let mut spans: Vec<ReceivedSpan> = Vec::new();
    let mut resource = BTreeMap::new();
    let mut part = Part::Other;
    for line in lines {
        let line = line.trim_start();
        if line.starts_with("Resource attributes:") {
            resource = BTreeMap::new();
            part = Part::Resource;
        } else if line.starts_with("Span #") {
            spans.push(ReceivedSpan {
                resource: resource.clone(),
                ..ReceivedSpan::default()
            });
            part = Part::Other;
        } else if line.starts_with("Attributes:") {
            part = Part::Span;
        } else if let Some(attribute) = line.strip_prefix("-> ") {
            let Some((key, value)) = attribute.split_once(": ") else {
                continue;
            };
            let (key, value) = (key.to_owned(), unwrapped(value).to_owned());
            match (&part, spans.last_mut()) {
                (Part::Resource, _) => drop(resource.insert(key, value)),
                (Part::Span, Some(span)) => drop(span.attributes.insert(key, value)),
                _ => {}
            }
        } else if let (Some((key, value)), Some(span)) = (line.split_once(':'), spans.last_mut()) {
            let value = value.trim().to_owned();
            match key.trim() {
                "Trace ID" => span.trace_id = value,
                "Parent ID" => span.parent_id = value,
                "ID" => span.span_id = value,
                "Name" if span.name.is_empty() => span.name = value,
                "Kind" | "Start time" | "End time" | "Status code" | "Status message" => {}
                // A list of events or links: their attributes are not the span's.
                _ => part = Part::Other,
            }
        } else {
            part = Part::Other;
        }
    }
    spans.retain(|span| !span.name.is_empty());
    spans
}

/// `Str(worker)` is `worker`.
fn unwrapped(value: &str) -> &str {
    value
        .split_once('(')
        .and_then(|(_, rest)| rest.strip_suffix(')'))
        .unwrap_or(value)
}
