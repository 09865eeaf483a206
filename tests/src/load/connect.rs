//! Connections a second: connect, one request, one answer, close, by several workers of one thread.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use socket2::{Domain, Protocol, Socket, Type};

use super::request::rate;
use super::{ADDRESS, ConnectRate, ECHO, FRAME, Histogram, Report};

/// When to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// With a rate: as many connections as it makes in this time, however long they take.
    Elapsed(Duration),
    /// So many connections were tried.
    Tried(u64),
    /// Whoever started it closes its standard input.
    InputEnds,
}

#[derive(Debug, Clone)]
pub struct Options {
    /// Connections go to these in turn: a client has 28,000 ports for each.
    pub to: Vec<SocketAddr>,
    pub workers: usize,
    pub until: Until,
    /// So many connections begin in a second, as far as workers are free; without it each worker begins its next at once.
    pub rate: Option<f64>,
    /// The server must see the client at this address.
    pub expect: Option<IpAddr>,
}

struct Worker {
    stream: Option<TcpStream>,
    begun: Instant,
    sent: bool,
    received: usize,
}

/// The client closes first, so its ports are the ones in TIME_WAIT. A connection that fails is counted; `run` itself fails
/// when nothing happens for thirty seconds.
pub fn run(options: &Options) -> Result<Report> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let start = Instant::now();
    let mut run = Run {
        options,
        epoll,
        start,
        input_ended: match options.until {
            Until::InputEnds => end_of_input(),
            Until::Elapsed(_) | Until::Tried(_) => Arc::default(),
        },
        tried: 0,
        outcome: Outcome::default(),
        answer: [0; FRAME],
    };
    let mut workers: Vec<Worker> = (0..options.workers)
        .map(|_| Worker {
            stream: None,
            begun: start,
            sent: false,
            received: 0,
        })
        .collect();
    let mut idle: Vec<usize> = (0..workers.len()).rev().collect();
    let mut busy = 0;
    let mut events = vec![EpollEvent::empty(); 256];
    loop {
        while let Some(token) = idle.pop() {
            if !run.is_due() {
                idle.push(token);
                break;
            }
            busy += usize::from(run.next(token, &mut workers[token]));
        }
        let is_waiting = !idle.is_empty() && !run.is_over();
        if busy == 0 && !is_waiting {
            break;
        }
        let patience = if is_waiting { 1 } else { 30_000u16 };
        let count = match run.epoll.wait(&mut events, EpollTimeout::from(patience)) {
            Ok(0) if is_waiting => continue,
            Ok(0) => bail!(
                "nothing happened for 30 seconds after {} connections",
                run.outcome.histogram.total()
            ),
            Ok(count) => count,
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno).context("wait for events"),
        };
        for event in &events[..count] {
            let token = event.data() as usize;
            let worker = &mut workers[token];
            let over = run.advance(worker).unwrap_or_else(|error| {
                run.outcome.error(&error);
                true
            });
            if over {
                // Dropped here: the descriptor leaves epoll with it.
                worker.stream = None;
                busy -= 1;
                idle.push(token);
            }
        }
    }
    let Outcome {
        histogram,
        errors,
        wrong_address,
        first_error,
    } = run.outcome;
    Ok(Report::Connect(ConnectRate {
        rate: rate(&histogram, start.elapsed()),
        errors,
        wrong_address,
        first_error,
    }))
}

/// Becomes true when standard input ends.
fn end_of_input() -> Arc<AtomicBool> {
    let ended = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&ended);
    std::thread::spawn(move || {
        // An input that cannot be read will tell nothing any more either.
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        told.store(true, Ordering::Relaxed);
    });
    ended
}

#[derive(Default)]
struct Outcome {
    histogram: Histogram,
    errors: u64,
    wrong_address: u64,
    first_error: Option<String>,
}

impl Outcome {
    fn error(&mut self, error: &io::Error) {
        self.errors += 1;
        self.first_error.get_or_insert_with(|| error.to_string());
    }
}

struct Run<'a> {
    options: &'a Options,
    epoll: Epoll,
    start: Instant,
    input_ended: Arc<AtomicBool>,
    tried: u64,
    outcome: Outcome,
    answer: [u8; FRAME],
}

impl Run<'_> {
    fn is_over(&self) -> bool {
        match self.options.until {
            Until::Elapsed(time) => match self.options.rate {
                Some(rate) => self.tried as f64 >= rate * time.as_secs_f64(),
                None => self.start.elapsed() >= time,
            },
            Until::Tried(count) => self.tried >= count,
            Until::InputEnds => self.input_ended.load(Ordering::Relaxed),
        }
    }

    /// True if another connection should begin by now.
    fn is_due(&self) -> bool {
        let is_time = |rate| self.tried as f64 <= self.start.elapsed().as_secs_f64() * rate;
        !self.is_over() && self.options.rate.is_none_or(is_time)
    }

    /// Begins a connection of the worker's. False when there is none to begin.
    fn next(&mut self, token: usize, worker: &mut Worker) -> bool {
        while !self.is_over() {
            worker.begun = Instant::now();
            let to = self.options.to[(self.tried % self.options.to.len() as u64) as usize];
            self.tried += 1;
            (worker.sent, worker.received) = (false, 0);
            match self.connect(token, to) {
                Ok(stream) => {
                    worker.stream = Some(stream);
                    return true;
                }
                Err(error) => self.outcome.error(&error),
            }
        }
        false
    }

    fn connect(&self, token: usize, to: SocketAddr) -> io::Result<TcpStream> {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        socket.set_tcp_nodelay(true)?;
        match socket.connect(&to.into()) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(Errno::EINPROGRESS as i32) => {}
            Err(error) => return Err(error),
        }
        let stream = TcpStream::from(socket);
        // Edge-triggered and for both: one registration serves the connection's whole life.
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
        self.epoll.add(&stream, EpollEvent::new(flags, token as u64))?;
        Ok(stream)
    }

    /// True when the connection has done its work.
    fn advance(&mut self, worker: &mut Worker) -> io::Result<bool> {
        let Some(stream) = &mut worker.stream else {
            return Ok(false);
        };
        if !worker.sent {
            let mut request = [b'.'; FRAME];
            request[0] = if self.options.expect.is_some() { ADDRESS } else { ECHO };
            match stream.write(&request) {
                Ok(_) => worker.sent = true,
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::NotConnected) => {
                    return Ok(false);
                }
                Err(error) => return Err(error),
            }
            // The answer makes an event of its own.
            return Ok(false);
        }
        while worker.received < FRAME {
            match stream.read(&mut self.answer[worker.received..]) {
                Ok(0) => {
                    return Err(io::Error::new(
                        ErrorKind::UnexpectedEof,
                        "closed before the answer was complete",
                    ));
                }
                Ok(count) => worker.received += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        self.outcome.histogram.record(worker.begun.elapsed());
        if let Some(expected) = self.options.expect {
            let text = self.answer.split(|byte| *byte == b'\n').next().unwrap_or_default();
            let seen = std::str::from_utf8(text)
                .ok()
                .and_then(|text| text.parse::<SocketAddr>().ok());
            if seen.map(|seen| seen.ip()) != Some(expected) {
                self.outcome.wrong_address += 1;
            }
        }
        Ok(true)
    }
}
