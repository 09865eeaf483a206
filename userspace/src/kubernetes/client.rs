//! The way to the API server: from inside a pod by its service account, from elsewhere by a kubeconfig.

use super::contact::Contact;
use k8s_openapi::ByteString;
use kube::{
    Client, Config,
    client::ClientBuilder,
    config::{InClusterError, InferConfigError, KubeConfigOptions, Kubeconfig, KubeconfigError},
};
use serde_json::json;
use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

/// A server that does not answer a connect for so long is away; the caller tries again.
const CONNECT: Duration = Duration::from_secs(5);
/// A connection on which nothing is heard for so long is dead. Longer than a watch lasts.
const SILENT: Duration = Duration::from_secs(40);
const UNSENT: Duration = Duration::from_secs(10);

/// What kubelet gives a pod of its service account.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// Why there is no way to the API server. Nothing is sent before it is needed, so a server that is merely away is none.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("the kubeconfig {} cannot be used; name another with --kubeconfig", path.display())]
    Kubeconfig {
        path: PathBuf,
        source: Box<KubeconfigError>,
    },
    #[error(
        "this is not a pod with a service account; run it in one, name a kubeconfig with --kubeconfig, or a directory \
         with --manifests"
    )]
    NotInCluster(#[source] Box<InClusterError>),
    #[error(
        "there is no cluster to speak to: no kubeconfig in $KUBECONFIG or ~/.kube/config, and this is no pod; name a \
         kubeconfig with --kubeconfig"
    )]
    NoCluster(#[source] Box<InferConfigError>),
    #[error("no client of the API server")]
    Client(#[source] Box<kube::Error>),
}

/// A client with the rights of the pod's service account, or of `kubeconfig` where one is given.
///
/// # Errors
/// There is no configuration, or one that cannot be used.
pub async fn connect(kubeconfig: Option<&Path>) -> Result<Client, ClientError> {
    connect_counted(kubeconfig, &Contact::default()).await
}

/// As [`connect`], with everything counted in `contact`.
///
/// # Errors
/// As [`connect`].
pub async fn connect_counted(kubeconfig: Option<&Path>, contact: &Contact) -> Result<Client, ClientError> {
    let config = match kubeconfig {
        Some(path) => from_file_as(path, &KubeConfigOptions::default()).await?,
        None => Config::incluster().map_err(|error| ClientError::NotInCluster(Box::new(error)))?,
    };
    client(config, contact)
}

/// A client with the rights of the person at the keyboard, found as kubectl does: `kubeconfig`, else `$KUBECONFIG` and
/// `~/.kube/config`; and where there is none, the service account of the pod that this is.
///
/// # Errors
/// As [`connect`].
pub async fn connect_as_person(kubeconfig: Option<&Path>, context: Option<&str>) -> Result<Client, ClientError> {
    let options = KubeConfigOptions {
        context: context.map(str::to_owned),
        ..KubeConfigOptions::default()
    };
    let config = match (kubeconfig, context) {
        (Some(path), _) => from_file_as(path, &options).await?,
        (None, Some(_)) => Config::from_kubeconfig(&options)
            .await
            .map_err(|error| ClientError::Kubeconfig {
                path: "($KUBECONFIG or ~/.kube/config)".into(),
                source: Box::new(error),
            })?,
        (None, None) => Config::infer()
            .await
            .map_err(|error| ClientError::NoCluster(Box::new(error)))?,
    };
    client(config, &Contact::default())
}

fn client(mut config: Config, contact: &Contact) -> Result<Client, ClientError> {
    config.connect_timeout = Some(CONNECT);
    config.read_timeout = Some(SILENT);
    config.write_timeout = Some(UNSENT);
    let builder = ClientBuilder::try_from(config).map_err(|error| ClientError::Client(Box::new(error)))?;
    Ok(builder.with_layer(contact).build())
}

/// The same way for a process that is no pod: the text of a kubeconfig, good for as long as this pod's token is.
///
/// # Errors
/// There is no service account, or `kubeconfig` cannot be read.
pub fn kubeconfig_for_others(kubeconfig: Option<&Path>) -> io::Result<Vec<u8>> {
    if let Some(path) = kubeconfig {
        return fs::read(path);
    }
    let variable = |name| std::env::var(name).map_err(|_| io::Error::other(format!("there is no ${name}")));
    let (host, port) = (
        variable("KUBERNETES_SERVICE_HOST")?,
        variable("KUBERNETES_SERVICE_PORT")?,
    );
    let host = if host.contains(':') { format!("[{host}]") } else { host };
    let account = Path::new(ACCOUNT);
    let certificates = ByteString(fs::read(account.join("ca.crt"))?);
    let token = fs::read_to_string(account.join("token"))?;
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "own", "cluster": {
            "server": format!("https://{host}:{port}"), "certificate-authority-data": certificates
        }}],
        "users": [{"name": "daemon", "user": {"token": token.trim()}}],
        "contexts": [{"name": "own", "context": {"cluster": "own", "user": "daemon"}}],
        "current-context": "own",
    });
    Ok(serde_json::to_vec(&config)?)
}

async fn from_file_as(path: &Path, options: &KubeConfigOptions) -> Result<Config, ClientError> {
    let wrong = |source| ClientError::Kubeconfig {
        path: path.to_owned(),
        source: Box::new(source),
    };
    let file = Kubeconfig::read_from(path).map_err(wrong)?;
    Config::from_custom_kubeconfig(file, options).await.map_err(wrong)
}
