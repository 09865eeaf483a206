//! The table of right and wrong peer certificates: each is judged by the pure function, by our server in a real TLS
//! handshake with a client that shows it, and by our client with a server that shows it.

mod cases;

use super::{
    bundle::{BundleError, Trust, TrustBundle},
    svid::Svid,
    testing::{self, Ca, DAY, careless_client, careless_server, certified, handshake, leaf_params},
    tls,
    verify::{PeerRejected, verify_peer},
};
use crate::mesh::SpiffeId;
use rcgen::{BasicConstraints, CertificateParams, CustomExtension, IsCa, KeyPair, KeyUsagePurpose as Usage, SanType};
use rustls::{AlertDescription, Error};
use rustls_pki_types::{CertificateDer, UnixTime};
use std::{sync::Arc, time::SystemTime};

const ID: &str = "spiffe://cluster.local/ns/shop/sa/web";
const SAN_OID: &[u64] = &[2, 5, 29, 17];
const EKU_OID: &[u64] = &[2, 5, 29, 37];
const NAME_CONSTRAINTS_OID: &[u64] = &[2, 5, 29, 30];

/// What should come of it: an identity, or the name of the reason.
type Verdict = Result<&'static str, &'static str>;

struct Case {
    name: &'static str,
    chain: Vec<CertificateDer<'static>>,
    key: KeyPair,
    /// Our server's verdict on a client with this chain.
    as_client: Verdict,
    /// Our client's verdict on a server with this chain, expecting [`ID`].
    as_server: Verdict,
}

struct Table {
    root: Ca,
    intermediate: Ca,
    cases: Vec<Case>,
}

impl Table {
    /// A leaf signed by the root, changed from what is right.
    fn leaf(&mut self, name: &'static str, verdict: Verdict, change: impl FnOnce(&mut CertificateParams)) {
        let mut params = leaf_params(ID);
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let chain = vec![self.root.sign(&params, &key)];
        self.chain(name, verdict, chain, key);
    }

    fn uri(&mut self, name: &'static str, reason: &'static str, uri: &str) {
        self.leaf(name, Err(reason), |leaf| leaf.subject_alt_names = vec![san(uri)]);
    }

    fn key(&mut self, name: &'static str, key: KeyPair) {
        let chain = vec![self.root.sign(&leaf_params(ID), &key)];
        self.chain(name, Ok(ID), chain, key);
    }

    /// A right leaf, signed by `issuer` and shown with `above`.
    fn below(&mut self, name: &'static str, verdict: Verdict, issuer: &Ca, above: &[&Ca]) {
        let key = KeyPair::generate().unwrap();
        let mut chain = vec![issuer.sign(&leaf_params(ID), &key)];
        chain.extend(above.iter().map(|ca| ca.der.clone()));
        self.chain(name, verdict, chain, key);
    }

    fn chain(&mut self, name: &'static str, verdict: Verdict, chain: Vec<CertificateDer<'static>>, key: KeyPair) {
        self.cases.push(Case {
            name,
            chain,
            key,
            as_client: verdict,
            as_server: verdict,
        });
    }

    /// The last case is a workload's certificate, but not of the one that the client expects.
    fn but_another_workload(&mut self) {
        self.cases.last_mut().unwrap().as_server = Err("unexpected");
    }
}

fn san(uri: &str) -> SanType {
    SanType::URI(uri.try_into().unwrap())
}

fn table() -> Table {
    let root = Ca::root("root");
    let intermediate = root.below("intermediate", |_| {});
    let mut table = Table {
        root,
        intermediate,
        cases: Vec::new(),
    };
    cases::right(&mut table);
    cases::wrong_names(&mut table);
    cases::wrong_usages(&mut table);
    cases::wrong_paths(&mut table);
    table
}

fn ours(root: &Ca, trust: &Arc<Trust>) -> Svid {
    let key = KeyPair::generate().unwrap();
    let id = SpiffeId::parse("spiffe://cluster.local/ns/ours/sa/us").unwrap();
    let chain = vec![root.sign(&leaf_params(id.as_str()), &key)];
    Svid::new(id, chain.clone(), certified(chain, &key).key.clone(), trust.clone()).unwrap()
}

fn shown(result: Result<SpiffeId, PeerRejected>) -> Result<String, &'static str> {
    result.map(|id| id.to_string()).map_err(|rejected| rejected.reason())
}

#[test]
fn every_certificate_of_the_table_gets_its_verdict_from_the_function_our_server_and_our_client() {
    let table = table();
    assert!(table.cases.len() >= 70, "{}", table.cases.len());
    let trust = testing::trust(&[&table.root], &["cluster.local", "old.example"]);
    let ours = ours(&table.root, &trust);
    let expected = SpiffeId::parse(ID).unwrap();
    let mut wrong = Vec::new();
    for case in &table.cases {
        let mut check = |side: &str, actual: Result<String, &'static str>, verdict: Verdict| {
            if actual != verdict.map(str::to_owned) {
                wrong.push(format!("{} ({side}): {actual:?}, not {verdict:?}", case.name));
            }
        };
        check(
            "function",
            shown(verify_peer(&case.chain, &trust, None, UnixTime::now())),
            case.as_client,
        );
        let told = verify_peer(&case.chain, &trust, Some(&expected), UnixTime::now());
        check("function, expecting", shown(told), case.as_server);

        let peer = certified(case.chain.clone(), &case.key);
        let (_, server) = handshake(Arc::new(careless_client(Some(peer.clone()))), ours.server_config());
        check(
            "our server",
            proven(server.map(|server| leaf_of(&server))),
            case.as_client,
        );
        let (client, _) = handshake(ours.client_config(&expected), Arc::new(careless_server(peer)));
        check(
            "our client",
            proven(client.map(|client| leaf_of(&client))),
            case.as_server,
        );
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn leaf_of<D>(connection: &rustls::ConnectionCommon<D>) -> CertificateDer<'static> {
    assert!(!connection.is_handshaking());
    connection.peer_certificates().unwrap()[0].clone()
}

fn proven(result: Result<CertificateDer<'static>, Error>) -> Result<String, &'static str> {
    match result {
        Ok(leaf) => shown(super::peer_id(&leaf)),
        Err(error) => Err(tls::rejection(&error)
            .unwrap_or_else(|| panic!("not our verifier: {error}"))
            .reason()),
    }
}

#[test]
fn a_client_without_a_certificate_is_refused() {
    let root = Ca::root("root");
    let trust = testing::trust(&[&root], &["cluster.local"]);
    assert_eq!(
        verify_peer(&[], &trust, None, UnixTime::now()),
        Err(PeerRejected::NoCertificate)
    );
    let (_, server) = handshake(Arc::new(careless_client(None)), ours(&root, &trust).server_config());
    assert_eq!(tls::rejection(&server.unwrap_err()), Some(PeerRejected::NoCertificate));
}

#[test]
fn a_peer_that_is_not_the_expected_one_is_told_certificate_unknown() {
    let root = Ca::root("root");
    let ours = ours(&root, &testing::trust(&[&root], &["cluster.local"]));
    let key = KeyPair::generate().unwrap();
    let peer = certified(
        vec![root.sign(&leaf_params("spiffe://cluster.local/ns/shop/sa/db"), &key)],
        &key,
    );
    let expected = SpiffeId::parse(ID).unwrap();
    let (client, server) = handshake(ours.client_config(&expected), Arc::new(careless_server(peer)));
    let actual = SpiffeId::parse("spiffe://cluster.local/ns/shop/sa/db").unwrap();
    assert_eq!(
        tls::rejection(&client.unwrap_err()),
        Some(PeerRejected::Unexpected { expected, actual })
    );
    assert_eq!(
        server.unwrap_err(),
        Error::AlertReceived(AlertDescription::CertificateUnknown)
    );
}

#[test]
fn verdicts_follow_the_clock_that_is_given() {
    let root = Ca::root("root");
    let trust = testing::trust(&[&root], &["cluster.local"]);
    let key = KeyPair::generate().unwrap();
    let chain = [root.sign(&leaf_params(ID), &key)];
    let at = |days: i64| {
        let now = UnixTime::now().as_secs() as i64 + days * 86_400;
        shown(verify_peer(&chain, &trust, None, super::bundle::unix_time(now)))
    };
    assert_eq!(at(0), Ok(ID.to_owned()));
    assert_eq!(at(2), Err("expired"));
    assert_eq!(at(-2), Err("not_yet_valid"));
}

#[test]
fn what_only_the_root_says_counts() {
    let expired = Ca::root_with("root", |root| root.not_after = (SystemTime::now() - DAY / 2).into());
    let key = KeyPair::generate().unwrap();
    let chain = [expired.sign(&leaf_params(ID), &key)];
    let trust = testing::trust(&[&expired], &["cluster.local"]);
    assert_eq!(
        verify_peer(&chain, &trust, None, UnixTime::now()),
        Err(PeerRejected::RootNotValid)
    );

    // The same root renewed with its key: one of the two is valid, in whatever order they stand.
    let mut params = expired.params.clone();
    params.not_after = (SystemTime::now() + DAY).into();
    let renewed: CertificateDer<'_> = params.self_signed(&expired.key).unwrap().into();
    for roots in [[expired.der.clone(), renewed.clone()], [renewed, expired.der.clone()]] {
        let bundle = TrustBundle::from_der(roots.to_vec()).unwrap();
        let trust = Trust {
            bundle,
            domains: trust.domains.clone(),
        };
        assert_eq!(
            shown(verify_peer(&chain, &trust, None, UnixTime::now())),
            Ok(ID.to_owned())
        );
    }

    let short = Ca::root_with("short", |root| root.is_ca = IsCa::Ca(BasicConstraints::Constrained(0)));
    let intermediate = short.below("too much", |_| {});
    let chain = [intermediate.sign(&leaf_params(ID), &key), intermediate.der.clone()];
    let trust = testing::trust(&[&short], &["cluster.local"]);
    assert_eq!(
        verify_peer(&chain, &trust, None, UnixTime::now()),
        Err(PeerRejected::PathLength)
    );
}

#[test]
fn a_root_that_cannot_be_one_is_refused_when_it_is_loaded() {
    let load = |change: fn(&mut CertificateParams)| TrustBundle::from_der(vec![Ca::root_with("root", change).der]);
    assert!(matches!(
        load(|root| root.is_ca = IsCa::NoCa),
        Err(BundleError::NotCa { .. })
    ));
    assert!(matches!(
        load(|root| root.key_usages = vec![Usage::CrlSign]),
        Err(BundleError::MayNotSign { .. })
    ));
    let uris = load(|root| {
        let tree = [&[0x30, 0x14, 0xa1, 0x12, 0x30, 0x10, 0x86, 0x0e][..], b".cluster.local"].concat();
        root.custom_extensions = vec![CustomExtension::from_oid_content(NAME_CONSTRAINTS_OID, tree)];
    });
    assert!(matches!(uris, Err(BundleError::UriNameConstraints { .. })), "{uris:?}");
    let dns = load(|root| {
        let tree = [&[0x30, 0x0b, 0xa0, 0x09, 0x30, 0x07, 0x82, 0x05][..], b"local"].concat();
        root.custom_extensions = vec![CustomExtension::from_oid_content(NAME_CONSTRAINTS_OID, tree)];
    });
    assert!(dns.is_ok(), "{dns:?}");
    assert!(matches!(TrustBundle::from_pem(b"no PEM"), Err(BundleError::Empty)));
    let garbage = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    assert!(matches!(
        TrustBundle::from_pem(garbage),
        Err(BundleError::Malformed { index: 0 })
    ));
}
