//! Events, logged as the daemon logs them, and the lines that came of it.

use super::*;
use std::{error::Error, sync::mpsc};

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
fn a_level_set_at_run_time_holds_from_then_on() {
    let (sender, written) = mpsc::channel();
    let lines = Lines::start(Sink(sender), CAPACITY, confess_text).unwrap();
    let (reloadable, filter) = reload::Layer::new(level::parse("info").unwrap());
    let handle = LogHandle::new(filter, "info");
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
