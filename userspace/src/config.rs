//! What a role is told at start: flags and their limits.
