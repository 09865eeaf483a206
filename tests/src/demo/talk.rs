//! A TCP echo server, a client that talks to it line by line, and one that only listens for a greeting: run as processes
//! of their own, since steering looks at the cgroup of whoever connects.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::ChildStdin;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::mesh::binary;
use crate::process::Process;
use crate::topology::Place;

const PATIENCE: Duration = Duration::from_secs(5);
const CONNECTED: &str = "connected";
const ENDED: &str = "ended: ";

/// Serves both families until it is killed.
pub fn serve_echo(port: u16) -> Result<()> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).with_context(|| format!("listen on port {port}"))?;
    say("listening");
    for stream in listener.incoming() {
        let mut stream = stream.context("accept")?;
        std::thread::spawn(move || {
            let mut reader = stream.try_clone()?;
            std::io::copy(&mut reader, &mut stream)?;
            stream.shutdown(Shutdown::Write)
        });
    }
    Ok(())
}

/// Connects, sends what it reads on standard input, and prints every line that comes back, and how the connection ends.
pub fn talk(server: SocketAddr) -> Result<()> {
    let stream = connect(server)?;
    say(CONNECTED);
    let mut writer = stream.try_clone()?;
    std::thread::spawn(move || std::io::copy(&mut std::io::stdin(), &mut writer));
    let mut lines = BufReader::new(stream).lines();
    let end = loop {
        match lines.next() {
            Some(Ok(line)) => say(&line),
            Some(Err(error)) => break error.to_string(),
            None => break "the server closed it".to_owned(),
        }
    };
    say(&format!("{ENDED}{end}"));
    Ok(())
}

/// Prints what the server says before it is spoken to, as far as it can be printed.
pub fn print_greeting(server: SocketAddr) -> Result<()> {
    let mut stream = connect(server)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut greeting = [0; 256];
    let length = stream.read(&mut greeting).context("the server says nothing")?;
    ensure!(length > 0, "the server closed the connection without a word");
    say(&printable(&greeting[..length]));
    Ok(())
}

/// The longest run of printable characters: the version in MariaDB's packet, all of OpenSSH's line.
fn printable(greeting: &[u8]) -> String {
    let runs = greeting.split(|byte| !byte.is_ascii_graphic());
    runs.max_by_key(|run| run.len()).map(|run| String::from_utf8_lossy(run).into_owned()).unwrap_or_default()
}

fn connect(server: SocketAddr) -> Result<TcpStream> {
    TcpStream::connect_timeout(&server, PATIENCE).with_context(|| format!("connect to {server}"))
}

fn say(line: &str) {
    // Whoever listened is gone, and we will be soon.
    let _ = writeln!(std::io::stdout(), "{line}").and_then(|()| std::io::stdout().flush());
}

/// An open connection of a pod, held by a process in it.
#[derive(Debug)]
pub struct Conversation {
    _process: Process,
    input: ChildStdin,
    lines: Receiver<String>,
}

impl Conversation {
    /// Connects from `place` and waits until that is done.
    pub fn open(place: &Place, server: SocketAddr) -> Result<Self> {
        let mut process = place
            .command(binary("demo")?)
            .named(format!("{}-talk", place.name))
            .args(["talk", &server.to_string()])
            .with_pipes()
            .spawn()?;
        let (input, output) = process.take_pipes().context("the process has no pipes")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            let lines = BufReader::new(output).lines();
            lines.map_while(Result::ok).try_for_each(|line| sender.send(line).ok())
        });
        let conversation = Self { input, lines, _process: process };
        match conversation.next_line(PATIENCE + Duration::from_secs(1))? {
            Some(line) if line == CONNECTED => Ok(conversation),
            Some(line) => bail!("{} could not connect to {server}: {line}", place.name),
            None => bail!("{} could not connect to {server}: {}", place.name, conversation._process.stderr().trim()),
        }
    }

    /// Sends a line and waits for its echo.
    pub fn echo(&mut self, line: &str) -> Result<()> {
        writeln!(self.input, "{line}").context("the connection is gone")?;
        let answer = self.next_line(PATIENCE)?.context("the connection is gone")?;
        ensure!(answer == line, "sent {line:?}, came back {answer:?}");
        Ok(())
    }

    /// Waits until the connection ends, and says how.
    pub fn wait_for_end(&self, deadline: Duration) -> Result<String> {
        match self.next_line(deadline)? {
            None => Ok("the process ended".to_owned()),
            Some(line) => match line.strip_prefix(ENDED) {
                Some(end) => Ok(end.to_owned()),
                None => bail!("instead of an end came {line:?}"),
            },
        }
    }

    fn next_line(&self, deadline: Duration) -> Result<Option<String>> {
        match self.lines.recv_timeout(deadline) {
            Ok(line) => Ok(Some(line)),
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => bail!("nothing happened within {deadline:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_found_in_a_greeting() {
        let mariadb = b"\x5e\0\0\0\x0a11.8.2-MariaDB-ubu\0\x1f\0\0\0ab\"cd\0";
        assert_eq!(printable(mariadb), "11.8.2-MariaDB-ubu");
        assert_eq!(printable(b"SSH-2.0-OpenSSH_9.2p1\r\n"), "SSH-2.0-OpenSSH_9.2p1");
        assert_eq!(printable(b""), "");
    }
}
