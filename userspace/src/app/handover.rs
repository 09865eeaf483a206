//! The daemon that owns the node, and the moment when it does so no longer: it stops what only one daemon may do, gives its
//! listeners to a successor while it goes on accepting, and lets go when that one serves. If that never comes about it goes
//! on as before.

use super::{capturing::Pauses, duties::Duties, pods::Pods};
use crate::{
    handover::{
        Door, FromPredecessor, FromSuccessor, Giver, Link, LinkError, PodSockets, Reaction, Tenure, VERSION, Version,
    },
    shutdown::Shutdown,
};
use anyhow::Context;
use std::{
    os::fd::AsFd,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};
use warren_common::LAYOUT_VERSION;

pub(super) const OURS: Version = Version {
    protocol: VERSION,
    layout: LAYOUT_VERSION,
};
/// How long the other side may take for a word that it has at hand.
pub(super) const WORD: Duration = Duration::from_secs(5);
/// How long a successor may prepare itself once it is welcome.
const PREPARING: Duration = Duration::from_secs(60);
/// How long what is under way here may take to end.
const STANDING_STILL: Duration = Duration::from_secs(20);
/// How long a successor may take to serve. It gives up by itself before that.
const SERVING: Duration = Duration::from_secs(30);
/// After accepting a successor failed.
const BACK_OFF: Duration = Duration::from_millis(100);
/// How often a daemon that has handed over looks whether anybody owns the node, and for how long nobody may.
const LOOK: Duration = Duration::from_secs(1);
const NOBODY: u32 = 10;
/// How long the end of this daemon waits for a hand-over that is under way.
const HOLD: Duration = Duration::from_secs(10);

/// How this daemon stands to its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    Owner,
    Giving,
    /// Another daemon owns the node. This one ends its connections.
    HandedOver,
}

/// What goes to a successor, and what stops for it.
pub(super) struct Owner {
    pub(super) socket: PathBuf,
    pub(super) node: String,
    pub(super) tenure: Tenure,
    pub(super) pauses: Pauses,
    pub(super) pods: Arc<Pods>,
    pub(super) duties: Option<Arc<Duties>>,
    pub(super) shutdown: Shutdown,
}

/// What the rest of the daemon sees of it.
#[derive(Clone)]
pub(super) struct Standing {
    stage: watch::Receiver<Stage>,
    leave: CancellationToken,
}

impl Standing {
    /// Resolves when a successor that cannot be given the node has asked this daemon to end.
    pub(super) async fn asked_to_leave(&self) {
        self.leave.cancelled().await;
    }

    /// Returns when no hand-over is under way: true if the node is another daemon's.
    pub(super) async fn has_handed_over(&self) -> bool {
        let mut stage = self.stage.clone();
        let settled = stage.wait_for(|stage| *stage != Stage::Giving);
        if timeout(HOLD, settled).await.is_err() {
            warn!("a hand-over does not come to its end");
        }
        *self.stage.borrow() == Stage::HandedOver
    }
}

impl Owner {
    /// Waits for successors, until the drain begins.
    pub(super) fn start(self) -> Standing {
        let (stage, seen) = watch::channel(Stage::Owner);
        let leave = CancellationToken::new();
        let standing = Standing {
            stage: seen,
            leave: leave.clone(),
        };
        let shutdown = self.shutdown.clone();
        shutdown.spawn_essential("hand-over", self.keep(stage, leave));
        standing
    }

    async fn keep(self, stage: watch::Sender<Stage>, leave: CancellationToken) {
        let draining = self.shutdown.draining();
        tokio::pin!(draining);
        let door = match Door::open(&self.socket) {
            Ok(door) => door,
            Err(error) => {
                // A restart then has the gap that the end of any daemon has.
                warn!(
                    error = &error as &dyn std::error::Error,
                    "no successor can be given this node's listeners"
                );
                return draining.await;
            }
        };
        loop {
            let link = tokio::select! {
                () = &mut draining => return,
                link = door.next() => link,
            };
            let outcome = match link {
                Ok(link) => tokio::select! {
                    () = &mut draining => return,
                    outcome = self.converse(&link, &stage, &leave) => outcome,
                },
                Err(error) => Err(error.into()),
            };
            match outcome {
                Ok(()) if *stage.borrow() == Stage::HandedOver => break,
                Ok(()) => {}
                Err(error) => {
                    warn!(error = format!("{error:#}"), "no hand-over: this daemon goes on");
                    sleep(BACK_OFF).await;
                }
            }
        }
        drop(door);
        let Self { socket, tenure, .. } = self;
        drop(tenure);
        tokio::select! {
            () = draining => {}
            () = until_nobody_owns(socket) => {
                error!("the daemon that took this node over is gone, and no other has it: this one ends, to be started anew");
            }
        }
    }

    async fn converse(
        &self,
        link: &Link,
        stage: &watch::Sender<Stage>,
        leave: &CancellationToken,
    ) -> anyhow::Result<()> {
        let mut giver = Giver::Greeting;
        let mut within = WORD;
        loop {
            let (said, descriptors) = link.hear::<FromSuccessor>(within).await?;
            drop(descriptors);
            match giver.hear(&said, OURS, &self.node)? {
                Reaction::Welcome => {
                    debug!("a successor is there");
                    link.say(&FromPredecessor::Welcome, &[], WORD).await?;
                    within = PREPARING;
                }
                Reaction::Refuse(mismatch) => {
                    warn!(why = %mismatch, "a successor cannot be given this node");
                    let why = mismatch.to_string();
                    link.say(&FromPredecessor::Refused { why }, &[], WORD).await?;
                    within = WORD;
                }
                Reaction::Give => {
                    stage.send_replace(Stage::Giving);
                    let given = self.give(link, giver).await;
                    stage.send_replace(if given.is_ok() { Stage::HandedOver } else { Stage::Owner });
                    return given;
                }
                Reaction::Leave => {
                    info!("a successor that cannot be given this node asks this daemon to end");
                    leave.cancel();
                    return Ok(());
                }
                // It is heard while giving.
                Reaction::LetGo => return Ok(()),
            }
        }
    }

    /// On an error everything is as it was.
    async fn give(&self, link: &Link, giver: Giver) -> anyhow::Result<()> {
        let begun = Instant::now();
        if let Some(duties) = &self.duties {
            duties.stop().await;
        }
        let given = match timeout(STANDING_STILL, self.pauses.pause()).await {
            Ok(Some(paused)) => self.pass(link, giver).await.map(|pods| (paused, pods)),
            Ok(None) => Err(anyhow::anyhow!("capture has ended")),
            Err(_) => Err(anyhow::anyhow!("capture does not stand still")),
        };
        match given {
            Ok((paused, pods)) => {
                self.pods.pass_on();
                paused.for_good();
                info!(pods, took = ?begun.elapsed(), "another daemon serves this node's pods now");
                Ok(())
            }
            Err(error) => {
                let why = format!("{error:#}");
                let _ = link.say(&FromPredecessor::Revoked { why }, &[], WORD).await;
                if let Some(duties) = &self.duties {
                    duties.start()?;
                }
                Err(error)
            }
        }
    }

    /// Gives everything away, and returns once the successor is the owner.
    async fn pass(&self, link: &Link, mut giver: Giver) -> anyhow::Result<usize> {
        let pods = self.pods.sockets().context("the listeners cannot be copied")?;
        let taken = FromPredecessor::Taken {
            pods: u32::try_from(pods.len())?,
        };
        link.say(&taken, &[self.tenure.as_fd()], WORD).await?;
        let count = pods.len();
        for (workload, namespace, sockets) in pods {
            let word = FromPredecessor::Pod(PodSockets {
                workload: workload.to_string(),
                namespace,
                roles: sockets.iter().map(|(role, _)| (*role).into()).collect(),
            });
            let descriptors: Vec<_> = sockets.iter().map(|(_, socket)| socket.as_fd()).collect();
            link.say(&word, &descriptors, WORD).await?;
        }
        let said = match link.hear::<FromSuccessor>(SERVING).await {
            Err(LinkError::Closed) => anyhow::bail!("the successor ended before it served"),
            heard => heard?.0,
        };
        match giver.hear(&said, OURS, &self.node)? {
            Reaction::LetGo => link.say(&FromPredecessor::Goodbye, &[], WORD).await?,
            Reaction::Welcome | Reaction::Refuse(_) | Reaction::Give | Reaction::Leave => {
                anyhow::bail!("the successor speaks out of turn");
            }
        }
        Ok(count)
    }
}

async fn until_nobody_owns(socket: PathBuf) {
    let mut times = 0;
    while times < NOBODY {
        sleep(LOOK).await;
        match Tenure::take(&socket) {
            Ok(Some(_)) => times += 1,
            Ok(None) => times = 0,
            Err(error) => debug!(
                error = &error as &dyn std::error::Error,
                "whether anybody owns the node is not known"
            ),
        }
    }
}
