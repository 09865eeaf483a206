//! Waiting for conditions with deadlines, and the smallest HTTP client that asks a daemon how it is. Not for measuring.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How long tests wait for something that should happen at once: who waits in vain waits long, who
/// is answered never does, so that a machine may stand still for many seconds.
pub const DEADLINE: Duration = Duration::from_secs(60);

const PAUSE: Duration = Duration::from_millis(10);

/// Asks `condition` every 10 ms until it answers with a value; an error names `what` after `deadline`.
pub fn wait_until<T>(what: &str, deadline: Duration, mut condition: impl FnMut() -> Option<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return Ok(value);
        }
        if start.elapsed() > deadline {
            bail!("waited {deadline:?} in vain until {what}");
        }
        std::thread::sleep(PAUSE);
    }
}

/// Like [`wait_until`] for conditions that fail with a reason: the last reason becomes the cause of the error.
pub fn wait_until_ok<T>(what: &str, deadline: Duration, mut condition: impl FnMut() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        match condition() {
            Ok(value) => return Ok(value),
            Err(error) if start.elapsed() > deadline => {
                return Err(error.context(format!("waited {deadline:?} in vain until {what}")));
            }
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

/// The status and the body of `GET path`, asked from the calling thread's network namespace. Ends after 30 seconds
/// of silence.
pub fn http_get(address: SocketAddr, path: &str) -> Result<(u16, String)> {
    let limit = Duration::from_secs(30);
    let mut stream = TcpStream::connect_timeout(&address, limit).with_context(|| format!("connect to {address}"))?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    // HTTP/1.0: the answer ends where the connection ends, and is never chunked.
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    parse_answer(&answer).with_context(|| format!("GET http://{address}{path}"))
}

fn parse_answer(answer: &[u8]) -> Result<(u16, String)> {
    let text = String::from_utf8_lossy(answer);
    let (head, body) = text.split_once("\r\n\r\n").context("no end of header in the answer")?;
    let status = head.split(' ').nth(1).context("no status in the answer")?;
    Ok((status.parse().context("the status is not a number")?, body.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_split_into_status_and_body() {
        let answer =
            parse_answer(b"HTTP/1.0 503 Service Unavailable\r\nA: b\r\n\r\nnot ready").expect("it is an answer");
        assert_eq!(answer, (503, "not ready".to_owned()));
    }

    #[test]
    fn a_condition_that_never_holds_is_named_in_the_error() {
        let error = wait_until("pigs fly", Duration::from_millis(20), || None::<()>).expect_err("they do not");
        assert!(error.to_string().contains("pigs fly"), "{error}");
    }
}
