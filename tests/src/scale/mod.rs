//! How one node's daemon bears the size of a cluster: points from a thousand pods upwards on a real API server, whose
//! objects are generated and change all the time. Measures; judges nothing.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

pub mod api;
pub mod change;
pub mod daemon;
pub mod fill;
pub mod objects;
pub mod report;

pub use report::{Point, Report};

use api::{Acknowledged, Api};
use change::Changer;
use daemon::{Daemon, Publication, Site};

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Options {
    pub kubeconfig: PathBuf,
    /// Pods of each point, ever more.
    pub pods: Vec<usize>,
    /// Changes a second.
    pub rate: u32,
    /// How long the cluster is being changed at each point.
    pub time: Duration,
}

/// A daemon that has just started is given so long before anything counts: its pods fail to be captured, and are told of.
const SETTLE: Duration = Duration::from_secs(10);
/// As long again it is measured while nothing happens.
const IDLE: Duration = Duration::from_secs(20);
/// How often the journal is read: it holds the last 256 snapshots.
const READ_JOURNAL: Duration = Duration::from_millis(400);
/// A change that is not published so long after the last one was made never will be.
const LAST: Duration = Duration::from_secs(20);

type Journal = BTreeMap<u64, Publication>;

/// Runs all of it, in the network namespace of the rig's control plane.
pub async fn run(options: &Options) -> Result<Report> {
    ensure!(
        options.pods.is_sorted() && options.pods.iter().all(|pods| *pods > 0 && pods.is_multiple_of(1_000)),
        "points are of ever more pods, in thousands"
    );
    let api = Api::connect(&options.kubeconfig).await?;
    let site = Site::make()?;
    let mut report = Report::default();
    // One for all points: a pod that was replaced keeps its later address.
    let mut changer = Changer::new(api.clone());
    let mut there = 0;
    for pods in options.pods.iter().copied() {
        eprint!("{pods} pods: creating … ");
        fill::grow(&api, there, pods).await.context("fill the cluster")?;
        there = pods;
        eprint!("reading … ");
        let daemon = site.start(&options.kubeconfig)?;
        let point = measure(options, &mut changer, &daemon, pods).await.with_context(|| {
            let log = std::fs::read_to_string(site.log()).unwrap_or_default();
            format!(
                "measure at {pods} pods; the daemon's log ends: {}",
                log.lines().rev().take(5).collect::<Vec<_>>().join("\n")
            )
        })?;
        daemon.stop()?;
        eprintln!("{}", point.line());
        report.points.push(point);
    }
    report.conclude();
    Ok(report)
}

async fn measure(options: &Options, changer: &mut Changer, daemon: &Daemon, pods: usize) -> Result<Point> {
    tokio::time::sleep(SETTLE).await;
    let initial = daemon.spent()?;
    eprint!("idling … ");
    tokio::time::sleep(IDLE).await;
    let idle = daemon.spent()?.since(initial);
    eprint!("changing … ");
    let before = daemon.spent()?;
    let changing = changer.run(pods, options.rate, options.time);
    tokio::pin!(changing);
    let mut journal = daemon.publications()?;
    let changed = loop {
        tokio::select! {
            changed = &mut changing => break changed?,
            () = tokio::time::sleep(READ_JOURNAL) => follow(daemon, &mut journal)?,
        }
    };
    let spent = daemon.spent()?.since(before);
    let latencies = published(daemon, &mut journal, &changed.acknowledged).await?;
    Ok(Point::new(pods, daemon, &changed, &latencies, [initial, idle, spent])?.idle_over(IDLE))
}

fn follow(daemon: &Daemon, journal: &mut Journal) -> Result<()> {
    let news = daemon.publications()?;
    let seen = journal.last_key_value().map(|(number, _)| *number);
    ensure!(
        news.first_key_value()
            .zip(seen)
            .is_none_or(|((first, _), seen)| *first <= seen + 1),
        "the daemon publishes faster than its journal can be read"
    );
    journal.extend(news);
    Ok(())
}

/// How long each change took from its acknowledgement to the first snapshot that has it.
async fn published(daemon: &Daemon, journal: &mut Journal, changes: &[Acknowledged]) -> Result<Vec<Duration>> {
    let deadline = tokio::time::Instant::now() + LAST;
    loop {
        follow(daemon, journal)?;
        let latencies: Vec<Duration> = changes.iter().filter_map(|change| latency(journal, change)).collect();
        if latencies.len() == changes.len() {
            return Ok(latencies);
        }
        if tokio::time::Instant::now() > deadline {
            bail!("{} changes were never published", changes.len() - latencies.len());
        }
        tokio::time::sleep(READ_JOURNAL).await;
    }
}

/// `None` if no snapshot has it. The daemon may be quicker than the answer to whoever made the change: that is no time.
fn latency(journal: &Journal, change: &Acknowledged) -> Option<Duration> {
    let has = |publication: &Publication| {
        publication
            .reach
            .get(change.kind.name())
            .is_some_and(|reach| *reach >= change.version)
    };
    let publications: Vec<&Publication> = journal.values().collect();
    // What has it once has it ever after.
    let first = publications.partition_point(|publication| !has(publication));
    let publication = publications.get(first)?;
    Some(publication.at.duration_since(change.at).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use api::Kind;
    use std::time::UNIX_EPOCH;

    #[test]
    fn a_change_took_until_the_first_snapshot_that_has_it() {
        let at = |millis| UNIX_EPOCH + Duration::from_millis(millis);
        let journal: Journal = [(1, 100, 5), (2, 200, 8), (3, 300, 9)]
            .into_iter()
            .map(|(number, time, version)| {
                let reach = BTreeMap::from([("Pod".to_owned(), version), ("Service".to_owned(), 99)]);
                (number, Publication { at: at(time), reach })
            })
            .collect();
        let change = |version, time| Acknowledged {
            kind: Kind::Pod,
            version,
            at: at(time),
        };
        let took = |version, time| latency(&journal, &change(version, time)).map(|took| took.as_millis());
        assert_eq!(took(6, 150), Some(50));
        assert_eq!(took(9, 250), Some(50));
        assert_eq!(took(8, 201), Some(0), "published before the acknowledgement arrived");
        assert_eq!(took(10, 250), None);
    }
}
