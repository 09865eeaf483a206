//! The load tool: server, clients that measure, and a connection driven by hand. Prints one line of JSON.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, Subcommand};
use warren_tests::load::{self, Report, connect, server};

#[derive(Parser)]
#[command(about = "Load between two pods, measured")]
struct Arguments {
    #[command(subcommand)]
    mode: Mode,
}

#[derive(Subcommand)]
enum Mode {
    /// Serve all the other modes, until killed
    Serve {
        /// Once for each address
        #[arg(long, required = true)]
        listen: Vec<SocketAddr>,
    },
    /// Throughput of some streams
    Bulk {
        #[arg(long)]
        to: SocketAddr,
        #[arg(long, default_value_t = 1)]
        streams: usize,
        #[arg(long, default_value_t = 3.0)]
        seconds: f64,
        /// From the server to the client
        #[arg(long)]
        reverse: bool,
    },
    /// Requests of 1 KB over open connections
    Request {
        #[arg(long)]
        to: SocketAddr,
        #[arg(long, default_value_t = 1)]
        connections: usize,
        #[arg(long, default_value_t = 3.0)]
        seconds: f64,
    },
    /// Connect, ask once, close
    Connect {
        /// Once for each address, used in turn
        #[arg(long, required = true)]
        to: Vec<SocketAddr>,
        #[arg(long, default_value_t = 1)]
        workers: usize,
        #[arg(long, default_value_t = 3.0)]
        seconds: f64,
        /// So many connections, however long it takes
        #[arg(long)]
        count: Option<u64>,
        /// Until standard input ends
        #[arg(long, conflicts_with_all = ["count", "seconds"])]
        until_input_ends: bool,
        /// So many connections a second, as far as workers are free
        #[arg(long)]
        rate: Option<f64>,
        /// The server must see this client address
        #[arg(long)]
        expect: Option<IpAddr>,
    },
    /// Connections that stay open until standard input ends
    Hold {
        #[arg(long)]
        to: SocketAddr,
        #[arg(long)]
        connections: usize,
    },
    /// One connection between standard input and output
    Talk {
        #[arg(long)]
        to: SocketAddr,
        #[arg(long, default_value_t = 10.0)]
        timeout: f64,
    },
}

fn main() -> Result<()> {
    let report = match Arguments::parse().mode {
        Mode::Serve { listen } => {
            let listeners = listen.into_iter().map(server::listen).collect::<Result<Vec<_>>>()?;
            // Whoever started it waits for this line.
            print("listening")?;
            return server::serve(&listeners);
        }
        Mode::Bulk {
            to,
            streams,
            seconds,
            reverse,
        } => load::bulk::run(to, streams, Duration::from_secs_f64(seconds), reverse)?,
        Mode::Request {
            to,
            connections,
            seconds,
        } => load::request::run(to, connections, Duration::from_secs_f64(seconds))?,
        Mode::Connect {
            to,
            workers,
            seconds,
            count,
            until_input_ends,
            rate,
            expect,
        } => {
            let until = match count {
                Some(count) => connect::Until::Tried(count),
                None if until_input_ends => connect::Until::InputEnds,
                None => connect::Until::Elapsed(Duration::from_secs_f64(seconds)),
            };
            connect::run(&connect::Options {
                to,
                workers,
                until,
                rate,
                expect,
            })?
        }
        Mode::Hold { to, connections } => {
            return load::request::hold(to, connections, |report| {
                print_report(&report)?;
                std::io::stdin().read_to_end(&mut Vec::new())?;
                Ok(())
            });
        }
        Mode::Talk { to, timeout } => {
            std::process::exit(load::talk::run(to, Duration::from_secs_f64(timeout))?);
        }
    };
    print_report(&report)
}

fn print_report(report: &Report) -> Result<()> {
    print(&serde_json::to_string(report)?)
}

fn print(line: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{line}")?;
    Ok(stdout.flush()?)
}
