//! The plugin on the node: its binary beside the others, its entry at the end of the list that the container runtime
//! uses. Put there whole or not at all, put back when somebody else writes the list anew, and taken out on uninstall.

use super::{
    TYPE,
    conflist::{self, ConflistError},
    standing::{self, replace},
};
use notify::{RecursiveMode, Watcher};
use parking_lot::Mutex;
use serde_json::Value;
use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::sync::Notify;
use tracing::{info, warn};

/// How often the node's folders are looked at even if nothing tells of a change.
const LOOK: Duration = Duration::from_secs(10);
/// Changes come in bursts, and whoever fights us for the list is not to be answered faster.
const SETTLE: Duration = Duration::from_millis(200);
/// What a single plugin's configuration is called while a list has its place.
const SAVED: &str = "warren-saved";

/// Where the plugin goes, as this process sees the node's folders.
#[derive(Debug, Clone)]
pub struct Folders {
    /// `/opt/cni/bin` of the node.
    pub bin: PathBuf,
    /// `/etc/cni/net.d` of the node.
    pub conf: PathBuf,
}

impl Folders {
    /// Where the daemon leaves what the plugin has to know without it.
    pub fn state(&self) -> PathBuf {
        self.conf.join("warren")
    }
}

#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    #[error("the plugin's binary cannot be put into {folder}")]
    Binary { folder: PathBuf, source: io::Error },
    #[error("{folder} cannot be read")]
    Folder { folder: PathBuf, source: io::Error },
    #[error("there is no CNI configuration in {folder} yet: the node's network comes first")]
    NoNetwork { folder: PathBuf },
    #[error("the CNI configuration {path} cannot be extended")]
    Conflist { path: PathBuf, source: ConflistError },
    #[error("the CNI configuration {path} cannot be read or written")]
    File { path: PathBuf, source: io::Error },
}

/// What a file is known by without being read: inode, length, and when it was last changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp(u64, u64, i64, i64);

impl Stamp {
    fn of(path: &Path) -> Option<Self> {
        let facts = fs::metadata(path).ok()?;
        Some(Self(facts.ino(), facts.size(), facts.ctime(), facts.ctime_nsec()))
    }
}

/// Puts binary and entry where they belong, where they are not yet. True if something changed. `placed` is the binary as it
/// was left there last: megabytes that need not be read again.
///
/// # Errors
/// There is no network to chain behind, or the folders cannot be written.
pub fn ensure(
    folders: &Folders,
    binary: &Path,
    entry: &Value,
    placed: &mut Option<Stamp>,
) -> Result<bool, InstallError> {
    let there = folders.bin.join(TYPE);
    let is_ours = placed.is_some() && *placed == Stamp::of(&there);
    let copied = !is_ours && ensure_binary(folders, binary)?;
    *placed = Stamp::of(&there);
    Ok(ensure_entry(folders, entry)? | copied)
}

fn ensure_binary(folders: &Folders, binary: &Path) -> Result<bool, InstallError> {
    let failed = |source| InstallError::Binary {
        folder: folders.bin.clone(),
        source,
    };
    let wanted = fs::read(binary).map_err(failed)?;
    if fs::read(folders.bin.join(TYPE)).is_ok_and(|there| there == wanted) {
        return Ok(false);
    }
    replace(&folders.bin, TYPE, &wanted, 0o755).map_err(failed)?;
    Ok(true)
}

fn ensure_entry(folders: &Folders, entry: &Value) -> Result<bool, InstallError> {
    let path = in_use(folders)?.ok_or_else(|| InstallError::NoNetwork {
        folder: folders.conf.clone(),
    })?;
    let text = fs::read_to_string(&path).map_err(file(&path))?;
    let refused = |source| InstallError::Conflist {
        path: path.clone(),
        source,
    };
    let is_list = path.extension().is_some_and(|extension| extension == "conflist");
    if is_list {
        let with = conflist::with_entry(&text, entry).map_err(refused)?;
        if with == text {
            return Ok(false);
        }
        write(&path, &with)?;
    } else {
        let list = conflist::from_single(&text, entry).map_err(refused)?;
        write(&path.with_extension("conflist"), &list)?;
        // It would be read first. Its name comes back at the end.
        fs::rename(&path, saved(&path)).map_err(file(&path))?;
    }
    Ok(true)
}

/// The configuration that container runtimes use: the first by name that is one.
fn in_use(folders: &Folders) -> Result<Option<PathBuf>, InstallError> {
    let first = files(folders)?.into_iter().find(|path| {
        let text = fs::read_to_string(path).unwrap_or_default();
        let config: Value = serde_json::from_str(&text).unwrap_or_default();
        config["type"].is_string() || config["plugins"].as_array().is_some_and(|plugins| !plugins.is_empty())
    });
    Ok(first)
}

fn files(folders: &Folders) -> Result<Vec<PathBuf>, InstallError> {
    let entries = fs::read_dir(&folders.conf).map_err(|source| InstallError::Folder {
        folder: folders.conf.clone(),
        source,
    })?;
    let mut files: Vec<_> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            let extension = path.extension().and_then(|extension| extension.to_str());
            matches!(extension, Some("conflist" | "conf" | "json")) && path.is_file()
        })
        .collect();
    files.sort_unstable();
    Ok(files)
}

fn write(path: &Path, text: &str) -> Result<(), InstallError> {
    use std::os::unix::fs::PermissionsExt;
    let (Some(folder), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return Ok(());
    };
    let mode = fs::metadata(path).map_or(0o600, |facts| facts.permissions().mode() & 0o777);
    replace(folder, name, text.as_bytes(), mode).map_err(file(path))
}

fn saved(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{SAVED}"));
    name.into()
}

fn file(path: &Path) -> impl Fn(io::Error) -> InstallError {
    let path = path.to_owned();
    move |source| InstallError::File {
        path: path.clone(),
        source,
    }
}

/// Takes the plugin off the node: first out of every list, so that nobody calls it any more, then what it knows and its
/// binary. What is not there is as good as removed.
///
/// # Errors
/// Something could not be removed; the rest is.
pub fn remove(folders: &Folders) -> Result<(), InstallError> {
    let lists = files(folders)
        .unwrap_or_default()
        .into_iter()
        .map(|path| remove_entry(&path));
    let lists = lists.fold(Ok(()), Result::and);
    let state = folders.state();
    let state = absent_is_well(fs::remove_dir_all(&state)).map_err(file(&state));
    let binary = absent_is_well(fs::remove_file(folders.bin.join(TYPE))).map_err(|source| InstallError::Binary {
        folder: folders.bin.clone(),
        source,
    });
    lists.and(state).and(binary)
}

fn remove_entry(path: &Path) -> Result<(), InstallError> {
    let text = fs::read_to_string(path).map_err(file(path))?;
    if !conflist::has_entry(&text) {
        return Ok(());
    }
    for extension in ["conf", "json"] {
        let single = path.with_extension(extension);
        if saved(&single).exists() {
            // The one that the list was made of comes back first: there is always one or the other.
            fs::rename(saved(&single), &single).map_err(file(&single))?;
            return fs::remove_file(path).map_err(file(path));
        }
    }
    let without = conflist::without_entry(&text).map_err(|source| InstallError::Conflist {
        path: path.to_owned(),
        source,
    })?;
    write(path, &without)
}

fn absent_is_well(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Keeps the plugin installed until `until`, and leaves it there. `is_installed` says whether it was in its place at the
/// last look.
pub async fn keep(
    folders: Folders,
    binary: PathBuf,
    entry: Value,
    is_installed: Arc<AtomicBool>,
    until: impl Future<Output = ()>,
) {
    let changed = Arc::new(Notify::new());
    let told = Arc::clone(&changed);
    let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Our own look reads what is watched: that is no change.
        if !event.is_ok_and(|event| event.kind.is_access()) {
            told.notify_one();
        }
    });
    let _watcher = watcher.and_then(|mut watcher| {
        watcher.watch(&folders.conf, RecursiveMode::NonRecursive)?;
        Ok(watcher)
    });
    tokio::pin!(until);
    let mut is_first = true;
    let mut said = None;
    let placed = Arc::new(Mutex::new(None));
    loop {
        let (here, binary, entry, placed) = (folders.clone(), binary.clone(), entry.clone(), Arc::clone(&placed));
        let look = move || ensure(&here, &binary, &entry, &mut placed.lock());
        let outcome = tokio::task::spawn_blocking(look).await;
        let succeeded = matches!(outcome, Ok(Ok(_)));
        is_installed.store(succeeded, Ordering::Relaxed);
        match outcome {
            Ok(Ok(true)) if is_first => info!(conf = %folders.conf.display(), "the CNI plugin is installed"),
            Ok(Ok(true)) => warn!(conf = %folders.conf.display(), "the CNI plugin was taken out, it is put back"),
            Ok(Ok(false)) => said = None,
            Ok(Err(error)) => {
                let text = error.to_string();
                if said.as_ref() != Some(&text) {
                    warn!(
                        error = &error as &dyn std::error::Error,
                        "the CNI plugin is not installed"
                    );
                    said = Some(text);
                }
            }
            Err(join) => warn!(
                error = &join as &dyn std::error::Error,
                "the CNI plugin is not installed"
            ),
        }
        is_first &= !succeeded;
        tokio::select! {
            () = &mut until => return,
            () = async {
                let _ = tokio::time::timeout(LOOK, changed.notified()).await;
                tokio::time::sleep(SETTLE).await;
            } => {}
        }
    }
}

/// Writes the way to the API server that the plugin takes without the daemon.
///
/// # Errors
/// It cannot be written.
pub fn write_kubeconfig(folders: &Folders, text: &[u8]) -> io::Result<()> {
    standing::write(&folders.state(), standing::KUBECONFIG, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shutdown::Shutdown;
    use serde_json::json;
    use tempfile::TempDir;

    const PTP: &str = "{\n  \"cniVersion\": \"1.0.0\", \"name\": \"kube\",\n  \"plugins\": [\n    {\"type\": \"ptp\", \"mtu\": 1.5e3},\n    {\"type\": \"portmap\"}\n  ]\n}\n";

    struct Node {
        _directory: TempDir,
        folders: Folders,
        binary: PathBuf,
    }

    fn node(files: &[(&str, &str)]) -> Node {
        let directory = tempfile::tempdir().unwrap();
        let folders = Folders {
            bin: directory.path().join("bin"),
            conf: directory.path().join("conf"),
        };
        fs::create_dir(&folders.bin).unwrap();
        fs::create_dir(&folders.conf).unwrap();
        for (name, text) in files {
            fs::write(folders.conf.join(name), text).unwrap();
        }
        let binary = directory.path().join("warren");
        fs::write(&binary, "a binary").unwrap();
        Node {
            _directory: directory,
            folders,
            binary,
        }
    }

    fn entry() -> Value {
        json!({"type": TYPE})
    }

    impl Node {
        fn ensure(&self) -> Result<bool, InstallError> {
            ensure(&self.folders, &self.binary, &entry(), &mut None)
        }

        fn listing(&self) -> Vec<(String, String)> {
            let mut all: Vec<_> = [&self.folders.bin, &self.folders.conf]
                .into_iter()
                .flat_map(|folder| fs::read_dir(folder).unwrap().flatten())
                .map(|entry| {
                    let text = fs::read_to_string(entry.path()).unwrap_or_default();
                    (entry.file_name().to_string_lossy().into_owned(), text)
                })
                .collect();
            all.sort();
            all
        }
    }

    #[test]
    fn a_binary_that_is_still_as_it_was_left_is_not_read_again_and_a_changed_one_is_put_right() {
        let node = node(&[("10-kube.conflist", PTP)]);
        let mut placed = None;
        let mut look = || ensure(&node.folders, &node.binary, &entry(), &mut placed).unwrap();
        assert!(look());
        let there = node.folders.bin.join(TYPE);
        let wanted = fs::read(&there).unwrap();
        fs::rename(&node.binary, node.binary.with_extension("away")).unwrap();
        assert!(!look(), "there is nothing to compare it with, so nothing was read");
        fs::rename(node.binary.with_extension("away"), &node.binary).unwrap();
        fs::write(&there, "something else").unwrap();
        assert!(look());
        assert_eq!(fs::read(&there).unwrap(), wanted);
        fs::remove_file(&there).unwrap();
        assert!(look());
    }

    #[test]
    fn the_list_in_use_is_extended_and_removal_leaves_everything_as_it_was() {
        let node = node(&[
            ("00-broken.conflist", "{"),
            ("10-kube.conflist", PTP),
            ("20-other.conflist", PTP),
            ("README", "not a configuration"),
        ]);
        let before = node.listing();
        assert!(node.ensure().unwrap());
        assert!(!node.ensure().unwrap(), "it is there already");
        let with = fs::read_to_string(node.folders.conf.join("10-kube.conflist")).unwrap();
        assert!(conflist::has_entry(&with));
        assert_eq!(
            fs::read_to_string(node.folders.conf.join("20-other.conflist")).unwrap(),
            PTP
        );
        assert_eq!(fs::read_to_string(node.folders.bin.join(TYPE)).unwrap(), "a binary");
        standing::write(&node.folders.state(), "x", b"y").unwrap();
        remove(&node.folders).unwrap();
        assert_eq!(node.listing(), before);
        remove(&node.folders).unwrap();
    }

    #[test]
    fn a_single_plugins_configuration_gives_way_to_a_list_and_comes_back() {
        let single = "{\"cniVersion\": \"0.3.1\", \"name\": \"net\", \"type\": \"bridge\"}";
        let node = node(&[("10-net.conf", single)]);
        let before = node.listing();
        assert!(node.ensure().unwrap());
        assert!(!node.ensure().unwrap());
        assert_eq!(
            in_use(&node.folders).unwrap(),
            Some(node.folders.conf.join("10-net.conflist"))
        );
        remove(&node.folders).unwrap();
        assert_eq!(node.listing(), before);
    }

    #[test]
    fn without_a_network_there_is_nothing_to_chain_behind() {
        let node = node(&[]);
        assert!(matches!(node.ensure(), Err(InstallError::NoNetwork { .. })));
    }

    #[tokio::test]
    async fn an_entry_that_somebody_takes_out_is_put_back() {
        let node = node(&[]);
        let shutdown = Shutdown::new();
        let is_installed = Arc::new(AtomicBool::new(true));
        let keeping = keep(
            node.folders.clone(),
            node.binary.clone(),
            entry(),
            Arc::clone(&is_installed),
            shutdown.draining(),
        );
        shutdown.spawn("CNI plugin", keeping);
        let says = async |wanted: bool| {
            let start = std::time::Instant::now();
            while is_installed.load(Ordering::Relaxed) != wanted {
                assert!(start.elapsed() < Duration::from_secs(10), "it does not say {wanted}");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        says(false).await;
        let list = node.folders.conf.join("10-kube.conflist");
        // The network comes later than we do, and is written anew.
        for _ in 0..2 {
            fs::write(&list, PTP).unwrap();
            let start = std::time::Instant::now();
            while !conflist::has_entry(&fs::read_to_string(&list).unwrap()) {
                assert!(start.elapsed() < Duration::from_secs(10));
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        says(true).await;
        shutdown.drain(Duration::from_secs(10)).await;
        assert!(
            conflist::has_entry(&fs::read_to_string(&list).unwrap()),
            "an upgrade leaves it"
        );
    }
}
