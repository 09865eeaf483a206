//! The kernel programs: built for the kernel's own target with the pinned stable toolchain, and checked there.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::image::Architecture;
use crate::{run, tree};

const TARGET: &str = "bpfel-unknown-none";
const PROFILE: &str = "ebpf";
/// The ELF objects: one with everything that steers, one with the listener search, which is loaded once per pod.
const OBJECTS: [&str; 2] = ["steer", "arrive"];

/// Builds `target/bpf/{steer,arrive}.o` for this machine.
pub(crate) fn build() -> Result<()> {
    build_into(
        &tree::root().join("target/bpf"),
        &tree::host_triple()?,
        "target/bpf-build",
    )
}

/// Builds the programs for another processor, whose registers lie elsewhere; returns their folder.
pub(crate) fn build_for(other: Architecture) -> Result<PathBuf> {
    let folder = tree::root().join("target").join(format!("bpf-{}", other.rust));
    build_into(&folder, &other.triple(), &format!("target/bpf-build-{}", other.rust))?;
    Ok(folder)
}

fn build_into(wanted: &Path, triple: &str, build: &str) -> Result<()> {
    run::run(cargo("build", triple, build).arg("--quiet")).context("cannot build the kernel programs")?;
    let built = tree::root().join(build).join(TARGET).join(PROFILE);
    std::fs::create_dir_all(wanted).with_context(|| format!("cannot make {}", wanted.display()))?;
    for object in OBJECTS {
        replace_if_changed(&built.join(object), &wanted.join(format!("{object}.o")))?;
    }
    Ok(())
}

/// Clippy as the bpf target sees the code: for the host the programs are empty stubs.
pub(crate) fn lint() -> Result<()> {
    run::run(cargo("clippy", &tree::host_triple()?, "target/bpf-build").args(["--quiet", "--", "-D", "warnings"]))
}

fn cargo(task: &str, triple: &str, build: &str) -> Command {
    // `-Z build-std` is the one thing we need that stable does not offer by itself.
    let mut command = tree::cargo();
    command
        .args([
            task,
            "--package",
            "warren-ebpf",
            "--target",
            TARGET,
            "-Z",
            "build-std=core",
            "--profile",
            PROFILE,
        ])
        .args(["--target-dir", build])
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags(triple))
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_BUILD_TARGET");
    command
}

/// The flags that give a loadable object, in cargo's own encoding.
fn rustflags(triple: &str) -> String {
    let architecture = triple.split('-').next().unwrap_or_default();
    [
        format!("--cfg=bpf_target_arch=\"{architecture}\""),
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
    ]
    .join("\u{1f}")
}

/// Copies only what differs: a new modification time alone would rebuild the whole of userspace.
fn replace_if_changed(from: &Path, to: &Path) -> Result<()> {
    let new = std::fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    if std::fs::read(to).is_ok_and(|old| old == new) {
        return Ok(());
    }
    // Renamed into place, so that no build that runs beside us reads half an object.
    let half = to.with_extension("o.new");
    std::fs::write(&half, new).with_context(|| format!("cannot write {}", half.display()))?;
    std::fs::rename(&half, to).with_context(|| format!("cannot write {}", to.display()))?;
    run::say(&format!(
        "{} is new",
        to.strip_prefix(tree::root()).unwrap_or(to).display()
    ));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_programs_know_the_processor_they_are_built_for() {
        assert!(rustflags("aarch64-unknown-linux-gnu").starts_with("--cfg=bpf_target_arch=\"aarch64\"\u{1f}"));
    }

    #[test]
    fn an_object_that_did_not_change_keeps_its_time() {
        let folder = std::env::temp_dir().join(format!("warren-xtask-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("temporary folder");
        let (from, to) = (folder.join("steer"), folder.join("steer.o"));
        std::fs::write(&from, b"object").expect("write");
        replace_if_changed(&from, &to).expect("first copy");
        let time = || {
            to.metadata()
                .and_then(|meta| meta.modified())
                .expect("modification time")
        };
        let first = time();
        replace_if_changed(&from, &to).expect("second copy");
        assert_eq!(first, time());
        std::fs::write(&from, b"another").expect("write");
        replace_if_changed(&from, &to).expect("third copy");
        assert_eq!(std::fs::read(&to).expect("read"), b"another");
        std::fs::remove_dir_all(&folder).expect("clean up");
    }
}
