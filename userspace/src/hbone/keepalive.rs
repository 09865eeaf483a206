//! Finds out that a peer is gone: one PING at a time, one timer a connection. Not here: what ends with the connection.

use super::settings::HboneSettings;
use h2::{Ping, PingPong};
use std::{
    future::Future as _,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};
use tokio::time::{Instant, Sleep, sleep};

/// The health of one HTTP/2 connection.
pub(super) struct Keepalive {
    ping: PingPong,
    timer: Pin<Box<Sleep>>,
    waiting: Waiting,
    interval: Duration,
    timeout: Duration,
}

enum Waiting {
    /// For the time of the next PING.
    Next,
    /// For the answer.
    Answer,
}

/// What the passing of time brought.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Beat {
    /// A PING has just been sent: a good moment to look whether the connection is still needed.
    Sent,
    /// The peer has not answered in time.
    Dead,
}

impl Keepalive {
    pub(super) fn new(ping: PingPong, settings: &HboneSettings) -> Self {
        Self {
            ping,
            timer: Box::pin(sleep(settings.ping_interval)),
            waiting: Waiting::Next,
            interval: settings.ping_interval,
            timeout: settings.ping_timeout,
        }
    }

    /// Pending until something is to be done. Must be polled again after [`Beat::Sent`].
    pub(super) fn poll_beat(&mut self, cx: &mut Context<'_>) -> Poll<Beat> {
        loop {
            match self.waiting {
                Waiting::Next => {
                    if self.timer.as_mut().poll(cx).is_pending() {
                        return Poll::Pending;
                    }
                    // The connection's own end is told by the connection, so an error here says nothing new.
                    let _ = self.ping.send_ping(Ping::opaque());
                    self.restart(Waiting::Answer, self.timeout);
                    return Poll::Ready(Beat::Sent);
                }
                Waiting::Answer => match self.ping.poll_pong(cx) {
                    Poll::Ready(Ok(_)) => self.restart(Waiting::Next, self.interval),
                    Poll::Ready(Err(_)) => return Poll::Pending,
                    Poll::Pending if self.timer.as_mut().poll(cx).is_ready() => return Poll::Ready(Beat::Dead),
                    Poll::Pending => return Poll::Pending,
                },
            }
        }
    }

    fn restart(&mut self, waiting: Waiting, after: Duration) {
        self.timer.as_mut().reset(Instant::now() + after);
        self.waiting = waiting;
    }
}
