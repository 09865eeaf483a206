//! The controller as nodes meet it: a real server and a real client over loopback.

use super::*;
use crate::{
    certs::{
        CertStore, Trust, TrustBundle,
        authority::files::{CA_CERT, ROOT_CERT},
        channel::DialError,
        issuer::{CaClient, CaClientSettings, IssueError},
        key::DaemonKey,
        proto::IstioCertificateRequest,
        store::{CertificateStatus, Issue, StoreSettings},
        verify_peer,
    },
    mesh::{
        MeshSnapshot, SpiffeId, Workload, WorkloadUid,
        workload::{Locality, Protocol},
    },
    testing::{eventually, within},
};
use rcgen::{CertificateParams, KeyPair, SanType};
use rustls_pki_types::UnixTime;
use std::{collections::BTreeMap, fs, time::SystemTime};
use tempfile::TempDir;
use tokio::{io::AsyncReadExt, net::TcpStream, sync::watch};
use tonic::Code;

const HOUR: Duration = Duration::from_secs(3600);

fn id(account: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://cluster.local/ns/shop/sa/{account}")).unwrap()
}

fn workload(name: &str, node: &str) -> Arc<Workload> {
    Arc::new(Workload {
        uid: WorkloadUid(name.into()),
        name: name.into(),
        namespace: "shop".into(),
        identity: id(name),
        addresses: vec!["10.77.1.11".parse().unwrap()],
        locality: Locality {
            node: Some(node.into()),
            ..Locality::default()
        },
        labels: Arc::new(BTreeMap::new()),
        owner: name.into(),
        canonical_service: name.into(),
        canonical_revision: "latest".into(),
        protocol: Protocol::Hbone,
        host_network: false,
        enrolled: true,
        netns: None,
        runtime_class: None,
    })
}

fn snapshot(pods: &[(&str, &str)], version: u64) -> Arc<MeshSnapshot> {
    let mut snapshot = MeshSnapshot {
        version,
        ..MeshSnapshot::default()
    };
    for (name, node) in pods {
        snapshot.set_workload(workload(name, node));
    }
    Arc::new(snapshot)
}

/// A controller with `web` on node-a and `db` on node-b, and what its nodes need.
struct World {
    dir: TempDir,
    snapshot: watch::Sender<Arc<MeshSnapshot>>,
    shutdown: Shutdown,
    controller: Controller,
}

impl World {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("tokens"), "token-a node-a\ntoken-b node-b\n").unwrap();
        let (snapshot, _) = watch::channel(snapshot(&[("web", "node-a"), ("db", "node-b")], 1));
        let shutdown = Shutdown::new();
        let config = Self::config(&dir, "127.0.0.1:0".parse().unwrap());
        let controller = run(config, Cluster::Snapshot(snapshot.subscribe()), &shutdown)
            .await
            .unwrap();
        Self {
            dir,
            snapshot,
            shutdown,
            controller,
        }
    }

    fn config(dir: &TempDir, listen: SocketAddr) -> ControllerConfig {
        ControllerConfig {
            listen,
            root: RootPlace::Directory(dir.path().join("ca")),
            root_spread: Duration::from_secs(300),
            callers: CallerProof::Tokens(dir.path().join("tokens")),
            trust_domain: TrustDomain::new("cluster.local").unwrap(),
            server_names: vec!["controller.warren-system.svc".to_owned()],
            server_addresses: vec![],
            default_lifetime: 24 * HOUR,
            most_lifetime: 48 * HOUR,
        }
    }

    fn client_settings(&self, token: &str) -> CaClientSettings {
        let file = self.dir.path().join(format!("node-token-{token}"));
        fs::write(&file, format!("{token}\n")).unwrap();
        CaClientSettings {
            address: format!("https://{}", self.controller.local_address()).parse().unwrap(),
            server_name: None,
            root: self.dir.path().join("ca").join(ROOT_CERT),
            token: Some(file),
            cluster_id: "Kubernetes".to_owned(),
            lifetime: HOUR,
        }
    }

    fn client(&self, token: &str) -> CaClient {
        CaClient::new(self.client_settings(token))
    }

    fn trust(&self) -> Trust {
        Trust {
            bundle: TrustBundle::from_pem(&fs::read(self.dir.path().join("ca").join(ROOT_CERT)).unwrap()).unwrap(),
            domains: vec![TrustDomain::new("cluster.local").unwrap()],
        }
    }

    async fn issue(&self, token: &str, id: &SpiffeId) -> Result<(), Code> {
        let issued = self.client(token).issue(&DaemonKey::generate().unwrap(), id).await;
        issued.map(|_| ()).map_err(code)
    }

    /// A request as it is on the wire, with the token of node-a.
    async fn call(
        &self,
        csr: String,
        identity: Option<prost_types::value::Kind>,
        lifetime: i64,
    ) -> Result<Vec<String>, Code> {
        let fields = identity.map(|kind| {
            (
                "ImpersonatedIdentity".to_owned(),
                prost_types::Value { kind: Some(kind) },
            )
        });
        let metadata = Some(prost_types::Struct {
            fields: fields.into_iter().collect(),
        });
        let mut request = tonic::Request::new(IstioCertificateRequest {
            csr,
            validity_duration: lifetime,
            metadata,
        });
        request
            .metadata_mut()
            .insert("authorization", "bearer token-a".parse().unwrap());
        self.client("unused").call(request).await.map_err(code)
    }

    fn count(&self, outcome: &str) -> u64 {
        self.controller
            .outcomes()
            .iter()
            .find(|(name, _)| *name == outcome)
            .map_or(0, |(_, count)| *count)
    }
}

fn code(error: IssueError) -> Code {
    let IssueError::Refused { code, .. } = error else {
        panic!("{error:?}")
    };
    code
}

fn text(id: &str) -> Option<prost_types::value::Kind> {
    Some(prost_types::value::Kind::StringValue(id.to_owned()))
}

fn csr(uris: &[&str]) -> String {
    let mut params = CertificateParams::default();
    params.subject_alt_names = uris
        .iter()
        .map(|uri| SanType::URI((*uri).try_into().unwrap()))
        .collect();
    params
        .serialize_request(&KeyPair::generate().unwrap())
        .unwrap()
        .pem()
        .unwrap()
}

fn leaf_lifetime(chain: &[String]) -> i64 {
    let (_, pem) = x509_parser::pem::parse_x509_pem(chain[0].as_bytes()).unwrap();
    let leaf = pem.parse_x509().unwrap();
    leaf.validity().not_after.timestamp() - leaf.validity().not_before.timestamp()
}

#[tokio::test]
async fn a_node_gets_certificates_of_its_own_pods() {
    let world = World::start().await;
    let chain = world
        .client("token-a")
        .issue(&DaemonKey::generate().unwrap(), &id("web"))
        .await
        .unwrap();
    assert_eq!(chain.len(), 2, "leaf and root");
    assert_eq!(
        verify_peer(&chain, &world.trust(), Some(&id("web")), UnixTime::now()),
        Ok(id("web"))
    );
    assert_eq!(world.issue("token-b", &id("db")).await, Ok(()));
    assert_eq!(world.count("issued"), 2);
    assert!(world.controller.is_ready());
}

#[tokio::test]
async fn a_node_gets_nothing_else() {
    let world = World::start().await;
    assert_eq!(world.issue("token-c", &id("web")).await, Err(Code::Unauthenticated));
    assert_eq!(world.issue("token-b", &id("web")).await, Err(Code::PermissionDenied));
    assert_eq!(world.issue("token-a", &id("nobody")).await, Err(Code::PermissionDenied));
    let foreign = SpiffeId::parse("spiffe://evil.example/ns/shop/sa/web").unwrap();
    assert_eq!(world.issue("token-a", &foreign).await, Err(Code::PermissionDenied));
    let mut settings = world.client_settings("token-a");
    settings.token = None;
    let nobody = CaClient::new(settings)
        .issue(&DaemonKey::generate().unwrap(), &id("web"))
        .await;
    assert!(
        matches!(
            nobody,
            Err(IssueError::Refused {
                code: Code::Unauthenticated,
                ..
            })
        ),
        "{nobody:?}"
    );
    let mut outcomes = world.controller.outcomes();
    outcomes.sort();
    assert_eq!(
        outcomes,
        [
            ("no_token", 1),
            ("not_on_node", 2),
            ("trust_domain", 1),
            ("wrong_token", 1)
        ]
    );
}

#[tokio::test]
async fn the_identity_is_the_impersonated_one_or_the_only_uri_of_the_request() {
    let world = World::start().await;
    let (web, db) = (id("web"), id("db"));
    assert!(world.call(csr(&[web.as_str()]), None, 0).await.is_ok());
    // What the request names does not matter beside the metadata, and never reaches the certificate.
    let chain = world.call(csr(&[db.as_str()]), text(web.as_str()), 0).await.unwrap();
    let (_, pem) = x509_parser::pem::parse_x509_pem(chain[0].as_bytes()).unwrap();
    assert_eq!(crate::certs::peer_id(&pem.contents.into()), Ok(web.clone()));
    assert_eq!(
        world.call(csr(&[web.as_str()]), text(db.as_str()), 0).await,
        Err(Code::PermissionDenied)
    );
    assert_eq!(
        world.call(csr(&[db.as_str()]), None, 0).await,
        Err(Code::PermissionDenied)
    );
    for (uris, identity) in [
        (vec![], None),
        (vec![web.as_str(), db.as_str()], None),
        (vec![web.as_str()], Some(prost_types::value::Kind::NumberValue(1.0))),
        (vec![web.as_str()], text("")),
        (vec![], text("spiffe://cluster.local/ns/../sa/web")),
        (vec![], text("cluster.local/ns/shop/sa/web")),
    ] {
        let answer = world.call(csr(&uris), identity.clone(), 0).await;
        assert_eq!(answer, Err(Code::InvalidArgument), "{uris:?} {identity:?}");
    }
    assert_eq!((world.count("no_identity"), world.count("identity_form")), (3, 3));
}

#[tokio::test]
async fn a_request_that_proves_no_key_is_refused() {
    let world = World::start().await;
    let good = csr(&[]);
    // The last base64 quartet belongs to the signature.
    let at = good.rfind("\n-----END").unwrap() - 6;
    let other = if &good[at..=at] == "A" { "B" } else { "A" };
    let broken = format!("{}{other}{}", &good[..at], &good[at + 1..]);
    for csr in [
        "garbage".to_owned(),
        String::new(),
        broken,
        good.replace("REQUEST", "NONSENSE"),
    ] {
        assert_eq!(
            world.call(csr, text(id("web").as_str()), 0).await,
            Err(Code::InvalidArgument)
        );
    }
    assert_eq!(world.count("request"), 4);
}

#[tokio::test]
async fn the_lifetime_is_the_nodes_wish_within_the_controllers_maximum() {
    let world = World::start().await;
    for (wish, given) in [(0, 24 * 3600), (60, 60), (7200, 7200), (i64::MAX, 48 * 3600)] {
        let chain = world.call(csr(&[]), text(id("web").as_str()), wish).await.unwrap();
        let lifetime = leaf_lifetime(&chain);
        // It is dated back by two minutes, for clocks that differ; and a second may begin in between.
        assert!((given + 119..=given + 121).contains(&lifetime), "{wish}: {lifetime}");
    }
    assert_eq!(
        world.call(csr(&[]), text(id("web").as_str()), -1).await,
        Err(Code::InvalidArgument)
    );
}

#[tokio::test]
async fn nothing_is_signed_before_the_state_of_the_cluster_is_known_or_after_the_pod_has_gone() {
    let world = World::start().await;
    world.snapshot.send_replace(Arc::new(MeshSnapshot::default()));
    assert!(!world.controller.is_ready());
    assert_eq!(world.issue("token-a", &id("web")).await, Err(Code::Unavailable));
    world.snapshot.send_replace(snapshot(&[("web", "node-b")], 2));
    assert_eq!(world.issue("token-a", &id("web")).await, Err(Code::PermissionDenied));
    assert_eq!(world.issue("token-b", &id("web")).await, Ok(()));
}

#[tokio::test]
async fn a_pod_that_becomes_known_a_moment_later_gets_its_certificate_at_once() {
    let world = World::start().await;
    world.snapshot.send_replace(snapshot(&[], 2));
    let late = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        world.snapshot.send_replace(snapshot(&[("web", "node-a")], 3));
    };
    let web = id("web");
    let (issued, ()) = tokio::join!(world.issue("token-a", &web), late);
    assert_eq!(issued, Ok(()));
    assert_eq!(world.count("not_on_node"), 0);
}

#[tokio::test]
async fn a_changed_token_file_counts_for_the_next_request() {
    let world = World::start().await;
    let file = world.dir.path().join("tokens");
    assert_eq!(world.issue("token-a", &id("web")).await, Ok(()));
    fs::write(&file, "token-A node-a\nmalformed\n").unwrap();
    assert_eq!(world.issue("token-a", &id("web")).await, Err(Code::Unauthenticated));
    assert_eq!(world.issue("token-A", &id("web")).await, Ok(()));
    fs::remove_file(&file).unwrap();
    assert_eq!(world.issue("token-A", &id("web")).await, Err(Code::Unavailable));
    fs::write(&file, "token-a node-a").unwrap();
    assert_eq!(world.issue("token-a", &id("web")).await, Ok(()));
}

#[tokio::test]
async fn a_node_reads_its_own_token_file_anew() {
    let world = World::start().await;
    let settings = world.client_settings("wrong");
    let (file, client, key) = (
        settings.token.clone().unwrap(),
        CaClient::new(settings),
        DaemonKey::generate().unwrap(),
    );
    assert!(client.issue(&key, &id("web")).await.is_err());
    fs::write(&file, "token-a").unwrap();
    client.issue(&key, &id("web")).await.unwrap();
    for malformed in ["", "\n", "two words", "töken"] {
        fs::write(&file, malformed).unwrap();
        assert!(
            matches!(client.issue(&key, &id("web")).await, Err(IssueError::TokenForm { .. })),
            "{malformed:?}"
        );
    }
}

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
    assert!(TcpStream::connect(world.controller.local_address()).await.is_err());
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
    assert!(TcpStream::connect(address).await.is_err());
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
