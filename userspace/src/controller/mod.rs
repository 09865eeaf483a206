//! `warren controller`: the mesh's certificate authority as a service. Not here: the CA itself (`certs::authority`).

mod server;
mod signing;
#[cfg(test)]
mod tests;
mod tokens;

pub use server::ServingError;
pub use signing::{Outcomes, Refusal};
pub use tokens::{TokenFile, TokenLineError, Tokens};

use crate::{
    certs::{
        Authority,
        authority::files::{CaDirError, Origin},
    },
    mesh::{MeshSnapshot, TrustDomain},
    shutdown::Shutdown,
};
use rustls_pki_types::UnixTime;
use server::Serving;
use signing::SigningService;
use std::{
    io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};
use tokio::{net::TcpListener, sync::watch};
use tracing::{info, warn};

/// The operator hears of a CA certificate that ends within this time at every start.
const EXPIRY_WARNING: Duration = Duration::from_secs(30 * 86_400);

#[derive(Debug, Clone)]
pub struct ControllerConfig {
    /// Where `CreateCertificate` is served.
    pub listen: SocketAddr,
    /// The CA's directory; a new CA is made in an empty one.
    pub ca_dir: PathBuf,
    /// Lines `token node-name`.
    pub ca_tokens: PathBuf,
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

/// The running controller, as far as metrics and readiness look at it.
#[derive(Debug, Clone)]
pub struct Controller {
    local_address: SocketAddr,
    outcomes: Arc<Outcomes>,
    authority: Arc<Authority>,
    snapshot: watch::Receiver<Arc<MeshSnapshot>>,
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

impl Controller {
    pub fn local_address(&self) -> SocketAddr {
        self.local_address
    }

    /// Requests by outcome (`issued`, or the reason of a refusal).
    pub fn outcomes(&self) -> Vec<(&'static str, u64)> {
        self.outcomes.list()
    }

    /// The cluster's state is known, so requests can be decided.
    pub fn is_ready(&self) -> bool {
        self.snapshot.borrow().version > 0
    }

    pub fn authority(&self) -> &Authority {
        &self.authority
    }
}

/// Opens the CA, listens, and serves until `shutdown` drains.
///
/// # Errors
/// A CA directory or token file that cannot be used, or an address that cannot be listened on: nothing is served then.
pub async fn run(
    config: ControllerConfig,
    snapshot: watch::Receiver<Arc<MeshSnapshot>>,
    shutdown: &Shutdown,
) -> Result<Controller, ControllerError> {
    let authority = Arc::new(open_authority(config.ca_dir).await?);
    let tokens = TokenFile::new(config.ca_tokens);
    tokens.current().await.map_err(|source| ControllerError::Tokens {
        path: tokens.path().clone(),
        source,
    })?;
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
        tokens,
        trust_domain: config.trust_domain,
        snapshot: snapshot.clone(),
        default_lifetime: config.default_lifetime,
        most_lifetime: config.most_lifetime,
        outcomes: outcomes.clone(),
    };
    shutdown.spawn_essential(
        "controller listener",
        server::accept(listener, Arc::new(serving), service, shutdown.clone()),
    );
    info!(%local_address, "controller serves certificates");
    Ok(Controller {
        local_address,
        outcomes,
        authority,
        snapshot,
    })
}

async fn open_authority(dir: PathBuf) -> Result<Authority, ControllerError> {
    let shown = dir.display().to_string();
    let opened = tokio::task::spawn_blocking(move || Authority::open(&dir, UnixTime::now())).await;
    let (authority, origin) = match opened {
        Ok(opened) => opened.map_err(ControllerError::Authority)?,
        Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
    };
    let left = authority
        .not_after()
        .as_secs()
        .saturating_sub(UnixTime::now().as_secs());
    match origin {
        Origin::Generated => info!(dir = shown, "new certificate authority made"),
        Origin::Loaded => info!(dir = shown, "certificate authority loaded"),
    }
    if left < EXPIRY_WARNING.as_secs() {
        warn!(dir = shown, days_left = left / 86_400, "the CA certificate ends soon");
    }
    Ok(authority)
}
