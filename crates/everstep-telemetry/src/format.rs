//! The look of a log line: time, level, where in the training, who, message, fields.
//!
//! ```text
//! 2026-11-24T17:59:46.227Z  WARN epoch=2 step=118 slot=3 cluster::worker: lease expired from=worker-1
//! ```

use std::fmt::{self, Write as _};
use std::time::SystemTime;

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields};
use tracing_subscriber::registry::LookupSpan;

use crate::jsonl::timestamp;

/// Formats events for the log file and for the terminal.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LineFormat {
    /// A terminal shows neither the date nor the module, but colours.
    pub(crate) terminal: bool,
}

impl<S, N> FormatEvent<S, N> for LineFormat
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let metadata = event.metadata();
        let time = timestamp(SystemTime::now());
        if self.terminal {
            // `2026-11-24T17:59:46.227Z` without its date and its zone.
            write!(writer, "{} ", time.get(11..23).unwrap_or(&time))?;
        } else {
            write!(writer, "{time} ")?;
        }
        let level = *metadata.level();
        if self.terminal && writer.has_ansi_escapes() {
            write!(writer, "\x1b[{}m{level:>5}\x1b[0m", colour(level))?;
        } else {
            write!(writer, "{level:>5}")?;
        }
        // The root span first, so that `epoch` and `step` come before what is inside of the step. A value that an outer
        // span has shown is not repeated.
        let mut shown = String::new();
        for span in context
            .event_scope()
            .into_iter()
            .flat_map(|scope| scope.from_root())
        {
            let extensions = span.extensions();
            let Some(fields) = extensions.get::<FormattedFields<N>>() else {
                continue;
            };
            for field in fields.fields.split(' ').filter(|field| !field.is_empty()) {
                let seen = shown.split(' ').any(|earlier| earlier == field);
                if !(seen && field.contains('=')) {
                    write!(shown, " {field}")?;
                }
            }
        }
        writer.write_str(&shown)?;
        if !self.terminal {
            let target = metadata.target();
            write!(
                writer,
                " {}:",
                target.strip_prefix("everstep_").unwrap_or(target)
            )?;
        }
        writer.write_char(' ')?;
        context
            .field_format()
            .format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}

/// The ANSI colour of a level.
fn colour(level: Level) -> u8 {
    match level {
        Level::ERROR => 31,
        Level::WARN => 33,
        Level::INFO => 32,
        Level::DEBUG => 34,
        Level::TRACE => 35,
    }
}
