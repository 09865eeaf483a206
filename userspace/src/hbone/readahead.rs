//! Reads a socket in large portions for a reader that asks for small ones: rustls asks for 4 KiB at a time, a system call
//! each. An idle connection holds no buffer.

use std::{
    cell::RefCell,
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

/// Bytes read at once.
const PORTION: usize = 256 << 10;
/// Buffers that a thread keeps for the next connection that has something to read.
const KEPT: usize = 4;

thread_local! {
    static FREE: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

fn take_buffer() -> Box<[u8]> {
    FREE.with_borrow_mut(Vec::pop)
        .unwrap_or_else(|| vec![0; PORTION].into_boxed_slice())
}

fn give_back(buffer: Box<[u8]>) {
    FREE.with_borrow_mut(|free| {
        if free.len() < KEPT {
            free.push(buffer);
        }
    });
}

/// A socket and what was read from it ahead of its reader.
#[derive(Debug)]
pub(super) struct ReadAhead {
    tcp: TcpStream,
    buffer: Option<Box<[u8]>>,
    start: usize,
    end: usize,
}

impl ReadAhead {
    pub(super) fn new(tcp: TcpStream) -> Self {
        Self {
            tcp,
            buffer: None,
            start: 0,
            end: 0,
        }
    }
}

impl AsyncRead for ReadAhead {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let buffer = match &mut this.buffer {
            Some(buffer) => buffer,
            None => {
                let mut buffer = take_buffer();
                let mut portion = ReadBuf::new(&mut buffer);
                let outcome = Pin::new(&mut this.tcp).poll_read(cx, &mut portion);
                let count = portion.filled().len();
                if !matches!(outcome, Poll::Ready(Ok(()))) || count == 0 {
                    give_back(buffer);
                    return outcome;
                }
                (this.start, this.end) = (0, count);
                this.buffer.insert(buffer)
            }
        };
        let count = out.remaining().min(this.end - this.start);
        out.put_slice(&buffer[this.start..this.start + count]);
        this.start += count;
        if this.start == this.end
            && let Some(buffer) = this.buffer.take()
        {
            give_back(buffer);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ReadAhead {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.tcp).poll_shutdown(cx))?;
        Poll::Ready(Ok(()))
    }
}
