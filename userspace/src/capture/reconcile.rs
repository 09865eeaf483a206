//! The task that keeps capture going: it plans whenever something changed, runs the steps (one at a time per pod, several
//! pods at once), and tells what happened. When the daemon ends, pods stay captured: their connections are refused, not
//! sent in the clear, until the next daemon takes them over.

use super::{
    CaptureEvent, CapturedPod,
    plan::{Actual, Step, Wanted, back_off, is_on, plan},
    pod::{self, CaptureError, Node, Pod},
    tables::Told,
};
use crate::{
    kernel::{AdoptedPod, Kernel, MapError, PodPolicy, watch::Watch},
    mesh::{MeshSnapshot, WorkloadUid},
    net::{Namespace, NamespaceError, PodListeners},
    shutdown::Shutdown,
};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    sync::{mpsc, watch},
    task::{AbortHandle, JoinSet},
    time::MissedTickBehavior,
};
use tracing::{debug, error, info, warn};

/// What the task is told at the start.
#[derive(Debug, Clone)]
pub struct CaptureSettings {
    /// `spec.nodeName` of the pods to capture.
    pub node_name: Arc<str>,
    /// How long the open connections of a pod that leaves the mesh may go on.
    pub release_drain: Duration,
}

/// How often namespaces are looked after and failed steps are tried again.
const TICK: Duration = Duration::from_millis(500);
/// How often a draining pod's connections are counted.
const DRAIN_POLL: Duration = Duration::from_millis(100);
/// Changes in a namespace come in bursts.
const SETTLE: Duration = Duration::from_millis(20);

/// Runs until the drain begins or nobody publishes snapshots or reads events any more. `kernel` is this task's alone as
/// far as pods and the cluster's tables go.
///
/// # Errors
/// The daemon's own namespace cannot be opened.
pub async fn reconcile(
    kernel: Arc<Kernel>,
    settings: CaptureSettings,
    mut snapshots: watch::Receiver<Arc<MeshSnapshot>>,
    events: mpsc::Sender<CaptureEvent>,
    shutdown: Shutdown,
) -> Result<(), NamespaceError> {
    let node = Node {
        kernel,
        namespace: Namespace::current()?,
        claims: Arc::default(),
    };
    let mut reconciler = Reconciler {
        adopted: Some(node.kernel.adopted_pods()),
        node,
        settings,
        events,
        told: Told::default(),
        table_failure: None,
        pods: BTreeMap::new(),
        jobs: JoinSet::new(),
    };
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let draining = shutdown.draining();
    tokio::pin!(draining);
    loop {
        // A snapshot without a version is the one before the first: it says nothing about what is wanted.
        let snapshot = Arc::clone(&snapshots.borrow_and_update());
        if snapshot.version != 0 {
            reconciler.advance(&snapshot).await;
        }
        tokio::select! {
            () = &mut draining => return Ok(()),
            changed = snapshots.changed() => if changed.is_err() { return Ok(()) },
            Some(done) = reconciler.jobs.join_next(), if !reconciler.jobs.is_empty() => {
                let Some(()) = reconciler.finish(done).await else { return Ok(()) };
                // What else has finished is taken along, so that a start with many pods plans once, not once per pod.
                while let Some(done) = reconciler.jobs.try_join_next() {
                    let Some(()) = reconciler.finish(done).await else { return Ok(()) };
                }
            }
            _ = tick.tick() => reconciler.look_after_namespaces(),
        }
    }
}

struct Reconciler {
    node: Node,
    settings: CaptureSettings,
    events: mpsc::Sender<CaptureEvent>,
    told: Told,
    /// Why the kernel does not know the whole cluster: nothing new is captured then.
    table_failure: Option<TableFailure>,
    /// Pods of an earlier daemon, until the first snapshot says which of them are wanted.
    adopted: Option<Vec<AdoptedPod>>,
    pods: BTreeMap<WorkloadUid, Entry>,
    /// Owned here: dropped with the reconciler. A step that has begun is finished by its thread.
    jobs: JoinSet<Done>,
}

struct TableFailure {
    error: Arc<MapError>,
    attempts: u32,
    retry_at: Instant,
}

enum Entry {
    /// A job holds it.
    Busy {
        netns: PathBuf,
        attempts: u32,
    },
    Captured(Captured),
    Failed {
        netns: PathBuf,
        attempts: u32,
        retry_at: Instant,
    },
}

struct Captured {
    pod: Arc<Pod>,
    policy: PodPolicy,
    gone: bool,
    refreshing: Refreshing,
    /// Failed attempts in a row to release it.
    attempts: u32,
    retry_at: Option<Instant>,
}

enum Refreshing {
    Watched {
        job: AbortHandle,
    },
    /// Nothing tells of changes: the tick does.
    Unwatched,
}

/// What a job was about, and how it ended.
enum Done {
    Captured {
        wanted: Wanted,
        outcome: Result<(Pod, PodListeners, Watch), CaptureError>,
    },
    Refreshed {
        pod: Arc<Pod>,
        watch: Option<Watch>,
        outcome: Result<(), CaptureError>,
    },
    Released {
        pod: Arc<Pod>,
        policy: PodPolicy,
        attempts: u32,
        outcome: Result<(), CaptureError>,
    },
}

impl Reconciler {
    async fn advance(&mut self, snapshot: &Arc<MeshSnapshot>) {
        let now = Instant::now();
        // Before any pod steers by it.
        self.tell_tables(snapshot, now).await;
        self.take_over(snapshot).await;
        for step in plan(snapshot, &self.settings.node_name, &self.actual(now), now) {
            match step {
                Step::Capture(wanted) => self.begin_capture(wanted),
                Step::SetPolicy { workload, policy } => self.set_policy(&workload, policy),
                Step::Release { workload, drain } => self.begin_release(&workload, drain).await,
                Step::Forget { workload } => {
                    self.pods.remove(&workload);
                }
            }
        }
    }

    fn actual(&self, now: Instant) -> BTreeMap<WorkloadUid, Actual> {
        self.pods
            .iter()
            .map(|(workload, entry)| {
                let actual = match entry {
                    Entry::Busy { netns, .. } => Actual::Busy { netns: netns.clone() },
                    Entry::Failed { netns, retry_at, .. } => Actual::Failed {
                        netns: netns.clone(),
                        retry_at: *retry_at,
                    },
                    // A release that failed waits before it is tried again.
                    Entry::Captured(captured) if captured.retry_at.is_some_and(|at| at > now) => Actual::Busy {
                        netns: captured.pod.path.clone(),
                    },
                    Entry::Captured(captured) => Actual::Captured {
                        netns: captured.pod.path.clone(),
                        policy: captured.policy.clone(),
                        gone: captured.gone,
                    },
                };
                (workload.clone(), actual)
            })
            .collect()
    }

    async fn tell_tables(&mut self, snapshot: &Arc<MeshSnapshot>, now: Instant) {
        let attempts = match &self.table_failure {
            Some(failure) if failure.retry_at > now => return,
            Some(failure) => failure.attempts,
            None => 0,
        };
        let (mut told, kernel, snapshot) = (
            std::mem::take(&mut self.told),
            Arc::clone(&self.node.kernel),
            Arc::clone(snapshot),
        );
        let result = tokio::task::spawn_blocking(move || {
            let outcome = told.tell(&kernel, &snapshot);
            (told, outcome)
        })
        .await;
        // A panic loses what was told, and the next call starts from scratch.
        let Ok((told, outcome)) = result else { return };
        self.told = told;
        self.table_failure = match outcome {
            Ok(()) => None,
            Err(failure) => {
                let attempts = attempts.saturating_add(1);
                error!(
                    error = &failure as &dyn std::error::Error,
                    "no new pod is captured: the kernel's tables are incomplete"
                );
                Some(TableFailure {
                    error: Arc::new(failure),
                    attempts,
                    retry_at: now + back_off(attempts),
                })
            }
        };
    }

    /// Once: releases what an earlier daemon captured and nobody wants any more. What is wanted is taken over by its
    /// capture, which finds its number by its namespace.
    async fn take_over(&mut self, snapshot: &Arc<MeshSnapshot>) {
        let Some(adopted) = self.adopted.take() else { return };
        for adopted in adopted {
            let found = find_namespace(snapshot, &self.settings.node_name, adopted);
            match found {
                Some(Found { workload: Some(_), .. }) => {
                    debug!(
                        number = adopted.number.get(),
                        "a pod of an earlier daemon is taken over"
                    );
                }
                Some(Found {
                    workload: None,
                    namespace,
                    path,
                }) => {
                    let workload = WorkloadUid(path.display().to_string().into());
                    match pod::abandoned(&self.node, adopted.number, workload.clone(), namespace, path) {
                        Ok(pod) => {
                            info!(%workload, "a pod of an earlier daemon is not wanted any more");
                            self.pods
                                .insert(workload.clone(), Entry::Captured(captured(Arc::new(pod), any_policy())));
                            self.begin_release(&workload, true).await;
                        }
                        Err(error) => warn!(%workload, error = &error as &dyn std::error::Error, "cannot release it"),
                    }
                }
                None => {
                    info!(number = adopted.number.get(), "a pod of an earlier daemon has ended");
                    let forgotten = self
                        .node
                        .kernel
                        .stop_steering(adopted.number)
                        .map_err(|source| CaptureError::Steer { source })
                        .and_then(|()| {
                            let detached = self.node.kernel.detach_pod(adopted.number, None);
                            detached.map_err(|source| CaptureError::Attach { source })
                        });
                    if let Err(error) = forgotten {
                        warn!(error = &error as &dyn std::error::Error, "cannot forget it");
                    }
                }
            }
        }
    }

    fn begin_capture(&mut self, wanted: Wanted) {
        let attempts = match self.pods.get(&wanted.workload) {
            Some(Entry::Failed { netns, attempts, .. }) if *netns == wanted.netns => *attempts,
            Some(Entry::Failed { .. } | Entry::Busy { .. } | Entry::Captured(_)) | None => 0,
        };
        self.pods.insert(
            wanted.workload.clone(),
            Entry::Busy {
                netns: wanted.netns.clone(),
                attempts,
            },
        );
        if let Some(failure) = &self.table_failure {
            let error = CaptureError::Tables {
                source: Arc::clone(&failure.error),
            };
            self.jobs.spawn(std::future::ready(Done::Captured {
                wanted,
                outcome: Err(error),
            }));
            return;
        }
        let node = self.node.clone();
        self.jobs.spawn(async move {
            let outcome = blocking({
                let wanted = wanted.clone();
                move || pod::capture(&node, &wanted)
            });
            Done::Captured {
                outcome: outcome.await,
                wanted,
            }
        });
    }

    /// Two map writes: not worth a thread.
    fn set_policy(&mut self, workload: &WorkloadUid, policy: PodPolicy) {
        let Some(Entry::Captured(captured)) = self.pods.get_mut(workload) else {
            return;
        };
        match pod::set_policy(&self.node, &captured.pod, &policy) {
            Ok(()) => captured.policy = policy,
            // The plan finds it different again at the next tick.
            Err(error) => {
                warn!(%workload, error = &error as &dyn std::error::Error, "a pod's policy is not up to date")
            }
        }
    }

    async fn begin_release(&mut self, workload: &WorkloadUid, drain: bool) {
        let Some(entry) = self.pods.remove(workload) else {
            return;
        };
        let Entry::Captured(captured) = entry else {
            self.pods.insert(workload.clone(), entry);
            return;
        };
        if let Refreshing::Watched { job } = &captured.refreshing {
            job.abort();
        }
        let (pod, attempts) = (captured.pod, captured.attempts);
        self.pods.insert(
            workload.clone(),
            Entry::Busy {
                netns: pod.path.clone(),
                attempts,
            },
        );
        let stopped = pod::stop_steering(&self.node, &pod);
        if stopped.is_ok() && attempts == 0 {
            // Whoever serves it stops accepting, and goes on with what is open.
            let _nobody_reads = self.events.send(CaptureEvent::Released(workload.clone())).await;
        }
        let (node, drain) = (
            self.node.clone(),
            if drain {
                self.settings.release_drain
            } else {
                Duration::ZERO
            },
        );
        self.jobs.spawn(async move {
            let outcome = match stopped {
                Ok(()) => release(&node, &pod, drain).await,
                Err(error) => Err(error),
            };
            Done::Released {
                pod,
                policy: captured.policy,
                attempts,
                outcome,
            }
        });
    }

    /// `None` if nobody reads the events any more.
    async fn finish(&mut self, done: Result<Done, tokio::task::JoinError>) -> Option<()> {
        match done {
            Ok(Done::Captured { wanted, outcome }) => self.captured(wanted, outcome).await,
            Ok(Done::Refreshed { pod, watch, outcome }) => {
                if let Err(error) = &outcome {
                    warn!(workload = %pod.workload, error = error as &dyn std::error::Error, "a pod is not up to date");
                }
                if let Some(Entry::Captured(captured)) = self.pods.get(&pod.workload)
                    && Arc::ptr_eq(&captured.pod, &pod)
                {
                    // A refresh that failed is tried again by the tick.
                    self.arm(&pod, watch.filter(|_| outcome.is_ok()));
                }
                Some(())
            }
            Ok(Done::Released {
                pod,
                policy,
                attempts,
                outcome,
            }) => {
                let workload = pod.workload.clone();
                match outcome {
                    Ok(()) => {
                        info!(%workload, "pod released");
                        self.pods.remove(&workload);
                    }
                    Err(error) => {
                        let attempts = attempts.saturating_add(1);
                        warn!(%workload, attempts, error = &error as &dyn std::error::Error, "cannot release a pod yet");
                        let mut entry = captured(pod, policy);
                        entry.attempts = attempts;
                        entry.retry_at = Some(Instant::now() + back_off(attempts));
                        self.pods.insert(workload, Entry::Captured(entry));
                    }
                }
                Some(())
            }
            // Only watches are aborted, by their release.
            Err(join) if join.is_cancelled() => Some(()),
            Err(join) => {
                error!(error = &join as &dyn std::error::Error, "a step of capture panicked");
                Some(())
            }
        }
    }

    async fn captured(
        &mut self,
        wanted: Wanted,
        outcome: Result<(Pod, PodListeners, Watch), CaptureError>,
    ) -> Option<()> {
        let workload = wanted.workload;
        let attempts = match self.pods.get(&workload) {
            Some(Entry::Busy { attempts, .. }) => *attempts,
            Some(Entry::Captured(_) | Entry::Failed { .. }) | None => 0,
        };
        let event = match outcome {
            Ok((pod, listeners, watch)) => {
                info!(%workload, netns = %pod.path.display(), "pod captured");
                for moved in &listeners.moved {
                    warn!(%workload, role = ?moved.role, port = moved.port, "the usual port is taken in the pod, another serves");
                }
                let namespace = pod.namespace.clone();
                let pod = Arc::new(pod);
                self.pods.insert(
                    workload.clone(),
                    Entry::Captured(captured(Arc::clone(&pod), wanted.policy)),
                );
                self.arm(&pod, Some(watch));
                CaptureEvent::Captured(CapturedPod {
                    workload,
                    namespace,
                    listeners,
                })
            }
            Err(error) => {
                let attempts = attempts.saturating_add(1);
                let retry_at = Instant::now() + back_off(attempts);
                warn!(%workload, attempts, reason = error.reason(), error = &error as &dyn std::error::Error, "pod not captured");
                self.pods.insert(
                    workload.clone(),
                    Entry::Failed {
                        netns: wanted.netns,
                        attempts,
                        retry_at,
                    },
                );
                CaptureEvent::Failed {
                    workload,
                    error: Arc::new(error),
                    attempts,
                }
            }
        };
        self.events.send(event).await.ok()
    }

    /// Waits for changes in the pod's namespace, and refreshes it then.
    fn arm(&mut self, pod: &Arc<Pod>, watch: Option<Watch>) {
        let Some(Entry::Captured(captured)) = self.pods.get_mut(&pod.workload) else {
            return;
        };
        captured.refreshing = match watch {
            None => Refreshing::Unwatched,
            Some(mut watch) => {
                let (node, pod) = (self.node.clone(), Arc::clone(pod));
                let job = self.jobs.spawn(async move {
                    let heard = watch.changed().await;
                    while let Ok(Ok(())) = tokio::time::timeout(SETTLE, watch.changed()).await {}
                    let watch = heard.is_ok().then_some(watch);
                    refresh(node, pod, watch).await
                });
                Refreshing::Watched { job }
            }
        };
    }

    fn look_after_namespaces(&mut self) {
        for entry in self.pods.values_mut() {
            let Entry::Captured(captured) = entry else { continue };
            if !captured.gone && !leads_to(&captured.pod.path, &captured.pod.namespace) {
                info!(workload = %captured.pod.workload, "the pod's namespace is gone");
                captured.gone = true;
            }
            if !captured.gone && matches!(captured.refreshing, Refreshing::Unwatched) {
                let (node, pod) = (self.node.clone(), Arc::clone(&captured.pod));
                let job = self.jobs.spawn(async move {
                    let watch = Watch::open(&pod.namespace).ok();
                    refresh(node, pod, watch).await
                });
                captured.refreshing = Refreshing::Watched { job };
            }
        }
    }
}

async fn refresh(node: Node, pod: Arc<Pod>, watch: Option<Watch>) -> Done {
    let outcome = blocking({
        let pod = Arc::clone(&pod);
        move || pod::refresh(&node, &pod)
    })
    .await;
    Done::Refreshed { pod, watch, outcome }
}

/// Lets what is open end by itself for a while, then ends it, then removes what it depended on.
async fn release(node: &Node, pod: &Arc<Pod>, drain: Duration) -> Result<(), CaptureError> {
    let deadline = Instant::now() + drain;
    while Instant::now() < deadline {
        let pod = Arc::clone(pod);
        if blocking(move || pod::count_steered(&pod)).await? == 0 {
            break;
        }
        tokio::time::sleep(DRAIN_POLL).await;
    }
    let (node, pod) = (node.clone(), Arc::clone(pod));
    blocking(move || pod::remove(&node, &pod)).await
}

async fn blocking<T: Send + 'static>(
    step: impl FnOnce() -> Result<T, CaptureError> + Send + 'static,
) -> Result<T, CaptureError> {
    tokio::task::spawn_blocking(step)
        .await
        .unwrap_or(Err(CaptureError::Interrupted))
}

fn captured(pod: Arc<Pod>, policy: PodPolicy) -> Captured {
    Captured {
        pod,
        policy,
        gone: false,
        refreshing: Refreshing::Unwatched,
        attempts: 0,
        retry_at: None,
    }
}

/// For a pod that is about to be released.
fn any_policy() -> PodPolicy {
    PodPolicy {
        mode: crate::kernel::PlaintextMode::Permissive,
        restricted: false,
        port_modes: Vec::new(),
    }
}

/// True while `path` is where `namespace` is mounted.
fn leads_to(path: &Path, namespace: &Namespace) -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).is_ok_and(|facts| (facts.dev(), facts.ino()) == namespace.inode())
}

struct Found {
    /// `None` if no pod that should be captured has it.
    workload: Option<WorkloadUid>,
    namespace: Namespace,
    path: PathBuf,
}

/// Looks for the namespace of a pod that an earlier daemon captured: among the pods of the node, then where namespaces
/// are usually mounted.
fn find_namespace(snapshot: &MeshSnapshot, node_name: &str, adopted: AdoptedPod) -> Option<Found> {
    let of_pods = snapshot
        .workloads
        .values()
        .filter(|workload| is_on(workload, node_name))
        .filter_map(|workload| Some((workload.enrolled.then(|| workload.uid.clone()), workload.netns.clone()?)));
    let mounted = std::fs::read_dir("/run/netns")
        .into_iter()
        .flatten()
        .filter_map(|entry| Some((None, entry.ok()?.path())));
    of_pods.chain(mounted).find_map(|(workload, path)| {
        let namespace = Namespace::open(&path).ok()?;
        (namespace.cookie() == adopted.cookie).then_some(Found {
            workload,
            namespace,
            path,
        })
    })
}
