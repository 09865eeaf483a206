//! One tunnel: bytes both ways in one HTTP/2 stream, with flow control, half-close and reset. Not here: who copies
//! (`proxy::relay`).

use super::pool::Lease;
use crate::certs::Distrust;
use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream, client::ResponseFuture};
use http::StatusCode;
use std::{
    future::Future as _,
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

/// Why a tunnel ended before both sides had said all they had to say.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TunnelEnd {
    /// The peer answered the CONNECT with something other than 200.
    #[error("http status: {0}")]
    Refused(u16),
    #[error("the peer reset the tunnel ({0})")]
    Reset(Reason),
    #[error("the connection to the peer ended: {0}")]
    Lost(String),
    /// We ended the connection.
    #[error("connection closed because the peer is no longer trusted: {0}")]
    Distrusted(Distrust),
}

impl TunnelEnd {
    pub(super) fn from_h2(error: &h2::Error) -> Self {
        match error.reason() {
            Some(reason) if error.is_reset() => Self::Reset(reason),
            _ => Self::Lost(error.to_string()),
        }
    }
}

/// What the tunnels of one connection share.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) meter: Meter,
    distrusted: OnceLock<Distrust>,
}

impl Link {
    pub(super) fn new() -> Self {
        Self {
            meter: Meter::new(),
            distrusted: OnceLock::new(),
        }
    }

    /// To be said before the connection ends, so that its tunnels know why.
    pub(super) fn distrust(&self, why: Distrust) {
        // The first reason is the true one.
        let _ = self.distrusted.set(why);
    }
}

/// Notices that a connection carries bulk, so that new tunnels can avoid it.
#[derive(Debug)]
pub(super) struct Meter {
    start: Instant,
    /// When a tunnel was last seen to be bulk, in milliseconds after `start`, plus one; 0 for never.
    bulk_at: AtomicU64,
}

impl Meter {
    /// A tunnel that moves this much ...
    const PORTION: usize = 1 << 20;
    /// ... within this time is bulk ...
    const QUICK: Duration = Duration::from_millis(50);
    /// ... and keeps its connection to itself for this long.
    const MEMORY_MS: u64 = 1000;

    pub(super) fn new() -> Self {
        Self {
            start: Instant::now(),
            bulk_at: AtomicU64::new(0),
        }
    }

    fn note_bulk(&self, now: Instant) {
        let at = u64::try_from((now - self.start).as_millis()).unwrap_or(u64::MAX - 1) + 1;
        self.bulk_at.store(at, Ordering::Relaxed);
    }

    pub(super) fn is_bulk(&self) -> bool {
        match self.bulk_at.load(Ordering::Relaxed) {
            0 => false,
            at => u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX) < at + Self::MEMORY_MS,
        }
    }
}

enum Receiving {
    /// The peer has not yet answered our CONNECT.
    Answer(ResponseFuture),
    Body(RecvStream),
    Ended,
}

/// A tunnel to the application at the other end. Dropped before both directions ended, it is reset.
pub struct Tunnel {
    send: SendStream<Bytes>,
    receiving: Receiving,
    moved: usize,
    portion_since: Instant,
    link: Arc<Link>,
    _lease: Option<Lease>,
}

impl Tunnel {
    pub(super) fn opened(send: SendStream<Bytes>, answer: ResponseFuture, link: Arc<Link>, lease: Lease) -> Self {
        Self::new(send, Receiving::Answer(answer), link, Some(lease))
    }

    pub(super) fn accepted(send: SendStream<Bytes>, body: RecvStream, link: Arc<Link>) -> Self {
        Self::new(send, Receiving::Body(body), link, None)
    }

    fn new(send: SendStream<Bytes>, receiving: Receiving, link: Arc<Link>, lease: Option<Lease>) -> Self {
        Self {
            send,
            receiving,
            moved: 0,
            portion_since: link.meter.start,
            link,
            _lease: lease,
        }
    }

    /// A connection that we ended ourselves ends its tunnels with our reason.
    fn end_of(&self, error: &h2::Error) -> TunnelEnd {
        match self.link.distrusted.get() {
            Some(why) => TunnelEnd::Distrusted(why.clone()),
            None => TunnelEnd::from_h2(error),
        }
    }

    /// True once the peer has said that the tunnel stands.
    pub fn is_answered(&self) -> bool {
        !matches!(self.receiving, Receiving::Answer(_))
    }

    /// Ready when all that was sent before has found room in the peer's window: then one more chunk may be sent, of any
    /// size up to [`super::HboneSettings::chunk`].
    ///
    /// # Errors
    /// The tunnel is gone.
    pub fn poll_send_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), TunnelEnd>> {
        // One byte, never more: what an idle tunnel reserves is taken from the connection's other tunnels.
        self.send.reserve_capacity(1);
        while self.send.capacity() == 0 {
            match ready!(self.send.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(self.end_of(&error))),
                None => {
                    return match self.send.poll_reset(cx) {
                        Poll::Ready(Ok(reason)) => Poll::Ready(Err(TunnelEnd::Reset(reason))),
                        Poll::Ready(Err(error)) => Poll::Ready(Err(self.end_of(&error))),
                        Poll::Pending => Poll::Ready(Err(TunnelEnd::Lost("the tunnel is closed".into()))),
                    };
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Sends a chunk that is not empty (an empty DATA frame counts against the connection at some peers).
    ///
    /// # Errors
    /// The tunnel is gone.
    pub fn send(&mut self, chunk: Bytes) -> Result<(), TunnelEnd> {
        if chunk.is_empty() {
            return Ok(());
        }
        self.note(chunk.len());
        let sent = self.send.send_data(chunk, false);
        sent.map_err(|e| self.end_of(&e))
    }

    /// Half-close: we have said all. An empty frame that ends the stream is the one empty frame that no peer counts.
    ///
    /// # Errors
    /// The tunnel is gone.
    pub fn finish(&mut self) -> Result<(), TunnelEnd> {
        let sent = self.send.send_data(Bytes::new(), true);
        sent.map_err(|e| self.end_of(&e))
    }

    /// Aborts both directions.
    pub fn reset(&mut self) {
        self.send.send_reset(Reason::CANCEL);
    }

    /// Ready with the reason when the peer aborts the tunnel. For the time after the peer's half-close, when
    /// [`Tunnel::poll_receive`] has nothing more to tell.
    pub fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<TunnelEnd> {
        match ready!(self.send.poll_reset(cx)) {
            Ok(reason) => Poll::Ready(TunnelEnd::Reset(reason)),
            Err(error) => Poll::Ready(self.end_of(&error)),
        }
    }

    /// The next bytes, never empty; `None` after the peer's half-close. What was received is to be given back with
    /// [`Tunnel::release`] once the application has taken it.
    ///
    /// # Errors
    /// The tunnel is gone, or the peer refused it.
    pub fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, TunnelEnd>>> {
        loop {
            match &mut self.receiving {
                Receiving::Answer(answer) => match ready!(Pin::new(answer).poll(cx)) {
                    Ok(answer) if answer.status() == StatusCode::OK => {
                        self.receiving = Receiving::Body(answer.into_body());
                    }
                    Ok(answer) => return Poll::Ready(Some(Err(TunnelEnd::Refused(answer.status().as_u16())))),
                    Err(error) => return Poll::Ready(Some(Err(self.end_of(&error)))),
                },
                Receiving::Body(body) => match ready!(body.poll_data(cx)) {
                    Some(Ok(data)) if data.is_empty() => {}
                    Some(Ok(data)) => {
                        self.note(data.len());
                        return Poll::Ready(Some(Ok(data)));
                    }
                    Some(Err(error)) => return Poll::Ready(Some(Err(self.end_of(&error)))),
                    None => self.receiving = Receiving::Ended,
                },
                Receiving::Ended => return Poll::Ready(None),
            }
        }
    }

    /// Lets the peer send `bytes` more.
    pub fn release(&mut self, bytes: usize) {
        if let Receiving::Body(body) = &mut self.receiving {
            // Fails only for more than was received, which is less than what we count.
            let _ = body.flow_control().release_capacity(bytes);
        }
    }

    fn note(&mut self, bytes: usize) {
        self.moved += bytes;
        if self.moved >= Meter::PORTION {
            self.moved = 0;
            let now = Instant::now();
            if now - self.portion_since < Meter::QUICK {
                self.link.meter.note_bulk(now);
            }
            self.portion_since = now;
        }
    }
}
