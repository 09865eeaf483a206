//! A daemon that has given its node away and is still there: it goes on with the connections that are open, and has the node
//! again if its successor ends first, by itself or because an update is undone.

use super::{
    capturing::Resting,
    handover::OURS,
    succession::{self, Heir},
};
use crate::handover::{FromSuccessor, Giver, Link, LinkError, Reaction, Tenure};
use std::{future::pending, path::Path, time::Duration};
use tokio::time::sleep;
use tracing::{debug, warn};

/// How often it looks whether anybody owns the node.
const LOOK: Duration = Duration::from_millis(200);
/// How often nobody may, where whoever is to come may not be there yet.
const NOBODY: u32 = 50;
/// How long one wait for a word is.
const WORD: Duration = Duration::from_secs(3600);

/// The node is another daemon's.
pub(super) struct Absence {
    pub(super) resting: Resting,
    /// With the daemon that has the node. One that cannot speak with this one has none.
    talk: Option<(Link, Giver)>,
    /// How often nobody may still be seen to own the node.
    patience: u32,
}

impl Absence {
    pub(super) fn new(resting: Resting, talk: Option<(Link, Giver)>) -> Self {
        let is_owned = matches!(talk, Some((_, Giver::Given)));
        Self {
            resting,
            talk,
            patience: if is_owned { 0 } else { NOBODY },
        }
    }

    /// Returns when the node is this daemon's again: because nobody has it any more, or as an heir.
    pub(super) async fn ends(&mut self, socket: &Path, node: &str) -> (Tenure, Option<Heir>) {
        loop {
            tokio::select! {
                tenure = until_nobody_owns(socket, &mut self.patience) => {
                    warn!("the daemon that was to have this node is not there: this one takes it back");
                    return (tenure, None);
                }
                () = until_it_ends(&mut self.talk, node) => {}
            }
            // The certificates are at hand.
            match succession::ask(socket, node, &async || Ok(())).await {
                Ok(Some((tenure, heir))) => return (tenure, Some(heir)),
                Ok(None) => debug!("the daemon that has this node ends, and has shut its door"),
                Err(error) => warn!(error = format!("{error:#}"), "this node is not given back"),
            }
        }
    }
}

/// Returns, once, when the daemon at the other end says that it is told to end.
async fn until_it_ends(talk: &mut Option<(Link, Giver)>, node: &str) {
    while let Some((link, giver)) = talk {
        let is_ending = match link.hear::<FromSuccessor>(WORD).await {
            Ok((said, _)) => giver.hear(&said, OURS, node) == Ok(Reaction::Return),
            Err(LinkError::Silent(_)) => continue,
            Err(_) => false,
        };
        if is_ending {
            return;
        }
        *talk = None;
    }
    pending().await
}

/// The tenure of a node that its owner has lost, or that nobody has come for.
async fn until_nobody_owns(socket: &Path, patience: &mut u32) -> Tenure {
    loop {
        sleep(LOOK).await;
        match Tenure::take(socket) {
            Ok(Some(tenure)) if *patience == 0 => return tenure,
            Ok(Some(_)) => *patience -= 1,
            Ok(None) => *patience = 0,
            Err(error) => debug!(
                error = &error as &dyn std::error::Error,
                "whether anybody owns the node is not known"
            ),
        }
    }
}
