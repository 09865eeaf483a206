//! The programs that xtask builds and starts: the release binary, the demo, the benchmark.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result};

use crate::image::{self, Architecture};
use crate::{cluster, ebpf, run, setup, tree};

/// `target/release/warren`, with the kernel programs inside: a static binary, which runs on any Linux of this
/// architecture.
pub(crate) fn build() -> Result<()> {
    setup::for_building()?;
    build_release(&["warren"])?;
    run::print(&format!("{}\n", tree::target().join("release/warren").display()));
    Ok(())
}

/// The release binary for an architecture, by its path. For another one than the host's, the cross toolchain is there.
pub(crate) fn build_static(architecture: Architecture) -> Result<PathBuf> {
    let triple = architecture.triple();
    if triple == tree::host_triple()? {
        build_release(&["warren"])?;
    } else {
        let mut command = release(&triple);
        run::step("building the kernel programs", || {
            command.env("WARREN_BPF_DIR", ebpf::build_for(architecture)?);
            Ok(())
        })?;
        let compiler = image::cross_tool(architecture, "gcc");
        let variable = triple.replace('-', "_");
        command
            .env(format!("CARGO_TARGET_{}_LINKER", variable.to_uppercase()), &compiler)
            .env(format!("CC_{variable}"), &compiler)
            .env(format!("AR_{variable}"), image::cross_tool(architecture, "ar"))
            // Kernels of arm64 have pages of 4, 16 or 64 KiB; jemalloc runs where they are at most as large as this.
            .env("JEMALLOC_SYS_WITH_LG_PAGE", "16")
            .args(["--package", "warren"]);
        run::step(&format!("building Warren for {triple}"), || run::run(&mut command))?;
    }
    Ok(tree::target().join(triple).join("release/warren"))
}

/// Two nodes and four pods on this machine.
pub(crate) fn demo(arguments: &[String]) -> Result<ExitCode> {
    setup::for_demo()?;
    build_release(&["warren", "demo", "load"])?;
    let reason = "the demo makes network namespaces and loads kernel programs";
    Err(run::become_program(privileged("demo", arguments, reason)?))
}

/// The programs that tests start, as they are released, by their folder.
pub(crate) fn build_for_tests() -> Result<PathBuf> {
    build_release(&["warren", "load"])?;
    release_folder()
}

/// The mesh measured beside plain connections, or one daemon beside a large cluster.
pub(crate) fn bench(arguments: &[String]) -> Result<ExitCode> {
    if let Some(("scale", rest)) = arguments.split_first().map(|(first, rest)| (first.as_str(), rest)) {
        return scale(rest);
    }
    setup::for_bench()?;
    build_release(&["warren", "bench", "floor", "load"])?;
    let reason = "the benchmark makes network namespaces and loads kernel programs";
    Err(run::become_program(privileged("bench", arguments, reason)?))
}

fn scale(arguments: &[String]) -> Result<ExitCode> {
    setup::for_building()?;
    build_release(&["warren", "scale"])?;
    let built = release_folder()?;
    let mut command = cluster::beside_api_server(&built.join("scale"), &environment(&built))?;
    command.args(arguments.iter().filter(|argument| *argument != "--"));
    Err(run::become_program(command))
}

/// Builds for release, and leaves the binary where one looks for it: cargo has a folder of its own for a named target.
///
/// Always the same packages, whichever of their binaries are wanted: by the packages cargo chooses the features of every
/// dependency, and would build them all again for another choice.
fn build_release(binaries: &[&str]) -> Result<()> {
    run::step("building the kernel programs", ebpf::build)?;
    let triple = tree::host_triple()?;
    let mut command = release(&triple);
    command.args(["--package", "warren", "--package", "warren-tests"]);
    command.args(binaries.iter().flat_map(|binary| ["--bin", binary]));
    run::step("building Warren for release", || run::run(&mut command))?;
    let (built, wanted) = (release_folder()?.join("warren"), tree::target().join("release"));
    let (half, wanted_file) = (wanted.join("warren.new"), wanted.join("warren"));
    std::fs::create_dir_all(&wanted).with_context(|| format!("cannot make {}", wanted.display()))?;
    // Renamed into place: the file there may be running.
    std::fs::copy(&built, &half)
        .and_then(|_| std::fs::rename(&half, &wanted_file))
        .with_context(|| format!("cannot copy {} to {}", built.display(), wanted_file.display()))
}

/// Where a release for this machine is built.
fn release_folder() -> Result<PathBuf> {
    Ok(tree::target().join(tree::host_triple()?).join("release"))
}

/// `cargo build --release`, linked statically. The target is named even where it is the host's: only so do the flags
/// leave alone what cargo runs while it builds, which must be able to load libraries.
fn release(triple: &str) -> Command {
    let mut command = tree::cargo();
    command
        .args(["build", "--release", "--target", triple])
        .env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static")
        .env_remove("RUSTFLAGS");
    command
}

fn privileged(binary: &str, arguments: &[String], reason: &str) -> Result<Command> {
    let built = release_folder()?;
    let mut command = run::as_root(&built.join(binary).to_string_lossy(), &environment(&built), reason)?;
    command
        .args(arguments.iter().filter(|argument| *argument != "--"))
        .current_dir(tree::root());
    Ok(command)
}

/// What the harness must know: where the binary under test is, where the tree is, where system commands are.
pub(crate) fn environment(built: &Path) -> [(&'static str, String); 3] {
    [
        ("WARREN_BIN", built.join("warren").to_string_lossy().into_owned()),
        ("WARREN_ROOT", tree::root().to_string_lossy().into_owned()),
        ("PATH", tree::path_with_tools().to_string_lossy().into_owned()),
    ]
}
