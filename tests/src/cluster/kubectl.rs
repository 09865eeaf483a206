//! kubectl, as the tests use it.

use crate::wait::wait_until_ok;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::{
    ffi::OsStr,
    io::Write,
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

/// kubectl with the rights of the cluster's admin.
#[derive(Debug, Clone)]
pub struct Kubectl {
    program: PathBuf,
    kubeconfig: PathBuf,
}

impl Kubectl {
    pub(super) fn new(program: PathBuf, kubeconfig: PathBuf) -> Self {
        Self { program, kubeconfig }
    }

    /// A command to add words to.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.env("KUBECONFIG", &self.kubeconfig).stdin(Stdio::null());
        command
    }

    /// What it prints.
    ///
    /// # Errors
    /// It failed; its words are the reason.
    pub fn run<W: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = W>) -> Result<String> {
        output(self.command().args(words))
    }

    /// An object or a list as JSON.
    ///
    /// # Errors
    /// It failed, or printed no JSON.
    pub fn json(&self, words: &[&str]) -> Result<Value> {
        let text = self.run(words.iter().chain(&["-o", "json"]))?;
        serde_json::from_str(&text).with_context(|| format!("no JSON from kubectl {words:?}"))
    }

    /// Applies manifests, of whatever kinds.
    ///
    /// # Errors
    /// The API server refused one of them.
    pub fn apply(&self, manifests: &str) -> Result<()> {
        let mut command = self.command();
        command
            .args(["apply", "--server-side", "--force-conflicts", "-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn().context("cannot start kubectl")?;
        child
            .stdin
            .take()
            .context("kubectl has no standard input")?
            .write_all(manifests.as_bytes())?;
        let ended = child.wait_with_output()?;
        if !ended.status.success() {
            bail!("kubectl apply: {}", String::from_utf8_lossy(&ended.stderr).trim());
        }
        Ok(())
    }

    /// Tries until it succeeds and `wanted` holds for what it prints.
    ///
    /// # Errors
    /// It did not in time: the last reason, or the last words.
    pub fn until(&self, deadline: Duration, words: &[&str], wanted: impl Fn(&str) -> bool) -> Result<String> {
        wait_until_ok(&format!("kubectl {words:?} says so"), deadline, || {
            let said = self.run(words)?;
            anyhow::ensure!(wanted(&said), "it said {said:?}");
            Ok(said)
        })
    }
}

/// The standard output of a command that must succeed.
pub(super) fn output(command: &mut Command) -> Result<String> {
    let ended = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {:?}", command.get_program()))?;
    if !ended.status.success() {
        let words: Vec<_> = command.get_args().map(OsStr::to_string_lossy).collect();
        bail!("{}: {}", words.join(" "), String::from_utf8_lossy(&ended.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&ended.stdout).into_owned())
}
