//! The relay between two sockets, without a tunnel.

use super::{Application, Ended, SCRATCH, TURN};
use crate::{net, proxy::connections::Open};
use bytes::{Buf as _, Bytes};
use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tokio::{
    io::{AsyncRead as _, AsyncWrite as _, ReadBuf},
    net::TcpStream,
};

/// Two sockets joined: plaintext, and what goes outside the mesh.
pub(in crate::proxy) struct SocketRelay {
    application: Side,
    far: Side,
    open: Arc<Open>,
    role: Application,
}

struct Side {
    socket: Option<TcpStream>,
    /// Read from the other side and not yet taken by this one.
    pending: Bytes,
    /// The other side has said all ...
    ended: bool,
    /// ... and this one knows.
    finished: bool,
}

impl Side {
    fn new(socket: TcpStream) -> Self {
        Self {
            socket: Some(socket),
            pending: Bytes::new(),
            ended: false,
            finished: false,
        }
    }
}

enum Broken {
    From(io::Error),
    To(io::Error),
}

impl SocketRelay {
    /// `role` is what the application behind `application` is.
    pub(in crate::proxy) fn new(application: TcpStream, far: TcpStream, open: Arc<Open>, role: Application) -> Self {
        Self {
            application: Side::new(application),
            far: Side::new(far),
            open,
            role,
        }
    }

    fn poll_copy(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        if self.open.poll_closed(cx).is_ready() {
            return Poll::Ready(Ended::Closed);
        }
        let Self {
            application,
            far,
            open,
            role,
        } = self;
        if let Poll::Ready(Err(broken)) = copy(application, far, cx, |n| role.count_from(open, n)) {
            return Poll::Ready(match broken {
                Broken::From(e) => Ended::Application(e.kind()),
                Broken::To(e) => Ended::Far(e.kind()),
            });
        }
        if let Poll::Ready(Err(broken)) = copy(far, application, cx, |n| role.count_to(open, n)) {
            return Poll::Ready(match broken {
                Broken::From(e) => Ended::Far(e.kind()),
                Broken::To(e) => Ended::Application(e.kind()),
            });
        }
        if application.finished && far.finished {
            Poll::Ready(Ended::Completely)
        } else {
            Poll::Pending
        }
    }
}

impl Future for SocketRelay {
    type Output = Ended;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Ended> {
        let ended = match self.poll_copy(cx) {
            Poll::Ready(ended) => ended,
            Poll::Pending => return Poll::Pending,
        };
        let sockets = [self.application.socket.take(), self.far.socket.take()];
        if ended != Ended::Completely {
            sockets.into_iter().flatten().for_each(net::abort);
        }
        Poll::Ready(ended)
    }
}

impl Drop for SocketRelay {
    fn drop(&mut self) {
        [self.application.socket.take(), self.far.socket.take()]
            .into_iter()
            .flatten()
            .for_each(net::abort);
    }
}

/// One direction. Bytes go through the thread's buffer; only what the other side does not take at once is kept.
fn copy(from: &mut Side, to: &mut Side, cx: &mut Context<'_>, count: impl Fn(usize)) -> Poll<Result<(), Broken>> {
    let (Some(source), Some(sink)) = (&mut from.socket, &mut to.socket) else {
        return Poll::Pending;
    };
    let mut moved = 0;
    while moved < TURN {
        while !to.pending.is_empty() {
            let written = ready!(Pin::new(&mut *sink).poll_write(cx, &to.pending)).map_err(Broken::To)?;
            if written == 0 {
                return Poll::Ready(Err(Broken::To(io::ErrorKind::WriteZero.into())));
            }
            to.pending.advance(written);
        }
        to.pending = Bytes::new();
        if to.ended {
            if !to.finished {
                ready!(Pin::new(&mut *sink).poll_shutdown(cx)).map_err(Broken::To)?;
                to.finished = true;
            }
            return Poll::Ready(Ok(()));
        }
        let outcome = SCRATCH.with_borrow_mut(|scratch| {
            let mut buffer = ReadBuf::new(scratch);
            ready!(Pin::new(&mut *source).poll_read(cx, &mut buffer)).map_err(Broken::From)?;
            let read = buffer.filled();
            if read.is_empty() {
                return Poll::Ready(Ok(0));
            }
            let mut written = 0;
            while written < read.len() {
                match Pin::new(&mut *sink).poll_write(cx, &read[written..]) {
                    Poll::Ready(Ok(n)) if n > 0 => written += n,
                    Poll::Ready(Ok(_)) => return Poll::Ready(Err(Broken::To(io::ErrorKind::WriteZero.into()))),
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(Broken::To(error))),
                    Poll::Pending => {
                        to.pending = Bytes::copy_from_slice(&read[written..]);
                        break;
                    }
                }
            }
            Poll::Ready(Ok(read.len()))
        });
        match ready!(outcome)? {
            0 => to.ended = true,
            n => {
                moved += n;
                count(n);
            }
        }
    }
    cx.waker().wake_by_ref();
    Poll::Pending
}
