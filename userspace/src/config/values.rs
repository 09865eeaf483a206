//! The texts that flags take, and what is wrong with the others.

use crate::{mesh::TrustDomain, mesh::identity::IdentityError, telemetry::logging};
use ipnet::IpNet;
use std::{error::Error, fmt, net::IpAddr, time::Duration};

/// A flag's text that is not what the flag takes.
#[derive(Debug, thiserror::Error)]
pub enum ValueError {
    #[error("a time is a number with ms, s, m, h or d, such as 30s, 24h or 1h30m")]
    Duration,
    #[error("the time is too long")]
    DurationTooLong,
    #[error("a range is an address and a length, such as 10.244.0.0/16 or fd00::/48")]
    Range,
    #[error("the range has bits after its length; {0} is meant?")]
    RangeHostBits(IpNet),
    #[error("the range is all addresses there are")]
    RangeEverything,
    #[error("it is neither a DNS name nor an IP address")]
    Name,
    #[error("a node name is 1 to 253 bytes of a-z, 0-9, '-' and '.'")]
    NodeName,
    #[error("it must be a whole number from 1 to 16777216")]
    Count,
    #[error("it is no trust domain: {0}")]
    TrustDomain(IdentityError),
    #[error("use error, warn, info, debug, trace or off, or module=level,module=level")]
    LogLevel,
}

/// `30s`, `24h`, `1h30m`, `250ms`; a bare `0` as well.
pub(super) fn duration(text: &str) -> Result<Duration, ValueError> {
    let mut total = Duration::ZERO;
    let mut rest = text.trim();
    if rest == "0" {
        return Ok(total);
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or(ValueError::Duration)?;
        let (number, tail) = rest.split_at(digits);
        if number.is_empty() {
            return Err(ValueError::Duration);
        }
        let number: u64 = number.parse().map_err(|_| ValueError::DurationTooLong)?;
        let unit = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit);
        let milliseconds = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(ValueError::Duration),
        };
        let part = number
            .checked_mul(milliseconds)
            .map(Duration::from_millis)
            .ok_or(ValueError::DurationTooLong)?;
        total += part;
        rest = tail;
    }
    match total {
        Duration::ZERO if text.trim().is_empty() => Err(ValueError::Duration),
        // Timers take no more, and nobody means it.
        long if long > Duration::from_hours(24 * 3650) => Err(ValueError::DurationTooLong),
        total => Ok(total),
    }
}

/// A time as a flag takes it.
pub(super) fn shown(duration: Duration) -> impl fmt::Display {
    fmt::from_fn(move |f| {
        if duration.is_zero() {
            return f.write_str("0");
        }
        let mut left = duration.as_millis();
        for (unit, milliseconds) in [("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)] {
            let count = left / milliseconds;
            left %= milliseconds;
            if count > 0 {
                write!(f, "{count}{unit}")?;
            }
        }
        Ok(())
    })
}

pub(super) fn cluster_range(text: &str) -> Result<IpNet, ValueError> {
    let range: IpNet = text.trim().parse().map_err(|_| ValueError::Range)?;
    if range.prefix_len() == 0 {
        return Err(ValueError::RangeEverything);
    }
    if range.trunc() != range {
        return Err(ValueError::RangeHostBits(range.trunc()));
    }
    Ok(range)
}

pub(super) fn trust_domain(text: &str) -> Result<TrustDomain, ValueError> {
    TrustDomain::new(text).map_err(ValueError::TrustDomain)
}

pub(super) fn node_name(text: &str) -> Result<String, ValueError> {
    is_dns_name(text).then(|| text.to_owned()).ok_or(ValueError::NodeName)
}

pub(super) fn san(text: &str) -> Result<String, ValueError> {
    let valid = text.parse::<IpAddr>().is_ok() || is_dns_name(text);
    valid.then(|| text.to_owned()).ok_or(ValueError::Name)
}

/// Room in a map of the kernel, or connections: at least one, and no more than memory can hold.
pub(super) fn count(text: &str) -> Result<u32, ValueError> {
    text.parse()
        .ok()
        .filter(|n| (1..=1 << 24).contains(n))
        .ok_or(ValueError::Count)
}

pub(super) fn log_filter(text: &str) -> Result<String, Box<dyn Error + Send + Sync>> {
    logging::check(text).map_err(|_| ValueError::LogLevel)?;
    // EnvFilter takes a bare word for a module; here it can only be a level that was mistyped.
    let known = |part: &str| part.contains('=') || part.contains('[') || is_level(part.trim());
    if !text.split(',').all(known) {
        return Err(ValueError::LogLevel.into());
    }
    Ok(text.to_owned())
}

fn is_level(text: &str) -> bool {
    ["error", "warn", "info", "debug", "trace", "off"]
        .iter()
        .any(|level| level.eq_ignore_ascii_case(text))
}

fn is_dns_name(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(is_dns_label)
}

/// 1 to 63 bytes of `[a-z0-9-]`, with no `-` at either end.
pub(super) fn is_dns_label(text: &str) -> bool {
    let valid = |c: char| matches!(c, 'a'..='z' | '0'..='9' | '-');
    (1..=63).contains(&text.len()) && text.chars().all(valid) && !text.starts_with('-') && !text.ends_with('-')
}
