//! `warren uninstall`: everything that was installed goes, in the order in which nothing is left behind. The daemons first:
//! they give their pods back, and take out the CNI plugin and what they pinned, while they still may speak to the API server.

use super::{
    api::{ApiError, Cluster, ClusterArgs, Owned},
    install::{NOT_WELL, helm_release},
    manifests::{
        self, CONFIG_MAPS, Component, DAEMON_SETS, ManifestError, NAMESPACE, NAMESPACES, NODE, Object, PART_OF, PODS,
        SECRETS,
    },
    terminal::{Mark, Progress, below, print, tell},
};
use crate::kubernetes::enrolment::REDIRECTION;
use clap::Args;
use serde_json::{Value, json};
use std::{process::ExitCode, time::Duration};
use tokio::time::Instant;

const POLL: Duration = Duration::from_millis(250);
const OF_DAEMONS: &str = "&labelSelector=app.kubernetes.io%2Fname%3Dwarren-node";

#[derive(Debug, Clone, Args)]
pub struct UninstallArgs {
    #[command(flatten)]
    pub cluster: ClusterArgs,
    /// Remove the custom resource definitions as well, and with them every policy in the cluster
    #[arg(long)]
    pub crds: bool,
    /// How many seconds the daemons may take to end
    #[arg(long, value_name = "SECONDS", default_value_t = 180)]
    pub timeout: u64,
}

/// Why something of Warren is still there.
#[derive(Debug, thiserror::Error)]
pub enum UninstallError {
    #[error(transparent)]
    Manifests(#[from] ManifestError),
    #[error(transparent)]
    Api(#[from] ApiError),
    #[error(
        "the daemons of these nodes have not ended in time: {nodes}; nothing else was removed, so that they can still \
         finish. See `kubectl -n warren-system get pods`, and run the same command again"
    )]
    StillThere { nodes: String },
    #[error(
        "Warren was installed by Helm (release {release}); nothing was removed. Do it by Helm, after the daemons have given \
         their pods back: `kubectl -n {NAMESPACE} delete daemonset {NODE} --cascade=foreground`, then `helm uninstall \
         {release} --namespace {NAMESPACE}`"
    )]
    Helm { release: String },
    #[error("namespace {NAMESPACE} is still there; see `kubectl get namespace {NAMESPACE} -o yaml` for what holds it")]
    Namespace,
    #[error("the definition {name} is still there; see `kubectl get crd {name} -o yaml` for what holds it")]
    Definition { name: String },
}

/// Removes Warren.
///
/// # Errors
/// The API server does not do as asked, or daemons do not end.
pub(super) async fn run(args: &UninstallArgs) -> Result<ExitCode, UninstallError> {
    let objects = manifests::all()?;
    let cluster = Cluster::connect(&args.cluster).await?;
    let deadline = Instant::now() + Duration::from_secs(args.timeout);
    if let Some(release) = helm_release(&cluster).await? {
        return Err(UninstallError::Helm { release });
    }

    let unfinished = daemons(&cluster, deadline).await?;
    for component in [Component::Controller, Component::Permissions] {
        let of_it = objects.iter().filter(|object| object.component == component);
        remove(&cluster, component, of_it).await?;
    }
    annotations(&cluster).await?;
    namespace(&cluster, deadline).await?;
    if args.crds {
        let of_it = objects
            .iter()
            .filter(|object| object.component == Component::Definitions);
        remove(&cluster, Component::Definitions, of_it.clone()).await?;
        definitions_ended(&cluster, of_it, deadline).await?;
    } else {
        tell(
            Mark::Good,
            Component::Definitions.title(),
            "kept, with the policies in them; --crds removes them",
        );
    }
    if unfinished.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    print("\nOn these nodes no daemon was at work, to clean up what one may have left there before:\n");
    for node in &unfinished {
        print(&below("", node));
    }
    print(&below(
        "→ ",
        "Restart them, or remove by hand: /sys/fs/bpf/warren, /run/warren, warren-cni in /opt/cni/bin, and its entry in \
         /etc/cni/net.d. Their captured pods refuse connections of the mesh until they are deleted.",
    ));
    Ok(ExitCode::from(NOT_WELL))
}

/// Ends the daemons, and waits for each. Returns the nodes whose daemon was not at work.
async fn daemons(cluster: &Cluster, deadline: Instant) -> Result<Vec<String>, UninstallError> {
    let pods = cluster.list(PODS, Some(NAMESPACE), OF_DAEMONS).await?;
    let unfinished: Vec<String> = pods.iter().filter(|pod| !was_at_work(pod)).map(node_of).collect();
    let was_there = cluster.delete(DAEMON_SETS, Some(NAMESPACE), NODE, Owned::First).await?;
    let mut progress = Progress::new();
    loop {
        let left = cluster.list(PODS, Some(NAMESPACE), OF_DAEMONS).await?;
        let owner = cluster.get(DAEMON_SETS, Some(NAMESPACE), NODE).await?;
        if left.is_empty() && owner.is_none() {
            break;
        }
        let nodes = left.iter().map(node_of).collect::<Vec<_>>().join(", ");
        if Instant::now() > deadline {
            progress.clear();
            return Err(UninstallError::StillThere { nodes });
        }
        progress.show(&format!("{}: waiting for {nodes}", Component::Daemons.title()));
        tokio::time::sleep(POLL).await;
    }
    progress.clear();
    let text = match (was_there, pods.len()) {
        (false, 0) => "not there".to_owned(),
        (_, count) if unfinished.is_empty() => format!("{count} ended, their pods are released"),
        (_, count) => format!("{count} ended, {} without having been at work", unfinished.len()),
    };
    tell(Mark::Good, Component::Daemons.title(), &text);
    Ok(unfinished)
}

fn was_at_work(pod: &Value) -> bool {
    let containers = pod["status"]["containerStatuses"].as_array();
    containers.is_some_and(|all| all.iter().any(|one| one["state"].get("running").is_some()))
}

fn node_of(pod: &Value) -> String {
    pod["spec"]["nodeName"].as_str().unwrap_or("(no node)").to_owned()
}

async fn remove<'o>(
    cluster: &Cluster,
    component: Component,
    objects: impl Iterator<Item = &'o Object>,
) -> Result<(), UninstallError> {
    let (mut gone, mut foreign) = (0, 0);
    for object in objects {
        // A definition that came from elsewhere is not ours to remove.
        if component == Component::Definitions {
            let there = cluster.get(object.resource, None, object.name()).await?;
            if there.is_some_and(|there| there["metadata"]["labels"][PART_OF] != "warren") {
                foreign += 1;
                continue;
            }
        }
        let removed = cluster
            .delete(object.resource, object.namespace(), object.name(), Owned::Later)
            .await?;
        gone += usize::from(removed);
    }
    let text = match (gone, foreign) {
        (0, 0) => "not there".to_owned(),
        (gone, 0) => format!("{gone} objects removed"),
        (gone, foreign) => format!("{gone} removed, {foreign} from elsewhere kept"),
    };
    tell(Mark::Good, component.title(), &text);
    Ok(())
}

/// Definitions go with the policies made of them, a while after they are deleted: whoever installs again at once would
/// meet those that are going.
async fn definitions_ended<'o>(
    cluster: &Cluster,
    objects: impl Iterator<Item = &'o Object>,
    deadline: Instant,
) -> Result<(), UninstallError> {
    for object in objects {
        while let Some(there) = cluster.get(object.resource, None, object.name()).await? {
            if there["metadata"]["deletionTimestamp"].is_null() {
                // From elsewhere, or made again meanwhile.
                break;
            }
            if Instant::now() > deadline {
                let name = object.name().to_owned();
                return Err(UninstallError::Definition { name });
            }
            tokio::time::sleep(POLL).await;
        }
    }
    Ok(())
}

/// What a daemon that was not at work has left on pods: others would go on to speak HBONE with them.
async fn annotations(cluster: &Cluster) -> Result<(), UninstallError> {
    let pods = cluster.list(PODS, None, "").await?;
    let marked = pods
        .iter()
        .filter(|pod| pod["metadata"]["annotations"].get(REDIRECTION).is_some());
    let mut count = 0;
    for pod in marked {
        let text = |at: &str| pod.pointer(at).and_then(Value::as_str).unwrap_or_default();
        let patch = json!({"metadata": {"annotations": {REDIRECTION: null}}});
        let (namespace, name) = (text("/metadata/namespace"), text("/metadata/name"));
        match cluster.patch(PODS, Some(namespace), name, &patch).await {
            Ok(_) => count += 1,
            // It ended meanwhile.
            Err(ApiError::Refused { code: 404, .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    if count > 0 {
        tell(Mark::Good, "Pods", &format!("{count} annotations removed"));
    }
    Ok(())
}

async fn namespace(cluster: &Cluster, deadline: Instant) -> Result<(), UninstallError> {
    let mut progress = Progress::new();
    let title = Component::Namespace.title();
    let Some(there) = cluster.get(NAMESPACES, None, NAMESPACE).await? else {
        tell(Mark::Good, title, "not there");
        return Ok(());
    };
    if there["metadata"]["labels"][PART_OF] != "warren" {
        // Somebody else's: of what is in it, only what the controller made.
        for (resource, name) in [(CONFIG_MAPS, "warren-ca-root"), (SECRETS, "warren-ca")] {
            cluster.delete(resource, Some(NAMESPACE), name, Owned::Later).await?;
        }
        tell(
            Mark::Good,
            title,
            &format!("{NAMESPACE} was not made by Warren, and stays"),
        );
        return Ok(());
    }
    cluster.delete(NAMESPACES, None, NAMESPACE, Owned::Later).await?;
    while cluster.get(NAMESPACES, None, NAMESPACE).await?.is_some() {
        if Instant::now() > deadline {
            progress.clear();
            return Err(UninstallError::Namespace);
        }
        progress.show(&format!("{title}: waiting for its end"));
        tokio::time::sleep(POLL).await;
    }
    progress.clear();
    tell(
        Mark::Good,
        title,
        &format!("{NAMESPACE} removed, and the root certificate with it"),
    );
    Ok(())
}
