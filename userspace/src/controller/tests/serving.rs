//! The server's own name, bounds, start, end and absence.

use super::*;
use crate::{
    certs::{
        CertStore,
        authority::files::CA_CERT,
        channel::DialError,
        store::{CertificateStatus, StoreSettings},
    },
    testing::{eventually, refused, within},
};
use std::time::SystemTime;
use tokio::{io::AsyncReadExt as _, net::TcpStream};

#[tokio::test]
async fn the_controller_proves_itself_by_the_address_or_the_name_that_was_dialled() {
    let world = World::start().await;
    let key = DaemonKey::generate().unwrap();
    let named = |name: &str| {
        let name = Some(name.to_owned().try_into().unwrap());
        CaClient::new(CaClientSettings {
            server_name: name,
            ..world.client_settings("token-a")
        })
    };
    named("controller.warren-system.svc")
        .issue(&key, &id("web"))
        .await
        .unwrap();
    for name in ["istiod.istio-system.svc", "127.0.0.2"] {
        assert!(matches!(
            named(name).issue(&key, &id("web")).await,
            Err(IssueError::Dial(error)) if matches!(*error, DialError::Handshake { .. })
        ));
    }
    let stranger = world.dir.path().join("stranger.pem");
    let other = tempfile::tempdir().unwrap();
    Authority::open(other.path(), UnixTime::now()).unwrap();
    fs::copy(other.path().join(CA_CERT), &stranger).unwrap();
    let distrusting = CaClient::new(CaClientSettings {
        root: stranger,
        ..world.client_settings("token-a")
    });
    assert!(matches!(
        distrusting.issue(&key, &id("web")).await,
        Err(IssueError::Dial(error)) if matches!(*error, DialError::Handshake { .. })
    ));
}

#[tokio::test]
async fn a_request_beyond_its_bound_is_refused_and_the_next_one_served() {
    let world = World::start().await;
    let huge = "A".repeat(1 << 20);
    let answer = world.call(huge, text(id("web").as_str()), 0).await;
    assert_eq!(answer, Err(Code::OutOfRange));
    assert_eq!(world.issue("token-a", &id("web")).await, Ok(()));
}

#[tokio::test]
async fn a_client_that_says_nothing_is_disconnected() {
    let world = World::start().await;
    let mut silent = TcpStream::connect(world.controller.local_address()).await.unwrap();
    let read = within("it is disconnected", silent.read(&mut [0])).await;
    assert!(matches!(read, Ok(0) | Err(_)));
    assert_eq!(world.issue("token-a", &id("web")).await, Ok(()));
}

#[tokio::test]
async fn a_drained_controller_ends_all_its_tasks() {
    let world = World::start().await;
    assert_eq!(world.issue("token-a", &id("web")).await, Ok(()));
    let _silent = TcpStream::connect(world.controller.local_address()).await.unwrap();
    world.shutdown.drain(Duration::from_millis(200)).await;
    eventually("every task ended", || {
        world.shutdown.tasks().iter().all(|(_, running)| *running == 0)
    })
    .await;
    assert_eq!(world.shutdown.panics(), 0);
    refused(world.controller.local_address()).await;
}

#[tokio::test]
async fn what_cannot_work_is_said_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let (sender, _) = watch::channel(snapshot(&[], 1));
    let shutdown = Shutdown::new();
    let start = |listen: &str| {
        run(
            World::config(&dir, listen.parse().unwrap()),
            Cluster::Snapshot(sender.subscribe()),
            &shutdown,
        )
    };
    assert!(matches!(
        start("127.0.0.1:0").await,
        Err(ControllerError::Tokens { .. })
    ));
    fs::write(dir.path().join("tokens"), "").unwrap();
    assert!(matches!(
        start("192.0.2.1:1").await,
        Err(ControllerError::Listen { .. })
    ));
    fs::remove_file(dir.path().join("ca").join(CA_CERT)).unwrap();
    let error = start("127.0.0.1:0").await.unwrap_err();
    assert!(
        matches!(error, ControllerError::Authority(CaDirError::Missing { .. })),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_nodes_store_renews_from_the_controller_and_lives_through_its_absence() {
    let world = World::start().await;
    let settings = CaClientSettings {
        // Long beside what a machine may stand still.
        lifetime: Duration::from_secs(20),
        ..world.client_settings("token-a")
    };
    let store_settings = StoreSettings {
        trust_domains: vec![TrustDomain::new("cluster.local").unwrap()],
        ca_root: settings.root.clone(),
        reread: Duration::from_millis(50),
        metrics: None,
    };
    let key = DaemonKey::generate().unwrap();
    let (store, task) = CertStore::new(CaClient::new(settings), key, store_settings, std::future::pending());
    let task = tokio::spawn(task);
    store.want([id("web"), id("db")].into());
    let serial = || {
        store
            .list()
            .iter()
            .find(|line| line.name == id("web").as_str())
            .and_then(|line| line.serial.clone())
    };
    let first = store.get(&id("web")).await.unwrap();
    eventually("a renewal", || serial().is_some_and(|serial| serial != first.serial())).await;
    assert!(SystemTime::now() < first.not_after(), "renewal came too late");
    // db is not on this node: its refusal is told, and harms nobody.
    let CertificateStatus::Unavailable(why) = &store.list()[0].status else {
        panic!("issued")
    };
    assert!(why.contains("no pod on node-a has the identity"), "{why}");

    let address = world.controller.local_address();
    world.shutdown.drain(Duration::ZERO).await;
    let kept = store.get(&id("web")).await.unwrap();
    refused(address).await;
    assert_eq!(store.get(&id("web")).await.unwrap().serial(), kept.serial());

    let shutdown = Shutdown::new();
    run(
        World::config(&world.dir, address),
        Cluster::Snapshot(world.snapshot.subscribe()),
        &shutdown,
    )
    .await
    .unwrap();
    eventually("a renewal after the outage", || {
        serial().is_some_and(|serial| serial != kept.serial())
    })
    .await;
    store.get(&id("web")).await.unwrap();
    task.abort();
}
