//! The access log: one line per connection at its end, in the words of Istio's ambient data plane. Who writes it out is
//! `lines`; whether it is on is the log filter's matter (target `access`).

use super::{
    labels::{ConnectionFacts, Place, Reporter, SecurityPolicy, host_name},
    logging::{Format, level_name},
    text::{Escaped, Style, Text, time_stamp},
};
use std::{
    cell::RefCell,
    error::Error,
    fmt::{self, Display, Write},
    net::SocketAddr,
    time::{Duration, SystemTime},
};

/// The target of access lines, in the filter and in the line.
pub const TARGET: &str = "access";
const MESSAGE: &str = "connection complete";

/// One connection at its end.
#[derive(Clone, Copy)]
pub struct AccessEntry<'a> {
    pub facts: &'a ConnectionFacts,
    /// The client's address.
    pub source: SocketAddr,
    /// Whom the connection went to on the wire: with HBONE the next hop's address and port 15008.
    pub destination: SocketAddr,
    /// With HBONE, the tunnel's authority.
    pub hbone_target: Option<SocketAddr>,
    /// Bytes from the client to the server, whoever reports.
    pub request_bytes: u64,
    /// Bytes from the server to the client, whoever reports.
    pub response_bytes: u64,
    pub duration: Duration,
    /// Why it did not go well. An error's causes are told by [`Causes`].
    pub error: Option<&'a dyn Display>,
}

/// An error with its causes: `cannot connect to 10.0.0.1:80: connection refused`.
pub struct Causes<'a>(pub &'a (dyn Error + 'static));

impl Display for Causes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

/// Writes the line of a connection, if the log is set up and its filter wants it. Never waits.
pub fn log(entry: &AccessEntry<'_>) {
    thread_local! {
        static LINE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    let wanted = match entry.error {
        None => tracing::enabled!(target: TARGET, tracing::Level::INFO),
        Some(_) => tracing::enabled!(target: TARGET, tracing::Level::ERROR),
    };
    let Some(output) = super::logging::output().filter(|_| wanted) else {
        return;
    };
    LINE.with_borrow_mut(|line| {
        line.clear();
        write_line(entry, &output.place, output.format, SystemTime::now(), line);
        output.lines.push(line);
    });
}

/// Appends the line of `entry`, with its line feed.
pub fn write_line(entry: &AccessEntry<'_>, place: &Place, format: Format, now: SystemTime, line: &mut Vec<u8>) {
    let level = if entry.error.is_none() {
        tracing::Level::INFO
    } else {
        tracing::Level::ERROR
    };
    let mut line = Line { format, line };
    line.begin(level, now);
    let facts = entry.facts;
    let proved = facts.security == SecurityPolicy::MutualTls;
    let (source, destination) = (facts.source.as_deref(), facts.destination.as_deref());

    line.address("src.addr", entry.source);
    line.text("src.workload", source.map(|w| &w.name));
    line.text("src.namespace", source.map(|w| &w.namespace));
    line.text("src.identity", facts.source_principal.as_ref().filter(|_| proved));
    line.address("dst.addr", entry.destination);
    if let Some(target) = entry.hbone_target {
        line.address("dst.hbone_addr", target);
    }
    line.text(
        "dst.service",
        facts.service.as_ref().map(|key| host_name(key, &place.domain)),
    );
    line.text("dst.workload", destination.map(|w| &w.name));
    line.text("dst.namespace", destination.map(|w| &w.namespace));
    line.text("dst.identity", facts.destination_principal.as_ref().filter(|_| proved));
    line.text("direction", Some(facts.reporter.direction()));
    // The log counts from the reporter's side, other than the metrics: what a client's side sent is the request.
    let (sent, received) = match facts.reporter {
        Reporter::Source => (entry.request_bytes, entry.response_bytes),
        Reporter::Destination => (entry.response_bytes, entry.request_bytes),
    };
    line.number("bytes_sent", sent);
    line.number("bytes_recv", received);
    line.text(
        "duration",
        Some(fmt::from_fn(|f| write!(f, "{}ms", entry.duration.as_millis()))),
    );
    line.text("error", entry.error);
    line.end();
}

struct Line<'a> {
    format: Format,
    line: &'a mut Vec<u8>,
}

impl Line<'_> {
    fn begin(&mut self, level: tracing::Level, now: SystemTime) {
        match self.format {
            Format::Text => {
                time_stamp(now, self.line);
                self.raw(format_args!("\t{}\t{TARGET}\t{MESSAGE}\t", level_name(level)));
            }
            Format::Json => {
                self.raw(format_args!(r#"{{"level":"{}","time":""#, level_name(level)));
                time_stamp(now, self.line);
                self.raw(format_args!(r#"","scope":"{TARGET}","message":"{MESSAGE}""#));
            }
        }
    }

    fn end(&mut self) {
        if self.format == Format::Json {
            self.line.push(b'}');
        }
        self.line.push(b'\n');
    }

    fn key(&mut self, key: &'static str) {
        match self.format {
            Format::Text => {
                if self.line.last() != Some(&b'\t') {
                    self.line.push(b' ');
                }
                self.raw(format_args!("{key}="));
            }
            Format::Json => self.raw(format_args!(r#","{key}":"#)),
        }
    }

    fn text(&mut self, key: &'static str, value: Option<impl Display>) {
        let Some(value) = value else { return };
        self.key(key);
        let style = match self.format {
            Format::Text => Style::Quoted,
            Format::Json => Style::Json,
        };
        self.line.push(b'"');
        // Writing to a Vec does not fail; a value whose own Display fails is left as far as it got.
        let _ = write!(Escaped::new(self.line, style), "{value}");
        self.line.push(b'"');
    }

    /// Addresses are the one kind of text that a text line does not quote.
    fn address(&mut self, key: &'static str, address: SocketAddr) {
        self.key(key);
        let address = SocketAddr::new(address.ip().to_canonical(), address.port());
        match self.format {
            Format::Text => self.raw(format_args!("{address}")),
            Format::Json => self.raw(format_args!(r#""{address}""#)),
        }
    }

    fn number(&mut self, key: &'static str, value: u64) {
        self.key(key);
        self.raw(format_args!("{value}"));
    }

    fn raw(&mut self, text: fmt::Arguments<'_>) {
        // Writing to a Vec does not fail.
        let _ = Text(self.line).write_fmt(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        mesh::SpiffeId,
        telemetry::testing::{self, NOW},
    };

    fn line(entry: &AccessEntry<'_>, format: Format) -> String {
        let mut line = Vec::new();
        write_line(entry, &Place::default(), format, *NOW, &mut line);
        String::from_utf8(line).unwrap()
    }

    fn entry(facts: &ConnectionFacts) -> AccessEntry<'_> {
        AccessEntry {
            facts,
            source: "10.77.1.11:51484".parse().unwrap(),
            destination: "10.77.2.22:15008".parse().unwrap(),
            hbone_target: Some("10.77.2.22:80".parse().unwrap()),
            request_bytes: 84,
            response_bytes: 358,
            duration: Duration::from_micros(15_999),
            error: None,
        }
    }

    #[test]
    fn an_outbound_connection_is_told_as_ztunnel_tells_it() {
        assert_eq!(
            line(&entry(&testing::mesh_facts()), Format::Text),
            "2024-08-21T15:32:05.754291Z\tinfo\taccess\tconnection complete\tsrc.addr=10.77.1.11:51484 \
             src.workload=\"echo-1-7d4c8b9f5-abc12\" src.namespace=\"ambient\" \
             src.identity=\"spiffe://cluster.local/ns/ambient/sa/echo-1\" dst.addr=10.77.2.22:15008 \
             dst.hbone_addr=10.77.2.22:80 dst.service=\"echo-2.ambient.svc.cluster.local\" \
             dst.workload=\"echo-2-5f884b787f-8mrp4\" dst.namespace=\"ambient\" \
             dst.identity=\"spiffe://cluster.local/ns/ambient/sa/echo-2\" direction=\"outbound\" bytes_sent=84 \
             bytes_recv=358 duration=\"15ms\"\n"
        );
    }

    #[test]
    fn an_inbound_connection_counts_from_the_servers_side() {
        let facts = ConnectionFacts {
            reporter: Reporter::Destination,
            ..testing::mesh_facts()
        };
        let line = line(&entry(&facts), Format::Text);
        assert!(
            line.contains(" direction=\"inbound\" bytes_sent=358 bytes_recv=84 duration=\"15ms\"\n"),
            "{line}"
        );
    }

    #[test]
    fn json_has_the_same_fields_in_the_same_order() {
        assert_eq!(
            line(&AccessEntry { error: Some(&"http status: 401"), ..entry(&testing::mesh_facts()) }, Format::Json),
            r#"{"level":"error","time":"2024-08-21T15:32:05.754291Z","scope":"access","message":"connection complete","src.addr":"10.77.1.11:51484","src.workload":"echo-1-7d4c8b9f5-abc12","src.namespace":"ambient","src.identity":"spiffe://cluster.local/ns/ambient/sa/echo-1","dst.addr":"10.77.2.22:15008","dst.hbone_addr":"10.77.2.22:80","dst.service":"echo-2.ambient.svc.cluster.local","dst.workload":"echo-2-5f884b787f-8mrp4","dst.namespace":"ambient","dst.identity":"spiffe://cluster.local/ns/ambient/sa/echo-2","direction":"outbound","bytes_sent":84,"bytes_recv":358,"duration":"15ms","error":"http status: 401"}"#
                .to_owned()
                + "\n"
        );
    }

    #[test]
    fn what_is_not_known_is_left_out() {
        let facts = testing::stranger_facts();
        let entry = AccessEntry {
            source: "[::ffff:10.9.9.9]:40000".parse().unwrap(),
            destination: "[fd77::2:22]:80".parse().unwrap(),
            hbone_target: None,
            error: Some(&"connection closed due to policy rejection: explicitly denied by: ambient/echo-2"),
            ..entry(&facts)
        };
        assert_eq!(
            line(&entry, Format::Text),
            "2024-08-21T15:32:05.754291Z\terror\taccess\tconnection complete\tsrc.addr=10.9.9.9:40000 \
             dst.addr=[fd77::2:22]:80 dst.workload=\"echo-2-5f884b787f-8mrp4\" dst.namespace=\"ambient\" \
             direction=\"inbound\" bytes_sent=358 bytes_recv=84 duration=\"15ms\" \
             error=\"connection closed due to policy rejection: explicitly denied by: ambient/echo-2\"\n"
        );
    }

    #[test]
    fn an_identity_that_was_not_proved_is_not_told() {
        let facts = ConnectionFacts {
            security: SecurityPolicy::Unknown,
            source_principal: Some(SpiffeId::parse("spiffe://cluster.local/ns/a/sa/b").unwrap()),
            ..testing::mesh_facts()
        };
        assert!(!line(&entry(&facts), Format::Text).contains("identity"));
    }

    #[test]
    fn what_a_peer_wrote_cannot_forge_a_line() {
        let error = "tls error: \"x\"\n2024-08-21T15:32:05.754291Z\tinfo\taccess";
        let line = line(
            &AccessEntry {
                error: Some(&error),
                ..entry(&testing::mesh_facts())
            },
            Format::Text,
        );
        assert_eq!(line.matches('\n').count(), 1);
        assert!(line.ends_with("error=\"tls error: \\\"x\\\"\\n2024-08-21T15:32:05.754291Z\\tinfo\\taccess\"\n"));
    }

    #[test]
    fn an_error_is_told_with_its_causes() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot connect to 10.0.0.1:80")]
        struct Connect(#[source] std::io::Error);
        let error = Connect(std::io::ErrorKind::ConnectionRefused.into());
        assert_eq!(
            Causes(&error).to_string(),
            "cannot connect to 10.0.0.1:80: connection refused"
        );
    }
}
