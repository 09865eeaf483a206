//! `warren install`: the manifests that the binary carries, applied with the person's rights, and waited for.

mod rollout;
mod settings;

pub use settings::{Settings, SettingsError};

use super::{
    api::{ApiError, Cluster, ClusterArgs},
    check::{self, Severity},
    manifests::{self, Component, DAEMON_SETS, ManifestError, NAMESPACE, NODE, Object, PART_OF},
    terminal::{Mark, Progress, print, tell},
};
use clap::Args;
use rollout::Rollout;
use serde_json::Value;
use std::{process::ExitCode, time::Duration};
use tokio::time::Instant;

/// Installed, but not all of it is well.
pub(super) const NOT_WELL: u8 = 3;
const POLL: Duration = Duration::from_millis(250);
/// The API server establishes a definition within a second.
const ESTABLISH: Duration = Duration::from_secs(20);

#[derive(Debug, Clone, Args)]
pub struct InstallArgs {
    #[command(flatten)]
    pub cluster: ClusterArgs,
    #[command(flatten)]
    pub settings: Settings,
    /// Print the manifests and do nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Install although `warren check --pre` finds errors
    #[arg(long)]
    pub skip_checks: bool,
    /// Do not wait until everything is ready
    #[arg(long)]
    pub no_wait: bool,
    /// How many seconds to wait for everything to be ready
    #[arg(long, value_name = "SECONDS", default_value_t = 180)]
    pub timeout: u64,
}

/// Why Warren is not installed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    #[error(transparent)]
    Manifests(#[from] ManifestError),
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error(transparent)]
    Api(#[from] ApiError),
    #[error("{kind} {name} is not installed; what came before it is, and the same command goes on from there")]
    Apply {
        kind: String,
        name: String,
        source: ApiError,
    },
    #[error(
        "Warren was installed by Helm (release {release}): change it by `helm upgrade`, or `helm uninstall` it first"
    )]
    Helm { release: String },
    #[error("the cluster has {name} from elsewhere, which serves neither v1 nor v1beta1; replace it first")]
    ForeignDefinition { name: String },
    #[error("the API server does not take up {name} within 20 s")]
    NotEstablished { name: String },
}

/// Installs, or prints what would be installed.
///
/// # Errors
/// The first object that the API server does not take.
pub(super) async fn run(args: &InstallArgs) -> Result<ExitCode, InstallError> {
    let mut objects = manifests::all()?;
    args.settings.apply(&mut objects)?;
    if args.dry_run {
        print(&manifests::printed(&objects)?);
        return Ok(ExitCode::SUCCESS);
    }
    let cluster = Cluster::connect(&args.cluster).await?;
    if !args.skip_checks && !may_go_on(&cluster).await {
        return Ok(ExitCode::from(NOT_WELL));
    }
    if let Some(release) = helm_release(&cluster).await? {
        return Err(InstallError::Helm { release });
    }
    let deadline = Instant::now() + Duration::from_secs(args.timeout);
    let mut ready = true;
    for component in Component::ALL {
        let of_it: Vec<&Object> = objects.iter().filter(|object| object.component == component).collect();
        let text = match component {
            Component::Definitions => definitions(&cluster, &of_it).await?,
            Component::Namespace | Component::Permissions | Component::Controller | Component::Daemons => {
                apply_all(&cluster, component, &of_it).await?
            }
        };
        if args.no_wait || !matches!(component, Component::Controller | Component::Daemons) {
            tell(Mark::Good, component.title(), &text);
        } else {
            // The controller before the daemons: they mount the trust bundle that it writes, and kubelets are slow to
            // look for it again.
            ready &= wait(&cluster, component, deadline).await?;
        }
    }
    if args.no_wait {
        return Ok(ExitCode::SUCCESS);
    }
    if ready {
        print("\nWarren is installed. Put a namespace into the mesh, without restarting anything:\n");
        print("  kubectl label namespace NAME istio.io/dataplane-mode=ambient\n");
        return Ok(ExitCode::SUCCESS);
    }
    print("\nWarren is installed, but not ready. What stands in the way:\n\n");
    let _ = check::report_on(&cluster, false).await;
    Ok(ExitCode::from(NOT_WELL))
}

/// Whether nothing is in the way; tells what is.
async fn may_go_on(cluster: &Cluster) -> bool {
    let mut progress = Progress::new();
    progress.show("looking at the cluster");
    let facts = check::gather(cluster, true).await;
    progress.clear();
    let findings = check::diagnose(&facts);
    for finding in &findings {
        print(&check::told(finding));
    }
    let stop = findings.iter().any(|finding| finding.severity == Severity::Error);
    if stop {
        print("\nNothing was installed. Mend this, or go on all the same with --skip-checks.\n");
    }
    !stop
}

/// The release of Helm that Warren belongs to. Two owners of one object undo each other's work.
pub(super) async fn helm_release(cluster: &Cluster) -> Result<Option<String>, ApiError> {
    let found = cluster.get(DAEMON_SETS, Some(NAMESPACE), NODE).await?;
    let release = found
        .as_ref()
        .and_then(|object| object["metadata"]["annotations"]["meta.helm.sh/release-name"].as_str());
    Ok(release.map(str::to_owned))
}

/// Definitions that come from elsewhere stay as they are, if they will do.
async fn definitions(cluster: &Cluster, objects: &[&Object]) -> Result<String, InstallError> {
    let mut kept = 0;
    for object in objects {
        let there = cluster.get(object.resource, None, object.name()).await?;
        let foreign = there.filter(|there| there["metadata"]["labels"][PART_OF] != "warren");
        match foreign {
            Some(foreign) if !serves_ours(&foreign) => {
                return Err(InstallError::ForeignDefinition {
                    name: object.name().to_owned(),
                });
            }
            Some(_) => kept += 1,
            None => apply(cluster, object).await?,
        }
    }
    for object in objects {
        established(cluster, object).await?;
    }
    Ok(match kept {
        0 => format!("{} installed", objects.len()),
        _ if kept == objects.len() => format!("{kept} were there already, and stay as they are"),
        _ => format!("{} installed, {kept} were there already", objects.len() - kept),
    })
}

/// Whether a definition has a version that Warren reads.
fn serves_ours(definition: &Value) -> bool {
    let versions = definition["spec"]["versions"].as_array();
    let served =
        |version: &Value| version["served"] == true && matches!(version["name"].as_str(), Some("v1" | "v1beta1"));
    versions.is_some_and(|versions| versions.iter().any(served))
}

async fn established(cluster: &Cluster, object: &Object) -> Result<(), InstallError> {
    let deadline = Instant::now() + ESTABLISH;
    loop {
        let there = cluster.get(object.resource, None, object.name()).await?;
        let conditions = there
            .as_ref()
            .and_then(|there| there["status"]["conditions"].as_array());
        let is_so = |condition: &Value| condition["type"] == "Established" && condition["status"] == "True";
        if conditions.is_some_and(|all| all.iter().any(is_so)) {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(InstallError::NotEstablished {
                name: object.name().to_owned(),
            });
        }
        tokio::time::sleep(POLL).await;
    }
}

async fn apply_all(cluster: &Cluster, component: Component, objects: &[&Object]) -> Result<String, InstallError> {
    let mut progress = Progress::new();
    for object in objects {
        progress.show(&format!("{}: {}", component.title(), object.kind()));
        apply(cluster, object).await?;
    }
    Ok(match component {
        Component::Namespace => NAMESPACE.to_owned(),
        Component::Permissions => format!("{} objects", objects.len()),
        Component::Definitions | Component::Controller | Component::Daemons => "applied".to_owned(),
    })
}

async fn apply(cluster: &Cluster, object: &Object) -> Result<(), InstallError> {
    match cluster.apply(object.resource, &object.value).await {
        Ok(_) => Ok(()),
        Err(source) => Err(InstallError::Apply {
            kind: object.kind().to_owned(),
            name: object.name().to_owned(),
            source,
        }),
    }
}

/// Whether the component got ready in time; tells so.
async fn wait(cluster: &Cluster, component: Component, deadline: Instant) -> Result<bool, InstallError> {
    let begin = Instant::now();
    let mut progress = Progress::new();
    loop {
        let rollout = Rollout::of(cluster, component).await?;
        let took = begin.elapsed().as_secs_f32();
        if rollout.is_done() || Instant::now() > deadline {
            progress.clear();
            let mark = if rollout.is_done() { Mark::Good } else { Mark::Bad };
            tell(mark, component.title(), &format!("{rollout}, after {took:.1} s"));
            return Ok(rollout.is_done());
        }
        progress.show(&format!("{}: {rollout} ({took:.0} s)", component.title()));
        tokio::time::sleep(POLL).await;
    }
}
