//! Ownership of tasks: who is still running, how to ask them to end, and how long to wait.
