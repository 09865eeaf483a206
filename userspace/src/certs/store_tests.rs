//! The store against a CA that can be taken away, changed and made to lie.

use super::{
    Authority,
    authority::files::pem,
    keeper::Keeper,
    key::DaemonKey,
    store::{CertError, CertStore, CertificateKind, CertificateStatus, FetchError, Issue, Published, StoreSettings},
    verify::PeerRejected,
};
use crate::{
    mesh::{SpiffeId, TrustDomain},
    telemetry::CaOutcome,
    testing::{DEADLINE, eventually},
};
use rustls_pki_types::{CertificateDer, UnixTime};
use std::{
    collections::BTreeSet,
    fs,
    future::pending,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};
use tempfile::TempDir;
use tokio::sync::watch;

/// What certificates live that are to be renewed or to expire within a test: long beside what a machine may stand still.
const SHORT_LIFE: Duration = Duration::from_secs(20);

#[derive(Debug, thiserror::Error)]
#[error("the CA is away")]
struct Away;

/// What the fake CA does next.
struct Behaviour {
    authority: Option<Arc<Authority>>,
    lifetime: Duration,
    /// Signs for this identity whatever is asked.
    lie: Option<SpiffeId>,
}

#[derive(Clone)]
struct FakeCa {
    behaviour: Arc<Mutex<Behaviour>>,
    asked: Arc<AtomicUsize>,
}

impl Issue for FakeCa {
    type Error = Away;

    async fn issue(&self, key: &DaemonKey, id: &SpiffeId) -> Result<Vec<CertificateDer<'static>>, Away> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let behaviour = self.behaviour.lock().unwrap();
        let authority = behaviour.authority.as_ref().ok_or(Away)?;
        let id = behaviour.lie.as_ref().unwrap_or(id);
        let signed = authority
            .sign(&key.request(id).unwrap(), id, behaviour.lifetime, UnixTime::now())
            .unwrap();
        let roots = authority.bundle().roots().iter().map(|root| root.der.clone());
        Ok(signed.chain.into_iter().chain(roots).collect())
    }

    fn outcome(_: &Away) -> CaOutcome {
        CaOutcome::Unavailable
    }
}

/// A store whose task runs as long as this lives.
struct Node {
    store: CertStore,
    ca: FakeCa,
    root: PathBuf,
    _dir: TempDir,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn settings(ca_root: PathBuf) -> StoreSettings {
    let trust_domains = vec![TrustDomain::new("cluster.local").unwrap()];
    StoreSettings {
        trust_domains,
        ca_root,
        reread: Duration::from_millis(20),
        metrics: None,
    }
}

fn new_ca() -> Arc<Authority> {
    Arc::new(Authority::generate(UnixTime::now()).unwrap())
}

fn root_pem(authorities: &[&Authority]) -> String {
    authorities
        .iter()
        .map(|authority| pem("CERTIFICATE", &authority.bundle().roots()[0].der))
        .collect()
}

impl Node {
    fn start(lifetime: Duration) -> Self {
        let authority = new_ca();
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root-cert.pem");
        fs::write(&root, root_pem(&[&authority])).unwrap();
        let behaviour = Behaviour {
            authority: Some(authority),
            lifetime,
            lie: None,
        };
        let ca = FakeCa {
            behaviour: Arc::new(Mutex::new(behaviour)),
            asked: Arc::default(),
        };
        let key = DaemonKey::generate().unwrap();
        let (mut store, task) = CertStore::new(ca.clone(), key, settings(root.clone()), pending());
        store.be_patient_for(DEADLINE);
        Self {
            store,
            ca,
            root,
            _dir: dir,
            task: tokio::spawn(task),
        }
    }

    fn behave(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.ca.behaviour.lock().unwrap());
    }

    fn ca_gone(&self) -> Option<Arc<Authority>> {
        self.ca.behaviour.lock().unwrap().authority.take()
    }

    async fn serial(&self, id: &SpiffeId) -> String {
        self.store.get(id).await.unwrap().serial().to_owned()
    }
}

fn id(account: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://cluster.local/ns/shop/sa/{account}")).unwrap()
}

fn ids(accounts: &[&str]) -> BTreeSet<SpiffeId> {
    accounts.iter().map(|account| id(account)).collect()
}

#[tokio::test]
async fn a_wanted_identity_gets_its_certificate_and_is_listed_with_its_root() {
    let node = Node::start(Duration::from_secs(3600));
    node.store.want(ids(&["web", "db"]));
    let svid = node.store.get(&id("web")).await.unwrap();
    assert_eq!((svid.id(), svid.chain().len()), (&id("web"), 1));
    node.store.get(&id("db")).await.unwrap();
    let list = node.store.list();
    let lines: Vec<_> = list
        .iter()
        .map(|line| (line.name.as_str(), line.kind, &line.status, line.valid))
        .collect();
    let ok = &CertificateStatus::Available;
    assert_eq!(lines[0], (id("db").as_str(), CertificateKind::Leaf, ok, true));
    assert_eq!(lines[1], (id("web").as_str(), CertificateKind::Leaf, ok, true));
    assert!(lines[2].0.starts_with("CN=Warren CA") && lines[2].1 == CertificateKind::Root && lines.len() == 3);
    assert_eq!(list[1].serial.as_deref(), Some(svid.serial()));
    assert_eq!(list[1].not_after, Some(svid.not_after()));
    assert!(list[1].not_before.unwrap() < SystemTime::now());
}

#[tokio::test]
async fn a_connection_waits_for_a_certificate_that_is_on_its_way() {
    let node = Node::start(Duration::from_secs(3600));
    let authority = node.ca_gone();
    let (store, asked) = (node.store.clone(), id("web"));
    let waiting = tokio::spawn(async move { store.get(&asked).await.map(|svid| svid.id().clone()) });
    node.store.want(ids(&["web"]));
    eventually("the CA was asked", || node.ca.asked.load(Ordering::SeqCst) > 0).await;
    assert!(!waiting.is_finished());
    node.behave(|ca| ca.authority = authority);
    assert_eq!(waiting.await.unwrap().unwrap(), id("web"));
}

#[tokio::test]
async fn an_identity_nobody_wants_has_no_certificate_and_what_is_dropped_is_gone() {
    let mut node = Node::start(Duration::from_secs(3600));
    node.store.want(ids(&["web"]));
    node.store.get(&id("web")).await.unwrap();
    node.store.be_patient_for(Duration::from_millis(50));
    assert!(matches!(
        node.store.get(&id("db")).await,
        Err(CertError::NotWanted { .. })
    ));
    node.store.want(ids(&[]));
    eventually("the certificate is gone", || node.store.list().len() == 1).await;
    assert!(matches!(
        node.store.get(&id("web")).await,
        Err(CertError::NotWanted { .. })
    ));
}

#[tokio::test]
async fn a_certificate_is_renewed_before_it_expires_without_a_gap() {
    let node = Node::start(SHORT_LIFE);
    node.store.want(ids(&["web"]));
    let first = node.store.get(&id("web")).await.unwrap();
    let second = loop {
        let svid = node.store.get(&id("web")).await.unwrap();
        assert!(SystemTime::now() <= svid.not_after());
        if svid.serial() != first.serial() {
            break svid;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    assert!(SystemTime::now() < first.not_after(), "renewal came too late");
    assert!(second.not_after() > first.not_after());
}

#[tokio::test]
async fn a_certificate_is_kept_while_valid_when_the_ca_is_away_and_never_after() {
    let mut node = Node::start(SHORT_LIFE);
    node.store.want(ids(&["web"]));
    let first = node.serial(&id("web")).await;
    let authority = node.ca_gone();
    let asked = node.ca.asked.load(Ordering::SeqCst);
    eventually("renewal was tried", || node.ca.asked.load(Ordering::SeqCst) > asked).await;
    assert_eq!(node.serial(&id("web")).await, first);
    let line = &node.store.list()[0];
    assert_eq!((&line.status, line.valid), (&CertificateStatus::Available, true));

    eventually("it expired", || !node.store.list()[0].valid).await;
    node.store.be_patient_for(Duration::from_millis(50));
    let error = node.store.get(&id("web")).await.unwrap_err();
    assert!(matches!(&error, CertError::Unavailable { source, .. } if matches!(**source, FetchError::Issue { .. })));
    let CertificateStatus::Unavailable(why) = &node.store.list()[0].status else {
        panic!("available")
    };
    assert_eq!(why, "the CA did not issue it: the CA is away");
    let tries = node.ca.asked.load(Ordering::SeqCst) - asked;
    assert!(tries < 10, "{tries} tries in half a life are no back-off");

    node.behave(|ca| ca.authority = authority);
    node.store.be_patient_for(DEADLINE);
    assert_ne!(node.serial(&id("web")).await, first);
}

#[tokio::test]
async fn what_peers_would_refuse_is_never_used() {
    let mut node = Node::start(Duration::from_secs(3600));
    node.behave(|ca| ca.lie = Some(id("db")));
    node.store.want(ids(&["web"]));
    node.store.be_patient_for(Duration::from_millis(300));
    let Err(CertError::Unavailable { source, .. }) = node.store.get(&id("web")).await else {
        panic!("used")
    };
    assert!(
        matches!(&*source, FetchError::Unacceptable(PeerRejected::Unexpected { .. })),
        "{source:?}"
    );

    node.behave(|ca| {
        ca.lie = None;
        ca.authority = Some(new_ca());
    });
    eventually("the stranger's certificate is refused", || {
        let CertificateStatus::Unavailable(why) = &node.store.list()[0].status else {
            return false;
        };
        why.contains("no root of the trust bundle vouches for it")
    })
    .await;
}

#[tokio::test]
async fn a_new_trust_bundle_counts_at_once() {
    let node = Node::start(Duration::from_secs(3600));
    node.store.want(ids(&["web"]));
    let first = node.store.get(&id("web")).await.unwrap();
    let client = first.client_config(&id("db"));

    let (old, new) = (node.ca.behaviour.lock().unwrap().authority.clone().unwrap(), new_ca());
    fs::write(&node.root, root_pem(&[&old, &new])).unwrap();
    eventually("both roots are trusted", || {
        node.store.trust().unwrap().bundle.roots().len() == 2
    })
    .await;
    let second = node.store.get(&id("web")).await.unwrap();
    assert_eq!(second.serial(), first.serial(), "the certificate is still good");
    assert!(
        !Arc::ptr_eq(&client, &second.client_config(&id("db"))),
        "a configuration outlived its bundle"
    );
    assert_eq!(second.trust().bundle.roots().len(), 2);

    node.behave(|ca| ca.authority = Some(new.clone()));
    fs::write(&node.root, root_pem(&[&new])).unwrap();
    eventually("a certificate of the new CA", || {
        let trust = node.store.trust().unwrap();
        trust.bundle.roots().len() == 1 && trust.bundle.holds(&new.bundle().roots()[0].der)
    })
    .await;
    let serial = first.serial().to_owned();
    eventually("the certificate is renewed", || {
        node.store.list()[0].serial.as_deref().is_some_and(|now| now != serial)
    })
    .await;
}

#[tokio::test]
async fn a_broken_trust_bundle_changes_nothing() {
    let node = Node::start(Duration::from_secs(3600));
    let (publish, _published) = watch::channel(Published::default());
    let (trusting, trusted) = watch::channel(None);
    let (_wanted, wants) = watch::channel(BTreeSet::new());
    let key = DaemonKey::generate().unwrap();
    let settings = settings(node.root.clone());
    let mut keeper = Keeper::new(node.ca.clone(), key, settings, wants, publish, trusting);
    keeper.reread_bundle().await;
    let good = trusted.borrow().clone().unwrap();
    for broken in [
        "",
        "broken",
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    ] {
        fs::write(&node.root, broken).unwrap();
        keeper.reread_bundle().await;
        assert!(Arc::ptr_eq(trusted.borrow().as_ref().unwrap(), &good));
    }
    fs::remove_file(&node.root).unwrap();
    keeper.reread_bundle().await;
    assert!(Arc::ptr_eq(trusted.borrow().as_ref().unwrap(), &good));
    fs::write(&node.root, root_pem(&[&new_ca()])).unwrap();
    keeper.reread_bundle().await;
    assert!(!Arc::ptr_eq(trusted.borrow().as_ref().unwrap(), &good));
}

#[tokio::test]
async fn without_a_trust_bundle_the_ca_is_not_asked_and_the_reason_is_told() {
    let mut node = Node::start(Duration::from_secs(3600));
    let bundle = fs::read(&node.root).unwrap();
    fs::remove_file(&node.root).unwrap();
    node.task.abort();
    let node = {
        let key = DaemonKey::generate().unwrap();
        let (store, task) = CertStore::new(node.ca.clone(), key, settings(node.root.clone()), pending());
        node.store = store;
        node.task = tokio::spawn(task);
        node
    };
    node.store.want(ids(&["web"]));
    eventually("the reason is told", || {
        node.store
            .list()
            .first()
            .is_some_and(|line| matches!(&line.status, CertificateStatus::Unavailable(_)))
    })
    .await;
    let mut store = node.store.clone();
    store.be_patient_for(Duration::from_millis(50));
    let Err(CertError::Unavailable { source, .. }) = store.get(&id("web")).await else {
        panic!("issued")
    };
    assert!(matches!(&*source, FetchError::NoTrust { .. }));
    assert_eq!(node.ca.asked.load(Ordering::SeqCst), 0);
    fs::write(&node.root, bundle).unwrap();
    node.store.get(&id("web")).await.unwrap();
}

#[tokio::test]
async fn hundreds_of_identities_are_fetched_with_few_requests_at_once() {
    let node = Node::start(Duration::from_secs(3600));
    let names: Vec<_> = (0..300).map(|n| format!("account-{n}")).collect();
    let wanted: BTreeSet<_> = names.iter().map(|name| id(name)).collect();
    node.store.want(wanted.clone());
    for id in &wanted {
        node.store.get(id).await.unwrap();
    }
    assert_eq!(node.ca.asked.load(Ordering::SeqCst), 300);
}

#[tokio::test]
async fn when_the_task_has_ended_waiting_ends_too() {
    let node = Node::start(Duration::from_secs(3600));
    node.task.abort();
    eventually("the task ended", || node.task.is_finished()).await;
    assert!(matches!(node.store.get(&id("web")).await, Err(CertError::Closed)));
}
