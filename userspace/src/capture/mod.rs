//! Keeps the kernel in agreement with the pods that should be captured.
