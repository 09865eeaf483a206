//! Folders, links and network namespaces that come and go.

use super::*;
use std::os::unix::fs::symlink;

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
