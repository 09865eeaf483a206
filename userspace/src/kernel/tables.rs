//! The maps as the daemon writes them: those of the whole cluster, and those of this node's pods.

use super::{
    FullMap, MapError,
    mirror::{Mirror, Prefix, broken},
    programs::Loading,
    shared::Shared,
};
use aya::{
    Ebpf,
    maps::{Array, HashMap as BpfHashMap, Map, MapData, PerCpuArray, SockMap, lpm_trie::LpmTrie},
};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, TcpListener},
};
use warren_common::{
    Address, Family, PodNumber, PodSettings, Reason, Role,
    pod::{listener_index, live_index},
    tables::{
        Cookie, NodeFacts, OwnAddress, PortKey, PortMode, Present, ServiceEntry, ServiceKey, WorkloadEntry, names,
    },
};

type HashMirror<K, V> = Mirror<K, V, BpfHashMap<MapData, Shared<K>, Shared<V>>>;
type TrieMirror<K, V> = Mirror<Prefix<K>, V, LpmTrie<MapData, Shared<K>, Shared<V>>>;

/// What is known of the cluster.
pub(super) struct ClusterTables {
    pub(super) workloads: HashMirror<Address, WorkloadEntry>,
    pub(super) services: HashMirror<ServiceKey, ServiceEntry>,
    pub(super) ranges: TrieMirror<Address, Present>,
}

impl ClusterTables {
    pub(super) fn adopt(ebpf: &mut Ebpf, loading: &Loading) -> Result<Self, MapError> {
        Ok(Self {
            workloads: hash(ebpf, loading, names::WORKLOADS)?,
            services: hash(ebpf, loading, names::SERVICES)?,
            ranges: Mirror::adopt(names::RANGES, loading.size(names::RANGES), take(ebpf, names::RANGES)?)?,
        })
    }

    /// What is in the maps by now, whoever wrote it.
    pub(super) fn reread(&mut self) -> Result<(), MapError> {
        self.workloads.reread()?;
        self.services.reread()?;
        self.ranges.reread()
    }

    pub(super) fn full(&self) -> impl Iterator<Item = FullMap> {
        [self.workloads.full(), self.services.full(), self.ranges.full()]
            .into_iter()
            .flatten()
    }
}

/// A pod that has a number.
#[derive(Debug, Clone, Copy)]
pub(super) struct Numbered {
    pub(super) cookie: u64,
    pub(super) settings: PodSettings,
}

/// What is known of the pods of this node.
pub(super) struct PodTables {
    /// How many pods there is room for.
    room: u32,
    pub(super) numbered: BTreeMap<PodNumber, Numbered>,
    node: Array<MapData, Shared<NodeFacts>>,
    settings: Array<MapData, Shared<PodSettings>>,
    live: Array<MapData, Shared<Cookie>>,
    listeners: SockMap<MapData>,
    pub(super) steered: HashMirror<Cookie, PodNumber>,
    port_modes: HashMirror<PortKey, PortMode>,
    own_addresses: HashMirror<OwnAddress, Present>,
}

impl PodTables {
    pub(super) fn adopt(ebpf: &mut Ebpf, loading: &Loading) -> Result<Self, MapError> {
        let steered: HashMirror<Cookie, PodNumber> = hash(ebpf, loading, names::PODS)?;
        let settings: Array<_, Shared<PodSettings>> = take(ebpf, names::SETTINGS)?;
        let numbered = steered_pods(&steered, &settings)?;
        Ok(Self {
            room: loading.size(names::SETTINGS),
            numbered,
            node: take(ebpf, names::NODE)?,
            settings,
            live: take(ebpf, names::LIVE)?,
            listeners: take(ebpf, names::LISTENERS)?,
            steered,
            port_modes: hash(ebpf, loading, names::PORT_MODES)?,
            own_addresses: hash(ebpf, loading, names::OWN_ADDRESSES)?,
        })
    }

    /// What is in the maps by now, whoever wrote it.
    pub(super) fn reread(&mut self) -> Result<(), MapError> {
        self.steered.reread()?;
        self.port_modes.reread()?;
        self.own_addresses.reread()?;
        self.numbered = steered_pods(&self.steered, &self.settings)?;
        Ok(())
    }

    pub(super) fn full(&self) -> impl Iterator<Item = FullMap> {
        [self.steered.full(), self.port_modes.full(), self.own_addresses.full()]
            .into_iter()
            .flatten()
    }

    pub(super) fn set_node(&mut self, facts: NodeFacts) -> Result<(), MapError> {
        self.node
            .set(0, Shared(facts), 0)
            .map_err(|error| broken(names::NODE, error))
    }

    /// The number of the pod with this namespace, or a free one.
    pub(super) fn number_for(&mut self, cookie: u64) -> Result<PodNumber, MapError> {
        if let Some((pod, _)) = self.numbered.iter().find(|(_, numbered)| numbered.cookie == cookie) {
            return Ok(*pod);
        }
        let pod = (0..self.room)
            .map(PodNumber::new)
            .find(|pod| !self.numbered.contains_key(pod))
            .ok_or(MapError::Full {
                map: names::SETTINGS,
                size: self.room,
            })?;
        // Whoever had the number before may have left something behind.
        self.clear(pod)?;
        self.numbered.insert(
            pod,
            Numbered {
                cookie,
                settings: PodSettings::RELEASED,
            },
        );
        Ok(pod)
    }

    pub(super) fn numbered(&self, pod: PodNumber) -> Result<Numbered, MapError> {
        self.numbered.get(&pod).copied().ok_or(MapError::NoSuchPod {
            number: pod.get(),
            size: self.room,
        })
    }

    pub(super) fn set_settings(&mut self, pod: PodNumber, settings: PodSettings) -> Result<(), MapError> {
        let mut numbered = self.numbered(pod)?;
        self.settings
            .set(pod.get(), Shared(settings), 0)
            .map_err(|error| broken(names::SETTINGS, error))?;
        numbered.settings = settings;
        self.numbered.insert(pod, numbered);
        Ok(())
    }

    pub(super) fn set_port_modes(
        &mut self,
        pod: PodNumber,
        wanted: &HashMap<PortKey, PortMode>,
    ) -> Result<(), MapError> {
        self.port_modes.sync(wanted, |key| key.pod() == pod).map(drop)
    }

    pub(super) fn set_addresses(&mut self, pod: PodNumber, addresses: &BTreeSet<IpAddr>) -> Result<(), MapError> {
        let wanted = addresses
            .iter()
            .map(|address| (OwnAddress::new(pod, (*address).into()), Present::default()))
            .collect();
        self.own_addresses.sync(&wanted, |own| own.pod() == pod).map(drop)
    }

    /// Puts a listener where arrivals find it, or takes away the one that is there.
    pub(super) fn set_listener(
        &mut self,
        pod: PodNumber,
        role: Role,
        family: Family,
        listener: Option<&TcpListener>,
    ) -> Result<(), MapError> {
        let index = listener_index(pod, role, family);
        match listener {
            Some(listener) => self
                .listeners
                .set(index, listener, 0)
                .map_err(|error| broken(names::LISTENERS, error))?,
            None => match self.listeners.clear_index(&index) {
                // It is out already: a closed socket leaves by itself.
                Ok(()) | Err(aya::maps::MapError::KeyNotFound | aya::maps::MapError::SyscallError(_)) => {}
                Err(error) => return Err(broken(names::LISTENERS, error)),
            },
        }
        Ok(())
    }

    /// Says whose closing ends the steering of a family; `NONE` ends it now.
    pub(super) fn set_live(&mut self, pod: PodNumber, family: Family, listener: Cookie) -> Result<(), MapError> {
        self.live
            .set(live_index(pod, family), Shared(listener), 0)
            .map_err(|error| broken(names::LIVE, error))
    }

    /// Takes everything about a number out of the maps.
    fn clear(&mut self, pod: PodNumber) -> Result<(), MapError> {
        let cookies: Vec<_> = self
            .steered
            .held()
            .iter()
            .filter(|(_, held)| **held == pod)
            .map(|(cookie, _)| *cookie)
            .collect();
        for cookie in cookies {
            self.steered.take(&cookie)?;
        }
        for family in Family::ALL {
            self.set_live(pod, family, Cookie::NONE)?;
            for role in Role::ALL {
                self.set_listener(pod, role, family, None)?;
            }
        }
        self.settings
            .set(pod.get(), Shared(PodSettings::RELEASED), 0)
            .map_err(|error| broken(names::SETTINGS, error))?;
        self.port_modes.sync(&HashMap::new(), |key| key.pod() == pod)?;
        self.own_addresses.sync(&HashMap::new(), |own| own.pod() == pod)?;
        Ok(())
    }

    /// Clears a number and lets another pod have it.
    pub(super) fn forget(&mut self, pod: PodNumber) -> Result<(), MapError> {
        if pod.get() < self.room {
            self.clear(pod)?;
        }
        self.numbered.remove(&pod);
        Ok(())
    }
}

/// The pods that are steered, with their settings.
fn steered_pods(
    steered: &HashMirror<Cookie, PodNumber>,
    settings: &Array<MapData, Shared<PodSettings>>,
) -> Result<BTreeMap<PodNumber, Numbered>, MapError> {
    let numbered = |(cookie, pod): (&Cookie, &PodNumber)| -> Result<_, MapError> {
        let Shared(settings) = settings
            .get(&pod.get(), 0)
            .map_err(|error| broken(names::SETTINGS, error))?;
        Ok((
            *pod,
            Numbered {
                cookie: cookie.get(),
                settings,
            },
        ))
    };
    steered.held().iter().map(numbered).collect()
}

/// The counters of the programs.
pub(super) struct Counters(PerCpuArray<MapData, u64>);

impl Counters {
    pub(super) fn adopt(ebpf: &mut Ebpf) -> Result<Self, MapError> {
        take(ebpf, names::COUNTERS).map(Self)
    }

    pub(super) fn read(&self) -> Result<Vec<(Reason, u64)>, MapError> {
        Reason::ALL
            .into_iter()
            .map(|reason| {
                let per_cpu = self
                    .0
                    .get(&reason.index(), 0)
                    .map_err(|error| broken(names::COUNTERS, error))?;
                Ok((
                    reason,
                    per_cpu.iter().fold(0, |sum: u64, count| sum.wrapping_add(*count)),
                ))
            })
            .collect()
    }
}

fn take<T: TryFrom<Map, Error = aya::maps::MapError>>(ebpf: &mut Ebpf, name: &'static str) -> Result<T, MapError> {
    let map = ebpf.take_map(name).ok_or(MapError::Missing { map: name })?;
    T::try_from(map).map_err(|error| broken(name, error))
}

fn hash<K, V>(ebpf: &mut Ebpf, loading: &Loading, name: &'static str) -> Result<HashMirror<K, V>, MapError>
where
    K: super::mirror::Plain + std::hash::Hash,
    V: super::mirror::Plain,
{
    Mirror::adopt(name, loading.size(name), take(ebpf, name)?)
}
