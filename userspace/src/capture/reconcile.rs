//! The task that keeps capture going: it plans whenever something changed, runs the steps (one at a time per pod, several
//! pods at once), and tells what happened. When the daemon ends, pods stay captured: their connections are refused, not
//! sent in the clear, until the next daemon takes them over.

use super::{
    CaptureEvent, CapturedPod,
    adopt::{self, Owner},
    entries::{Captured, Entries, Entry},
    finder::Finder,
    jobs::{Done, blocking, heard, link, refresh, release},
    kernel_side::KernelSide,
    plan::{Scope, Step, Wanted, back_off, plan},
    pod::{self, CaptureError, Inherited, Node, Pod},
    tables::Told,
};
use crate::{
    kernel::{AdoptedPod, MapError, PlaintextMode, PodPolicy, watch::Watch},
    mesh::{MeshSnapshot, WorkloadUid},
    net::{Namespace, NamespaceError, PodListeners},
    shutdown::Shutdown,
};
use std::{
    error::Error,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::{JoinError, JoinSet, spawn_blocking},
    time::MissedTickBehavior,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

/// What the task is told at the start.
#[derive(Debug, Clone)]
pub struct CaptureSettings {
    /// `spec.nodeName` of the pods to capture.
    pub node_name: Arc<str>,
    /// How long the open connections of a pod that leaves the mesh may go on.
    pub release_drain: Duration,
    /// How long a pod that leaves the mesh still answers those who take it for one of the mesh.
    pub linger: Duration,
    /// The node's own namespace; `None`: the one that the task is started in.
    pub node_namespace: Option<Namespace>,
    /// Looks for pods on the node; without it they are where the manifests say.
    pub finder: Option<Arc<Finder>>,
    /// Once cancelled, every pod is released, and the task ends when they are.
    pub leave: CancellationToken,
    /// Once cancelled, nothing more is begun, and the task ends when what is under way has ended.
    pub pause: CancellationToken,
    /// Listeners that are there already.
    pub inherited: Inherited,
}

/// Why the task has ended. Whatever the reason, no step is under way any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The drain has begun, or nobody is interested any more.
    Drained,
    /// Every pod is released.
    Left,
    /// It was asked to; the pods are captured as they were.
    Paused,
}

impl CaptureSettings {
    /// Of a daemon that is told by manifests where its pods are, and whose node's namespace is the one it runs in.
    pub fn by_manifests(node_name: impl Into<Arc<str>>, release_drain: Duration) -> Self {
        Self {
            node_name: node_name.into(),
            release_drain,
            linger: Duration::ZERO,
            node_namespace: None,
            finder: None,
            leave: CancellationToken::new(),
            pause: CancellationToken::new(),
            inherited: Inherited::default(),
        }
    }
}

/// How often namespaces are looked after and failed steps are tried again.
const TICK: Duration = Duration::from_millis(500);
/// How long a pod, or an interface of it, is there before its guard becomes a link. What is gone by then never needed one.
const LINK_AFTER: Duration = Duration::from_secs(2);
/// When linking is tried again after it failed.
const LINK_AGAIN: Duration = Duration::from_secs(30);
/// How long pods may take to leave when the mesh is taken off the node.
const LEAVE: Duration = Duration::from_secs(10);
/// How long captures and releases that are under way may take to end when the task is paused. What is not released by then
/// is for whoever goes on.
const PAUSE: Duration = Duration::from_secs(10);
/// How often a thread that carries out a step is looked for.
const STEP_POLL: Duration = Duration::from_millis(1);
/// How long a release waits for others to be told that the pod leaves the mesh.
const WITHDRAWAL: Duration = Duration::from_secs(2);

/// Runs until the drain begins, or nobody publishes snapshots or reads events any more. `kernel` is this task's alone as
/// far as pods, the node's facts and the cluster's tables go. The runtime's threads are in the node's own namespace.
///
/// # Errors
/// The daemon's own namespace cannot be opened.
pub async fn reconcile(
    kernel: Arc<dyn KernelSide>,
    settings: CaptureSettings,
    mut snapshots: watch::Receiver<Arc<MeshSnapshot>>,
    events: mpsc::Sender<CaptureEvent>,
    shutdown: Shutdown,
) -> Result<Ended, NamespaceError> {
    let adopted = kernel.adopted_pods();
    let cookies = adopted.iter().map(|pod| pod.cookie).collect();
    let own = Namespace::current()?;
    let (leave, pause) = (settings.leave.clone(), settings.pause.clone());
    let mut reconciler = Reconciler {
        node: Node {
            kernel,
            namespace: settings.node_namespace.clone().unwrap_or_else(|| own.clone()),
            own,
            finder: settings.finder.clone(),
            claims: Arc::default(),
            adopted: Arc::new(parking_lot::Mutex::new(cookies)),
            inherited: settings.inherited.clone(),
        },
        settings,
        events,
        told: Told::default(),
        table_failure: None,
        adopted: Some(adopted),
        entries: Entries::default(),
        is_settled: false,
        is_alone: false,
        is_linking: false,
        jobs: JoinSet::new(),
    };
    reconciler.arm_node(None);
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let draining = shutdown.draining();
    tokio::pin!(draining);
    let (mut is_due, mut is_leaving, mut pausing) = (true, false, None::<Instant>);
    let ended = 'running: loop {
        if shutdown.is_draining() {
            break 'running Ended::Drained;
        }
        // A snapshot without a version is the one before the first: it says nothing about what is wanted.
        let snapshot = Arc::clone(&snapshots.borrow_and_update());
        if let Some(since) = pausing {
            if reconciler.entries.are_idle() || since.elapsed() >= PAUSE {
                break 'running Ended::Paused;
            }
        } else if is_due && snapshot.version != 0 && reconciler.advance(&snapshot).await.is_none() {
            break 'running Ended::Drained;
        }
        if leave.is_cancelled() && reconciler.entries.is_empty() {
            break 'running Ended::Left;
        }
        is_due = tokio::select! {
            () = &mut draining => break 'running Ended::Drained,
            () = leave.cancelled(), if !is_leaving => { is_leaving = true; true }
            () = pause.cancelled(), if pausing.is_none() => { pausing = Some(Instant::now()); false }
            changed = snapshots.changed() => if changed.is_err() { break 'running Ended::Drained } else { true },
            Some(done) = reconciler.jobs.join_next(), if !reconciler.jobs.is_empty() => {
                if reconciler.finish(done).await.is_none() { break 'running Ended::Drained }
                // What else has finished is taken along, so that a start with many pods plans once, not once per pod.
                while let Some(done) = reconciler.jobs.try_join_next() {
                    if reconciler.finish(done).await.is_none() { break 'running Ended::Drained }
                }
                true
            }
            _ = tick.tick() => reconciler.look(Instant::now()),
        };
    };
    reconciler.stand_still().await;
    Ok(ended)
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
    entries: Entries,
    is_settled: bool,
    /// Programs of no other layout are left.
    is_alone: bool,
    /// One pod at a time: the others on the node wait for the kernel.
    is_linking: bool,
    /// Owned here: dropped with the reconciler. A step that has begun is finished by its thread.
    jobs: JoinSet<Done>,
}

struct TableFailure {
    error: Arc<MapError>,
    attempts: u32,
    retry_at: Instant,
}

impl Reconciler {
    /// `None` if nobody reads the events any more.
    async fn advance(&mut self, snapshot: &Arc<MeshSnapshot>) -> Option<()> {
        let now = Instant::now();
        // Before any pod steers by them.
        self.tell_tables(snapshot, now).await;
        self.take_over(snapshot).await?;
        for step in plan(snapshot, self.scope(), &self.entries.actual(now), now) {
            match step {
                Step::Capture(wanted) => self.begin_capture(wanted),
                Step::SetPolicy { workload, policy } => self.set_policy(&workload, policy),
                Step::Release { workload, drain } => self.begin_release(&workload, drain).await?,
                Step::Forget { workload } => {
                    self.entries.remove(&workload);
                    self.events.send(CaptureEvent::Released(workload)).await.ok()?;
                }
            }
        }
        if !self.is_settled && self.entries.are_settled() {
            self.is_settled = true;
            self.node.inherited.forget_all();
            self.events.send(CaptureEvent::Settled).await.ok()?;
        }
        if !self.is_alone && self.entries.are_settled() && !self.entries.has_failures() {
            self.is_alone = true;
            self.remove_other_layouts().await;
        }
        Some(())
    }

    /// What a daemon of another layout left. As long as a pod is not captured anew, it may be what keeps that pod closed.
    async fn remove_other_layouts(&self) {
        let kernel = Arc::clone(&self.node.kernel);
        match spawn_blocking(move || kernel.remove_other_layouts()).await {
            Ok(Ok(0)) | Err(_) => {}
            Ok(Ok(count)) => info!(count, "programs of a daemon with another layout are removed"),
            Ok(Err(error)) => {
                warn!(
                    error = &error as &dyn Error,
                    "programs of a daemon with another layout stay until the next start"
                );
            }
        }
    }

    fn scope(&self) -> Scope<'_> {
        let node = &self.settings.node_name;
        match &self.settings.finder {
            _ if self.settings.leave.is_cancelled() => Scope::Nothing,
            Some(_) => Scope::Found { node },
            None => Scope::Named { node },
        }
    }

    async fn tell_tables(&mut self, snapshot: &Arc<MeshSnapshot>, now: Instant) {
        let attempts = match &self.table_failure {
            Some(failure) if failure.retry_at > now => return,
            Some(failure) => failure.attempts,
            None if self.told.is(snapshot) => return,
            None => 0,
        };
        let mut told = std::mem::take(&mut self.told);
        let (kernel, snapshot) = (Arc::clone(&self.node.kernel), Arc::clone(snapshot));
        let told = spawn_blocking(move || {
            let outcome = told.tell(&*kernel, &snapshot);
            (told, outcome)
        });
        // A panic loses what was told, and the next call starts from scratch.
        let Ok((told, outcome)) = told.await else { return };
        self.told = told;
        self.table_failure = outcome.err().map(|failure| {
            let attempts = attempts.saturating_add(1);
            error!(
                error = &failure as &dyn Error,
                "the kernel's tables are incomplete: no new pod is captured"
            );
            TableFailure {
                error: Arc::new(failure),
                attempts,
                retry_at: now + back_off(attempts),
            }
        });
    }

    /// Once: releases what an earlier daemon captured and nobody wants any more. What is wanted is taken over by its
    /// capture, which finds its number by its namespace.
    async fn take_over(&mut self, snapshot: &Arc<MeshSnapshot>) -> Option<()> {
        let Some(adopted) = self.adopted.take() else {
            return Some(());
        };
        let (node, snapshot, scope) = (self.node.clone(), Arc::clone(snapshot), self.scope());
        for (path, namespace) in adopt::unfinished(&node, &snapshot, scope, &node.kernel.unfinished_pods()) {
            match pod::finish(&namespace) {
                Ok(true) => info!(path = %path.display(), "a release that an earlier daemon began is finished"),
                Ok(false) => {}
                Err(error) => {
                    warn!(path = %path.display(), error = &error as &dyn Error, "a release that an earlier daemon began cannot be finished");
                }
            }
        }
        for (adopted, owner) in adopt::owners(&node, &snapshot, scope, adopted) {
            let number = adopted.number;
            let outcome = match owner {
                Owner::Wanted(workload) => {
                    debug!(%workload, number = number.get(), "a pod of an earlier daemon is taken over");
                    Ok(())
                }
                Owner::Unwanted { found, place } => {
                    info!(%place, "a pod of an earlier daemon is not wanted any more");
                    let workload = WorkloadUid(place.to_string().into());
                    match pod::unwanted(&self.node, number, workload.clone(), found, place) {
                        Ok(pod) => {
                            let captured = Captured::new(Arc::new(pod), any_policy());
                            self.entries.insert(workload.clone(), Entry::Captured(captured));
                            self.begin_release(&workload, true).await?;
                            Ok(())
                        }
                        Err(error) => Err(error),
                    }
                }
                Owner::Ended => {
                    info!(number = number.get(), "a pod of an earlier daemon has ended");
                    pod::forget(&self.node, number)
                }
            };
            if let Err(error) = outcome {
                warn!(
                    number = number.get(),
                    error = &error as &dyn Error,
                    "a pod of an earlier daemon stays as it is"
                );
            }
        }
        Some(())
    }

    fn begin_capture(&mut self, wanted: Wanted) {
        self.entries.begin(&wanted.workload, &wanted.place);
        if let Some(failure) = &self.table_failure {
            let error = CaptureError::Tables {
                source: Arc::clone(&failure.error),
            };
            self.jobs.spawn(std::future::ready(Done::Captured {
                wanted,
                outcome: Box::new(Err(error)),
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
                outcome: Box::new(outcome.await),
                wanted,
            }
        });
    }

    /// A few map writes: not worth a thread.
    fn set_policy(&mut self, workload: &WorkloadUid, policy: PodPolicy) {
        let Some(captured) = self.entries.captured(workload) else {
            return;
        };
        match pod::set_policy(&self.node, &captured.pod, &policy) {
            Ok(()) => captured.policy = policy,
            // The next plan finds it different again.
            Err(error) => warn!(%workload, error = &error as &dyn Error, "a pod's policy is not up to date"),
        }
    }

    async fn begin_release(&mut self, workload: &WorkloadUid, drain: bool) -> Option<()> {
        let mut captured = self.entries.take_captured(workload)?;
        if let Some(watch) = captured.watch.take() {
            watch.abort();
        }
        if !drain || !captured.announced {
            return self.stop(captured, drain).await;
        }
        // Others hear of it first: until they do, they call it as one of the mesh.
        let (proceed, told) = oneshot::channel();
        let leaving = CaptureEvent::Leaving {
            workload: workload.clone(),
            proceed,
        };
        self.events.send(leaving).await.ok()?;
        self.jobs.spawn(async move {
            let _ = tokio::time::timeout(WITHDRAWAL, told).await;
            Done::Withdrawn { captured }
        });
        Some(())
    }

    async fn stop(&mut self, mut captured: Captured, drain: bool) -> Option<()> {
        let stopped = pod::stop_steering(&self.node, &captured.pod);
        let was_served = std::mem::take(&mut captured.announced);
        if stopped.is_ok() && was_served {
            // Whoever serves it stops accepting, and goes on with what is open.
            let workload = captured.pod.workload.clone();
            self.events.send(CaptureEvent::Released(workload)).await.ok()?;
        }
        let node = self.node.clone();
        let linger = if was_served {
            self.settings.linger
        } else {
            Duration::ZERO
        };
        let (drain, linger) = match drain {
            // Whoever takes the mesh off the node waits for it, and kills in the end.
            true if self.settings.leave.is_cancelled() => {
                (self.settings.release_drain.min(LEAVE), linger.min(LEAVE / 4))
            }
            true => (self.settings.release_drain, linger),
            false => (Duration::ZERO, Duration::ZERO),
        };
        self.jobs.spawn(async move {
            let outcome = match stopped {
                Ok(()) => release(&node, &captured.pod, drain, linger).await,
                Err(error) => Err(error),
            };
            Done::Released { captured, outcome }
        });
        Some(())
    }

    /// `None` if nobody reads the events any more.
    async fn finish(&mut self, done: Result<Done, JoinError>) -> Option<()> {
        match done {
            Ok(Done::Captured { wanted, outcome }) => return self.captured(wanted, *outcome).await,
            Ok(Done::Refreshed { pod, watch, outcome }) => {
                if let Some(captured) = self.entries.captured(&pod.workload) {
                    captured.refresh = outcome.as_ref().err().map(|error| {
                        let attempts = captured.refresh.map_or(0, |(attempts, _)| attempts).saturating_add(1);
                        warn!(workload = %pod.workload, attempts, error = error as &dyn Error, "a pod is not up to date");
                        (attempts, Instant::now() + back_off(attempts))
                    });
                }
                if let (Ok(()), Some(captured)) = (&outcome, self.entries.captured(&pod.workload)) {
                    captured.link_at.get_or_insert(Instant::now() + LINK_AFTER);
                }
                // One that failed is tried again by the tick, with a new watch.
                self.arm(&pod, watch.filter(|_| outcome.is_ok()));
            }
            Ok(Done::NodeRefreshed { watch, outcome }) => {
                if let Err(error) = outcome {
                    warn!(
                        error = &error as &dyn Error,
                        "the kernel programs do not know the node's addresses"
                    );
                }
                self.arm_node(watch);
            }
            Ok(Done::Linked { pod, outcome }) => {
                self.is_linking = false;
                if let (Err(error), Some(captured)) = (outcome, self.entries.captured(&pod.workload)) {
                    warn!(workload = %pod.workload, error = &error as &dyn Error, "a pod's guard is a filter still");
                    captured.link_at = Some(Instant::now() + LINK_AGAIN);
                }
                self.link_next(Instant::now());
            }
            Ok(Done::Withdrawn { captured }) => return self.stop(captured, true).await,
            Ok(Done::Released { captured, outcome }) => self.released(captured, outcome),
            // Only watches are aborted, by the release of their pod.
            Err(join) if join.is_cancelled() => {}
            Err(join) => error!(error = &join as &dyn Error, "a step of capture panicked"),
        }
        Some(())
    }

    async fn captured(
        &mut self,
        wanted: Wanted,
        outcome: Result<(Pod, PodListeners, Watch), CaptureError>,
    ) -> Option<()> {
        let workload = wanted.workload;
        let event = match outcome {
            Ok((pod, listeners, watch)) => {
                debug!(%workload, place = %pod.place, "pod captured");
                for moved in &listeners.moved {
                    let (role, port) = (moved.role, moved.port);
                    warn!(%workload, ?role, port, "the usual port is taken in the pod, another serves");
                }
                let namespace = pod.namespace.clone();
                let pod = Arc::new(pod);
                let captured = Captured {
                    announced: true,
                    link_at: Some(Instant::now() + LINK_AFTER),
                    ..Captured::new(Arc::clone(&pod), wanted.policy)
                };
                self.entries.insert(workload.clone(), Entry::Captured(captured));
                self.arm(&pod, Some(watch));
                CaptureEvent::Captured(CapturedPod {
                    workload,
                    namespace,
                    listeners,
                })
            }
            Err(error) => {
                let attempts = self.entries.fail(&workload, wanted.place, Instant::now());
                CaptureEvent::Failed {
                    workload,
                    error: Arc::new(error),
                    attempts,
                }
            }
        };
        self.events.send(event).await.ok()
    }

    fn released(&mut self, mut captured: Captured, outcome: Result<(), CaptureError>) {
        let workload = captured.pod.workload.clone();
        match outcome {
            Ok(()) => {
                debug!(%workload, "pod released");
                self.entries.remove(&workload);
            }
            Err(error) => {
                let attempts = captured.release_attempts().saturating_add(1);
                warn!(%workload, attempts, error = &error as &dyn Error, "a pod cannot be released yet");
                captured.release = Some((attempts, Instant::now() + back_off(attempts)));
                self.entries.insert(workload, Entry::Captured(captured));
            }
        }
    }

    /// Waits for changes in the pod's namespace, and refreshes it then.
    fn arm(&mut self, pod: &Arc<Pod>, watch: Option<Watch>) {
        let Some(captured) = self.entries.captured(&pod.workload) else {
            return;
        };
        if !Arc::ptr_eq(&captured.pod, pod) {
            return;
        }
        captured.watch = watch.map(|mut watch| {
            let (node, pod) = (self.node.clone(), Arc::clone(pod));
            self.jobs.spawn(async move {
                let watch = heard(&mut watch).await.then_some(watch);
                refresh(node, pod, watch).await
            })
        });
    }

    /// Tells the kernel side what is the node's own, now and after each change there.
    fn arm_node(&mut self, watch: Option<Watch>) {
        let node = self.node.clone();
        self.jobs.spawn(async move {
            let watch = match watch {
                Some(mut watch) => heard(&mut watch).await.then_some(watch),
                None => Watch::open(&node.namespace).ok(),
            };
            if watch.is_none() {
                tokio::time::sleep(TICK).await;
            }
            let outcome = blocking(move || pod::set_node(&node)).await;
            Done::NodeRefreshed { watch, outcome }
        });
    }

    /// Returns once no step is under way. What only waits is given up; a step that has begun is finished by its thread,
    /// which holds the node for as long.
    async fn stand_still(&mut self) {
        self.jobs.shutdown().await;
        while Arc::strong_count(&self.node.adopted) > 1 {
            tokio::time::sleep(STEP_POLL).await;
        }
    }

    /// Begins to link the guards of a pod whose time has come, unless another's are being linked.
    fn link_next(&mut self, now: Instant) {
        if self.is_linking {
            return;
        }
        let mut pods = self.entries.all_captured();
        let Some(captured) = pods.find(|captured| captured.link_at.is_some_and(|at| at <= now)) else {
            return;
        };
        captured.link_at = None;
        self.is_linking = true;
        self.jobs.spawn(link(self.node.clone(), Arc::clone(&captured.pod)));
    }

    /// True if there is something to plan.
    fn look(&mut self, now: Instant) -> bool {
        self.link_next(now);
        let (node, jobs) = (&self.node, &mut self.jobs);
        for captured in self.entries.all_captured() {
            if captured.watch.is_some() || captured.refresh.is_some_and(|(_, retry_at)| retry_at > now) {
                continue;
            }
            let (node, pod) = (node.clone(), Arc::clone(&captured.pod));
            captured.watch = Some(jobs.spawn(async move {
                let watch = Watch::open(&pod.namespace).ok();
                refresh(node, pod, watch).await
            }));
        }
        self.entries.look(now)
            || self
                .table_failure
                .as_ref()
                .is_some_and(|failure| failure.retry_at <= now)
    }
}

/// For a pod that is about to be released.
fn any_policy() -> PodPolicy {
    PodPolicy {
        mode: PlaintextMode::Permissive,
        restricted: false,
        port_modes: Vec::new(),
    }
}
