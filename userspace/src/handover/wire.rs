//! The socket between two daemons of one node: messages of bounded size, each with at most a few descriptors, from root to
//! root. One of the few files with `unsafe`.

#![allow(unsafe_code, reason = "descriptors that the kernel has just made for us")]

use super::protocol::{DESCRIPTORS, LONGEST, Misstep};
use nix::{
    cmsg_space,
    sys::socket::{
        ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, getsockopt, recvmsg, sendmsg, sockopt::PeerCredentials,
    },
};
use serde::{Serialize, de::DeserializeOwned};
use socket2::{Domain, SockAddr, Socket, Type};
use std::{
    fs, io,
    io::{IoSlice, IoSliceMut},
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::fs::PermissionsExt,
    },
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::timeout,
};

/// With how many the kernel lets a message come. With room for fewer, those that are too many would stay open unseen.
const MOST_DESCRIPTORS: usize = 253;
/// Successors that wait to be heard.
const BACKLOG: i32 = 4;

#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("the other daemon has ended the conversation")]
    Closed,
    #[error("the other daemon said nothing for {} s", .0.as_secs())]
    Silent(Duration),
    #[error("the other side is no root but user {uid}")]
    Foreign { uid: u32 },
    #[error(transparent)]
    Misstep(#[from] Misstep),
    #[error("the hand-over socket {path} cannot be used")]
    Socket { path: PathBuf, source: io::Error },
    /// Those that there was room for stay open unseen.
    #[error("there is no room for the descriptors that a message brings: this process has too many open")]
    NoRoom,
    #[error("the hand-over socket failed")]
    Io(#[source] io::Error),
}

/// Where a successor finds the daemon that owns the node.
#[derive(Debug)]
pub struct Door(AsyncFd<Socket>);

impl Door {
    /// Opens it in the place of an earlier daemon's. Within a tokio runtime.
    ///
    /// # Errors
    /// There can be no socket at `path`.
    pub fn open(path: &Path) -> Result<Self, LinkError> {
        let partial = path.with_extension(format!("{}.partial", std::process::id()));
        let opened = (|| {
            if let Some(folder) = path.parent() {
                fs::create_dir_all(folder)?;
            }
            let _ = fs::remove_file(&partial);
            let socket = Socket::new(Domain::UNIX, Type::SEQPACKET.nonblocking(), None)?;
            socket.bind(&SockAddr::unix(&partial)?)?;
            fs::set_permissions(&partial, fs::Permissions::from_mode(0o600))?;
            socket.listen(BACKLOG)?;
            fs::rename(&partial, path)?;
            registered(socket)
        })();
        opened.map(Self).map_err(|source| {
            let _ = fs::remove_file(&partial);
            LinkError::Socket {
                path: path.to_owned(),
                source,
            }
        })
    }

    /// The next who comes.
    ///
    /// # Errors
    /// It is not root, or accepting failed.
    pub async fn next(&self) -> Result<Link, LinkError> {
        let accepted = self.0.async_io(Interest::READABLE, Socket::accept).await;
        Link::new(accepted.map_err(LinkError::Io)?.0)
    }
}

/// One conversation.
#[derive(Debug)]
pub struct Link(AsyncFd<Socket>);

impl Link {
    /// The daemon that owns the node; `None` if none is there. Within a tokio runtime.
    ///
    /// # Errors
    /// There is something else at `path`, or somebody who is not root.
    pub fn open(path: &Path) -> Result<Option<Self>, LinkError> {
        let connected = (|| -> io::Result<_> {
            let socket = Socket::new(Domain::UNIX, Type::SEQPACKET.nonblocking(), None)?;
            socket.connect(&SockAddr::unix(path)?)?;
            Ok(socket)
        })();
        match connected {
            Ok(socket) => Self::new(socket).map(Some),
            // Nobody, or nobody any more, or too many already.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ENOENT | libc::ECONNREFUSED | libc::EAGAIN | libc::ENOTDIR)
                ) =>
            {
                Ok(None)
            }
            Err(source) => Err(LinkError::Socket {
                path: path.to_owned(),
                source,
            }),
        }
    }

    fn new(socket: Socket) -> Result<Self, LinkError> {
        let peer = getsockopt(&socket, PeerCredentials).map_err(|errno| LinkError::Io(errno.into()))?;
        if peer.uid() != 0 {
            return Err(LinkError::Foreign { uid: peer.uid() });
        }
        socket.set_nonblocking(true).map_err(LinkError::Io)?;
        registered(socket).map(Self).map_err(LinkError::Io)
    }

    /// Says one thing, with these descriptors.
    ///
    /// # Errors
    /// Nobody listens, or not within the time.
    pub async fn say(
        &self,
        word: &impl Serialize,
        descriptors: &[BorrowedFd<'_>],
        within: Duration,
    ) -> Result<(), LinkError> {
        let text = serde_json::to_vec(word).map_err(|error| Misstep::NotUnderstood { why: error.to_string() })?;
        if text.len() > LONGEST {
            return Err(Misstep::TooLong.into());
        }
        self.send(&text, descriptors, within).await
    }

    async fn send(&self, text: &[u8], descriptors: &[BorrowedFd<'_>], within: Duration) -> Result<(), LinkError> {
        let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let sent = self.0.async_io(Interest::WRITABLE, |socket| {
            let text = [IoSlice::new(text)];
            let rights = [ControlMessage::ScmRights(&raw)];
            let rights = if raw.is_empty() { &rights[..0] } else { &rights[..] };
            sendmsg::<UnixAddr>(socket.as_raw_fd(), &text, rights, MsgFlags::MSG_NOSIGNAL, None)
                .map_err(io::Error::from)
        });
        match timeout(within, sent).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(ended(error)),
            Err(_) => Err(LinkError::Silent(within)),
        }
    }

    /// The next thing that the other side says, with the descriptors that came with it.
    ///
    /// # Errors
    /// It says nothing within the time, ends, or says what is no message.
    pub async fn hear<T: DeserializeOwned>(&self, within: Duration) -> Result<(T, Vec<OwnedFd>), LinkError> {
        let (text, descriptors) =
            match timeout(within, self.0.async_io(Interest::READABLE, receive::<MOST_DESCRIPTORS>)).await {
                Ok(Ok(received)) => received?,
                Ok(Err(error)) => return Err(ended(error)),
                Err(_) => return Err(LinkError::Silent(within)),
            };
        let word = serde_json::from_slice(&text).map_err(|error| Misstep::NotUnderstood { why: error.to_string() })?;
        Ok((word, descriptors))
    }
}

fn registered(socket: Socket) -> io::Result<AsyncFd<Socket>> {
    // SAFETY: the socket owns its descriptor, and nobody gives it another one while it is registered.
    Ok(unsafe { AsyncFd::register(socket) }?)
}

type Received = Result<(Vec<u8>, Vec<OwnedFd>), LinkError>;

fn receive<const ROOM: usize>(socket: &Socket) -> io::Result<Received> {
    let mut text = vec![0; LONGEST];
    let mut space = cmsg_space!([RawFd; ROOM]);
    let mut slices = [IoSliceMut::new(&mut text)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut slices, Some(&mut space), flags)?;
    // First of all, so that they are closed whatever else is wrong.
    let mut descriptors = Vec::new();
    if let Ok(rights) = message.cmsgs() {
        for control in rights {
            if let ControlMessageOwned::ScmRights(received) = control {
                // SAFETY: the kernel has just made these descriptors for us, and nobody else knows of them.
                descriptors.extend(received.into_iter().map(|raw| unsafe { OwnedFd::from_raw_fd(raw) }));
            }
        }
    }
    let (length, flags) = (message.bytes, message.flags);
    Ok(if flags.contains(MsgFlags::MSG_CTRUNC) {
        Err(LinkError::NoRoom)
    } else if descriptors.len() > DESCRIPTORS {
        Err(Misstep::TooManyDescriptors.into())
    } else if flags.contains(MsgFlags::MSG_TRUNC) {
        Err(Misstep::TooLong.into())
    } else if length == 0 {
        Err(LinkError::Closed)
    } else {
        text.truncate(length);
        Ok((text, descriptors))
    })
}

fn ended(error: io::Error) -> LinkError {
    match error.raw_os_error() {
        Some(libc::EPIPE | libc::ECONNRESET) => LinkError::Closed,
        Some(_) | None => LinkError::Io(error),
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::protocol::{FromPredecessor, FromSuccessor, PodSockets, RoleWord},
        *,
    };
    use std::{fs::File, io::Read, io::Write, os::fd::AsFd};

    const SOON: Duration = Duration::from_secs(10);

    struct Pair {
        directory: tempfile::TempDir,
        door: Door,
    }

    impl Pair {
        fn open() -> Option<Self> {
            if !nix::unistd::geteuid().is_root() {
                eprintln!("SKIPPED: the socket is for root alone");
                return None;
            }
            let directory = tempfile::tempdir().unwrap();
            let door = Door::open(&directory.path().join("sock")).unwrap();
            Some(Self { directory, door })
        }

        fn path(&self) -> PathBuf {
            self.directory.path().join("sock")
        }

        async fn connect(&self) -> (Link, Link) {
            let near = Link::open(&self.path()).unwrap().expect("somebody is there");
            (near, self.door.next().await.unwrap())
        }
    }

    #[tokio::test]
    async fn words_come_whole_with_their_descriptors() {
        let Some(pair) = Pair::open() else { return };
        let (near, far) = pair.connect().await;
        near.say(&FromSuccessor::Take, &[], SOON).await.unwrap();
        near.say(&FromSuccessor::Served, &[], SOON).await.unwrap();
        for expected in [FromSuccessor::Take, FromSuccessor::Served] {
            let (word, descriptors) = far.hear::<FromSuccessor>(SOON).await.unwrap();
            assert_eq!(word, expected);
            assert!(descriptors.is_empty());
        }
        // Hundreds of pods, while nobody reads: the sender waits.
        let (mut reader, writer) = std::io::pipe().unwrap();
        let giving = tokio::spawn(async move {
            for namespace in 0..500 {
                let pod = FromPredecessor::Pod(PodSockets {
                    workload: "u".repeat(300),
                    namespace,
                    roles: vec![RoleWord::Hbone; DESCRIPTORS],
                });
                far.say(&pod, &[writer.as_fd(); DESCRIPTORS], SOON).await.unwrap();
            }
        });
        for expected in 0..500 {
            let (word, descriptors) = near.hear::<FromPredecessor>(SOON).await.unwrap();
            let FromPredecessor::Pod(pod) = word else {
                panic!("{word:?}")
            };
            assert_eq!((pod.namespace, descriptors.len()), (expected, DESCRIPTORS));
            if expected == 499 {
                File::from(descriptors.into_iter().next().unwrap())
                    .write_all(b"x")
                    .unwrap();
            }
        }
        giving.await.unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x", "every copy but the reader's is closed");
    }

    #[tokio::test]
    async fn what_is_no_message_is_refused_by_name() {
        let Some(pair) = Pair::open() else { return };
        let (near, far) = pair.connect().await;
        let hear = async || far.hear::<FromSuccessor>(SOON).await.unwrap_err().to_string();
        near.send(&[b' '; LONGEST + 1], &[], SOON).await.unwrap();
        assert_eq!(hear().await, "a message is longer than 4096 bytes");
        near.send(b"{\"say\":\"ta", &[], SOON).await.unwrap();
        assert!(hear().await.starts_with("a message is not understood: EOF"));
        near.send(b"{\"say\":\"sing\"}", &[], SOON).await.unwrap();
        assert!(hear().await.contains("unknown variant `sing`"));
        let socket = near.0.get_ref().as_fd();
        near.send(b"{\"say\":\"take\"}", &[socket; DESCRIPTORS + 1], SOON)
            .await
            .unwrap();
        assert_eq!(hear().await, "a message brings more than 8 descriptors");
        drop(near);
        assert!(matches!(far.hear::<FromSuccessor>(SOON).await, Err(LinkError::Closed)));
        assert!(matches!(
            far.say(&FromSuccessor::Take, &[], SOON).await,
            Err(LinkError::Closed)
        ));
    }

    #[tokio::test]
    async fn descriptors_without_room_are_no_fault_of_who_sends_them() {
        let Some(pair) = Pair::open() else { return };
        let (near, far) = pair.connect().await;
        let descriptors = [near.0.get_ref().as_fd(); DESCRIPTORS];
        near.say(&FromSuccessor::Take, &descriptors, SOON).await.unwrap();
        let heard = timeout(SOON, far.0.async_io(Interest::READABLE, receive::<1>)).await;
        let heard = heard.unwrap().unwrap();
        assert!(matches!(heard, Err(LinkError::NoRoom)), "{heard:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn silence_has_an_end() {
        let Some(pair) = Pair::open() else { return };
        let (near, _far) = pair.connect().await;
        let heard = near.hear::<FromPredecessor>(SOON).await;
        assert!(matches!(heard, Err(LinkError::Silent(SOON))));
    }

    #[tokio::test]
    async fn who_is_not_root_is_not_heard() {
        let Some(pair) = Pair::open() else { return };
        fs::set_permissions(pair.directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(pair.path(), fs::Permissions::from_mode(0o666)).unwrap();
        let path = pair.path();
        // A thread of its own, which ends as that user.
        let foreign = std::thread::spawn(move || {
            // SAFETY: the system call takes three numbers and touches no memory; it changes this thread's user alone.
            let changed = unsafe { libc::syscall(libc::SYS_setresuid, 65_534, 65_534, 65_534) };
            assert_eq!(changed, 0);
            let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None).unwrap();
            socket.connect(&SockAddr::unix(path).unwrap()).unwrap();
            socket
        });
        let socket = tokio::task::spawn_blocking(|| foreign.join().unwrap()).await.unwrap();
        assert!(matches!(
            pair.door.next().await,
            Err(LinkError::Foreign { uid: 65_534 })
        ));
        assert_eq!((&socket).read(&mut [0]).unwrap(), 0, "it is closed");
    }

    #[tokio::test]
    async fn an_empty_place_has_nobody_and_a_new_daemon_takes_an_old_ones() {
        let Some(pair) = Pair::open() else { return };
        assert!(Link::open(&pair.directory.path().join("nothing")).unwrap().is_none());
        let path = pair.path();
        drop(pair.door);
        assert!(Link::open(&path).unwrap().is_none(), "its end has left the file");
        let _next = Door::open(&path).unwrap();
        assert!(Link::open(&path).unwrap().is_some());
        let left: Vec<_> = fs::read_dir(pair.directory.path()).unwrap().collect();
        assert_eq!(left.len(), 1);
    }
}
