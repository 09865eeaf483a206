//! Kubernetes objects as the source of desired state.
