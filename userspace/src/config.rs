//! What each role is told at its start: flags, each with a `WARREN_…` variable beside it, checked before anything begins.
//! Not here: the defaults of parts (they take values), and what the commands of the user show (`cli`).

mod values;

use crate::{certs::issuer::CaAddress, cli, controller::ServiceAccount, mesh::TrustDomain, telemetry::logging};
use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;
use std::{
    io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};
use values::{cluster_range, count, duration, log_filter, san, trust_domain};

pub use values::ValueError;

/// Warren, a service mesh without sidecars.
#[derive(Debug, Parser)]
#[command(
    name = "warren",
    version,
    about,
    max_term_width = 120,
    disable_help_subcommand = true
)]
pub struct CommandLine {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// The node's daemon: captures its pods and carries their connections
    Node(Box<NodeConfig>),
    /// The certificate authority of the mesh
    Controller(Box<ControllerConfig>),
    /// The CNI plugin: called by container runtimes, not by people
    #[command(hide = true)]
    Cni,
    #[command(flatten)]
    User(cli::Command),
}

#[derive(Debug, Clone, Args)]
pub struct NodeConfig {
    /// Name of the Node object whose pods this daemon captures
    #[arg(long, env = "WARREN_NODE_NAME", value_name = "NAME", value_parser = values::node_name)]
    pub node_name: String,

    #[command(flatten)]
    pub mesh: MeshConfig,

    #[command(flatten)]
    pub source: SourceArgs,
    /// A range of pod or service addresses, beside those that Nodes and ServiceCIDRs name
    #[arg(long, env = "WARREN_CLUSTER_RANGE", value_name = "CIDR", value_delimiter = ',', value_parser = cluster_range)]
    pub cluster_range: Vec<IpNet>,

    /// Where the certificate authority answers
    #[arg(long, env = "WARREN_CA_ADDRESS", value_name = "https://HOST:PORT")]
    pub ca_address: CaAddress,
    /// Name that the certificate authority's certificate bears, where it is not the host of its address
    #[arg(long, env = "WARREN_CA_SERVER_NAME", value_name = "NAME", value_parser = values::san)]
    pub ca_server_name: Option<String>,
    /// Certificates (PEM) that the certificate authority's server must chain to
    #[arg(long, env = "WARREN_CA_ROOT", value_name = "FILE")]
    pub ca_root: PathBuf,
    /// Bearer token for the certificate authority; read again when it changes
    #[arg(long, env = "WARREN_CA_TOKEN", value_name = "FILE")]
    pub ca_token: PathBuf,
    /// How long certificates are asked to live; they are renewed at half of it
    #[arg(long, env = "WARREN_SVID_LIFETIME", value_name = "TIME", default_value = "24h", value_parser = duration)]
    pub svid_lifetime: Duration,

    #[command(flatten)]
    pub kernel: KernelArgs,
    #[command(flatten)]
    pub cni: CniArgs,
    /// Where the next daemon of this node asks for the listeners of this one; a lock lies beside it [default: beside
    /// --cni-socket; with --manifests none]
    #[arg(long, env = "WARREN_HANDOVER_SOCKET", value_name = "FILE")]
    pub handover_socket: Option<PathBuf>,
    #[command(flatten)]
    pub hbone: HboneConfig,

    /// Connections that one pod may have open at a time, in each direction
    #[arg(long, env = "WARREN_MAX_CONNECTIONS_PER_POD", value_name = "N", default_value = "32768", value_parser = count)]
    pub max_connections_per_pod: u32,

    #[command(flatten)]
    pub ports: Ports,
    #[command(flatten)]
    pub run: RunConfig,
}

#[derive(Debug, Clone, Args)]
pub struct ControllerConfig {
    #[command(flatten)]
    pub mesh: MeshConfig,

    #[command(flatten)]
    pub source: SourceArgs,
    /// Namespace of the root's Secret (cacerts, else warren-ca) and of the trust bundle's ConfigMap (warren-ca-root)
    #[arg(long, env = "WARREN_NAMESPACE", value_name = "NAME", default_value = "warren-system")]
    pub namespace: String,
    /// Directory of the root, instead of the Secret: ca-cert.pem, ca-key.pem, root-cert.pem, cert-chain.pem; made there
    /// if it is empty
    #[arg(long, env = "WARREN_CA_DIR", value_name = "DIR")]
    pub ca_dir: Option<PathBuf>,
    /// Who may ask, instead of service-account tokens: lines of `token node-name`; read again when it changes
    #[arg(long, env = "WARREN_CA_TOKENS", value_name = "FILE")]
    pub ca_tokens: Option<PathBuf>,
    /// Service account of the nodes' daemons
    #[arg(
        long,
        env = "WARREN_NODE_ACCOUNT",
        value_name = "NAMESPACE/NAME",
        default_value = "warren-system/warren-node"
    )]
    pub node_account: ServiceAccount,
    /// Audience that their tokens must be made for
    #[arg(
        long,
        env = "WARREN_TOKEN_AUDIENCE",
        value_name = "NAME",
        default_value = "warren-ca"
    )]
    pub token_audience: String,
    /// How long a new root is published before certificates are issued under it
    #[arg(long, env = "WARREN_ROOT_SPREAD", value_name = "TIME", default_value = "5m", value_parser = duration)]
    pub root_spread: Duration,
    /// Where to answer requests for certificates
    #[arg(long, env = "WARREN_LISTEN", value_name = "IP:PORT", default_value = "[::]:15012")]
    pub listen: SocketAddr,
    /// A DNS name or address by which nodes reach this server, beside localhost and the address listened on
    #[arg(long, env = "WARREN_SAN", value_name = "NAME", value_delimiter = ',', value_parser = san)]
    pub san: Vec<String>,
    /// The longest life of a certificate, whatever is asked for
    #[arg(long, env = "WARREN_MAX_SVID_LIFETIME", value_name = "TIME", default_value = "24h", value_parser = duration)]
    pub max_svid_lifetime: Duration,

    #[command(flatten)]
    pub ports: Ports,
    #[command(flatten)]
    pub run: RunConfig,
}

/// Where desired state comes from: the API server of the cluster that this pod runs in, unless told otherwise.
#[derive(Debug, Clone, Args)]
pub struct SourceArgs {
    /// Directory of Kubernetes manifests to read the desired state from, instead of an API server
    #[arg(long, env = "WARREN_MANIFESTS", value_name = "DIR", conflicts_with = "kubeconfig")]
    pub manifests: Option<PathBuf>,
    /// How to reach the API server from outside the cluster
    #[arg(long, env = "WARREN_KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
}

/// Names that hold for the whole mesh.
#[derive(Debug, Clone, Args)]
pub struct MeshConfig {
    /// Trust domain of the mesh's identities
    #[arg(long, env = "WARREN_TRUST_DOMAIN", value_name = "NAME", default_value = "cluster.local", value_parser = trust_domain)]
    pub trust_domain: TrustDomain,
    /// Another trust domain whose identities count as the mesh's own
    #[arg(long, env = "WARREN_TRUST_DOMAIN_ALIAS", value_name = "NAME", value_delimiter = ',', value_parser = trust_domain)]
    pub trust_domain_alias: Vec<TrustDomain>,
    /// Namespace whose policies hold for the whole mesh
    #[arg(
        long,
        env = "WARREN_ROOT_NAMESPACE",
        value_name = "NAME",
        default_value = "istio-system"
    )]
    pub root_namespace: String,
    /// The cluster's name, as metrics carry it
    #[arg(long, env = "WARREN_CLUSTER_NAME", value_name = "NAME", default_value = "Kubernetes")]
    pub cluster_name: String,
    /// The cluster's DNS domain
    #[arg(
        long,
        env = "WARREN_CLUSTER_DOMAIN",
        value_name = "NAME",
        default_value = "cluster.local"
    )]
    pub cluster_domain: String,
}

/// How the programs in the kernel are kept.
#[derive(Debug, Clone, Args)]
pub struct KernelArgs {
    /// Directory on bpffs where programs and maps outlive this process; one for each daemon
    #[arg(
        long,
        env = "WARREN_PIN_DIR",
        value_name = "DIR",
        default_value = "/sys/fs/bpf/warren"
    )]
    pub pin_dir: PathBuf,
    /// cgroup v2 directory whose processes are watched [default: the root of the hierarchy]
    #[arg(long, env = "WARREN_CGROUP", value_name = "DIR")]
    pub cgroup: Option<PathBuf>,
    /// cgroup v2 directory of the pods [default: looked for below --cgroup]
    #[arg(long, env = "WARREN_KUBEPODS", value_name = "DIR")]
    pub kubepods: Option<PathBuf>,
    /// How the guard is attached to a pod's interfaces
    #[arg(long, env = "WARREN_TC", value_name = "HOW", default_value = "auto")]
    pub tc: Tc,
    /// Pod addresses of the cluster that there is room for
    #[arg(long, env = "WARREN_MAX_WORKLOADS", value_name = "N", default_value = "65536", value_parser = count)]
    pub max_workloads: u32,
    /// Service addresses times ports that there is room for
    #[arg(long, env = "WARREN_MAX_SERVICES", value_name = "N", default_value = "65536", value_parser = count)]
    pub max_services: u32,
    /// Pod and service ranges that there is room for
    #[arg(long, env = "WARREN_MAX_RANGES", value_name = "N", default_value = "4096", value_parser = count)]
    pub max_ranges: u32,
    /// Captured pods of this node that there is room for
    #[arg(long, env = "WARREN_MAX_PODS", value_name = "N", default_value = "1024", value_parser = count)]
    pub max_pods: u32,
}

/// The chained CNI plugin, by which pods start captured; with an API server alone.
#[derive(Debug, Clone, Args)]
pub struct CniArgs {
    /// Install no CNI plugin: pods are captured a moment after they have started
    #[arg(long, env = "WARREN_NO_CNI")]
    pub no_cni: bool,
    /// The node's directory of CNI plugins; the node knows it without a leading /host
    #[arg(
        long,
        env = "WARREN_CNI_BIN_DIR",
        value_name = "DIR",
        default_value = "/host/opt/cni/bin"
    )]
    pub cni_bin_dir: PathBuf,
    /// The node's directory of CNI configurations; the node knows it without a leading /host
    #[arg(
        long,
        env = "WARREN_CNI_CONF_DIR",
        value_name = "DIR",
        default_value = "/host/etc/cni/net.d"
    )]
    pub cni_conf_dir: PathBuf,
    /// Where the CNI plugin is answered; the same path on the node
    #[arg(
        long,
        env = "WARREN_CNI_SOCKET",
        value_name = "FILE",
        default_value = "/run/warren/cni.sock"
    )]
    pub cni_socket: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Tc {
    /// By a link where the kernel has them (6.6), else by a filter
    Auto,
    /// By a filter of a clsact qdisc
    Netlink,
}

/// The clocks of HBONE connections.
#[derive(Debug, Clone, Args)]
pub struct HboneConfig {
    /// Time between two pings of a connection
    #[arg(long, env = "WARREN_HBONE_PING", value_name = "TIME", default_value = "10s", value_parser = duration)]
    pub hbone_ping: Duration,
    /// A connection whose ping has no answer for so long is dead
    #[arg(long, env = "WARREN_HBONE_DEAD_AFTER", value_name = "TIME", default_value = "20s", value_parser = duration)]
    pub hbone_dead_after: Duration,
    /// A connection without tunnels closes after so long
    #[arg(long, env = "WARREN_HBONE_IDLE", value_name = "TIME", default_value = "5m", value_parser = duration)]
    pub hbone_idle: Duration,
}

/// Ports that this process itself serves; 0 for none.
#[derive(Debug, Clone, Args)]
pub struct Ports {
    /// Port of /config_dump and /logging
    #[arg(long, env = "WARREN_ADMIN_PORT", value_name = "PORT", default_value_t = 15000)]
    pub admin_port: u16,
    /// Address of the admin port; it shows all state and changes the log's level [default: localhost]
    #[arg(long, env = "WARREN_ADMIN_ADDRESS", value_name = "IP")]
    pub admin_address: Option<IpAddr>,
    /// Port of /metrics
    #[arg(long, env = "WARREN_METRICS_PORT", value_name = "PORT", default_value_t = 15020)]
    pub metrics_port: u16,
    /// Port of /healthz/ready
    #[arg(long, env = "WARREN_READINESS_PORT", value_name = "PORT", default_value_t = 15021)]
    pub readiness_port: u16,
}

/// How the process runs.
#[derive(Debug, Clone, Args)]
pub struct RunConfig {
    /// Threads that carry connections [default: one per processor that this process may use]
    #[arg(long, env = "WARREN_WORKERS", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub workers: Option<u16>,
    /// How long open connections may go on after SIGTERM
    #[arg(long, env = "WARREN_DRAIN_DEADLINE", value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub drain_deadline: Duration,
    /// Form of log and access log
    #[arg(long, env = "WARREN_LOG_FORMAT", value_name = "FORMAT", default_value = "text")]
    pub log_format: logging::Format,
    /// Level of the log, or module=level pairs [default: $RUST_LOG, or info]
    #[arg(long, env = "WARREN_LOG_LEVEL", value_name = "LEVEL", value_parser = log_filter)]
    pub log_level: Option<String>,
}

/// What is wrong with a configuration as a whole: which flag, why, and what to do.
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
    /// Where daemons of this node meet; `None` if there is never more than one.
    pub fn meeting_place(&self) -> Option<PathBuf> {
        let beside = || self.cni.cni_socket.with_file_name("handover.sock");
        match (&self.handover_socket, &self.source.manifests) {
            (Some(socket), _) => Some(socket.clone()),
            (None, None) => Some(beside()),
            (None, Some(_)) => None,
        }
    }

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

    /// The log's filter: the flag or its variable, else `RUST_LOG`, else `info`.
    pub fn log_filter(&self) -> String {
        let given = self.log_level.clone().or_else(|| std::env::var("RUST_LOG").ok());
        given
            .filter(|filter| !filter.trim().is_empty())
            .unwrap_or_else(|| "info".to_owned())
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

#[cfg(test)]
mod tests;
