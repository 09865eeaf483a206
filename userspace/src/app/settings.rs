//! What the flags say, as the parts take it.

use crate::{
    config::{KernelArgs, MeshConfig, NodeConfig, Tc},
    hbone::HboneSettings,
    kernel::{KernelConfig, Sizes, Tcx},
    mesh::TrustDomain,
    proxy::ProxySettings,
    telemetry::Place,
};
use std::sync::Arc;

pub(super) fn place(mesh: &MeshConfig) -> Place {
    Place {
        cluster: mesh.cluster_name.as_str().into(),
        domain: mesh.cluster_domain.as_str().into(),
    }
}

pub(super) fn trust_domains(mesh: &MeshConfig) -> Vec<TrustDomain> {
    let own = std::iter::once(mesh.trust_domain.clone());
    own.chain(mesh.trust_domain_alias.iter().cloned()).collect()
}

pub(super) fn kernel_config(args: &KernelArgs) -> KernelConfig {
    KernelConfig {
        pin_dir: args.pin_dir.clone(),
        cgroup: args.cgroup.clone(),
        kubepods: args.kubepods.clone(),
        sizes: Sizes {
            workloads: args.max_workloads,
            services: args.max_services,
            ranges: args.max_ranges,
            pods: args.max_pods,
            ..Sizes::default()
        },
        tcx: match args.tc {
            Tc::Auto => Tcx::Auto,
            Tc::Netlink => Tcx::Netlink,
        },
        trace: tracing::enabled!(target: "warren::kernel", tracing::Level::TRACE),
    }
}

pub(super) fn proxy_settings(config: &NodeConfig) -> ProxySettings {
    ProxySettings {
        hbone: Arc::new(HboneSettings {
            ping_interval: config.hbone.hbone_ping,
            ping_timeout: config.hbone.hbone_dead_after,
            idle: config.hbone.hbone_idle,
            ..HboneSettings::default()
        }),
        connections_per_pod: usize::try_from(config.max_connections_per_pod).unwrap_or(usize::MAX),
        ..ProxySettings::default()
    }
}
