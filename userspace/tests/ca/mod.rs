//! An API server of our own, with nodes and pods that are objects alone, and the real controller before it.

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::{
    authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec},
    core::v1::ServiceAccount,
};
use kube::{
    Api, Client, ResourceExt,
    api::{DynamicObject, PostParams},
    core::{ApiResource, GroupVersionKind},
};
use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};
use std::{
    fs::{self, File},
    io::Read,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};
use tempfile::TempDir;
use warren::{
    certs::{
        issuer::{CaClient, CaClientSettings, IssueError},
        key::DaemonKey,
        store::Issue,
    },
    mesh::SpiffeId,
};

pub(crate) const DEADLINE: Duration = Duration::from_secs(90);
pub(crate) const SYSTEM: &str = "warren-system";
/// One rig at a time: its namespaces bear this prefix.
const PREFIX: &str = "wca";

/// Where the rig's programs lie: told by the level's runner, else in the cache that it fills.
fn binaries() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).map(PathBuf::from);
    let cache = || set("WARREN_CACHE").or_else(|| Some(set("HOME")?.join(".cache/warren")));
    set("BIN").or_else(|| Some(cache()?.join("kube")))
}

/// A control plane of the rig, ended when dropped.
pub(crate) struct Rig {
    script: PathBuf,
    binaries: PathBuf,
    run: TempDir,
}

impl Rig {
    /// `None`, with the reason told, where there is no rig to be had.
    fn up() -> Result<Option<Self>> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let script = std::env::var_os("WARREN_RIG").map_or_else(|| root.join("tests/kube/rig.sh"), PathBuf::from);
        let binaries = binaries().context("set BIN, WARREN_CACHE or HOME")?;
        for needed in [&script, &binaries.join("bin/kube-apiserver")] {
            if !needed.exists() {
                eprintln!(
                    "SKIPPED: {} is missing; `cargo xtask test cluster` builds it",
                    needed.display()
                );
                return Ok(None);
            }
        }
        ensure!(nix::unistd::geteuid().is_root(), "the rig needs root");
        let rig = Self {
            script,
            binaries,
            run: TempDir::new()?,
        };
        rig.call(&["up", "0"])?;
        Ok(Some(rig))
    }

    /// `rig.sh` with these words.
    pub(crate) fn call(&self, arguments: &[&str]) -> Result<()> {
        let output = Command::new(&self.script)
            .args(arguments)
            .env("P", PREFIX)
            .env("BIN", &self.binaries)
            .env("RUN", self.run.path())
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("{} {arguments:?}", self.script.display()))?;
        ensure!(
            output.status.success(),
            "rig {arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    /// A file of the control plane's keys.
    pub(crate) fn pki(&self, name: &str) -> PathBuf {
        self.file("pki").join(name)
    }

    /// What the rig keeps under this name.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.run.path().join(name)
    }

    /// The process of the API server.
    pub(crate) fn api_server(&self) -> Result<nix::unistd::Pid> {
        let marker = self.run.path().display().to_string();
        for entry in fs::read_dir("/proc")? {
            let name = entry?.file_name();
            let Ok(pid) = name.to_string_lossy().parse::<i32>() else {
                continue;
            };
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).into_owned();
            if line.starts_with("kube-apiserver\0") && line.contains(&marker) {
                return Ok(nix::unistd::Pid::from_raw(pid));
            }
        }
        bail!("there is no API server")
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Err(error) = self.call(&["down"]) {
            eprintln!("{error:#}");
        }
    }
}

/// Runs a test in the control plane's network namespace, from which API server and controller can be reached.
pub(crate) fn in_cluster<F: Future<Output = Result<()>>>(
    test: impl FnOnce(Cluster) -> F + Send + 'static,
) -> Result<()> {
    let Some(rig) = Rig::up()?.map(Arc::new) else {
        return Ok(());
    };
    // It goes down from here, not from within: what runs in its namespaces is ended then.
    let within = Arc::clone(&rig);
    let thread = std::thread::spawn(move || {
        let namespace = File::open(format!("/run/netns/{PREFIX}cp"))?;
        setns(namespace, CloneFlags::CLONE_NEWNET)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        runtime.block_on(async move { test(Cluster::fill(within).await?).await })
    });
    match thread.join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// The API server with two nodes, a daemon's pod on each, `web` on node-a and `db` on node-b.
pub(crate) struct Cluster {
    pub(crate) client: Client,
    pub(crate) dir: TempDir,
    pub(crate) rig: Arc<Rig>,
}

impl Cluster {
    async fn fill(rig: Arc<Rig>) -> Result<Self> {
        let client = warren::kubernetes::client::connect(Some(&rig.pki("admin.kubeconfig"))).await?;
        let cluster = Self {
            client,
            dir: TempDir::new()?,
            rig,
        };
        for namespace in [SYSTEM, "shop"] {
            cluster
                .create("v1", "Namespace", None, json!({"metadata": {"name": namespace}}))
                .await?;
        }
        // The rights of the chart, and no more.
        let manifests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/manifests/warren.yaml");
        let text = fs::read_to_string(&manifests).with_context(|| format!("{}", manifests.display()))?;
        for document in text.split("\n---") {
            let kind = document.lines().find_map(|line| line.strip_prefix("kind: "));
            let Some(kind @ ("ServiceAccount" | "ClusterRole" | "ClusterRoleBinding" | "Role" | "RoleBinding")) = kind
            else {
                continue;
            };
            let object: Value = serde_saphyr::from_str(document)?;
            let version = object["apiVersion"].as_str().context("no apiVersion")?.to_owned();
            let namespace = object["metadata"]["namespace"].as_str().map(str::to_owned);
            cluster.create(&version, kind, namespace.as_deref(), object).await?;
        }
        for (namespace, account) in [(SYSTEM, "other"), ("shop", "web"), ("shop", "db"), ("shop", "nobody")] {
            let object = json!({"metadata": {"name": account}});
            cluster.create("v1", "ServiceAccount", Some(namespace), object).await?;
        }
        for node in ["node-a", "node-b"] {
            cluster
                .create("v1", "Node", None, json!({"metadata": {"name": node}}))
                .await?;
        }
        for (namespace, name, account, node) in [
            (SYSTEM, "warren-node-a", "warren-node", "node-a"),
            (SYSTEM, "warren-node-b", "warren-node", "node-b"),
            (SYSTEM, "other-a", "other", "node-a"),
            ("shop", "web-1", "web", "node-a"),
            ("shop", "db-1", "db", "node-b"),
        ] {
            cluster.pod(namespace, name, account, node).await?;
        }
        Ok(cluster)
    }

    pub(crate) async fn pod(&self, namespace: &str, name: &str, account: &str, node: &str) -> Result<()> {
        let object = json!({
            "metadata": {"name": name},
            "spec": {"nodeName": node, "serviceAccountName": account, "containers": [{"name": "c", "image": "c"}]},
        });
        self.create("v1", "Pod", Some(namespace), object).await
    }

    async fn create(&self, version: &str, kind: &str, namespace: Option<&str>, mut object: Value) -> Result<()> {
        let (group, version) = version.rsplit_once('/').unwrap_or(("", version));
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind));
        object["apiVersion"] = json!(resource.api_version);
        object["kind"] = json!(kind);
        let object: DynamicObject = serde_json::from_value(object)?;
        let api: Api<DynamicObject> = match namespace {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, &resource),
            None => Api::all_with(self.client.clone(), &resource),
        };
        let what = format!("{kind} {}", object.name_any());
        api.create(&PostParams::default(), &object).await.context(what)?;
        Ok(())
    }

    /// A token as kubelet projects it into `pod`; of no pod at all where that is `None`.
    pub(crate) async fn token(&self, account: &str, audience: &str, pod: Option<&str>) -> Result<String> {
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client.clone(), SYSTEM);
        let request = TokenRequest {
            spec: Some(TokenRequestSpec {
                audiences: Some(vec![audience.to_owned()]),
                bound_object_ref: pod.map(|pod| BoundObjectReference {
                    api_version: Some("v1".to_owned()),
                    kind: Some("Pod".to_owned()),
                    name: Some(pod.to_owned()),
                    uid: None,
                }),
                expiration_seconds: Some(3600),
            }),
            ..TokenRequest::default()
        };
        let answer = accounts
            .create_token_request(account, &PostParams::default(), &request)
            .await?;
        answer.status.and_then(|status| status.token).context("no token")
    }

    /// The token of the daemon of `node-a` or `node-b`.
    pub(crate) async fn daemon_token(&self, node: &str) -> Result<String> {
        let pod = node.replace("node", "warren-node");
        self.token("warren-node", "warren-ca", Some(&pod)).await
    }

    /// A token with these claims, signed with the API server's own key.
    pub(crate) fn forge(&self, claims: &Value, key: &Path) -> Result<String> {
        use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let message = format!("{}.{}", part(&json!({"alg": "RS256"})), part(claims));
        let file = self.dir.path().join("message");
        fs::write(&file, &message)?;
        let output = Command::new("openssl")
            .args(["dgst", "-sha256", "-sign"])
            .arg(key)
            .arg(&file)
            .output()?;
        ensure!(
            output.status.success(),
            "openssl: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(format!("{message}.{}", URL_SAFE_NO_PAD.encode(output.stdout)))
    }

    /// A controller with the rights of its service account, listening on this port and the next two.
    pub(crate) async fn controller(&self, port: u16, more: &[&str]) -> Result<Controller> {
        let token = self
            .token(
                "warren-controller",
                "https://kubernetes.default.svc.cluster.local",
                None,
            )
            .await?;
        let kubeconfig = self.dir.path().join(format!("controller-{port}.kubeconfig"));
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {
                "server": "https://172.30.0.1:6443", "certificate-authority": self.rig.pki("ca.crt"),
            }}],
            "users": [{"name": "c", "user": {"token": token}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
        });
        fs::write(&kubeconfig, config.to_string())?;
        let log = self.dir.path().join(format!("controller-{port}.log"));
        let process = Command::new(env!("CARGO_BIN_EXE_warren"))
            .arg("controller")
            .arg("--kubeconfig")
            .arg(&kubeconfig)
            .args([
                format!("--listen=0.0.0.0:{port}"),
                format!("--metrics-port={}", port + 1),
                format!("--readiness-port={}", port + 2),
                "--admin-port=0".to_owned(),
            ])
            .args(more)
            .stdin(Stdio::null())
            .stdout(File::create(&log)?)
            .stderr(Stdio::inherit())
            .spawn()?;
        Ok(Controller { process, port, log })
    }

    /// A CA client as the daemon of a node is one, with this token.
    pub(crate) fn ca_client(&self, controller: &Controller, root: &str, token: &str) -> Result<CaClient> {
        self.ca_client_at("127.0.0.1", controller, root, token)
    }

    /// The same by another address of this machine, from which it then comes as well.
    pub(crate) fn ca_client_at(
        &self,
        address: &str,
        controller: &Controller,
        root: &str,
        token: &str,
    ) -> Result<CaClient> {
        Ok(CaClient::new(self.ca_settings_at(address, controller, root, token)?))
    }

    pub(crate) fn ca_settings_at(
        &self,
        address: &str,
        controller: &Controller,
        root: &str,
        token: &str,
    ) -> Result<CaClientSettings> {
        let path = |name: &str| self.dir.path().join(format!("{name}-{}", rand::random::<u64>()));
        let (root_file, token_file) = (path("root"), path("token"));
        fs::write(&root_file, root)?;
        fs::write(&token_file, token)?;
        Ok(CaClientSettings {
            address: format!("https://{address}:{}", controller.port).parse()?,
            server_name: None,
            root: root_file,
            token: Some(token_file),
            cluster_id: "Kubernetes".to_owned(),
            lifetime: Duration::from_secs(3600),
        })
    }
}

/// A running `warren controller`, ended when dropped.
pub(crate) struct Controller {
    process: Child,
    port: u16,
    log: PathBuf,
}

impl Drop for Controller {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
    }
}

impl Controller {
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn get(&self, port: u16, path: &str) -> Result<(u16, String)> {
        use std::io::Write;
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(stream, "GET {path} HTTP/1.0\r\nHost: x\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
        Ok((head.split(' ').nth(1).context("no status")?.parse()?, body.to_owned()))
    }

    pub(crate) fn is_ready(&self) -> bool {
        matches!(self.get(self.port + 2, "/healthz/ready"), Ok((200, _)))
    }

    pub(crate) async fn ready(&self) -> Result<()> {
        eventually("the controller is ready", || async { Ok(self.is_ready()) })
            .await
            .with_context(|| self.log())
    }

    /// A metric's value with this label; 0 where it is not there.
    pub(crate) fn metric(&self, name: &str, label: &str) -> Result<f64> {
        let (_, text) = self.get(self.port + 1, "/metrics")?;
        let line = text.lines().find(|line| line.starts_with(name) && line.contains(label));
        Ok(match line {
            Some(line) => line.rsplit(' ').next().context("no value")?.parse()?,
            None => 0.0,
        })
    }
}

pub(crate) async fn eventually<F: Future<Output = Result<bool>>>(
    what: &str,
    mut holds: impl FnMut() -> F,
) -> Result<()> {
    let begin = Instant::now();
    loop {
        let last = holds().await;
        if let Ok(true) = last {
            return Ok(());
        }
        if begin.elapsed() > DEADLINE {
            bail!("never: {what} ({last:?})");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

pub(crate) fn id(account: &str) -> SpiffeId {
    match SpiffeId::parse(&format!("spiffe://cluster.local/ns/shop/sa/{account}")) {
        Ok(id) => id,
        Err(error) => panic!("{error}"),
    }
}

/// Asks for a certificate; the certificates of the chain, or what the CA said.
pub(crate) async fn ask(client: &CaClient, account: &str) -> Result<Vec<Vec<u8>>, IssueError> {
    let key = DaemonKey::generate().map_err(IssueError::Request)?;
    let chain = client.issue(&key, &id(account)).await?;
    Ok(chain.into_iter().map(|der| der.to_vec()).collect())
}
