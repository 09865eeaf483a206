//! The whole task in real namespaces, with the kernel programs replaced by a record of what was asked of them.

use super::*;
use crate::{
    kernel::{
        AdoptedPod, AttachError, Changes, MapError, OpenError, PodNumber, PodPolicy, ServiceEntry, WorkloadEntry,
    },
    mesh::{
        MeshSnapshot, SpiffeId, Workload,
        policy::{MutualTls, PeerAuth, Scope},
        workload::{Locality, Protocol},
    },
    net::{
        NamespaceError,
        testing::{ip, pod_namespace, sysctl},
    },
    shutdown::Shutdown,
};
use ipnet::IpNet;
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, TcpListener, TcpStream},
    os::fd::AsRawFd,
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};
use tempfile::TempDir;
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(60);
pub(crate) const NODE: &str = "node-a";

/// Records what was asked, in words, and fails where it is told to.
#[derive(Default)]
pub(crate) struct Recorder {
    calls: Mutex<Vec<String>>,
    numbers: Mutex<BTreeMap<u64, u32>>,
    adopted: Vec<AdoptedPod>,
    unfinished: Vec<u32>,
    failing: Mutex<BTreeSet<&'static str>>,
    /// What the namespace showed at the moment of `steer`.
    seen_at_steer: Mutex<Vec<(String, String)>>,
    namespaces: Mutex<HashMap<u32, Namespace>>,
    linked: Mutex<Vec<u32>>,
    /// Held by whoever wants a step to take a while.
    pub(crate) slow: tokio::sync::Mutex<()>,
    /// How often programs of other layouts were removed.
    alone: AtomicUsize,
}

impl Recorder {
    fn note(&self, name: &'static str, details: String) -> Result<(), MapError> {
        self.calls
            .lock()
            .push(format!("{name} {details}").trim_end().to_owned());
        if self.failing.lock().contains(name) {
            Err(MapError::Full { map: "FAKE", size: 0 })
        } else {
            Ok(())
        }
    }

    fn fail(&self, name: &'static str) {
        self.failing.lock().insert(name);
    }

    fn mend(&self) {
        self.failing.lock().clear();
    }

    pub(crate) fn called(&self, wanted: &str) -> usize {
        self.calls.lock().iter().filter(|call| call.starts_with(wanted)).count()
    }

    async fn until_linked(&self, times: usize) {
        let start = Instant::now();
        while self.linked.lock().len() < times {
            assert!(start.elapsed() < DEADLINE, "{:?} were linked", self.linked.lock());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub(crate) async fn until_called(&self, wanted: &str, times: usize) {
        let start = Instant::now();
        while self.called(wanted) < times {
            assert!(start.elapsed() < DEADLINE, "no {wanted} in {:?}", self.calls.lock());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl KernelSide for Recorder {
    fn readopt(&self) -> Result<(), OpenError> {
        self.note("readopt", String::new()).map_err(OpenError::from)
    }
    fn set_node(&self, _: &Namespace, _: &BTreeSet<IpAddr>) -> Result<(), MapError> {
        Ok(())
    }
    fn sync_workloads(&self, wanted: &HashMap<IpAddr, WorkloadEntry>) -> Result<Changes, MapError> {
        self.note("sync_workloads", wanted.len().to_string())
            .map(|()| Changes::default())
    }
    fn upsert_workload(&self, address: IpAddr, _: WorkloadEntry) -> Result<(), MapError> {
        self.note("upsert_workload", address.to_string())
    }
    fn remove_workload(&self, address: IpAddr) -> Result<(), MapError> {
        self.note("remove_workload", address.to_string())
    }
    fn sync_services(&self, wanted: &HashMap<(IpAddr, u16), ServiceEntry>) -> Result<Changes, MapError> {
        self.note("sync_services", wanted.len().to_string())
            .map(|()| Changes::default())
    }
    fn upsert_service(&self, (vip, port): (IpAddr, u16), _: ServiceEntry) -> Result<(), MapError> {
        self.note("upsert_service", format!("{vip}:{port}"))
    }
    fn remove_service(&self, (vip, port): (IpAddr, u16)) -> Result<(), MapError> {
        self.note("remove_service", format!("{vip}:{port}"))
    }
    fn sync_ranges(&self, wanted: &BTreeSet<IpNet>) -> Result<Changes, MapError> {
        self.note("sync_ranges", wanted.len().to_string())
            .map(|()| Changes::default())
    }
    fn adopted_pods(&self) -> Vec<AdoptedPod> {
        self.adopted.clone()
    }

    fn unfinished_pods(&self) -> Vec<u32> {
        self.unfinished.clone()
    }
    fn number_for(&self, cookie: u64) -> Result<PodNumber, MapError> {
        self.note("number_for", String::new())?;
        let mut numbers = self.numbers.lock();
        let next = numbers.len() as u32;
        Ok(PodNumber::new(*numbers.entry(cookie).or_insert(next)))
    }
    fn set_policy(&self, pod: PodNumber, policy: &PodPolicy) -> Result<(), MapError> {
        self.note("set_policy", format!("{} {:?}", pod.get(), policy.mode))
    }
    fn set_addresses(&self, pod: PodNumber, addresses: &BTreeSet<IpAddr>) -> Result<(), MapError> {
        self.note("set_addresses", format!("{} {addresses:?}", pod.get()))
    }
    fn set_listeners(&self, pod: PodNumber, _: &PodListeners) -> Result<(), MapError> {
        self.note("set_listeners", pod.get().to_string())?;
        drop(self.slow.blocking_lock());
        Ok(())
    }
    fn attach_pod(&self, pod: PodNumber, namespace: &Namespace) -> Result<(), AttachError> {
        self.namespaces.lock().insert(pod.get(), namespace.clone());
        self.note("attach_pod", pod.get().to_string())?;
        Ok(())
    }
    fn guard_interface(&self, pod: PodNumber, _: &Namespace, interface: &str) -> Result<(), AttachError> {
        self.note("guard_interface", format!("{} {interface}", pod.get()))?;
        Ok(())
    }
    fn remove_other_layouts(&self) -> Result<usize, OpenError> {
        Ok(self.alone.fetch_add(1, Ordering::Relaxed))
    }
    fn link_guards(&self, pod: PodNumber, _: &Namespace) -> Result<(), AttachError> {
        // Apart from the others: it comes late, and by the clock.
        self.linked.lock().push(pod.get());
        Ok(())
    }
    fn steer(&self, pod: PodNumber, _: u64) -> Result<(), MapError> {
        let namespace = self.namespaces.lock().get(&pod.get()).unwrap().clone();
        let reflect = sysctl(&namespace, "net/ipv4/fwmark_reflect");
        self.seen_at_steer.lock().push((ip(&namespace, "rule"), reflect));
        self.note("steer", pod.get().to_string())
    }
    fn stop_steering(&self, pod: PodNumber) -> Result<(), MapError> {
        self.note("stop_steering", pod.get().to_string())
    }
    fn detach_pod(&self, pod: PodNumber, namespace: Option<&Namespace>) -> Result<(), AttachError> {
        if namespace.is_some() {
            drop(self.slow.blocking_lock());
        }
        self.namespaces.lock().remove(&pod.get());
        self.note(
            "detach_pod",
            format!("{} {}", pod.get(), if namespace.is_some() { "there" } else { "gone" }),
        )?;
        Ok(())
    }
}

/// A running task with one pod, `a`, whose namespace is found by a symlink.
struct Running {
    namespace: Namespace,
    /// What the namespace looked like before anybody touched it.
    untouched: String,
    directory: TempDir,
    kernel: Arc<Recorder>,
    snapshots: watch::Sender<Arc<MeshSnapshot>>,
    events: mpsc::Receiver<CaptureEvent>,
    shutdown: Shutdown,
    leave: CancellationToken,
    pause: CancellationToken,
    task: JoinHandle<Result<Ended, NamespaceError>>,
}

impl Running {
    fn start(test: &str, recorder: impl FnOnce(&Namespace) -> Recorder) -> Option<Self> {
        let namespace = pod_namespace(test)?;
        let directory = tempfile::tempdir().unwrap();
        let path = format!("/proc/{}/fd/{}", std::process::id(), namespace.as_fd().as_raw_fd());
        std::os::unix::fs::symlink(path, directory.path().join("a")).unwrap();
        let kernel = Arc::new(recorder(&namespace));
        let (snapshots, receiver) = watch::channel(Arc::default());
        let (sender, events) = mpsc::channel(16);
        let settings = CaptureSettings::by_manifests(NODE, Duration::from_millis(300));
        let (leave, pause) = (settings.leave.clone(), settings.pause.clone());
        let shutdown = Shutdown::new();
        let task = reconcile(
            Arc::clone(&kernel) as Arc<dyn KernelSide>,
            settings,
            receiver,
            sender,
            shutdown.clone(),
        );
        let untouched = state(&namespace);
        let task = tokio::spawn(task);
        Some(Self {
            namespace,
            untouched,
            directory,
            kernel,
            snapshots,
            events,
            shutdown,
            leave,
            pause,
            task,
        })
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("a")
    }

    fn pod(&self) -> Workload {
        pod(self.path())
    }

    fn publish(&self, change: impl FnOnce(&mut MeshSnapshot)) {
        self.snapshots.send_modify(|snapshot| {
            let mut next = MeshSnapshot::clone(snapshot);
            next.version += 1;
            next.node = Some(NODE.into());
            change(&mut next);
            *snapshot = Arc::new(next);
        });
    }

    fn publish_pod(&self, pod: Workload) {
        self.publish(|snapshot| {
            for address in &pod.addresses {
                snapshot.by_address.insert(*address, pod.uid.clone());
            }
            snapshot.set_workload(Arc::new(pod));
        });
    }

    async fn event(&mut self) -> CaptureEvent {
        tokio::time::timeout(DEADLINE, self.events.recv())
            .await
            .expect("an event")
            .expect("a running task")
    }

    async fn captured(&mut self) -> CapturedPod {
        match self.event().await {
            CaptureEvent::Captured(captured) => captured,
            other => panic!("{other:?}"),
        }
    }

    async fn until_untouched(&self) {
        let start = Instant::now();
        while state(&self.namespace) != self.untouched {
            assert!(start.elapsed() < DEADLINE, "{}", state(&self.namespace));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// The pod `a` of this node.
pub(crate) fn pod(netns: PathBuf) -> Workload {
    Workload {
        uid: WorkloadUid("a".into()),
        name: "a".into(),
        namespace: "shop".into(),
        identity: SpiffeId::parse("spiffe://cluster.local/ns/shop/sa/web").unwrap(),
        addresses: vec!["10.9.0.1".parse().unwrap(), "fd09::1".parse().unwrap()],
        locality: Locality {
            node: Some(NODE.into()),
            ..Locality::default()
        },
        labels: Arc::default(),
        owner: "a".into(),
        canonical_service: "a".into(),
        canonical_revision: "latest".into(),
        protocol: Protocol::Hbone,
        host_network: false,
        enrolled: true,
        netns: Some(netns),
        runtime_class: None,
    }
}

fn state(pod: &Namespace) -> String {
    let shown = ["rule", "-6 rule", "route show table all", "-6 route show table all"].map(|show| ip(pod, show));
    let sysctls = [
        "net/ipv4/tcp_fwmark_accept",
        "net/ipv4/fwmark_reflect",
        "net/ipv6/fwmark_reflect",
    ];
    shown.join("--\n") + &sysctls.map(|name| sysctl(pod, name)).join(" ")
}

fn adopting(number: u32, namespace: &Namespace) -> Recorder {
    let (cookie, inode) = (namespace.cookie(), namespace.inode().1 as u32);
    Recorder {
        adopted: vec![AdoptedPod {
            number: PodNumber::new(number),
            cookie,
            inode,
        }],
        numbers: Mutex::new(BTreeMap::from([(cookie, number)])),
        ..Recorder::default()
    }
}

#[tokio::test]
async fn a_pod_is_steered_last_when_everything_stands_ready() {
    let Some(mut running) = Running::start("capture", |_| Recorder::default()) else {
        return;
    };
    running.publish_pod(running.pod());
    let captured = running.captured().await;
    assert_eq!(captured.namespace.cookie(), running.namespace.cookie());
    assert_eq!(captured.listeners.ports.outbound, 15001);
    assert!(matches!(running.event().await, CaptureEvent::Settled));
    assert_eq!(
        *running.kernel.calls.lock(),
        [
            "sync_ranges 0",
            "sync_workloads 2",
            "sync_services 0",
            "number_for",
            "set_policy 0 Permissive",
            "set_addresses 0 {10.9.0.1, fd09::1}",
            "set_listeners 0",
            "attach_pod 0",
            "steer 0"
        ]
    );
    let seen = running.kernel.seen_at_steer.lock().clone();
    assert!(seen[0].0.contains("fwmark 0x110/0xff0 lookup 15110"), "{seen:?}");
    assert_eq!(seen[0].1, "1");
}

#[tokio::test]
async fn nothing_is_captured_or_released_before_the_first_snapshot() {
    let Some(mut running) = Running::start("unpublished", |namespace| adopting(7, namespace)) else {
        return;
    };
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(*running.kernel.calls.lock(), [""; 0]);
    running.publish_pod(running.pod());
    running.captured().await;
    assert_eq!(running.kernel.called("steer 7"), 1, "under the number it had");
    assert_eq!(
        running.kernel.called("stop_steering") + running.kernel.called("detach_pod"),
        0
    );
}

#[tokio::test]
async fn leaving_the_mesh_ends_steered_connections_and_leaves_no_trace() {
    let Some(mut running) = Running::start("release", |_| Recorder::default()) else {
        return;
    };
    running.publish_pod(running.pod());
    let _served = running.captured().await;
    assert!(matches!(running.event().await, CaptureEvent::Settled));
    let (marked, _peer) = running
        .namespace
        .run(|| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            (client, listener.accept().unwrap())
        })
        .unwrap();
    socket2::SockRef::from(&marked)
        .set_mark(crate::net::marks::STEER)
        .unwrap();

    running.publish_pod(Workload {
        enrolled: false,
        ..running.pod()
    });
    assert!(matches!(running.event().await, CaptureEvent::Leaving { .. }));
    assert!(matches!(running.event().await, CaptureEvent::Released(uid) if uid == running.pod().uid));
    running.kernel.until_called("detach_pod 0 there", 1).await;
    assert!(marked.take_error().unwrap().is_some(), "it had its time to drain");
    running.until_untouched().await;
    let calls = running.kernel.calls.lock().clone();
    assert_eq!(calls[calls.len() - 2..], ["stop_steering 0", "detach_pod 0 there"]);
}

#[tokio::test]
async fn a_namespace_that_is_gone_is_the_pods_end() {
    let Some(mut running) = Running::start("gone", |_| Recorder::default()) else {
        return;
    };
    running.publish_pod(running.pod());
    let _served = running.captured().await;
    assert!(matches!(running.event().await, CaptureEvent::Settled));
    std::fs::remove_file(running.path()).unwrap();
    assert!(matches!(running.event().await, CaptureEvent::Released(_)));
    running.kernel.until_called("detach_pod", 1).await;
    let event = running.event().await;
    assert!(
        matches!(&event, CaptureEvent::Failed { error, .. } if error.reason() == "namespace"),
        "{event:?}"
    );
}

#[tokio::test]
async fn a_capture_that_fails_is_undone_and_tried_again() {
    let Some(mut running) = Running::start("retry", |_| Recorder::default()) else {
        return;
    };
    running.kernel.fail("attach_pod");
    running.publish_pod(running.pod());
    for attempt in [1, 2] {
        let event = running.event().await;
        let CaptureEvent::Failed { error, attempts, .. } = &event else {
            // After the first failure the start is settled.
            assert!(matches!(event, CaptureEvent::Settled));
            continue;
        };
        assert_eq!((error.reason(), *attempts), ("attach", attempt));
    }
    assert_eq!(running.kernel.called("steer"), 0);
    running.until_untouched().await;
    running.kernel.mend();
    loop {
        if let CaptureEvent::Captured(_) = running.event().await {
            break;
        }
    }
}

#[tokio::test]
async fn a_taken_over_pod_that_fails_stays_refused_and_is_not_let_go() {
    let Some(mut running) = Running::start("adopt-fails", |namespace| adopting(3, namespace)) else {
        return;
    };
    running.kernel.fail("set_listeners");
    running.publish_pod(running.pod());
    assert!(matches!(running.event().await, CaptureEvent::Failed { .. }));
    assert_eq!(
        running.kernel.called("stop_steering") + running.kernel.called("detach_pod"),
        0
    );
    assert!(ip(&running.namespace, "rule").contains("lookup 15110"));
    running.kernel.mend();
    loop {
        if let CaptureEvent::Captured(_) = running.event().await {
            break;
        }
    }
}

#[tokio::test]
async fn what_an_earlier_daemon_captured_and_nobody_wants_is_released_without_being_waited_for() {
    let recorder = |namespace: &Namespace| {
        // As the earlier daemon left it: one of the sysctls was on before it came.
        crate::kernel::sysctls::switch_on(namespace).unwrap();
        let mut routes = crate::kernel::routes::Routes::open(namespace).unwrap();
        routes.install_note(0b010).unwrap();
        routes.install(&[]).unwrap();
        let mut recorder = adopting(3, namespace);
        recorder.adopted.push(AdoptedPod {
            number: PodNumber::new(4),
            cookie: u64::MAX,
            inode: 1,
        });
        recorder
    };
    let Some(mut running) = Running::start("adopt-unwanted", recorder) else {
        return;
    };
    let kernel = Arc::clone(&running.kernel);
    let slow = kernel.slow.lock().await;
    running.publish_pod(Workload {
        enrolled: false,
        ..running.pod()
    });
    let event = running.event().await;
    assert!(
        matches!(event, CaptureEvent::Settled),
        "its release is waited for, or somebody is told of it: {event:?}"
    );
    assert_eq!(kernel.called("detach_pod 3"), 0);
    drop(slow);
    running.kernel.until_called("detach_pod 3 there", 1).await;
    running.kernel.until_called("detach_pod 4 gone", 1).await;
    assert!(!ip(&running.namespace, "rule").contains("lookup 15110"));
    assert_eq!(sysctl(&running.namespace, "net/ipv4/tcp_fwmark_accept"), "0");
    assert_eq!(sysctl(&running.namespace, "net/ipv4/fwmark_reflect"), "1");
}

#[tokio::test]
async fn a_release_that_an_earlier_daemon_began_is_finished() {
    let recorder = |namespace: &Namespace| {
        crate::kernel::sysctls::switch_on(namespace).unwrap();
        let mut routes = crate::kernel::routes::Routes::open(namespace).unwrap();
        routes.install_note(0).unwrap();
        routes.install(&[]).unwrap();
        Recorder {
            unfinished: vec![namespace.inode().1 as u32],
            ..Recorder::default()
        }
    };
    let Some(mut running) = Running::start("unfinished", recorder) else {
        return;
    };
    running.publish_pod(Workload {
        enrolled: false,
        ..running.pod()
    });
    assert!(matches!(running.event().await, CaptureEvent::Settled));
    assert!(!ip(&running.namespace, "rule").contains("lookup 15110"));
    assert_eq!(sysctl(&running.namespace, "net/ipv4/tcp_fwmark_accept"), "0");
}

#[tokio::test]
async fn a_pod_leaves_only_after_others_were_told() {
    let Some(mut running) = Running::start("leaving", |_| Recorder::default()) else {
        return;
    };
    running.publish_pod(running.pod());
    let _served = running.captured().await;
    assert!(matches!(running.event().await, CaptureEvent::Settled));
    running.publish_pod(Workload {
        enrolled: false,
        ..running.pod()
    });
    let CaptureEvent::Leaving { workload, proceed } = running.event().await else {
        panic!("it is released before others are told");
    };
    assert_eq!(workload, running.pod().uid);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(running.kernel.called("stop_steering"), 0);
    drop(proceed);
    assert!(matches!(running.event().await, CaptureEvent::Released(_)));
    running.until_untouched().await;
}

#[tokio::test]
async fn a_daemon_that_is_taken_off_the_node_releases_every_pod_and_ends() {
    let Some(mut running) = Running::start("leave", |_| Recorder::default()) else {
        return;
    };
    running.publish_pod(running.pod());
    let _served = running.captured().await;
    running.leave.cancel();
    loop {
        // Dropped with the event.
        if let CaptureEvent::Released(_) = running.event().await {
            break;
        }
    }
    tokio::time::timeout(DEADLINE, &mut running.task)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert_eq!(running.kernel.called("detach_pod 0 there"), 1);
    running.until_untouched().await;
}

#[tokio::test]
async fn a_pod_of_another_kernel_is_refused_by_the_name_of_its_runtime() {
    let Some(mut running) = Running::start("kata", |_| Recorder::default()) else {
        return;
    };
    running.publish_pod(Workload {
        runtime_class: Some("kata-qemu".into()),
        ..running.pod()
    });
    let event = running.event().await;
    let CaptureEvent::Failed { error, .. } = &event else {
        panic!("{event:?}");
    };
    assert_eq!(error.reason(), "foreign-kernel");
    assert!(error.to_string().contains("Kata Containers"), "{error}");
    assert_eq!(state(&running.namespace), running.untouched);
}

#[tokio::test]
async fn a_full_table_refuses_capture_and_touches_nothing() {
    let Some(mut running) = Running::start("full", |_| Recorder::default()) else {
        return;
    };
    running.kernel.fail("sync_workloads");
    running.publish_pod(running.pod());
    let event = running.event().await;
    assert!(
        matches!(&event, CaptureEvent::Failed { error, .. } if error.reason() == "tables-full"),
        "{event:?}"
    );
    assert_eq!(running.kernel.called("number_for"), 0);
    assert_eq!(state(&running.namespace), running.untouched);
    running.kernel.mend();
    loop {
        if let CaptureEvent::Captured(_) = running.event().await {
            break;
        }
    }
}

#[tokio::test]
async fn policy_addresses_interfaces_and_rules_are_kept_up_to_date() {
    let Some(mut running) = Running::start("refresh", |_| Recorder::default()) else {
        return;
    };
    running.publish_pod(running.pod());
    let _served = running.captured().await;
    running.publish(|snapshot| {
        snapshot.peer_auths.insert(PeerAuth {
            namespace: "shop".into(),
            name: "strict".into(),
            created: None,
            scope: Scope::Namespace,
            mode: Some(MutualTls::Strict),
            ports: BTreeMap::new(),
            unreadable: false,
        });
    });
    running.kernel.until_called("set_policy 0 Strict", 1).await;

    ip(&running.namespace, "addr add 10.9.0.8/32 dev eth0");
    running
        .kernel
        .until_called("set_addresses 0 {10.9.0.1, 10.9.0.8, fd09::1}", 1)
        .await;
    ip(&running.namespace, "link add eth1 type veth peer name wire1");
    running.kernel.until_called("guard_interface 0 eth1", 1).await;
    ip(&running.namespace, "rule del pref 2");
    let start = Instant::now();
    while !ip(&running.namespace, "rule").contains("lookup 15110") {
        assert!(start.elapsed() < DEADLINE, "the rule is not put back");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn programs_of_another_layout_stay_until_every_pod_is_captured_anew() {
    let Some(mut running) = Running::start("layouts", |_| Recorder::default()) else {
        return;
    };
    running.kernel.fail("attach_pod");
    running.publish_pod(running.pod());
    assert!(matches!(running.event().await, CaptureEvent::Failed { .. }));
    assert!(matches!(running.event().await, CaptureEvent::Settled));
    running.kernel.until_called("attach_pod", 2).await;
    assert_eq!(
        running.kernel.alone.load(Ordering::Relaxed),
        0,
        "they may be what keeps it closed"
    );
    running.kernel.mend();
    let start = Instant::now();
    while running.kernel.alone.load(Ordering::Relaxed) == 0 {
        assert!(start.elapsed() < DEADLINE, "they stay");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    running.publish(|_| {});
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(running.kernel.alone.load(Ordering::Relaxed), 1, "once is enough");
}

#[tokio::test]
async fn the_guards_of_a_pod_that_stays_are_linked_after_its_start_and_again_after_a_change() {
    let Some(mut running) = Running::start("linked", |_| Recorder::default()) else {
        return;
    };
    running.publish_pod(running.pod());
    let _served = running.captured().await;
    assert_eq!(*running.kernel.linked.lock(), [0; 0], "its start does not wait for it");
    running.kernel.until_linked(1).await;
    ip(&running.namespace, "link add eth1 type veth peer name wire1");
    running.kernel.until_called("guard_interface 0 eth1", 1).await;
    running.kernel.until_linked(2).await;
}

#[tokio::test]
async fn a_pod_that_forwards_for_others_is_refused_by_name() {
    let Some(mut running) = Running::start("forwards", |namespace| {
        ip(namespace, "link add docker0 type bridge");
        crate::net::testing::set_sysctl(namespace, "net/ipv4/ip_forward", "1");
        Recorder::default()
    }) else {
        return;
    };
    running.publish_pod(running.pod());
    let event = running.event().await;
    assert!(
        matches!(&event, CaptureEvent::Failed { error, .. } if error.reason() == "forwards"),
        "{event:?}"
    );
}

#[tokio::test]
async fn the_daemons_end_leaves_its_pods_captured() {
    let Some(mut running) = Running::start("drain", |_| Recorder::default()) else {
        return;
    };
    running.publish_pod(running.pod());
    let _served = running.captured().await;
    let drain = running.shutdown.drain(DEADLINE);
    tokio::pin!(drain);
    tokio::time::timeout(DEADLINE, &mut drain).await.unwrap();
    tokio::time::timeout(DEADLINE, &mut running.task)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert_eq!(
        running.kernel.called("stop_steering") + running.kernel.called("detach_pod"),
        0
    );
    assert!(ip(&running.namespace, "rule").contains("lookup 15110"));
}

#[tokio::test]
async fn capture_ends_when_its_last_step_has_ended() {
    for is_drain in [true, false] {
        let Some(mut running) = Running::start("still", |_| Recorder::default()) else {
            return;
        };
        let kernel = Arc::clone(&running.kernel);
        let slow = kernel.slow.lock().await;
        running.publish_pod(running.pod());
        running.kernel.until_called("set_listeners", 1).await;
        let ended = if is_drain {
            running.shutdown.drain(Duration::ZERO).await;
            Ended::Drained
        } else {
            running.pause.cancel();
            Ended::Paused
        };
        let early = tokio::time::timeout(Duration::from_millis(200), &mut running.task).await;
        assert!(early.is_err(), "a step is under way: {early:?}");
        drop(slow);
        let task = tokio::time::timeout(DEADLINE, &mut running.task).await.unwrap();
        assert_eq!(task.unwrap().unwrap(), ended);
        let calls = kernel.calls.lock().clone();
        assert_eq!(calls.last().map(String::as_str), Some("steer 0"), "{calls:?}");
    }
}

#[tokio::test]
async fn capture_that_begins_when_the_daemon_ends_does_nothing() {
    let Some(running) = Running::start("late", |_| Recorder::default()) else {
        return;
    };
    running.publish_pod(running.pod());
    running.shutdown.drain(Duration::ZERO).await;
    let task = tokio::time::timeout(DEADLINE, running.task).await.unwrap();
    assert_eq!(task.unwrap().unwrap(), Ended::Drained);
    assert_eq!(*running.kernel.calls.lock(), [""; 0]);
}

#[tokio::test]
async fn the_node_itself_is_never_captured() {
    let Some(mut running) = Running::start("own", |_| Recorder::default()) else {
        return;
    };
    let own = PathBuf::from("/proc/self/ns/net");
    running.publish_pod(Workload {
        netns: Some(own),
        ..running.pod()
    });
    let event = running.event().await;
    assert!(
        matches!(&event, CaptureEvent::Failed { error, .. } if error.reason() == "node-namespace"),
        "{event:?}"
    );
}
