//! Network namespaces under `/run/netns`: made and deleted through `ip -batch`, entered by setns. Knows nothing of pods.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, setns};

/// A named network namespace. A handle only: dropping it deletes nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    pub fn named(name: impl Into<String>) -> Self {
        Self { name: name.into() }
    }

    /// The one that a process is in.
    pub fn of_process(pid: u32) -> Self {
        // An absolute path takes the place of the folder that names are looked up in.
        Self::named(format!("/proc/{pid}/ns/net"))
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where the kernel keeps it: what goes into the annotation `warren.mesh/netns`.
    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    pub fn open(&self) -> Result<File> {
        File::open(self.path()).with_context(|| format!("open network namespace {}", self.name))
    }

    /// Runs `work` on a thread of its own that has entered the namespace, and gives back what it returns.
    /// Sockets opened inside stay in the namespace; the cgroup stays the caller's, so steering by cgroup does not see them.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let file = self.open()?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                setns(&file, CloneFlags::CLONE_NEWNET).context("setns")?;
                work()
            });
            match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Writes sysctls of this namespace, by their paths below `/proc/sys/net` (`ipv4/ip_forward`).
    pub fn sysctls(&self, settings: &[(&str, &str)]) -> Result<()> {
        self.run(|| {
            for (key, value) in settings {
                let path = Path::new("/proc/sys/net").join(key);
                std::fs::write(&path, value).with_context(|| format!("set {} to {value}", path.display()))?;
            }
            Ok(())
        })
    }

    /// Runs `ip -batch` inside the namespace.
    pub fn ip(&self, lines: &[String]) -> Result<()> {
        ip_batch(&["-n", &self.name], lines).with_context(|| format!("in network namespace {}", self.name))
    }
}

/// Makes the namespaces, with `lo` up. Those that exist already are deleted first.
pub fn create(names: &[&str]) -> Result<()> {
    delete(names)?;
    ip_batch(
        &[],
        &names.iter().map(|name| format!("netns add {name}")).collect::<Vec<_>>(),
    )
}

/// Deletes those of the namespaces that exist.
pub fn delete(names: &[&str]) -> Result<()> {
    let present: Vec<String> = names
        .iter()
        .filter(|name| Namespace::named(**name).path().exists())
        .map(|name| format!("netns del {name}"))
        .collect();
    if present.is_empty() {
        Ok(())
    } else {
        ip_batch(&["-force"], &present)
    }
}

/// Runs `ip OPTIONS -batch -` with the lines; an error carries what `ip` said.
pub fn ip_batch(options: &[&str], lines: &[String]) -> Result<()> {
    let mut child = Command::new("ip")
        .args(options)
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("start `ip` (package iproute2)")?;
    let Some(mut stdin) = child.stdin.take() else {
        bail!("`ip` has no standard input")
    };
    let mut text = lines.join("\n");
    text.push('\n');
    // A failing `ip` closes the pipe early; what it says on stderr is the better error.
    let written = stdin.write_all(text.as_bytes());
    drop(stdin);
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "ip {} failed: {}",
        options.join(" "),
        said.trim()
    );
    written.context("write to `ip`")
}
