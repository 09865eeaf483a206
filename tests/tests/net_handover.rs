//! Daemons are replaced under load: the next one takes the listeners over, and no new connection fails.

use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use socket2::{Domain, SockAddr, Socket, Type};
use warren_tests::load::Traffic;
use warren_tests::mesh::binary;
use warren_tests::wait::wait_until_ok;
use warren_tests::{Conversation, DEADLINE, Mesh, Node, PodSpec, Process, World};

const PORT: u16 = 7001;
/// New connections a second: with time to spare for daemons without optimisation, two of which carry each connection.
const RATE: f64 = 250.0;
const DRAIN: Duration = Duration::from_secs(2);
/// What a daemon says when it has let go, and when it goes on after all.
const LET_GO: &str = "another daemon serves this node's pods now";
const GOES_ON: &str = "capture goes on";
const TAKES_BACK: &str = "this one takes it back";
const IS_GIVEN_BACK: &str = "this daemon serves the node's pods now";
/// Of the maps in the kernel.
const LAYOUT: u32 = 1;

struct Scene {
    world: World,
    mesh: Mesh,
    _server: Process,
    to: SocketAddr,
}

impl Scene {
    fn start(prefix: &str) -> Result<Self> {
        let world = World::builder(prefix)
            .pod(PodSpec::new("client", Node::A))
            .pod(PodSpec::new("server", Node::B))
            .start()?;
        let mesh = Mesh::builder()
            .handover()
            .node_arg(format!("--drain-deadline={}s", DRAIN.as_secs()))
            .start(&world)?;
        let listen = format!("--listen=[::]:{PORT}");
        let server = world
            .pod("server")
            .command(binary("load")?)
            .args(["serve", &listen])
            .spawn()?;
        server.wait_for_line("listening", DEADLINE)?;
        let to = SocketAddr::new(world.pod("server").ip(false), PORT);
        Ok(Self {
            world,
            mesh,
            _server: server,
            to,
        })
    }

    /// New connections at a steady rate, in the background.
    fn traffic(&self) -> Result<Traffic> {
        let command = self.world.pod("client").command(binary("load")?);
        Traffic::start(command, self.to.ip(), &[PORT], 256, RATE)
    }

    /// Waits until the node's daemon has so many pods, all of them captured.
    fn until_captured(&self, node: Node, count: usize) -> Result<()> {
        wait_until_ok("every pod is captured", DEADLINE, || {
            let dump = self.mesh.daemon(node).config_dump()?;
            let pods = dump["capturedPods"].as_array().context("no pods")?.clone();
            let captured = |pod: &serde_json::Value| pod["state"] == "captured";
            ensure!(pods.len() == count && pods.iter().all(captured), "{pods:?}");
            Ok(())
        })
    }

    /// A successor has the node, and a pod that the daemon before it never had: that daemon, and the pod's name.
    fn succeeded(&mut self, node: Node, round: usize) -> Result<(Process, String)> {
        let before = self.mesh.daemon_mut(node).replace(DEADLINE)?;
        before.wait_for_line(LET_GO, DEADLINE)?;
        let newcomer = format!("newcomer-{}{round}", node.letter());
        self.world.add_pods(vec![PodSpec::new(&newcomer, node)])?;
        self.until_captured(node, 1 + round)?;
        Ok((before, newcomer))
    }

    /// Every daemon has a successor, and ends.
    fn update(&mut self) -> Result<()> {
        for node in Node::BOTH {
            let mut before = self.mesh.daemon_mut(node).replace(DEADLINE)?;
            let status = before.stop(DRAIN + DEADLINE)?;
            ensure!(status.success(), "it ended with {status}: {}", before.log());
        }
        Ok(())
    }

    fn socket(&self, node: Node) -> PathBuf {
        let name = format!("handover-{}.sock", node.letter());
        self.mesh.ca_directory().with_file_name(name)
    }
}

/// Somebody who speaks as a successor does.
struct Stranger(Socket);

impl Stranger {
    fn meet(at: &Path) -> Result<Self> {
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
        socket.set_read_timeout(Some(DEADLINE))?;
        socket.connect(&SockAddr::unix(at)?)?;
        Ok(Self(socket))
    }

    fn say(&self, word: &str) -> Result<()> {
        self.0.send(word.as_bytes())?;
        Ok(())
    }

    /// The next word, which must be this one.
    fn hear(&self, word: &str) -> Result<String> {
        let mut said = [0; 4096];
        let length = (&self.0).read(&mut said)?;
        let said = String::from_utf8_lossy(&said[..length]).into_owned();
        ensure!(
            said.contains(&format!("\"say\":\"{word}\"")),
            "it said {said:?}, not {word}"
        );
        Ok(said)
    }
}

/// No connection of the traffic may have failed, and there must have been some all the time.
fn without_a_failure(traffic: Traffic, begun: Instant) -> Result<()> {
    let lasted = begun.elapsed();
    let connects = traffic.end()?;
    eprintln!("{connects:?} in {lasted:?}");
    ensure!(connects.errors == 0, "{connects:?}");
    let expected = lasted.as_secs_f64() * RATE;
    ensure!(
        connects.rate.operations as f64 > 0.2 * expected,
        "too few: {connects:?}"
    );
    Ok(())
}

/// The connection still carries: a frame of which so many bytes were sent comes back whole.
fn echoes(long: &mut Conversation, sent: usize) -> Result<()> {
    let mut frame = [b'E'; 1024];
    frame[1023] = b'\n';
    long.send(&frame[sent..])?;
    wait_until_ok("the long connection echoes", DEADLINE, || {
        ensure!(long.received().len() == 1024, "{} bytes", long.received().len());
        Ok(())
    })
}

fn took(daemon: &Process) -> String {
    let log = daemon.log();
    let line = log.lines().find(|line| line.contains(LET_GO)).unwrap_or_default();
    line.to_owned()
}

#[test]
fn daemons_are_replaced_again_and_again_and_no_new_connection_fails() -> Result<()> {
    let mut scene = Scene::start("wt-replaced")?;
    let mut long = Conversation::open(scene.world.pod("client"), scene.to, DEADLINE)?;
    long.send(b"E")?;
    let traffic = scene.traffic()?;
    let begun = Instant::now();
    let mut before = Vec::new();
    for _ in 0..3 {
        for node in Node::BOTH {
            let daemon = scene.mesh.daemon_mut(node).replace(DEADLINE)?;
            daemon.wait_for_line(LET_GO, DEADLINE)?;
            eprintln!("{}", took(&daemon));
            before.push(daemon);
        }
    }
    eprintln!("6 hand-overs in {:?}", begun.elapsed());
    // All six are there still, and so is what they carry.
    echoes(&mut long, 1)?;
    // Those that come last serve, and tell it.
    for node in Node::BOTH {
        let daemon = scene.mesh.daemon(node);
        daemon.wait_for_line("connection complete", DEADLINE)?;
    }
    // Their end takes what is old with it, and nothing else.
    for daemon in &mut before {
        let status = daemon.stop(DRAIN + DEADLINE)?;
        ensure!(status.success(), "it ended with {status}: {}", daemon.log());
    }
    long.wait_for_end(DEADLINE)?;
    without_a_failure(traffic, begun)
}

#[test]
fn a_successor_that_dies_before_it_serves_leaves_everything_as_it_was() -> Result<()> {
    let mut scene = Scene::start("wt-successor")?;
    let traffic = scene.traffic()?;
    let begun = Instant::now();
    for round in 1..=2 {
        for node in Node::BOTH {
            let name = scene.world.node(node).name.clone();
            let successor = Stranger::meet(&scene.socket(node))?;
            successor.say(&format!(
                r#"{{"say":"hello","version":{{"protocol":1,"layout":{LAYOUT}}},"node":"{name}"}}"#
            ))?;
            successor.hear("welcome")?;
            successor.say(r#"{"say":"take"}"#)?;
            successor.hear("taken")?;
            successor.hear("pod")?;
            // It dies, and what it was given is closed with it.
            drop(successor);
            let daemon = scene.mesh.daemon(node);
            wait_until_ok("the daemon goes on", DEADLINE, || {
                let times = daemon.log().matches(GOES_ON).count();
                ensure!(times == round, "{times} times");
                Ok(())
            })?;
        }
    }
    // Nothing that a daemon does has stopped: it captures, serves, and hands over to one that lives.
    scene.world.add_pods(vec![PodSpec::new("newcomer", Node::A)])?;
    scene.until_captured(Node::A, 2)?;
    let mut long = Conversation::open(scene.world.pod("newcomer"), scene.to, DEADLINE)?;
    long.send(b"E")?;
    for node in Node::BOTH {
        let before = scene.mesh.daemon_mut(node).replace(DEADLINE)?;
        before.wait_for_line(LET_GO, DEADLINE)?;
    }
    without_a_failure(traffic, begun)
}

#[test]
fn a_successor_that_dies_while_the_daemon_before_it_is_there_gives_the_node_back() -> Result<()> {
    let mut scene = Scene::start("wt-back")?;
    let mut long = Conversation::open(scene.world.pod("client"), scene.to, DEADLINE)?;
    long.send(b"E")?;
    for round in 1..=2 {
        for node in Node::BOTH {
            let (before, newcomer) = scene.succeeded(node, round)?;
            scene.mesh.daemon_mut(node).put_back(before)?.kill()?;
            let begun = Instant::now();
            scene.until_captured(node, 1 + round)?;
            eprintln!("taken back in {:?}", begun.elapsed());
            let log = scene.mesh.daemon(node).log();
            ensure!(log.matches(TAKES_BACK).count() == round, "{log}");
            Conversation::open(scene.world.pod(&newcomer), scene.to, DEADLINE)?;
            Conversation::open(scene.world.pod("client"), scene.to, DEADLINE)?;
        }
    }
    echoes(&mut long, 1)?;
    let (traffic, begun) = (scene.traffic()?, Instant::now());
    scene.update()?;
    without_a_failure(traffic, begun)
}

#[test]
fn an_update_that_is_undone_gives_the_node_back_and_no_new_connection_fails() -> Result<()> {
    let mut scene = Scene::start("wt-undone")?;
    let mut long = Conversation::open(scene.world.pod("client"), scene.to, DEADLINE)?;
    long.send(b"E")?;
    let (traffic, begun) = (scene.traffic()?, Instant::now());
    for round in 1..=2 {
        for node in Node::BOTH {
            let (before, newcomer) = scene.succeeded(node, round)?;
            let mut successor = scene.mesh.daemon_mut(node).put_back(before)?;
            let status = successor.stop(DRAIN + DEADLINE)?;
            ensure!(status.success(), "it ended with {status}: {}", successor.log());
            let log = scene.mesh.daemon(node).log();
            ensure!(log.matches(IS_GIVEN_BACK).count() == round, "{log}");
            eprintln!("{}", took(&successor));
            scene.until_captured(node, 1 + round)?;
            Conversation::open(scene.world.pod(&newcomer), scene.to, DEADLINE)?;
        }
    }
    echoes(&mut long, 1)?;
    scene.update()?;
    without_a_failure(traffic, begun)
}

#[test]
fn a_successor_that_gets_no_certificates_leaves_the_node_to_the_daemon_that_has_them() -> Result<()> {
    let mut scene = Scene::start("wt-certless")?;
    let (traffic, begun) = (scene.traffic()?, Instant::now());
    scene.mesh.controller().signal(Signal::SIGSTOP)?;
    let successor = scene.mesh.daemon_mut(Node::A).start_successor()?;
    successor.wait_for_line("has not handed over: ", DEADLINE)?;
    let daemon = scene.mesh.daemon(Node::A);
    ensure!(!daemon.log().contains(LET_GO), "it has let go: {}", daemon.log());
    scene.mesh.controller().signal(Signal::SIGCONT)?;
    scene.mesh.daemon(Node::A).wait_for_line(LET_GO, DEADLINE)?;
    without_a_failure(traffic, begun)
}

#[test]
fn a_daemon_that_another_version_asks_to_leave_lets_go_of_the_node_and_stays_with_what_is_open() -> Result<()> {
    let mut scene = Scene::start("wt-version")?;
    let mut long = Conversation::open(scene.world.pod("client"), scene.to, DEADLINE)?;
    let stranger = Stranger::meet(&scene.socket(Node::A))?;
    stranger.say(r#"{"say":"hello","version":{"protocol":99,"layout":1},"node":"x"}"#)?;
    let said = stranger.hear("refused")?;
    ensure!(said.contains("version 99"), "it said {said}");
    ensure!(scene.mesh.daemon_mut(Node::A).process().is_running(), "it ended");
    stranger.say(r#"{"say":"leave"}"#)?;
    // Whoever waits for the node has it now, and is not sent away in its turn.
    let mut before = scene.mesh.daemon_mut(Node::A).replace(DEADLINE)?;
    Conversation::open(scene.world.pod("client"), scene.to, DEADLINE)?;
    ensure!(
        Stranger::meet(&scene.socket(Node::A)).is_ok(),
        "the next one has no door"
    );
    ensure!(before.is_running(), "it ended: {}", before.log());
    echoes(&mut long, 0)?;
    let status = before.stop(DRAIN + DEADLINE)?;
    ensure!(status.success(), "it ended with {status}");
    Ok(())
}

#[test]
fn a_daemon_that_is_told_to_end_while_it_hands_over_leaves_the_node_to_its_successor() -> Result<()> {
    let mut scene = Scene::start("wt-told")?;
    let name = scene.world.node(Node::A).name.clone();
    let successor = Stranger::meet(&scene.socket(Node::A))?;
    successor.say(&format!(
        r#"{{"say":"hello","version":{{"protocol":1,"layout":{LAYOUT}}},"node":"{name}"}}"#
    ))?;
    successor.hear("welcome")?;
    successor.say(r#"{"say":"take"}"#)?;
    successor.hear("taken")?;
    // Silent from here.
    let daemon = scene.mesh.daemon_mut(Node::A);
    let status = daemon.process().stop(DRAIN + 2 * DEADLINE)?;
    ensure!(status.success(), "it ended with {status}");
    ensure!(!daemon.log().contains(GOES_ON), "it captures what another has");
    Ok(())
}
