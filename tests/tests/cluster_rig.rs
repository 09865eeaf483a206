//! What the tests and the benchmark bring up for themselves goes when they do.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use warren_tests::cluster::{PATIENCE, cluster};
use warren_tests::{DEADLINE, wait::wait_until_ok, wait_until};

/// Of the rig's namespaces and cgroups.
const PREFIX: &str = "wtal";

/// `program` for a rig of the test's own, whose state is in `run`.
fn beside(program: &str, run: &Path) -> Command {
    let mut command = Command::new(program);
    command.env("P", PREFIX).env("RUN", run).stdin(Stdio::null());
    command
}

/// The rig's script; `None` (said aloud) where the cluster is somebody else's.
fn script() -> Result<Option<String>> {
    match cluster().rig() {
        Some(_) => std::env::var("WARREN_RIG").map(Some).context("WARREN_RIG is not set"),
        None => Ok(None),
    }
}

#[test]
fn the_api_server_that_the_benchmark_fills_goes_down_at_ctrl_c() -> Result<()> {
    let Some(rig) = script()? else { return Ok(()) };
    let root = std::env::var("WARREN_ROOT").context("WARREN_ROOT is not set")?;
    let folder = tempfile::tempdir()?;
    let run = folder.path().join("rig");
    let begun = folder.path().join("begun");
    // Whoever runs the tests in the background may have left the signal ignored.
    let mut running = beside("env", &run)
        .args(["--default-signal=INT", &rig])
        .args(["alone", &format!("{root}/deploy/manifests/warren-crds.yaml")])
        .args([
            "sh",
            "-c",
            // Told once kubectl has ended: a shell may take its orderly end at Ctrl-C for its own going on.
            &format!(
                "kubectl get crds >{0}.part; mv {0}.part {0}; exec sleep 1000",
                begun.display()
            ),
        ])
        .process_group(0)
        .spawn()?;
    let namespace = Path::new("/run/netns").join(format!("{PREFIX}cp"));
    let has_begun = wait_until_ok("the program runs beside an API server", PATIENCE, || {
        let seen = std::fs::read_to_string(&begun)?;
        ensure!(seen.contains("security.istio.io"), "{seen:?}");
        ensure!(namespace.exists(), "it is not in {}", namespace.display());
        Ok(())
    });
    // As a terminal does it: to all of the group.
    killpg(Pid::from_raw(running.id().cast_signed()), Signal::SIGINT)?;
    let ended = wait_until("it ends", PATIENCE, || running.try_wait().ok().flatten());
    if ended.is_err() {
        running.kill()?;
        let _down = beside(&rig, &run).arg("down").status();
    }
    let status = ended?;
    has_begun?;
    ensure!(status.code() == Some(130), "it ended with {status}");
    ensure!(!namespace.exists() && !run.exists(), "something is left");
    Ok(())
}

#[test]
fn what_programs_in_pods_have_said_goes_with_their_namespace() -> Result<()> {
    let namespace = cluster().namespace("logs", "")?;
    let folder = namespace.log_directory("a-pod")?;
    ensure!(folder.is_dir());
    drop(namespace);
    ensure!(!folder.exists(), "{} is left", folder.display());
    Ok(())
}

#[test]
fn nodes_are_not_begun_on_a_disk_that_is_nearly_full() -> Result<()> {
    let Some(rig) = script()? else { return Ok(()) };
    let folder = tempfile::tempdir()?;
    let told = beside("unshare", &folder.path().join("rig"))
        .args([
            "--mount",
            "sh",
            "-c",
            r#"mount -t tmpfs -o size=64m small "$1" && exec "$2" up 1"#,
            "sh",
        ])
        .args([folder.path().as_os_str(), rig.as_ref()])
        .output()?;
    let said = String::from_utf8_lossy(&told.stderr);
    ensure!(!told.status.success(), "a cluster was begun there: {said}");
    ensure!(said.contains("need 2048 MB there, and 64 MB are free"), "{said}");
    let namespace = Path::new("/run/netns").join(format!("{PREFIX}cp"));
    ensure!(!namespace.exists(), "{} is there", namespace.display());
    Ok(())
}

#[test]
fn a_rig_goes_down_with_what_a_killed_test_has_left_in_its_pods() -> Result<()> {
    let Some(rig) = script()? else { return Ok(()) };
    let folder = tempfile::tempdir()?;
    let node = Path::new("/sys/fs/cgroup/unified").join(format!("{PREFIX}n1"));
    std::fs::create_dir_all(node.join("kubepods/pod"))?;
    let mut left = Command::new("sleep").arg("1000").spawn()?;
    std::fs::write(node.join("kubepods/pod/cgroup.procs"), left.id().to_string())?;
    let told = beside(&rig, &folder.path().join("rig")).arg("down").output()?;
    let killed = wait_until("it is killed", DEADLINE, || left.try_wait().ok().flatten());
    if killed.is_err() {
        left.kill()?;
        left.wait()?;
    }
    ensure!(told.status.success(), "{}", String::from_utf8_lossy(&told.stderr));
    killed?;
    ensure!(!node.exists(), "{} is there", node.display());
    Ok(())
}
