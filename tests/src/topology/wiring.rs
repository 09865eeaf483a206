//! How namespaces become a network: links, addresses, routes, sysctls. All of it through a few `ip -batch`, in well under a second.

use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result, ensure};

use super::spec::v6_of;
use super::{Node, Place, Pod, PodSpec, WIRE, World};
use crate::leftovers;
use crate::netns::{self, Namespace};
use crate::{cgroup, congestion};

impl World {
    pub(super) fn build_nodes(&mut self) -> Result<()> {
        let _guard = leftovers::changing();
        let places: Vec<Place> = self.nodes.iter().chain([&self.controller]).cloned().collect();
        let names: Vec<&str> = places.iter().map(|place| place.namespace.name()).collect();
        self.leftovers.namespaces = names.iter().map(|name| (*name).to_owned()).collect();
        self.ledger.write(&self.leftovers)?;
        leftovers::mount_bpffs(&self.leftovers.pins)?;
        for node in Node::BOTH {
            cgroup::create(&self.daemon(node).cgroup)?;
        }
        for place in &places {
            cgroup::create(&place.cgroup)?;
        }
        netns::create(&names)?;
        self.prepare(&places)?;
        let (a, b, controller) = (names[0], names[1], names[2]);
        netns::ip_batch(
            &[],
            &[
                format!("link add name {WIRE} netns {a} type veth peer name {WIRE} netns {b}"),
                format!("link add name controller netns {a} type veth peer name eth0 netns {controller}"),
            ],
        )?;
        for node in Node::BOTH {
            let Place { v4, v6, namespace, .. } = self.node(node);
            let other = match node {
                Node::A => Node::B,
                Node::B => Node::A,
            };
            let peer = self.node(other);
            let [pods4, pods6] = other.pod_ranges();
            let mut lines = vec![
                "link set lo up".to_owned(),
                format!("addr add {v4}/24 dev {WIRE}"),
                format!("addr add {v6}/112 dev {WIRE} nodad"),
                format!("link set {WIRE} up"),
                format!("route add {pods4} via {} src {v4}", peer.v4),
                format!("route add {pods6} via {} src {v6}", peer.v6),
            ];
            match node {
                Node::A => lines.extend(attachment_at_node("controller", &self.controller, v4, v6)),
                Node::B => {
                    lines.push(format!("route add {} via {} src {v4}", self.controller.v4, peer.v4));
                    lines.push(format!("route add {} via {} src {v6}", self.controller.v6, peer.v6));
                }
            }
            namespace.ip(&lines)?;
        }
        self.controller.namespace.ip(&attachment_inside(&self.controller))
    }

    pub(super) fn attach_pods(&mut self, specs: Vec<PodSpec>) -> Result<()> {
        let _guard = leftovers::changing();
        let from = self.pods.len();
        for spec in specs {
            let pod = self.place_pod(spec)?;
            self.pods.push(pod);
        }
        let added = self.pods[from..].to_vec();
        if added.is_empty() {
            return Ok(());
        }
        let names: Vec<&str> = added.iter().map(|pod| pod.namespace.name()).collect();
        self.leftovers
            .namespaces
            .extend(names.iter().map(|name| (*name).to_owned()));
        self.ledger.write(&self.leftovers)?;
        for pod in &added {
            cgroup::create(&pod.cgroup)?;
        }
        netns::create(&names)?;
        self.prepare(&added.iter().map(|pod| pod.place.clone()).collect::<Vec<_>>())?;
        let links: Vec<String> = added
            .iter()
            .map(|pod| {
                let (inside, node) = (pod.namespace.name(), self.node(pod.spec.node).namespace.name());
                format!(
                    "link add name {} netns {node} type veth peer name eth0 netns {inside}",
                    link_name(pod)
                )
            })
            .collect();
        netns::ip_batch(&[], &links)?;
        for node in Node::BOTH {
            let Place { v4, v6, namespace, .. } = self.node(node);
            let mine = added.iter().filter(|pod| pod.spec.node == node);
            let lines: Vec<String> = mine
                .flat_map(|pod| attachment_at_node(&link_name(pod), pod, v4, v6))
                .collect();
            if !lines.is_empty() {
                namespace.ip(&lines)?;
            }
        }
        // Each has an `ip` of its own, and most of that is waiting for the kernel.
        std::thread::scope(|scope| {
            let running: Vec<_> = added
                .iter()
                .map(|pod| scope.spawn(|| pod.namespace.ip(&attachment_inside(pod))))
                .collect();
            running.into_iter().try_for_each(|thread| match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            })
        })
    }

    fn place_pod(&self, spec: PodSpec) -> Result<Pod> {
        ensure!(
            self.pods.iter().all(|pod| pod.spec.name != spec.name),
            "two pods named `{}`",
            spec.name
        );
        let taken = |number: u8| {
            self.pods
                .iter()
                .any(|pod| pod.spec.node == spec.node && pod.spec.number == Some(number))
        };
        let number = match spec.number {
            Some(number) => number,
            None => (10..250)
                .find(|number| !taken(*number))
                .context("no address is left on the node")?,
        };
        ensure!(
            !taken(number),
            "two pods numbered {number} on node {}",
            spec.node.letter()
        );
        let third = spec.node.number();
        let name = format!("{}-{}", self.prefix, spec.name);
        let cgroup = match spec.below_node_cgroup {
            true => self.node_cgroup(spec.node).join("kubepods"),
            false => self.leftovers.cgroup.join("beyond"),
        };
        let place = Place {
            namespace: Namespace::named(name.clone()),
            name,
            cgroup: cgroup.join(&spec.name),
            cpu: self.pin.then(|| spec.node.index()),
            v4: Ipv4Addr::new(10, 77, third, number),
            v6: v6_of(format_args!("fd77::{third}:{number}")),
            logs: self.log_directory(),
        };
        Ok(Pod {
            spec: PodSpec {
                number: Some(number),
                ..spec
            },
            place,
        })
    }

    /// Sysctls of fresh namespaces; those of `default` must precede the interfaces.
    fn prepare(&self, places: &[Place]) -> Result<()> {
        let nodes: Vec<&str> = self.nodes.iter().map(|node| node.namespace.name()).collect();
        for place in places {
            place.namespace.sysctls(&[
                ("ipv4/conf/all/rp_filter", "0"),
                ("ipv4/conf/default/rp_filter", "0"),
                // Without this every new IPv6 address waits a second for duplicates that cannot be.
                ("ipv6/conf/all/accept_dad", "0"),
                ("ipv6/conf/default/accept_dad", "0"),
                ("ipv6/conf/default/accept_ra", "0"),
            ])?;
            if nodes.contains(&place.namespace.name()) {
                place
                    .namespace
                    .sysctls(&[("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")])?;
            }
        }
        if self.cubic {
            let namespaces: Vec<&Namespace> = places.iter().map(|place| &place.namespace).collect();
            congestion::use_cubic(&namespaces, &leftovers::run_directory()?)?;
        }
        Ok(())
    }
}

/// Interface names have at most 15 bytes, pods' names more: the number is unique on its node.
fn link_name(pod: &Pod) -> String {
    format!("pod{}", pod.spec.number.unwrap_or_default())
}

/// The node's end of a pod's veth, as the CNI plugin ptp makes it: a gateway address and a host route.
fn attachment_at_node(link: &str, place: &Place, node4: &Ipv4Addr, node6: &Ipv6Addr) -> Vec<String> {
    let Place { v4, v6, .. } = place;
    vec![
        format!("addr add 169.254.1.1/32 dev {link}"),
        format!("addr add fe80::1/64 dev {link} nodad"),
        format!("link set {link} up"),
        format!("route add {v4}/32 dev {link} src {node4}"),
        format!("route add {v6}/128 dev {link} src {node6}"),
    ]
}

fn attachment_inside(place: &Place) -> Vec<String> {
    let Place { v4, v6, .. } = place;
    vec![
        "link set lo up".to_owned(),
        format!("addr add {v4}/32 dev eth0"),
        format!("addr add {v6}/128 dev eth0 nodad"),
        "link set eth0 up".to_owned(),
        "route add 169.254.1.1/32 dev eth0 scope link".to_owned(),
        format!("route add default via 169.254.1.1 dev eth0 src {v4}"),
        "route add ::/0 via fe80::1 dev eth0".to_owned(),
    ]
}
