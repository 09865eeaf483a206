//! Cubic as the congestion control of a world's namespaces, whatever the machine prefers: under BBR, plain TCP between two
//! namespaces measures BBR. The machine's own setting is touched for a moment only.

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};

use crate::netns::Namespace;

const ALLOWED: &str = "/proc/sys/net/ipv4/tcp_allowed_congestion_control";

/// Sets cubic in each of the namespaces. A namespace takes only what the machine allows to everyone, so cubic is allowed
/// while this runs and no longer: the namespaces keep it. A lock keeps several worlds from undoing each other's moment.
pub fn use_cubic(namespaces: &[&Namespace], run_directory: &Path) -> Result<()> {
    let file = File::create(run_directory.join("congestion.lock")).context("create the lock for cubic")?;
    let lock = Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .context("lock for cubic")?;
    let before = fs::read_to_string(ALLOWED).with_context(|| format!("read {ALLOWED}"))?;
    let add = !before.split_whitespace().any(|name| name == "cubic");
    if add {
        fs::write(ALLOWED, format!("{} cubic", before.trim())).context("allow the congestion control cubic")?;
    }
    let result = namespaces
        .iter()
        .try_for_each(|one| one.sysctls(&[("ipv4/tcp_congestion_control", "cubic")]));
    if add {
        fs::write(ALLOWED, before.trim()).with_context(|| format!("restore {ALLOWED}"))?;
    }
    drop(lock);
    result
}
