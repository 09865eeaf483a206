//! The maps, shared by pin between the programs and with the daemon; `warren_common::tables` says what each holds. The
//! sizes here are placeholders: the loader sets those of the configuration. Maps that the daemon alone writes are not
//! preallocated: they take the memory of what they hold.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    helpers::{bpf_map_lookup_elem, bpf_sk_release},
    macros::map,
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, SockMap},
    programs::SkLookupContext,
};
use warren_common::{
    Address, Family, FourTuple, PlaintextMode, PodNumber, PodSettings, Reason, Role,
    connect::NODE_CONNECT_LIFETIME,
    pod::{listener_index, live_index},
    tables::{
        Cookie, Instant, NodeFacts, OwnAddress, PortKey, PortMode, Present, ServiceEntry, ServiceKey, WorkloadEntry,
    },
};

#[map]
static NODE: Array<NodeFacts> = Array::pinned(1, 0);
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::pinned(Reason::ALL.len() as u32, 0);
#[map]
static PODS: HashMap<Cookie, PodNumber> = HashMap::pinned(1, BPF_F_NO_PREALLOC);
#[map]
static SETTINGS: Array<PodSettings> = Array::pinned(1, 0);
#[map]
static PORT_MODES: HashMap<PortKey, PortMode> = HashMap::pinned(1, BPF_F_NO_PREALLOC);
#[map]
static OWN_ADDRESSES: HashMap<OwnAddress, Present> = HashMap::pinned(1, BPF_F_NO_PREALLOC);
#[map]
static WORKLOADS: HashMap<Address, WorkloadEntry> = HashMap::pinned(1, BPF_F_NO_PREALLOC);
#[map]
static SERVICES: HashMap<ServiceKey, ServiceEntry> = HashMap::pinned(1, BPF_F_NO_PREALLOC);
#[map]
static RANGES: LpmTrie<Address, Present> = LpmTrie::pinned(1, 0);
#[map]
static LIVE: Array<Cookie> = Array::pinned(1, 0);
#[map]
static LISTENERS: SockMap = SockMap::pinned(1, 0);
#[map]
static NODE_DIALS: LruHashMap<Cookie, Instant> = LruHashMap::pinned(1, 0);
#[map]
static NODE_CONNECTS: LruHashMap<FourTuple, Instant> = LruHashMap::pinned(1, 0);

/// Copies an entry out of a hash map.
macro_rules! get {
    ($map:expr, $key:expr) => {
        // SAFETY: an entry that is deleted and reused meanwhile gives the bytes of another entry of the same type, which
        // are valid; what is decided from them was true a moment ago or will be.
        unsafe { $map.get($key) }.copied()
    };
}

#[inline(always)]
pub fn count(reason: Reason) {
    if let Some(counter) = COUNTERS.get_ptr_mut(reason.index()) {
        // SAFETY: the cell is this CPU's, and the verifier has seen the check for null.
        unsafe { *counter += 1 };
    }
}

#[inline(always)]
pub fn node() -> NodeFacts {
    NODE.get(0).copied().unwrap_or(NodeFacts::UNKNOWN)
}

#[inline(always)]
pub fn pod_of(namespace: Cookie) -> Option<PodNumber> {
    get!(PODS, &namespace)
}

#[inline(always)]
pub fn settings(pod: PodNumber) -> PodSettings {
    SETTINGS.get(pod.get()).copied().unwrap_or(PodSettings::RELEASED)
}

#[inline(always)]
pub fn port_mode(pod: PodNumber, port: u16) -> Option<PlaintextMode> {
    get!(PORT_MODES, &PortKey::new(pod, port)).map(|mode| mode.get())
}

#[inline(always)]
pub fn is_own_address(pod: PodNumber, address: Address) -> bool {
    get!(OWN_ADDRESSES, &OwnAddress::new(pod, address)).is_some()
}

#[inline(always)]
pub fn workload(address: Address) -> Option<WorkloadEntry> {
    get!(WORKLOADS, &address)
}

#[inline(always)]
pub fn service(vip: Address, port: u16) -> Option<ServiceEntry> {
    get!(SERVICES, &ServiceKey::new(vip, port))
}

#[inline(always)]
pub fn is_in_ranges(address: Address) -> bool {
    /// As aya's, but aligned, so that the address is copied by words.
    #[repr(C)]
    struct Prefix {
        bits: u32,
        address: Address,
    }
    let prefix = Prefix { bits: 128, address };
    // SAFETY: the key has the layout that the map was made with, and lives during the call.
    let found = unsafe { bpf_map_lookup_elem((&raw const RANGES).cast_mut().cast(), (&raw const prefix).cast()) };
    !found.is_null()
}

#[inline(always)]
pub fn is_listener_live(pod: PodNumber, family: Family) -> bool {
    LIVE.get(live_index(pod, family))
        .is_some_and(|listener| listener.get() != 0)
}

/// Takes a listener that has closed out of `LIVE`, if it is the one that is there.
#[inline(always)]
pub fn listener_closed(pod: PodNumber, family: Family, listener: Cookie) {
    if let Some(cell) = LIVE.get_ptr_mut(live_index(pod, family)) {
        // SAFETY: the verifier has seen the check for null. The daemon writes the cell only for a listener of its own
        // that is open, so a race could only be between two listeners of which one is closed: the daemon writes last.
        unsafe {
            if (*cell).get() == listener.get() {
                *cell = Cookie::NONE;
            }
        }
    }
}

#[inline(always)]
pub fn is_listening(pod: PodNumber, role: Role, family: Family) -> bool {
    let index = listener_index(pod, role, family);
    // SAFETY: the key is the map's u32, alive during the call; the socket that comes back is released at once.
    unsafe {
        let socket = bpf_map_lookup_elem((&raw const LISTENERS).cast_mut().cast(), (&raw const index).cast());
        if socket.is_null() {
            return false;
        }
        bpf_sk_release(socket);
    }
    true
}

/// Gives an arrival to a listener. False if there is none.
#[inline(always)]
pub fn hand_to(context: &SkLookupContext, pod: PodNumber, role: Role, family: Family) -> bool {
    LISTENERS
        .redirect_sk_lookup(context, listener_index(pod, role, family), 0)
        .is_ok()
}

/// Notes that a process of the node is about to connect this socket.
#[inline(always)]
pub fn note_node_dial(socket: Cookie, now: Instant) {
    // A full LRU map makes room; what it cannot hold is an arrival without a note, and falls to the pod's settings.
    let _ = NODE_DIALS.insert(socket, now, 0);
}

/// True, once, if the socket was noted.
#[inline(always)]
pub fn take_node_dial(socket: Cookie) -> bool {
    if get!(NODE_DIALS, &socket).is_none() {
        return false;
    }
    let _ = NODE_DIALS.remove(socket);
    true
}

#[inline(always)]
pub fn note_node_connect(connection: &FourTuple, now: Instant) {
    let _ = NODE_CONNECTS.insert(connection, now, 0);
}

#[inline(always)]
pub fn is_noted_by_node(connection: &FourTuple, now: Instant) -> bool {
    get!(NODE_CONNECTS, connection)
        .is_some_and(|noted: Instant| now.get().wrapping_sub(noted.get()) < NODE_CONNECT_LIFETIME)
}

/// The connection is established: no other may arrive in its name.
#[inline(always)]
pub fn forget_node_connect(connection: &FourTuple) {
    if get!(NODE_CONNECTS, connection).is_some() {
        let _ = NODE_CONNECTS.remove(connection);
    }
}
