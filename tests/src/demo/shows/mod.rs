//! What the demo claims, one function per claim or group of claims. Each looks, and says what it saw.

pub mod failure;
pub mod identity;
pub mod mesh;
pub mod policy;
pub mod traffic;
pub mod wire;
