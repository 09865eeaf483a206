//! The rows of the benchmark: what each measures, and in which unit.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use super::cost::Ends;
use super::field::Field;
use super::{Lane, Path};
use crate::load::{ConnectRate, Percentiles, Rate, Report};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Row {
    Throughput1,
    Throughput8,
    Throughput1Reverse,
    Request1,
    Request32,
    Connect1,
    Connect32,
    RequestBesideBulk,
}

/// What one measurement found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reading {
    /// In the row's unit.
    pub value: f64,
    pub latency: Option<Percentiles>,
    /// The same requests' p50, in µs, from another pod under the same load.
    pub beside_other_pod: Option<f64>,
    /// Bytes for throughput rows, operations for the others.
    pub amount: u64,
    /// CPU seconds of whoever carried it.
    pub spent: Option<Ends>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Unit {
    #[serde(rename = "Gbit/s")]
    GigabitsPerSecond,
    #[serde(rename = "1/s")]
    PerSecond,
    #[serde(rename = "us")]
    Microseconds,
}

impl Row {
    pub const ALL: [Self; 8] = [
        Self::Throughput1,
        Self::Throughput8,
        Self::Throughput1Reverse,
        Self::Request1,
        Self::Request32,
        Self::Connect1,
        Self::Connect32,
        Self::RequestBesideBulk,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Throughput1 => "throughput-1",
            Self::Throughput8 => "throughput-8",
            Self::Throughput1Reverse => "throughput-1-reverse",
            Self::Request1 => "request-1",
            Self::Request32 => "request-32",
            Self::Connect1 => "connect-1",
            Self::Connect32 => "connect-32",
            Self::RequestBesideBulk => "request-beside-bulk",
        }
    }

    pub fn unit(self) -> Unit {
        match self {
            Self::Throughput1 | Self::Throughput8 | Self::Throughput1Reverse => Unit::GigabitsPerSecond,
            Self::Request1 | Self::Request32 | Self::Connect1 | Self::Connect32 => Unit::PerSecond,
            Self::RequestBesideBulk => Unit::Microseconds,
        }
    }

    /// What CPU time is counted for: a gigabyte (10⁹ bytes), or 100,000 operations. None where two loads mix.
    pub fn cost_unit(self) -> Option<f64> {
        match self {
            Self::Throughput1 | Self::Throughput8 | Self::Throughput1Reverse => Some(1e9),
            Self::Request1 | Self::Request32 | Self::Connect1 | Self::Connect32 => Some(1e5),
            Self::RequestBesideBulk => None,
        }
    }

    /// Whether a ratio between lanes means something.
    pub fn has_ratio(self) -> bool {
        self != Self::RequestBesideBulk
    }

    pub(super) fn measure(self, field: &Field, lane: Lane, path: Path, time: Duration) -> Result<Reading> {
        match self {
            Self::Throughput1 => bulk(field, lane, path, time, &["--streams", "1"]),
            Self::Throughput8 => bulk(field, lane, path, time, &["--streams", "8"]),
            Self::Throughput1Reverse => bulk(field, lane, path, time, &["--streams", "1", "--reverse"]),
            Self::Request1 => request(field, lane, path, time, "1"),
            Self::Request32 => request(field, lane, path, time, "32"),
            Self::Connect1 => connect(field, lane, path, time, "1"),
            Self::Connect32 => connect(field, lane, path, time, "32"),
            Self::RequestBesideBulk => beside_bulk(field, lane, path, time),
        }
    }
}

fn bulk(field: &Field, lane: Lane, path: Path, time: Duration, args: &[&str]) -> Result<Reading> {
    let Report::Bulk { bytes, gbit_per_s, .. } = field.load(lane, path, "bulk", time, args)? else {
        bail!("not a report of bulk load");
    };
    Ok(Reading {
        value: gbit_per_s,
        latency: None,
        beside_other_pod: None,
        amount: bytes,
        spent: None,
    })
}

fn request(field: &Field, lane: Lane, path: Path, time: Duration, connections: &str) -> Result<Reading> {
    let Report::Request(rate) = field.load(lane, path, "request", time, &["--connections", connections])? else {
        bail!("not a report of requests");
    };
    Ok(reading(&rate))
}

fn connect(field: &Field, lane: Lane, path: Path, time: Duration, workers: &str) -> Result<Reading> {
    let Report::Connect(ConnectRate {
        rate,
        errors,
        first_error,
        ..
    }) = field.load(lane, path, "connect", time, &["--workers", workers])?
    else {
        bail!("not a report of connects");
    };
    ensure!(
        errors == 0,
        "{errors} connections failed: {}",
        first_error.unwrap_or_default()
    );
    Ok(reading(&rate))
}

fn reading(rate: &Rate) -> Reading {
    let Rate {
        operations,
        per_second,
        latency,
        ..
    } = *rate;
    Reading {
        value: per_second,
        latency: Some(latency),
        beside_other_pod: None,
        amount: operations,
        spent: None,
    }
}

/// Requests from the pod that also sends in bulk, and from another pod at the same time of that load.
fn beside_bulk(field: &Field, lane: Lane, path: Path, time: Duration) -> Result<Reading> {
    /// The load outlasts both measurements and the start of their processes, and is ended after them.
    const MARGIN: Duration = Duration::from_secs(60);
    let half = time.mul_f64(0.7);
    let mut load = field.start_bulk(lane, path, 2 * half + MARGIN)?;
    let rate = |report: Report| {
        let Report::Request(rate) = report else {
            bail!("not a report of requests")
        };
        Ok(rate)
    };
    let own = rate(field.load(lane, path, "request", half, &["--connections", "1"])?)?;
    let other = rate(field.load_from_other_pod(lane, path, "request", half, &["--connections", "1"])?)?;
    ensure!(load.is_running(), "the bulk load ended before the requests did");
    load.kill().context("the bulk load beside the requests")?;
    Ok(Reading {
        value: own.latency.p50_us,
        latency: Some(own.latency),
        beside_other_pod: Some(other.latency.p50_us),
        amount: own.operations,
        spent: None,
    })
}
