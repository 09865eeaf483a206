//! Warren: one binary, many roles. Each folder faces one outside world and the middle, `mesh`, knows none of them;
//! `tests/tests/imports.rs` holds the arrows that are allowed.

pub mod admin;
pub mod app;
pub mod capture;
pub mod certs;
pub mod cli;
pub mod cni;
pub mod config;
pub mod controller;
pub mod handover;
pub mod hbone;
pub mod kernel;
pub mod kubernetes;
pub mod mesh;
pub mod net;
pub mod proxy;
pub mod shutdown;
pub mod telemetry;
#[cfg(test)]
mod testing;
