//! The controller as nodes meet it: a real server and a real client over loopback.

mod certificates;
mod serving;

use super::*;
use crate::{
    certs::{
        Trust, TrustBundle,
        authority::files::ROOT_CERT,
        issuer::{CaClient, CaClientSettings, IssueError},
        key::DaemonKey,
        proto::IstioCertificateRequest,
        store::Issue,
    },
    mesh::{MeshSnapshot, SpiffeId, Workload, fixtures, workload::Locality},
};
use rustls_pki_types::UnixTime;
use std::fs;
use tempfile::TempDir;
use tokio::sync::watch;
use tonic::Code;

const HOUR: Duration = Duration::from_secs(3600);

fn id(account: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://cluster.local/ns/shop/sa/{account}")).unwrap()
}

fn workload(name: &str, node: &str) -> Arc<Workload> {
    Arc::new(Workload {
        locality: Locality {
            node: Some(node.into()),
            ..Locality::default()
        },
        ..fixtures::workload("shop", name, "10.77.1.11")
    })
}

fn snapshot(pods: &[(&str, &str)], version: u64) -> Arc<MeshSnapshot> {
    let mut snapshot = MeshSnapshot {
        version,
        ..MeshSnapshot::default()
    };
    for (name, node) in pods {
        snapshot.set_workload(workload(name, node));
    }
    Arc::new(snapshot)
}

/// A controller with `web` on node-a and `db` on node-b, and what its nodes need.
struct World {
    dir: TempDir,
    snapshot: watch::Sender<Arc<MeshSnapshot>>,
    shutdown: Shutdown,
    controller: Controller,
}

impl World {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("tokens"), "token-a node-a\ntoken-b node-b\n").unwrap();
        let (snapshot, _) = watch::channel(snapshot(&[("web", "node-a"), ("db", "node-b")], 1));
        let shutdown = Shutdown::new();
        let config = Self::config(&dir, "127.0.0.1:0".parse().unwrap());
        let controller = run(config, Cluster::Snapshot(snapshot.subscribe()), &shutdown)
            .await
            .unwrap();
        Self {
            dir,
            snapshot,
            shutdown,
            controller,
        }
    }

    fn config(dir: &TempDir, listen: SocketAddr) -> ControllerConfig {
        ControllerConfig {
            listen,
            root: RootPlace::Directory(dir.path().join("ca")),
            root_spread: Duration::from_secs(300),
            callers: CallerProof::Tokens(dir.path().join("tokens")),
            trust_domain: TrustDomain::new("cluster.local").unwrap(),
            server_names: vec!["controller.warren-system.svc".to_owned()],
            server_addresses: vec![],
            default_lifetime: 24 * HOUR,
            most_lifetime: 48 * HOUR,
        }
    }

    fn client_settings(&self, token: &str) -> CaClientSettings {
        let file = self.dir.path().join(format!("node-token-{token}"));
        fs::write(&file, format!("{token}\n")).unwrap();
        CaClientSettings {
            address: format!("https://{}", self.controller.local_address()).parse().unwrap(),
            server_name: None,
            root: self.dir.path().join("ca").join(ROOT_CERT),
            token: Some(file),
            cluster_id: "Kubernetes".to_owned(),
            lifetime: HOUR,
        }
    }

    fn client(&self, token: &str) -> CaClient {
        CaClient::new(self.client_settings(token))
    }

    fn trust(&self) -> Trust {
        Trust {
            bundle: TrustBundle::from_pem(&fs::read(self.dir.path().join("ca").join(ROOT_CERT)).unwrap()).unwrap(),
            domains: vec![TrustDomain::new("cluster.local").unwrap()],
        }
    }

    async fn issue(&self, token: &str, id: &SpiffeId) -> Result<(), Code> {
        let issued = self.client(token).issue(&DaemonKey::generate().unwrap(), id).await;
        issued.map(|_| ()).map_err(code)
    }

    /// A request as it is on the wire, with the token of node-a.
    async fn call(
        &self,
        csr: String,
        identity: Option<prost_types::value::Kind>,
        lifetime: i64,
    ) -> Result<Vec<String>, Code> {
        let fields = identity.map(|kind| {
            (
                "ImpersonatedIdentity".to_owned(),
                prost_types::Value { kind: Some(kind) },
            )
        });
        let metadata = Some(prost_types::Struct {
            fields: fields.into_iter().collect(),
        });
        let mut request = tonic::Request::new(IstioCertificateRequest {
            csr,
            validity_duration: lifetime,
            metadata,
        });
        request
            .metadata_mut()
            .insert("authorization", "bearer token-a".parse().unwrap());
        self.client("unused").call(request).await.map_err(code)
    }

    fn count(&self, outcome: &str) -> u64 {
        self.controller
            .outcomes()
            .iter()
            .find(|(name, _)| *name == outcome)
            .map_or(0, |(_, count)| *count)
    }
}

fn code(error: IssueError) -> Code {
    let IssueError::Refused { code, .. } = error else {
        panic!("{error:?}")
    };
    code
}

fn text(id: &str) -> Option<prost_types::value::Kind> {
    Some(prost_types::value::Kind::StringValue(id.to_owned()))
}
