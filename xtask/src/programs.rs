//! The programs that xtask builds and starts: the release binary, the demo, the benchmark.

use std::process::{Command, ExitCode};

use anyhow::Result;

use crate::{ebpf, run, setup, tree};

/// `target/release/warren`, with the kernel programs inside.
pub(crate) fn build() -> Result<()> {
    setup::for_building()?;
    build_release(&["--package", "warren"])?;
    run::print(&format!("{}\n", tree::target().join("release/warren").display()));
    Ok(())
}

/// Two nodes and four pods on this machine.
pub(crate) fn demo(arguments: &[String]) -> Result<ExitCode> {
    setup::for_demo()?;
    build_release(&[
        "--package",
        "warren",
        "--package",
        "warren-tests",
        "--bin",
        "warren",
        "--bin",
        "demo",
        "--bin",
        "load",
    ])?;
    let reason = "the demo makes network namespaces and loads kernel programs";
    Err(run::become_program(privileged("demo", arguments, reason)?))
}

/// The mesh measured beside plain connections.
pub(crate) fn bench(arguments: &[String]) -> Result<ExitCode> {
    setup::for_bench()?;
    build_release(&["--package", "warren", "--package", "warren-tests", "--bins"])?;
    let reason = "the benchmark makes network namespaces and loads kernel programs";
    Err(run::become_program(privileged("bench", arguments, reason)?))
}

fn build_release(what: &[&str]) -> Result<()> {
    run::step("building the kernel programs", ebpf::build)?;
    run::step("building Warren for release", || {
        run::run(tree::cargo().args(["build", "--release"]).args(what))
    })
}

fn privileged(binary: &str, arguments: &[String], reason: &str) -> Result<Command> {
    let built = tree::target().join("release");
    let mut command = run::as_root(&built.join(binary).to_string_lossy(), &environment("release"), reason)?;
    command
        .args(arguments.iter().filter(|argument| *argument != "--"))
        .current_dir(tree::root());
    Ok(command)
}

/// What the harness must know: where the binary under test is, where the tree is, where system commands are.
pub(crate) fn environment(profile: &str) -> [(&'static str, String); 3] {
    [
        (
            "WARREN_BIN",
            tree::target()
                .join(profile)
                .join("warren")
                .to_string_lossy()
                .into_owned(),
        ),
        ("WARREN_ROOT", tree::root().to_string_lossy().into_owned()),
        ("PATH", tree::path_with_tools().to_string_lossy().into_owned()),
    ]
}
