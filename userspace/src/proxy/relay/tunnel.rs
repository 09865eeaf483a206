//! The relay between an application's socket and a tunnel. What waits for a slow application is bounded by the tunnel's
//! window; small frames are put together.

use super::{Application, CHUNK, Ended, SCRATCH, TURN};
use crate::{hbone::Tunnel, net, proxy::connections::Open};
use bytes::{Buf as _, Bytes, BytesMut};
use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, ready},
};
use tokio::{
    io::{AsyncRead as _, AsyncReadExt as _, AsyncWrite as _, ReadBuf},
    net::TcpStream,
};

/// A read of at least this much is followed by one straight into a buffer of its own; smaller ones go through the
/// thread's buffer and are copied, so that a small message does not hold a large allocation.
const BULK: usize = 16 << 10;
/// Frames smaller than this are put together while the application does not read.
const SMALL: usize = 4 << 10;
/// Buffers that one write takes together.
const SLICES: usize = 32;

/// An application's socket joined with a tunnel. A future that resolves when both directions have ended; the socket is
/// reset if they did not end well.
pub(in crate::proxy) struct TunnelRelay {
    /// `None` once it has been closed.
    socket: Option<TcpStream>,
    tunnel: Tunnel,
    open: Arc<Open>,
    application: Application,
    up: Up,
    down: Down,
}

/// From the application into the tunnel.
struct Up {
    /// The last read was large: the next is likely to be.
    bulk: bool,
    finished: bool,
}

/// From the tunnel to the application.
#[derive(Default)]
struct Down {
    queue: VecDeque<Bytes>,
    queued: usize,
    /// Small frames that wait, together.
    tail: BytesMut,
    /// The peer has said all.
    ended: bool,
    /// The application knows.
    finished: bool,
}

impl TunnelRelay {
    pub(in crate::proxy) fn new(socket: TcpStream, tunnel: Tunnel, open: Arc<Open>, application: Application) -> Self {
        Self {
            socket: Some(socket),
            tunnel,
            open,
            application,
            up: Up {
                bulk: false,
                finished: false,
            },
            down: Down::default(),
        }
    }

    /// Copies until the peer has answered the CONNECT; `Some` if the connection ended before.
    pub(in crate::proxy) fn poll_answered(&mut self, cx: &mut Context<'_>) -> Poll<Option<Ended>> {
        match self.poll_ended(cx) {
            Poll::Ready(ended) => Poll::Ready(Some(ended)),
            Poll::Pending if self.tunnel.is_answered() => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    }

    pub(in crate::proxy) fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        let ended = match self.poll_copy(cx) {
            Poll::Ready(ended) => ended,
            Poll::Pending => return Poll::Pending,
        };
        self.end(&ended);
        Poll::Ready(ended)
    }

    /// Ends both sides as `ended` says.
    pub(in crate::proxy) fn end(&mut self, ended: &Ended) {
        if *ended == Ended::Completely {
            self.socket = None;
            return;
        }
        self.tunnel.reset();
        if let Some(socket) = self.socket.take() {
            net::abort(socket);
        }
    }

    fn poll_copy(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        if self.open.poll_closed(cx).is_ready() {
            return Poll::Ready(Ended::Closed);
        }
        if !self.down.finished
            && let Poll::Ready(Err(ended)) = self.poll_down(cx)
        {
            return Poll::Ready(ended);
        }
        if !self.up.finished
            && let Poll::Ready(Err(ended)) = self.poll_up(cx)
        {
            return Poll::Ready(ended);
        }
        match (self.up.finished, self.down.finished) {
            (true, true) => return Poll::Ready(Ended::Completely),
            // Nothing else would tell of a reset any more.
            (false, true) => {
                if let Poll::Ready(end) = self.tunnel.poll_reset(cx) {
                    return Poll::Ready(Ended::Tunnel(end));
                }
            }
            (true | false, false) => {}
        }
        Poll::Pending
    }

    fn poll_up(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Ended>> {
        let Some(socket) = &mut self.socket else {
            return Poll::Pending;
        };
        let mut moved = 0;
        while moved < TURN {
            ready!(self.tunnel.poll_send_ready(cx)).map_err(Ended::Tunnel)?;
            let chunk = ready!(read(socket, self.up.bulk, cx)).map_err(|e| Ended::Application(e.kind()))?;
            if chunk.is_empty() {
                self.tunnel.finish().map_err(Ended::Tunnel)?;
                self.up.finished = true;
                return Poll::Ready(Ok(()));
            }
            let count = chunk.len();
            self.up.bulk = count >= BULK;
            moved += count;
            self.tunnel.send(chunk).map_err(Ended::Tunnel)?;
            self.application.count_from(&self.open, count);
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn poll_down(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Ended>> {
        let Some(socket) = &mut self.socket else {
            return Poll::Pending;
        };
        let mut moved = 0;
        while moved < TURN {
            let pending = self.down.fill(&mut self.tunnel, CHUNK, cx)?;
            if self.down.is_empty() {
                if !self.down.ended {
                    return Poll::Pending;
                }
                ready!(Pin::new(&mut *socket).poll_shutdown(cx)).map_err(|e| Ended::Application(e.kind()))?;
                self.down.finished = true;
                return Poll::Ready(Ok(()));
            }
            match self.down.poll_write(socket, cx) {
                Poll::Ready(Ok(count)) => {
                    moved += count;
                    self.tunnel.release(count);
                    self.application.count_to(&self.open, count);
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(Ended::Application(error.kind()))),
                Poll::Pending => {
                    // What the peer may still send is bounded by the window. Taking it off the connection now, with
                    // small frames put together, keeps a slow reader from looking like an attack to HTTP/2.
                    if !pending {
                        self.down.fill(&mut self.tunnel, usize::MAX, cx)?;
                    }
                    return Poll::Pending;
                }
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl Future for TunnelRelay {
    type Output = Ended;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Ended> {
        self.poll_ended(cx)
    }
}

impl Drop for TunnelRelay {
    /// A task that ends for another reason than the connection's own leaves no half-open socket behind.
    fn drop(&mut self) {
        if let Some(socket) = self.socket.take() {
            net::abort(socket);
        }
    }
}

impl Down {
    /// Takes what the tunnel has, up to about `most` bytes. True if the tunnel has no more for now.
    fn fill(&mut self, tunnel: &mut Tunnel, most: usize, cx: &mut Context<'_>) -> Result<bool, Ended> {
        while !self.ended && self.queued < most {
            match tunnel.poll_receive(cx) {
                Poll::Ready(Some(Ok(bytes))) => self.push(bytes),
                Poll::Ready(Some(Err(end))) => return Err(Ended::Tunnel(end)),
                Poll::Ready(None) => self.ended = true,
                Poll::Pending => return Ok(true),
            }
        }
        Ok(self.ended)
    }

    fn is_empty(&self) -> bool {
        self.queued == 0
    }

    fn push(&mut self, bytes: Bytes) {
        let first = self.is_empty();
        self.queued += bytes.len();
        if bytes.len() >= SMALL || first {
            self.close_tail();
            self.queue.push_back(bytes);
        } else {
            self.tail.extend_from_slice(&bytes);
            if self.tail.len() >= BULK {
                self.close_tail();
            }
        }
    }

    fn close_tail(&mut self) {
        if !self.tail.is_empty() {
            self.queue.push_back(std::mem::take(&mut self.tail).freeze());
        }
    }

    fn poll_write(&mut self, socket: &mut TcpStream, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        self.close_tail();
        let socket = Pin::new(socket);
        let mut count = match self.queue.len() {
            1 => ready!(socket.poll_write(cx, &self.queue[0]))?,
            queued => {
                let mut slices = [IoSlice::new(&[]); SLICES];
                for (slice, bytes) in slices.iter_mut().zip(&self.queue) {
                    *slice = IoSlice::new(bytes);
                }
                ready!(socket.poll_write_vectored(cx, &slices[..queued.min(SLICES)]))?
            }
        };
        if count == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        let written = count;
        self.queued -= written;
        while let Some(first) = self.queue.front_mut() {
            if count < first.len() {
                first.advance(count);
                break;
            }
            count -= first.len();
            self.queue.pop_front();
        }
        if self.queue.is_empty() {
            // An idle connection keeps no buffer.
            self.queue = VecDeque::new();
        }
        Poll::Ready(Ok(written))
    }
}

/// What the application has said; empty at its half-close.
fn read(socket: &mut TcpStream, bulk: bool, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
    if bulk {
        let mut buffer = BytesMut::with_capacity(CHUNK);
        ready!(pin!(socket.read_buf(&mut buffer)).poll(cx))?;
        return Poll::Ready(Ok(buffer.freeze()));
    }
    SCRATCH.with_borrow_mut(|scratch| {
        let mut buffer = ReadBuf::new(scratch);
        ready!(Pin::new(socket).poll_read(cx, &mut buffer))?;
        Poll::Ready(Ok(Bytes::copy_from_slice(buffer.filled())))
    })
}
