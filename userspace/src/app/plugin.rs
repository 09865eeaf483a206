//! The CNI plugin as a program: variables and standard input in, standard output and exit status out.

use crate::{
    cni::{
        plugin::{self, World},
        server::ANSWER,
        spec::{CniError, Command, Config, Invocation},
        standing::{KUBECONFIG, Namespaces, Standing},
        wire::{LONGEST, PodName, Reply, Request},
    },
    kubernetes::{asking, client},
};
use serde_json::Value;
use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

/// How long the API server may take when there is no daemon.
const API: Duration = Duration::from_millis(1500);
/// The daemon answers by itself before that.
const SILENCE: Duration = ANSWER.saturating_add(Duration::from_secs(5));
/// The longest network configuration that is read.
const CONFIGURATION: u64 = 1 << 20;

/// Carries out what the container runtime asks.
pub fn run_plugin() -> ExitCode {
    let mut text = String::new();
    let read = io::stdin().take(CONFIGURATION).read_to_string(&mut text);
    let outcome = match read {
        Ok(_) => call(&text),
        Err(error) => Err(CniError::NotJson { why: error.to_string() }),
    };
    match outcome {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(result)) => print(&result, ExitCode::SUCCESS),
        Err(error) => {
            let version = serde_json::from_str::<Value>(&text).unwrap_or_default()["cniVersion"].clone();
            print(&error.to_json(version.as_str().unwrap_or("1.0.0")), ExitCode::FAILURE)
        }
    }
}

fn call(text: &str) -> Result<Option<Value>, CniError> {
    let invocation = Invocation::read(|name| std::env::var(name).ok())?;
    if invocation.command == Command::Version {
        return Ok(Some(crate::cni::spec::versions()));
    }
    let config = Config::read(text)?;
    let mut node = OnNode {
        socket: config.socket.clone(),
        state: config.state.clone(),
        begun: Instant::now(),
    };
    plugin::run(&invocation, &config, &mut node)
}

fn print(result: &Value, code: ExitCode) -> ExitCode {
    match writeln!(io::stdout(), "{result}") {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}

struct OnNode {
    socket: PathBuf,
    state: PathBuf,
    begun: Instant,
}

impl World for OnNode {
    fn daemon(&mut self, request: &Request) -> Option<Reply> {
        ask(&self.socket, request).ok()
    }

    fn standing(&mut self, pod: &PodName) -> Standing {
        by_api(&self.state, pod).unwrap_or_else(|| match Namespaces::read(&self.state) {
            Ok(namespaces) => namespaces.standing(&pod.namespace),
            Err(error) => Standing::Unknown(format!("it has left no word about the namespaces ({error})")),
        })
    }

    fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    fn sleep(&mut self, time: Duration) {
        std::thread::sleep(time);
    }
}

fn ask(socket: &Path, request: &Request) -> io::Result<Reply> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut answer = String::new();
    BufReader::new(stream).take(LONGEST as u64).read_line(&mut answer)?;
    Ok(serde_json::from_str(&answer)?)
}

/// `None` if the API server does not say.
fn by_api(state: &Path, pod: &PodName) -> Option<Standing> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .ok()?;
    let asked = runtime.block_on(async {
        let asked = async {
            let client = client::connect(Some(&state.join(KUBECONFIG))).await.ok()?;
            asking::about(&client, &pod.namespace, &pod.name, &pod.uid).await.ok()
        };
        tokio::time::timeout(API, asked).await.ok()?
    });
    runtime.shutdown_background();
    match asked? {
        asking::Asked::Known { enrolment, .. } if enrolment.is_wanted() => Some(Standing::Mesh),
        asking::Asked::Known { .. } => Some(Standing::Outside),
        asking::Asked::Unknown => Some(Standing::Unknown("the API server does not know the pod".to_owned())),
    }
}
