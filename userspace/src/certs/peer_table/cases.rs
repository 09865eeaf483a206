//! The rows of the table: what is right, and every way of being wrong.

use super::*;
use rcgen::{DnType, ExtendedKeyUsagePurpose as Purpose, RsaKeySize};

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

pub(super) fn right(t: &mut Table) {
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

pub(super) fn wrong_names(t: &mut Table) {
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

pub(super) fn wrong_usages(t: &mut Table) {
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

pub(super) fn wrong_paths(t: &mut Table) {
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
