//! The agent's sockets: blocking calls with time-outs, one thread per accepted connection.

use super::{Order, Outcome, Serve};
use nix::errno::Errno;
use socket2::{Domain, Socket, Type};
use std::{
    collections::HashMap,
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

#[derive(Debug, Default)]
pub(super) struct Sockets {
    open: HashMap<String, Socket>,
    listening: HashMap<String, Arc<Mutex<Vec<TcpStream>>>>,
}

impl Sockets {
    pub(super) fn carry_out(&mut self, order: Order) -> Outcome {
        let start = Instant::now();
        match self.attempt(order) {
            Ok(outcome) => outcome,
            Err(error) => Outcome::Failed {
                errno: name_of(&error),
                after_us: micros(start),
            },
        }
    }

    fn attempt(&mut self, order: Order) -> io::Result<Outcome> {
        match order {
            Order::Open {
                name,
                family_of,
                bind,
                device,
                mark,
            } => {
                let socket = open(family_of, bind, device.as_deref(), mark)?;
                self.open.insert(name, socket);
                Ok(Outcome::Done)
            }
            Order::Connect { name, to, timeout_ms } => {
                let start = Instant::now();
                let socket = self.get(&name)?;
                socket.connect_timeout(&to.into(), Duration::from_millis(timeout_ms))?;
                socket.set_tcp_nodelay(true)?;
                Ok(Outcome::Connected {
                    local: address(socket.local_addr()?)?,
                    peer: address(socket.peer_addr()?)?,
                    after_us: micros(start),
                })
            }
            Order::Send { name, text } => {
                self.get(&name)?.write_all(text.as_bytes())?;
                Ok(Outcome::Done)
            }
            Order::Fill {
                name,
                bytes,
                timeout_ms,
            } => fill(self.get(&name)?, bytes, Duration::from_millis(timeout_ms)),
            Order::Receive { name, timeout_ms } => receive(self.get(&name)?, Duration::from_millis(timeout_ms)),
            Order::HalfClose { name } => {
                self.get(&name)?.shutdown(Shutdown::Write)?;
                Ok(Outcome::Done)
            }
            Order::Close { name, reset } => {
                let socket = self.open.remove(&name).ok_or(io::ErrorKind::NotFound)?;
                if reset {
                    socket.set_linger(Some(Duration::ZERO))?;
                }
                Ok(Outcome::Done)
            }
            Order::Listen { name, on, serve } => {
                let accepted = listen(on, serve)?;
                self.listening.insert(name, accepted);
                Ok(Outcome::Done)
            }
            Order::Accepted { name } => {
                let streams = self.listening.get(&name).ok_or(io::ErrorKind::NotFound)?;
                let streams = streams.lock().unwrap_or_else(PoisonError::into_inner);
                let of = |which: fn(&TcpStream) -> io::Result<SocketAddr>| {
                    streams.iter().filter_map(|s| which(s).ok()).map(canonical).collect()
                };
                Ok(Outcome::Accepted {
                    peers: of(TcpStream::peer_addr),
                    locals: of(TcpStream::local_addr),
                })
            }
            Order::Drop { name, reset } => {
                let streams = self.listening.get(&name).ok_or(io::ErrorKind::NotFound)?;
                for stream in streams.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
                    if reset {
                        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
                    } else {
                        stream.shutdown(Shutdown::Both)?;
                    }
                }
                Ok(Outcome::Done)
            }
            Order::Syn {
                from,
                to,
                shape,
                wait_ms,
            } => Ok(Outcome::Answers {
                flags: super::raw::syn(from, to, shape, Duration::from_millis(wait_ms))?,
            }),
        }
    }

    fn get(&mut self, name: &str) -> io::Result<&mut Socket> {
        self.open.get_mut(name).ok_or(io::ErrorKind::NotFound.into())
    }
}

fn open(
    family_of: SocketAddr,
    bind: Option<SocketAddr>,
    device: Option<&str>,
    mark: Option<u32>,
) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(family_of), Type::STREAM, None)?;
    if let Some(mark) = mark {
        socket.set_mark(mark)?;
    }
    socket.bind_device(device.map(str::as_bytes))?;
    if let Some(bind) = bind {
        socket.set_reuse_address(true)?;
        socket.bind(&bind.into())?;
    }
    Ok(socket)
}

fn fill(socket: &mut Socket, bytes: usize, time: Duration) -> io::Result<Outcome> {
    let pattern = [b'x'; 65536];
    let deadline = Instant::now() + time;
    let mut left = bytes;
    while left > 0 {
        let now = Instant::now();
        if now >= deadline {
            return Ok(Outcome::TimedOut { bytes: bytes - left });
        }
        socket.set_write_timeout(Some(deadline - now))?;
        match socket.write(&pattern[..left.min(pattern.len())]) {
            Ok(count) => left -= count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Outcome::Done)
}

fn receive(socket: &mut Socket, time: Duration) -> io::Result<Outcome> {
    let mut buffer = vec![0; 65536];
    socket.set_read_timeout(Some(time))?;
    match socket.read(&mut buffer) {
        Ok(0) => Ok(Outcome::End),
        Ok(count) => Ok(Outcome::Received {
            text: String::from_utf8_lossy(&buffer[..count]).into_owned(),
        }),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Outcome::TimedOut { bytes: 0 }),
        Err(error) => Err(error),
    }
}

fn listen(on: SocketAddr, serve: Serve) -> io::Result<Arc<Mutex<Vec<TcpStream>>>> {
    let socket = Socket::new(Domain::for_address(on), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    if on.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.bind(&on.into())?;
    socket.listen(1024)?;
    let listener = TcpListener::from(socket);
    let accepted = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&accepted);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            if let Ok(copy) = stream.try_clone() {
                kept.lock().unwrap_or_else(PoisonError::into_inner).push(copy);
            }
            let kept = Arc::clone(&kept);
            thread::spawn(move || {
                // The client decides when it is over; how it ended is the client's to tell.
                let _ = attend(stream, serve);
                if serve == Serve::GreetAndClose {
                    kept.lock().unwrap_or_else(PoisonError::into_inner).clear();
                }
            });
        }
    });
    Ok(accepted)
}

fn attend(mut stream: TcpStream, serve: Serve) -> io::Result<()> {
    if matches!(serve, Serve::Greet | Serve::GreetAndClose) {
        stream.write_all(format!("hello {}\n", canonical(stream.peer_addr()?)).as_bytes())?;
    }
    let mut buffer = vec![0; 65536];
    match serve {
        Serve::GreetAndClose => return stream.shutdown(Shutdown::Both),
        Serve::Hold => loop {
            thread::park();
        },
        Serve::Echo | Serve::Greet | Serve::Discard => {}
    }
    loop {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            return stream.shutdown(Shutdown::Write);
        }
        if serve != Serve::Discard {
            stream.write_all(&buffer[..count])?;
        }
    }
}

fn address(address: socket2::SockAddr) -> io::Result<SocketAddr> {
    address
        .as_socket()
        .map(canonical)
        .ok_or(io::ErrorKind::Unsupported.into())
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn name_of(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(number) => format!("{:?}", Errno::from_raw(number)),
        None => format!("{:?}", error.kind()),
    }
}

fn micros(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX)
}
