//! What is read, and what is named instead.

use super::*;
use crate::{kubernetes::Kind, mesh::policy::MutualTls};

#[tokio::test]
async fn everything_is_there_when_spawn_returns() {
    let mesh = Followed::new(&[
        ("base.yaml", BASE),
        ("deeper/still/policy.yml", DENY),
        (
            "pods.json",
            r#"{"apiVersion":"v1","kind":"List","items":[
            {"apiVersion":"v1","kind":"Pod","metadata":{"name":"a","namespace":"shop"},"status":{"podIP":"10.244.1.2"}},
            {"apiVersion":"v1","kind":"Pod","metadata":{"name":"b","namespace":"shop"},"status":{"podIP":"10.244.1.3"}}]}"#,
        ),
        (
            "typed.yaml",
            "apiVersion: v1\nkind: PodList\nitems:\n- metadata: {name: c, namespace: shop}\n  status: {podIP: 10.244.1.4}\n",
        ),
        ("notes.txt", "kind: Nonsense"),
        (".hidden.yaml", ": : :"),
        (
            "ignored.yaml",
            "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\n---\n# nothing here\n---\n",
        ),
        ("none.yaml", ""),
    ]);
    let now = mesh.now();
    assert_eq!((now.version, now.workloads.len(), now.authorizations.len()), (1, 4, 1));
    assert!(!is_allowed(&now));
    assert_eq!(mesh.problems(), Vec::<String>::new());
}

#[tokio::test]
async fn bad_input_is_named_with_file_and_field_and_everything_else_is_served() {
    let gone = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: gone\n  namespace: shop\n  annotations:\n    \
                warren.mesh/netns: /run/netns/wt-mesh-no-such\nstatus: {podIP: 10.244.1.8}\n";
    let elsewhere = gone.replace("name: gone", "name: elsewhere").replace("1.8", "1.9") + "spec: {nodeName: b}\n";
    let mesh = Followed::new(&[
        ("base.yaml", BASE),
        (
            "broken.yaml",
            "apiVersion: v1\nkind: Pod\nmetadata: {name: x\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: fine}\n",
        ),
        (
            "kinds.yaml",
            &format!(
                "apiVersion: v1\nkind: Podd\nmetadata: {{name: x}}\n---\n{}",
                pod("ok", "10.244.1.2")
            ),
        ),
        (
            "noip.yaml",
            "apiVersion: v1\nkind: Pod\nmetadata: {name: noip, namespace: shop}\n",
        ),
        (
            "twice.yaml",
            &format!("{}---\n{}", pod("twin-1", "10.244.1.5"), pod("twin-2", "10.244.1.5")),
        ),
        ("z-again.yaml", &pod("ok", "10.244.1.99")),
        ("gone.yaml", &format!("{gone}---\n{elsewhere}")),
        (
            "nowhere.yaml",
            &pod("lost", "10.244.1.7").replace("namespace: shop", "namespace: nowhere"),
        ),
        ("scalar.yaml", "just a text\n"),
        (
            "unnamed.yaml",
            "apiVersion: v1\nkind: Pod\nmetadata: {namespace: shop}\n",
        ),
        ("bad.json", "{\"kind\": \"Pod\",\n  oops"),
        (
            "type.yaml",
            &pod("typed", "10.244.1.6").replace("{nodeName: a}", "{nodeName: a, hostNetwork: perhaps}"),
        ),
    ]);
    let problems = mesh.problems();
    let named = |file: &str, what: &str| {
        let found = problems
            .iter()
            .any(|problem| problem.contains(&format!("/{file}")) && problem.contains(what));
        assert!(found, "{file}: {what}\nin {problems:#?}");
    };
    named("broken.yaml:", "document 1: the document is not valid");
    named("kinds.yaml:1 document 1", "kind: v1 Podd is no kind that Warren knows");
    named(
        "noip.yaml:1 document 1",
        "Pod shop/noip: status.podIPs: the pod has no address",
    );
    named(
        "twice.yaml:",
        "status.podIPs: 10.244.1.5 is also an address of pod shop/twin-",
    );
    named("z-again.yaml:1", "Pod shop/ok: the object is defined here and in");
    named(
        "gone.yaml:1 document 1",
        "Pod shop/gone: metadata.annotations.warren.mesh/netns: the network namespace",
    );
    named("scalar.yaml:1", "is not an object");
    named("unnamed.yaml:1", "metadata.name: is missing");
    named("bad.json:2", "the document is not valid");
    named("type.yaml:1", "Pod shop/typed: spec.hostNetwork: is not true or false");
    assert!(
        problems
            .iter()
            .any(|problem| problem.starts_with("Namespace nowhere: there is no Namespace")),
        "{problems:#?}"
    );
    assert_eq!(problems.len(), 12 - 1, "{problems:#?}");
    let now = mesh.now();
    for address in ["10.244.1.1", "10.244.1.2", "10.244.1.5", "10.244.1.7", "10.244.1.9"] {
        assert!(has_pod(&now, address), "{address}");
    }
    assert!(!has_pod(&now, "10.244.1.8") && !has_pod(&now, "10.244.1.99"));
}

#[tokio::test]
async fn a_policy_unreadable_from_the_start_denies_its_namespace() {
    for text in [
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: p\n  namespace: shop\nspec: [\n",
        "kind: \"AuthorizationPolicy\"\nmetadata: {namespace: 'shop', name: p}\nspec:\n\t- x\n",
        "apiVersion: security.istio.io/v7\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\n",
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {namespace: shop}\nspec: {}\n",
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\nspec: 7\n",
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\nspec:\n  rules: [{}]\n  action:",
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\n\
         spec: {action: ALLOW}\nspec: {action: DENY}\n",
    ] {
        let mut mesh = Followed::new(&[("base.yaml", BASE), ("policy.yaml", text)]);
        assert!(!is_allowed(&mesh.now()), "{text}");
        assert!(
            mesh.problems()
                .iter()
                .any(|problem| problem.contains("AuthorizationPolicy shop/")),
            "{:?}",
            mesh.problems()
        );
        let open = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\n\
                    spec: {rules: [{}]}\n";
        fs::write(mesh.path("policy.yaml"), open).unwrap();
        mesh.until("the corrected policy counts", is_allowed).await;
        assert_eq!(mesh.problems(), Vec::<String>::new());
    }
    let strict = "kind: PeerAuthentication\nmetadata: {name: default, namespace: shop}\nspec: {mtls: {mode: }}}\n";
    let mesh = Followed::new(&[("base.yaml", BASE), ("peer.yaml", strict)]);
    let now = mesh.now();
    assert_eq!(
        policy::mutual_tls(&now, now.workload_at(ip("10.244.1.1")).unwrap(), 80),
        MutualTls::Strict
    );
}

#[tokio::test]
async fn a_directory_that_does_not_exist_is_refused_by_name() {
    let missing = Path::new("/no/such/directory");
    let refused = spawn(missing, settings(), &Shutdown::new());
    assert!(matches!(refused, Err(ManifestError::Directory { ref dir, .. }) if dir == missing));
}

#[tokio::test]
async fn yaml_as_people_write_it_is_understood() {
    let peer = "%YAML 1.2\n---\n# keys that are numbers, anchors, folded text\napiVersion: security.istio.io/v1beta1\n\
                kind: PeerAuthentication\nmetadata:\n  name: web\n  namespace: shop\n  creationTimestamp: 2026-01-01T00:00:00Z\n\
                spec:\n  selector:\n    matchLabels: &labels\n      app: web\n  mtls: {mode: STRICT}\n  portLevelMtls:\n    \
                8080: {mode: PERMISSIVE}\n...\n";
    let crlf = pod("one", "10.244.1.2").replace('\n', "\r\n");
    let mesh = Followed::new(&[
        ("base.yaml", BASE),
        ("peer.yaml", peer),
        ("crlf.yaml", &format!("\u{feff}---\r\n{crlf}")),
    ]);
    assert_eq!(mesh.problems(), Vec::<String>::new());
    let now = mesh.now();
    let web = now.workload_at(ip("10.244.1.1")).unwrap();
    assert_eq!(policy::port_modes(&now, web), [(8080, MutualTls::Permissive)]);
    assert_eq!(policy::mutual_tls(&now, web, 1), MutualTls::Strict);
    assert!(has_pod(&now, "10.244.1.2"));
    assert!(mesh.now().peer_auths.get("shop", "web").unwrap().created.is_some());
    assert_eq!(Kind::PeerAuthentication.word(), "PeerAuthentication");
}

proptest::proptest! {
    #[test]
    fn no_text_upsets_the_reader(text in "[ -~\\n\t\u{e9}]{0,80}", cut in 0usize..400, insert in "[-:{}\\[\\]\"'#&*!|>%@`\n\t ]{0,4}") {
        super::document::parse(&text, false);
        super::document::parse(&text, true);
        let mut spoilt = format!("{BASE}---{DENY}");
        spoilt.insert_str(cut.min(spoilt.len()), &insert);
        super::document::parse(&spoilt, false);
        super::document::parse(&spoilt[..cut.min(spoilt.len())], false);
        super::document::not_text(text.as_bytes());
    }
}

#[tokio::test]
async fn the_demos_manifests_have_no_flaw() {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/demo");
    let elsewhere = IndexSettings {
        node_name: Some("elsewhere".into()),
        ..settings()
    };
    let published = spawn(&demo, elsewhere, &Shutdown::new()).unwrap();
    assert_eq!(
        published
            .problems
            .borrow()
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>(),
        Vec::<String>::new()
    );
    let now = Arc::clone(&published.snapshot.borrow());
    assert!(now.workloads.len() >= 4 && !now.services.is_empty() && !now.authorizations.is_empty());
}
