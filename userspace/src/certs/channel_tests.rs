//! The client of the CA against servers that count its connections, break them, keep silent and refuse.

use super::{
    Authority,
    authority::files::pem,
    channel::{Channels, DialError, Server},
    counting_ca::{Ca, Conduct, HOUR, id},
    issuer::{CaClient, CaClientSettings, IssueError},
    key::DaemonKey,
    store::Issue,
};
use crate::{
    telemetry::CaOutcome,
    testing::{eventually, within},
};
use futures::{FutureExt, future::join_all};
use rustls_pki_types::UnixTime;
use std::{fs, path::PathBuf, sync::Arc, time::Duration};
use tempfile::TempDir;
use tokio::{
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tonic::Code;

/// A CA, and a client of it whose channels are offered for so long.
struct World {
    authority: Arc<Authority>,
    ca: Ca,
    client: CaClient,
    root: PathBuf,
    _dir: TempDir,
}

fn root_of(authority: &Authority) -> String {
    pem("CERTIFICATE", &authority.bundle().roots()[0].der)
}

impl World {
    async fn start(offered: Duration) -> Self {
        let authority = Arc::new(Authority::generate(UnixTime::now()).unwrap());
        let ca = Ca::start(&authority, "127.0.0.1:0").await;
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root-cert.pem");
        fs::write(&root, root_of(&authority)).unwrap();
        let settings = CaClientSettings {
            address: format!("https://{}", ca.address).parse().unwrap(),
            server_name: None,
            root: root.clone(),
            token: None,
            cluster_id: "Kubernetes".to_owned(),
            lifetime: HOUR,
        };
        Self {
            authority,
            ca,
            client: CaClient::with_times(settings, offered, Duration::from_secs(2)),
            root,
            _dir: dir,
        }
    }

    async fn issue(&self) -> Result<(), IssueError> {
        let issued = self.client.issue(&DaemonKey::generate().unwrap(), &id()).await;
        issued.map(|chain| assert_eq!(chain.len(), 2, "leaf and root"))
    }

    fn now(&self, conduct: Conduct) {
        self.ca.conduct.send_replace(conduct);
    }
}

#[tokio::test]
async fn calls_that_come_close_together_share_one_connection() {
    let world = World::start(HOUR).await;
    for answer in join_all((0..50).map(|_| world.issue())).await {
        answer.unwrap();
    }
    world.issue().await.unwrap();
    assert_eq!((world.ca.counts().accepted, world.ca.counts().asked), (1, 51));
    drop(world.client);
    let seen = world.ca.seen;
    eventually("the connection ends with its client", || seen.counts().ended == 1).await;
}

#[tokio::test]
async fn a_channel_is_offered_for_a_while_and_ends_after_its_last_call() {
    let world = World::start(Duration::from_millis(50)).await;
    world.now(Conduct::Silence);
    let mut long = Box::pin(world.issue());
    tokio::select! {
        answer = &mut long => panic!("answered: {answer:?}"),
        () = eventually("the call is under way", || world.ca.counts().asked == 1) => {}
    }
    let mut others = Vec::new();
    within("the first channel is no longer offered", async {
        while world.ca.counts().accepted < 2 {
            let mut other = Box::pin(world.issue());
            assert!(timeout(Duration::from_millis(10), &mut other).await.is_err());
            others.push(other);
        }
    })
    .await;
    assert_eq!(world.ca.counts().ended, 0, "closed in the middle of a call");
    world.now(Conduct::Sign);
    long.await.unwrap();
    for answer in join_all(others).await {
        answer.unwrap();
    }
    eventually("what is no longer offered is closed", || {
        world.ca.counts().ended == world.ca.counts().accepted
    })
    .await;
}

#[tokio::test]
async fn a_ca_that_closes_its_connections_or_starts_anew_between_two_calls_is_not_noticed() {
    let mut world = World::start(HOUR).await;
    world.issue().await.unwrap();
    world.ca.goodbye.cancel();
    world.issue().await.unwrap();
    let address = world.ca.address.to_string();
    drop(world.ca);
    let gone = async { while TcpStream::connect(&address).await.is_ok() {} };
    within("the CA is gone", gone).await;
    world.ca = Ca::start(&world.authority, &address).await;
    world.issue().await.unwrap();
    assert_eq!(world.ca.counts().accepted, 1);
}

#[tokio::test]
async fn a_call_that_is_lost_with_a_connection_which_it_found_open_is_made_once_more() {
    for (lost, asked) in [(Conduct::BreakBelow(1), 3), (Conduct::ResetBelow(1), 2)] {
        let world = World::start(HOUR).await;
        world.issue().await.unwrap();
        world.now(lost);
        world.issue().await.unwrap();
        let counts = world.ca.counts();
        assert_eq!((counts.accepted, counts.asked), (2, asked), "{lost:?}");
    }
}

#[tokio::test]
async fn a_call_that_loses_its_own_connection_or_a_second_one_fails_by_name() {
    let world = World::start(HOUR).await;
    world.issue().await.unwrap();
    world.now(Conduct::BreakBelow(usize::MAX));
    let broken = world.issue().await.unwrap_err();
    assert!(matches!(broken, IssueError::Broken { .. }), "{broken:?}");
    assert_eq!(CaClient::outcome(&broken), CaOutcome::Unavailable);
    assert_eq!((world.ca.counts().accepted, world.ca.counts().asked), (2, 3));
    let broken = world.issue().await.unwrap_err();
    assert!(matches!(broken, IssueError::Broken { .. }), "{broken:?}");
    assert_eq!((world.ca.counts().accepted, world.ca.counts().asked), (3, 4));
}

#[tokio::test]
async fn what_the_ca_refuses_is_asked_once_and_harms_no_other_call() {
    let world = World::start(HOUR).await;
    world.issue().await.unwrap();
    world.now(Conduct::Refuse);
    let refused = world.issue().await.unwrap_err();
    assert!(
        matches!(
            refused,
            IssueError::Refused {
                code: Code::PermissionDenied,
                ..
            }
        ),
        "{refused:?}"
    );
    assert_eq!(CaClient::outcome(&refused), CaOutcome::Refused);
    world.now(Conduct::Sign);
    world.issue().await.unwrap();
    assert_eq!((world.ca.counts().accepted, world.ca.counts().asked), (1, 3));
}

#[tokio::test]
async fn a_channel_on_which_the_ca_kept_silent_is_offered_no_more() {
    let world = World::start(HOUR).await;
    world.issue().await.unwrap();
    world.now(Conduct::Silence);
    let silent = world.issue().await.unwrap_err();
    assert!(matches!(silent, IssueError::Deadline), "{silent:?}");
    assert_eq!((world.ca.counts().accepted, world.ca.counts().asked), (1, 2));
    world.now(Conduct::Sign);
    world.issue().await.unwrap();
    assert_eq!(world.ca.counts().accepted, 2);
}

#[tokio::test]
async fn under_a_changed_root_file_no_channel_of_before_is_used() {
    let world = World::start(HOUR).await;
    world.issue().await.unwrap();
    let (ours, theirs) = (
        root_of(&world.authority),
        root_of(&Authority::generate(UnixTime::now()).unwrap()),
    );
    fs::write(&world.root, format!("{ours}{theirs}")).unwrap();
    world.issue().await.unwrap();
    assert_eq!(world.ca.counts().accepted, 2);
    for (root, is_named) in [
        (
            theirs.as_str(),
            (|error| matches!(error, DialError::Handshake { .. })) as fn(&DialError) -> bool,
        ),
        ("nonsense", |error| matches!(error, DialError::RootForm { .. })),
    ] {
        fs::write(&world.root, root).unwrap();
        let error = world.issue().await.unwrap_err();
        assert!(
            matches!(&error, IssueError::Dial(error) if is_named(error)),
            "{error:?}"
        );
        assert_eq!(CaClient::outcome(&error), CaOutcome::Unavailable);
    }
    fs::remove_file(&world.root).unwrap();
    assert!(matches!(world.issue().await, Err(IssueError::Root { .. })));
    assert_eq!(world.ca.counts().asked, 2);
}

#[tokio::test]
async fn who_waits_for_one_attempt_shares_its_failure_and_the_next_one_dials_anew() {
    let authority = Authority::generate(UnixTime::now()).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (root, channels) = (
        root_of(&authority),
        Channels::new(Server {
            host: address.ip().to_string(),
            port: address.port(),
            name: address.ip().into(),
            root: "root-cert.pem".into(),
        }),
    );
    let mut waiting: Vec<_> = (0..16).map(|_| Box::pin(channels.get(root.as_bytes()))).collect();
    assert!(waiting.iter_mut().all(|get| get.now_or_never().is_none()));
    drop(listener.accept().await.unwrap());
    let errors = join_all(waiting).await.into_iter().map(|got| got.err().unwrap());
    let errors: Vec<_> = errors.collect();
    assert!(matches!(*errors[0], DialError::Handshake { .. }), "{:?}", errors[0]);
    assert!(errors.iter().all(|error| Arc::ptr_eq(error, &errors[0])));
    assert!(listener.accept().now_or_never().is_none(), "dialled more than once");

    let accepted = listener.accept().map(|accepted| drop(accepted.unwrap()));
    let (next, ()) = tokio::join!(channels.get(root.as_bytes()), within("somebody dials", accepted));
    assert!(!Arc::ptr_eq(&next.err().unwrap(), &errors[0]));
}
