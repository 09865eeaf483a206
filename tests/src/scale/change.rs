//! Changes as a busy cluster has them, at a steady rate: pods are labelled, captured and replaced, endpoints come and go,
//! services and policies are edited. Every one of them is to be seen in a snapshot.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result};
use futures::StreamExt;
use serde_json::json;
use tokio::time::{Instant, sleep_until};

use super::{
    api::{Acknowledged, Api, Kind},
    fill,
    objects::{self, PODS_PER_SERVICE, POLICIES},
};

/// Changes that the API server may be at work on at a time.
const IN_FLIGHT: usize = 64;

/// One thing that happens, by the number of the pod, service or policy that it happens to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    /// A pod gets another label.
    Relabel(usize),
    /// A pod enters or leaves the mesh: its annotation says so.
    Redirect(usize),
    /// One of a service's endpoints becomes ready, or ceases to be.
    Readiness(usize),
    /// A pod is deleted and another takes its place, with another address.
    Replace(usize),
    Settings(usize),
    Policy(usize),
}

impl Change {
    /// Number `i` of a run: of a hundred changes 40 label, 20 redirect, 25 are of readiness, 5 replace, 5 are of
    /// settings, 5 of policies. No object is met again before most of the others were.
    fn number(i: usize, pods: usize) -> Self {
        let (pod, service) = (i * 7_919 % pods, i * 7_919 % (pods / PODS_PER_SERVICE));
        match i * 37 % 100 {
            0..40 => Self::Relabel(pod),
            40..60 => Self::Redirect(pod),
            60..85 => Self::Readiness(service),
            85..90 => Self::Replace(pod),
            90..95 => Self::Settings(service),
            _ => Self::Policy(i % POLICIES),
        }
    }

    /// Requests that it takes, each of which counts as a change of the cluster.
    fn writes(self) -> u32 {
        match self {
            Self::Replace(_) => 4,
            Self::Relabel(_) | Self::Redirect(_) | Self::Readiness(_) | Self::Settings(_) | Self::Policy(_) => 1,
        }
    }
}

/// What was changed, and when the API server said so.
#[derive(Debug, Default)]
pub struct Changed {
    pub acknowledged: Vec<Acknowledged>,
    pub writes: u64,
    pub took: Duration,
}

/// A cluster that is being changed, run after run, while it grows.
pub struct Changer {
    api: Api,
    /// How many pods there are in this run.
    pods: usize,
    next: usize,
    /// How often a pod was replaced.
    generations: Mutex<BTreeMap<usize, usize>>,
}

impl Changer {
    pub fn new(api: Api) -> Self {
        Self {
            api,
            pods: 0,
            next: 0,
            generations: Mutex::default(),
        }
    }

    /// Changes a cluster of `pods` pods `rate` times a second for `time`. A server that is too slow for that makes it last longer.
    pub async fn run(&mut self, pods: usize, rate: u32, time: Duration) -> Result<Changed> {
        self.pods = pods;
        let begin = Instant::now();
        let (mut due, mut changes) = (Duration::ZERO, Vec::new());
        while due < time {
            let change = Change::number(self.next, self.pods);
            changes.push((self.next, change, begin + due));
            self.next += 1;
            due += Duration::from_secs(u64::from(change.writes())) / rate;
        }
        let writes = changes.iter().map(|(_, change, _)| u64::from(change.writes())).sum();
        let this = &*self;
        let results = futures::stream::iter(changes)
            .map(|(number, change, at)| async move {
                sleep_until(at).await;
                let what = || format!("{change:?}");
                this.carry_out(number, change).await.with_context(what)
            })
            .buffer_unordered(IN_FLIGHT);
        let results: Vec<Result<Acknowledged>> = results.collect().await;
        let took = begin.elapsed();
        Ok(Changed {
            acknowledged: results.into_iter().collect::<Result<_>>()?,
            writes,
            took,
        })
    }

    /// Notes that the pod is replaced; how often it was by now. Its address depends on that, so it holds for all runs.
    fn replaced(&self, pod: usize) -> usize {
        let mut generations = self.generations.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let generation = generations.entry(pod).or_default();
        *generation += 1;
        *generation
    }

    /// Gives back the last of its acknowledgements.
    async fn carry_out(&self, number: usize, change: Change) -> Result<Acknowledged> {
        let of_pod = |pod: usize| (objects::namespace_of_pod(pod), objects::pod_name(pod));
        match change {
            Change::Relabel(pod) => {
                let (namespace, name) = of_pod(pod);
                let patch = json!({"metadata": {"labels": {"version": format!("v{number}")}}});
                self.api.patch(Kind::Pod, &namespace, &name, &patch).await
            }
            Change::Redirect(pod) => {
                let (namespace, name) = of_pod(pod);
                // Round after round the other one, so that it is a change.
                let word = if (number / self.pods).is_multiple_of(2) {
                    json!(null)
                } else {
                    json!("enabled")
                };
                let patch = json!({"metadata": {
                    "annotations": {"ambient.istio.io/redirection": word}, "labels": {"redirected": format!("r{number}")},
                }});
                self.api.patch(Kind::Pod, &namespace, &name, &patch).await
            }
            Change::Readiness(service) => {
                // Another one each time that the service is met.
                let round = number / (self.pods / PODS_PER_SERVICE);
                let unready = service * PODS_PER_SERVICE + round % PODS_PER_SERVICE;
                self.publish_endpoints(service, Some(unready)).await
            }
            Change::Replace(pod) => {
                let (namespace, name) = of_pod(pod);
                self.api.delete(Kind::Pod, &namespace, &name).await?;
                let generation = self.replaced(pod);
                self.api.create(Kind::Pod, &objects::pod(pod)).await?;
                fill::report(&self.api, pod, generation).await?;
                self.publish_endpoints(pod / PODS_PER_SERVICE, None).await
            }
            Change::Settings(service) => {
                let (namespace, name) = (objects::namespace_of_service(service), format!("svc-{service}"));
                let seconds = 60 + number % 10_000;
                let config = json!({"clientIP": {"timeoutSeconds": seconds}});
                let patch = json!({"spec": {"sessionAffinity": "ClientIP", "sessionAffinityConfig": config}});
                self.api.patch(Kind::Service, &namespace, &name, &patch).await
            }
            Change::Policy(policy) => {
                let object = objects::policy(policy, number);
                let metadata = &object["metadata"];
                let text = |key: &str| metadata[key].as_str().unwrap_or_default();
                let patch = json!({"spec": object["spec"]});
                self.api
                    .patch(Kind::AuthorizationPolicy, text("namespace"), text("name"), &patch)
                    .await
            }
        }
    }

    async fn publish_endpoints(&self, service: usize, unready: Option<usize>) -> Result<Acknowledged> {
        let generations = self
            .generations
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .clone();
        let generation = |pod: usize| generations.get(&pod).copied().unwrap_or_default();
        let patch = json!({"endpoints": objects::endpoints(service, unready, generation)});
        let namespace = objects::namespace_of_service(service);
        self.api
            .patch(Kind::EndpointSlice, &namespace, &objects::slice_name(service), &patch)
            .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_hundred_changes_every_kind_has_its_share() {
        let changes: Vec<Change> = (0..100).map(|i| Change::number(i, 1_000)).collect();
        let share = |of: fn(&Change) -> bool| changes.iter().filter(|change| of(change)).count();
        assert_eq!(share(|change| matches!(change, Change::Relabel(_))), 40);
        assert_eq!(share(|change| matches!(change, Change::Redirect(_))), 20);
        assert_eq!(share(|change| matches!(change, Change::Readiness(_))), 25);
        assert_eq!(share(|change| matches!(change, Change::Replace(_))), 5);
        assert_eq!(share(|change| matches!(change, Change::Settings(_))), 5);
        assert_eq!(share(|change| matches!(change, Change::Policy(_))), 5);
    }
}
