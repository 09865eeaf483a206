//! bpf-linker, which turns LLVM bitcode of the kernel programs into an ELF object that the kernel takes.

use std::process::Command;

use anyhow::{Context, Result};

use crate::{run, tree};

/// It uses rustc's own LLVM, so its version follows the toolchain's.
const VERSION: &str = "0.10.2";
const SERIES: &str = "0.10.";

/// Installs it into `target/tools`, unless a suitable one is there. One of another version elsewhere is left alone.
pub(crate) fn install() -> Result<()> {
    if is_suitable() {
        return Ok(());
    }
    let root = tree::tools();
    run::step(&format!("building bpf-linker {VERSION} into target/tools (two minutes, once)"), || {
        run::run(
            tree::cargo()
                .args(["install", "--quiet", "--locked", "bpf-linker", "--version", VERSION, "--root"])
                .arg(&root)
                .env_remove("CARGO_TARGET_DIR"),
        )
    })
    .with_context(|| {
        format!(
            "bpf-linker is missing; to install it by hand: cargo install --locked bpf-linker --version {VERSION} --root {}",
            root.display()
        )
    })
}

fn is_suitable() -> bool {
    let Some(path) = tree::find("bpf-linker") else {
        return false;
    };
    run::read(Command::new(path).arg("--version")).is_ok_and(|printed| is_of_series(&printed))
}

fn is_of_series(printed: &str) -> bool {
    printed
        .split_whitespace()
        .nth(1)
        .is_some_and(|version| version.starts_with(SERIES))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_linker_for_another_llvm_is_not_taken() {
        assert!(is_of_series("bpf-linker 0.10.2\n"));
        assert!(!is_of_series("bpf-linker 0.11.0\n"));
        assert!(!is_of_series(""));
    }
}
