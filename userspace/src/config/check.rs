//! What is wrong with a configuration as a whole: files that are not there, values that do not go together.

use super::{ControllerConfig, HboneConfig, MeshConfig, NodeConfig, Ports, RunConfig, SourceArgs, values};
use crate::{mesh::TrustDomain, telemetry::logging};
use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

/// What is wrong: which flag, why, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("--{flag}: {path} is not there; {advice}")]
    Missing {
        flag: &'static str,
        path: PathBuf,
        advice: &'static str,
    },
    #[error("--{flag}: {path} is not {expected}")]
    WrongKind {
        flag: &'static str,
        path: PathBuf,
        expected: &'static str,
    },
    #[error("--{flag}: {path} cannot be read")]
    Unreadable {
        flag: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(
        "there is no source of the desired state: this is no pod of a cluster; name a kubeconfig with --kubeconfig FILE, or a directory of Kubernetes manifests with --manifests DIR"
    )]
    NoSource,
    #[error("--{one} and --{other} are both {port}; give each a port of its own, or 0 for none")]
    SamePort {
        one: &'static str,
        other: &'static str,
        port: u16,
    },
    #[error("--{shorter} ({}) must be shorter than --{longer} ({}); {why}", values::shown(*short), values::shown(*long))]
    Order {
        shorter: &'static str,
        short: Duration,
        longer: &'static str,
        long: Duration,
        why: &'static str,
    },
    #[error("--{flag} ({}) must be at least {}; {why}", values::shown(*given), values::shown(*least))]
    TooShort {
        flag: &'static str,
        given: Duration,
        least: Duration,
        why: &'static str,
    },
    #[error("--manifests needs --{flag}: without an API server {why}")]
    NeedsApi { flag: &'static str, why: &'static str },
    #[error("--trust-domain-alias {alias} is the trust domain itself; leave it out")]
    AliasOfItself { alias: TrustDomain },
    #[error("--{flag} is not a Kubernetes namespace: {name:?}")]
    Namespace { flag: &'static str, name: String },
    #[error("$RUST_LOG is {filter:?}, which is no filter; correct it, or give --log-level")]
    RustLog {
        filter: String,
        source: logging::LoggingError,
    },
}

/// Certificates that live shorter are renewed all the time.
const SHORTEST_SVID: Duration = Duration::from_secs(10);
const RENEWAL: &str = "certificates are renewed at half their life";

impl NodeConfig {
    /// Looks at everything that can be known to be wrong before anything starts.
    ///
    /// # Errors
    /// The first thing that is.
    pub fn check(&self) -> Result<(), ConfigError> {
        self.mesh.check()?;
        self.source.check()?;
        file(
            "ca-root",
            &self.ca_root,
            "it holds the root that `warren controller` publishes in the ConfigMap warren-ca-root, or keeps as root-cert.pem in its --ca-dir",
        )?;
        file(
            "ca-token",
            &self.ca_token,
            "it holds the token of this node: a projected one of its service account, or one of the controller's --ca-tokens",
        )?;
        at_least("svid-lifetime", self.svid_lifetime, SHORTEST_SVID, RENEWAL)?;
        for (flag, path) in [("cgroup", &self.kernel.cgroup), ("kubepods", &self.kernel.kubepods)] {
            if let Some(path) = path {
                directory(flag, path)?;
            }
        }
        let HboneConfig {
            hbone_ping,
            hbone_dead_after,
            hbone_idle,
        } = self.hbone;
        for (flag, given) in [("hbone-ping", hbone_ping), ("hbone-idle", hbone_idle)] {
            at_least(
                flag,
                given,
                Duration::from_millis(1),
                "without a pause the connection does nothing else",
            )?;
        }
        if hbone_ping >= hbone_dead_after {
            return Err(ConfigError::Order {
                shorter: "hbone-ping",
                short: hbone_ping,
                longer: "hbone-dead-after",
                long: hbone_dead_after,
                why: "else a connection is dead before its next ping",
            });
        }
        self.ports.check()?;
        self.run.check()
    }
}

impl ControllerConfig {
    /// As [`NodeConfig::check`].
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<(), ConfigError> {
        self.mesh.check()?;
        self.source.check()?;
        match &self.ca_tokens {
            Some(tokens) => file("ca-tokens", tokens, "it holds a line `token node-name` for each node")?,
            None => self.needs_api("ca-tokens", "there is nobody to ask about service-account tokens")?,
        }
        match &self.ca_dir {
            // The directory itself is made by whoever makes the root.
            Some(dir) if dir.exists() => directory("ca-dir", dir)?,
            Some(_) => {}
            None => self.needs_api("ca-dir", "there is no Secret to keep the root in")?,
        }
        if !values::is_dns_label(&self.namespace) {
            return Err(ConfigError::Namespace {
                flag: "namespace",
                name: self.namespace.clone(),
            });
        }
        at_least("max-svid-lifetime", self.max_svid_lifetime, SHORTEST_SVID, RENEWAL)?;
        let own = ("listen", self.listen.port());
        self.ports.check_beside(Some(own))?;
        self.run.check()
    }
}

impl ControllerConfig {
    /// What a directory of manifests does not have must be given.
    fn needs_api(&self, flag: &'static str, why: &'static str) -> Result<(), ConfigError> {
        match self.source.manifests {
            Some(_) => Err(ConfigError::NeedsApi { flag, why }),
            None => Ok(()),
        }
    }
}

impl SourceArgs {
    fn check(&self) -> Result<(), ConfigError> {
        if let Some(manifests) = &self.manifests {
            return directory("manifests", manifests);
        }
        if let Some(kubeconfig) = &self.kubeconfig {
            return file("kubeconfig", kubeconfig, "name one that leads to the cluster");
        }
        if std::env::var_os("KUBERNETES_SERVICE_HOST").is_none() {
            return Err(ConfigError::NoSource);
        }
        Ok(())
    }
}

impl MeshConfig {
    fn check(&self) -> Result<(), ConfigError> {
        if self.trust_domain_alias.contains(&self.trust_domain) {
            return Err(ConfigError::AliasOfItself {
                alias: self.trust_domain.clone(),
            });
        }
        let name = &self.root_namespace;
        if !values::is_dns_label(name) {
            return Err(ConfigError::Namespace {
                flag: "root-namespace",
                name: name.clone(),
            });
        }
        Ok(())
    }
}

impl Ports {
    fn check(&self) -> Result<(), ConfigError> {
        self.check_beside(None)
    }

    fn check_beside(&self, other: Option<(&'static str, u16)>) -> Result<(), ConfigError> {
        let mut seen: Vec<(&'static str, u16)> = other.into_iter().collect();
        for (one, port) in [
            ("admin-port", self.admin_port),
            ("metrics-port", self.metrics_port),
            ("readiness-port", self.readiness_port),
        ] {
            if let Some((other, _)) = seen.iter().find(|(_, taken)| *taken == port && port != 0) {
                return Err(ConfigError::SamePort { one, other, port });
            }
            seen.push((one, port));
        }
        Ok(())
    }
}

impl RunConfig {
    fn check(&self) -> Result<(), ConfigError> {
        let filter = self.log_filter();
        logging::check(&filter).map_err(|source| ConfigError::RustLog { filter, source })
    }
}

fn at_least(flag: &'static str, given: Duration, least: Duration, why: &'static str) -> Result<(), ConfigError> {
    if given < least {
        return Err(ConfigError::TooShort {
            flag,
            given,
            least,
            why,
        });
    }
    Ok(())
}

fn directory(flag: &'static str, path: &Path) -> Result<(), ConfigError> {
    let advice = "create it, or name another";
    let found = metadata(flag, path, advice)?;
    if !found.is_dir() {
        return Err(ConfigError::WrongKind {
            flag,
            path: path.into(),
            expected: "a directory",
        });
    }
    Ok(())
}

fn file(flag: &'static str, path: &Path, advice: &'static str) -> Result<(), ConfigError> {
    let found = metadata(flag, path, advice)?;
    if found.is_dir() {
        return Err(ConfigError::WrongKind {
            flag,
            path: path.into(),
            expected: "a file",
        });
    }
    std::fs::File::open(path)
        .map(drop)
        .map_err(|source| ConfigError::Unreadable {
            flag,
            path: path.into(),
            source,
        })
}

fn metadata(flag: &'static str, path: &Path, advice: &'static str) -> Result<std::fs::Metadata, ConfigError> {
    std::fs::metadata(path).map_err(|source| {
        let path = path.into();
        if source.kind() == io::ErrorKind::NotFound {
            ConfigError::Missing { flag, path, advice }
        } else {
            ConfigError::Unreadable { flag, path, source }
        }
    })
}
