//! The table of right and wrong peer certificates: each is judged by the pure function, by our server in a real TLS
//! handshake with a client that shows it, and by our client with a server that shows it.

use super::{
    bundle::{BundleError, Trust, TrustBundle},
    svid::Svid,
    testing::{self, Ca, DAY, careless_client, careless_server, certified, handshake, leaf_params},
    tls,
    verify::{PeerRejected, verify_peer},
};
use crate::mesh::SpiffeId;
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DnType, ExtendedKeyUsagePurpose as Purpose, IsCa, KeyPair,
    KeyUsagePurpose as Usage, RsaKeySize, SanType,
};
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

/// A subjectAltName extension with these general names, written as they are.
fn raw_san(names: &[(u8, &[u8])]) -> CustomExtension {
    let mut content = Vec::new();
    for (tag, value) in names {
        content.extend([*tag, value.len() as u8]);
        content.extend_from_slice(value);
    }
    let mut sequence = vec![0x30, content.len() as u8];
    sequence.extend(content);
    let mut extension = CustomExtension::from_oid_content(SAN_OID, sequence);
    extension.set_criticality(true);
    extension
}

fn table() -> Table {
    let root = Ca::root("root");
    let intermediate = root.below("intermediate", |_| {});
    let mut table = Table {
        root,
        intermediate,
        cases: Vec::new(),
    };
    right(&mut table);
    wrong_names(&mut table);
    wrong_usages(&mut table);
    wrong_paths(&mut table);
    table
}

fn right(t: &mut Table) {
    t.leaf("as it should be", Ok(ID), |_| {});
    t.leaf("no extended key usage", Ok(ID), |leaf| leaf.extended_key_usages.clear());
    t.leaf("a third purpose beside", Ok(ID), |leaf| {
        leaf.extended_key_usages.push(Purpose::CodeSigning)
    });
    t.leaf("keyEncipherment beside", Ok(ID), |leaf| {
        leaf.key_usages.push(Usage::KeyEncipherment)
    });
    t.leaf("no basic constraints", Ok(ID), |leaf| leaf.is_ca = IsCa::NoCa);
    t.leaf("a subject", Ok(ID), |leaf| {
        leaf.distinguished_name.push(DnType::CommonName, "web")
    });
    t.leaf("a DNS name beside", Ok(ID), |leaf| {
        leaf.subject_alt_names
            .push(SanType::DnsName("web.shop".try_into().unwrap()));
    });
    t.leaf("an IP address beside", Ok(ID), |leaf| {
        leaf.subject_alt_names
            .push(SanType::IpAddress("10.0.0.1".parse().unwrap()));
    });
    t.leaf("an e-mail address beside", Ok(ID), |leaf| {
        leaf.subject_alt_names
            .insert(0, SanType::Rfc822Name("web@shop".try_into().unwrap()));
    });
    const OTHER: &str = "spiffe://cluster.local/ns/shop/sa/db";
    t.leaf("another workload", Ok(OTHER), |leaf| {
        leaf.subject_alt_names = vec![san(OTHER)]
    });
    t.but_another_workload();
    const ALIAS: &str = "spiffe://old.example/ns/shop/sa/web";
    t.leaf("an alias of the trust domain", Ok(ALIAS), |leaf| {
        leaf.subject_alt_names = vec![san(ALIAS)]
    });
    t.but_another_workload();
    t.key(
        "ECDSA P-384",
        KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap(),
    );
    t.key("Ed25519", KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap());
    t.key(
        "RSA 2048",
        KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, RsaKeySize::_2048).unwrap(),
    );

    let key = KeyPair::generate().unwrap();
    let leaf = t.intermediate.sign(&leaf_params(ID), &key);
    let chain = vec![leaf, t.intermediate.der.clone()];
    t.chain("below an intermediate", Ok(ID), chain.clone(), key);
    let key = KeyPair::generate().unwrap();
    let leaf = t.intermediate.sign(&leaf_params(ID), &key);
    let chain = vec![leaf, t.root.der.clone(), t.intermediate.der.clone()];
    t.chain("the root in the chain, out of order", Ok(ID), chain, key);
    let both = t.root.below("both purposes", |ca| {
        ca.extended_key_usages = vec![Purpose::ServerAuth, Purpose::ClientAuth]
    });
    t.below("an intermediate for both purposes", Ok(ID), &both, &[&both]);
    let any = t
        .root
        .below("any purpose", |ca| ca.extended_key_usages = vec![Purpose::Any]);
    t.below("an intermediate for any purpose", Ok(ID), &any, &[&any]);
    let narrow = t
        .root
        .below("narrow", |ca| ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0)));
    t.below("path length 0 above a leaf", Ok(ID), &narrow, &[&narrow]);
}

fn wrong_names(t: &mut Table) {
    t.leaf("no names", Err("no_uri"), |leaf| leaf.subject_alt_names.clear());
    t.leaf("a DNS name alone", Err("no_uri"), |leaf| {
        leaf.subject_alt_names = vec![SanType::DnsName("web.shop".try_into().unwrap())];
    });
    t.leaf("an IP address alone", Err("no_uri"), |leaf| {
        leaf.subject_alt_names = vec![SanType::IpAddress("10.0.0.1".parse().unwrap())];
    });
    t.leaf("an e-mail address alone", Err("no_uri"), |leaf| {
        leaf.subject_alt_names = vec![SanType::Rfc822Name("web@shop".try_into().unwrap())];
    });
    t.leaf("a DNS name that looks like an ID", Err("no_uri"), |leaf| {
        leaf.subject_alt_names = vec![SanType::DnsName(ID.try_into().unwrap())];
    });
    t.leaf("the ID as common name", Err("no_uri"), |leaf| {
        leaf.subject_alt_names.clear();
        leaf.distinguished_name.push(DnType::CommonName, ID);
    });
    t.leaf("two IDs", Err("several_uris"), |leaf| {
        leaf.subject_alt_names.push(san("spiffe://cluster.local/ns/shop/sa/db"));
    });
    t.leaf("the same ID twice", Err("several_uris"), |leaf| {
        leaf.subject_alt_names.push(san(ID))
    });
    t.leaf("two IDs of two trust domains", Err("several_uris"), |leaf| {
        leaf.subject_alt_names.push(san("spiffe://evil.example/ns/shop/sa/web"));
    });
    t.leaf("a web URI beside", Err("several_uris"), |leaf| {
        leaf.subject_alt_names.push(san("https://shop.example"))
    });
    t.leaf("two subjectAltName extensions", Err("malformed"), |leaf| {
        leaf.custom_extensions = vec![raw_san(&[(0x86, b"spiffe://cluster.local/ns/shop/sa/db")])];
    });
    t.leaf("an extension twice that webpki passes over", Err("malformed"), |leaf| {
        let extension = CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 99999, 1], vec![5, 0]);
        leaf.custom_extensions = vec![extension.clone(), extension];
    });
    t.leaf("a URI that is not ASCII", Err("malformed"), |leaf| {
        leaf.subject_alt_names.clear();
        leaf.custom_extensions = vec![raw_san(&[(0x86, b"spiffe://cluster.local/ns/shop/sa/w\xffb")])];
    });
    t.leaf("a URI with UTF-8 in it", Err("not_spiffe"), |leaf| {
        leaf.subject_alt_names.clear();
        leaf.custom_extensions = vec![raw_san(&[(0x86, "spiffe://cluster.local/ns/shop/sa/wéb".as_bytes())])];
    });
    t.leaf("an empty URI", Err("not_spiffe"), |leaf| {
        leaf.subject_alt_names.clear();
        leaf.custom_extensions = vec![raw_san(&[(0x86, b"")])];
    });
    t.leaf("an empty list of names", Err("no_uri"), |leaf| {
        leaf.subject_alt_names.clear();
        leaf.custom_extensions = vec![raw_san(&[])];
    });
    for (name, uri) in [
        ("scheme https", "https://cluster.local/ns/shop/sa/web"),
        ("upper-case scheme", "SPIFFE://cluster.local/ns/shop/sa/web"),
        ("no scheme", "cluster.local/ns/shop/sa/web"),
        ("scheme with one slash", "spiffe:/cluster.local/ns/shop/sa/web"),
        ("upper-case trust domain", "spiffe://Cluster.local/ns/shop/sa/web"),
        ("no trust domain", "spiffe:///ns/shop/sa/web"),
        ("a port", "spiffe://cluster.local:443/ns/shop/sa/web"),
        ("a user", "spiffe://web@cluster.local/ns/shop/sa/web"),
        (
            "percent-encoding in the trust domain",
            "spiffe://cluster%2elocal/ns/shop/sa/web",
        ),
        ("no path", "spiffe://cluster.local"),
        ("an empty path", "spiffe://cluster.local/"),
        ("a trailing slash", "spiffe://cluster.local/ns/shop/sa/web/"),
        ("an empty segment", "spiffe://cluster.local/ns//sa/web"),
        ("a dot segment", "spiffe://cluster.local/ns/./sa/web"),
        ("a double-dot segment", "spiffe://cluster.local/ns/../sa/web"),
        (
            "percent-encoding in the path",
            "spiffe://cluster.local/ns/shop/sa/w%65b",
        ),
        ("a query", "spiffe://cluster.local/ns/shop/sa/web?a=b"),
        ("a fragment", "spiffe://cluster.local/ns/shop/sa/web#a"),
        ("a space", "spiffe://cluster.local/ns/shop/sa/web "),
        ("a zero byte", "spiffe://cluster.local/ns/shop/sa/web\0"),
        ("a backslash", "spiffe://cluster.local/ns/shop/sa\\web"),
        ("a path of another form", "spiffe://cluster.local/sa/web/ns/shop"),
        ("a path too short", "spiffe://cluster.local/ns/shop"),
        ("a path too long", "spiffe://cluster.local/ns/shop/sa/web/pod/1"),
    ] {
        t.uri(name, "not_spiffe", uri);
    }
    t.uri(
        "an ID over 2048 bytes",
        "not_spiffe",
        &format!("spiffe://cluster.local/ns/shop/sa/{}", "a".repeat(2048)),
    );
    t.uri(
        "another trust domain",
        "trust_domain",
        "spiffe://evil.example/ns/shop/sa/web",
    );
    t.uri(
        "our trust domain as a prefix",
        "trust_domain",
        "spiffe://cluster.local.evil.example/ns/shop/sa/web",
    );
    t.uri(
        "our trust domain as a suffix",
        "trust_domain",
        "spiffe://evil.cluster.local/ns/shop/sa/web",
    );
}

fn wrong_usages(t: &mut Table) {
    t.leaf("a CA", Err("leaf_is_ca"), |leaf| {
        leaf.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)
    });
    t.leaf("keyCertSign", Err("leaf_signs_certificates"), |leaf| {
        leaf.key_usages.push(Usage::KeyCertSign)
    });
    t.leaf("cRLSign", Err("leaf_signs_revocation_lists"), |leaf| {
        leaf.key_usages.push(Usage::CrlSign)
    });
    t.leaf("no key usage", Err("no_key_usage"), |leaf| leaf.key_usages.clear());
    t.leaf("keyEncipherment alone", Err("no_digital_signature"), |leaf| {
        leaf.key_usages = vec![Usage::KeyEncipherment]
    });
    t.leaf("serverAuth alone", Err("no_client_auth"), |leaf| {
        leaf.extended_key_usages = vec![Purpose::ServerAuth]
    });
    t.leaf("clientAuth alone", Err("no_server_auth"), |leaf| {
        leaf.extended_key_usages = vec![Purpose::ClientAuth]
    });
    t.leaf("code signing alone", Err("no_server_auth"), |leaf| {
        leaf.extended_key_usages = vec![Purpose::CodeSigning]
    });
    t.leaf("any purpose alone", Err("no_server_auth"), |leaf| {
        leaf.extended_key_usages = vec![Purpose::Any]
    });
    t.leaf("an empty extended key usage", Err("path"), |leaf| {
        leaf.extended_key_usages.clear();
        leaf.custom_extensions = vec![CustomExtension::from_oid_content(EKU_OID, vec![0x30, 0])];
    });
    t.leaf(
        "a critical extension that nobody knows",
        Err("critical_extension"),
        |leaf| {
            let mut unknown = CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 99999, 1], vec![5, 0]);
            unknown.set_criticality(true);
            leaf.custom_extensions = vec![unknown];
        },
    );
}

fn wrong_paths(t: &mut Table) {
    let now = SystemTime::now();
    t.leaf("expired", Err("expired"), |leaf| {
        leaf.not_after = (now - DAY / 2).into()
    });
    t.leaf("not yet valid", Err("not_yet_valid"), |leaf| {
        leaf.not_before = (now + DAY / 2).into()
    });
    let old = t.root.below("old", |ca| ca.not_after = (now - DAY / 2).into());
    t.below("an expired intermediate", Err("expired"), &old, &[&old]);
    let stranger = Ca::root("stranger");
    t.below("an unknown CA", Err("unknown_issuer"), &stranger, &[]);
    t.below(
        "an unknown CA, which came along",
        Err("unknown_issuer"),
        &stranger,
        &[&stranger],
    );
    let impostor = Ca::root("root");
    t.below(
        "a CA that took our root's name",
        Err("bad_signature"),
        &impostor,
        &[&impostor],
    );
    let (root, key) = (Ca::root("lost"), KeyPair::generate().unwrap());
    let hidden = root.below("hidden", |_| {});
    let chain = vec![hidden.sign(&leaf_params(ID), &key)];
    t.chain("an intermediate of an unknown CA", Err("unknown_issuer"), chain, key);
    let key = KeyPair::generate().unwrap();
    let chain = vec![t.intermediate.sign(&leaf_params(ID), &key)];
    t.chain("the intermediate missing", Err("unknown_issuer"), chain, key);

    let key = KeyPair::generate().unwrap();
    let itself: CertificateDer<'_> = leaf_params(ID).self_signed(&key).unwrap().into();
    t.chain("self-signed", Err("self_signed"), vec![itself], key);
    let narrow = t.root.below("path length 0", |ca| {
        ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0))
    });
    let beneath = narrow.below("beneath", |_| {});
    t.below(
        "path length 0 above an intermediate",
        Err("path_length"),
        &beneath,
        &[&beneath, &narrow],
    );
    let workload = t.root.below("workload", |ca| ca.is_ca = IsCa::ExplicitNoCa);
    t.below(
        "an intermediate that is no CA",
        Err("issuer_not_ca"),
        &workload,
        &[&workload],
    );
    let mute = t.root.below("mute", |ca| ca.key_usages = vec![Usage::DigitalSignature]);
    t.below(
        "an intermediate without keyCertSign",
        Err("issuer_may_not_sign"),
        &mute,
        &[&mute],
    );
    let servers = t
        .root
        .below("servers", |ca| ca.extended_key_usages = vec![Purpose::ServerAuth]);
    t.below(
        "an intermediate for servers alone",
        Err("no_client_auth"),
        &servers,
        &[&servers],
    );
    // permittedSubtrees [0] { { base: URI ".cluster.local" } }
    let uri_tree = [&[0x30, 0x14, 0xa0, 0x12, 0x30, 0x10, 0x86, 0x0e][..], b".cluster.local"].concat();
    let fenced = t.root.below("fenced", |ca| {
        ca.custom_extensions = vec![CustomExtension::from_oid_content(NAME_CONSTRAINTS_OID, uri_tree)];
    });
    t.below(
        "an intermediate with name constraints on URIs",
        Err("name_constraints"),
        &fenced,
        &[&fenced],
    );

    let key = KeyPair::generate().unwrap();
    let mut tampered = t.root.sign(&leaf_params(ID), &key).to_vec();
    let at = tampered.windows(3).position(|bytes| bytes == b"web").unwrap();
    tampered[at] = b'x';
    t.chain(
        "a changed name under the old signature",
        Err("bad_signature"),
        vec![tampered.into()],
        key,
    );
    let key = KeyPair::generate().unwrap();
    let mut longer = t.root.sign(&leaf_params(ID), &key).to_vec();
    longer.push(0);
    t.chain(
        "bytes after the certificate",
        Err("malformed"),
        vec![longer.into()],
        key,
    );
    let key = KeyPair::generate().unwrap();
    t.chain(
        "no certificate at all but bytes",
        Err("malformed"),
        vec![vec![0x30, 3, 1, 1, 1].into()],
        key,
    );
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
