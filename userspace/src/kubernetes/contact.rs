//! What passes between this process and the API server: how much is asked of it, and when it last told of each kind. A
//! layer of the client counts; metrics and `/config_dump` read.

use super::{api::kind_at, objects::Kind};
use http::StatusCode;
use http_body_util::BodyExt;
use kube::client::Body;
use parking_lot::Mutex;
use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task,
    time::{Duration, Instant},
};
use tower::{BoxError, Layer, Service};

/// Counts of one client. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Contact(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    requests: AtomicU64,
    failures: AtomicU64,
    bytes: AtomicU64,
    heard: Mutex<BTreeMap<Kind, Instant>>,
}

impl Contact {
    /// Requests sent so far.
    pub fn requests(&self) -> u64 {
        self.0.requests.load(Ordering::Relaxed)
    }

    /// Requests that no server answered, or that one could not serve or did not allow.
    pub fn failures(&self) -> u64 {
        self.0.failures.load(Ordering::Relaxed)
    }

    /// Bytes of answers.
    pub fn bytes(&self) -> u64 {
        self.0.bytes.load(Ordering::Relaxed)
    }

    /// How long ago the server last told anything about a kind, for each that it ever did. A watch ends and begins anew
    /// each half minute, so more than that means that what we know of the kind is so old: the server is away, or does not
    /// let us watch it any more.
    pub fn silences(&self) -> Vec<(Kind, Duration)> {
        let heard = self.0.heard.lock();
        heard.iter().map(|(kind, at)| (*kind, at.elapsed())).collect()
    }

    fn failed(&self) {
        self.0.failures.fetch_add(1, Ordering::Relaxed);
    }

    fn heard(&self, about: Option<Kind>, bytes: usize) {
        self.0.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        if let Some(kind) = about {
            self.0.heard.lock().insert(kind, Instant::now());
        }
    }

    fn answered(&self, about: Option<Kind>, status: StatusCode) {
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::TOO_MANY_REQUESTS => self.failed(),
            status if status.is_server_error() => self.failed(),
            // That there is no such kind is news about it, too.
            _ => self.heard(about, 0),
        }
    }
}

impl<S> Layer<S> for Contact {
    type Service = Counted<S>;

    fn layer(&self, inner: S) -> Counted<S> {
        Counted {
            inner,
            contact: self.clone(),
        }
    }
}

/// A client whose requests and answers are counted.
#[derive(Debug)]
pub struct Counted<S> {
    inner: S,
    contact: Contact,
}

type Answer = http::Response<http_body_util::combinators::UnsyncBoxBody<bytes::Bytes, BoxError>>;

impl<S, B> Service<http::Request<Body>> for Counted<S>
where
    S: Service<http::Request<Body>, Response = http::Response<B>>,
    S::Future: Send + 'static,
    S::Error: Into<BoxError>,
    B: http_body::Body<Data = bytes::Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Answer;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Answer, BoxError>> + Send>>;

    fn poll_ready(&mut self, context: &mut task::Context<'_>) -> task::Poll<Result<(), BoxError>> {
        self.inner.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let contact = self.contact.clone();
        contact.0.requests.fetch_add(1, Ordering::Relaxed);
        let about = kind_at(request.uri().path());
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await.map_err(Into::into).inspect_err(|_| contact.failed())?;
            let status = answer.status();
            contact.answered(about, status);
            // The reason of a refusal tells nothing about the kind.
            let about = about.filter(|_| status.is_success());
            let (parts, body) = answer.into_parts();
            let body = body.map_err(Into::into).map_frame(move |frame| {
                contact.heard(about, frame.data_ref().map_or(0, bytes::Bytes::len));
                frame
            });
            Ok(http::Response::from_parts(parts, body.boxed_unsync()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_that_may_not_be_watched_any_more_is_silent_while_others_are_not() {
        let contact = Contact::default();
        contact.answered(Some(Kind::Pod), StatusCode::OK);
        contact.answered(Some(Kind::PeerAuthentication), StatusCode::NOT_FOUND);
        let before = contact.0.heard.lock().clone();
        for status in [401, 403, 429, 500, 503] {
            contact.answered(Some(Kind::Pod), StatusCode::from_u16(status).unwrap());
        }
        contact.heard(None, 100);
        assert_eq!(*contact.0.heard.lock(), before);
        assert_eq!((contact.failures(), contact.bytes()), (5, 100));
        let kinds: Vec<Kind> = contact.silences().into_iter().map(|(kind, _)| kind).collect();
        assert_eq!(kinds, [Kind::PeerAuthentication, Kind::Pod]);
    }
}
