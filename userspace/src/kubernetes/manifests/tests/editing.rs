//! Files that are edited, broken, emptied and renamed.

use super::*;
use std::{io::Write, time::Instant};

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
