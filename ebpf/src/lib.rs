//! What the kernel programs have in common: reading contexts, calling helpers, the maps. The decisions are not here but
//! in `warren-common`.

#![cfg(target_arch = "bpf")]
#![no_std]
#![feature(asm_experimental_arch)]

pub mod context;
pub mod helpers;
pub mod maps;
