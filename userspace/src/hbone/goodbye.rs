//! The client's side of a goodbye that loses nothing. A server that wants to end a connection sends GOAWAY, then a PING, and
//! takes what reaches it before the PING's answer. h2 answers a PING before it sends the requests that are queued, so those would
//! be lost. Here what is read ends with the GOAWAY, and goes on after a turn in which everything could be written: by then
//! nothing new is queued, and what was is on its way.

use std::{
    future::Future,
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};

/// Reading waits no longer than this for the writing side: a peer may have to be read before it reads.
const LONGEST: Duration = Duration::from_secs(1);
const HEADER: usize = 9;
/// The type of a GOAWAY frame, RFC 9113 section 6.8.
const GOAWAY: u8 = 7;

/// A connection as the client of HTTP/2 reads it.
#[derive(Debug)]
pub(super) struct Goodbye<S> {
    inner: S,
    frames: Frames,
    /// What came after a GOAWAY in one read.
    held: Vec<u8>,
    /// Since a GOAWAY: what comes after it is not read yet.
    pause: Option<Pause>,
    /// The last that was to be written is not all written.
    is_blocked: bool,
}

#[derive(Debug)]
struct Pause {
    /// What was queued has been offered to the writing side.
    has_turned: bool,
    end: Pin<Box<Sleep>>,
}

impl Pause {
    fn new() -> Self {
        Self {
            has_turned: false,
            end: Box::pin(sleep(LONGEST)),
        }
    }

    /// Whoever writes wakes the reader when it is blocked no longer.
    fn is_over(&mut self, is_blocked: bool, cx: &mut Context<'_>) -> bool {
        if !std::mem::replace(&mut self.has_turned, true) {
            cx.waker().wake_by_ref();
            return false;
        }
        !is_blocked || self.end.as_mut().poll(cx).is_ready()
    }
}

impl<S> Goodbye<S> {
    pub(super) fn new(inner: S) -> Self {
        Self {
            inner,
            frames: Frames::default(),
            held: Vec::new(),
            pause: None,
            is_blocked: false,
        }
    }

    fn wrote<T>(&mut self, outcome: Poll<T>, cx: &Context<'_>) -> Poll<T> {
        let was_blocked = std::mem::replace(&mut self.is_blocked, outcome.is_pending());
        if was_blocked && !self.is_blocked && self.pause.is_some() {
            cx.waker().wake_by_ref();
        }
        outcome
    }
}

/// Where in a frame the bytes read so far end.
#[derive(Debug, Default)]
struct Frames {
    header: [u8; HEADER],
    /// Bytes of the header that are there.
    known: usize,
    /// Bytes of the payload that are to come.
    left: usize,
}

impl Frames {
    /// How many of the bytes belong to frames up to the first GOAWAY and to it, if it ends in them.
    fn until_goaway(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut at = 0;
        while at < bytes.len() {
            if self.known < HEADER {
                let count = (HEADER - self.known).min(bytes.len() - at);
                self.header[self.known..self.known + count].copy_from_slice(&bytes[at..at + count]);
                self.known += count;
                at += count;
                if self.known < HEADER {
                    return None;
                }
                let [high, middle, low, ..] = self.header;
                self.left = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
            }
            let count = self.left.min(bytes.len() - at);
            self.left -= count;
            at += count;
            if self.left == 0 {
                self.known = 0;
                if self.header[3] == GOAWAY {
                    return Some(at);
                }
            }
        }
        None
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Goodbye<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if let Some(pause) = &mut this.pause {
            if !pause.is_over(this.is_blocked, cx) {
                return Poll::Pending;
            }
            this.pause = None;
        }
        let before = out.filled().len();
        if this.held.is_empty() {
            let outcome = Pin::new(&mut this.inner).poll_read(cx, out);
            if !matches!(outcome, Poll::Ready(Ok(()))) {
                return outcome;
            }
        } else {
            let count = out.remaining().min(this.held.len());
            out.put_slice(&this.held[..count]);
            this.held.drain(..count);
        }
        let Some(end) = this.frames.until_goaway(&out.filled()[before..]) else {
            return Poll::Ready(Ok(()));
        };
        this.pause = Some(Pause::new());
        let rest = &out.filled()[before + end..];
        this.held.splice(..0, rest.iter().copied());
        out.set_filled(before + end);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Goodbye<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.inner).poll_write(cx, bytes);
        self.wrote(outcome, cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.inner).poll_write_vectored(cx, slices);
        self.wrote(outcome, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.inner).poll_flush(cx);
        self.wrote(outcome, cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::{FutureExt, future::poll_fn};
    use std::{
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering},
        },
        task::{Wake, Waker},
    };

    /// Gives so many bytes at a time.
    struct Portions<'a>(&'a [u8], usize);

    impl AsyncRead for Portions<'_> {
        fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            let count = self.1.min(self.0.len()).min(out.remaining());
            let (now, later) = self.0.split_at(count);
            out.put_slice(now);
            self.0 = later;
            Poll::Ready(Ok(()))
        }
    }

    fn frame(kind: u8, length: usize) -> Vec<u8> {
        let length = [(length >> 16) as u8, (length >> 8) as u8, length as u8];
        let mut frame = length.to_vec();
        frame.extend([kind, 0, 0, 0, 0, 1]);
        // Payload that looks like GOAWAYs.
        frame.resize(HEADER + (usize::from(frame[1]) << 8 | usize::from(frame[2])), GOAWAY);
        frame
    }

    /// One poll: what was read, or `None` if it is put off.
    fn read(from: &mut (impl AsyncRead + Unpin), room: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; room];
        let mut out = ReadBuf::new(&mut bytes);
        let polled = poll_fn(|cx| Pin::new(&mut *from).poll_read(cx, &mut out)).now_or_never();
        polled.map(|outcome| {
            outcome.unwrap();
            out.filled().to_vec()
        })
    }

    /// Its writing side is blocked for as long as the flag says.
    struct Blocked<'a>(Portions<'a>, bool);

    impl AsyncRead for Blocked<'_> {
        fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_read(cx, out)
        }
    }

    impl AsyncWrite for Blocked<'_> {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            match self.1 {
                true => Poll::Pending,
                false => Poll::Ready(Ok(bytes.len())),
            }
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            match self.1 {
                true => Poll::Pending,
                false => Poll::Ready(Ok(())),
            }
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[derive(Default)]
    struct Woken(AtomicBool);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    /// One turn of a connection: it reads, then writes. What was read, and whether it asked to be polled again.
    fn turn(client: &mut Goodbye<Blocked<'_>>) -> (Option<Vec<u8>>, bool) {
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(Arc::clone(&woken));
        let mut cx = Context::from_waker(&waker);
        let mut bytes = [0; 64];
        let mut out = ReadBuf::new(&mut bytes);
        let is_read = Pin::new(&mut *client).poll_read(&mut cx, &mut out).is_ready();
        let _ = Pin::new(&mut *client).poll_write(&mut cx, b"HEADERS");
        let _ = Pin::new(client).poll_flush(&mut cx);
        (is_read.then(|| out.filled().to_vec()), woken.0.load(Ordering::Relaxed))
    }

    #[tokio::test(start_paused = true)]
    async fn what_comes_after_a_goaway_waits_until_what_was_queued_is_written_and_no_longer_than_a_second() {
        let (goaway, ping) = (frame(GOAWAY, 8), frame(6, 8));
        let sent = [goaway.clone(), ping.clone()].concat();
        for is_freed in [true, false] {
            let mut client = Goodbye::new(Blocked(Portions(&sent, sent.len()), true));
            assert_eq!(turn(&mut client).0, Some(goaway.clone()));
            assert_eq!(turn(&mut client), (None, true));
            for _ in 0..3 {
                assert_eq!(turn(&mut client), (None, false), "it is blocked");
            }
            if is_freed {
                client.inner.1 = false;
                assert_eq!(turn(&mut client), (None, true), "it is written in this turn");
            } else {
                tokio::time::advance(LONGEST).await;
            }
            assert_eq!(turn(&mut client).0, Some(ping.clone()), "freed: {is_freed}");
        }
    }

    #[tokio::test]
    async fn what_is_read_ends_with_a_goaway_and_goes_on_a_turn_later() {
        let (settings, goaway, ping) = (frame(4, 0), frame(GOAWAY, 8), frame(6, 8));
        let sent = [frame(0, 3000), settings, goaway.clone(), ping.clone(), goaway, ping].concat();
        let end_of_ping = HEADER + 8;
        let ends = [sent.len() - 3 * end_of_ping, sent.len() - end_of_ping];
        // Whatever the portions are in which it comes and is read.
        for (portion, room) in [
            (sent.len(), 1 << 16),
            (1, 1 << 16),
            (100, 7),
            (sent.len(), 1),
            (3012, 50),
        ] {
            let mut client = Goodbye::new(Portions(&sent, portion));
            let (mut got, mut put_off) = (Vec::new(), Vec::new());
            loop {
                match read(&mut client, room) {
                    Some(bytes) if bytes.is_empty() => break,
                    Some(bytes) => got.extend(bytes),
                    None => put_off.push(got.len()),
                }
            }
            assert!(got == sent, "in portions of {portion}, read by {room}");
            assert_eq!(put_off, ends, "in portions of {portion}, read by {room}");
        }
    }
}
