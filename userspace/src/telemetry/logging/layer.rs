//! How an event and its spans become a line, text or JSON.

use super::{Format, level_name};
use crate::telemetry::{
    access::Causes,
    lines::Lines,
    text::{Escaped, Style, Text, time_stamp},
};
use std::{
    cell::RefCell,
    error::Error,
    fmt::{self, Debug, Write},
    time::SystemTime,
};
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
    span,
};
use tracing_subscriber::{Layer, layer::Context, registry::LookupSpan};

/// Writes events as lines. Which ones is the filter's matter, in a layer of its own.
pub(super) struct LogLayer {
    pub(super) lines: Lines,
    pub(super) format: Format,
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
