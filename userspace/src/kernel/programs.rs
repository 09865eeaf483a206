//! The kernel programs that this binary carries, and loading them over the pinned maps.

use super::{Sizes, pins::Pins};
use aya::{Ebpf, EbpfError, EbpfLoader, maps::MapInfo};
use nix::sched::{CloneFlags, unshare};
use parking_lot::Mutex;
use std::{collections::HashMap, thread};
use tracing::debug;
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

static LOG_NOTHING: u8 = 0;
static LOG_TRACE: u8 = aya_log::Level::Trace as u8;

/// The global that says which pod an instance serves.
const POD: &str = "POD";

/// How the objects are loaded: over which maps, how large, and how talkative.
pub(super) struct Loading {
    /// One for all pods; their number is the one thing that changes.
    loader: Mutex<EbpfLoader<'static>>,
    sizes: HashMap<&'static str, u32>,
    /// Every pod's number, since the loader wants a global's value to outlive it.
    numbers: &'static [u32],
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
        let maps = pins.maps();
        let pinned = |name: &str| {
            let info = MapInfo::from_pin(maps.join(name)).ok()?;
            Some(info.max_entries())
        };
        let sizes: HashMap<_, _> = wished
            .into_iter()
            .map(|(name, size)| (name, pinned(name).unwrap_or(size.max(1))))
            .collect();

        let mut loader = loader_without_kernel_btf();
        loader
            .btf(None)
            .default_map_pin_directory(&maps)
            .map_pin_path(names::TRACE, maps.join(names::TRACE))
            .override_global(aya_log::LEVEL, if trace { &LOG_TRACE } else { &LOG_NOTHING }, true);
        for (name, size) in &sizes {
            loader.map_max_entries(name, *size);
        }
        let numbers: Vec<u32> = (0..sizes.get(names::SETTINGS).copied().unwrap_or_default()).collect();
        Self {
            loader: Mutex::new(loader),
            sizes,
            numbers: numbers.leak(),
        }
    }

    /// Entries that a map has room for.
    pub(super) fn size(&self, name: &str) -> u32 {
        self.sizes.get(name).copied().unwrap_or_default()
    }

    pub(super) fn steer(&self) -> Result<Ebpf, EbpfError> {
        self.loader.lock().load(STEER)
    }

    /// An instance of the arrival program for one pod; `None` if the maps have no room for its number.
    pub(super) fn arrive(&self, pod: PodNumber) -> Option<Result<Ebpf, EbpfError>> {
        let number = self.numbers.get(pod.get() as usize)?;
        let mut loader = self.loader.lock();
        loader.override_global(POD, number, false);
        Some(loader.load(ARRIVE))
    }
}

/// A loader that has not read the kernel's own BTF. None of our programs refers to it, and reading it, which aya does for
/// every loader before it can be told not to, takes 50 to 100 ms and 20 MB. So the loader is made by a thread that does not
/// see where it lies.
fn loader_without_kernel_btf() -> EbpfLoader<'static> {
    let elsewhere = || {
        let moved = unshare(CloneFlags::CLONE_FS).and_then(|()| nix::unistd::chroot("/sys"));
        if let Err(error) = moved {
            debug!(%error, "the kernel's BTF is read, though nobody needs it");
        }
        EbpfLoader::new()
    };
    thread::spawn(elsewhere).join().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
    use warren_common::marks;

    /// Where `struct __sk_buff` has the mark, and how long it is at least.
    const MARK: usize = 8;
    const SKB: usize = 192;

    #[test]
    fn the_guard_drops_what_carries_a_mark_of_ours_and_lets_others_decide_about_the_rest() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: needs root, to load a kernel program");
            return;
        }
        let folder = format!("/sys/fs/bpf/warren-test-guard-{}", std::process::id());
        let pins = Pins::open(folder.as_ref()).unwrap();
        let loading = Loading::new(&pins, &Sizes::default(), false);
        let mut ebpf = loading.steer().unwrap();
        let guard: &mut SchedClassifier = ebpf.program_mut(GUARD).unwrap().try_into().unwrap();
        guard.load().unwrap();
        let verdict = |mark: u32| {
            let mut context = [0; SKB];
            context[MARK..MARK + 4].copy_from_slice(&mark.to_ne_bytes());
            let options = TestRunOptions {
                data_in: Some(&[0; 64]),
                ctx_in: Some(&context),
                ..TestRunOptions::new()
            };
            guard.test_run(options).unwrap().return_value as i32
        };
        for mark in [marks::STEER, marks::DELIVER, marks::REFUSE] {
            assert_eq!(verdict(mark), 2, "TC_ACT_SHOT for {mark:#x}");
        }
        for mark in [0, 1, marks::DAEMON, 0x120] {
            assert_eq!(verdict(mark), -1, "TC_ACT_UNSPEC for {mark:#x}");
        }
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn the_objects_are_small_and_carry_what_the_kernel_wants() {
        for (object, limit) in [(STEER, 100_000), (ARRIVE, 60_000)] {
            assert!(
                object.len() < limit,
                "{} bytes: is there debug information in it?",
                object.len()
            );
            let text = String::from_utf8_lossy(object);
            assert!(text.contains("Dual MIT/GPL") && text.contains(".BTF"));
        }
    }
}
