//! The admin, metrics and readiness ports of the daemon.
