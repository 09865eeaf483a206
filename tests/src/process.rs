//! Processes inside a place: its network namespace, its cgroup, its CPU. Started, logged to files, and ended by their own id.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, setns};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

use crate::netns::Namespace;
use crate::wait::{wait_until, wait_until_ok};

mod follower;

pub use follower::Follower;

/// How long a process may take to end after SIGTERM before it is killed.
const GRACE: Duration = Duration::from_secs(2);

/// A command that will run inside a place.
#[derive(Debug)]
pub struct ProcessBuilder {
    command: Command,
    name: String,
    namespace: Option<Namespace>,
    cgroup: Option<PathBuf>,
    cpu: Option<usize>,
    log: PathBuf,
    pipe_stdin: bool,
    pipe_stdout: bool,
}

impl ProcessBuilder {
    /// `log` is the path of the log without an extension; `.out` and `.err` are added.
    pub fn new(program: impl AsRef<OsStr>, log: PathBuf) -> Self {
        let name = Path::new(program.as_ref())
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        Self {
            command: Command::new(program),
            name,
            namespace: None,
            cgroup: None,
            cpu: None,
            log,
            pipe_stdin: false,
            pipe_stdout: false,
        }
    }

    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    #[must_use]
    pub fn args<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(mut self, args: I) -> Self {
        self.command.args(args);
        self
    }

    #[must_use]
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    /// What the process is called in logs and errors, and which files its output goes to: `NAME.out` and `NAME.err`.
    #[must_use]
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    #[must_use]
    pub fn in_namespace(mut self, namespace: &Namespace) -> Self {
        self.namespace = Some(namespace.clone());
        self
    }

    #[must_use]
    pub fn in_cgroup(mut self, path: &Path) -> Self {
        self.cgroup = Some(path.to_owned());
        self
    }

    #[must_use]
    pub fn on_cpu(mut self, cpu: Option<usize>) -> Self {
        self.cpu = cpu;
        self
    }

    /// Standard input and output are pipes that [`Process::take_pipes`] hands out; without this, input is empty and output goes to the log.
    #[must_use]
    pub fn with_pipes(mut self) -> Self {
        self.pipe_stdin = true;
        self.pipe_stdout = true;
        self
    }

    pub fn spawn(mut self) -> Result<Process> {
        let base = self.log.join(&self.name);
        let (stdout, stderr) = (base.with_extension("out"), base.with_extension("err"));
        let append = |path: &Path| {
            OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .with_context(|| format!("open {}", path.display()))
        };
        self.command
            .stdin(if self.pipe_stdin { Stdio::piped() } else { Stdio::null() });
        self.command.stdout(if self.pipe_stdout {
            Stdio::piped()
        } else {
            Stdio::from(append(&stdout)?)
        });
        self.command.stderr(append(&stderr)?);
        // Ctrl-C is for the harness, which then ends its processes in order.
        self.command.process_group(0);
        let entry = Entry {
            namespace: self.namespace.as_ref().map(Namespace::open).transpose()?,
            cgroup: self.cgroup.as_ref().map(|path| open_procs(path)).transpose()?,
            cpus: self.cpu.map(one_cpu).transpose()?,
        };
        // SAFETY: between fork and exec `Entry::enter` makes plain system calls on descriptors and values prepared before the
        // fork; it neither allocates nor takes locks.
        unsafe { self.command.pre_exec(move || entry.enter()) };
        let program: OsString = self.command.get_program().to_owned();
        let child = self
            .command
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        Ok(Process {
            child,
            name: self.name,
            stdout,
            stderr,
            detached: false,
        })
    }

    /// Runs to the end and gives back standard output; an exit other than 0 is an error that carries what it wrote to stderr.
    pub fn output(mut self, deadline: Duration) -> Result<String> {
        self.pipe_stdout = true;
        let mut process = self.spawn()?;
        let Some(stdout) = process.child.stdout.take() else {
            anyhow::bail!("no standard output")
        };
        let reader = std::thread::spawn(move || io::read_to_string(stdout));
        let status = process.wait(deadline)?;
        let text = match reader.join() {
            Ok(text) => text?,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        anyhow::ensure!(
            status.success(),
            "{} ended with {status}: {}{text}",
            process.name,
            process.stderr()
        );
        Ok(text)
    }
}

/// What a child does between fork and exec.
struct Entry {
    namespace: Option<File>,
    cgroup: Option<File>,
    cpus: Option<CpuSet>,
}

impl Entry {
    fn enter(&self) -> io::Result<()> {
        if let Some(procs) = &self.cgroup {
            // "0" is the writer itself.
            (&mut &*procs).write_all(b"0")?;
        }
        if let Some(cpus) = &self.cpus {
            sched_setaffinity(Pid::from_raw(0), cpus)?;
        }
        if let Some(namespace) = &self.namespace {
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
        }
        // The harness blocks the signals it waits for; a child that inherited that would not end on SIGTERM.
        SigSet::empty().thread_set_mask()?;
        // Ten thousand connections need more descriptors than the usual soft limit.
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        Ok(())
    }
}

fn open_procs(cgroup: &Path) -> Result<File> {
    let path = cgroup.join("cgroup.procs");
    OpenOptions::new()
        .write(true)
        .open(&path)
        .with_context(|| format!("open {}", path.display()))
}

fn one_cpu(cpu: usize) -> Result<CpuSet> {
    let mut set = CpuSet::new();
    set.set(cpu).with_context(|| format!("no CPU {cpu}"))?;
    Ok(set)
}

/// A process of ours. Dropped, it is asked to end, then killed.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    stdout: PathBuf,
    stderr: PathBuf,
    detached: bool,
}

impl Process {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Memory that is resident now, in KiB.
    pub fn resident_kib(&self) -> Result<u64> {
        resident_kib(self.pid())
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it wrote to standard output so far (nothing when that is a pipe).
    pub fn stdout(&self) -> String {
        fs::read_to_string(&self.stdout).unwrap_or_default()
    }

    /// What it wrote to standard error so far.
    pub fn stderr(&self) -> String {
        fs::read_to_string(&self.stderr).unwrap_or_default()
    }

    /// Both outputs, standard output first.
    pub fn log(&self) -> String {
        self.stdout() + &self.stderr()
    }

    /// Standard output line by line, from its end on.
    pub fn follow(&self) -> Result<Follower> {
        Follower::at_end_of(&self.stdout)
    }

    /// Waits until a line of the log contains `text`, and gives back that line.
    pub fn wait_for_line(&self, text: &str, deadline: Duration) -> Result<String> {
        let what = format!("{} writes `{text}`", self.name);
        wait_until(&what, deadline, || {
            self.log().lines().find(|line| line.contains(text)).map(str::to_owned)
        })
        .with_context(|| format!("its log ends with: {}", tail(&self.log())))
    }

    /// Waits for the first line on a piped standard output.
    pub fn read_line(&mut self, deadline: Duration) -> Result<String> {
        let stdout = self.child.stdout.take().context("standard output is not a pipe")?;
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut reader = io::BufReader::new(stdout);
            let mut line = String::new();
            let result = reader.read_line(&mut line).map(|_| line);
            // Nobody listens any more when the deadline has passed.
            let _ = sender.send((result, reader));
        });
        let (line, reader) = receiver
            .recv_timeout(deadline)
            .with_context(|| format!("{} says nothing", self.name))?;
        self.child.stdout = Some(reader.into_inner());
        let line = line?;
        anyhow::ensure!(
            !line.is_empty(),
            "{} ended without a word: {}",
            self.name,
            self.stderr()
        );
        Ok(line)
    }

    /// Lets a piped standard input end.
    pub fn end_input(&mut self) {
        drop(self.child.stdin.take());
    }

    pub fn take_pipes(&mut self) -> Option<(ChildStdin, ChildStdout)> {
        Some((self.child.stdin.take()?, self.child.stdout.take()?))
    }

    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// The child is ours until it is waited for, so its id cannot have gone to another process.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.is_running() {
            kill(self.nix_pid(), signal).with_context(|| format!("send {signal} to {}", self.name))?;
        }
        Ok(())
    }

    /// `kill -9`, and waits for the end.
    pub fn kill(&mut self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        self.child.wait().with_context(|| format!("wait for {}", self.name))?;
        Ok(())
    }

    /// SIGTERM, and waits for the end.
    pub fn stop(&mut self, deadline: Duration) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.wait(deadline)
    }

    pub fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let what = format!("{} ends", self.name);
        match wait_until_ok(&what, deadline, || self.child.try_wait()?.context("still running")) {
            Ok(status) => Ok(status),
            Err(error) => Err(error.context(format!("its log ends with: {}", tail(&self.log())))),
        }
    }

    /// From now on the process lives until its world is cleared.
    pub fn detach(&mut self) {
        self.detached = true;
    }

    fn nix_pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.detached {
            return;
        }
        if self.stop(GRACE).is_err() {
            // Nothing is left to do about a process that cannot be killed.
            let _ = self.kill();
        }
    }
}

/// The last 2,000 bytes or so of a log, for errors.
fn tail(log: &str) -> &str {
    let mut start = log.len().saturating_sub(2000);
    while !log.is_char_boundary(start) {
        start += 1;
    }
    &log[start..]
}

/// Memory of a process that is resident now, in KiB.
pub fn resident_kib(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).with_context(|| format!("process {pid} is gone"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .context("no VmRSS")?;
    line.trim().trim_end_matches(" kB").parse().context("parse VmRSS")
}
