//! The server of the load protocol: one thread, one epoll, as few system calls a request as there can be.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use socket2::{Domain, Protocol, Socket, Type};

use super::{ADDRESS, ECHO, FRAME, SINK, SOURCE};

/// One read or write of bulk data.
const CHUNK: usize = 256 << 10;

/// The listening socket of a load server, with a queue long enough for bursts of connects.
pub fn listen(address: SocketAddr) -> Result<TcpListener> {
    let context = || format!("listen on {address}");
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP)).with_context(context)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into()).with_context(context)?;
    socket.listen(4096).with_context(context)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// Serves until the process ends.
pub fn serve(listeners: &[TcpListener]) -> Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    for (token, listener) in listeners.iter().enumerate() {
        epoll.add(listener, EpollEvent::new(EpollFlags::EPOLLIN, token as u64))?;
    }
    let mut server = Server {
        epoll,
        connections: Vec::new(),
        free: Vec::new(),
        buffer: vec![b'.'; CHUNK],
    };
    let mut events = vec![EpollEvent::empty(); 512];
    loop {
        let count = match server.epoll.wait(&mut events, EpollTimeout::NONE) {
            Ok(count) => count,
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno).context("wait for events"),
        };
        for event in &events[..count] {
            let token = event.data() as usize;
            match listeners.get(token) {
                Some(listener) => server.accept(listener, listeners.len())?,
                None => server.advance(token - listeners.len()),
            }
        }
    }
}

struct Server {
    epoll: Epoll,
    connections: Vec<Option<Connection>>,
    free: Vec<usize>,
    buffer: Vec<u8>,
}

impl Server {
    fn accept(&mut self, listener: &TcpListener, first_token: usize) -> Result<()> {
        loop {
            let (stream, peer) = match listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                // The client gave up before it was accepted.
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
                Err(error) => return Err(error).context("accept"),
            };
            stream.set_nonblocking(true)?;
            stream.set_nodelay(true)?;
            let slot = self.free.pop().unwrap_or_else(|| {
                self.connections.push(None);
                self.connections.len() - 1
            });
            self.epoll.add(
                &stream,
                EpollEvent::new(EpollFlags::EPOLLIN, (slot + first_token) as u64),
            )?;
            self.connections[slot] = Some(Connection {
                stream,
                peer,
                wish: Wish::Unknown,
                token: slot + first_token,
            });
        }
    }

    fn advance(&mut self, slot: usize) {
        let Some(connection) = &mut self.connections[slot] else {
            return;
        };
        match connection.advance(&mut self.buffer, &self.epoll) {
            Ok(true) => {}
            // A client that is gone is its own business; the clients report errors.
            Ok(false) | Err(_) => {
                self.connections[slot] = None;
                self.free.push(slot);
            }
        }
    }
}

struct Connection {
    stream: TcpStream,
    peer: SocketAddr,
    token: usize,
    wish: Wish,
}

enum Wish {
    Unknown,
    /// Bytes of the frame that has begun, and of answers that did not fit.
    Echo {
        partial: usize,
        owed: usize,
        address: bool,
        /// The client reads slowly: the connection is watched for room.
        blocked: bool,
    },
    Sink {
        received: u64,
    },
    Source {
        until: Instant,
    },
    /// All is sent; the end of the client is awaited.
    Done,
}

impl Connection {
    /// Does what can be done now. False when the connection is over.
    fn advance(&mut self, buffer: &mut [u8], epoll: &Epoll) -> io::Result<bool> {
        match &mut self.wish {
            Wish::Unknown => self.begin(buffer, epoll),
            Wish::Echo { owed: 1.., .. } => self.pay(epoll),
            Wish::Echo { .. } => self.echo(buffer, epoll),
            Wish::Sink { received } => {
                match self.stream.read(buffer) {
                    Ok(0) => {
                        self.stream.write_all(&received.to_be_bytes())?;
                        return Ok(false);
                    }
                    Ok(count) => *received += count as u64,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
                Ok(true)
            }
            Wish::Source { until } => {
                if Instant::now() >= *until {
                    self.stream.shutdown(std::net::Shutdown::Write)?;
                    self.wish = Wish::Done;
                    self.watch(epoll, EpollFlags::EPOLLIN)?;
                    return Ok(true);
                }
                match self.stream.write(buffer) {
                    Err(error) if error.kind() != ErrorKind::WouldBlock => Err(error),
                    _ => Ok(true),
                }
            }
            Wish::Done => Ok(self.stream.read(buffer)? > 0),
        }
    }

    fn begin(&mut self, buffer: &mut [u8], epoll: &Epoll) -> io::Result<bool> {
        let count = match self.stream.read(&mut buffer[..CHUNK]) {
            Ok(0) => return Ok(false),
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
            Err(error) => return Err(error),
        };
        match buffer[0] {
            kind @ (ECHO | ADDRESS) => {
                self.wish = Wish::Echo {
                    partial: 0,
                    owed: 0,
                    address: kind == ADDRESS,
                    blocked: false,
                };
                self.received(count, epoll)
            }
            SINK => {
                self.wish = Wish::Sink { received: count as u64 };
                Ok(true)
            }
            SOURCE if count == 5 => {
                let millis = u32::from_be_bytes([buffer[1], buffer[2], buffer[3], buffer[4]]);
                self.wish = Wish::Source {
                    until: Instant::now() + Duration::from_millis(millis.into()),
                };
                self.watch(epoll, EpollFlags::EPOLLOUT)?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    fn echo(&mut self, buffer: &mut [u8], epoll: &Epoll) -> io::Result<bool> {
        match self.stream.read(buffer) {
            Ok(0) => Ok(false),
            Ok(count) => self.received(count, epoll),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(true),
            Err(error) => Err(error),
        }
    }

    fn received(&mut self, count: usize, epoll: &Epoll) -> io::Result<bool> {
        let Wish::Echo { partial, owed, .. } = &mut self.wish else {
            return Ok(false);
        };
        *owed += (*partial + count) / FRAME * FRAME;
        *partial = (*partial + count) % FRAME;
        if *owed > 0 { self.pay(epoll) } else { Ok(true) }
    }

    fn pay(&mut self, epoll: &Epoll) -> io::Result<bool> {
        let Wish::Echo {
            owed, address, blocked, ..
        } = &mut self.wish
        else {
            return Ok(false);
        };
        let was_blocked = std::mem::take(blocked);
        while *owed > 0 {
            let mut frame = [b'.'; FRAME];
            if *address {
                let text = format!("{}\n", self.peer);
                frame[..text.len()].copy_from_slice(text.as_bytes());
            }
            // An answer that went out in part goes on where it stopped.
            let from = (FRAME - *owed % FRAME) % FRAME;
            match self.stream.write(&frame[from..]) {
                Ok(count) => *owed -= count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    *blocked = true;
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        match (was_blocked, *blocked) {
            (false, true) => self.watch(epoll, EpollFlags::EPOLLOUT)?,
            (true, false) => self.watch(epoll, EpollFlags::EPOLLIN)?,
            _ => {}
        }
        Ok(true)
    }

    fn watch(&self, epoll: &Epoll, flags: EpollFlags) -> io::Result<()> {
        Ok(epoll.modify(&self.stream, &mut EpollEvent::new(flags, self.token as u64))?)
    }
}
