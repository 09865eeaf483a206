//! Directories as people write them, and edit them.

use super::*;
use crate::kubernetes::{Kind, Problem, Source};
use crate::mesh::{
    MeshSnapshot, TrustDomain,
    fixtures::ip,
    policy::{self, Facts, MutualTls},
};
use crate::testing::DEADLINE;
use std::{fs, io::Write, os::unix::fs::symlink, time::Instant};
use tempfile::TempDir;

const BASE: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {serviceAccountName: web, nodeName: a}
status: {phase: Running, podIP: 10.244.1.1}
";

const DENY: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: closed, namespace: shop}
spec:
  action: DENY
  rules:
  - from:
    - source: {notNamespaces: [bank]}
  - from:
    - source: {namespaces: [bank]}
";

fn settings() -> IndexSettings {
    IndexSettings {
        trust_domain: TrustDomain::new("cluster.local").unwrap(),
        root_namespace: "istio-system".into(),
        extra_ranges: Vec::new(),
        source: Source::Directory,
        node_name: Some("a".into()),
    }
}

/// A directory that is followed for as long as this lives.
struct Followed {
    dir: TempDir,
    published: Published,
    shutdown: Shutdown,
}

impl Followed {
    fn new(files: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let shutdown = Shutdown::new();
        let published = spawn(dir.path(), settings(), &shutdown).unwrap();
        Self {
            dir,
            published,
            shutdown,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn now(&self) -> Arc<MeshSnapshot> {
        Arc::clone(&self.published.snapshot.borrow())
    }

    fn problems(&self) -> Vec<String> {
        self.published
            .problems
            .borrow()
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    async fn until(&mut self, what: &str, holds: impl Fn(&MeshSnapshot) -> bool) {
        let waited = tokio::time::timeout(DEADLINE, self.published.snapshot.wait_for(|now| holds(now))).await;
        assert!(
            waited.is_ok_and(|open| open.is_ok()),
            "never: {what}; problems: {:?}",
            self.problems()
        );
    }

    async fn until_problems(&mut self, what: &str, holds: impl Fn(&[Problem]) -> bool) {
        let waited = tokio::time::timeout(DEADLINE, self.published.problems.wait_for(|now| holds(now))).await;
        assert!(
            waited.is_ok_and(|open| open.is_ok()),
            "never: {what}; problems: {:?}",
            self.problems()
        );
    }
}

fn is_allowed(mesh: &MeshSnapshot) -> bool {
    let web = mesh.workload_at(ip("10.244.1.1")).expect("the pod is there");
    let facts = Facts {
        source: "10.244.1.9:1".parse().unwrap(),
        peer: None,
        destination: "10.244.1.1:80".parse().unwrap(),
    };
    policy::authorize(mesh, web, &facts).allows()
}

fn has_pod(mesh: &MeshSnapshot, address: &str) -> bool {
    mesh.workload_at(ip(address)).is_some()
}

fn pod(name: &str, address: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{nodeName: a}}\n\
         status: {{podIP: {address}}}\n"
    )
}

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
async fn a_file_that_breaks_keeps_its_objects_and_its_other_documents_are_read() {
    let mut mesh = Followed::new(&[
        ("base.yaml", BASE),
        ("mixed.yaml", &format!("{DENY}---\n{}", pod("one", "10.244.1.2"))),
    ]);
    assert!(!is_allowed(&mesh.now()) && has_pod(&mesh.now(), "10.244.1.2"));
    let broken = DENY.replace("rules:", "rules: [");
    fs::write(
        mesh.path("mixed.yaml"),
        format!("{broken}---\n{}", pod("two", "10.244.1.3")),
    )
    .unwrap();
    mesh.until("the legible document counts", |now| has_pod(now, "10.244.1.3"))
        .await;
    assert!(!is_allowed(&mesh.now()), "the DENY stays");
    assert!(
        has_pod(&mesh.now(), "10.244.1.2"),
        "whatever the broken document may mean"
    );
    assert_eq!(mesh.problems().len(), 1, "{:?}", mesh.problems());
    fs::write(mesh.path("mixed.yaml"), pod("two", "10.244.1.3")).unwrap();
    mesh.until("removed documents are deletions", |now| {
        is_allowed(now) && !has_pod(now, "10.244.1.2")
    })
    .await;
    assert_eq!(mesh.problems(), Vec::<String>::new());
}

#[tokio::test]
async fn a_kind_misspelt_in_an_edit_deletes_nothing() {
    let mut mesh = Followed::new(&[("base.yaml", BASE), ("deny.yaml", DENY)]);
    fs::write(
        mesh.path("deny.yaml"),
        DENY.replace("AuthorizationPolicy", "AuthorizationPolcy"),
    )
    .unwrap();
    mesh.until_problems("the kind is named", |problems| !problems.is_empty())
        .await;
    assert!(!is_allowed(&mesh.now()));
    fs::remove_file(mesh.path("deny.yaml")).unwrap();
    mesh.until("a file that is gone takes its objects along", is_allowed)
        .await;
    assert_eq!(mesh.problems(), Vec::<String>::new());
}

#[tokio::test]
async fn an_emptied_file_keeps_its_objects_until_it_is_deleted() {
    let mut mesh = Followed::new(&[("base.yaml", BASE), ("deny.yaml", DENY)]);
    fs::write(mesh.path("deny.yaml"), " \n").unwrap();
    mesh.until_problems("the empty file is named", |problems| !problems.is_empty())
        .await;
    assert!(!is_allowed(&mesh.now()));
    fs::write(mesh.path("deny.yaml"), "# no policy any more\n").unwrap();
    mesh.until("a comment is no accident", is_allowed).await;
}

/// Every snapshot published while the file is rewritten again and again, in every way, denies.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn editing_a_file_in_any_way_never_makes_a_deny_vanish() {
    let mut mesh = Followed::new(&[("base.yaml", BASE), ("deny.yaml", DENY)]);
    let mut snapshots = mesh.published.snapshot.clone();
    let watching = tokio::spawn(async move {
        let (mut seen, mut lapses) = (0, 0);
        while snapshots.changed().await.is_ok() {
            let now = Arc::clone(&snapshots.borrow_and_update());
            lapses += u32::from(is_allowed(&now));
            seen += 1;
        }
        (seen, lapses)
    });
    let (deny, other) = (mesh.path("deny.yaml"), mesh.path("counter.yaml"));
    let slowest = tokio::task::spawn_blocking(move || {
        let mut slowest = Duration::ZERO;
        for round in 0..60u32 {
            let text = format!("# round {round}\n{DENY}");
            let begun = Instant::now();
            match round % 4 {
                // Truncate and write in one go.
                0 => fs::write(&deny, &text).unwrap(),
                // Truncate, then write in pieces that are each valid YAML, with pauses that outlast the debounce.
                1 => {
                    let mut file = fs::File::create(&deny).unwrap();
                    let rules = text.find("  rules").unwrap();
                    for piece in [&text[..rules], &text[rules..]] {
                        std::thread::sleep(Duration::from_millis(60));
                        file.write_all(piece.as_bytes()).unwrap();
                    }
                }
                // Write beside and rename over it.
                2 => {
                    let beside = deny.with_extension("yaml.tmp");
                    fs::write(&beside, &text).unwrap();
                    fs::rename(&beside, &deny).unwrap();
                }
                // Move away and write anew, as some editors do.
                _ => {
                    fs::rename(&deny, deny.with_extension("yaml~")).unwrap();
                    std::thread::sleep(Duration::from_millis(100));
                    fs::write(&deny, &text).unwrap();
                }
            }
            slowest = slowest.max(begun.elapsed());
            // Something to publish in between.
            fs::write(&other, pod("counter", &format!("10.244.2.{}", round + 1))).unwrap();
        }
        slowest
    })
    .await
    .unwrap();
    mesh.until("the last write counts", |now| has_pod(now, "10.244.2.60"))
        .await;
    mesh.shutdown.drain(Duration::from_secs(5)).await;
    drop(mesh);
    let (seen, lapses) = watching.await.unwrap();
    assert!(seen > 5, "{seen} snapshots");
    // A file that is away or half written for half a second is rightly believed; the writer is that slow on a machine that
    // stands still.
    let slow = Duration::from_millis(400);
    assert!(
        lapses == 0 || slowest > slow,
        "{lapses} snapshots without the DENY, and no edit took longer than {slowest:?}"
    );
}

#[tokio::test]
async fn a_renamed_file_is_no_change() {
    let mut mesh = Followed::new(&[("base.yaml", BASE), ("deny.yaml", DENY)]);
    fs::rename(mesh.path("deny.yaml"), mesh.path("denied.yaml")).unwrap();
    fs::write(mesh.path("one.yaml"), pod("one", "10.244.1.2")).unwrap();
    mesh.until("the directory was read", |now| has_pod(now, "10.244.1.2"))
        .await;
    assert!(!is_allowed(&mesh.now()));
    assert_eq!(mesh.problems(), Vec::<String>::new(), "for a moment both names count");
    fs::remove_file(mesh.path("denied.yaml")).unwrap();
    mesh.until("the new name is the one that counts", is_allowed).await;
}

#[tokio::test]
async fn a_config_map_mount_is_followed_through_its_links() {
    let mut mesh = Followed::new(&[("..2026_1/base.yaml", BASE), ("..2026_1/deny.yaml", DENY)]);
    assert_eq!(mesh.now().workloads.len(), 0);
    symlink("..2026_1", mesh.path("..data")).unwrap();
    for name in ["base.yaml", "deny.yaml"] {
        symlink(Path::new("..data").join(name), mesh.path(name)).unwrap();
    }
    mesh.until("the linked files are read", |now| {
        has_pod(now, "10.244.1.1") && now.authorizations.len() == 1
    })
    .await;
    assert_eq!(mesh.problems(), Vec::<String>::new(), "each file is read once");
    fs::create_dir(mesh.path("..2026_2")).unwrap();
    fs::write(
        mesh.path("..2026_2/base.yaml"),
        BASE.replace("10.244.1.1", "10.244.1.77"),
    )
    .unwrap();
    fs::write(mesh.path("..2026_2/deny.yaml"), DENY).unwrap();
    symlink("..2026_2", mesh.path("..data_tmp")).unwrap();
    fs::rename(mesh.path("..data_tmp"), mesh.path("..data")).unwrap();
    mesh.until("the turned link counts", |now| {
        has_pod(now, "10.244.1.77") && now.authorizations.len() == 1
    })
    .await;
}

#[tokio::test]
async fn a_pod_ends_with_its_network_namespace_and_starts_with_it() {
    let namespaces = tempfile::tempdir().unwrap();
    let path = namespaces.path().join("wt-mesh-pod");
    fs::write(&path, "").unwrap();
    let text = format!(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: ns\n  namespace: shop\n  annotations: {{warren.mesh/netns: {}}}\n\
         spec: {{nodeName: a}}\nstatus: {{podIP: 10.244.1.2}}\n",
        path.display()
    );
    let mut mesh = Followed::new(&[("base.yaml", BASE), ("pod.yaml", &text)]);
    assert_eq!(
        mesh.now().workload_at(ip("10.244.1.2")).unwrap().netns.as_deref(),
        Some(path.as_path())
    );
    fs::remove_file(&path).unwrap();
    mesh.until("the pod is gone", |now| !has_pod(now, "10.244.1.2")).await;
    mesh.until_problems("the missing namespace is named", |problems| problems.len() == 1)
        .await;
    fs::write(&path, "").unwrap();
    mesh.until("the pod is back", |now| has_pod(now, "10.244.1.2")).await;
    mesh.until_problems("nothing is wrong any more", <[Problem]>::is_empty)
        .await;
}

#[tokio::test]
async fn new_folders_and_deleted_files_are_noticed() {
    let mut mesh = Followed::new(&[("base.yaml", BASE)]);
    fs::create_dir_all(mesh.path("a/b")).unwrap();
    fs::write(mesh.path("a/b/one.yaml"), pod("one", "10.244.1.2")).unwrap();
    mesh.until("a file in a new folder counts", |now| has_pod(now, "10.244.1.2"))
        .await;
    fs::remove_dir_all(mesh.path("a")).unwrap();
    mesh.until("a folder's end is its files'", |now| !has_pod(now, "10.244.1.2"))
        .await;
}

#[tokio::test]
async fn a_directory_that_does_not_exist_is_refused_by_name() {
    let missing = Path::new("/no/such/directory");
    let refused = spawn(missing, settings(), &Shutdown::new());
    assert!(matches!(refused, Err(ManifestError::Directory { ref dir, .. }) if dir == missing));
}

#[tokio::test]
async fn a_directory_that_goes_away_keeps_everything_and_is_named() {
    let mut mesh = Followed::new(&[("base.yaml", BASE), ("deny.yaml", DENY)]);
    let away = mesh.dir.path().with_extension("away");
    fs::rename(mesh.dir.path(), &away).unwrap();
    mesh.until_problems("the directory is named", |problems| !problems.is_empty())
        .await;
    assert!(!is_allowed(&mesh.now()));
    fs::rename(&away, mesh.dir.path()).unwrap();
    mesh.until_problems("nothing is wrong any more", <[Problem]>::is_empty)
        .await;
}

#[tokio::test]
async fn a_directory_made_anew_is_followed_like_the_first() {
    let mut mesh = Followed::new(&[("base.yaml", BASE)]);
    fs::remove_dir_all(mesh.dir.path()).unwrap();
    fs::create_dir(mesh.dir.path()).unwrap();
    fs::write(mesh.path("base.yaml"), BASE.replace("10.244.1.1", "10.244.1.2")).unwrap();
    mesh.until("the new directory is read", |now| {
        has_pod(now, "10.244.1.2") && !has_pod(now, "10.244.1.1")
    })
    .await;
    fs::write(mesh.path("more.yaml"), pod("more", "10.244.1.3")).unwrap();
    mesh.until("the new directory is watched", |now| has_pod(now, "10.244.1.3"))
        .await;
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

/// Repeated: which event arrives before which folder is watched is a matter of luck.
#[tokio::test]
async fn the_files_behind_a_config_map_mount_are_never_read_by_their_own_names() {
    let mut mesh = Followed::new(&[("base.yaml", BASE)]);
    for round in 1..=10 {
        let folder = mesh.path(&format!("..{round}"));
        fs::create_dir(&folder).unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        fs::write(folder.join("pod.yaml"), pod("one", &format!("10.244.3.{round}"))).unwrap();
        symlink(format!("..{round}"), mesh.path("..data_tmp")).unwrap();
        fs::rename(mesh.path("..data_tmp"), mesh.path("..data")).unwrap();
        if round == 1 {
            symlink("..data/pod.yaml", mesh.path("pod.yaml")).unwrap();
        }
        mesh.until("the turned link counts", |now| {
            has_pod(now, &format!("10.244.3.{round}"))
        })
        .await;
        assert_eq!(mesh.problems(), Vec::<String>::new());
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
