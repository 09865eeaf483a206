//! Whether this daemon can do its work, and if not, what it still waits for.

use super::server::{Answer, Site, text};
use http::{Method, Response, StatusCode, request::Parts};
use http_body_util::Full;
use hyper::body::Bytes;
use parking_lot::RwLock;
use std::{borrow::Cow, collections::BTreeMap, fmt::Write, sync::Arc};

/// What has to be so before others may rely on this daemon: `(condition, what it waits for)`. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Readiness {
    pending: Arc<RwLock<BTreeMap<&'static str, Cow<'static, str>>>>,
}

impl Readiness {
    /// Not ready until each of these conditions is [`Readiness::met`].
    pub fn awaiting(conditions: impl IntoIterator<Item = (&'static str, &'static str)>) -> Self {
        let pending = conditions
            .into_iter()
            .map(|(condition, why)| (condition, why.into()))
            .collect();
        Self {
            pending: Arc::new(RwLock::new(pending)),
        }
    }

    /// The condition does not hold (any more), for this reason.
    pub fn pending(&self, condition: &'static str, why: impl Into<Cow<'static, str>>) {
        self.pending.write().insert(condition, why.into());
    }

    pub fn met(&self, condition: &'static str) {
        self.pending.write().remove(condition);
    }

    pub fn is_ready(&self) -> bool {
        self.pending.read().is_empty()
    }

    /// What is not so yet.
    pub fn reasons(&self) -> Vec<(&'static str, String)> {
        self.pending
            .read()
            .iter()
            .map(|(condition, why)| (*condition, why.to_string()))
            .collect()
    }
}

/// `/healthz/ready`: 200, or 503 with a line for each condition that does not hold.
#[derive(Debug)]
pub struct ReadinessSite(pub Readiness);

impl Site for ReadinessSite {
    fn paths(&self) -> &'static [(&'static str, &'static [Method])] {
        &[("/healthz/ready", &[Method::GET])]
    }

    fn answer(self: Arc<Self>, _request: &Parts) -> Answer {
        Answer::Now(self.response())
    }
}

impl ReadinessSite {
    fn response(&self) -> Response<Full<Bytes>> {
        let reasons = self.0.reasons();
        if reasons.is_empty() {
            return text(StatusCode::OK, "ready\n");
        }
        let mut body = String::from("not ready\n");
        for (condition, why) in reasons {
            // Writing to a String does not fail.
            let _ = writeln!(body, "{condition}: {why}");
        }
        text(StatusCode::SERVICE_UNAVAILABLE, body)
    }
}
