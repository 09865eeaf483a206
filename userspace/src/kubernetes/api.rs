//! The API server as a source: one list and watch per kind, all feeding one index. What it takes care of: that nothing is
//! published before everything has been listed, and that what vanished while nobody looked goes.

mod kinds;
mod object;
#[cfg(test)]
mod tests;
mod told;
mod watching;

pub(super) use kinds::kind_at;

use super::{
    index::{Index, IndexSettings, NodeSandboxes, Sandbox},
    objects::Kind,
    publish::{Published, Publisher},
};
use crate::shutdown::Shutdown;
use kube::Client;
use std::{iter, time::Duration};
use tokio::{sync::mpsc, time::Instant};
use told::Told;
use watching::News;

/// News that wait for the index; the watches wait behind them.
const NEWS: usize = 256;
/// News come in flocks: this much quiet ends one, and no flock lasts longer than `FLOCK`.
const QUIET: Duration = Duration::from_millis(5);
const FLOCK: Duration = Duration::from_millis(50);

/// What a watch has to tell, and about which kind.
type Letter = (Kind, News);

/// Lists everything, then publishes, then follows it until the drain begins. Returns at the first publication, which an
/// API server that is away delays for as long as it is; `None` if the drain came first.
///
/// `sandboxes` says what the node knows of its own pods.
pub async fn spawn(
    client: Client,
    settings: IndexSettings,
    sandboxes: NodeSandboxes,
    shutdown: &Shutdown,
) -> Option<Published> {
    let (letters, inbox) = mpsc::channel(NEWS);
    for place in kinds::all() {
        shutdown.spawn_essential(
            "watch",
            watching::watch(client.clone(), place, letters.clone(), shutdown.clone()),
        );
    }
    let (publisher, mut published) = Publisher::new();
    let mut index = Index::new(settings);
    for sandbox in sandboxes.known {
        index.note_sandbox(sandbox);
    }
    let desired = Desired {
        index,
        told: Told::default(),
        publisher,
    };
    shutdown.spawn_essential(
        "desired state",
        follow(desired, inbox, sandboxes.news, shutdown.clone()),
    );
    let draining = shutdown.draining();
    tokio::select! {
        () = draining => None,
        first = published.snapshot.changed() => first.ok().map(|()| published),
    }
}

struct Desired {
    index: Index,
    told: Told,
    publisher: Publisher,
}

impl Desired {
    fn take(&mut self, (kind, news): Letter) {
        self.told.take(kind, news, &mut self.index);
    }

    fn publish(&mut self) {
        if self.told.everything() {
            let reach = self.told.reach();
            self.publisher
                .publish(&mut self.index, |_| None, iter::empty(), false, Some(reach));
        }
    }
}

async fn follow(
    mut desired: Desired,
    mut inbox: mpsc::Receiver<Letter>,
    mut sandboxes: mpsc::Receiver<Sandbox>,
    shutdown: Shutdown,
) {
    let draining = shutdown.draining();
    tokio::pin!(draining);
    loop {
        tokio::select! {
            () = &mut draining => return,
            letter = inbox.recv() => match letter {
                Some(letter) => desired.take(letter),
                None => return,
            },
            // A pod waits for it: at once, and what the watches tell meanwhile next time.
            Some(sandbox) = sandboxes.recv() => {
                desired.index.note_sandbox(sandbox);
                desired.publish();
                continue;
            }
        }
        let end = Instant::now() + FLOCK;
        while Instant::now() < end {
            match tokio::time::timeout(QUIET, inbox.recv()).await {
                Ok(Some(letter)) => desired.take(letter),
                Ok(None) | Err(_) => break,
            }
        }
        desired.publish();
    }
}
