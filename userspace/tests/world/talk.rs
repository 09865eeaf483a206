//! Applications that serve and dial inside a world, and what a dial should have read.

use super::{DEADLINE, at};
use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
    time::Duration,
};
use warren::net::Namespace;

/// Accepts for as long as the socket listens, and says `name`, which address was dialled and by whom.
pub fn greet(listener: TcpListener, name: &str) {
    listener.set_nonblocking(false).unwrap();
    let name = name.to_owned();
    thread::spawn(move || {
        while let Ok((mut stream, peer)) = listener.accept() {
            let dialled = stream.local_addr().unwrap();
            let _ = writeln!(stream, "{name} {} from {}", canonical(dialled), canonical(peer));
            thread::spawn(move || {
                let mut rest = [0; 1024];
                while let Ok(1..) = stream.read(&mut rest) {}
            });
        }
    });
}

/// An application: greets with "app".
pub fn serve(namespace: &Namespace, address: &str, port: u16) -> SocketAddr {
    let listener = namespace.run(|| TcpListener::bind(at(address, port)).unwrap()).unwrap();
    let bound = listener.local_addr().unwrap();
    greet(listener, "app");
    bound
}

pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Connects from inside a namespace, and reads who answers.
pub fn dial(namespace: &Namespace, to: SocketAddr) -> io::Result<String> {
    dial_for(namespace, to, DEADLINE)
}

pub fn dial_for(namespace: &Namespace, to: SocketAddr, deadline: Duration) -> io::Result<String> {
    let stream = namespace.run(|| TcpStream::connect_timeout(&to, deadline)).unwrap()?;
    assert_eq!(
        canonical(stream.peer_addr()?),
        to,
        "the application sees whom it dialled"
    );
    answer(&stream)
}

pub fn answer(mut stream: &TcpStream) -> io::Result<String> {
    stream.set_read_timeout(Some(DEADLINE))?;
    let mut line = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte)? == 1 && byte != *b"\n" {
        line.push(byte[0]);
    }
    Ok(String::from_utf8(line).unwrap())
}

/// What `dial` should have read, but for the client's port.
#[track_caller]
pub fn assert_answered(answer: io::Result<String>, by: &str, dialled: SocketAddr) {
    let answer = answer.unwrap_or_else(|error| panic!("{dialled} should be answered by {by}: {error}"));
    assert!(
        answer.starts_with(&format!("{by} {dialled} from ")),
        "{dialled} should be answered by {by}: {answer}"
    );
}

#[track_caller]
pub fn assert_fails(answer: io::Result<String>, kind: io::ErrorKind) {
    assert_eq!(answer.map_err(|error| error.kind()), Err(kind));
}
