//! What the cluster is told about this node's pods: the annotation that a pod speaks HBONE, and Events about pods that
//! cannot be captured. Capture never waits for it; what is wrong after a crash is mended.

mod ledger;

use super::enrolment::REDIRECTION;
use crate::{
    mesh::{MeshSnapshot, WorkloadUid},
    shutdown::Shutdown,
};
use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use ledger::{Job, Ledger, Outcome, Work};
use parking_lot::Mutex;
use serde_json::json;
use std::{sync::Arc, time::Duration};
use tokio::{
    sync::{Notify, oneshot, watch},
    task::JoinSet,
    time::{Instant, timeout},
};
use tracing::{debug, warn};

/// Who wrote it, among the managers of a pod's fields.
const MANAGER: &str = "warren";
/// Requests at the same time.
const AT_ONCE: usize = 8;
/// How long a request may take.
const REQUEST: Duration = Duration::from_secs(10);
/// Snapshots come in flocks, and none of them is urgent here.
const SETTLE: Duration = Duration::from_millis(20);
/// How often what has been written is compared with what is to be seen.
const LOOK: Duration = Duration::from_secs(1);

/// Takes notes of what becomes of pods. Never blocks; clones share the notes.
#[derive(Debug, Clone, Default)]
pub struct Announcements(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    ledger: Mutex<Ledger>,
    changed: Notify,
}

impl Announcements {
    /// From here on the pod speaks HBONE.
    pub fn captured(&self, pod: WorkloadUid) {
        self.note(|ledger| ledger.captured(pod));
    }

    /// It soon will not: `proceed` is dropped once nobody is told otherwise any more.
    pub fn leaving(&self, pod: WorkloadUid, proceed: oneshot::Sender<()>) {
        self.note(|ledger| ledger.leaving(pod, Some(proceed)));
    }

    pub fn released(&self, pod: WorkloadUid) {
        self.note(|ledger| ledger.leaving(pod, None));
    }

    /// It should speak HBONE and does not: `reason` is one word, `message` for a person. `is_final`: no other attempt helps.
    pub fn failed(&self, pod: WorkloadUid, reason: &'static str, is_final: bool, message: String) {
        self.note(|ledger| ledger.failed(pod, reason, is_final, message, Instant::now()));
    }

    /// What an earlier daemon captured has been taken over: who is not captured now speaks no HBONE.
    pub fn settled(&self) {
        self.note(Ledger::settled);
    }

    /// Another daemon captures, and what it does is not known here: whoever captures again begins like one that starts.
    pub fn forget(&self) {
        self.note(Ledger::forget);
    }

    fn note(&self, note: impl FnOnce(&mut Ledger)) {
        note(&mut self.0.ledger.lock());
        self.0.changed.notify_one();
    }
}

/// Keeps the cluster told until the drain begins.
pub async fn announce(
    announcements: Announcements,
    client: Client,
    node: Arc<str>,
    mut snapshots: watch::Receiver<Arc<MeshSnapshot>>,
    shutdown: Shutdown,
) {
    let shared = announcements.0;
    shared.ledger.lock().begin_anew();
    let reporter = Reporter {
        controller: "warren.mesh/node".to_owned(),
        instance: Some(node.to_string()),
    };
    let writer = Writer {
        recorder: Recorder::new(client.clone(), reporter),
        client,
    };
    let mut jobs: JoinSet<(Job, Outcome)> = JoinSet::new();
    let draining = shutdown.draining();
    tokio::pin!(draining);
    loop {
        let snapshot = Arc::clone(&snapshots.borrow_and_update());
        let now = Instant::now();
        let due = {
            let mut ledger = shared.ledger.lock();
            ledger.observe(&snapshot, &node);
            ledger.due(now, AT_ONCE.saturating_sub(jobs.len()))
        };
        for job in due {
            let writer = writer.clone();
            jobs.spawn(async move {
                let outcome = writer.carry_out(&job).await;
                (job, outcome)
            });
        }
        tokio::select! {
            () = &mut draining => return,
            Some(done) = jobs.join_next(), if !jobs.is_empty() => {
                if let Ok((job, outcome)) = done {
                    shared.ledger.lock().done(&job, outcome, Instant::now(), rand::random_range(0.75..1.25));
                }
            }
            changed = snapshots.changed() => {
                if changed.is_err() {
                    return;
                }
                tokio::time::sleep(SETTLE).await;
            }
            () = shared.changed.notified() => {}
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

#[derive(Clone)]
struct Writer {
    client: Client,
    recorder: Recorder,
}

impl Writer {
    async fn carry_out(&self, job: &Job) -> Outcome {
        let written = timeout(REQUEST, async {
            match &job.work {
                Work::Annotate(enabled) => self.annotate(job, *enabled).await,
                Work::Tell { reason, message } => self.tell(job, reason, message).await,
            }
        });
        match written.await {
            Ok(Ok(())) => Outcome::Written,
            // Gone, or another pod of its name.
            Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409 | 422) => {
                debug!(pod = %job.pod, %status, "the pod is not there any more");
                Outcome::Gone
            }
            Ok(Err(error)) => {
                warn!(pod = %job.pod, work = job.work.name(), error = &error as &dyn std::error::Error, "the cluster cannot be told about a pod");
                Outcome::Failed
            }
            Err(_) => {
                warn!(pod = %job.pod, work = job.work.name(), "the API server does not answer");
                Outcome::Failed
            }
        }
    }

    /// The UID makes sure that it is this pod and no later one of its name.
    async fn annotate(&self, job: &Job, enabled: bool) -> kube::Result<()> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &job.namespace);
        if enabled {
            let fields = json!({
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": job.name, "namespace": job.namespace, "uid": job.pod.0, "annotations": {REDIRECTION: "enabled"}}
            });
            let parameters = PatchParams::apply(MANAGER).force();
            return pods
                .patch_metadata(&job.name, &parameters, &Patch::Apply(&fields))
                .await
                .map(drop);
        }
        // Whoever wrote it.
        let fields = json!({"metadata": {"uid": job.pod.0, "annotations": {REDIRECTION: null}}});
        let parameters = PatchParams {
            field_manager: Some(MANAGER.to_owned()),
            ..PatchParams::default()
        };
        pods.patch_metadata(&job.name, &parameters, &Patch::Merge(&fields))
            .await
            .map(drop)
    }

    async fn tell(&self, job: &Job, reason: &str, message: &str) -> kube::Result<()> {
        let about = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            name: Some(job.name.to_string()),
            namespace: Some(job.namespace.to_string()),
            uid: Some(job.pod.to_string()),
            ..ObjectReference::default()
        };
        let event = Event {
            type_: EventType::Warning,
            reason: "CaptureFailed".to_owned(),
            // The API takes a kilobyte.
            note: Some(
                format!("not in the mesh ({reason}): {message}")
                    .chars()
                    .take(900)
                    .collect(),
            ),
            action: "Capture".to_owned(),
            secondary: None,
        };
        self.recorder.publish(&event, &about).await
    }
}
