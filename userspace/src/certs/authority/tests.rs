use super::{
    files::{CA_CERT, CA_KEY, CERT_CHAIN, CaDirError, Origin, ROOT_CERT, pem},
    *,
};
use crate::certs::{
    key::DaemonKey,
    testing::{Ca, DAY},
};
use rcgen::{BasicConstraints, CustomExtension, DnType, DnValue, IsCa, KeyUsagePurpose, SanType};
use std::{fs, os::unix::fs::PermissionsExt, path::Path, time::SystemTime};

const WISH: Duration = Duration::from_secs(3600);

fn id() -> SpiffeId {
    SpiffeId::parse("spiffe://cluster.local/ns/shop/sa/web").unwrap()
}

fn trust(authority: &Authority) -> Trust {
    Trust {
        bundle: authority.bundle().clone(),
        domains: vec![TrustDomain::new("cluster.local").unwrap()],
    }
}

fn fill(dir: &Path, ca: &Ca, above: &[&Ca], root: &Ca) {
    let text = |cas: &[&Ca]| cas.iter().map(|ca| pem("CERTIFICATE", &ca.der)).collect::<String>();
    fs::write(dir.join(CA_CERT), text(&[ca])).unwrap();
    fs::write(dir.join(CA_KEY), ca.key.serialize_pem()).unwrap();
    fs::write(dir.join(ROOT_CERT), text(&[root])).unwrap();
    fs::write(dir.join(CERT_CHAIN), text(&[&[ca], above].concat())).unwrap();
}

/// What openssl (or anybody) would read in a signed leaf.
fn read(signed: &Signed) -> X509Certificate<'_> {
    X509Certificate::from_der(&signed.chain[0]).unwrap().1
}

#[test]
fn a_leaf_has_the_form_of_an_svid_and_nothing_that_the_request_wished() {
    let now = UnixTime::now();
    let authority = Authority::generate(now).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut wishes = CertificateParams::default();
    wishes.distinguished_name.push(DnType::CommonName, "kubernetes-admin");
    wishes.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    wishes.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    wishes.subject_alt_names = vec![
        SanType::URI("spiffe://cluster.local/ns/kube-system/sa/root".try_into().unwrap()),
        SanType::DnsName("kubernetes.default".try_into().unwrap()),
    ];
    let unknown = CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 99999, 1], vec![5, 0]);
    wishes.custom_extensions = vec![unknown];
    let request = wishes.serialize_request(&key).unwrap().pem().unwrap();

    let signed = authority.sign(&request, &id(), WISH, now).unwrap();
    assert_eq!(
        verify_peer(&signed.chain, &trust(&authority), Some(&id()), now),
        Ok(id())
    );
    let leaf = read(&signed);
    assert_eq!(leaf.public_key().raw, key.subject_public_key_info());
    assert_eq!(leaf.subject().iter().count(), 0);
    assert_eq!(leaf.extensions().len(), 6, "{:?}", leaf.extensions());
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    assert!(names.critical);
    assert_eq!(names.value.general_names, [GeneralName::URI(id().as_str())]);
    let usage = leaf.key_usage().unwrap().unwrap();
    assert!(usage.critical && usage.value.flags == 1, "{usage:?}");
    let constraints = leaf.basic_constraints().unwrap().unwrap();
    assert!(constraints.critical && !constraints.value.ca);
    let purposes = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(purposes.server_auth && purposes.client_auth && !purposes.any);
    assert_eq!(leaf.validity().not_after.timestamp() as u64, now.as_secs() + 3600);
    assert_eq!(leaf.validity().not_before.timestamp() as u64, now.as_secs() - 120);
    assert!(leaf.raw_serial().len() == 16 && leaf.raw_serial_as_string() == signed.serial);
}

#[test]
fn two_leaves_never_share_a_serial_number() {
    let now = UnixTime::now();
    let authority = Authority::generate(now).unwrap();
    let request = DaemonKey::generate().unwrap().request(&id()).unwrap();
    let sign = || authority.sign(&request, &id(), WISH, now).unwrap().serial;
    assert_ne!(sign(), sign());
}

#[test]
fn no_leaf_outlives_its_ca() {
    let now = UnixTime::now();
    let ca = Ca::root_with("root", |ca| ca.not_after = (SystemTime::now() + DAY).into());
    let bundle = TrustBundle::from_der(vec![ca.der.clone()]).unwrap();
    let authority = Authority::new(ca.key, &ca.der, vec![], bundle, now).unwrap();
    let request = DaemonKey::generate().unwrap().request(&id()).unwrap();
    let signed = authority.sign(&request, &id(), 30 * DAY, now).unwrap();
    assert_eq!(signed.not_after, authority.not_after());
    assert_eq!(
        read(&signed).validity().not_after.timestamp() as u64,
        authority.not_after().as_secs()
    );
    let later = UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs() + 2 * 86_400));
    assert!(matches!(
        authority.sign(&request, &id(), WISH, later),
        Err(SignError::Expired)
    ));
}

#[test]
fn keys_of_every_accepted_kind_are_signed() {
    let now = UnixTime::now();
    let authority = Authority::generate(now).unwrap();
    for key in [
        KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap(),
        KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap(),
        KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap(),
        KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048).unwrap(),
    ] {
        let request = CertificateParams::default()
            .serialize_request(&key)
            .unwrap()
            .pem()
            .unwrap();
        let signed = authority.sign(&request, &id(), WISH, now).unwrap();
        assert_eq!(
            verify_peer(&signed.chain, &trust(&authority), Some(&id()), now),
            Ok(id())
        );
        let rsa = key.algorithm() == &rcgen::PKCS_RSA_SHA256;
        assert_eq!(
            read(&signed).key_usage().unwrap().unwrap().value.key_encipherment(),
            rsa
        );
    }
}

#[test]
fn a_request_that_proves_nothing_is_refused_by_name() {
    let now = UnixTime::now();
    let authority = Authority::generate(now).unwrap();
    let sign = |request: &str| authority.sign(request, &id(), WISH, now).unwrap_err();
    assert!(matches!(sign("garbage"), SignError::Pem));
    assert!(matches!(
        sign(&pem("CERTIFICATE REQUEST", &[1, 2, 3])),
        SignError::Malformed
    ));
    assert!(matches!(
        sign(&pem("CERTIFICATE", authority.bundle().roots()[0].der.as_ref())),
        SignError::Pem
    ));

    let good = CertificateParams::default()
        .serialize_request(&KeyPair::generate().unwrap())
        .unwrap();
    let mut broken = good.der().to_vec();
    *broken.last_mut().unwrap() ^= 1;
    assert!(matches!(
        sign(&pem("CERTIFICATE REQUEST", &broken)),
        SignError::BadSignature
    ));
    let mut longer = good.der().to_vec();
    longer.push(0);
    assert!(matches!(
        sign(&pem("CERTIFICATE REQUEST", &longer)),
        SignError::Malformed
    ));

    // Somebody else's public key under one's own signature: the attack that the signature is there for.
    let (mine, theirs) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let mut stolen = CertificateParams::default()
        .serialize_request(&mine)
        .unwrap()
        .der()
        .to_vec();
    let at = stolen
        .windows(65)
        .position(|bytes| bytes == mine.public_key_raw())
        .unwrap();
    stolen[at..at + 65].copy_from_slice(theirs.public_key_raw());
    assert!(matches!(
        sign(&pem("CERTIFICATE REQUEST", &stolen)),
        SignError::BadSignature
    ));
}

#[test]
fn the_first_start_makes_a_ca_and_the_next_finds_it() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("below/ca");
    let now = UnixTime::now();
    let (first, origin) = Authority::open(&dir, now).unwrap();
    assert_eq!(origin, Origin::Generated);
    assert_eq!(
        fs::metadata(dir.join(CA_KEY)).unwrap().permissions().mode() & 0o777,
        0o600
    );
    let (second, origin) = Authority::open(&dir, now).unwrap();
    assert_eq!(origin, Origin::Loaded);
    assert_eq!(first.bundle().roots()[0].der, second.bundle().roots()[0].der);

    let request = DaemonKey::generate().unwrap().request(&id()).unwrap();
    let signed = second.sign(&request, &id(), WISH, now).unwrap();
    assert_eq!(signed.chain.len(), 1, "a root does not belong on the wire");
    assert_eq!(verify_peer(&signed.chain, &trust(&first), Some(&id()), now), Ok(id()));
    let file = TrustBundle::from_pem(&fs::read(dir.join(ROOT_CERT)).unwrap()).unwrap();
    assert!(file.holds(&first.bundle().roots()[0].der));
    let left: Vec<_> = fs::read_dir(&dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left.len(), 5, "{left:?}");
}

#[test]
fn controllers_that_start_together_on_one_directory_agree_on_one_ca() {
    let dir = tempfile::tempdir().unwrap();
    let roots: Vec<_> = std::thread::scope(|scope| {
        let starts: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| Authority::open(dir.path(), UnixTime::now()).unwrap().0))
            .collect();
        starts
            .into_iter()
            .map(|start| start.join().unwrap().bundle().roots()[0].der.clone())
            .collect()
    });
    assert!(roots.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn a_plugged_in_intermediate_answers_with_the_whole_chain() {
    let (dir, now) = (tempfile::tempdir().unwrap(), UnixTime::now());
    let root = Ca::root("corporate root");
    let upper = root.below("policy CA", |_| {});
    let lower = upper.below("mesh CA", |ca| ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0)));
    fill(dir.path(), &lower, &[&upper, &root], &root);
    let (authority, origin) = Authority::open(dir.path(), now).unwrap();
    assert_eq!(origin, Origin::Loaded);
    let request = DaemonKey::generate().unwrap().request(&id()).unwrap();
    let signed = authority.sign(&request, &id(), WISH, now).unwrap();
    assert_eq!(signed.chain[1..], [lower.der.clone(), upper.der.clone()]);
    assert_eq!(
        verify_peer(&signed.chain, &trust(&authority), Some(&id()), now),
        Ok(id())
    );
    let answer = signed.pem_with_roots(authority.bundle());
    assert_eq!(answer.len(), 4);
    assert_eq!(CertificateDer::from_pem_slice(answer[3].as_bytes()).unwrap(), root.der);
}

#[test]
fn a_ca_whose_name_repeats_attributes_signs_leaves_that_verify() {
    let now = UnixTime::now();
    let root = Ca::root("root");
    // DC=corp, DC=example as printable and UTF-8 strings: rcgen keeps one attribute of a kind, so the name is written
    // over a placeholder of the same length before the certificate is signed again by hand.
    let ca = root.below("mesh CA", |ca| {
        ca.distinguished_name.push(
            DnType::OrganizationName,
            DnValue::PrintableString("corp".try_into().unwrap()),
        );
        ca.distinguished_name
            .push(DnType::OrganizationalUnitName, DnValue::Utf8String("corp".into()));
    });
    // id-at-organizationalUnitName becomes id-at-organizationName: two of a kind.
    let mut der = ca.der.to_vec();
    let at = der
        .windows(5)
        .position(|bytes| bytes == [0x06, 0x03, 0x55, 0x04, 0x0b])
        .unwrap();
    der[at + 4] = 0x0a;
    let (_, parsed) = X509Certificate::from_der(&der).unwrap();
    let to_be_signed = parsed.tbs_certificate.as_ref().to_vec();
    let signature = root.key.sign(&to_be_signed).unwrap();
    let der: CertificateDer<'_> =
        leaf::certificate(&to_be_signed, &signature_algorithm(&root.key).unwrap(), &signature).into();

    let bundle = TrustBundle::from_der(vec![root.der.clone()]).unwrap();
    let authority = Authority::new(ca.key, &der, vec![], bundle, now).unwrap();
    let request = DaemonKey::generate().unwrap().request(&id()).unwrap();
    let signed = authority.sign(&request, &id(), WISH, now).unwrap();
    assert_eq!(
        verify_peer(&signed.chain, &trust(&authority), Some(&id()), now),
        Ok(id())
    );
}

#[test]
fn a_directory_that_gives_no_ca_is_refused_by_name_and_left_as_it_is() {
    let now = UnixTime::now();
    let root = Ca::root("root");
    let unfit = |ca: &Ca, above: &[&Ca], root: &Ca| {
        let dir = tempfile::tempdir().unwrap();
        fill(dir.path(), ca, above, root);
        let error = Authority::open(dir.path(), now).unwrap_err();
        let CaDirError::Authority { source, .. } = error else {
            panic!("{error:?}")
        };
        source
    };
    let below = |change: fn(&mut CertificateParams)| root.below("mesh CA", change);
    let other = Ca {
        key: KeyPair::generate().unwrap(),
        ..Ca::root("root")
    };
    assert!(matches!(unfit(&other, &[], &root), AuthorityError::KeyMismatch));
    assert!(matches!(
        unfit(&below(|ca| ca.is_ca = IsCa::ExplicitNoCa), &[], &root),
        AuthorityError::NotCa
    ));
    let mute = below(|ca| ca.key_usages = vec![KeyUsagePurpose::CrlSign]);
    assert!(matches!(unfit(&mute, &[], &root), AuthorityError::MayNotSign));
    let past = below(|ca| ca.not_after = (SystemTime::now() - DAY / 2).into());
    assert!(matches!(unfit(&past, &[], &root), AuthorityError::Expired { .. }));
    let future = below(|ca| ca.not_before = (SystemTime::now() + DAY / 2).into());
    assert!(matches!(unfit(&future, &[], &root), AuthorityError::NotYetValid { .. }));
    let fenced = below(|ca| {
        let tree = [&[0x30, 0x14, 0xa0, 0x12, 0x30, 0x10, 0x86, 0x0e][..], b".cluster.local"].concat();
        ca.custom_extensions = vec![CustomExtension::from_oid_content(&[2, 5, 29, 30], tree)];
    });
    assert!(matches!(unfit(&fenced, &[], &root), AuthorityError::UriNameConstraints));
    // No check of its own finds these; the trial does.
    let lower = root.below("policy CA", |_| {}).below("mesh CA", |_| {});
    assert!(matches!(
        unfit(&lower, &[], &root),
        AuthorityError::Useless(PeerRejected::UnknownIssuer)
    ));
    let old_root = Ca::root_with("root", |root| root.not_after = (SystemTime::now() - DAY / 2).into());
    let ca = old_root.below("mesh CA", |_| {});
    assert!(matches!(
        unfit(&ca, &[], &old_root),
        AuthorityError::Useless(PeerRejected::RootNotValid)
    ));

    for missing in [CA_CERT, CA_KEY, ROOT_CERT, CERT_CHAIN] {
        let dir = tempfile::tempdir().unwrap();
        fill(dir.path(), &root, &[], &root);
        fs::remove_file(dir.path().join(missing)).unwrap();
        let error = Authority::open(dir.path(), now).unwrap_err();
        assert!(
            matches!(&error, CaDirError::Missing { path } if path.ends_with(missing)),
            "{error:?}"
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 4, "three files and the lock");
    }
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path(), &root, &[], &root);
    fs::write(dir.path().join(CA_KEY), "no key").unwrap();
    let error = Authority::open(dir.path(), now).unwrap_err();
    assert!(matches!(
        error,
        CaDirError::Authority {
            source: AuthorityError::Key(_),
            ..
        }
    ));
    fs::write(dir.path().join(CERT_CHAIN), "no certificate").unwrap();
    assert!(matches!(
        Authority::open(dir.path(), now),
        Err(CaDirError::NoCertificate { .. })
    ));
}

#[test]
fn pem_is_what_others_read() {
    for length in [0, 1, 2, 3, 47, 48, 49, 200] {
        let der: Vec<u8> = (0..length).map(|n| (n * 7) as u8).collect();
        let text = pem("CERTIFICATE", &der);
        assert!(text.lines().all(|line| line.len() <= 64));
        assert_eq!(CertificateDer::from_pem_slice(text.as_bytes()).unwrap().as_ref(), der);
    }
}
