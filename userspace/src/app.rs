//! The wiring: builds the parts of a role from its configuration and joins them by values.

use crate::config::{ControllerConfig, NodeConfig};

/// Runs a node's daemon until it is told to end.
///
/// # Errors
/// It cannot start, or cannot go on.
pub async fn run_node(_config: NodeConfig) -> anyhow::Result<()> {
    anyhow::bail!("not wired yet")
}

/// Runs the certificate authority until it is told to end.
///
/// # Errors
/// It cannot start, or cannot go on.
pub async fn run_controller(_config: ControllerConfig) -> anyhow::Result<()> {
    anyhow::bail!("not wired yet")
}
