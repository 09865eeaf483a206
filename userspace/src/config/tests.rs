//! Command lines, right and wrong.

use super::*;
use clap::CommandFactory;
use rstest::rstest;
use std::{fs, path::Path};
use tempfile::TempDir;

/// A directory with the files that a good command line names.
fn files() -> TempDir {
    let dir = TempDir::new().unwrap();
    fs::create_dir(dir.path().join("manifests")).unwrap();
    for name in ["root", "token", "tokens"] {
        fs::write(dir.path().join(name), "x").unwrap();
    }
    dir
}

fn node(dir: &TempDir, more: &[&str]) -> Result<NodeConfig, clap::Error> {
    let path = |name: &str| dir.path().join(name).display().to_string();
    let mut line = vec!["warren".to_owned(), "node".into(), "--node-name=a".into()];
    line.push(format!("--manifests={}", path("manifests")));
    line.push(format!("--ca-root={}", path("root")));
    line.push(format!("--ca-token={}", path("token")));
    line.push("--ca-address=https://10.77.0.1:15012".into());
    line.extend(more.iter().map(|s| s.replace("DIR", &dir.path().display().to_string())));
    match CommandLine::try_parse_from(line)?.command {
        Command::Node(config) => Ok(*config),
        other => panic!("not a node: {other:?}"),
    }
}

fn controller(dir: &TempDir, more: &[&str]) -> Result<ControllerConfig, clap::Error> {
    let path = |name: &str| dir.path().join(name).display().to_string();
    let mut line = vec!["warren".to_owned(), "controller".into()];
    line.push(format!("--manifests={}", path("manifests")));
    line.push(format!("--ca-dir={}", path("ca")));
    line.push(format!("--ca-tokens={}", path("tokens")));
    line.extend(more.iter().map(|s| s.replace("DIR", &dir.path().display().to_string())));
    match CommandLine::try_parse_from(line)?.command {
        Command::Controller(config) => Ok(*config),
        other => panic!("not a controller: {other:?}"),
    }
}

#[test]
fn the_command_line_is_sound() {
    CommandLine::command().debug_assert();
}

#[test]
fn every_flag_of_a_role_has_a_variable() {
    for role in ["node", "controller"] {
        let command = CommandLine::command();
        let role = command.find_subcommand(role).unwrap();
        for argument in role
            .get_arguments()
            .filter(|a| !["help", "version"].contains(&a.get_id().as_str()))
        {
            let name = argument.get_id().as_str().to_uppercase();
            assert_eq!(argument.get_env().unwrap().to_str().unwrap(), format!("WARREN_{name}"));
        }
    }
}

#[test]
fn a_node_needs_few_words() {
    let dir = files();
    let config = node(&dir, &[]).unwrap();
    config.check().unwrap();
    assert_eq!(config.mesh.trust_domain.as_str(), "cluster.local");
    assert_eq!(config.mesh.root_namespace, "istio-system");
    assert_eq!(config.mesh.cluster_name, "Kubernetes");
    assert_eq!(config.kernel.pin_dir, Path::new("/sys/fs/bpf/warren"));
    assert_eq!(config.kernel.max_workloads, 65_536);
    assert_eq!(config.svid_lifetime, Duration::from_secs(86_400));
    assert_eq!(config.run.drain_deadline, Duration::from_secs(30));
    assert_eq!(
        (
            config.ports.admin_port,
            config.ports.metrics_port,
            config.ports.readiness_port
        ),
        (15000, 15020, 15021)
    );
    assert_eq!(config.hbone.hbone_ping, Duration::from_secs(10));
    assert_eq!(config.hbone.hbone_dead_after, Duration::from_secs(20));
    assert_eq!(config.hbone.hbone_idle, Duration::from_secs(300));
    assert_eq!(config.ca_address.to_string(), "https://10.77.0.1:15012");
}

#[test]
fn a_controller_needs_few_words() {
    let dir = files();
    let config = controller(&dir, &[]).unwrap();
    config.check().unwrap();
    assert_eq!(config.listen, "[::]:15012".parse().unwrap());
}

#[test]
fn flags_that_repeat_gather() {
    let dir = files();
    let config = node(
        &dir,
        &[
            "--cluster-range=10.244.0.0/16",
            "--cluster-range=10.96.0.0/12,fd00::/48",
            "--trust-domain-alias=old.local",
            "--trust-domain-alias=older.local",
            "--hbone-ping=16ms",
            "--hbone-dead-after=33ms",
            "--hbone-idle=500ms",
            "--tc=netlink",
            "--log-format=json",
            "--log-level=debug,h2=off",
            "--admin-port=0",
            "--metrics-port=0",
            "--readiness-port=0",
        ],
    )
    .unwrap();
    config.check().unwrap();
    assert_eq!(config.cluster_range.len(), 3);
    assert_eq!(config.mesh.trust_domain_alias.len(), 2);
    assert_eq!(config.kernel.tc, Tc::Netlink);
    assert_eq!(config.run.log_filter(), "debug,h2=off");
}

#[rstest]
#[case("--svid-lifetime=soon", "a time is a number with ms, s, m, h or d")]
#[case("--svid-lifetime=24", "a time is a number with ms, s, m, h or d")]
#[case("--svid-lifetime=", "a time is a number with ms, s, m, h or d")]
#[case("--svid-lifetime=999999999999999999999s", "too long")]
#[case("--svid-lifetime=99999d", "too long")]
#[case("--cluster-range=10.244.0.0", "a range is an address and a length")]
#[case("--cluster-range=10.244.1.0/16", "10.244.0.0/16 is meant?")]
#[case("--cluster-range=0.0.0.0/0", "all addresses")]
#[case("--ca-address=http://10.77.0.1:15012", "must begin with https://")]
#[case("--ca-address=10.77.0.1:15012", "must begin with https://")]
#[case("--ca-address=https://me@host", "without user, path or query")]
#[case("--ca-address=https://host/path", "without user, path or query")]
#[case("--ca-address=https://host:0", "https://HOST:PORT")]
#[case("--ca-address=https://host:99999", "https://HOST:PORT")]
#[case("--trust-domain=Cluster.local", "'C'")]
#[case("--trust-domain-alias=a/b", "'/'")]
#[case("--node-name=Node", "a node name is")]
#[case("--node-name=", "a node name is")]
#[case("--max-workloads=0", "from 1 to 16777216")]
#[case("--max-connections-per-pod=-1", "from 1 to 16777216")]
#[case("--workers=0", "0 is not in 1..=1024")]
#[case("--admin-port=70000", "70000 is not in 0..=65535")]
#[case("--admin-address=localhost", "invalid IP address")]
#[case("--tc=ebpf", "possible values: auto, netlink")]
#[case("--log-format=xml", "possible values: text, json")]
#[case("--log-level=loud", "use error, warn, info")]
#[case("--log-level=warren=loud", "use error, warn, info")]
fn a_wrong_value_is_refused_with_what_is_right(#[case] flag: &str, #[case] why: &str) {
    let error = node_without_defaults(flag).unwrap_err().to_string();
    let name = flag.split('=').next().unwrap();
    assert!(error.contains(why) && error.contains(name), "{error}");
}

/// A node with one flag, which must not meet the same flag of the good line.
fn node_without_defaults(flag: &str) -> Result<CommandLine, clap::Error> {
    let name = flag.split('=').next().unwrap();
    let good = ["--node-name=a", "--ca-address=https://x", "--ca-root=r", "--ca-token=t"];
    let kept = good.iter().filter(|g| g.split('=').next() != Some(name));
    CommandLine::try_parse_from(["warren", "node"].iter().chain(kept).chain([&flag]))
}

#[rstest]
#[case(&["--ca-root=DIR/no"], "--ca-root: DIR/no is not there; it holds the root")]
#[case(&["--ca-root=DIR"], "--ca-root: DIR is not a file")]
#[case(&["--ca-token=DIR/no"], "--ca-token: DIR/no is not there; it holds the token of this node")]
#[case(&["--manifests=DIR/no"], "--manifests: DIR/no is not there; create it")]
#[case(&["--manifests=DIR/root"], "--manifests: DIR/root is not a directory")]
#[case(&["--cgroup=DIR/no"], "--cgroup: DIR/no is not there")]
#[case(&["--svid-lifetime=9s"], "--svid-lifetime (9s) must be at least 10s")]
#[case(&["--hbone-ping=20s"], "--hbone-ping (20s) must be shorter than --hbone-dead-after (20s)")]
#[case(&["--hbone-ping=0"], "--hbone-ping (0) must be at least 1ms")]
#[case(&["--hbone-idle=0"], "--hbone-idle (0) must be at least 1ms")]
#[case(&["--admin-port=15020"], "--metrics-port and --admin-port are both 15020")]
#[case(&["--readiness-port=15000"], "--readiness-port and --admin-port are both 15000")]
#[case(&["--trust-domain-alias=cluster.local"], "--trust-domain-alias cluster.local is the trust domain itself")]
#[case(&["--root-namespace=Istio_System"], "--root-namespace is not a Kubernetes namespace")]
fn what_cannot_work_together_is_refused_before_the_start(#[case] flags: &[&str], #[case] why: &str) {
    let dir = files();
    let overridden: Vec<&str> = flags.to_vec();
    let name = overridden[0].split('=').next().unwrap();
    let path = |text: &str| text.replace("DIR", &dir.path().display().to_string());
    let good = [
        "--node-name=a",
        "--ca-address=https://x",
        "--ca-root=DIR/root",
        "--ca-token=DIR/token",
        "--manifests=DIR/manifests",
    ];
    let kept = good.iter().filter(|g| g.split('=').next() != Some(name));
    let line = ["warren", "node"]
        .iter()
        .chain(kept)
        .chain(&overridden)
        .map(|s| path(s));
    let Command::Node(config) = CommandLine::try_parse_from(line).unwrap().command else {
        panic!("not a node")
    };
    let error = config.check().unwrap_err().to_string();
    assert!(error.starts_with(&path(why)), "{error}");
}

#[rstest]
#[case(&["--listen=[::]:15021"], "--readiness-port and --listen are both 15021")]
#[case(&["--namespace=Warren"], "--namespace is not a Kubernetes namespace")]
#[case(&["--max-svid-lifetime=1s"], "--max-svid-lifetime (1s) must be at least 10s")]
fn a_controller_that_cannot_work_is_refused(#[case] flags: &[&str], #[case] why: &str) {
    let error = controller(&files(), flags).unwrap().check().unwrap_err().to_string();
    assert!(error.starts_with(why), "{error}");
}

#[test]
fn a_controller_without_an_api_server_needs_a_directory_and_tokens() {
    let dir = files();
    let manifests = format!("--manifests={}", dir.path().join("manifests").display());
    for (given, missing) in [
        ("--ca-dir=/tmp/x".to_owned(), "--manifests needs --ca-tokens"),
        (
            format!("--ca-tokens={}", dir.path().join("tokens").display()),
            "--manifests needs --ca-dir",
        ),
    ] {
        let line = ["warren", "controller", &manifests, &given];
        let Command::Controller(config) = CommandLine::try_parse_from(line).unwrap().command else {
            panic!("not a controller")
        };
        let error = config.check().unwrap_err().to_string();
        assert!(error.starts_with(missing), "{error}");
    }
    fs::write(dir.path().join("kubeconfig"), "x").unwrap();
    let kubeconfig = format!("--kubeconfig={}", dir.path().join("kubeconfig").display());
    let Command::Controller(config) = CommandLine::try_parse_from(["warren", "controller", &kubeconfig])
        .unwrap()
        .command
    else {
        panic!("not a controller")
    };
    config.check().unwrap();
    assert_eq!(config.node_account.to_string(), "warren-system/warren-node");
}

#[test]
fn a_san_is_a_name_or_an_address() {
    let dir = files();
    let config = controller(
        &dir,
        &["--san=warren-controller.istio-system.svc", "--san=10.77.0.1,fd77::1"],
    )
    .unwrap();
    assert_eq!(config.san.len(), 3);
    for wrong in ["--san=a b", "--san=https://x", "--san=*.x", "--san=10.0.0.1:80"] {
        let error = controller(&dir, &[wrong]).unwrap_err().to_string();
        assert!(error.contains("neither a DNS name nor an IP address"), "{error}");
    }
}

#[rstest]
#[case("0", 0)]
#[case("250ms", 250)]
#[case("30s", 30_000)]
#[case("1h30m", 5_400_000)]
#[case("2d", 172_800_000)]
fn a_time_is_read_and_shown(#[case] text: &str, #[case] milliseconds: u64) {
    let read = duration(text).unwrap();
    assert_eq!(read, Duration::from_millis(milliseconds));
    assert_eq!(duration(&values::shown(read).to_string()).unwrap(), read);
}
