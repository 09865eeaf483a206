//! `warren controller`: the mesh's certificate authority as a service. Not here: the CA itself (`certs::authority`).

mod cache;
mod callers;
mod cluster_root;
mod limit;
mod review;
mod reviews;
mod root;
mod rotation;
mod server;
mod signing;
#[cfg(test)]
mod tests;
mod tokens;

pub use callers::Cluster;
pub use review::{ServiceAccount, ServiceAccountForm, TokenRefused};
pub use reviews::{ReviewCounts, ReviewError};
pub use server::ServingError;
pub use signing::{Outcomes, Refusal};
pub use tokens::{TokenFile, TokenLineError, Tokens};

use crate::{
    certs::{Authority, authority::files::CaDirError},
    mesh::TrustDomain,
    shutdown::Shutdown,
};
use callers::Callers;
use cluster_root::ClusterRoot;
use review::Expected;
use reviews::Reviews;
use root::{Issuing, Place, Root};
use server::Serving;
use signing::SigningService;
use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};
use tokio::net::TcpListener;
use tracing::info;

#[derive(Debug, Clone)]
pub struct ControllerConfig {
    /// Where `CreateCertificate` is served.
    pub listen: SocketAddr,
    pub root: RootPlace,
    /// How long a new root is in the published bundle before its CA issues.
    pub root_spread: Duration,
    pub callers: CallerProof,
    pub trust_domain: TrustDomain,
    /// DNS names for the service's own certificate. The address that a client dials is always in it.
    pub server_names: Vec<String>,
    /// Further addresses for it (of a Service in front).
    pub server_addresses: Vec<IpAddr>,
    /// Lifetime of certificates for nodes that wish none.
    pub default_lifetime: Duration,
    /// The most that is given.
    pub most_lifetime: Duration,
}

/// Where the CA lies.
#[derive(Clone)]
pub enum RootPlace {
    /// A directory; a new CA is made in an empty one.
    Directory(PathBuf),
    /// The Secret `cacerts`, else `warren-ca` of this namespace, which is made; the bundle is published beside it.
    Cluster { client: kube::Client, namespace: String },
}

/// How nodes prove who they are.
#[derive(Clone)]
pub enum CallerProof {
    /// A file of lines `token node-name`.
    Tokens(PathBuf),
    /// Their service-account token, which the API server is asked about.
    Reviews {
        client: kube::Client,
        audience: String,
        account: ServiceAccount,
    },
}

impl fmt::Debug for RootPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(dir) => f.debug_tuple("Directory").field(dir).finish(),
            Self::Cluster { namespace, .. } => f.debug_tuple("Cluster").field(namespace).finish(),
        }
    }
}

impl fmt::Debug for CallerProof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tokens(path) => f.debug_tuple("Tokens").field(path).finish(),
            Self::Reviews { audience, account, .. } => f.debug_tuple("Reviews").field(audience).field(account).finish(),
        }
    }
}

/// The running controller, as far as metrics and readiness look at it. Clones are the same one.
#[derive(Clone)]
pub struct Controller {
    local_address: SocketAddr,
    outcomes: Arc<Outcomes>,
    callers: Arc<Callers>,
    authority: Issuing,
    cluster: Cluster,
}

#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
    #[error("no certificate authority")]
    Authority(#[source] CaDirError),
    #[error("the token file {} cannot be read", path.display())]
    Tokens { path: PathBuf, source: io::Error },
    #[error("cannot listen on {address}")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("the service cannot begin")]
    Serving(#[source] ServingError),
}

impl fmt::Debug for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Controller")
            .field("local_address", &self.local_address)
            .finish_non_exhaustive()
    }
}

impl Controller {
    pub fn local_address(&self) -> SocketAddr {
        self.local_address
    }

    /// Requests by outcome (`issued`, or the reason of a refusal).
    pub fn outcomes(&self) -> Vec<(&'static str, u64)> {
        self.outcomes.list()
    }

    /// How the questions to the API server went; `None` where it is not asked.
    pub fn reviews(&self) -> Option<ReviewCounts> {
        match &*self.callers {
            Callers::Reviews(reviews) => Some(reviews.counts()),
            Callers::File(_) => None,
        }
    }

    /// There is a CA that may issue, and the pods of the cluster are known: requests can be decided.
    pub fn is_ready(&self) -> bool {
        self.authority.borrow().is_some() && self.cluster.is_known()
    }

    /// Resolves when the cluster's pods are known.
    pub async fn cluster_known(&self) {
        self.cluster.known().await;
    }

    /// Resolves when there is a CA that may issue.
    pub async fn authority_there(&self) {
        let mut authority = self.authority.clone();
        if authority.wait_for(Option::is_some).await.is_err() {
            // Whoever followed the CA has ended, so there never will be.
            std::future::pending::<()>().await;
        }
    }

    /// The CA that issues now.
    pub fn authority(&self) -> Option<Arc<Authority>> {
        self.authority.borrow().clone()
    }
}

/// Listens, and serves until `shutdown` drains. Where the API server has the CA, it is waited for while we serve.
///
/// # Errors
/// A CA directory or token file that cannot be used, or an address that cannot be listened on: nothing is served then.
pub async fn run(
    config: ControllerConfig,
    cluster: Cluster,
    shutdown: &Shutdown,
) -> Result<Controller, ControllerError> {
    let place = match config.root {
        RootPlace::Directory(dir) => Place::Directory(dir),
        RootPlace::Cluster { client, namespace } => Place::Cluster(Box::new(ClusterRoot::new(client, namespace))),
    };
    let opened = Root::open(place, config.root_spread).await;
    let (root, authority) = opened.map_err(ControllerError::Authority)?;
    let callers = Arc::new(callers(config.callers).await?);
    let serving = Serving::new(authority.clone(), config.server_names, config.server_addresses)
        .map_err(ControllerError::Serving)?;
    let unheard = |source| ControllerError::Listen {
        address: config.listen,
        source,
    };
    let listener = TcpListener::bind(config.listen).await.map_err(unheard)?;
    let local_address = listener.local_addr().map_err(unheard)?;
    let outcomes = Arc::new(Outcomes::default());
    let service = SigningService {
        authority: authority.clone(),
        callers: callers.clone(),
        trust_domain: config.trust_domain,
        cluster: cluster.clone(),
        nodes: SigningService::node_buckets(),
        default_lifetime: config.default_lifetime,
        most_lifetime: config.most_lifetime,
        outcomes: outcomes.clone(),
        quiet: SigningService::log_buckets(),
    };
    let draining = shutdown.draining();
    shutdown.spawn_essential("certificate authority", async move {
        tokio::select! {
            () = root.follow() => {}
            () = draining => {}
        }
    });
    shutdown.spawn_essential(
        "controller listener",
        server::accept(listener, Arc::new(serving), service, shutdown.clone()),
    );
    info!(%local_address, "controller listens");
    Ok(Controller {
        local_address,
        outcomes,
        callers,
        authority,
        cluster,
    })
}

async fn callers(proof: CallerProof) -> Result<Callers, ControllerError> {
    match proof {
        CallerProof::Tokens(path) => {
            let tokens = TokenFile::new(path);
            tokens.current().await.map_err(|source| ControllerError::Tokens {
                path: tokens.path().clone(),
                source,
            })?;
            Ok(Callers::File(tokens))
        }
        CallerProof::Reviews {
            client,
            audience,
            account,
        } => Ok(Callers::Reviews(Reviews::new(client, Expected { audience, account }))),
    }
}
