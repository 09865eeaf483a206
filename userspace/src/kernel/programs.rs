//! The kernel programs that this binary carries, and loading them over the pinned maps.

use super::{Sizes, pins::Pins};
use aya::{Ebpf, EbpfError, EbpfLoader, maps::MapInfo};
use std::collections::HashMap;
use warren_common::{
    PodNumber, Reason,
    pod::{LISTENERS_PER_POD, LIVE_PER_POD},
    tables::names,
};

const STEER: &[u8] = aya::include_bytes_aligned!(env!("WARREN_BPF_STEER"));
const ARRIVE: &[u8] = aya::include_bytes_aligned!(env!("WARREN_BPF_ARRIVE"));

pub(super) const CONNECT: &str = "warren_connect";
pub(super) const DIAL4: &str = "warren_dial4";
pub(super) const DIAL6: &str = "warren_dial6";
pub(super) const GUARD: &str = "warren_guard";
pub(super) const ARRIVAL: &str = "warren_arrive";

const LOG_NOTHING: u8 = 0;
const LOG_TRACE: u8 = aya_log::Level::Trace as u8;

/// False if the build found no object files.
pub(super) fn are_built_in() -> bool {
    !STEER.is_empty() && !ARRIVE.is_empty()
}

/// How the objects are loaded: over which maps, how large, and how talkative.
#[derive(Debug)]
pub(super) struct Loading {
    pins: Pins,
    sizes: HashMap<&'static str, u32>,
    log_level: u8,
}

impl Loading {
    /// A pinned map keeps the size it has, whatever `sizes` says.
    pub(super) fn new(pins: &Pins, sizes: &Sizes, trace: bool) -> Self {
        let wished = [
            (names::NODE, 1),
            (names::COUNTERS, Reason::ALL.len() as u32),
            (names::PODS, sizes.pods),
            (names::SETTINGS, sizes.pods),
            (names::PORT_MODES, sizes.pod_details),
            (names::OWN_ADDRESSES, sizes.pod_details),
            (names::WORKLOADS, sizes.workloads),
            (names::SERVICES, sizes.services),
            (names::RANGES, sizes.ranges),
            (names::LIVE, sizes.pods.saturating_mul(LIVE_PER_POD)),
            (names::LISTENERS, sizes.pods.saturating_mul(LISTENERS_PER_POD)),
            (names::NODE_DIALS, sizes.node_connects),
            (names::NODE_CONNECTS, sizes.node_connects),
        ];
        let pinned = |name: &str| {
            MapInfo::from_pin(pins.maps().join(name))
                .ok()
                .map(|info| info.max_entries())
        };
        Self {
            pins: pins.clone(),
            sizes: wished
                .into_iter()
                .map(|(name, size)| (name, pinned(name).unwrap_or(size.max(1))))
                .collect(),
            log_level: if trace { LOG_TRACE } else { LOG_NOTHING },
        }
    }

    /// Entries that a map has room for.
    pub(super) fn size(&self, name: &str) -> u32 {
        self.sizes.get(name).copied().unwrap_or_default()
    }

    pub(super) fn steer(&self) -> Result<Ebpf, EbpfError> {
        self.with_maps(&mut EbpfLoader::new(), STEER)
    }

    /// An instance of the arrival program for one pod.
    pub(super) fn arrive(&self, pod: PodNumber) -> Result<Ebpf, EbpfError> {
        let number = pod.get();
        let mut loader = EbpfLoader::new();
        loader.override_global("POD", &number, true);
        self.with_maps(&mut loader, ARRIVE)
    }

    fn with_maps<'a>(&'a self, loader: &mut EbpfLoader<'a>, object: &[u8]) -> Result<Ebpf, EbpfError> {
        // The programs know no type of the kernel's own: reading its BTF would take longer than all the rest.
        loader.btf(None);
        loader.default_map_pin_directory(self.pins.maps());
        loader.map_pin_path(names::TRACE, self.pins.maps().join(names::TRACE));
        loader.override_global(aya_log::LEVEL, &self.log_level, true);
        for (name, size) in &self.sizes {
            loader.map_max_entries(name, *size);
        }
        loader.load(object)
    }
}
