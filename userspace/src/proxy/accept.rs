//! Takes connections off a listener as fast as they come, and slows down when the daemon has no room for them.

use std::{
    future::{Future, poll_fn},
    io,
    net::SocketAddr,
    pin::pin,
    sync::Arc,
    task::Poll,
    time::Duration,
};
use tokio::net::{TcpListener, TcpStream};

const SHORTEST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Connections taken before other tasks get their turn.
const TURN: u32 = 64;

/// Hands every connection to `take` until `stop` resolves. The socket is closed then, unless somebody else has it as well:
/// never shut down, for another daemon may accept from it.
pub(super) async fn accept(
    listener: Arc<TcpListener>,
    stop: impl Future<Output = ()>,
    mut take: impl FnMut(TcpStream, SocketAddr),
) {
    let mut stop = pin!(stop);
    let mut pause = SHORTEST_PAUSE;
    loop {
        let outcome = poll_fn(|cx| {
            if stop.as_mut().poll(cx).is_ready() {
                return Poll::Ready(None);
            }
            for _ in 0..TURN {
                match listener.poll_accept(cx) {
                    Poll::Ready(Ok((socket, from))) => {
                        pause = SHORTEST_PAUSE;
                        take(socket, from);
                    }
                    Poll::Ready(Err(error)) => return Poll::Ready(Some(error)),
                    Poll::Pending => return Poll::Pending,
                }
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
        let Some(error) = outcome else { return };
        if is_about_one_connection(&error) {
            continue;
        }
        tracing::warn!(%error, ?pause, "cannot accept connections, trying again after a pause");
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stop.as_mut() => return,
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// accept(2) also reports what happened to a connection before it was accepted.
fn is_about_one_connection(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ECONNABORTED | libc::EPERM | libc::EPROTO | libc::EINTR | libc::ENETDOWN | libc::ENETUNREACH)
            | Some(libc::EHOSTDOWN | libc::EHOSTUNREACH | libc::ENONET | libc::ENOPROTOOPT | libc::EOPNOTSUPP)
    )
}
