//! Throughput: streams that send or receive for a time, one blocking thread each.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{Report, SINK, SOURCE};

/// One write of the client; one read is twice that.
const CHUNK: usize = 128 << 10;

/// Longer than that without progress is a failure, not a slow moment.
const STALL: Duration = Duration::from_secs(20);

/// `streams` connections to `to` that carry data for `time`: to the server, or from it if `reverse`. Counts what the receiving
/// side got, over the time until it had all of it.
pub fn run(to: SocketAddr, streams: usize, time: Duration, reverse: bool) -> Result<Report> {
    let connections = (0..streams).map(|_| connect(to)).collect::<Result<Vec<_>>>()?;
    let start = Instant::now();
    let threads: Vec<_> = connections
        .into_iter()
        .map(|stream| {
            std::thread::spawn(move || {
                if reverse {
                    receive(stream, time)
                } else {
                    send(stream, start + time)
                }
            })
        })
        .collect();
    let mut bytes = 0;
    for thread in threads {
        match thread.join() {
            Ok(result) => bytes += result?,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    Ok(Report::Bulk {
        bytes,
        seconds,
        gbit_per_s: bytes as f64 * 8e-9 / seconds,
    })
}

fn connect(to: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, STALL).with_context(|| format!("connect to {to}"))?;
    stream.set_read_timeout(Some(STALL))?;
    stream.set_write_timeout(Some(STALL))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn send(mut stream: TcpStream, until: Instant) -> Result<u64> {
    let mut chunk = vec![b'.'; CHUNK];
    chunk[0] = SINK;
    let mut sent = 0;
    // Once at least: a thread may begin when the time is over.
    loop {
        sent += stream.write(&chunk).context("send")? as u64;
        if Instant::now() >= until {
            break;
        }
    }
    stream.shutdown(Shutdown::Write)?;
    let mut received = [0; 8];
    stream.read_exact(&mut received).context("read the server's count")?;
    let received = u64::from_be_bytes(received);
    ensure!(received == sent, "{sent} bytes were sent, {received} arrived");
    Ok(received)
}

fn receive(mut stream: TcpStream, time: Duration) -> Result<u64> {
    let millis = u32::try_from(time.as_millis()).context("too long")?.to_be_bytes();
    stream.write_all(&[SOURCE, millis[0], millis[1], millis[2], millis[3]])?;
    let mut buffer = vec![0; 2 * CHUNK];
    let mut received = 0;
    loop {
        match stream.read(&mut buffer).context("receive")? {
            0 => return Ok(received),
            count => received += count as u64,
        }
    }
}
