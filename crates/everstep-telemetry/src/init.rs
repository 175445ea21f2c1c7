//! Setting up a process's log, terminal messages and span export.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use opentelemetry::trace::TracerProvider as _;
use tracing::level_filters::LevelFilter;
use tracing::{Level, Metadata};
use tracing_subscriber::filter::{FilterExt as _, filter_fn};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer, Registry, layer};

use crate::error::TelemetryError;
use crate::format::LineFormat;
use crate::otlp::{Origin, Otlp};

/// The variables that set what is logged, the more special one first. Their value is a list of `target=level`.
const FILTER_VARIABLES: [&str; 2] = ["EVERSTEP_LOG", "RUST_LOG"];
/// What is logged when neither is set: our crates (a target is matched by its beginning) from `info`, others from `warn`.
const FILTER_DEFAULT: &str = "warn,everstep=info,ractor_cluster=error";
/// The variable that sets which spans are exported, in the same syntax.
const TRACE_VARIABLE: &str = "EVERSTEP_TRACE";
/// Which are when it is not set: ours. Spans of the actor library in between are left out, and children connected.
const TRACE_DEFAULT: &str = "everstep=info";

/// What never goes anywhere unless it is named. The exporter reports trouble once per batch (`otlp` reports it in its
/// place), and below it are libraries that would log the sending of a log.
const NOISE: [&str; 6] = [
    "opentelemetry",
    "h2",
    "hyper",
    "hyper_util",
    "tonic",
    "tower",
];

/// Who this process is and where its messages go.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The process's name in the topology, `worker-0`: names the log file and the spans' `service.instance.id`.
    pub process: String,
    /// The run's id, an attribute of every span.
    pub run_id: String,
    /// The log file, see [`log_path`]; appended to, created with its folder. None: no file.
    pub log_file: Option<PathBuf>,
    /// What the terminal shows.
    pub terminal: Terminal,
    /// The machine's name.
    pub node: String,
}

/// What the terminal shows of the log.
#[derive(Clone, Default)]
pub enum Terminal {
    /// Nothing.
    #[default]
    Off,
    /// Messages of this level and above, on standard error.
    Stderr(LevelFilter),
    /// Messages of this level and above, given line by line (without newline) to a function: a progress bar that must
    /// step aside.
    Print(LevelFilter, Arc<dyn Fn(&str) + Send + Sync>),
}

impl std::fmt::Debug for Terminal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Off => f.write_str("Off"),
            Self::Stderr(level) => f.debug_tuple("Stderr").field(level).finish(),
            Self::Print(level, _) => f.debug_tuple("Print").field(level).finish_non_exhaustive(),
        }
    }
}

/// The log file of a process in a run's folder: `DIR/logs/<process>.log`. What a file name should not have becomes `_`.
#[must_use]
pub fn log_path(run_dir: &Path, process: &str) -> PathBuf {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let name: String = process
        .chars()
        .map(|c| if allowed(c) { c } else { '_' })
        .collect();
    run_dir
        .join("logs")
        .join(format!("{}.log", name.trim_start_matches('.')))
}

/// The process's telemetry. Keep it until the process ends; dropping it shuts it down.
#[derive(Debug)]
#[must_use = "spans are not flushed when this is dropped at once"]
pub struct Telemetry {
    otlp: Option<Otlp>,
}

impl Telemetry {
    /// Whether spans are exported.
    #[must_use]
    pub fn exports_spans(&self) -> bool {
        self.otlp.is_some()
    }

    /// Sends the spans that wait for export. Blocks for 2 seconds at most; a collector that does not answer gets no
    /// more. Spans that end later are lost; the log goes on.
    pub fn shutdown(self) {
        drop(self);
    }
}

/// Sets up logging for this process, and span export if `OTEL_EXPORTER_OTLP_ENDPOINT` is set.
///
/// Works inside and outside a tokio runtime. Panics are logged from now on, before the hook that was set does its
/// work. `EVERSTEP_LOG` or `RUST_LOG` (`info`, `everstep_cluster=debug,info`, …) set what the file holds, and, where
/// set, what the terminal shows. `EVERSTEP_TRACE` sets which spans are exported (default `everstep=info`).
///
/// # Errors
/// [`TelemetryError::Variable`] if one of these variables has a value that is not allowed, [`TelemetryError::Io`] if
/// the log file cannot be opened, [`TelemetryError::AlreadySetUp`] the second time. Nothing is set up then. A collector
/// that does not answer is no error.
pub fn init(options: Options) -> Result<Telemetry, TelemetryError> {
    // What the user may have got wrong is looked at before any file is made.
    let requested = filter_from_environment(&FILTER_VARIABLES)?;
    let trace_filter = filter_from_environment(&[TRACE_VARIABLE])?
        .unwrap_or_else(|| EnvFilter::new(TRACE_DEFAULT));
    let origin = Origin {
        process: &options.process,
        node: &options.node,
        run: &options.run_id,
    };
    let otlp = Otlp::from_environment(&origin)?;
    let mut layers: Vec<Box<dyn Layer<Registry> + Send + Sync>> = Vec::new();

    if let Some(path) = &options.log_file {
        let filter = requested
            .clone()
            .unwrap_or_else(|| EnvFilter::new(FILTER_DEFAULT));
        let layer = tracing_subscriber::fmt::layer()
            .with_ansi(false)
            .event_format(LineFormat { terminal: false })
            .with_writer(LogFile(Arc::new(open_log(path)?)));
        layers.push(layer.with_filter(sink(filter)).boxed());
    }

    let terminal_filter = |level: LevelFilter| match &requested {
        Some(filter) => sink(filter.clone()),
        None if level < LevelFilter::INFO => sink(EnvFilter::new(level.to_string())),
        None => sink(EnvFilter::new(
            FILTER_DEFAULT.replace("info", &level.to_string()),
        )),
    };
    let format = LineFormat { terminal: true };
    match &options.terminal {
        Terminal::Off => {}
        Terminal::Stderr(level) => {
            let colours = io::IsTerminal::is_terminal(&io::stderr());
            let layer = tracing_subscriber::fmt::layer()
                .event_format(format)
                .with_writer(io::stderr);
            layers.push(
                layer
                    .with_ansi(colours)
                    .with_filter(terminal_filter(*level))
                    .boxed(),
            );
        }
        Terminal::Print(level, print) => {
            let layer = tracing_subscriber::fmt::layer()
                .event_format(format)
                .with_writer(Printer(print.clone()));
            layers.push(
                layer
                    .with_ansi(false)
                    .with_filter(terminal_filter(*level))
                    .boxed(),
            );
        }
    }

    if let Some(otlp) = &otlp {
        let layer = tracing_opentelemetry::layer()
            .with_tracer(otlp.provider.tracer("everstep"))
            .with_location(false)
            .with_threads(false)
            .with_tracked_inactivity(false);
        layers.push(layer.with_filter(without_noise(trace_filter)).boxed());
    }

    let telemetry = Telemetry { otlp };
    tracing_subscriber::registry()
        .with(layers)
        .try_init()
        .map_err(|_| TelemetryError::AlreadySetUp)?;
    log_panics();
    Ok(telemetry)
}

/// The filter of the first variable that is set.
fn filter_from_environment(names: &[&str]) -> Result<Option<EnvFilter>, TelemetryError> {
    let set = names.iter().find_map(|&name| {
        let value = std::env::var(name).ok()?;
        (!value.trim().is_empty()).then_some((name, value))
    });
    let Some((name, value)) = set else {
        return Ok(None);
    };
    match EnvFilter::try_new(&value) {
        Ok(filter) => Ok(Some(filter)),
        Err(error) => Err(TelemetryError::Variable {
            variable: name.to_owned(),
            value,
            reason: format!("{error}; it is a list like `info,everstep_cluster=debug`"),
        }),
    }
}

/// What of the log goes to a sink: `filter`, without [`NOISE`], and with our spans in any case, since it is they who say
/// in which step a line was written.
fn sink(filter: EnvFilter) -> impl layer::Filter<Registry> + Send + Sync {
    let is_our_span = |metadata: &Metadata<'_>| {
        metadata.is_span()
            && *metadata.level() <= Level::INFO
            && metadata.target().starts_with("everstep")
    };
    without_noise(filter).or(filter_fn(is_our_span).with_max_level_hint(LevelFilter::INFO))
}

/// `filter` with [`NOISE`] off, but for what it names itself.
fn without_noise(filter: EnvFilter) -> EnvFilter {
    let named = filter.to_string();
    NOISE.iter().fold(filter, |filter, target| {
        if named.split(',').any(|own| own.starts_with(target)) {
            return filter;
        }
        filter.add_directive(
            format!("{target}=off")
                .parse()
                .expect("a name is a valid target"),
        )
    })
}

/// Opens a log file for appending. Not buffered: what is logged is the kernel's when the call returns.
fn open_log(path: &Path) -> Result<File, TelemetryError> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)
            .map_err(TelemetryError::io("create the folder of", path))?;
    }
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .map_err(TelemetryError::io("open", path))
}

/// Logs panics: the terminal may not be there to show them.
fn log_panics() {
    let previous = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        let payload = info.payload();
        let text = payload.downcast_ref::<String>().map(String::as_str);
        let message = text
            .or(payload.downcast_ref::<&str>().copied())
            .unwrap_or("(no message)");
        let thread = std::thread::current()
            .name()
            .unwrap_or("unnamed")
            .to_owned();
        tracing::error!(thread, place, "panic: {message}");
        previous(info);
    }));
}

/// Writes each line to the log file with one `write(2)`, since the formatter hands over whole lines.
#[derive(Debug, Clone)]
struct LogFile(Arc<File>);

impl<'a> MakeWriter<'a> for LogFile {
    type Writer = &'a File;

    fn make_writer(&'a self) -> Self::Writer {
        &self.0
    }
}

/// Gives each line to a function.
#[derive(Clone)]
struct Printer(Arc<dyn Fn(&str) + Send + Sync>);

impl<'a> MakeWriter<'a> for Printer {
    type Writer = &'a Self;

    fn make_writer(&'a self) -> Self::Writer {
        self
    }
}

impl io::Write for &Printer {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        (self.0)(String::from_utf8_lossy(line).trim_end_matches('\n'));
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_path_stays_in_its_folder() {
        let path = |process| log_path(Path::new("run"), process).display().to_string();
        assert_eq!(path("worker-0"), "run/logs/worker-0.log");
        assert_eq!(path("../a b/c"), "run/logs/_a_b_c.log");
    }
}
