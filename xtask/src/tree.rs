//! Where things lie in this workspace, and on this machine for this toolchain.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// The folder that holds the workspace's `Cargo.toml`.
pub(crate) fn root() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().map_or_else(|| xtask.to_path_buf(), Path::to_path_buf)
}

/// The version of everything in the workspace.
pub(crate) fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// Where cargo puts what it builds for the host.
pub(crate) fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => root().join(folder),
        None => root().join("target"),
    }
}

/// What cannot be had from cargo's own folders: downloaded packages, bpf-linker.
pub(crate) fn tools() -> PathBuf {
    root().join("target/tools")
}

/// What outlives a checkout: `WARREN_CACHE`, else `~/.cache/warren`.
pub(crate) fn cache() -> Option<PathBuf> {
    let below = |variable: &str, folder: &str| std::env::var_os(variable).map(|home| PathBuf::from(home).join(folder));
    below("WARREN_CACHE", "")
        .or_else(|| below("XDG_CACHE_HOME", "warren"))
        .or_else(|| below("HOME", ".cache/warren"))
}

/// The cargo that runs this task.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root()).env("PATH", path_with_tools());
    command
}

/// `PATH` with our own tools first and the administrator's folders last: an ordinary user's PATH lacks `/usr/sbin`,
/// where Debian keeps `ip`, `nft` and the servers.
pub(crate) fn path_with_tools() -> std::ffi::OsString {
    let mut folders = vec![tools().join("bin")];
    if let Some(path) = std::env::var_os("PATH") {
        folders.extend(std::env::split_paths(&path));
    }
    folders.extend(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from));
    std::env::join_paths(folders).unwrap_or_default()
}

/// Where `command` is, if it is installed.
pub(crate) fn find(command: &str) -> Option<PathBuf> {
    std::env::split_paths(&path_with_tools())
        .map(|folder| folder.join(command))
        .find(|path| is_executable(path))
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata()
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// rustc's own folder, where the source of `core` must lie.
pub(crate) fn sysroot() -> Result<PathBuf> {
    rustc(&["--print", "sysroot"]).map(PathBuf::from)
}

/// rustc's version number, such as `1.95.0`.
pub(crate) fn rustc_version() -> Result<String> {
    let line = rustc(&["--version"])?;
    let number = line
        .split_whitespace()
        .nth(1)
        .with_context(|| format!("rustc calls itself {line:?}"))?;
    Ok(number.to_owned())
}

/// The triple of this machine, such as `x86_64-unknown-linux-gnu`.
pub(crate) fn host_triple() -> Result<String> {
    let lines = rustc(&["-vV"])?;
    let host = lines.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host
        .with_context(|| format!("rustc names no host in {lines:?}"))?
        .to_owned())
}

fn rustc(arguments: &[&str]) -> Result<String> {
    let output = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
        .args(arguments)
        .current_dir(root())
        .output()
        .context("cannot run rustc; install Rust as https://rustup.rs says")?;
    if !output.status.success() {
        bail!(
            "rustc {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
