//! Lets the types of `warren-common` cross to the kernel.

#![allow(unsafe_code, reason = "aya::Pod is an unsafe trait")]

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A value as a map holds it.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub(super) struct Shared<T>(pub(super) T);

// SAFETY: `IntoBytes` proves that T has no padding, `FromBytes` that any bytes are a T; the wrapper is transparent.
unsafe impl<T: Copy + FromBytes + IntoBytes + Immutable + 'static> aya::Pod for Shared<T> {}
