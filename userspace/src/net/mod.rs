//! Sockets in a pod's network namespace.
