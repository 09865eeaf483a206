//! New connections in the background for as long as a test needs them: no guess of how long that is.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, bail, ensure};

use super::{ConnectRate, Report};
use crate::{DEADLINE, Process, ProcessBuilder};

/// A client that begins connections at a steady rate until it is told to end.
#[derive(Debug)]
pub struct Traffic(Process);

impl Traffic {
    /// `command` is the load tool, where the client is. `rate` connections begin in a second, as far as `workers` are
    /// free, in turn to these ports of the server: a client has 28,000 ports of its own for each, and each of its ports
    /// rests a minute after use.
    pub fn start(command: ProcessBuilder, to: IpAddr, ports: &[u16], workers: usize, rate: f64) -> Result<Self> {
        let to = ports.iter().map(|port| format!("--to={}", SocketAddr::new(to, *port)));
        let process = command
            .arg("connect")
            .args(to)
            .args([format!("--workers={workers}"), format!("--rate={rate}")])
            .arg("--until-input-ends")
            .named("traffic")
            .with_pipes()
            .spawn()?;
        Ok(Self(process))
    }

    /// Ends it. What became of the connections; it is an error if it had ended by itself.
    pub fn end(mut self) -> Result<ConnectRate> {
        ensure!(self.0.is_running(), "the traffic ended by itself: {}", self.0.log());
        self.0.end_input();
        let line = self.0.read_line(DEADLINE)?;
        let Report::Connect(connects) = serde_json::from_str(&line)? else {
            bail!("not a report of connections: {line}")
        };
        ensure!(self.0.wait(DEADLINE)?.success(), "{}", self.0.log());
        Ok(connects)
    }
}
