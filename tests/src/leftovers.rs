//! What a world leaves on the machine, written down before it is made, so that whoever comes next can clear it: the world's
//! own drop, Ctrl-C, or the next run after a crash. One file per prefix.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{SigSet, Signal};
use serde::{Deserialize, Serialize};

use crate::{cgroup, netns};

/// The worlds of this process, for the thread that waits for Ctrl-C.
static LIVE: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Held while namespaces come and go, so that Ctrl-C does not clear a world that is half built and goes on being built.
static CHANGING: Mutex<()> = Mutex::new(());

/// To be held while something is made that [`Leftovers`] mentions.
pub fn changing() -> MutexGuard<'static, ()> {
    CHANGING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Everything of a world that outlives a process that dies.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Leftovers {
    pub cgroup: PathBuf,
    /// A bpffs of the world's own: unmounting it takes every pin in it.
    pub pins: PathBuf,
    /// The world's manifests and logs.
    #[serde(default)]
    pub directory: PathBuf,
    pub namespaces: Vec<String>,
}

impl Leftovers {
    /// Kills, detaches and deletes all of it. Goes on after an error and returns the first.
    pub fn clear(&self) -> Result<()> {
        let mut outcome = cgroup::kill_and_remove(&self.cgroup);
        // Pins first: an attached program would keep its namespace's sockets and counters busy.
        outcome = outcome.and(unmount(&self.pins));
        let names: Vec<&str> = self.namespaces.iter().map(String::as_str).collect();
        outcome = outcome.and(netns::delete(&names));
        if outcome.is_ok() && std::env::var_os("WARREN_KEEP_LOGS").is_none() {
            // Logs of a world that is gone help nobody; losing them is no failure either.
            let _ = fs::remove_dir_all(&self.directory);
        }
        outcome
    }
}

/// The file of one prefix, locked for as long as the world lives.
#[derive(Debug)]
pub struct Ledger {
    path: PathBuf,
    _lock: Flock<File>,
}

impl Ledger {
    /// Locks the prefix and clears what an earlier run left under it. Fails when a living process has a world of that prefix.
    pub fn open(run_directory: &Path, prefix: &str) -> Result<Self> {
        let lock = run_directory.join(format!("{prefix}.lock"));
        let file = File::create(&lock).with_context(|| format!("create {}", lock.display()))?;
        let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
            bail!("another process has a world named `{prefix}` up; end it or take another prefix");
        };
        let path = run_directory.join(format!("{prefix}.json"));
        clear_file(&path).with_context(|| format!("clear what an earlier run of `{prefix}` left"))?;
        if let Ok(mut live) = LIVE.lock() {
            live.push(path.clone());
        }
        Ok(Self { path, _lock: lock })
    }

    /// Writes down what is about to exist.
    pub fn write(&self, leftovers: &Leftovers) -> Result<()> {
        let text = serde_json::to_string_pretty(leftovers)?;
        fs::write(&self.path, text).with_context(|| format!("write {}", self.path.display()))
    }

    pub fn clear(&self) -> Result<()> {
        // Not beside Ctrl-C's thread: the second to delete a namespace would call that an error.
        let _guard = changing();
        self.forget();
        clear_file(&self.path)
    }

    /// Leaves everything as it is; the next world of that prefix clears it.
    pub fn forget(&self) {
        if let Ok(mut live) = LIVE.lock() {
            live.retain(|path| *path != self.path);
        }
    }
}

/// Clears what a run that is over left under `prefix`; nothing left is fine.
pub fn clear_prefix(prefix: &str) -> Result<()> {
    Ledger::open(&run_directory()?, prefix)?.clear()
}

/// Where ledgers, locks and the files of worlds live.
pub fn run_directory() -> Result<PathBuf> {
    let path = PathBuf::from("/run/warren-tests");
    fs::create_dir_all(&path).with_context(|| format!("create {} (are you root?)", path.display()))?;
    Ok(path)
}

/// From now on Ctrl-C (and SIGTERM) clears the worlds of this process and exits with 130. To be called before other threads start.
pub fn clear_on_ctrl_c() -> Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGHUP);
    signals.thread_block().context("block SIGINT")?;
    std::thread::Builder::new().name("ctrl-c".to_owned()).spawn(move || {
        if signals.wait().is_ok() {
            // Never given back: from here on nothing is made any more.
            let _guard = changing();
            let live = LIVE.lock().map(|live| live.clone()).unwrap_or_default();
            for path in live {
                if let Err(error) = clear_file(&path) {
                    eprintln!("{error:#}");
                }
            }
            std::process::exit(130);
        }
    })?;
    Ok(())
}

fn clear_file(path: &Path) -> Result<()> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
    };
    let leftovers: Leftovers = serde_json::from_str(&text).with_context(|| format!("parse {}", path.display()))?;
    leftovers.clear()?;
    fs::remove_file(path).with_context(|| format!("remove {}", path.display()))
}

/// A fresh bpffs at `path`, so that pins meet nobody else's and need nothing of the machine.
pub fn mount_bpffs(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("create {}", path.display()))?;
    mount(Some("bpf"), path, Some("bpf"), MsFlags::empty(), None::<&str>)
        .with_context(|| format!("mount bpffs at {}", path.display()))
}

fn unmount(path: &Path) -> Result<()> {
    match umount2(path, MntFlags::MNT_DETACH) {
        // Not there, or not mounted: the run died before it came that far.
        Ok(()) | Err(Errno::ENOENT | Errno::EINVAL) => {}
        Err(errno) => return Err(errno).with_context(|| format!("unmount {}", path.display())),
    }
    match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
