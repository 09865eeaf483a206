//! Certificates from Istio's own CA: the real istiod beside a real API server, asked as a node's daemon asks. That a mesh
//! runs on them is for `tests/tests/cluster_istio.rs` to show.

#[allow(dead_code, reason = "the parts about our own controller are cluster_ca's")]
mod ca;

use anyhow::{Context, Result, ensure};
use ca::{Cluster, SYSTEM, ask, eventually, id, in_cluster};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Api;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls_pki_types::{CertificateDer, ServerName};
use std::{
    collections::BTreeSet,
    future::pending,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use warren::{
    certs::{
        CertStore, Svid,
        channel::DialError,
        issuer::{CaClient, CaClientSettings, IssueError},
        key::DaemonKey,
        peer_id,
        store::StoreSettings,
    },
    mesh::{SpiffeId, TrustDomain},
};

/// What istiod wants tokens to be for.
const AUDIENCE: &str = "istio-ca";
/// The name in its server's certificate.
const SERVER_NAME: &str = "istiod.istio-system.svc";
const ADDRESS: &str = "https://172.30.0.1:15012";
/// The ConfigMap with its roots, which it puts into every namespace.
const ROOTS: &str = "istio-ca-root-cert";

/// Runs a test beside a cluster in which istiod can be started; says why not where there is no istiod.
fn with_istiod<F: Future<Output = Result<()>>>(test: impl FnOnce(Arc<Cluster>) -> F + Send + 'static) -> Result<()> {
    if std::env::var_os("ISTIOD").is_none() {
        eprintln!("SKIPPED: there is no istiod; `cargo xtask test cluster --istiod` builds it");
        return Ok(());
    }
    in_cluster(|cluster| async move {
        let cluster = Arc::new(cluster);
        let ended = test(Arc::clone(&cluster)).await;
        ended.with_context(|| std::fs::read_to_string(cluster.rig.file("log/istiod")).unwrap_or_default())
    })
}

/// Starts istiod; the trust bundle as it gives it to the nodes' pods.
async fn started(cluster: &Cluster) -> Result<String> {
    cluster.rig.call(&["start", "istiod"])?;
    let maps: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), SYSTEM);
    eventually("istiod writes its roots", || async {
        Ok(maps.get_opt(ROOTS).await?.is_some())
    })
    .await?;
    let data = maps.get(ROOTS).await?.data;
    data.and_then(|mut data| data.remove("root-cert.pem"))
        .context("no root-cert.pem")
}

/// What a node's daemon is told about this CA.
fn settings(cluster: &Cluster, roots: &str, token: &str) -> Result<CaClientSettings> {
    let path = |name: &str| cluster.dir.path().join(format!("{name}-{}", rand::random::<u64>()));
    let (root, token_file) = (path("root"), path("token"));
    std::fs::write(&root, roots)?;
    std::fs::write(&token_file, token)?;
    Ok(CaClientSettings {
        address: ADDRESS.parse()?,
        server_name: Some(SERVER_NAME.try_into()?),
        root,
        token: Some(token_file),
        cluster_id: "Kubernetes".to_owned(),
        lifetime: Duration::from_secs(3600),
    })
}

async fn token(cluster: &Cluster, node: &str) -> Result<String> {
    let pod = node.replace("node", "warren-node");
    cluster.token("warren-node", AUDIENCE, Some(&pod)).await
}

/// A node's certificates as its daemon keeps them, for the one identity that it has a pod of.
fn store(settings: CaClientSettings, account: &str) -> Result<CertStore> {
    let ca_root = settings.root.clone();
    let (store, keeper) = CertStore::new(
        CaClient::new(settings),
        DaemonKey::generate()?,
        StoreSettings {
            trust_domains: vec![TrustDomain::new("cluster.local")?],
            ca_root,
            reread: Duration::from_secs(1),
            metrics: None,
        },
        pending(),
    );
    tokio::spawn(keeper);
    store.want(BTreeSet::from([id(account)]));
    Ok(store)
}

/// The first certificate: right after its start istiod may not know the pods yet, and says no.
async fn first(store: &CertStore, account: &str) -> Result<Arc<Svid>> {
    eventually(&format!("a certificate of {account}"), || async {
        Ok(store.get(&id(account)).await.map(|_| true)?)
    })
    .await?;
    Ok(store.get(&id(account)).await?)
}

/// A handshake over a pipe and a word each way: whom the client and whom the server found.
async fn handshake(client: &Svid, server: &Svid) -> Result<(SpiffeId, SpiffeId)> {
    let (near, far): (DuplexStream, DuplexStream) = tokio::io::duplex(16 << 10);
    let connector = TlsConnector::from(client.client_config(server.id()));
    let acceptor = TlsAcceptor::from(server.server_config());
    let name = ServerName::try_from("unused.invalid")?;
    let (dialled, accepted) = tokio::join!(connector.connect(name, near), acceptor.accept(far));
    let (mut dialled, mut accepted) = (dialled.context("client")?, accepted.context("server")?);
    dialled.write_all(b"ask").await?;
    accepted.write_all(b"say").await?;
    let (mut said, mut asked) = ([0; 3], [0; 3]);
    dialled.read_exact(&mut said).await?;
    accepted.read_exact(&mut asked).await?;
    ensure!((&asked, &said) == (b"ask", b"say"));
    let of = |certificates: Option<&[CertificateDer<'static>]>| {
        let leaf = certificates.and_then(<[_]>::first).context("no certificate")?;
        anyhow::Ok(peer_id(leaf)?)
    };
    Ok((
        of(dialled.get_ref().1.peer_certificates())?,
        of(accepted.get_ref().1.peer_certificates())?,
    ))
}

/// `web` of node-a and `db` of node-b prove themselves to each other; how many certificates each of them shows.
async fn mutual(cluster: &Cluster) -> Result<usize> {
    let roots = started(cluster).await?;
    let a = store(settings(cluster, &roots, &token(cluster, "node-a").await?)?, "web")?;
    let b = store(settings(cluster, &roots, &token(cluster, "node-b").await?)?, "db")?;
    let (web, db) = (first(&a, "web").await?, first(&b, "db").await?);
    let found = handshake(&web, &db).await?;
    ensure!(found == (id("db"), id("web")), "{found:?}");
    let found = handshake(&db, &web).await?;
    ensure!(found == (id("web"), id("db")), "{found:?}");
    let left = web.not_after().duration_since(SystemTime::now())?;
    ensure!(
        left <= Duration::from_secs(3600) && left > Duration::from_secs(3400),
        "not the hour that was asked for: {left:?}"
    );
    Ok(web.chain().len())
}

/// A root and a CA below it, as `cacerts` holds them: the chain with the root at its end, as Istio's own makefile writes it.
fn intermediate() -> Result<[(&'static str, String); 4]> {
    let params = |name: &str| -> Result<CertificateParams> {
        let mut params = CertificateParams::new([])?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name.push(DnType::CommonName, name);
        Ok(params)
    };
    let (root_key, key) = (KeyPair::generate()?, KeyPair::generate()?);
    let root = params("root of the test")?.self_signed(&root_key)?;
    let issuer = Issuer::new(params("root of the test")?, root_key);
    let below = params("intermediate of the test")?.signed_by(&key, &issuer)?;
    Ok([
        ("ca-cert.pem", below.pem()),
        ("ca-key.pem", key.serialize_pem()),
        ("cert-chain.pem", below.pem() + &root.pem()),
        ("root-cert.pem", root.pem()),
    ])
}

fn unauthenticated<T: std::fmt::Debug>(what: &str, answer: Result<T, IssueError>) -> Result<()> {
    match answer {
        Err(IssueError::Refused {
            code: tonic::Code::Unauthenticated,
            ..
        }) => Ok(()),
        other => anyhow::bail!("{what}: {other:?}"),
    }
}

#[test]
fn istiods_certificates_make_mtls_between_two_nodes() -> Result<()> {
    with_istiod(|cluster| async move {
        let shown = mutual(&cluster).await?;
        ensure!(shown == 1, "the root went on the wire: {shown} certificates");
        Ok(())
    })
}

#[test]
fn below_an_intermediate_of_istiods_the_chain_is_shown_without_its_root() -> Result<()> {
    with_istiod(|cluster| async move {
        let folder = cluster.rig.file("istiod/etc/cacerts");
        std::fs::create_dir_all(&folder)?;
        for (name, text) in intermediate()? {
            std::fs::write(folder.join(name), text)?;
        }
        let shown = mutual(&cluster).await?;
        ensure!(shown == 2, "leaf and intermediate, not {shown} certificates");
        Ok(())
    })
}

#[test]
fn what_istiod_refuses_is_an_error_with_a_name() -> Result<()> {
    with_istiod(|cluster| async move {
        let roots = started(&cluster).await?;
        let good = settings(&cluster, &roots, &token(&cluster, "node-a").await?)?;
        let client = CaClient::new(good.clone());
        eventually("istiod knows the pods", || async {
            Ok(ask(&client, "web").await.map(|_| true)?)
        })
        .await?;
        for (what, account, audience, pod, asked, logged) in [
            (
                "audience",
                "warren-node",
                "warren-ca",
                "warren-node-a",
                "web",
                "token audiences",
            ),
            (
                "node",
                "warren-node",
                AUDIENCE,
                "warren-node-a",
                "db",
                "no instances of \"shop/db\"",
            ),
            (
                "account",
                "other",
                AUDIENCE,
                "other-a",
                "web",
                "is not allowed to impersonate",
            ),
        ] {
            let token = cluster.token(account, audience, Some(pod)).await?;
            let client = CaClient::new(settings(&cluster, &roots, &token)?);
            unauthenticated(what, ask(&client, asked).await)?;
            let log = std::fs::read_to_string(cluster.rig.file("log/istiod"))?;
            ensure!(log.contains(logged), "{what}: refused for another reason");
        }
        let elsewhere = CaClientSettings {
            cluster_id: "elsewhere".to_owned(),
            ..good.clone()
        };
        unauthenticated("cluster", ask(&CaClient::new(elsewhere), "web").await)?;
        let nameless = CaClientSettings {
            server_name: None,
            ..good
        };
        match ask(&CaClient::new(nameless), "web").await {
            Err(IssueError::Dial(error)) => ensure!(matches!(*error, DialError::Handshake { .. }), "{error:?}"),
            other => anyhow::bail!("a server by another name: {other:?}"),
        }
        Ok(())
    })
}

#[test]
fn whoever_waits_for_a_certificate_learns_whether_istiod_refused_it_or_is_away() -> Result<()> {
    with_istiod(|cluster| async move {
        let roots = started(&cluster).await?;
        let token = token(&cluster, "node-a").await?;
        let held = store(settings(&cluster, &roots, &token)?, "web")?;
        first(&held, "web").await?;
        let missing = async |store: CertStore, account| match store.get(&id(account)).await {
            Err(error) => Ok(error),
            Ok(svid) => Err(anyhow::anyhow!("issued: {svid:?}")),
        };
        // No pod of `db` is on node-a.
        let refused = missing(store(settings(&cluster, &roots, &token)?, "db")?, "db").await?;
        ensure!(refused.is_refusal(), "{refused:?}");
        cluster.rig.call(&["stop", "istiod"])?;
        let away = missing(store(settings(&cluster, &roots, &token)?, "web")?, "web").await?;
        ensure!(!away.is_refusal(), "an outage counts as a refusal: {away:?}");
        let causes = format!("{:#}", anyhow::Error::from(away));
        ensure!(
            causes.contains("cannot connect to the CA at 172.30.0.1:15012"),
            "{causes}"
        );
        ensure!(held.get(&id("web")).await.is_ok(), "what was issued went with the CA");
        Ok(())
    })
}
