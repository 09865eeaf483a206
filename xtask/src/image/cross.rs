//! What it takes to build for a processor that is not this machine's: a C compiler with a C library to link statically,
//! and Rust's own library. Told all at once, with the command that brings each.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use super::Architecture;
use crate::{run, tree};

/// What this machine has for one other architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Found {
    compiler: bool,
    /// The C library, in the form that static programs are linked with.
    libc: bool,
    rust: bool,
}

/// A tool of the cross toolchain, as Debian names it.
pub(crate) fn tool(architecture: Architecture, tool: &str) -> String {
    format!("{}-linux-gnu-{tool}", architecture.rust)
}

/// Nothing is missing to build for `other`.
///
/// # Errors
/// Names everything that is missing, and what installs it.
pub(super) fn check(other: Architecture) -> Result<()> {
    let lacks = lacks(other, found(other)?);
    if !lacks.is_empty() {
        bail!("no image for {}: {}", other.image, lacks.join("; "));
    }
    Ok(())
}

/// A tool that the cross compiler's package brings along is missing.
pub(super) fn missing_tool(architecture: Architecture, name: &str) -> String {
    format!(
        "there is no {} ({})",
        tool(architecture, name),
        compiler_package(architecture)
    )
}

fn found(other: Architecture) -> Result<Found> {
    let compiler = tree::find(&tool(other, "gcc"));
    let libc = match &compiler {
        // The compiler answers with a path where it has the file, else with the name it was asked for.
        Some(compiler) => {
            let answer = run::read(Command::new(compiler).arg("-print-file-name=libc.a"))?;
            Path::new(answer.trim()).is_absolute()
        }
        None => false,
    };
    Ok(Found {
        compiler: compiler.is_some(),
        libc,
        rust: tree::sysroot()?.join("lib/rustlib").join(other.triple()).is_dir(),
    })
}

fn lacks(other: Architecture, found: Found) -> Vec<String> {
    let triple = other.triple();
    let library = format!(
        "there is no static C library for it (apt-get install libc6-dev-{}-cross)",
        other.image
    );
    let candidates = [
        (found.compiler, missing_tool(other, "gcc")),
        (found.libc, library),
        (
            found.rust,
            format!("there is no Rust library for it (rustup target add {triple})"),
        ),
    ];
    let missing = candidates.into_iter().filter(|(there, _)| !there);
    missing.map(|(_, lack)| lack).collect()
}

/// Debian writes the processor's name with a hyphen.
fn compiler_package(architecture: Architecture) -> String {
    format!("apt-get install gcc-{}-linux-gnu", architecture.rust.replace('_', "-"))
}

#[cfg(test)]
mod tests {
    use super::super::ARCHITECTURES;
    use super::*;

    const NOTHING: Found = Found {
        compiler: false,
        libc: false,
        rust: false,
    };
    const ALL: Found = Found {
        compiler: true,
        libc: true,
        rust: true,
    };

    #[test]
    fn everything_that_is_missing_is_named_at_once_with_what_installs_it() {
        let [amd64, arm64] = ARCHITECTURES;
        assert_eq!(
            lacks(arm64, NOTHING),
            [
                "there is no aarch64-linux-gnu-gcc (apt-get install gcc-aarch64-linux-gnu)",
                "there is no static C library for it (apt-get install libc6-dev-arm64-cross)",
                "there is no Rust library for it (rustup target add aarch64-unknown-linux-gnu)",
            ]
        );
        assert!(lacks(amd64, NOTHING)[0].ends_with("(apt-get install gcc-x86-64-linux-gnu)"));
    }

    #[test]
    fn what_is_there_is_not_asked_for() {
        let [_, arm64] = ARCHITECTURES;
        assert_eq!(lacks(arm64, ALL), Vec::<String>::new());
        let without_rust = lacks(arm64, Found { rust: false, ..ALL });
        assert!(
            matches!(&without_rust[..], [only] if only.contains("rustup target add")),
            "{without_rust:?}"
        );
        let without_libc = lacks(arm64, Found { libc: false, ..ALL });
        assert!(
            matches!(&without_libc[..], [only] if only.contains("libc6-dev-arm64-cross")),
            "{without_libc:?}"
        );
    }
}
