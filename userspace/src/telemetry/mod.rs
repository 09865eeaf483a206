//! What happened: metrics and the access log.
