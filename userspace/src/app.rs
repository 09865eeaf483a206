//! The wiring: builds the parts of a role from its configuration and joins them by values.
