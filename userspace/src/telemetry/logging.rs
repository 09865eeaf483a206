//! The daemon's own log, in lines of ztunnel's form, text or JSON, to standard output beside the access log: one stream in
//! order, and what `kubectl logs` shows. Commands of the user do not log. The level changes at run time by [`LogHandle`].

use super::{
    access::Causes,
    labels::Place,
    lines::{CAPACITY, Lines},
    text::{Escaped, Style, Text, time_stamp},
};
use std::{
    cell::RefCell,
    error::Error,
    fmt::{self, Debug, Write},
    io,
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime},
};
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
    span,
};
use tracing_subscriber::{
    EnvFilter, Layer, Registry, layer::Context, layer::SubscriberExt, registry::LookupSpan, reload,
    util::SubscriberInitExt,
};

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

/// Changes the level of the running process. Clones share it.
#[derive(Debug, Clone)]
pub struct LogHandle {
    filter: reload::Handle<EnvFilter, Registry>,
    initial: Arc<str>,
}

/// Sets up the log of the process, once. `filter` is a level, or `module=level` pairs as `RUST_LOG` takes them.
///
/// # Errors
/// A filter that is not understood; a second call.
pub fn start(format: Format, filter: &str, place: Place) -> Result<(), LoggingError> {
    let parsed = parse(filter)?;
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
        .set(LogHandle {
            filter: handle,
            initial: filter.into(),
        })
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

/// Checks a filter without setting it.
///
/// # Errors
/// It is not understood.
pub fn check(filter: &str) -> Result<(), LoggingError> {
    parse(filter).map(drop)
}

fn parse(filter: &str) -> Result<EnvFilter, LoggingError> {
    EnvFilter::builder()
        .parse(filter)
        .map_err(|source| LoggingError::Filter {
            filter: filter.into(),
            source,
        })
}

impl LogHandle {
    /// A handle on a filter that no log asks; it holds for as long as the second value lives.
    #[cfg(test)]
    pub(crate) fn detached(filter: &str) -> (Self, reload::Layer<EnvFilter, Registry>) {
        let (layer, handle) = reload::Layer::new(EnvFilter::new(filter));
        (
            Self {
                filter: handle,
                initial: filter.into(),
            },
            layer,
        )
    }

    /// The filter in force.
    pub fn current(&self) -> String {
        self.filter.with_current(ToString::to_string).unwrap_or_default()
    }

    /// Sets the level for everything (`debug`), or for modules beside what is set (`warren::proxy:debug,h2:off`).
    ///
    /// # Errors
    /// It is not understood; nothing changes.
    pub fn set(&self, levels: &str) -> Result<(), LoggingError> {
        self.replace(&merge(&self.current(), levels)?)
    }

    /// Goes back to the filter that the process started with.
    ///
    /// # Errors
    /// The log has ended.
    pub fn reset(&self) -> Result<(), LoggingError> {
        self.replace(&Arc::clone(&self.initial))
    }

    fn replace(&self, filter: &str) -> Result<(), LoggingError> {
        let parsed = parse(filter)?;
        self.filter.reload(parsed).map_err(|_| LoggingError::Twice)
    }
}

/// The filter that `levels` makes of `current`. Directives of Rust's own form (`=`, spans) are not taken here: the
/// request comes over HTTP, and this is the form that Istio's users type.
fn merge(current: &str, levels: &str) -> Result<String, LoggingError> {
    let mut filter = current.to_owned();
    for part in levels.split(',').map(str::trim) {
        let wrong = || LoggingError::Level { part: part.into() };
        let (module, level) = match part.rsplit_once(':') {
            Some((module, level)) => (Some(module), level),
            None => (None, part),
        };
        if !["error", "warn", "info", "debug", "trace", "off"].contains(&level) {
            return Err(wrong());
        }
        match module {
            None => filter = level.to_owned(),
            Some(module) => {
                let named = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | ':');
                if module.is_empty() || !module.chars().all(named) {
                    return Err(wrong());
                }
                let _ = write!(filter, ",{module}={level}");
            }
        }
    }
    Ok(filter)
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

/// Writes events as lines. Which ones is the filter's matter, in a layer of its own.
struct LogLayer {
    lines: Lines,
    format: Format,
}

/// A span's fields, in the form of the log.
struct SpanFields(Vec<u8>);

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for LogLayer {
    fn on_new_span(&self, attributes: &span::Attributes<'_>, id: &span::Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut fields = Vec::new();
        attributes.record(&mut Fields {
            format: self.format,
            out: &mut fields,
        });
        span.extensions_mut().insert(SpanFields(fields));
    }

    fn on_record(&self, id: &span::Id, values: &span::Record<'_>, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        if let Some(SpanFields(fields)) = span.extensions_mut().get_mut() {
            values.record(&mut Fields {
                format: self.format,
                out: fields,
            });
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        thread_local! {
            static LINE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        LINE.with(|line| {
            // Borrowed already if a field's Debug logs something itself: that one is left out.
            let Ok(mut line) = line.try_borrow_mut() else { return };
            line.clear();
            self.write(event, &context, SystemTime::now(), &mut line);
            self.lines.push(&line);
        });
    }
}

impl LogLayer {
    fn write<S>(&self, event: &Event<'_>, context: &Context<'_, S>, now: SystemTime, line: &mut Vec<u8>)
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
    {
        let mut head = Head::default();
        event.record(&mut head);
        let level = level_name(*event.metadata().level());
        let target = head.target.as_deref().unwrap_or(event.metadata().target());
        let target = target.strip_prefix("warren::").unwrap_or(target);
        let spans = || {
            context
                .event_scope(event)
                .into_iter()
                .flat_map(|scope| scope.from_root())
        };
        match self.format {
            Format::Text => {
                time_stamp(now, line);
                let _ = write!(Text(line), "\t{level}\t{target}");
                for span in spans() {
                    let _ = write!(Text(line), ":{}", span.name());
                    if let Some(SpanFields(fields)) = span.extensions().get()
                        && !fields.is_empty()
                    {
                        line.push(b'{');
                        line.extend_from_slice(fields.trim_ascii());
                        line.push(b'}');
                    }
                }
                line.push(b'\t');
                let _ = Escaped::new(line, Style::Bare).write_str(&head.message);
                let mark = line.len();
                event.record(&mut Fields {
                    format: self.format,
                    out: line,
                });
                if let Some(first) = line.get_mut(mark) {
                    *first = b'\t';
                }
            }
            Format::Json => {
                let _ = write!(Text(line), r#"{{"level":"{level}","time":""#);
                time_stamp(now, line);
                let _ = write!(Text(line), r#"","scope":"{target}","message":""#);
                let _ = Escaped::new(line, Style::Json).write_str(&head.message);
                line.push(b'"');
                event.record(&mut Fields {
                    format: self.format,
                    out: line,
                });
                for (index, span) in spans().enumerate() {
                    let _ = write!(
                        Text(line),
                        r#"{}{{"name":"{}""#,
                        [",", r#","spans":["#][usize::from(index == 0)],
                        span.name()
                    );
                    if let Some(SpanFields(fields)) = span.extensions().get() {
                        line.extend_from_slice(fields);
                    }
                    line.push(b'}');
                }
                if spans().next().is_some() {
                    line.push(b']');
                }
                line.push(b'}');
            }
        }
        line.push(b'\n');
    }
}

/// What stands before an event's fields: its message, and where records of the `log` crate come from.
#[derive(Default)]
struct Head {
    message: String,
    target: Option<String>,
}

impl Visit for Head {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "message" {
            let _ = write!(self.message, "{value:?}");
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => value.clone_into(&mut self.message),
            "log.target" => self.target = Some(value.to_owned()),
            _ => {}
        }
    }
}

/// Writes each field, with what separates it from the one before in front.
struct Fields<'a> {
    format: Format,
    out: &'a mut Vec<u8>,
}

impl Fields<'_> {
    fn key(&mut self, field: &Field) -> bool {
        let name = field.name();
        if name == "message" || name.starts_with("log.") {
            return false;
        }
        let _ = match self.format {
            Format::Text => write!(Text(self.out), " {name}="),
            Format::Json => write!(Text(self.out), r#","{name}":"#),
        };
        true
    }

    fn bare(&mut self, field: &Field, value: impl fmt::Display) {
        if self.key(field) {
            let _ = write!(Text(self.out), "{value}");
        }
    }

    fn text(&mut self, field: &Field, style: Style, value: fmt::Arguments<'_>) {
        if self.key(field) {
            let style = if self.format == Format::Json {
                Style::Json
            } else {
                style
            };
            let quote = style != Style::Bare;
            self.out.extend(quote.then_some(b'"'));
            let _ = Escaped::new(self.out, style).write_fmt(value);
            self.out.extend(quote.then_some(b'"'));
        }
    }
}

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.text(field, Style::Bare, format_args!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.text(field, Style::Quoted, format_args!("{value}"));
    }

    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        self.text(field, Style::Quoted, format_args!("{}", Causes(value)));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.bare(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.bare(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.bare(field, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    struct Sink(mpsc::Sender<Vec<u8>>);

    impl io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.send(bytes.to_vec()).map_err(|_| io::ErrorKind::BrokenPipe)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What `body` logs, without the time stamps.
    fn logged(format: Format, body: impl FnOnce()) -> String {
        let (sender, written) = mpsc::channel();
        let lines = Lines::start(Sink(sender), CAPACITY, confess_text).unwrap();
        let subscriber = Registry::default().with(LogLayer {
            lines: lines.clone(),
            format,
        });
        tracing::subscriber::with_default(subscriber, body);
        assert!(lines.flush(Duration::from_secs(10)));
        let text = String::from_utf8(written.try_iter().flatten().collect()).unwrap();
        match format {
            Format::Text => text.lines().map(|line| line[28..].to_owned() + "\n").collect(),
            Format::Json => text,
        }
    }

    fn events() {
        let peer = "10.77.1.11:1".parse::<std::net::SocketAddr>().unwrap();
        tracing::info!(target: "warren::proxy::inbound", bytes_sent = 7_u64, ok = true, %peer, name = "a \"b\"", "tunnel closed");
        let span = tracing::warn_span!(target: "warren::hbone", "hbone", identity = "x", late = tracing::field::Empty);
        span.record("late", 3);
        span.in_scope(|| tracing::warn!(target: "warren::hbone::server", error = ?"two\nlines", "odd\nmessage"));
    }

    #[test]
    fn a_text_line_has_level_scope_message_and_fields() {
        assert_eq!(
            logged(Format::Text, events),
            "info\tproxy::inbound\ttunnel closed\tbytes_sent=7 ok=true peer=10.77.1.11:1 name=\"a \\\"b\\\"\"\n\
             warn\thbone::server:hbone{identity=\"x\" late=3}\todd\\nmessage\terror=\"two\\nlines\"\n"
        );
    }

    #[test]
    fn a_json_line_is_one_object() {
        let text = logged(Format::Json, events);
        let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert_eq!(lines[0]["level"], "info");
        assert_eq!(lines[0]["scope"], "proxy::inbound");
        assert_eq!(lines[0]["message"], "tunnel closed");
        assert_eq!(lines[0]["bytes_sent"], 7);
        assert_eq!(lines[0]["name"], "a \"b\"");
        assert_eq!(lines[1]["message"], "odd\nmessage");
        assert_eq!(lines[1]["spans"][0]["name"], "hbone");
        assert_eq!(lines[1]["spans"][0]["late"], 3);
    }

    #[test]
    fn an_error_field_tells_its_causes() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot read the token")]
        struct Token(#[source] io::Error);
        let error = Token(io::ErrorKind::NotFound.into());
        let text = logged(Format::Text, || {
            tracing::error!(target: "x", error = &error as &(dyn Error + 'static), "no certificate");
        });
        assert_eq!(
            text,
            "error\tx\tno certificate\terror=\"cannot read the token: entity not found\"\n"
        );
    }

    #[test]
    fn levels_are_merged_as_istios_users_type_them() {
        for (current, levels, expected) in [
            ("info", "debug", Some("debug")),
            ("info", "warren::proxy:debug", Some("info,warren::proxy=debug")),
            (
                "info,h2=off",
                "access:off,h2:warn",
                Some("info,h2=off,access=off,h2=warn"),
            ),
            ("info", "warn,access:info", Some("warn,access=info")),
            ("info", "loud", None),
            ("info", "", None),
            ("info", ":debug", None),
            ("info", "a b:debug", None),
            ("info", "[span{x=1}]:debug", None),
            ("info", "debug,proxy:loud", None),
        ] {
            assert_eq!(merge(current, levels).ok().as_deref(), expected, "{levels}");
        }
    }

    #[test]
    fn a_level_set_at_run_time_holds_from_then_on() {
        let (sender, written) = mpsc::channel();
        let lines = Lines::start(Sink(sender), CAPACITY, confess_text).unwrap();
        let (reloadable, filter) = reload::Layer::new(parse("info").unwrap());
        let handle = LogHandle {
            filter,
            initial: "info".into(),
        };
        let subscriber = Registry::default().with(reloadable).with(LogLayer {
            lines: lines.clone(),
            format: Format::Text,
        });
        tracing::subscriber::with_default(subscriber, || {
            let say = |n: u64| tracing::debug!(target: "warren::proxy", n, "said");
            say(1);
            handle.set("warren::proxy:debug").unwrap();
            say(2);
            handle.set("error").unwrap();
            say(3);
            assert_eq!(handle.current(), "error");
            handle.set("debug").unwrap();
            say(4);
            handle.reset().unwrap();
            say(5);
            assert_eq!(handle.current(), "info");
            assert!(handle.set("loud").is_err());
            assert_eq!(handle.current(), "info", "a wrong level changes nothing");
        });
        assert!(lines.flush(Duration::from_secs(10)));
        let text = String::from_utf8(written.try_iter().flatten().collect()).unwrap();
        let said: Vec<&str> = text.lines().filter_map(|line| line.split("n=").nth(1)).collect();
        assert_eq!(said, ["2", "4"], "{text}");
    }
}
