//! What is to be told about which pod. Pure: pods, snapshots and the time go in, jobs come out. Holds this node's pods and
//! no others; of several things to say about one pod the last.

use crate::mesh::{MeshSnapshot, WorkloadUid, workload::Protocol};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};
use tokio::{sync::oneshot, time::Instant};

/// How long what was written may take to be seen.
const ECHO: Duration = Duration::from_secs(10);
const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// How long capture has to fail before an Event says so, where another attempt may help: a sandbox takes a moment, and so
/// does a daemon that takes over from another.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Job {
    pub(super) pod: WorkloadUid,
    pub(super) namespace: Arc<str>,
    pub(super) name: Arc<str>,
    pub(super) work: Work,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Work {
    Annotate(bool),
    Tell { reason: &'static str, message: String },
}

impl Work {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Annotate(true) => "annotate",
            Self::Annotate(false) => "take the annotation off",
            Self::Tell { .. } => "event",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Written,
    /// There is no such pod any more.
    Gone,
    Failed,
}

#[derive(Debug, Default)]
pub(super) struct Ledger {
    pods: BTreeMap<WorkloadUid, Pod>,
    captured: BTreeSet<WorkloadUid>,
    /// The captured pods are all that are.
    is_settled: bool,
}

/// A pod of this node, as the snapshot has it, and what is on the way.
#[derive(Debug, Default)]
struct Pod {
    seen: Option<Seen>,
    written: Option<(bool, Instant)>,
    proceed: Option<oneshot::Sender<()>>,
    failure: Option<Failure>,
    is_busy: bool,
    attempts: u32,
    not_before: Option<Instant>,
}

#[derive(Debug, Clone)]
struct Seen {
    namespace: Arc<str>,
    name: Arc<str>,
    is_annotated: bool,
}

#[derive(Debug)]
struct Failure {
    reason: &'static str,
    message: String,
    /// Since when there has been one failure after the other, for whatever reason.
    since: Instant,
    /// No other attempt will help.
    is_final: bool,
    /// The reasons that were told in this time. A failure may go back and forth between two.
    told: BTreeSet<&'static str>,
}

impl Failure {
    fn is_told(&self) -> bool {
        self.told.contains(self.reason)
    }
}

impl Ledger {
    pub(super) fn captured(&mut self, pod: WorkloadUid) {
        if let Some(entry) = self.pods.get_mut(&pod) {
            entry.failure = None;
            entry.proceed = None;
        }
        self.captured.insert(pod);
    }

    pub(super) fn leaving(&mut self, pod: WorkloadUid, proceed: Option<oneshot::Sender<()>>) {
        self.captured.remove(&pod);
        // One that is not known any more need not wait: `proceed` is dropped.
        if let Some(entry) = self.pods.get_mut(&pod) {
            entry.proceed = proceed;
            entry.failure = None;
            entry.withdraw_if_seen();
        }
    }

    pub(super) fn failed(
        &mut self,
        pod: WorkloadUid,
        reason: &'static str,
        is_final: bool,
        message: String,
        now: Instant,
    ) {
        self.captured.remove(&pod);
        let entry = self.pods.entry(pod).or_default();
        match &mut entry.failure {
            Some(failure) if failure.reason == reason => failure.message = message,
            Some(failure) => (failure.reason, failure.message, failure.is_final) = (reason, message, is_final),
            none => {
                *none = Some(Failure {
                    reason,
                    message,
                    since: now,
                    is_final,
                    told: BTreeSet::new(),
                });
            }
        }
    }

    pub(super) fn settled(&mut self) {
        self.is_settled = true;
    }

    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }

    /// Nobody carries out the jobs that were due before: those that are not done are due again.
    pub(super) fn begin_anew(&mut self) {
        for pod in self.pods.values_mut() {
            pod.is_busy = false;
        }
    }

    /// What the cluster says by now.
    pub(super) fn observe(&mut self, snapshot: &MeshSnapshot, node: &str) {
        let own = snapshot
            .own
            .values()
            .filter(|workload| workload.locality.node.as_deref() == Some(node) && !workload.host_network);
        let mut there = BTreeSet::new();
        for workload in own {
            there.insert(workload.uid.clone());
            let entry = self.pods.entry(workload.uid.clone()).or_default();
            entry.seen = Some(Seen {
                namespace: Arc::clone(&workload.namespace),
                name: Arc::clone(&workload.name),
                is_annotated: workload.protocol == Protocol::Hbone,
            });
            entry.withdraw_if_seen();
        }
        self.pods.retain(|pod, _| there.contains(pod));
        self.captured.retain(|pod| there.contains(pod));
    }

    /// At most `room` jobs that are due. Each ends in [`Ledger::done`].
    pub(super) fn due(&mut self, now: Instant, room: usize) -> Vec<Job> {
        let mut due = Vec::new();
        for (pod, entry) in &mut self.pods {
            if due.len() == room {
                break;
            }
            let Some(seen) = entry.seen.clone() else { continue };
            if entry.is_busy || entry.not_before.is_some_and(|time| time > now) {
                continue;
            }
            let is_captured = self.captured.contains(pod);
            let Some(work) = entry.work(is_captured, self.is_settled, seen.is_annotated, now) else {
                continue;
            };
            entry.is_busy = true;
            due.push(Job {
                pod: pod.clone(),
                namespace: seen.namespace,
                name: seen.name,
                work,
            });
        }
        due
    }

    /// `jitter` spreads the next attempt: many daemons may have failed at the same moment.
    pub(super) fn done(&mut self, job: &Job, outcome: Outcome, now: Instant, jitter: f64) {
        let Some(entry) = self.pods.get_mut(&job.pod) else {
            return;
        };
        entry.is_busy = false;
        if outcome == Outcome::Failed {
            entry.attempts = entry.attempts.saturating_add(1);
            let wait = FIRST_WAIT.saturating_mul(1 << entry.attempts.saturating_sub(1).min(10));
            entry.not_before = Some(now + wait.min(LONGEST_WAIT).mul_f64(jitter));
            return;
        }
        entry.attempts = 0;
        entry.not_before = None;
        match &job.work {
            Work::Annotate(enabled) => {
                entry.written = Some((*enabled, now));
                if !enabled {
                    entry.proceed = None;
                }
            }
            Work::Tell { reason, .. } => {
                if let Some(failure) = entry.failure.as_mut() {
                    failure.told.insert(reason);
                }
            }
        }
    }
}

impl Pod {
    fn work(&self, is_captured: bool, is_settled: bool, is_annotated: bool, now: Instant) -> Option<Work> {
        let is_echoing = |wanted| {
            self.written
                .is_some_and(|(written, at)| written == wanted && at + ECHO > now)
        };
        if is_captured != is_annotated && !is_echoing(is_captured) && (is_captured || is_settled) {
            return Some(Work::Annotate(is_captured));
        }
        // What has just been written and is not seen yet may be the opposite of what is wanted by now.
        if let Some((written, at)) = self.written
            && written != is_captured
            && at + ECHO > now
            && (is_captured || is_settled)
        {
            return Some(Work::Annotate(is_captured));
        }
        let failure = self.failure.as_ref().filter(|failure| !failure.is_told())?;
        (failure.is_final || failure.since + PATIENCE <= now).then(|| Work::Tell {
            reason: failure.reason,
            message: failure.message.clone(),
        })
    }

    /// Nobody is told otherwise any more.
    fn withdraw_if_seen(&mut self) {
        let is_annotated = self.seen.as_ref().is_none_or(|seen| seen.is_annotated);
        let was_written = self.written.is_some_and(|(enabled, _)| enabled);
        if !is_annotated && !was_written && !self.is_busy {
            self.proceed = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::{Workload, fixtures, map::visited};

    const NODE: &str = "n1";

    struct Scene {
        ledger: Ledger,
        snapshot: MeshSnapshot,
        now: Instant,
    }

    impl Scene {
        fn new(pods: &[(&str, bool)]) -> Self {
            let mut scene = Self {
                ledger: Ledger::default(),
                snapshot: MeshSnapshot {
                    node: Some(NODE.into()),
                    ..MeshSnapshot::default()
                },
                now: Instant::now(),
            };
            for (pod, is_annotated) in pods {
                scene.see(pod, *is_annotated);
            }
            scene
        }

        fn see(&mut self, pod: &str, is_annotated: bool) {
            let mut workload: Workload = fixtures::workload("shop", pod, "10.244.1.2");
            workload.uid = uid(pod);
            workload.locality.node = Some(NODE.into());
            workload.host_network = false;
            workload.protocol = if is_annotated { Protocol::Hbone } else { Protocol::Tcp };
            self.snapshot.set_workload(Arc::new(workload));
        }

        fn fail(&mut self, pod: &str, reason: &'static str, is_final: bool) {
            self.ledger.failed(uid(pod), reason, is_final, "why".into(), self.now);
        }

        fn due(&mut self) -> Vec<Job> {
            self.ledger.observe(&self.snapshot, NODE);
            self.ledger.due(self.now, 8)
        }

        fn said(&mut self) -> Vec<String> {
            let jobs = self.due();
            let text = |job: &Job| match &job.work {
                Work::Annotate(true) => format!("+{}", job.pod),
                Work::Annotate(false) => format!("-{}", job.pod),
                Work::Tell { reason, .. } => format!("{}: {reason}", job.pod),
            };
            jobs.iter()
                .map(|job| {
                    self.ledger.done(job, Outcome::Written, self.now, 1.0);
                    text(job)
                })
                .collect()
        }
    }

    fn uid(pod: &str) -> WorkloadUid {
        WorkloadUid(pod.into())
    }

    fn is_dropped(told: &mut oneshot::Receiver<()>) -> bool {
        matches!(told.try_recv(), Err(oneshot::error::TryRecvError::Closed))
    }

    #[test]
    fn a_job_that_was_dropped_is_due_again_after_a_pause() {
        let mut scene = Scene::new(&[("a", false)]);
        scene.ledger.captured(uid("a"));
        assert_eq!(scene.due().len(), 1);
        assert_eq!(scene.due(), [], "it is being carried out");
        scene.ledger.begin_anew();
        assert_eq!(scene.said(), ["+a"]);
    }

    #[test]
    fn what_a_crash_left_wrong_is_mended_once_everything_is_taken_over() {
        let mut scene = Scene::new(&[("kept", true), ("stale", true), ("new", false), ("out", false)]);
        scene.ledger.captured(uid("kept"));
        scene.ledger.captured(uid("new"));
        assert_eq!(
            scene.said(),
            ["+new"],
            "nothing is taken off before it is known who is captured"
        );
        scene.ledger.settled();
        assert_eq!(scene.said(), ["-stale"]);
        assert_eq!(scene.said(), [""; 0], "what was written takes a moment to be seen");
        scene.now += ECHO;
        assert_eq!(scene.said(), ["+new", "-stale"], "but not for ever");
        scene.see("new", true);
        scene.see("stale", false);
        scene.now += ECHO;
        assert_eq!(scene.said(), [""; 0]);
    }

    #[test]
    fn what_another_daemon_told_meanwhile_stands_until_it_is_known_who_is_captured() {
        let mut scene = Scene::new(&[("released", true)]);
        scene.ledger.captured(uid("released"));
        scene.ledger.settled();
        assert_eq!(scene.said(), [""; 0]);
        scene.ledger.forget();
        scene.see("released", false);
        scene.see("theirs", true);
        scene.see("stale", true);
        assert_eq!(scene.said(), [""; 0], "neither told again nor taken off");
        scene.ledger.captured(uid("theirs"));
        scene.ledger.settled();
        assert_eq!(scene.said(), ["-stale"]);
    }

    #[test]
    fn a_pod_is_let_go_when_its_annotation_is_off_and_at_once_where_there_is_none() {
        let mut scene = Scene::new(&[("a", true), ("b", false)]);
        scene.ledger.settled();
        scene.ledger.captured(uid("a"));
        assert_eq!(scene.said(), [""; 0]);
        let (proceed, mut told) = oneshot::channel();
        scene.ledger.leaving(uid("a"), Some(proceed));
        let jobs = scene.due();
        assert_eq!(jobs[0].work, Work::Annotate(false));
        assert!(!is_dropped(&mut told));
        scene.ledger.done(&jobs[0], Outcome::Written, scene.now, 1.0);
        assert!(is_dropped(&mut told));

        let (proceed, mut told) = oneshot::channel();
        scene.ledger.leaving(uid("b"), Some(proceed));
        assert!(is_dropped(&mut told));
        let (proceed, mut told) = oneshot::channel();
        scene.ledger.leaving(uid("nobody"), Some(proceed));
        assert!(is_dropped(&mut told));
    }

    #[test]
    fn a_pod_that_leaves_right_after_its_capture_is_not_left_annotated() {
        let mut scene = Scene::new(&[("a", false)]);
        scene.ledger.settled();
        scene.ledger.captured(uid("a"));
        assert_eq!(scene.said(), ["+a"]);
        // The snapshot does not show it yet.
        let (proceed, mut told) = oneshot::channel();
        scene.ledger.leaving(uid("a"), Some(proceed));
        assert!(!is_dropped(&mut told));
        assert_eq!(scene.said(), ["-a"]);
        assert!(is_dropped(&mut told));
        assert_eq!(scene.said(), [""; 0]);
    }

    #[test]
    fn a_request_that_fails_is_tried_again_later_and_later() {
        let mut scene = Scene::new(&[("a", false)]);
        scene.ledger.captured(uid("a"));
        let mut waits = Vec::new();
        for _ in 0..10 {
            let jobs = scene.due();
            assert_eq!(jobs.len(), 1);
            assert!(scene.due().is_empty(), "one at a time");
            scene.ledger.done(&jobs[0], Outcome::Failed, scene.now, 1.0);
            assert!(scene.due().is_empty(), "not at once");
            let next = scene.ledger.pods[&uid("a")].not_before.unwrap();
            waits.push((next - scene.now).as_millis());
            scene.now = next;
        }
        assert_eq!(waits[..4], [200, 400, 800, 1600]);
        assert_eq!(waits[9], 30_000);
    }

    #[test]
    fn an_event_waits_until_capture_has_failed_for_a_while_unless_no_attempt_can_help() {
        let mut scene = Scene::new(&[("slow", false), ("kata", false), ("fast", false)]);
        scene.fail("kata", "foreign-kernel", true);
        scene.fail("slow", "no-process", false);
        scene.fail("fast", "no-process", false);
        assert_eq!(scene.said(), ["kata: foreign-kernel"]);
        scene.now += PATIENCE - Duration::from_millis(1);
        scene.fail("slow", "no-process", false);
        assert_eq!(scene.said(), [""; 0], "however many attempts there were");
        scene.ledger.captured(uid("fast"));
        scene.now += Duration::from_millis(1);
        // It goes on failing, now for another reason.
        scene.fail("slow", "listen", false);
        assert_eq!(scene.said(), ["+fast", "slow: listen"]);
        scene.fail("slow", "listen", false);
        assert_eq!(scene.said(), [""; 0], "once is enough");
    }

    #[test]
    fn a_failure_that_goes_back_and_forth_between_two_reasons_is_told_twice() {
        let mut scene = Scene::new(&[("torn", false)]);
        scene.fail("torn", "no-process", false);
        scene.now += PATIENCE;
        let mut told = Vec::new();
        for reason in ["no-process", "listen", "no-process", "listen"] {
            scene.fail("torn", reason, false);
            told.extend(scene.said());
            scene.now += Duration::from_secs(1);
        }
        assert_eq!(told, ["torn: no-process", "torn: listen"]);
        // What fails after it had been captured is another story.
        scene.ledger.captured(uid("torn"));
        assert_eq!(scene.said(), ["+torn"]);
        scene.fail("torn", "listen", false);
        scene.now += PATIENCE;
        assert!(scene.said().contains(&"torn: listen".to_owned()));
    }

    #[test]
    fn nothing_is_kept_of_pods_that_are_gone() {
        let mut scene = Scene::new(&[("a", true)]);
        scene.ledger.captured(uid("a"));
        scene.fail("never-seen", "no-process", false);
        assert_eq!(scene.said(), [""; 0]);
        scene.snapshot.remove_workload(&uid("a"));
        assert_eq!(scene.said(), [""; 0]);
        assert!(scene.ledger.pods.is_empty() && scene.ledger.captured.is_empty());
    }

    #[test]
    fn to_observe_a_snapshot_costs_what_the_own_nodes_pods_do() {
        let costs = [1_000, 20_000].map(|pods| {
            let mesh = fixtures::large(pods);
            let mut ledger = Ledger::default();
            let cost = visited(|| ledger.observe(&mesh, "node-0"));
            assert_eq!(ledger.pods.len(), 10);
            cost
        });
        assert!(costs[0] < 50, "{costs:?}");
        assert_eq!(costs[0], costs[1], "it grows with the mesh");
    }
}
