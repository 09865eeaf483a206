//! The way to the API server: from inside a pod by its service account, from elsewhere by a kubeconfig.

use super::contact::Contact;
use kube::{
    Client, Config,
    client::ClientBuilder,
    config::{InClusterError, InferConfigError, KubeConfigOptions, Kubeconfig, KubeconfigError},
};
use std::{
    path::{Path, PathBuf},
    time::Duration,
};

/// A server that does not answer a connect for so long is away; the caller tries again.
const CONNECT: Duration = Duration::from_secs(5);
/// A connection on which nothing is heard for so long is dead. Longer than a watch lasts.
const SILENT: Duration = Duration::from_secs(40);
const UNSENT: Duration = Duration::from_secs(10);

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

async fn from_file_as(path: &Path, options: &KubeConfigOptions) -> Result<Config, ClientError> {
    let wrong = |source| ClientError::Kubeconfig {
        path: path.to_owned(),
        source: Box::new(source),
    };
    let file = Kubeconfig::read_from(path).map_err(wrong)?;
    Config::from_custom_kubeconfig(file, options).await.map_err(wrong)
}
