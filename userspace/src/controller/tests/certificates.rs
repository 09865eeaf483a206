//! Who gets a certificate, of what, and for how long.

use super::*;
use crate::certs::verify_peer;
use rcgen::{CertificateParams, KeyPair, SanType};

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
