//! Cluster-wide duties: the certificate authority as a service.
