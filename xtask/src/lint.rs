//! `cargo xtask lint`: everything that can be said about the code without running it.

use anyhow::Result;

use crate::{ebpf, licences, manifests, run, setup, tree};

type Check = fn() -> Result<()>;

/// Runs every check, also after one has failed, so that one run shows all there is to mend.
pub(crate) fn run() -> Result<()> {
    setup::for_building()?;
    // Userspace embeds the kernel programs: without them it does not compile.
    run::step("building the kernel programs", ebpf::build)?;
    let checks: [(&str, Check); 7] = [
        ("format", format),
        ("clippy for the host", clippy),
        ("clippy for the bpf target", ebpf::lint),
        ("import walls, and the names in ARCHITECTURE.md", structure),
        ("manifests, as the Helm charts give them", manifests::check),
        ("licences", licences::check),
        ("advisories", advisories),
    ];
    let mut failed = Vec::new();
    for (name, check) in checks {
        if let Err(error) = run::step(name, check) {
            run::say(&format!("✗ {error:#}"));
            failed.push(name);
        }
    }
    anyhow::ensure!(failed.is_empty(), "lint: not in order: {}", failed.join(", "));
    run::say("lint: all in order");
    Ok(())
}

fn format() -> Result<()> {
    run::run(tree::cargo().args(["fmt", "--all", "--check"]))
}

/// What ships, then the tests as well: they name the outcome that they want, and any other fails them.
fn clippy() -> Result<()> {
    let strict = ["-D", "warnings"];
    let of_tests = ["-A", "clippy::wildcard_enum_match_arm"];
    run::run(clippy_of(&[]).args(strict))?;
    run::run(clippy_of(&["--all-targets"]).args(strict).args(of_tests))
}

fn clippy_of(targets: &[&str]) -> std::process::Command {
    let mut clippy = tree::cargo();
    clippy
        .args(["clippy", "--quiet", "--workspace"])
        .args(targets)
        .arg("--");
    clippy
}

fn structure() -> Result<()> {
    run::run(tree::cargo().args([
        "test",
        "--quiet",
        "--package",
        "warren-tests",
        "--test",
        "imports",
        "--test",
        "architecture",
    ]))
}

fn advisories() -> Result<()> {
    if tree::find("cargo-deny").is_none() {
        run::say("skipped: advisories need cargo-deny and its database (`cargo install --locked cargo-deny`)");
        return Ok(());
    }
    run::run(tree::cargo().args(["deny", "check", "advisories", "bans", "sources"]))
}
