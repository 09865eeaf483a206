//! What each role is told at its start: flags, each with a `WARREN_…` variable beside it, checked before anything begins.
//! Not here: the defaults of parts (they take values), and what the commands of the user show (`cli`).

mod check;
mod values;

use crate::{certs::issuer::CaAddress, cli, controller::ServiceAccount, mesh::TrustDomain, telemetry::logging};
use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;
use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};
use values::{cluster_range, count, duration, log_filter, san, trust_domain};

pub use check::ConfigError;
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
    /// By a filter, then by a link where the kernel has them (6.6): nobody in the pod can take it off
    Auto,
    /// By a filter of a clsact qdisc alone
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
}

impl RunConfig {
    /// The log's filter: the flag or its variable, else `RUST_LOG`, else `info`.
    pub fn log_filter(&self) -> String {
        let given = self.log_level.clone().or_else(|| std::env::var("RUST_LOG").ok());
        given
            .filter(|filter| !filter.trim().is_empty())
            .unwrap_or_else(|| "info".to_owned())
    }
}

#[cfg(test)]
mod tests;
