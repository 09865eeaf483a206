//! The task that keeps capture going: it plans whenever something changed, runs the steps (one at a time per pod, several
//! pods at once), and tells what happened. When the daemon ends, pods stay captured: their connections are refused, not
//! sent in the clear, until the next daemon takes them over.

use super::{
    CaptureEvent,
    entries::{Captured, Entries},
    error::CaptureError,
    finder::Finder,
    jobs::{Done, blocking, refresh, release},
    kernel_side::KernelSide,
    node::{Inherited, Node},
    plan::{Scope, Step, Wanted, back_off, plan},
    pod,
    tables::Told,
};
use crate::{
    kernel::{AdoptedPod, MapError, PodPolicy, watch::Watch},
    mesh::{MeshSnapshot, WorkloadUid},
    net::{Namespace, NamespaceError},
    shutdown::Shutdown,
};
use std::{
    error::Error,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::{JoinSet, spawn_blocking},
    time::MissedTickBehavior,
};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

mod inheritance;
mod outcomes;

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
/// How long a pod, or an interface of it, is there before its guard becomes a link. What is gone by then, a job's pod say,
/// never needed one.
const LINK_AFTER: Duration = Duration::from_secs(10);
/// When linking is tried again after it failed.
const LINK_AGAIN: Duration = Duration::from_secs(30);
/// How long a pod still answers those who take it for one of the mesh when that is taken off the node.
const LEAVING_LINGER: Duration = Duration::from_millis(2500);
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
            // Whoever takes the mesh off the node waits for it.
            true if self.settings.leave.is_cancelled() => (self.settings.release_drain, linger.min(LEAVING_LINGER)),
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

    /// Returns once no step is under way. What only waits is given up; a step that has begun is finished by its thread,
    /// which holds the node for as long.
    async fn stand_still(&mut self) {
        self.jobs.shutdown().await;
        while Arc::strong_count(&self.node.adopted) > 1 {
            tokio::time::sleep(STEP_POLL).await;
        }
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
