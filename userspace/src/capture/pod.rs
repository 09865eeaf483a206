//! One pod, step by step: into the mesh in the order in which no packet can go astray, and out of it in reverse. Each
//! function blocks for its system calls.

use super::{
    error::CaptureError,
    finder::{Anchor, Found, Place},
    node::{Claim, Node},
    plan::Wanted,
    runtime,
};
use crate::{
    kernel::{
        PodNumber, PodPolicy,
        interfaces::interfaces,
        routes::Routes,
        sockets,
        sysctls::{self, Before},
        watch::{self, Watch},
    },
    mesh::WorkloadUid,
    net::{self, Namespace, NamespaceError, PodListeners},
};
use parking_lot::Mutex;
use std::{
    collections::BTreeSet,
    net::IpAddr,
    panic::resume_unwind,
    sync::Arc,
    thread::{self, ScopedJoinHandle},
};

/// A captured pod.
pub(super) struct Pod {
    pub(super) workload: WorkloadUid,
    pub(super) namespace: Namespace,
    pub(super) place: Place,
    pub(super) anchor: Anchor,
    number: PodNumber,
    addresses: Vec<IpAddr>,
    before: Before,
    /// False once its removal has begun: nothing is put back then.
    is_live: Mutex<bool>,
    _claim: Claim,
}

/// Captures a pod, or takes it over from an earlier daemon without a gap. On an error nothing of it remains, unless it
/// was captured before: then it stays so, and its connections are refused.
pub(super) fn capture(node: &Node, wanted: &Wanted) -> Result<(Pod, PodListeners, Watch), CaptureError> {
    if let Some(class) = &wanted.runtime_class
        && let Some(runtime) = runtime::foreign_kernel(class)
    {
        let class = Arc::clone(class);
        return Err(CaptureError::ForeignKernel { runtime, class });
    }
    let Found { namespace, anchor } = find(node, wanted)?;
    if namespace.inode() == node.namespace.inode() {
        return Err(CaptureError::NodeNamespace);
    }
    if namespace.inode() == node.own.inode() {
        return Err(CaptureError::OwnNamespace);
    }
    let claim = Claim::take(&node.claims, namespace.cookie(), &wanted.workload)?;
    let is_adopted = node.adopted.lock().contains(&namespace.cookie());
    if !is_adopted {
        may_be_captured(&namespace, &wanted.addresses)?;
    }
    let number = node
        .kernel
        .number_for(namespace.cookie())
        .map_err(|source| CaptureError::Number { source })?;
    let mut pod = Pod {
        workload: wanted.workload.clone(),
        namespace,
        place: wanted.place.clone(),
        anchor,
        number,
        addresses: wanted.addresses.clone(),
        before: Before::from_bits(0),
        is_live: Mutex::new(true),
        _claim: claim,
    };
    match install(node, &mut pod, &wanted.policy) {
        Ok((listeners, watch)) => {
            node.adopted.lock().remove(&pod.namespace.cookie());
            node.inherited.forget(pod.namespace.cookie());
            Ok((pod, listeners, watch))
        }
        Err(error) => {
            if !is_adopted {
                undo(node, &pod);
            }
            Err(error)
        }
    }
}

/// The pod's namespace, and what leads there.
pub(super) fn find(node: &Node, wanted: &Wanted) -> Result<Found, CaptureError> {
    let by_processes = |uid: &str| {
        let finder = node.finder.as_ref().ok_or(CaptureError::NoProcess)?;
        let others = [node.namespace.inode(), node.own.inode()];
        finder.of_pod(uid, &wanted.addresses, &others)
    };
    match (&wanted.place, &node.finder) {
        (Place::Path(path), _) => Ok(Found::at_path(path)?),
        (Place::Runtime { path, uid }, Some(finder)) => match finder.at(path) {
            // That sandbox has ended. If the pod has another one, its processes lead there.
            Err(NamespaceError::Gone { .. }) => by_processes(uid),
            found => Ok(found?),
        },
        (Place::Runtime { uid, .. } | Place::Processes { uid }, _) => by_processes(uid),
    }
}

fn may_be_captured(namespace: &Namespace, pod_addresses: &[IpAddr]) -> Result<(), CaptureError> {
    if forwards(namespace)? {
        return Err(CaptureError::Forwards);
    }
    let own = watch::addresses(namespace).map_err(|source| CaptureError::Watch { source })?;
    if pod_addresses.iter().any(|address| own.contains(address)) {
        Ok(())
    } else {
        Err(CaptureError::ForeignNamespace)
    }
}

fn forwards(namespace: &Namespace) -> Result<bool, CaptureError> {
    // What comes in for others leaves by another interface. To ask for more than names takes long on a busy node.
    if interfaces(namespace)?.len() < 2 {
        return Ok(false);
    }
    let links = watch::links(namespace).map_err(|source| CaptureError::Watch { source })?;
    // The sysctl alone says nothing: a new namespace takes it over from the node, which forwards.
    Ok(links.iter().any(|link| link.carries_others)
        && sysctls::forwards(namespace).map_err(|source| CaptureError::Sysctls { source })?)
}

/// Listeners, settings, sysctls, rules, routes and the guard, arrivals, and steering last: no connection is turned round
/// before somebody is there to take it.
fn install(node: &Node, pod: &mut Pod, policy: &PodPolicy) -> Result<(PodListeners, Watch), CaptureError> {
    let kernel = &node.kernel;
    // Before anything is read, so that no change is missed.
    let watch = Watch::open(&pod.namespace).map_err(|source| CaptureError::Watch { source })?;
    let listeners = match node.inherited.copy(pod.namespace.cookie()) {
        Some(inherited) => inherited,
        None => net::listen(&pod.namespace).map_err(|source| CaptureError::Listen { source })?,
    };

    kernel
        .set_policy(pod.number, policy)
        .map_err(|source| CaptureError::Settings { source })?;
    set_own_addresses(node, pod)?;
    kernel
        .set_listeners(pod.number, &listeners)
        .map_err(|source| CaptureError::Settings { source })?;

    let (number, namespace) = (pod.number, pod.namespace.clone());
    let guard = || kernel.guard_pod(number, &namespace);
    // Each waits for the kernel's networking, and on a busy node for long.
    let (guarded, routed) = side_by_side(&guard, || route(pod));
    routed?;
    guarded
        .and_then(|()| kernel.attach_pod(pod.number, &pod.namespace))
        .map_err(|source| CaptureError::Attach { source })?;
    kernel
        .steer(pod.number, pod.namespace.cookie())
        .map_err(|source| CaptureError::Steer { source })?;
    Ok((listeners, watch))
}

/// Runs `there` on a thread of its own, if there is one to be had.
fn side_by_side<T: Send, H>(there: &(impl Fn() -> T + Sync), here: impl FnOnce() -> H) -> (T, H) {
    thread::scope(|scope| {
        let running = thread::Builder::new().spawn_scoped(scope, there);
        let here = here();
        let there = match running.map(ScopedJoinHandle::join) {
            Ok(Ok(done)) => done,
            Ok(Err(panic)) => resume_unwind(panic),
            Err(_) => there(),
        };
        (there, here)
    })
}

fn route(pod: &mut Pod) -> Result<(), CaptureError> {
    let mut routes = Routes::open(&pod.namespace).map_err(|source| CaptureError::Routes { source })?;
    pod.before = switch_sysctls(&pod.namespace, &mut routes)?;
    routes
        .install(&pod.addresses)
        .map_err(|source| CaptureError::Routes { source })
}

/// What the sysctls were is noted in the namespace before they change, so that whoever releases the pod knows it.
fn switch_sysctls(namespace: &Namespace, routes: &mut Routes) -> Result<Before, CaptureError> {
    let noted = routes.note().map_err(|source| CaptureError::Routes { source })?;
    let before = match noted {
        Some(bits) => Before::from_bits(bits),
        None => sysctls::read(namespace).map_err(|source| CaptureError::Sysctls { source })?,
    };
    routes
        .install_note(before.to_bits())
        .map_err(|source| CaptureError::Routes { source })?;
    sysctls::switch_on(namespace).map_err(|source| CaptureError::Sysctls { source })?;
    Ok(before)
}

fn set_own_addresses(node: &Node, pod: &Pod) -> Result<(), CaptureError> {
    let mut addresses: BTreeSet<_> = watch::addresses(&pod.namespace)
        .map_err(|source| CaptureError::Watch { source })?
        .into_iter()
        .collect();
    addresses.extend(&pod.addresses);
    node.kernel
        .set_addresses(pod.number, &addresses)
        .map_err(|source| CaptureError::Settings { source })
}

pub(super) fn set_policy(node: &Node, pod: &Pod, policy: &PodPolicy) -> Result<(), CaptureError> {
    node.kernel
        .set_policy(pod.number, policy)
        .map_err(|source| CaptureError::Settings { source })
}

/// Brings what depends on the namespace up to date: rules and routes that somebody removed, new interfaces, addresses.
pub(super) fn refresh(node: &Node, pod: &Pod) -> Result<(), CaptureError> {
    let is_live = pod.is_live.lock();
    if !*is_live {
        return Ok(());
    }
    let mut routes = Routes::open(&pod.namespace).map_err(|source| CaptureError::Routes { source })?;
    if !routes
        .are_complete()
        .map_err(|source| CaptureError::Routes { source })?
    {
        routes
            .install_note(pod.before.to_bits())
            .and_then(|()| routes.install(&pod.addresses))
            .map_err(|source| CaptureError::Routes { source })?;
        // Said afterwards: whoever takes a pod down removes them, too, and they cannot be put back then.
        tracing::warn!(workload = %pod.workload, "somebody removed the pod's rules or routes, they have been put back");
    }
    for interface in interfaces(&pod.namespace)? {
        node.kernel
            .guard_interface(pod.number, &pod.namespace, &interface.name)
            .map_err(|source| CaptureError::Attach { source })?;
    }
    set_own_addresses(node, pod)
}

/// Makes the guard one that nobody in the pod can take off. Whoever starts meanwhile on the node waits for the kernel.
pub(super) fn link_guards(node: &Node, pod: &Pod) -> Result<(), CaptureError> {
    let is_live = pod.is_live.lock();
    if !*is_live {
        return Ok(());
    }
    node.kernel
        .link_guards(pod.number, &pod.namespace)
        .map_err(|source| CaptureError::Attach { source })
}

/// The first step out: new connections are left alone.
pub(super) fn stop_steering(node: &Node, pod: &Pod) -> Result<(), CaptureError> {
    node.kernel
        .stop_steering(pod.number)
        .map_err(|source| CaptureError::Steer { source })
}

/// How many connections still depend on the pod's rules.
pub(super) fn count_steered(pod: &Pod) -> Result<usize, CaptureError> {
    sockets::count_marked(&pod.namespace).map_err(|source| CaptureError::Sockets { source })
}

/// The last steps out: ends what has not drained, then removes rules, routes and programs. Tries every step, and gives
/// back the first error.
pub(super) fn remove(node: &Node, pod: &Pod) -> Result<(), CaptureError> {
    *pod.is_live.lock() = false;
    let ended = sockets::destroy_marked(&pod.namespace).map_err(|source| CaptureError::Sockets { source });
    if let Ok(count @ 1..) = ended {
        tracing::info!(workload = %pod.workload, count, "open connections of a released pod were ended");
    }
    // Should they not end, the guard would drop what they send; without it that would go out in the clear.
    ended?;
    let routes = Routes::open(&pod.namespace)
        .and_then(|mut routes| routes.remove())
        .map_err(|source| CaptureError::Routes { source });
    let sysctls = sysctls::put_back(&pod.namespace, pod.before).map_err(|source| CaptureError::Sysctls { source });
    let programs = node
        .kernel
        .detach_pod(pod.number, Some(&pod.namespace))
        .map_err(|source| CaptureError::Attach { source });
    routes.and(sysctls).and(programs)
}

/// After a capture that failed half-way. What cannot be undone is reported and left: the next attempt finds it.
fn undo(node: &Node, pod: &Pod) {
    for error in [stop_steering(node, pod), remove(node, pod)]
        .into_iter()
        .filter_map(Result::err)
    {
        tracing::warn!(workload = %pod.workload, error = &error as &dyn std::error::Error, "cannot undo a failed capture");
    }
}

/// A pod of an earlier daemon that is to be released.
pub(super) fn unwanted(
    node: &Node,
    number: PodNumber,
    workload: WorkloadUid,
    found: Found,
    place: Place,
) -> Result<Pod, CaptureError> {
    let Found { namespace, anchor } = found;
    let claim = Claim::take(&node.claims, namespace.cookie(), &workload)?;
    node.adopted.lock().remove(&namespace.cookie());
    let noted = Routes::open(&namespace)
        .and_then(|mut routes| routes.note())
        .map_err(|source| CaptureError::Routes { source })?;
    let before = Before::from_bits(noted.unwrap_or(0));
    let is_live = Mutex::new(true);
    Ok(Pod {
        workload,
        namespace,
        place,
        anchor,
        number,
        addresses: Vec::new(),
        before,
        is_live,
        _claim: claim,
    })
}

/// Brings to its end what an earlier daemon left undone in a namespace. False if there is nothing of ours in it.
pub(super) fn finish(namespace: &Namespace) -> Result<bool, CaptureError> {
    let mut routes = Routes::open(namespace).map_err(|source| CaptureError::Routes { source })?;
    let Some(before) = routes.note().map_err(|source| CaptureError::Routes { source })? else {
        return Ok(false);
    };
    sockets::destroy_marked(namespace).map_err(|source| CaptureError::Sockets { source })?;
    routes.remove().map_err(|source| CaptureError::Routes { source })?;
    sysctls::put_back(namespace, Before::from_bits(before)).map_err(|source| CaptureError::Sysctls { source })?;
    Ok(true)
}

/// Forgets a pod whose namespace has ended, and with it everything that was in there.
pub(super) fn forget(node: &Node, number: PodNumber) -> Result<(), CaptureError> {
    node.kernel
        .stop_steering(number)
        .map_err(|source| CaptureError::Steer { source })?;
    node.kernel
        .detach_pod(number, None)
        .map_err(|source| CaptureError::Attach { source })
}

/// Tells the kernel side which namespace and addresses are the node's own.
pub(super) fn set_node(node: &Node) -> Result<(), CaptureError> {
    let addresses = watch::addresses(&node.namespace).map_err(|source| CaptureError::Watch { source })?;
    node.kernel
        .set_node(&node.namespace, &addresses.into_iter().collect())
        .map_err(|source| CaptureError::Settings { source })
}
