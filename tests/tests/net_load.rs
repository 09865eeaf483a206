//! The load tool and the floor, on which the benchmark's figures rest: do they carry what they say they carry?

use std::net::SocketAddr;
use std::process::Command;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use warren_tests::load::{Report, Traffic};
use warren_tests::{Conversation, DEADLINE, End, Node, PodSpec, Process, World, wait_until};

const PORT: u16 = 7001;

struct Scene {
    _server: Process,
    world: World,
}

impl Scene {
    fn new(prefix: &str) -> Result<Self> {
        let world = World::builder(prefix)
            .pod(PodSpec::new("client", Node::A))
            .pod(PodSpec::new("server", Node::B))
            .start()?;
        let listen = format!("--listen=[::]:{PORT}");
        let server = world
            .pod("server")
            .command(env!("CARGO_BIN_EXE_load"))
            .args(["serve", &listen])
            .spawn()?;
        server.wait_for_line("listening", DEADLINE)?;
        Ok(Self { _server: server, world })
    }

    fn server(&self) -> SocketAddr {
        SocketAddr::new(self.world.pod("server").v6.into(), PORT)
    }

    fn load(&self, mode: &str, args: &[&str]) -> Result<Report> {
        let command = self.world.pod("client").command(env!("CARGO_BIN_EXE_load"));
        let text = command
            .args([mode, &format!("--to={}", self.server())])
            .args(args)
            .output(DEADLINE)?;
        serde_json::from_str(&text).context(text)
    }

    /// How many TCP sockets of a pod `ss` finds by this filter.
    fn sockets(&self, pod: &str, filter: &[&str]) -> Result<usize> {
        let output = self
            .world
            .pod(pod)
            .namespace
            .run(|| Ok(Command::new("ss").arg("-Htn").args(filter).output()?))?;
        Ok(String::from_utf8_lossy(&output.stdout).lines().count())
    }
}

#[test]
fn bulk_counts_what_arrived_in_both_directions() -> Result<()> {
    let scene = Scene::new("wt-bulk")?;
    for direction in [None, Some("--reverse")] {
        let args: Vec<&str> = ["--seconds=2", "--streams=4"].into_iter().chain(direction).collect();
        let report = scene.load("bulk", &args)?;
        let Report::Bulk {
            bytes,
            seconds,
            gbit_per_s,
        } = report
        else {
            panic!("{report:?}")
        };
        assert!(bytes > 1_000_000 && seconds >= 1.99, "{bytes} {seconds}");
        assert!((gbit_per_s - bytes as f64 * 8e-9 / seconds).abs() < 1e-6);
    }
    Ok(())
}

#[test]
fn requests_are_answered_on_every_connection_and_timed() -> Result<()> {
    let report = Scene::new("wt-request")?.load("request", &["--seconds=2", "--connections=8"])?;
    let Report::Request(rate) = report else {
        panic!("{report:?}")
    };
    assert!(rate.operations > 8, "{rate:?}");
    let latency = rate.latency;
    assert!(
        0.0 < latency.p50_us && latency.p50_us <= latency.p99_us && latency.p99_us <= latency.p999_us,
        "{rate:?}"
    );
    Ok(())
}

#[test]
fn connects_are_counted_and_a_wrong_client_address_is_noticed() -> Result<()> {
    let scene = Scene::new("wt-connect")?;
    let own = format!("--expect={}", scene.world.pod("client").v6);
    for (expect, wrong) in [(own.as_str(), 0), ("--expect=fd77::9:9", 200)] {
        let report = scene.load("connect", &["--count=200", "--workers=3", expect])?;
        let Report::Connect(rate) = report else {
            panic!("{report:?}")
        };
        assert_eq!(
            (rate.rate.operations, rate.errors, rate.wrong_address),
            (200, 0, wrong),
            "{rate:?}"
        );
    }
    Ok(())
}

#[test]
fn connects_keep_to_a_rate() -> Result<()> {
    let scene = Scene::new("wt-rate")?;
    let report = scene.load("connect", &["--rate=200", "--seconds=2", "--workers=16"])?;
    let Report::Connect(rate) = report else {
        panic!("{report:?}")
    };
    assert_eq!(rate.errors, 0);
    // Whatever is late is made up for, and nothing comes before its time.
    assert_eq!(rate.rate.operations, 400, "{rate:?}");
    assert!(rate.rate.seconds >= 1.99, "{rate:?}");
    Ok(())
}

#[test]
fn connects_go_on_until_the_tool_is_told_to_end() -> Result<()> {
    let scene = Scene::new("wt-told")?;
    let command = scene.world.pod("client").command(env!("CARGO_BIN_EXE_load"));
    let traffic = Traffic::start(command, scene.server().ip(), &[PORT], 16, 200.0)?;
    // By the client's ports, which rest a minute: longer than this tool is willing to go on without having been told.
    wait_until("more than three seconds' worth were made", DEADLINE, || {
        let made = scene.sockets("client", &["state", "time-wait", "dport", "=", &format!(":{PORT}")]);
        (made.ok()? > 700).then_some(())
    })?;
    let rate = traffic.end()?;
    assert!(rate.rate.operations > 700 && rate.errors == 0, "{rate:?}");
    Ok(())
}

#[test]
fn a_refused_connection_is_an_error_of_the_report_not_of_the_tool() -> Result<()> {
    let scene = Scene::new("wt-refused")?;
    let command = scene.world.pod("client").command(env!("CARGO_BIN_EXE_load"));
    let to = format!(
        "--to={}",
        SocketAddr::new(scene.world.pod("server").v4.into(), PORT + 1)
    );
    let text = command.args(["connect", &to, "--count=5"]).output(DEADLINE)?;
    let Report::Connect(rate) = serde_json::from_str(&text)? else {
        panic!("{text}")
    };
    assert_eq!((rate.rate.operations, rate.errors), (0, 5));
    assert!(
        rate.first_error
            .as_deref()
            .is_some_and(|error| error.contains("refused")),
        "{rate:?}"
    );
    Ok(())
}

#[test]
fn held_connections_are_open_until_the_tool_is_told_to_end() -> Result<()> {
    let scene = Scene::new("wt-hold")?;
    let mut held = scene
        .world
        .pod("client")
        .command(env!("CARGO_BIN_EXE_load"))
        .args(["hold", &format!("--to={}", scene.server()), "--connections=50"])
        .with_pipes()
        .spawn()?;
    assert!(held.read_line(DEADLINE)?.contains("\"connections\":50"));
    let established = || scene.sockets("server", &["state", "established", "sport", "=", &format!(":{PORT}")]);
    wait_until("the server has taken them all", DEADLINE, || {
        (established().ok()? == 50).then_some(())
    })?;
    drop(held.take_pipes());
    assert!(held.wait(DEADLINE)?.success());
    wait_until("the connections are gone", DEADLINE, || {
        (established().ok()? == 0).then_some(())
    })
}

#[test]
fn a_conversation_knows_its_addresses_and_how_it_ended() -> Result<()> {
    let scene = Scene::new("wt-talk")?;
    let client = scene.world.pod("client");
    let mut talk = Conversation::open(client, scene.server(), DEADLINE)?;
    assert_eq!((talk.local.ip(), talk.peer), (client.v6.into(), scene.server()));
    let mut frame = [b'.'; 1024];
    frame[0] = b'A';
    talk.send(&frame)?;
    talk.expect(format!("{}\n", talk.local).as_bytes(), DEADLINE)?;
    talk.half_close();
    assert_eq!(talk.wait_for_end(DEADLINE)?, End::Closed);
    let refused =
        Conversation::open(client, SocketAddr::new(scene.server().ip(), 9), DEADLINE).expect_err("no listener");
    assert!(format!("{refused:#}").contains("ConnectionRefused"), "{refused:#}");
    Ok(())
}

#[test]
fn the_benchmark_writes_its_figures_and_clears_its_world() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let out = directory.path().join("figures.json");
    let status = Command::new(env!("CARGO_BIN_EXE_bench"))
        .args(["--prefix=wt-figures", "--without-mesh", "--rounds=2", "--seconds=0.2"])
        .args(["--only=throughput-8,request-1,connect-32,request-beside-bulk", "--out"])
        .arg(&out)
        .output()?;
    assert!(status.status.success(), "{}", String::from_utf8_lossy(&status.stderr));
    let figures: serde_json::Value = serde_json::from_slice(&std::fs::read(&out)?)?;
    let rows = figures["rows"].as_array().context("rows")?;
    assert_eq!(rows.len(), 8);
    for row in rows {
        for lane in ["plain", "floor"] {
            assert!(
                row[lane]["min"].as_f64() > Some(0.0) && row[lane]["median"].as_f64() > Some(0.0),
                "{row}"
            );
        }
        let beside = row["name"] == "request-beside-bulk";
        assert_eq!(
            row["floor"]["beside_other_pod_us"].as_f64() > Some(0.0),
            beside,
            "{row}"
        );
        assert_eq!(row["floor_ratio"].as_f64() > Some(0.0), !beside, "{row}");
        assert!(row["mesh"].is_null() && row["ratio"].is_null());
    }
    assert!(!std::path::Path::new("/run/netns/wt-figures-a").exists());
    Ok(())
}

#[test]
fn ctrl_c_clears_the_world() -> Result<()> {
    let mut bench = Command::new(env!("CARGO_BIN_EXE_bench"))
        .args([
            "--prefix=wt-ctrlc",
            "--without-mesh",
            "--rounds=100",
            "--only=request-1",
        ])
        .stderr(std::process::Stdio::null())
        .spawn()?;
    let pid = Pid::from_raw(bench.id().cast_signed());
    let namespace = std::path::Path::new("/run/netns/wt-ctrlc-a");
    wait_until("the world is being built", DEADLINE, || {
        namespace.exists().then_some(())
    })?;
    kill(pid, Signal::SIGINT)?;
    let status = wait_until("it ends", DEADLINE, || bench.try_wait().ok().flatten())?;
    assert_eq!(status.code(), Some(130));
    let left: Vec<_> = std::fs::read_dir("/run/netns")?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("wt-ctrlc"))
        .collect();
    assert_eq!(left, Vec::<String>::new());
    Ok(())
}
