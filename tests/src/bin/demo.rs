//! `cargo xtask demo`: reads the command line; `warren_tests::demo` does the rest. The programs that the demo starts in
//! its pods are here as well, under names that the help does not list.

use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use warren_tests::demo::{self, Options, programs};
use warren_tests::leftovers;

/// Two nodes, four pods in the mesh and one outside it, on this machine: every claim shown.
#[derive(Debug, Parser)]
#[command(name = "demo")]
struct Arguments {
    /// Run it on IPv6
    #[arg(long)]
    ipv6: bool,
    /// Leave everything running at the end, and print how to enter a pod
    #[arg(long)]
    keep: bool,
    /// Only remove what a run with --keep left
    #[arg(long)]
    clean: bool,
    #[command(subcommand)]
    role: Option<Role>,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// A TCP echo server
    #[command(hide = true)]
    Echo { port: u16 },
    /// A client that prints what the server says first
    #[command(hide = true)]
    Greeting { server: SocketAddr },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<bool> {
    match &arguments.role {
        Some(Role::Echo { port }) => programs::serve_echo(*port).map(|()| true),
        Some(Role::Greeting { server }) => programs::print_greeting(*server).map(|()| true),
        None if arguments.clean => demo::clean().map(|()| true),
        None => {
            leftovers::clear_on_ctrl_c()?;
            demo::run(Options {
                ipv6: arguments.ipv6,
                keep: arguments.keep,
            })
        }
    }
}
