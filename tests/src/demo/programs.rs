//! The demo's own programs in its pods: a TCP echo server, and a client that only listens for a greeting. Processes of
//! their own, since steering looks at the cgroup of whoever connects.

use std::io::{Read as _, Write as _};
use std::net::{Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

const PATIENCE: Duration = Duration::from_secs(5);

/// Serves both families until it is killed.
pub fn serve_echo(port: u16) -> Result<()> {
    let listener =
        TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).with_context(|| format!("listen on port {port}"))?;
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
    runs.max_by_key(|run| run.len())
        .map(|run| String::from_utf8_lossy(run).into_owned())
        .unwrap_or_default()
}

fn connect(server: SocketAddr) -> Result<TcpStream> {
    TcpStream::connect_timeout(&server, PATIENCE).with_context(|| format!("connect to {server}"))
}

fn say(line: &str) {
    // Whoever listened is gone, and we will be soon.
    let _ = writeln!(std::io::stdout(), "{line}").and_then(|()| std::io::stdout().flush());
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
