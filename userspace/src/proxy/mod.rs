//! Connections at L4: outbound, inbound, plaintext, and the relay between two sockets.
