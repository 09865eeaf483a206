//! The wire: HTTP/2 CONNECT over mutual TLS, both ends, and the pool of connections.
