//! Requests over open connections, one outstanding on each; and connections that are merely held open.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::{ECHO, FRAME, Histogram, Rate, Report};

const STALL: Duration = Duration::from_secs(20);

struct Caller {
    stream: TcpStream,
    asked: Instant,
    received: usize,
}

/// `connections` clients of one thread ask for `time`, each the next thing as soon as it has its answer.
pub fn run(to: SocketAddr, connections: usize, time: Duration) -> Result<Report> {
    let mut callers = open(to, connections)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    for (token, caller) in callers.iter().enumerate() {
        caller.stream.set_nonblocking(true)?;
        epoll.add(&caller.stream, EpollEvent::new(EpollFlags::EPOLLIN, token as u64))?;
    }
    let mut histogram = Histogram::default();
    let request = request();
    let mut answer = [0; FRAME];
    let start = Instant::now();
    for caller in &mut callers {
        caller.ask(&request)?;
    }
    let mut events = vec![EpollEvent::empty(); 256];
    let mut now = start;
    while now < start + time {
        let count = match epoll.wait(&mut events, EpollTimeout::from(30_000u16)) {
            Ok(0) => bail!("no answer for thirty seconds"),
            Ok(count) => count,
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno).context("wait for events"),
        };
        for event in &events[..count] {
            let caller = &mut callers[event.data() as usize];
            let rest = FRAME - caller.received;
            match caller.stream.read(&mut answer[..rest]) {
                Ok(0) => bail!("the server closed a connection"),
                Ok(count) => caller.received += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error).context("read an answer"),
            }
            if caller.received == FRAME {
                now = Instant::now();
                histogram.record(now - caller.asked);
                caller.ask(&request)?;
            }
        }
    }
    Ok(Report::Request(rate(&histogram, now - start)))
}

pub(super) fn rate(histogram: &Histogram, time: Duration) -> Rate {
    let (operations, seconds) = (histogram.total(), time.as_secs_f64());
    Rate {
        operations,
        seconds,
        per_second: operations as f64 / seconds,
        latency: histogram.percentiles(),
    }
}

/// Opens `connections`, each of which answers once; `between` runs while they idle; then each must answer again.
pub fn hold(to: SocketAddr, connections: usize, between: impl FnOnce(Report) -> Result<()>) -> Result<()> {
    let mut callers = open(to, connections)?;
    ask_all(&mut callers).context("before holding")?;
    between(Report::Hold { connections })?;
    ask_all(&mut callers).context("after holding")
}

fn ask_all(callers: &mut [Caller]) -> Result<()> {
    let mut answer = [0; FRAME];
    for caller in callers {
        caller.stream.write_all(&request())?;
        caller.stream.read_exact(&mut answer)?;
    }
    Ok(())
}

fn open(to: SocketAddr, connections: usize) -> Result<Vec<Caller>> {
    (0..connections)
        .map(|number| {
            let stream = TcpStream::connect_timeout(&to, STALL)
                .with_context(|| format!("connect to {to}, connection {number} of {connections}"))?;
            stream.set_read_timeout(Some(STALL))?;
            stream.set_nodelay(true)?;
            Ok(Caller {
                stream,
                asked: Instant::now(),
                received: 0,
            })
        })
        .collect()
}

fn request() -> [u8; FRAME] {
    let mut request = [b'.'; FRAME];
    request[0] = ECHO;
    request
}

impl Caller {
    fn ask(&mut self, request: &[u8; FRAME]) -> Result<()> {
        self.received = 0;
        self.asked = Instant::now();
        let sent = self.stream.write(request).context("send a request")?;
        ensure!(
            sent == FRAME,
            "a request of {FRAME} bytes did not fit into an empty socket"
        );
        Ok(())
    }
}
