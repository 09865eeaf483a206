//! One node's daemon: started, replaced, killed, and asked what it says about itself.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::{ADMIN_PORT, METRICS_PORT, READY_PORT};
use crate::process::Process;
use crate::topology::Place;
use crate::wait::{http_get, wait_until, wait_until_ok};

/// One node's `warren node`, running or not.
#[derive(Debug)]
pub struct Daemon {
    place: Place,
    process: Option<Process>,
    /// How many daemons were replaced here. In the tests they share the node's namespace, so each needs ports of its own.
    generation: u16,
    /// How many successors were started: each has a log of its own.
    successors: u16,
    warren: PathBuf,
    args: Vec<String>,
    env: Vec<(String, String)>,
}

impl Daemon {
    /// Not started yet.
    pub(super) fn new(place: Place, warren: PathBuf, args: Vec<String>, env: Vec<(String, String)>) -> Self {
        Self {
            place,
            process: None,
            generation: 0,
            successors: 0,
            warren,
            args,
            env,
        }
    }

    /// Starts it, and does not wait until it is ready.
    pub fn start(&mut self) -> Result<&mut Process> {
        let mut command = self.place.command(&self.warren).args(&self.args);
        if self.generation > 0 {
            let ports = [
                ("admin", ADMIN_PORT),
                ("metrics", METRICS_PORT),
                ("readiness", READY_PORT),
            ];
            let port = |(name, port)| format!("--{name}-port={}", self.port(port));
            command = command
                .args(ports.map(port))
                .named(format!("{}-warren-{}", self.place.name, self.successors));
        }
        for (key, value) in &self.env {
            command = command.env(key, value);
        }
        Ok(self.process.insert(command.spawn()?))
    }

    /// Starts a successor and waits until it is ready: the daemon is that one from then on. Gives back the one before, which
    /// runs on.
    pub fn replace(&mut self, deadline: Duration) -> Result<Process> {
        let before = self.process.take().context("there is no daemon to replace")?;
        self.generation += 1;
        self.successors += 1;
        self.restart(deadline)?;
        Ok(before)
    }

    /// The daemon is the one before it again. Gives back the successor, which runs on.
    pub fn put_back(&mut self, before: Process) -> Result<Process> {
        self.generation -= 1;
        self.process.replace(before).context("there is no successor")
    }

    /// Starts a successor and does not wait; it is given back. The daemon stays the one that it is.
    pub fn start_successor(&mut self) -> Result<Process> {
        let before = self.process.take();
        self.generation += 1;
        self.successors += 1;
        let started = self.start().map(drop);
        let successor = std::mem::replace(&mut self.process, before);
        self.generation -= 1;
        started?;
        successor.context("no successor")
    }

    fn port(&self, port: u16) -> u16 {
        port + 100 * (self.generation % 8)
    }

    /// The process. Panics when the daemon was never started.
    #[track_caller]
    pub fn process(&mut self) -> &mut Process {
        match &mut self.process {
            Some(process) => process,
            None => panic!("the daemon of {} was never started", self.place.name),
        }
    }

    /// `kill -9`: programs and pins stay.
    pub fn kill(&mut self) -> Result<()> {
        self.process().kill()
    }

    /// Starts it again after [`Daemon::kill`] or [`Process::stop`], and waits until it is ready.
    pub fn restart(&mut self, deadline: Duration) -> Result<()> {
        self.start()?;
        self.wait_ready(deadline)
    }

    /// It lives on after this process.
    pub(super) fn detach(&mut self) {
        self.process.iter_mut().for_each(Process::detach);
    }

    /// Waits for `/healthz/ready` to answer 200.
    pub fn wait_ready(&mut self, deadline: Duration) -> Result<()> {
        let what = format!("the daemon of {} is ready", self.place.name);
        wait_until_ok(&what, deadline, || {
            let process = self.process();
            ensure!(process.is_running(), "it ended: {}", process.log());
            let (status, body) = self.get(READY_PORT, "/healthz/ready")?;
            ensure!(status == 200, "not ready: {status} {body}");
            Ok(())
        })
        .with_context(|| format!("its log: {}", self.log()))
    }

    /// Starts it and says how long it took from the spawn until readiness answered 200.
    pub fn start_timed(&mut self, deadline: Duration) -> Result<Duration> {
        let begin = Instant::now();
        self.start()?;
        let address = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), self.port(READY_PORT));
        // One thread in the namespace that asks every millisecond: entering it anew each time would be measured as well.
        let took = self.place.namespace.run(|| {
            while begin.elapsed() < deadline {
                if matches!(http_get(address, "/healthz/ready"), Ok((200, _))) {
                    return Ok(Some(begin.elapsed()));
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(None)
        })?;
        took.with_context(|| format!("the daemon of {} is not ready: {}", self.place.name, self.log()))
    }

    pub fn log(&self) -> String {
        self.process.as_ref().map(Process::log).unwrap_or_default()
    }

    /// Waits until a line of the log contains `text`, and gives back that line.
    pub fn wait_for_line(&self, text: &str, deadline: Duration) -> Result<String> {
        match &self.process {
            Some(process) => process.wait_for_line(text, deadline),
            None => bail!("the daemon of {} was never started", self.place.name),
        }
    }

    /// `GET` from the daemon, asked inside its node's namespace.
    pub fn get(&self, port: u16, path: &str) -> Result<(u16, String)> {
        let address = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), self.port(port));
        self.place.namespace.run(|| http_get(address, path))
    }

    /// The metrics as Prometheus reads them.
    pub fn metrics(&self) -> Result<String> {
        let (status, body) = self.get(METRICS_PORT, "/metrics")?;
        ensure!(status == 200, "metrics: {status} {body}");
        Ok(body)
    }

    /// The sum of a metric's series whose labels contain each of `labels` (`reporter="source"`); 0 where there is none.
    pub fn metric(&self, name: &str, labels: &[&str]) -> Result<f64> {
        Ok(sum_series(&self.metrics()?, name, labels))
    }

    /// Waits until [`Daemon::metric`] is at least `value`.
    pub fn wait_for_metric(&self, name: &str, labels: &[&str], value: f64, deadline: Duration) -> Result<()> {
        let what = format!("{name}{labels:?} is {value} on {}", self.place.name);
        wait_until(&what, deadline, || {
            self.metric(name, labels).ok().filter(|now| *now >= value)
        })
        .map(drop)
    }

    pub fn config_dump(&self) -> Result<serde_json::Value> {
        let (status, body) = self.get(ADMIN_PORT, "/config_dump")?;
        ensure!(status == 200, "config_dump: {status} {body}");
        serde_json::from_str(&body).context("parse the config dump")
    }
}

fn sum_series(text: &str, name: &str, labels: &[&str]) -> f64 {
    text.lines()
        .filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            let (series, value) = match rest.strip_prefix('{') {
                Some(labelled) => labelled.rsplit_once("} ")?,
                None => ("", rest.strip_prefix(' ')?),
            };
            labels
                .iter()
                .all(|label| series.contains(label))
                .then(|| value.split(' ').next()?.parse::<f64>().ok())?
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_are_summed_by_name_and_labels() {
        let text =
            "# HELP a b\na_total{x=\"1\",y=\"2\"} 3\na_total{x=\"2\",y=\"2\"} 4\na_total_more{x=\"1\"} 9\nplain 5\n";
        assert_eq!(sum_series(text, "a_total", &["y=\"2\""]), 7.0);
        assert_eq!(sum_series(text, "a_total", &["x=\"1\"", "y=\"2\""]), 3.0);
        assert_eq!(sum_series(text, "plain", &[]), 5.0);
        assert_eq!(sum_series(text, "absent", &[]), 0.0);
    }
}
