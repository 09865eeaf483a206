//! The daemon's own log, in lines of ztunnel's form, text or JSON, to standard output beside the access log: one stream in
//! order, and what `kubectl logs` shows. Commands of the user do not log. The level changes at run time by [`LogHandle`].

mod layer;
mod level;
#[cfg(test)]
mod tests;

pub use level::{LogHandle, check};

use super::{
    labels::Place,
    lines::{CAPACITY, Lines},
    text::{Text, time_stamp},
};
use layer::LogLayer;
use std::{
    fmt::Write,
    io,
    sync::OnceLock,
    time::{Duration, SystemTime},
};
use tracing::Level;
use tracing_subscriber::{Registry, layer::SubscriberExt, reload, util::SubscriberInitExt};

/// How long a panic waits for its line to be out: it may be the process's last.
const PANIC_FLUSH: Duration = Duration::from_millis(200);

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Fields separated by tabs, for people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Why the log cannot be set up, or its level not be changed.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    #[error("{part:?} is no log level: use error, warn, info, debug, trace or off, or module:level,module:level")]
    Level { part: String },
    #[error("the filter {filter:?} is not understood")]
    Filter {
        filter: String,
        source: tracing_subscriber::filter::ParseError,
    },
    #[error("cannot start the log's thread")]
    Thread(#[source] io::Error),
    #[error("the log is set up already")]
    Twice,
}

pub(super) struct Output {
    pub(super) lines: Lines,
    pub(super) format: Format,
    pub(super) place: Place,
}

static HANDLE: OnceLock<LogHandle> = OnceLock::new();

/// The level of this process's log, once it is set up.
pub fn handle() -> Option<LogHandle> {
    HANDLE.get().cloned()
}

static OUTPUT: OnceLock<Output> = OnceLock::new();

pub(super) fn output() -> Option<&'static Output> {
    OUTPUT.get()
}

/// Sets up the log of the process, once. `filter` is a level, or `module=level` pairs as `RUST_LOG` takes them.
///
/// # Errors
/// A filter that is not understood; a second call.
pub fn start(format: Format, filter: &str, place: Place) -> Result<(), LoggingError> {
    let parsed = level::parse(filter)?;
    let confess = match format {
        Format::Text => confess_text,
        Format::Json => confess_json,
    };
    let lines = Lines::start(io::stdout(), CAPACITY, confess).map_err(LoggingError::Thread)?;
    OUTPUT
        .set(Output {
            lines: lines.clone(),
            format,
            place,
        })
        .map_err(|_| LoggingError::Twice)?;
    let (reloadable, handle) = reload::Layer::new(parsed);
    let layers = Registry::default().with(reloadable).with(LogLayer { lines, format });
    layers.try_init().map_err(|_| LoggingError::Twice)?;
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let thread = thread.name().unwrap_or("unnamed");
        let location = panic.location().map(ToString::to_string).unwrap_or_default();
        let text = panic.payload_as_str().unwrap_or("no text");
        tracing::error!(thread, location, text, "panic");
        flush(PANIC_FLUSH);
    }));
    HANDLE
        .set(LogHandle::new(handle, filter))
        .map_err(|_| LoggingError::Twice)
}

/// Waits until every line is out, at most until the deadline. For the end of the process.
pub fn flush(deadline: Duration) {
    if let Some(output) = output() {
        output.lines.flush(deadline);
    }
}

/// Lines of log and access log that were dropped because nobody took them.
pub fn dropped() -> u64 {
    output().map_or(0, |output| output.lines.dropped())
}

pub(super) fn level_name(level: Level) -> &'static str {
    match level {
        Level::ERROR => "error",
        Level::WARN => "warn",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    }
}

fn confess_text(dropped: u64, line: &mut Vec<u8>) {
    time_stamp(SystemTime::now(), line);
    let _ = writeln!(Text(line), "\twarn\ttelemetry\tlog lines were dropped\tlines={dropped}");
}

fn confess_json(dropped: u64, line: &mut Vec<u8>) {
    let _ = write!(Text(line), r#"{{"level":"warn","time":""#);
    time_stamp(SystemTime::now(), line);
    let _ = writeln!(
        Text(line),
        r#"","scope":"telemetry","message":"log lines were dropped","lines":{dropped}}}"#
    );
}
