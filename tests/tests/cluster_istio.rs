//! A mesh whose certificates come from Istio: Warren installed beside the real istiod, as docs/certificates.md says, without
//! a controller of its own. What istiod refuses is told in `userspace/tests/cluster_istiod.rs`.

use anyhow::{Context, Result, ensure};
use std::process::Command;
use warren_tests::cluster::{AMBIENT, Cluster, PATIENCE, Rig, STRICT, SYSTEM, meshed};
use warren_tests::wait::wait_until_ok;

const VALUES: [&str; 5] = [
    "controller.enabled=false",
    "ca.address=https://172.30.0.1:15012",
    "ca.serverName=istiod.istio-system.svc",
    "ca.rootConfigMap=istio-ca-root-cert",
    "ca.tokenAudience=istio-ca",
];

/// Warren with istiod as its CA, both gone when dropped.
struct Installed<'c> {
    cluster: &'c Cluster,
    rig: Rig<'c>,
}

impl<'c> Installed<'c> {
    /// Takes the place of the Warren that other tests share.
    fn beside_istiod(cluster: &'c Cluster, rig: Rig<'c>) -> Result<Self> {
        let removed = cluster.warren(&["uninstall"])?;
        ensure!(removed.code == Some(0), "uninstall: {removed:?}");
        let installed = Self { cluster, rig };
        rig.run(&["start", "istiod"])?;
        let helm = std::env::var("WARREN_HELM").context("WARREN_HELM is not set")?;
        let root = std::env::var("WARREN_ROOT").context("WARREN_ROOT is not set")?;
        let image = cluster.image()?;
        let (_, tag) = image.rsplit_once(':').context("a tag")?;
        cluster.kubectl.apply(&format!(
            "{{apiVersion: v1, kind: Namespace, metadata: {{name: {SYSTEM}, labels: \
             {{istio.io/dataplane-mode: none, pod-security.kubernetes.io/enforce: privileged}}}}}}"
        ))?;
        // Rendered, not installed by Helm: it is Helm's own way that cluster_install shows, and `uninstall` takes this away.
        let rendered = Command::new(helm)
            .args([
                "template",
                "warren",
                &format!("{root}/deploy/charts/warren"),
                "--namespace",
                SYSTEM,
            ])
            .args(["--set", &format!("image.tag={tag}")])
            .args(VALUES.iter().flat_map(|value| ["--set", value]))
            .output()?;
        ensure!(
            rendered.status.success(),
            "helm: {}",
            String::from_utf8_lossy(&rendered.stderr)
        );
        cluster.kubectl.apply(&String::from_utf8(rendered.stdout)?)?;
        let rollout = [
            "-n",
            SYSTEM,
            "rollout",
            "status",
            "daemonset/warren-node",
            "--timeout=180s",
        ];
        cluster.kubectl.run(rollout)?;
        Ok(installed)
    }
}

impl Drop for Installed<'_> {
    fn drop(&mut self) {
        // The test itself may have stopped it.
        let _ = self.rig.run(&["stop", "istiod"]);
        let istio = ["delete", "namespace", "istio-system", "--wait=false"];
        if let Err(error) = self.cluster.kubectl.run(istio) {
            eprintln!("istio-system stays: {error:#}");
        }
        match self.cluster.warren(&["uninstall"]) {
            Ok(told) if told.code == Some(0) => {}
            other => eprintln!("Warren stays: {other:?}"),
        }
    }
}

#[test]
fn a_mesh_without_a_controller_runs_on_istiods_certificates_and_outlives_istiod() -> Result<()> {
    if std::env::var_os("ISTIOD").is_none() {
        eprintln!("SKIPPED: there is no istiod; `cargo xtask test cluster --istiod` builds it");
        return Ok(());
    }
    let cluster = meshed();
    let Some(rig) = cluster.rig() else { return Ok(()) };
    let _installed = Installed::beside_istiod(cluster, rig)?;
    let (namespace, nodes) = cluster.pair("istiod", AMBIENT)?;
    namespace.pair_captured(true)?;
    namespace.apply(STRICT)?;
    let to = format!("{}:8080", namespace.address("db")?);
    namespace.answered("web", &to)?;
    let (web, db) = (namespace.identity("web"), namespace.identity("db"));
    cluster.access_line(&nodes[1], &[&web, &db, "inbound"])?;

    // The one root is Istio's.
    let daemon = cluster.daemon(&nodes[0])?;
    let listed = cluster
        .kubectl
        .run(["-n", SYSTEM, "exec", &daemon, "--", "/warren", "certificates"])?;
    let roots: Vec<&str> = listed.lines().filter(|line| line.contains("Root")).collect();
    ensure!(
        matches!(&roots[..], [root] if root.contains("O=cluster.local")),
        "{listed}"
    );
    ensure!(
        listed
            .lines()
            .any(|line| line.contains(&web) && line.contains("Available")),
        "{listed}"
    );

    rig.run(&["stop", "istiod"])?;
    wait_until_ok("what was issued goes on", PATIENCE, || namespace.answered("web", &to))?;
    Ok(())
}
