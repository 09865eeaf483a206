//! The socket on which the daemon answers the plugin: root alone, one line each way, bounded in size, number and time.

use super::wire::{LONGEST, Reply, Request, VERSION, Verdict};
use crate::shutdown::Shutdown;
use futures::future::BoxFuture;
use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// How long a caller may take for its question.
const QUESTION: Duration = Duration::from_secs(5);
/// How long the answer may take. The plugin waits a little longer.
pub const ANSWER: Duration = Duration::from_secs(20);
/// Pods that start at the same time.
const CALLERS: usize = 512;
/// After accepting failed, for want of descriptors say.
const BACK_OFF: Duration = Duration::from_millis(100);

/// Decides about pods that start.
pub trait Admission: Send + Sync + 'static {
    fn answer(&self, request: Request) -> BoxFuture<'static, Reply>;
}

#[derive(Debug, thiserror::Error)]
#[error("the CNI plugin cannot be answered at {path}")]
pub struct SocketError {
    pub path: PathBuf,
    pub source: io::Error,
}

/// Opens the socket in the place of an earlier daemon's.
///
/// # Errors
/// It cannot be opened there.
pub fn bind(path: &Path) -> Result<UnixListener, SocketError> {
    let failed = |source| SocketError {
        path: path.to_owned(),
        source,
    };
    let partial = path.with_extension(format!("{}.partial", std::process::id()));
    let bound = (|| {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        let _ = fs::remove_file(&partial);
        let listener = UnixListener::bind(&partial)?;
        fs::set_permissions(&partial, fs::Permissions::from_mode(0o600))?;
        fs::rename(&partial, path)?;
        Ok(listener)
    })();
    bound.map_err(|source| {
        let _ = fs::remove_file(&partial);
        failed(source)
    })
}

/// Answers until `stop`. Callers who wait then are told to try again: the next daemon will know.
pub async fn serve(listener: UnixListener, admission: Arc<dyn Admission>, stop: CancellationToken, shutdown: Shutdown) {
    let callers = Arc::new(Semaphore::new(CALLERS));
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!(%error, "a CNI plugin's call cannot be accepted");
                tokio::time::sleep(BACK_OFF).await;
                continue;
            }
        };
        if let Err(error) = check_peer(&stream) {
            warn!(%error, "somebody else calls the CNI plugin's socket");
            continue;
        }
        let Ok(room) = Arc::clone(&callers).try_acquire_owned() else {
            // The plugin finds nobody who answers, and tries again.
            warn!("too many pods start at the same time");
            continue;
        };
        let (admission, stop) = (Arc::clone(&admission), stop.clone().cancelled_owned());
        shutdown.spawn("CNI call", async move {
            let _room = room;
            if let Err(error) = call(stream, &*admission, stop).await {
                debug!(%error, "a CNI plugin's call failed");
            }
        });
    }
}

/// Root alone: a call makes the daemon enter the namespace that it names.
fn check_peer(stream: &UnixStream) -> io::Result<()> {
    match stream.peer_cred()?.uid() {
        0 => Ok(()),
        uid => Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("user {uid} is not root"),
        )),
    }
}

async fn call(mut stream: UnixStream, admission: &dyn Admission, stop: impl Future<Output = ()>) -> io::Result<()> {
    let (read, mut write) = stream.split();
    let mut line = Vec::new();
    let mut bounded = BufReader::new(read).take(LONGEST as u64);
    timeout(QUESTION, bounded.read_until(b'\n', &mut line)).await??;
    let reply = match serde_json::from_slice::<Request>(&line) {
        Ok(request) if request.version == VERSION => tokio::select! {
            reply = timeout(ANSWER, admission.answer(request)) => {
                reply.unwrap_or_else(|_| Reply::new(Verdict::Later, "it takes too long"))
            }
            () = stop => Reply::new(Verdict::Later, "the daemon is about to end"),
        },
        // An upgrade is under way: the plugin is replaced soon.
        Ok(request) => Reply::new(
            Verdict::Later,
            format!("the plugin speaks version {}, the daemon {VERSION}", request.version),
        ),
        Err(error) => Reply::new(Verdict::Later, format!("the question is not understood: {error}")),
    };
    let mut text = serde_json::to_vec(&reply)?;
    text.push(b'\n');
    timeout(QUESTION, write.write_all(&text)).await?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cni::wire::{Ask, PodName},
        testing::within,
    };

    struct Captured;

    impl Admission for Captured {
        fn answer(&self, request: Request) -> BoxFuture<'static, Reply> {
            Box::pin(async move {
                match &*request.pod.name {
                    "slow" => std::future::pending().await,
                    name => Reply::new(Verdict::Captured, name),
                }
            })
        }
    }

    fn request(name: &str) -> Vec<u8> {
        let request = Request {
            version: VERSION,
            ask: Ask::Add,
            pod: PodName {
                namespace: "shop".into(),
                name: name.into(),
                uid: "u".into(),
            },
            container: "ab".into(),
            netns: "/run/netns/x".into(),
            addresses: Vec::new(),
        };
        let mut line = serde_json::to_vec(&request).unwrap();
        line.push(b'\n');
        line
    }

    async fn ask(path: &Path, question: &[u8]) -> Reply {
        let mut stream = UnixStream::connect(path).await.unwrap();
        stream.write_all(question).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        serde_json::from_str(&answer).unwrap()
    }

    struct Served {
        directory: tempfile::TempDir,
        stop: CancellationToken,
        shutdown: Shutdown,
    }

    impl Served {
        fn start() -> Option<Self> {
            if !nix::unistd::geteuid().is_root() {
                eprintln!("SKIPPED: the socket answers root alone");
                return None;
            }
            let served = Self {
                directory: tempfile::tempdir().unwrap(),
                stop: CancellationToken::new(),
                shutdown: Shutdown::new(),
            };
            let listener = bind(&served.path()).unwrap();
            let serving = serve(
                listener,
                Arc::new(Captured),
                served.stop.clone(),
                served.shutdown.clone(),
            );
            served.shutdown.spawn("CNI", serving);
            Some(served)
        }

        fn path(&self) -> PathBuf {
            self.directory.path().join("cni.sock")
        }
    }

    #[tokio::test]
    async fn a_question_is_answered_and_nonsense_is_told_to_come_again() {
        let Some(served) = Served::start() else { return };
        assert_eq!(
            ask(&served.path(), &request("web-0")).await,
            Reply::new(Verdict::Captured, "web-0")
        );
        assert_eq!(ask(&served.path(), b"{}\n").await.verdict, Verdict::Later);
        let newer = String::from_utf8(request("web-0"))
            .unwrap()
            .replace("\"version\":1", "\"version\":9");
        assert_eq!(ask(&served.path(), newer.as_bytes()).await.verdict, Verdict::Later);
        let endless = vec![b'x'; LONGEST];
        assert_eq!(ask(&served.path(), &endless).await.verdict, Verdict::Later);
    }

    #[tokio::test]
    async fn who_waits_when_the_daemon_ends_is_told_to_come_again() {
        let Some(served) = Served::start() else { return };
        let (path, question) = (served.path(), request("slow"));
        let waiting = tokio::spawn(async move { ask(&path, &question).await });
        while !served.shutdown.tasks().iter().any(|(name, _)| *name == "CNI call") {
            tokio::task::yield_now().await;
        }
        served.stop.cancel();
        served.shutdown.drain(Duration::from_secs(10)).await;
        assert_eq!(waiting.await.unwrap().verdict, Verdict::Later);
        // Nobody answers any more, and the next daemon takes the place.
        within("nobody answers", async {
            while UnixStream::connect(served.path()).await.is_ok() {
                tokio::task::yield_now().await;
            }
        })
        .await;
        let _next = bind(&served.path()).unwrap();
        assert!(UnixStream::connect(served.path()).await.is_ok());
    }

    #[tokio::test]
    async fn nobody_but_root_is_answered() {
        let Some(served) = Served::start() else { return };
        fs::set_permissions(served.directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(served.path(), fs::Permissions::from_mode(0o666)).unwrap();
        let path = served.path();
        // A thread of its own, which ends as that user.
        let answer = std::thread::spawn(move || {
            // SAFETY: the system call takes three numbers and touches no memory; it changes this thread's user alone.
            let changed = unsafe { libc::syscall(libc::SYS_setresuid, 65_534, 65_534, 65_534) };
            assert_eq!(changed, 0);
            let mut stream = std::os::unix::net::UnixStream::connect(path).unwrap();
            let _ = io::Write::write_all(&mut stream, &request("web-0"));
            let mut answer = String::new();
            let _ = io::Read::read_to_string(&mut stream, &mut answer);
            answer
        });
        let answer = tokio::task::spawn_blocking(|| answer.join().unwrap());
        assert_eq!(answer.await.unwrap(), "");
    }
}
