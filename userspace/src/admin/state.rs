//! The daemon's state as the admin port shows it, read from its owners when somebody asks.

use super::server::{Answer, Site, query_values, text, with_type};
use crate::{
    mesh::MeshSnapshot,
    telemetry::{
        Metrics,
        dump::{
            self, ApiServer, CapturedPod, Certificate, Connection, Dump, KernelCounter, Problem, Publication, Section,
        },
        logging::{LogHandle, LoggingError},
    },
};
use http::{Method, Response, StatusCode, request::Parts};
use http_body_util::Full;
use hyper::body::Bytes;
use std::{fmt, sync::Arc};
use tokio::sync::watch;

/// Reads one part of the state. Called on a thread that may block.
type Source<T> = Box<dyn Fn() -> Vec<T> + Send + Sync>;

/// Where each part of the dump comes from; parts that nobody gave are empty.
pub struct AdminState {
    node: Arc<str>,
    domain: Arc<str>,
    snapshot: watch::Receiver<Arc<MeshSnapshot>>,
    certificates: Source<Certificate>,
    captured_pods: Source<CapturedPod>,
    kernel_counters: Source<KernelCounter>,
    problems: Source<Problem>,
    connections: Source<Connection>,
    publications: Source<Publication>,
    api_server: Box<dyn Fn() -> Option<ApiServer> + Send + Sync>,
}

fn empty<T: 'static>() -> Source<T> {
    Box::new(Vec::new)
}

impl AdminState {
    /// `domain` is the cluster's DNS domain.
    pub fn new(node: Arc<str>, domain: Arc<str>, snapshot: watch::Receiver<Arc<MeshSnapshot>>) -> Self {
        Self {
            node,
            domain,
            snapshot,
            certificates: empty(),
            captured_pods: empty(),
            kernel_counters: empty(),
            problems: empty(),
            connections: empty(),
            publications: empty(),
            api_server: Box::new(|| None),
        }
    }

    pub fn certificates(mut self, read: impl Fn() -> Vec<Certificate> + Send + Sync + 'static) -> Self {
        self.certificates = Box::new(read);
        self
    }

    pub fn captured_pods(mut self, read: impl Fn() -> Vec<CapturedPod> + Send + Sync + 'static) -> Self {
        self.captured_pods = Box::new(read);
        self
    }

    pub fn kernel_counters(mut self, read: impl Fn() -> Vec<KernelCounter> + Send + Sync + 'static) -> Self {
        self.kernel_counters = Box::new(read);
        self
    }

    pub fn problems(mut self, read: impl Fn() -> Vec<Problem> + Send + Sync + 'static) -> Self {
        self.problems = Box::new(read);
        self
    }

    pub fn connections(mut self, read: impl Fn() -> Vec<Connection> + Send + Sync + 'static) -> Self {
        self.connections = Box::new(read);
        self
    }

    pub fn publications(mut self, read: impl Fn() -> Vec<Publication> + Send + Sync + 'static) -> Self {
        self.publications = Box::new(read);
        self
    }

    pub fn api_server(mut self, read: impl Fn() -> Option<ApiServer> + Send + Sync + 'static) -> Self {
        self.api_server = Box::new(read);
        self
    }

    fn dump(&self, sections: &[Section]) -> Dump {
        let snapshot = Arc::clone(&self.snapshot.borrow());
        let mut dump = Dump {
            version: dump::Version {
                warren: env!("CARGO_PKG_VERSION").to_owned(),
                node: self.node.to_string(),
                snapshot: snapshot.version,
                api_server: (self.api_server)(),
            },
            ..Dump::default()
        };
        for section in sections {
            match section {
                Section::Workloads => dump.workloads = dump::workloads(&snapshot),
                Section::Services => dump.services = dump::services(&snapshot, &self.domain),
                Section::Policies => dump.policies = dump::policies(&snapshot),
                Section::Certificates => dump.certificates = (self.certificates)(),
                Section::CapturedPods => dump.captured_pods = (self.captured_pods)(),
                Section::KernelCounters => dump.kernel_counters = (self.kernel_counters)(),
                Section::Problems => dump.problems = (self.problems)(),
                Section::Connections => dump.connections = (self.connections)(),
                Section::Publications => dump.publications = (self.publications)(),
            }
        }
        dump
    }
}

impl fmt::Debug for AdminState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdminState")
            .field("node", &self.node)
            .finish_non_exhaustive()
    }
}

/// The admin port: `/config_dump` (`?section=workloads&section=…` for parts) and `/logging`.
#[derive(Debug)]
pub struct AdminSite {
    /// `None`: a role without a data path, which has nothing to dump.
    pub state: Option<AdminState>,
    /// `None` where the log was not set up here (tests).
    pub logging: Option<LogHandle>,
}

const LOGGING_USAGE: &str = "\
usage: POST /logging                               (to list the current level)
usage: POST /logging?level=<level>                 (to change all levels)
usage: POST /logging?level={mod1}:{level1},{mod2}:{level2}   (to change levels of modules)
usage: POST /logging?reset                         (to go back to the level at start)
levels: error, warn, info, debug, trace, off; modules: access, warren::proxy, h2 …
";

impl Site for AdminSite {
    fn paths(&self) -> &'static [(&'static str, &'static [Method])] {
        &[
            ("/", &[Method::GET]),
            ("/config_dump", &[Method::GET]),
            ("/logging", &[Method::POST]),
        ]
    }

    fn answer(self: Arc<Self>, request: &Parts) -> Answer {
        match request.uri.path() {
            "/config_dump" => self.config_dump(request.uri.query()),
            "/logging" => Answer::Now(self.set_level(request.uri.query())),
            _ => Answer::Now(text(
                StatusCode::OK,
                "GET  /config_dump   state as JSON; ?section=workloads (services, policies, certificates …) for parts\n\
                 POST /logging       the log's level; ?level=debug changes it\n",
            )),
        }
    }
}

impl AdminSite {
    fn config_dump(self: Arc<Self>, query: Option<&str>) -> Answer {
        let mut sections = Vec::new();
        for name in query_values(query, "section") {
            let Some(section) = Section::ALL.into_iter().find(|s| s.name() == name) else {
                let known = Section::ALL.map(Section::name).join(", ");
                return Answer::Now(text(
                    StatusCode::BAD_REQUEST,
                    format!("no section {name:?}; there is: {known}\n"),
                ));
            };
            sections.push(section);
        }
        if sections.is_empty() {
            sections.extend(Section::ALL);
        }
        Answer::Later(Box::new(move || {
            let Some(state) = &self.state else {
                return text(
                    StatusCode::NOT_FOUND,
                    "this role carries no connections and has nothing to dump\n",
                );
            };
            match serde_json::to_vec_pretty(&state.dump(&sections)) {
                Ok(mut json) => {
                    json.push(b'\n');
                    with_type(StatusCode::OK, "application/json", json)
                }
                Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
            }
        }))
    }

    fn set_level(&self, query: Option<&str>) -> Response<Full<Bytes>> {
        let Some(logging) = &self.logging else {
            return text(StatusCode::NOT_FOUND, "the log has no level here\n");
        };
        let changed = match query_values(query, "level").as_slice() {
            [] if !query_values(query, "reset").is_empty() => logging.reset(),
            [] => Ok(()),
            levels => logging.set(&levels.join(",")),
        };
        match changed {
            Ok(()) => text(StatusCode::OK, format!("current log level is {}\n", logging.current())),
            Err(error @ (LoggingError::Level { .. } | LoggingError::Filter { .. })) => {
                text(StatusCode::BAD_REQUEST, format!("{error}\n\n{LOGGING_USAGE}"))
            }
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        }
    }
}

/// `/metrics` and, as Istio's scrape annotations have it, `/stats/prometheus`.
#[derive(Debug)]
pub struct MetricsSite(pub Arc<Metrics>);

impl Site for MetricsSite {
    fn paths(&self) -> &'static [(&'static str, &'static [Method])] {
        &[("/metrics", &[Method::GET]), ("/stats/prometheus", &[Method::GET])]
    }

    fn answer(self: Arc<Self>, _request: &Parts) -> Answer {
        Answer::Later(Box::new(move || {
            with_type(
                StatusCode::OK,
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
                self.0.encode(),
            )
        }))
    }
}
