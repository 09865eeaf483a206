//! An agent in a pod: a process that opens, uses and ends sockets as a test tells it, line by line. For what a plain
//! client cannot do: bind first, dial twice, bind to a device, reset, hold. Not for measuring.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "a test names the outcome it wants; any other is shown as it is"
)]

mod raw;
mod sockets;

use crate::{mesh::binary, process::Process, topology::Place};
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::{
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    process::{ChildStdin, ChildStdout},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

/// One order to an agent. Names are the test's own.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Order {
    /// A socket of the family of `family_of`, not yet connected.
    Open {
        name: String,
        family_of: SocketAddr,
        bind: Option<SocketAddr>,
        device: Option<String>,
        mark: Option<u32>,
    },
    /// Connects an open socket; may be asked again after a refusal.
    Connect {
        name: String,
        to: SocketAddr,
        timeout_ms: u64,
    },
    Send {
        name: String,
        text: String,
    },
    /// Writes `bytes` bytes of a pattern, or as much as goes within the time.
    Fill {
        name: String,
        bytes: usize,
        timeout_ms: u64,
    },
    /// Waits for something to arrive.
    Receive {
        name: String,
        timeout_ms: u64,
    },
    HalfClose {
        name: String,
    },
    Close {
        name: String,
        reset: bool,
    },
    Listen {
        name: String,
        on: SocketAddr,
        serve: Serve,
    },
    /// Who connected to a listener so far.
    Accepted {
        name: String,
    },
    /// Ends every connection that the listener accepted.
    Drop {
        name: String,
        reset: bool,
    },
    /// Sends one hand-made SYN and listens for what answers it.
    Syn {
        from: SocketAddr,
        to: SocketAddr,
        shape: Shape,
        wait_ms: u64,
    },
}

/// How a hand-made SYN travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    Plain,
    /// In two fragments, the first of 8 bytes.
    Fragments,
    /// Behind an IPv6 destination-options header.
    DestinationOptions,
}

/// What a listener does with each connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Serve {
    /// Sends back what it gets.
    Echo,
    /// Says `hello ADDRESS` with the client's address first, then as `Echo`.
    Greet,
    /// The same words, then closes first.
    GreetAndClose,
    /// Never reads.
    Hold,
    /// Reads and forgets.
    Discard,
}

/// How an order ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    Done,
    Connected {
        local: SocketAddr,
        peer: SocketAddr,
        after_us: u64,
    },
    Received {
        text: String,
    },
    /// The peer ended its side.
    End,
    /// Nothing came, or not all went, in time.
    TimedOut {
        bytes: usize,
    },
    Accepted {
        peers: Vec<SocketAddr>,
        locals: Vec<SocketAddr>,
    },
    /// The TCP flags of what answered.
    Answers {
        flags: Vec<u8>,
    },
    /// The system's error, such as `EHOSTUNREACH`.
    Failed {
        errno: String,
        after_us: u64,
    },
}

/// A running agent and the pipes to it.
#[derive(Debug)]
pub struct Agent {
    process: Process,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

static COUNT: AtomicU32 = AtomicU32::new(0);

impl Agent {
    /// Starts an agent in `place`.
    pub fn start(place: &Place) -> Result<Self> {
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let mut process = place
            .command(binary("agent")?)
            .named(format!("{}-agent-{number}", place.name))
            .with_pipes()
            .spawn()?;
        let (to, from) = process.take_pipes().context("the agent has pipes")?;
        Ok(Self {
            process,
            to,
            from: BufReader::new(from),
        })
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Gives an order and waits for its outcome.
    pub fn order(&mut self, order: &Order) -> Result<Outcome> {
        let mut line = serde_json::to_string(order)?;
        line.push('\n');
        self.to.write_all(line.as_bytes())?;
        let mut answer = String::new();
        ensure!(
            self.from.read_line(&mut answer)? > 0,
            "the agent ended: {}",
            self.process.log()
        );
        Ok(serde_json::from_str(&answer)?)
    }

    /// Opens `name` and connects it.
    pub fn connect(&mut self, name: &str, to: SocketAddr, timeout: Duration) -> Result<Outcome> {
        self.connect_from(name, to, None, timeout)
    }

    pub fn connect_from(
        &mut self,
        name: &str,
        to: SocketAddr,
        bind: Option<SocketAddr>,
        timeout: Duration,
    ) -> Result<Outcome> {
        let opened = self.order(&Order::Open {
            name: name.into(),
            family_of: to,
            bind,
            device: None,
            mark: None,
        })?;
        ensure!(opened == Outcome::Done, "cannot open {name}: {opened:?}");
        self.dial(name, to, timeout)
    }

    /// Connects a socket that is open.
    pub fn dial(&mut self, name: &str, to: SocketAddr, timeout: Duration) -> Result<Outcome> {
        self.order(&Order::Connect {
            name: name.into(),
            to,
            timeout_ms: millis(timeout),
        })
    }

    /// Connects, or fails the test with what happened.
    pub fn must_connect(&mut self, name: &str, to: SocketAddr, timeout: Duration) -> Result<()> {
        match self.connect(name, to, timeout)? {
            Outcome::Connected { .. } => Ok(()),
            other => bail!("{name} to {to}: {other:?}"),
        }
    }

    pub fn send(&mut self, name: &str, text: &str) -> Result<Outcome> {
        self.order(&Order::Send {
            name: name.into(),
            text: text.into(),
        })
    }

    pub fn receive(&mut self, name: &str, timeout: Duration) -> Result<Outcome> {
        self.order(&Order::Receive {
            name: name.into(),
            timeout_ms: millis(timeout),
        })
    }

    /// Sends `text` and waits until all of it came back.
    pub fn must_echo(&mut self, name: &str, text: &str, timeout: Duration) -> Result<()> {
        let sent = self.send(name, text)?;
        ensure!(sent == Outcome::Done, "{name} cannot send: {sent:?}");
        let mut back = String::new();
        while back.len() < text.len() {
            match self.receive(name, timeout)? {
                Outcome::Received { text } => back += &text,
                other => bail!("{name} waits for {text:?}, has {back:?}: {other:?}"),
            }
        }
        ensure!(back == text, "{name} sent {text:?} and got {back:?}");
        Ok(())
    }

    /// What the peer says before it ends its side.
    pub fn read_to_end(&mut self, name: &str, timeout: Duration) -> Result<(String, Outcome)> {
        let mut all = String::new();
        loop {
            match self.receive(name, timeout)? {
                Outcome::Received { text } => all += &text,
                other => return Ok((all, other)),
            }
        }
    }

    pub fn listen(&mut self, name: &str, on: SocketAddr, serve: Serve) -> Result<Outcome> {
        self.order(&Order::Listen {
            name: name.into(),
            on,
            serve,
        })
    }

    pub fn must_listen(&mut self, name: &str, on: SocketAddr, serve: Serve) -> Result<()> {
        let outcome = self.listen(name, on, serve)?;
        ensure!(outcome == Outcome::Done, "cannot listen on {on}: {outcome:?}");
        Ok(())
    }

    /// The client addresses that a listener of the agent saw.
    pub fn accepted(&mut self, name: &str) -> Result<Vec<SocketAddr>> {
        match self.order(&Order::Accepted { name: name.into() })? {
            Outcome::Accepted { peers, .. } => Ok(peers),
            other => bail!("{name}: {other:?}"),
        }
    }

    pub fn close(&mut self, name: &str) -> Result<Outcome> {
        self.order(&Order::Close {
            name: name.into(),
            reset: false,
        })
    }
}

impl Outcome {
    /// The system's error, if that is how it ended.
    pub fn errno(&self) -> Option<&str> {
        match self {
            Self::Failed { errno, .. } => Some(errno),
            _ => None,
        }
    }

    pub fn connected(&self) -> bool {
        matches!(self, Self::Connected { .. })
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// The agent's own side: orders on standard input, outcomes on standard output, until the input ends.
pub fn run() -> Result<()> {
    let mut sockets = sockets::Sockets::default();
    let mut output = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let order: Order = serde_json::from_str(&line?).context("not an order")?;
        let mut answer = serde_json::to_string(&sockets.carry_out(order))?;
        answer.push('\n');
        output.write_all(answer.as_bytes())?;
        output.flush()?;
    }
    Ok(())
}
