//! The daemon that owns the node, and the moment when it does so no longer: it stops what only one daemon may do, gives its
//! listeners to a successor while it goes on accepting, and lets go when that one serves. If that never comes about it goes
//! on as before; if that one ends while this daemon is still there, the node is this one's again (`absence`).

use super::{
    absence::Absence,
    capturing::{Paused, Pauses, Resting},
    coming::Daemons,
    duties::Duties,
    pods::Pods,
    succession::{Heir, begin},
};
use crate::{
    handover::{
        Door, FromPredecessor, FromSuccessor, Giver, Link, LinkError, PodSockets, Reaction, Tenure, VERSION, Version,
    },
    shutdown::Shutdown,
};
use anyhow::{Context, bail};
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
const SERVING: Duration = Duration::from_secs(40);
/// After accepting a successor failed.
const BACK_OFF: Duration = Duration::from_millis(100);
/// How long the end of this daemon waits for a hand-over that is under way.
const HOLD: Duration = Duration::from_secs(10);
/// How long the daemon before this one may take to come back to the door: no more than is left of what kubelet waits for this
/// one's end.
const COMING_BACK: Duration = Duration::from_secs(2);
/// How long a successor that is not there yet may take to come to the door: a container's start, while other nodes start
/// theirs.
const COMING: Duration = Duration::from_secs(10);

/// How this daemon stands to its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    Owner,
    /// The owner until its end: no successor is given the node any more.
    Closed,
    /// Another daemon owns the node, or may. This one ends its connections.
    LetGo,
}

/// Why the door is shut.
enum Left {
    Closed,
    LetGo(Absence),
}

/// What goes to a successor, and what stops for it.
pub(super) struct Owner {
    pub(super) socket: PathBuf,
    pub(super) node: String,
    /// Who gave the node to this daemon, and may be there still.
    pub(super) predecessor: Option<Arc<Link>>,
    /// Who knows of successors before they are there.
    pub(super) daemons: Option<Daemons>,
    pub(super) pauses: Pauses,
    pub(super) pods: Arc<Pods>,
    pub(super) duties: Option<Arc<Duties>>,
    pub(super) shutdown: Shutdown,
    pub(super) closing: CancellationToken,
}

/// What the rest of the daemon sees of it.
pub(super) struct Standing {
    stage: watch::Receiver<Stage>,
    closing: CancellationToken,
}

impl Standing {
    /// Shuts the door, and returns when no hand-over is under way: true if the node stays this daemon's.
    pub(super) async fn close(&self) -> bool {
        self.closing.cancel();
        let mut stage = self.stage.clone();
        let closed = stage.wait_for(|stage| *stage != Stage::Owner).await;
        closed.is_ok_and(|stage| *stage == Stage::Closed)
    }
}

/// What a successor asks for.
enum Wish {
    Take(Link, Giver),
    /// It cannot be given the node, and takes it over when nobody has it.
    Leave,
}

impl Owner {
    /// Waits for successors, until the door is closed or the node is another's.
    pub(super) fn start(self) -> Standing {
        let (stage, seen) = watch::channel(Stage::Owner);
        let standing = Standing {
            stage: seen,
            closing: self.closing.clone(),
        };
        let shutdown = self.shutdown.clone();
        shutdown.spawn_essential("hand-over", self.keep(stage));
        standing
    }

    async fn keep(self, stage: watch::Sender<Stage>) {
        if let Err(error) = self.keep_while_possible(stage).await {
            error!(error = format!("{error:#}"), "this daemon cannot go on");
        }
    }

    /// # Errors
    /// What stopped for a successor does not start again.
    async fn keep_while_possible(&self, stage: watch::Sender<Stage>) -> anyhow::Result<()> {
        loop {
            let mut absence = match self.own().await? {
                Left::Closed => {
                    stage.send_replace(Stage::Closed);
                    break;
                }
                Left::LetGo(absence) => absence,
            };
            stage.send_replace(Stage::LetGo);
            let (tenure, heir) = tokio::select! {
                () = self.closing.cancelled() => break,
                ends = absence.ends(&self.socket, &self.node) => ends,
            };
            tokio::select! {
                () = self.shutdown.draining() => break,
                back = self.come_back(absence, tenure, heir) => back?,
            }
            stage.send_replace(Stage::Owner);
        }
        self.shutdown.draining().await;
        Ok(())
    }

    /// The node is this daemon's again.
    ///
    /// # Errors
    /// Its pods cannot be served in time, or what has stopped does not start again.
    async fn come_back(&self, absence: Absence, tenure: Tenure, heir: Option<Heir>) -> anyhow::Result<()> {
        if let Some(duties) = &self.duties {
            duties.look_again().await;
        }
        let inherited = heir.as_ref().map(|heir| heir.inherited.clone());
        absence.resting.take_back(tenure, inherited.unwrap_or_default());
        begin(heir, &self.pods, self.duties.as_deref()).await
    }

    fn start_duties(&self) -> anyhow::Result<()> {
        if let Some(duties) = &self.duties {
            duties.start(duties.bind()?);
        }
        Ok(())
    }

    /// Answers those who come to the door until it is shut, and says why it is.
    ///
    /// # Errors
    /// What stopped for a successor does not start again.
    async fn own(&self) -> anyhow::Result<Left> {
        let door = match Door::open(&self.socket) {
            Ok(door) => door,
            Err(error) => {
                // A restart then has the gap that the end of any daemon has.
                warn!(
                    error = &error as &dyn std::error::Error,
                    "no successor can be given this node's listeners"
                );
                self.closing.cancelled().await;
                return Ok(Left::Closed);
            }
        };
        loop {
            let wish = tokio::select! {
                () = self.closing.cancelled() => return self.leave(&door).await,
                wish = self.hear(&door) => wish,
            };
            let let_go = match wish {
                Ok(None) => continue,
                Ok(Some(wish)) => self.let_go(wish).await?,
                Err(error) => Err(error),
            };
            match let_go {
                Ok(absence) => return Ok(Left::LetGo(absence)),
                Err(error) => {
                    warn!(error = format!("{error:#}"), "no hand-over: this daemon goes on");
                    sleep(BACK_OFF).await;
                }
            }
        }
    }

    /// This daemon is told to end: the one before it has the node again, if that is still there; or a successor has it that
    /// is on its way.
    ///
    /// # Errors
    /// What has stopped does not start again.
    async fn leave(&self, door: &Door) -> anyhow::Result<Left> {
        let wish = match self.predecessors_wish(door).await {
            Some(wish) => Some(wish),
            None => self.successors_wish(door).await,
        };
        let Some(wish) = wish else { return Ok(Left::Closed) };
        match self.let_go(wish).await? {
            Ok(absence) => Ok(Left::LetGo(absence)),
            Err(error) => {
                warn!(
                    error = format!("{error:#}"),
                    "this daemon is told to end, and cannot give the node to another"
                );
                Ok(Left::Closed)
            }
        }
    }

    async fn predecessors_wish(&self, door: &Door) -> Option<Wish> {
        let before = self.predecessor.as_ref()?;
        before.say(&FromSuccessor::Ending, &[], WORD).await.ok()?;
        tokio::select! {
            wish = timeout(COMING_BACK, self.hear(door)) => wish.ok()?.ok()?,
            // It says no more here: it has ended.
            _ = before.hear::<FromPredecessor>(COMING_BACK) => None,
        }
    }

    /// Kubernetes ends a daemon without waiting for the next where it takes the node for lost, or the daemon for not ready.
    async fn successors_wish(&self, door: &Door) -> Option<Wish> {
        let daemons = self.daemons.as_ref()?;
        // One that has failed has nothing to wait with.
        if self.shutdown.has_failed() || !daemons.is_one_coming().await {
            return None;
        }
        info!("the next daemon is on its way: this one serves until it is there");
        let heard = async {
            loop {
                match self.hear(door).await {
                    Ok(Some(wish)) => return wish,
                    Ok(None) => {}
                    Err(error) => {
                        debug!(error = format!("{error:#}"), "whoever was at the door");
                        sleep(BACK_OFF).await;
                    }
                }
            }
        };
        timeout(COMING, heard).await.ok()
    }

    /// What the next who comes wants, if that is anything.
    async fn hear(&self, door: &Door) -> anyhow::Result<Option<Wish>> {
        let link = door.next().await?;
        let mut giver = Giver::Greeting;
        let mut within = WORD;
        loop {
            let (said, _) = match link.hear::<FromSuccessor>(within).await {
                // It is not ready, and comes again.
                Err(LinkError::Closed) if giver == Giver::Welcomed => return Ok(None),
                heard => heard?,
            };
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
                    if giver == Giver::Done {
                        return Ok(None);
                    }
                    within = WORD;
                }
                Reaction::Give => return Ok(Some(Wish::Take(link, giver))),
                Reaction::Leave => return Ok(Some(Wish::Leave)),
                // They are heard while giving, and later.
                Reaction::LetGo | Reaction::Return => return Ok(None),
            }
        }
    }

    /// Stops, and lets another daemon go on. On an inner error everything is as it was.
    ///
    /// # Errors
    /// What has stopped does not start again.
    async fn let_go(&self, wish: Wish) -> anyhow::Result<anyhow::Result<Absence>> {
        if let Some(duties) = &self.duties {
            duties.stop().await;
        }
        let mut talk = match wish {
            Wish::Take(link, giver) => Some((link, giver)),
            Wish::Leave => None,
        };
        let outcome = self.stand_down(talk.as_mut()).await;
        let resting = match outcome {
            Ok(resting) => resting,
            Err(error) => {
                if let Some((link, _)) = talk {
                    let why = format!("{error:#}");
                    let _ = link.say(&FromPredecessor::Revoked { why }, &[], WORD).await;
                }
                self.start_duties()?;
                return Ok(Err(error));
            }
        };
        Ok(Ok(Absence::new(resting, talk)))
    }

    async fn stand_down(&self, talk: Option<&mut (Link, Giver)>) -> anyhow::Result<Resting> {
        let begun = Instant::now();
        let mut patience = std::pin::pin!(async {
            self.closing.cancelled().await;
            sleep(HOLD).await;
        });
        let paused = tokio::select! {
            paused = timeout(STANDING_STILL, self.pauses.pause()) => paused,
            () = &mut patience => bail!("this daemon is told to end"),
        };
        let paused = paused
            .context("capture does not stand still")?
            .context("capture has ended")?;
        match talk {
            None => info!("a successor cannot be given this node: this daemon lets go of it"),
            Some((link, giver)) => tokio::select! {
                biased;
                pods = self.pass(link, giver, &paused) => {
                    info!(pods = pods?, took = ?begun.elapsed(), "another daemon serves this node's pods now");
                }
                // It has the tenure, and owns the node when this conversation ends.
                () = patience => warn!("this daemon is told to end, and leaves the node to a successor that does not serve yet"),
            },
        }
        self.pods.pass_on();
        Ok(paused.give_away())
    }

    /// Gives everything away, and returns once the successor is the owner.
    async fn pass(&self, link: &Link, giver: &mut Giver, paused: &Paused) -> anyhow::Result<usize> {
        let tenure = paused.tenure().context("this daemon does not own the node")?;
        let pods = self.pods.sockets().context("the listeners cannot be copied")?;
        let taken = FromPredecessor::Taken {
            pods: u32::try_from(pods.len())?,
        };
        link.say(&taken, &[tenure.as_fd()], WORD).await?;
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
            Err(LinkError::Closed) => bail!("the successor ended before it served"),
            heard => heard?.0,
        };
        match giver.hear(&said, OURS, &self.node)? {
            Reaction::LetGo => link.say(&FromPredecessor::Goodbye, &[], WORD).await?,
            Reaction::Welcome | Reaction::Refuse(_) | Reaction::Give | Reaction::Leave | Reaction::Return => {
                bail!("the successor speaks out of turn");
            }
        }
        Ok(count)
    }
}
