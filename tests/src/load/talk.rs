//! One connection driven by hand: a process in a pod that connects where it is told and hands bytes through, and the test's
//! end of it. A socket of the test itself would lie in the wrong cgroup, and no steering would see it.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::ChildStdin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::mesh::binary;
use crate::process::Process;
use crate::topology::Place;
use crate::wait::wait_until;

/// The exit status of `load talk` after a reset, so that a test can tell it from an orderly end.
const RESET: i32 = 3;

/// The process's side: connects, says on standard output how that went, then copies both ways until the peer ends.
/// The status to exit with.
pub fn run(to: SocketAddr, timeout: Duration) -> Result<i32> {
    let stream = match TcpStream::connect_timeout(&to, timeout) {
        Ok(stream) => stream,
        Err(error) => {
            say(&format!("failed {:?} {error}\n", error.kind()))?;
            return Ok(1);
        }
    };
    stream.set_nodelay(true)?;
    say(&format!("connected {} {}\n", stream.local_addr()?, stream.peer_addr()?))?;
    let mut sending = stream.try_clone()?;
    std::thread::spawn(move || {
        // A failure to send shows at the reading side as well.
        let _ = io::copy(&mut io::stdin(), &mut sending);
        let _ = sending.shutdown(Shutdown::Write);
    });
    let mut receiving = stream;
    let mut buffer = [0; 16 << 10];
    loop {
        match receiving.read(&mut buffer) {
            Ok(0) => return Ok(0),
            Ok(count) => {
                let mut stdout = io::stdout().lock();
                stdout.write_all(&buffer[..count])?;
                stdout.flush()?;
            }
            Err(_) => return Ok(RESET),
        }
    }
}

fn say(line: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(line.as_bytes())?;
    Ok(stdout.flush()?)
}

/// How a conversation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The peer closed its side.
    Closed,
    Reset,
}

/// An open connection from a pod.
#[derive(Debug)]
pub struct Conversation {
    process: Process,
    stdin: Option<ChildStdin>,
    received: Arc<Mutex<Vec<u8>>>,
    /// What `getsockname` and `getpeername` said in the pod.
    pub local: SocketAddr,
    pub peer: SocketAddr,
}

impl Conversation {
    /// Connects from `place`. An attempt that fails is an error that contains what `connect` said, such as `ConnectionRefused`.
    pub fn open(place: &Place, to: SocketAddr, timeout: Duration) -> Result<Self> {
        let (seconds, to) = (timeout.as_secs_f64().to_string(), to.to_string());
        let load = binary("load")?;
        let mut process = place
            .command(load)
            .args(["talk", "--to", &to, "--timeout", &seconds])
            .with_pipes()
            .spawn()?;
        let (stdin, stdout) = process.take_pipes().context("the pipes of `load talk`")?;
        let mut reader = BufReader::new(stdout);
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let ["connected", local, peer] = words[..] else {
            bail!("{} cannot connect to {to}: {}", place.name, line.trim());
        };
        let (local, peer) = (local.parse()?, peer.parse()?);
        let received = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&received);
        std::thread::spawn(move || {
            let mut buffer = [0; 16 << 10];
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                sink.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .extend_from_slice(&buffer[..count]);
            }
        });
        Ok(Self {
            process,
            stdin: Some(stdin),
            received,
            local,
            peer,
        })
    }

    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        let stdin = self.stdin.as_mut().context("this side is closed")?;
        stdin.write_all(bytes)?;
        Ok(stdin.flush()?)
    }

    /// Ends the sending side (FIN); the other goes on.
    pub fn half_close(&mut self) {
        self.stdin = None;
    }

    /// Everything received so far.
    pub fn received(&self) -> Vec<u8> {
        self.received.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until what was received contains `bytes`. A connection that ends first is an error at once.
    pub fn expect(&mut self, bytes: &[u8], deadline: Duration) -> Result<()> {
        let what = format!("`{}` arrives at {}", String::from_utf8_lossy(bytes), self.local);
        let arrived = wait_until(&what, deadline, || {
            // Asked first: what it received before its end is there after it.
            let ended = !self.process.is_running();
            let found = self.received().windows(bytes.len()).any(|window| window == bytes);
            match (found, ended) {
                (true, _) => Some(true),
                (false, true) => Some(false),
                (false, false) => None,
            }
        })?;
        ensure!(arrived, "the connection ended before {what}");
        Ok(())
    }

    /// Sends `bytes` and waits for the server to send the same back.
    pub fn echo(&mut self, bytes: &[u8], deadline: Duration) -> Result<()> {
        self.received.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.send(bytes)?;
        self.expect(bytes, deadline)
    }

    pub fn is_open(&mut self) -> bool {
        self.process.is_running()
    }

    /// Waits for the peer to end the connection.
    pub fn wait_for_end(&mut self, deadline: Duration) -> Result<End> {
        let status = self.process.wait(deadline).context("the connection stays open")?;
        match status.code() {
            Some(0) => Ok(End::Closed),
            Some(RESET) => Ok(End::Reset),
            _ => bail!("`load talk` ended with {status}: {}", self.process.log()),
        }
    }

    /// Closes by ending the process.
    pub fn close(mut self) -> Result<()> {
        ensure!(self.process.is_running(), "it had ended already");
        self.process.kill()
    }
}
