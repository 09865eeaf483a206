//! The certificate authority on a real API server: who gets a certificate, who does not, and how the root changes.

mod ca;

use anyhow::{Context, Result, ensure};
use base64::Engine;
use ca::{Cluster, Controller, SYSTEM, ask, eventually, in_cluster};
use k8s_openapi::{
    ByteString,
    api::core::v1::{ConfigMap, Pod, Secret},
};
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams},
};
use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};
use std::time::{Duration, Instant, SystemTime};
use warren::certs::{
    TrustBundle,
    authority::files::CaFiles,
    issuer::{CaClient, IssueError},
};

const PORT: u16 = 15512;

/// The trust bundle as nodes see it.
async fn bundle(cluster: &Cluster) -> Result<String> {
    let maps: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), SYSTEM);
    let map = maps.get("warren-ca-root").await?;
    map.data
        .and_then(|data| data.get("root-cert.pem").cloned())
        .context("no bundle")
}

/// A ready controller and the trust bundle that it has published.
async fn started(cluster: &Cluster, more: &[&str]) -> Result<(Controller, String)> {
    let controller = cluster.controller(PORT, more).await?;
    controller.ready().await?;
    Ok((controller, bundle(cluster).await?))
}

fn refused(answer: Result<Vec<Vec<u8>>, IssueError>) -> Result<(tonic::Code, String)> {
    match answer {
        Err(IssueError::Refused { code, message }) => Ok((code, message)),
        other => anyhow::bail!("not refused: {other:?}"),
    }
}

#[test]
fn a_node_gets_certificates_of_its_own_pods_and_of_no_others() -> Result<()> {
    in_cluster(|cluster| async move {
        let (controller, root) = started(&cluster, &[]).await?;
        let (a, b) = (
            cluster.daemon_token("node-a").await?,
            cluster.daemon_token("node-b").await?,
        );
        let (a, b) = (
            cluster.ca_client(&controller, &root, &a)?,
            cluster.ca_client(&controller, &root, &b)?,
        );
        ask(&a, "web").await?;
        // db-1 is bound and not running: its certificate can be there before its first container.
        ask(&b, "db").await?;
        for (client, account) in [(&a, "db"), (&b, "web"), (&a, "nobody")] {
            let (code, message) = refused(ask(client, account).await)?;
            ensure!(
                code == tonic::Code::PermissionDenied && message.contains("no pod on node-"),
                "{message}"
            );
        }
        cluster.pod("shop", "web-2", "web", "node-b").await?;
        eventually("a new pod counts", || async { Ok(ask(&b, "web").await.is_ok()) }).await?;
        let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), "shop");
        pods.delete("web-2", &DeleteParams::default().grace_period(0)).await?;
        eventually("a pod that is gone counts no more", || async {
            Ok(ask(&b, "web").await.is_err())
        })
        .await?;
        ensure!(controller.metric("warren_ca_signing_requests_total", "issued")? >= 3.0);
        ensure!(
            controller.metric("warren_ca_token_reviews_total", "accepted")? == 2.0,
            "one review a token"
        );
        Ok(())
    })
}

#[test]
fn a_token_that_is_not_of_a_nodes_daemon_is_refused_by_name() -> Result<()> {
    in_cluster(|cluster| async move {
        let (controller, root) = started(&cluster, &[]).await?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
        let good = cluster.daemon_token("node-a").await?;
        let payload = good.split('.').nth(1).context("no payload")?;
        let claims: Value = serde_json::from_slice(&base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(payload)?)?;
        let mut expired = claims.clone();
        expired["exp"] = json!(now - 1);
        let (own, stranger) = (cluster.rig.pki("sa.key"), cluster.dir.path().join("stranger.key"));
        let made = std::process::Command::new("openssl")
            .args(["genpkey", "-quiet", "-algorithm", "RSA", "-out"])
            .arg(&stranger)
            .status()?;
        ensure!(made.success(), "openssl genpkey");
        // What is signed anew as it was is as good as the original: the forgeries below differ in what they say alone.
        let again = cluster.forge(&claims, &own)?;
        ask(&cluster.ca_client(&controller, &root, &again)?, "web").await?;
        let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), SYSTEM);
        cluster.pod(SYSTEM, "warren-node-gone", "warren-node", "node-a").await?;
        let gone = cluster
            .token("warren-node", "warren-ca", Some("warren-node-gone"))
            .await?;
        pods.delete("warren-node-gone", &DeleteParams::default().grace_period(0))
            .await?;
        for (what, token, reason) in [
            (
                "another audience",
                cluster.token("warren-node", "istio-ca", Some("warren-node-a")).await?,
                "token_audience",
            ),
            (
                "another service account",
                cluster.token("other", "warren-ca", Some("other-a")).await?,
                "token_account",
            ),
            ("expired", cluster.forge(&expired, &own)?, "token_expired"),
            (
                "signed by a stranger",
                cluster.forge(&claims, &stranger)?,
                "token_unauthenticated",
            ),
            ("of a pod that is gone", gone, "token_unauthenticated"),
            (
                "of no pod",
                cluster.token("warren-node", "warren-ca", None).await?,
                "token_unbound",
            ),
            ("no token at all", "warren".to_owned(), "token_form"),
        ] {
            let (code, message) = refused(ask(&cluster.ca_client(&controller, &root, &token)?, "web").await)?;
            ensure!(code == tonic::Code::Unauthenticated, "{what}: {message}");
            let label = format!("outcome=\"{reason}\"");
            let counted = controller.metric("warren_ca_signing_requests_total", &label)?;
            ensure!(counted >= 1.0, "{what}: not counted as {reason}: {message}");
            ensure!(controller.log().contains(reason), "{what}: not in the log");
            ensure!(
                !controller.log().contains(&token) || token == "warren",
                "{what}: the token is in the log"
            );
        }
        Ok(())
    })
}

#[test]
fn ten_thousand_requests_from_one_node_do_not_delay_another() -> Result<()> {
    in_cluster(|cluster| async move {
        let (controller, root) = started(&cluster, &[]).await?;
        let (a, b) = (
            cluster.daemon_token("node-a").await?,
            cluster.daemon_token("node-b").await?,
        );
        // Each node dials from an address of its own, as pods do.
        let greedy = cluster.ca_settings_at("127.0.0.1", &controller, &root, &a)?;
        let quiet = cluster.ca_client_at("172.30.0.1", &controller, &root, &b)?;
        ask(&quiet, "db").await?;
        let mut alone = Vec::new();
        for _ in 0..20 {
            let begin = Instant::now();
            ask(&quiet, "db").await?;
            alone.push(begin.elapsed());
        }
        // All streams of one connection are kept taken, beside 10,000 requests that each dial, more of them than one address may.
        let sharing = std::sync::Arc::new(CaClient::new(greedy.clone()));
        ask(&sharing, "web").await?;
        let mut shared = tokio::task::JoinSet::new();
        for _ in 0..16 {
            let sharing = std::sync::Arc::clone(&sharing);
            shared.spawn(async move {
                loop {
                    let _ = ask(&sharing, "web").await;
                }
            });
        }
        let flood = tokio::spawn(async move {
            let mut tasks = tokio::task::JoinSet::new();
            for _ in 0..80 {
                let greedy = greedy.clone();
                tasks.spawn(async move {
                    let mut outcomes = (0_u32, 0_u32);
                    for _ in 0..125 {
                        match ask(&CaClient::new(greedy.clone()), "web").await {
                            Ok(_) => outcomes.0 += 1,
                            Err(_) => outcomes.1 += 1,
                        }
                    }
                    outcomes
                });
            }
            tasks.join_all().await
        });
        let mut beside = Vec::new();
        while !flood.is_finished() {
            let begin = Instant::now();
            ask(&quiet, "db").await.context("the quiet node is refused")?;
            beside.push(begin.elapsed());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let outcomes = flood.await?;
        shared.shutdown().await;
        let limited = controller.metric("warren_ca_signing_requests_total", "outcome=\"rate_limited\"")?;
        alone.sort();
        beside.sort();
        let (signed, refused) = outcomes.iter().fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        let (median, longest) = (beside[beside.len() / 2], beside[beside.len() - 1]);
        eprintln!(
            "greedy: {signed} signed, {refused} refused, of all {limited} by the rate; \
             quiet: alone {:?} (median), beside {median:?} (median), {longest:?} (the longest of {})",
            alone[alone.len() / 2],
            beside.len()
        );
        ensure!(
            signed + refused == 10_000 && refused > 1000,
            "{signed} signed, {refused} refused"
        );
        // Who waits for the other node's ten thousand waits every time; a machine that stands still does so once.
        ensure!(beside.len() >= 20 && median < Duration::from_secs(1), "{median:?}");
        Ok(())
    })
}

#[test]
fn two_controllers_that_start_together_have_one_root() -> Result<()> {
    in_cluster(|cluster| async move {
        let one = cluster.controller(PORT, &[]).await?;
        let other = cluster.controller(PORT + 10, &[]).await?;
        one.ready().await?;
        other.ready().await?;
        let root = bundle(&cluster).await?;
        ensure!(TrustBundle::from_pem(root.as_bytes())?.roots().len() == 1);
        let token = cluster.daemon_token("node-a").await?;
        for controller in [&one, &other] {
            let chain = ask(&cluster.ca_client(controller, &root, &token)?, "web").await?;
            ensure!(
                chain.last().map(Vec::as_slice) == Some(&TrustBundle::from_pem(root.as_bytes())?.roots()[0].der[..])
            );
        }
        let made = [&one, &other].map(|c| c.log().matches("new certificate authority made").count());
        ensure!(made.iter().sum::<usize>() == 1, "{made:?}");
        Ok(())
    })
}

async fn put(cluster: &Cluster, name: &str, files: Vec<(String, Vec<u8>)>) -> Result<()> {
    let secrets: Api<Secret> = Api::namespaced(cluster.client.clone(), SYSTEM);
    let data: Vec<_> = files.into_iter().map(|(name, text)| (name, ByteString(text))).collect();
    let patch = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": name},
        "data": data.into_iter().collect::<std::collections::BTreeMap<_, _>>(),
    });
    let parameters = PatchParams::apply("test").force();
    secrets.patch(name, &parameters, &Patch::Apply(&patch)).await?;
    Ok(())
}

#[test]
fn a_new_root_is_published_first_and_issues_after_it_has_spread() -> Result<()> {
    in_cluster(|cluster| async move {
        let spread = Duration::from_secs(12);
        let (controller, old) = started(&cluster, &["--root-spread=12s"]).await?;
        let token = cluster.daemon_token("node-a").await?;
        let made: Vec<_> = CaFiles::generate(rustls_pki_types::UnixTime::now())?
            .into_files()
            .collect();
        let new = made
            .iter()
            .find(|(name, _)| name == "root-cert.pem")
            .context("no root")?;
        let new = String::from_utf8(new.1.clone())?;
        let both = format!("{old}{new}");
        // All in one change, as a hurried operator would.
        let files = made.iter().filter(|(name, _)| name != "root-cert.pem").cloned();
        let root = ("root-cert.pem".to_owned(), both.clone().into_bytes());
        let begin = Instant::now();
        put(&cluster, "warren-ca", files.chain([root]).collect()).await?;
        eventually("the bundle has both", || async { Ok(bundle(&cluster).await? == both) }).await?;
        let published = Instant::now();
        let old_alone = cluster.ca_client(&controller, &old, &token)?;
        let new_alone = cluster.ca_client(&controller, &new, &token)?;
        let of_old = TrustBundle::from_pem(old.as_bytes())?.roots()[0].der.to_vec();
        let chain = ask(&old_alone, "web")
            .await
            .context("the old CA issues while the new root spreads")?;
        ensure!(
            chain.last() == Some(&of_old),
            "who trusts the old root alone is served by it"
        );
        ensure!(ask(&new_alone, "web").await.is_err(), "the new CA serves too early");
        // From one moment to the next the server's own certificate is of the new root as well.
        eventually("the new CA issues", || async {
            Ok(ask(&new_alone, "web").await.is_ok())
        })
        .await?;
        ensure!(begin.elapsed() >= spread, "after {:?}", begin.elapsed());
        ensure!(
            published.elapsed() < spread + Duration::from_secs(60),
            "after {:?}",
            published.elapsed()
        );
        ensure!(ask(&old_alone, "web").await.is_err(), "the old CA is no longer used");
        // A broken Secret changes nothing.
        put(
            &cluster,
            "warren-ca",
            vec![("ca-key.pem".to_owned(), b"broken".to_vec())],
        )
        .await?;
        eventually("the log tells of it", || async {
            Ok(controller.log().contains("cannot be taken over"))
        })
        .await?;
        ask(&new_alone, "web").await.context("the last good CA goes on")?;
        Ok(())
    })
}

#[test]
fn the_operators_own_ca_is_taken_first_and_an_altered_bundle_is_put_back() -> Result<()> {
    in_cluster(|cluster| async move {
        let made: Vec<_> = CaFiles::generate(rustls_pki_types::UnixTime::now())?
            .into_files()
            .collect();
        let root = made
            .iter()
            .find(|(name, _)| name == "root-cert.pem")
            .context("no root")?
            .1
            .clone();
        put(&cluster, "cacerts", made).await?;
        let (controller, published) = started(&cluster, &[]).await?;
        ensure!(published.as_bytes() == root, "the bundle is another");
        let secrets: Api<Secret> = Api::namespaced(cluster.client.clone(), SYSTEM);
        ensure!(
            secrets.get_opt("warren-ca").await?.is_none(),
            "a root was made beside the operator's"
        );
        let maps: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), SYSTEM);
        let patch = json!({"data": {"root-cert.pem": "nonsense"}});
        maps.patch("warren-ca-root", &PatchParams::default(), &Patch::Merge(&patch))
            .await?;
        eventually("it is put back", || async {
            Ok(bundle(&cluster).await?.as_bytes() == root)
        })
        .await?;
        maps.delete("warren-ca-root", &DeleteParams::default()).await?;
        eventually("it is made again", || async {
            Ok(bundle(&cluster).await?.as_bytes() == root)
        })
        .await?;
        let token = cluster.daemon_token("node-a").await?;
        ask(&cluster.ca_client(&controller, &published, &token)?, "web").await?;
        Ok(())
    })
}

#[test]
fn without_the_api_server_a_token_that_was_accepted_still_counts() -> Result<()> {
    in_cluster(|cluster| async move {
        let (controller, root) = started(&cluster, &[]).await?;
        let known = cluster.ca_client(&controller, &root, &cluster.daemon_token("node-a").await?)?;
        let unknown = cluster.ca_client(&controller, &root, &cluster.daemon_token("node-b").await?)?;
        ask(&known, "web").await?;
        let server = cluster.rig.api_server()?;
        kill(server, Signal::SIGSTOP)?;
        let outcome = async {
            ask(&known, "web").await.context("a known token")?;
            let (code, message) = refused(ask(&unknown, "db").await)?;
            ensure!(code == tonic::Code::Unavailable, "{code:?} {message}");
            ensure!(controller.is_ready(), "it can still work");
            anyhow::Ok(())
        }
        .await;
        kill(server, Signal::SIGCONT)?;
        outcome?;
        eventually("it goes on", || async { Ok(ask(&unknown, "db").await.is_ok()) }).await
    })
}
