//! How a daemon comes to own its node: from the daemon that has it, by a hand-over, or because nobody has it (any more).

use super::{
    Snapshots,
    duties::Duties,
    handover::{OURS, WORD},
    pods::{Condition, Pods},
};
use crate::{
    admin::Readiness,
    capture::Inherited,
    certs::CertStore,
    handover::{FromPredecessor, FromSuccessor, Given, Heard, Link, LinkError, Taker, Tenure},
    mesh::{MeshSnapshot, SpiffeId, WorkloadUid},
    net::PodListeners,
};
use anyhow::{Context, bail};
use std::{
    collections::BTreeSet,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

/// How often a daemon that may not begin yet looks whether nobody has the node.
const POLL: Duration = Duration::from_millis(100);
/// When it asks the owner again, at first and after many times.
const AGAIN: Duration = Duration::from_secs(1);
const LONGEST_AGAIN: Duration = Duration::from_secs(8);
/// How long certificates may take: less than the predecessor waits.
const PREPARING: Duration = Duration::from_secs(30);
/// How long the predecessor may take to stand still.
const TAKING: Duration = Duration::from_secs(30);
/// How long this daemon may take to serve: less than the predecessor waits for it.
pub(super) const SERVING: Duration = Duration::from_secs(20);
/// How long the predecessor may take for its goodbye.
const GOODBYE: Duration = Duration::from_secs(10);
/// How far our picture of the cluster may be behind the predecessor's.
const LAG: Duration = Duration::from_secs(1);

/// The node came to this daemon from one that has stopped, and still accepts.
pub(super) struct Heir {
    link: Arc<Link>,
    taker: Taker,
    pub(super) pods: Vec<WorkloadUid>,
    pub(super) inherited: Inherited,
    begun: Instant,
}

/// Waits until the node is this daemon's: because nobody has it, or as an heir. `prepare` is done while the predecessor still does everything.
///
/// # Errors
/// The lock cannot be used, or there is no room for what comes with the node.
pub(super) async fn arrive(
    socket: &Path,
    node: &str,
    readiness: &Readiness,
    prepare: impl AsyncFn() -> anyhow::Result<()>,
) -> anyhow::Result<(Tenure, Option<Heir>)> {
    let mut why = "another daemon has this node".to_owned();
    let (mut told, mut again, mut wait) = (String::new(), Instant::now(), AGAIN);
    loop {
        if again <= Instant::now() {
            match ask(socket, node, &prepare).await {
                Ok(None) => {}
                Ok(Some((tenure, heir))) => return Ok((tenure, Some(heir))),
                Err(error) if matches!(error.downcast_ref(), Some(LinkError::NoRoom)) => return Err(error),
                Err(error) => {
                    why = format!("the node's daemon has not handed over: {error:#}");
                    again = Instant::now() + wait;
                    wait = (wait * 2).min(LONGEST_AGAIN);
                }
            }
        }
        if let Some(tenure) = Tenure::take(socket)? {
            return Ok((tenure, None));
        }
        if why != told {
            info!(why, "waiting for the node");
            readiness.pending(Condition::Node.name(), why.clone());
            told.clone_from(&why);
        }
        sleep(POLL).await;
    }
}

/// Asks the owner for the node, and takes it. `None` if nobody is there to ask.
///
/// # Errors
/// The owner keeps it.
pub(super) async fn ask(
    socket: &Path,
    node: &str,
    prepare: &impl AsyncFn() -> anyhow::Result<()>,
) -> anyhow::Result<Option<(Tenure, Heir)>> {
    let Some(link) = Link::open(socket)? else {
        return Ok(None);
    };
    let mut taker = Taker::Greeted;
    let hello = FromSuccessor::Hello {
        version: OURS,
        node: node.to_owned(),
    };
    link.say(&hello, &[], WORD).await?;
    // It may be in the middle of another conversation.
    match hear(&link, &mut taker, TAKING).await?.0 {
        Heard::Welcome => {}
        Heard::Refused(why) => {
            // One of another node does not listen.
            let _ = link.say(&FromSuccessor::Leave, &[], WORD).await;
            bail!("it is asked to leave, for it cannot hand over to this one: {why}");
        }
        Heard::Taken | Heard::Pod(_) | Heard::Goodbye | Heard::Revoked(_) => bail!("it speaks out of turn"),
    }
    tokio::select! {
        prepared = prepare() => prepared?,
        said = link.hear::<FromPredecessor>(PREPARING) => bail!("it speaks out of turn: {:?}", said?.0),
    }
    link.say(&FromSuccessor::Take, &[], WORD).await?;
    taker.asked();
    let (heard, descriptors) = hear(&link, &mut taker, TAKING).await?;
    if let Heard::Revoked(why) = heard {
        bail!("it goes on: {why}");
    }
    // The predecessor waits from here on.
    let begun = Instant::now();
    let lock = descriptors.into_iter().next().context("it gave nothing")?;
    let link = Arc::new(link);
    let tenure = Tenure::given(lock, Some(Arc::clone(&link)));
    let mut heir = Heir {
        link,
        taker,
        pods: Vec::new(),
        inherited: Inherited::default(),
        begun,
    };
    while let Taker::Receiving(_) = heir.taker {
        let (heard, descriptors) = hear(&heir.link, &mut heir.taker, WORD).await?;
        match heard {
            Heard::Pod(given) => heir.receive(given, descriptors),
            Heard::Revoked(why) => bail!("it goes on: {why}"),
            Heard::Welcome | Heard::Refused(_) | Heard::Taken | Heard::Goodbye => bail!("it speaks out of turn"),
        }
    }
    info!(pods = heir.pods.len(), took = ?heir.begun.elapsed(), "the listeners of the node's daemon are taken over");
    Ok(Some((tenure, heir)))
}

async fn hear(link: &Link, taker: &mut Taker, within: Duration) -> anyhow::Result<(Heard, Vec<std::os::fd::OwnedFd>)> {
    let (said, descriptors) = link.hear::<FromPredecessor>(within).await?;
    Ok((taker.hear(said, descriptors.len())?, descriptors))
}

/// Certificates for the pods to come: without them the node is better off with the daemon that has them. What the CA refuses
/// by name holds nobody up, unless it refuses all.
///
/// # Errors
/// The CA gives none, or does not say.
pub(super) async fn fetch(certs: &CertStore, identities: &BTreeSet<SpiffeId>) -> anyhow::Result<()> {
    certs.want(identities.clone());
    let fetched = futures::future::join_all(identities.iter().map(|id| certs.get(id))).await;
    let mut is_any = false;
    let mut refused = None;
    for outcome in fetched {
        match outcome {
            Ok(_) => is_any = true,
            Err(error) if error.is_refusal() => {
                warn!(
                    error = &error as &dyn std::error::Error,
                    "a pod is taken over without its certificate"
                );
                refused = Some(error);
            }
            Err(error) => return Err(error.into()),
        }
    }
    refused.filter(|_| !is_any).map_or(Ok(()), |error| Err(error.into()))
}

impl Heir {
    fn receive(&mut self, given: Given, descriptors: Vec<std::os::fd::OwnedFd>) {
        let sockets = given.roles.iter().copied().zip(descriptors);
        match PodListeners::inherit(given.namespace, sockets) {
            Ok(listeners) => self.inherited.put(given.namespace, listeners),
            // It gets listeners of its own.
            Err(error) => {
                warn!(workload = %given.workload, error = &error as &dyn std::error::Error, "what was given for a pod is of no use");
            }
        }
        self.pods.push(given.workload);
    }

    fn is_known_to(&self, snapshot: &MeshSnapshot) -> bool {
        self.pods.iter().all(|pod| snapshot.workloads.contains_key(pod))
    }

    /// To the daemon before this one.
    pub(super) fn predecessor(&self) -> Arc<Link> {
        Arc::clone(&self.link)
    }

    /// How long is left until this daemon has to serve.
    pub(super) fn left(&self) -> Duration {
        SERVING.saturating_sub(self.begun.elapsed())
    }

    /// Every pod is served: the node is ours when this returns.
    ///
    /// # Errors
    /// The predecessor has it still.
    pub(super) async fn served(mut self) -> anyhow::Result<()> {
        // One that has changed its mind has said so before it closed, and that can still be read.
        let _ = self.link.say(&FromSuccessor::Served, &[], WORD).await;
        let mut heard = self.link.hear::<FromPredecessor>(GOODBYE).await;
        if matches!(heard, Err(LinkError::Closed)) {
            heard = self.link.hear::<FromPredecessor>(GOODBYE).await;
        }
        let said = match heard {
            Ok((said, descriptors)) => self.taker.hear(said, descriptors.len())?,
            Err(LinkError::Closed) => {
                warn!("the daemon before this one ended in the middle of its hand-over");
                return Ok(());
            }
            Err(error) => return Err(error).context("whether the daemon before this one has let go is not known"),
        };
        match said {
            Heard::Goodbye => {
                info!(pods = self.pods.len(), took = ?self.begun.elapsed(), "this daemon serves the node's pods now");
                Ok(())
            }
            Heard::Revoked(why) => bail!("the daemon before this one goes on: {why}"),
            Heard::Welcome | Heard::Refused(_) | Heard::Taken | Heard::Pod(_) => bail!("it speaks out of turn"),
        }
    }
}

/// Begins to do for the node what one daemon at a time does, once the node is certain to be this daemon's.
///
/// # Errors
/// Its pods are not served in time, or the CNI plugin cannot be answered, and the daemon before this one goes on; or that one
/// has the node still.
pub(super) async fn begin(heir: Option<Heir>, pods: &Pods, duties: Option<&Duties>) -> anyhow::Result<()> {
    if let Some(heir) = &heir
        && timeout(heir.left(), pods.settled()).await.is_err()
    {
        bail!("the node's pods are not served in time: the daemon before this one goes on");
    }
    // As long as the one before can go on if this fails.
    let bound = duties.map(Duties::bind).transpose()?;
    if let Some(heir) = heir {
        heir.served().await?;
    }
    if let (Some(duties), Some(socket)) = (duties, bound) {
        duties.start(socket);
    }
    Ok(())
}

/// Waits until our picture of the cluster has the pods that we were given, and whatever else the node is known to have.
pub(super) async fn catch_up(
    heir: Option<&Heir>,
    snapshots: &mut Snapshots,
    is_up_to_date: impl Fn(&MeshSnapshot) -> bool,
) {
    let knows = |snapshot: &MeshSnapshot| heir.is_none_or(|heir| heir.is_known_to(snapshot)) && is_up_to_date(snapshot);
    if timeout(LAG, snapshots.wait_for(|snapshot| knows(snapshot)))
        .await
        .is_err()
    {
        // One that has ended stays unknown.
        debug!("not every pod of the node is known");
    }
}
