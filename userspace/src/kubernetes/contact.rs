//! What passes between this process and the API server: how much is asked of it, and when it last answered. A layer of the
//! client counts; metrics and `/config_dump` read.

use http_body_util::BodyExt;
use kube::client::Body;
use parking_lot::Mutex;
use std::{
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
    answered: Mutex<Option<Instant>>,
}

impl Contact {
    /// Requests sent so far.
    pub fn requests(&self) -> u64 {
        self.0.requests.load(Ordering::Relaxed)
    }

    /// Requests that no server answered, or that one answered with an error of its own (5xx).
    pub fn failures(&self) -> u64 {
        self.0.failures.load(Ordering::Relaxed)
    }

    /// Bytes of answers.
    pub fn bytes(&self) -> u64 {
        self.0.bytes.load(Ordering::Relaxed)
    }

    /// How long ago the server last said anything. A watch ends and begins anew each half minute, so more than that
    /// means that it is away, and that what we know of the cluster is so old.
    pub fn silence(&self) -> Option<Duration> {
        self.0.answered.lock().map(|at| at.elapsed())
    }

    fn failed(&self) {
        self.0.failures.fetch_add(1, Ordering::Relaxed);
    }

    fn answered(&self, bytes: usize) {
        self.0.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        *self.0.answered.lock() = Some(Instant::now());
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
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await.map_err(Into::into).inspect_err(|_| contact.failed())?;
            if answer.status().is_server_error() {
                contact.failed();
            } else {
                contact.answered(0);
            }
            let (parts, body) = answer.into_parts();
            let body = body.map_err(Into::into).map_frame(move |frame| {
                contact.answered(frame.data_ref().map_or(0, bytes::Bytes::len));
                frame
            });
            Ok(http::Response::from_parts(parts, body.boxed_unsync()))
        })
    }
}
