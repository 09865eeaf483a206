//! `cargo xtask test`: which tests belong to which level, how each level is run, and the totals.

use std::fmt;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};

use crate::cluster::{self, Choice, Cluster};
use crate::{ebpf, programs, run, setup, tree};

/// What a test needs from the machine. The name of an integration test's file says it: `kernel_….rs`, `net_….rs`,
/// `cluster_….rs`; everything else is pure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Pure,
    Kernel,
    Net,
    Cluster,
}

/// The tests that are run by KUBECONFIG as well.
const BY_KUBECONFIG: [&str; 3] = [
    "traffic_between_nodes_is_hbone",
    "a_service_is_reached_by_name",
    "a_client_of_the_mesh_is_answered_under_strict",
];

/// What a person may say to the tests, which sudo would keep from them.
const FROM_PERSON: [&str; 3] = ["WARREN_CHURN_SECONDS", "WARREN_KEEP_LOGS", "WARREN_REPLACEMENT_RATE"];

/// How the names of files begin whose tests need Istio's own control plane.
const BESIDE_ISTIOD: &str = "cluster_istio";

const LEVELS: [Level; 4] = [Level::Pure, Level::Kernel, Level::Net, Level::Cluster];

impl fmt::Display for Level {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Level::Pure => "pure",
            Level::Kernel => "kernel",
            Level::Net => "net",
            Level::Cluster => "cluster",
        })
    }
}

impl Level {
    fn named(name: &str) -> Result<Self> {
        match LEVELS.into_iter().find(|level| level.to_string() == name) {
            Some(level) => Ok(level),
            None => bail!("there is no level {name:?}; the levels are pure, kernel, net and cluster"),
        }
    }

    fn of_file(stem: &str) -> Self {
        match stem.split_once('_') {
            Some(("kernel", _)) => Level::Kernel,
            Some(("net", _)) => Level::Net,
            Some(("cluster", _)) => Level::Cluster,
            Some(_) | None => Level::Pure,
        }
    }

    fn needs_root(self) -> bool {
        self != Level::Pure
    }
}

/// What the runners' own `test result:` lines add up to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Totals {
    passed: u64,
    failed: u64,
    ignored: u64,
}

impl Totals {
    fn add(&mut self, other: Totals) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
    }

    /// The same, with a failure where fewer tests ran than were asked for by name: one that was renamed is not run.
    fn with_at_least(mut self, wanted: u64) -> Self {
        let ran = self.passed + self.failed;
        if ran < wanted {
            run::say(&format!(
                "{wanted} tests were to run, and only {ran} did: was one renamed?"
            ));
            self.failed += 1;
        }
        self
    }

    /// Reads a line such as `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; …`.
    fn of_line(line: &str) -> Option<Self> {
        let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
        let mut totals = Totals::default();
        for count in counts.split("; ") {
            let mut words = count.split(' ');
            let (Some(number), Some(what)) = (words.next(), words.next()) else {
                continue;
            };
            match what {
                "passed" => totals.passed = number.parse().ok()?,
                "failed" => totals.failed = number.parse().ok()?,
                "ignored" => totals.ignored = number.parse().ok()?,
                _ => {}
            }
        }
        Some(totals)
    }
}

/// What is asked for.
#[derive(Debug, Default, PartialEq, Eq)]
struct Asked {
    levels: Vec<Level>,
    /// Of those that need one.
    cluster: Choice,
    /// The programs under test are those that are released.
    release: bool,
    /// Tests beside Istio's own control plane run, too; building that takes minutes.
    istiod: bool,
}

impl Asked {
    /// Somebody wants istiod, and there is a rig to run it in.
    fn istiod_runs(&self) -> bool {
        self.istiod && self.cluster == Choice::Rig
    }
}

fn asked(arguments: &[String]) -> Result<Asked> {
    let (mut levels, mut asked) = (Vec::new(), Asked::default());
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        if word == "--cluster" {
            asked.cluster = Choice::named(words.next().context("--cluster needs a value: rig or kubeconfig")?)?;
        } else if word == "--release" {
            asked.release = true;
        } else if word == "--istiod" {
            asked.istiod = true;
        } else if levels.is_empty() {
            levels.push(Level::named(word)?);
        } else {
            bail!("one level at a time, but {word:?} was given as well");
        }
    }
    if levels.is_empty() {
        levels = LEVELS.to_vec();
    }
    asked.levels = levels;
    Ok(asked)
}

/// `arguments` are a level, or none for all, and after `--` what goes to the tests' own runner.
pub(crate) fn run(arguments: &[String]) -> Result<ExitCode> {
    let (own, for_runner) = match arguments.iter().position(|argument| argument == "--") {
        Some(at) => (&arguments[..at], &arguments[at + 1..]),
        None => (arguments, &[][..]),
    };
    let asked = asked(own)?;

    setup::for_building()?;
    if asked.levels.iter().any(|level| level.needs_root()) {
        setup::for_demo()?;
    }
    run::step("building the kernel programs", ebpf::build)?;

    let mut totals = Totals::default();
    let mut skipped = Vec::new();
    for &level in &asked.levels {
        if level == Level::Cluster {
            let lacks = cluster::lacks(asked.cluster);
            if !lacks.is_empty() {
                skipped.push(format!("SKIPPED: level cluster, for want of {}\n", lacks.join("; ")));
                continue;
            }
            skipped.extend(without_istiod(&asked).map(str::to_owned));
        }
        totals.add(run_level(level, &asked, for_runner)?);
    }
    skipped.iter().for_each(|line| run::print(line));
    if totals.ignored > 0 {
        run::print(&format!("{} ignored\n", totals.ignored));
    }
    run::print(&format!("{} passed, {} failed\n", totals.passed, totals.failed));
    Ok(if totals.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// What is told where the tests beside istiod do not run.
fn without_istiod(asked: &Asked) -> Option<&'static str> {
    match (asked.cluster, asked.istiod) {
        (Choice::Rig, true) | (Choice::Kubeconfig, false) => None,
        (Choice::Rig, false) => Some(
            "SKIPPED: certificates from Istio's own CA: `cargo xtask test cluster --istiod` builds istiod, in minutes, and runs them\n",
        ),
        (Choice::Kubeconfig, true) => {
            Some("SKIPPED: certificates from Istio's own CA, for want of a cluster of ours\n")
        }
    }
}

fn run_level(level: Level, asked: &Asked, for_runner: &[String]) -> Result<Totals> {
    let mut files = integration_tests(level)?;
    files.retain(|stem| asked.istiod_runs() || !stem.starts_with(BESIDE_ISTIOD));
    let mut what: Vec<String> = files.into_iter().flat_map(|stem| ["--test".to_owned(), stem]).collect();
    if level == Level::Pure {
        what.extend(["--lib".to_owned(), "--bins".to_owned()]);
    }
    if what.is_empty() {
        run::say(&format!("level {level}: no tests"));
        return Ok(Totals::default());
    }

    let mut base = vec!["test".to_owned(), "--workspace".to_owned(), "--no-fail-fast".to_owned()];
    base.extend(what);
    // The harness starts the binary as a node would.
    let binaries = match asked.release {
        true => programs::build_for_tests()?,
        false => {
            if level.needs_root() {
                run::step("building warren for the tests", || {
                    run::run(tree::cargo().args(["build", "--quiet", "--package", "warren", "--bin", "warren"]))
                })?;
            }
            tree::target().join("debug")
        }
    };
    run::step(&format!("building the tests of level {level}"), || {
        run::run(tree::cargo().args(&base).args(["--quiet", "--no-run"]))
    })?;

    let cluster = match level {
        Level::Cluster => match Cluster::up(asked.cluster, asked.istiod_runs(), &binaries.join("warren")) {
            Ok(cluster) => Some(cluster),
            Err(error) => {
                // What the other levels found is worth its totals all the same.
                run::say(&format!("there is no cluster for the tests: {error:#}"));
                return Ok(Totals {
                    failed: 1,
                    ..Totals::default()
                });
            }
        },
        Level::Pure | Level::Kernel | Level::Net => None,
    };
    let mut environment: Vec<(&str, String)> = programs::environment(&binaries).into_iter().collect();
    environment.extend(said_by_person(|name| std::env::var(name).ok()));
    let mut within = Vec::new();
    if let Some(cluster) = &cluster {
        environment.extend(cluster.environment().iter().cloned());
        within = cluster.runner();
    }

    run::say(&format!("level {level}"));
    let mut command = tree::cargo();
    if level.needs_root() {
        command.args(started_by(level, &environment, &within)?);
    }
    command.args(&base).envs(environment.iter().cloned()).arg("--");
    if level.needs_root() {
        // They share the machine: addresses, sysctls, the kernel's maps.
        command.arg("--test-threads=1");
    }
    command.args(for_runner);
    let mut totals = follow(&mut command)?;
    if let (Some(cluster), true) = (&cluster, for_runner.is_empty()) {
        totals.add(by_kubeconfig(cluster)?);
    }
    if level == Level::Net && !run::is_root() {
        // Without root, some unit tests of level pure have only said that they were skipped.
        run::say("the unit tests of userspace once more, as root");
        let mut command = tree::cargo();
        command
            .args(started_by(level, &environment, &[])?)
            .args(["test", "--package", "warren", "--lib", "--"])
            .args(for_runner);
        totals.add(follow(&mut command)?);
    }
    if level == Level::Pure && for_runner.is_empty() {
        totals.add(follow(tree::cargo().args([
            "test",
            "--workspace",
            "--doc",
            "--no-fail-fast",
        ]))?);
    }
    Ok(totals)
}

/// A few tests once more, on the same cluster taken for somebody else's.
fn by_kubeconfig(cluster: &Cluster) -> Result<Totals> {
    if !run::is_root() {
        run::print("SKIPPED: the same cluster by KUBECONFIG, for want of root: cargo would run by sudo\n");
        return Ok(Totals::default());
    }
    match cluster.by_kubeconfig(&BY_KUBECONFIG)? {
        Some(mut command) => {
            run::say("the same cluster, by KUBECONFIG alone");
            Ok(follow(&mut command)?.with_at_least(BY_KUBECONFIG.len() as u64))
        }
        None => Ok(Totals::default()),
    }
}

fn said_by_person(variable: impl Fn(&str) -> Option<String>) -> Vec<(&'static str, String)> {
    FROM_PERSON
        .into_iter()
        .filter_map(|name| Some((name, variable(name)?)))
        .collect()
}

/// The arguments that make cargo start test binaries by sudo, and by what else they need: they are built by the person,
/// only run as root.
fn started_by(level: Level, environment: &[(&str, String)], within: &[String]) -> Result<Vec<String>> {
    let mut words = Vec::new();
    if !run::is_root() {
        let Some(sudo) = tree::find("sudo") else {
            bail!("the tests of level {level} need root, and there is no sudo; run `cargo xtask test {level}` as root");
        };
        run::say(&format!(
            "sudo: the tests of level {level} make network namespaces and load kernel programs"
        ));
        words.extend([sudo.to_string_lossy().into_owned(), "--".to_owned(), "env".to_owned()]);
        words.extend(environment.iter().map(|(name, value)| format!("{name}={value}")));
    }
    words.extend(within.iter().cloned());
    if words.is_empty() {
        return Ok(Vec::new());
    }
    let words: Vec<String> = words.iter().map(|word| format!("{word:?}")).collect();
    Ok(vec![
        "--config".to_owned(),
        format!("target.{}.runner=[{}]", tree::host_triple()?, words.join(",")),
    ])
}

/// Runs cargo with its output shown as it comes, and adds up the result lines.
fn follow(command: &mut Command) -> Result<Totals> {
    let line = run::shown(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{line}`"))?;
    let mut totals = Totals::default();
    if let Some(stdout) = child.stdout.take() {
        for bytes in BufReader::new(stdout).split(b'\n') {
            let bytes = bytes.with_context(|| format!("cannot read what `{line}` prints"))?;
            let text = String::from_utf8_lossy(&bytes);
            run::print(&format!("{text}\n"));
            // A runner that prints while another does may put its line behind an unfinished one.
            if let Some(at) = text.find("test result: ") {
                totals.add(Totals::of_line(&text[at..]).unwrap_or_default());
            }
        }
    }
    let status = child.wait().with_context(|| format!("cannot wait for `{line}`"))?;
    if !status.success() && totals.failed == 0 {
        // A runner that crashed or did not compile has no result line, and is a failure all the same.
        run::say(&format!("`{line}` ended without a result ({status})"));
        totals.failed = 1;
    }
    Ok(totals)
}

/// The names of this level's integration tests, of all members of the workspace.
fn integration_tests(level: Level) -> Result<Vec<String>> {
    let mut stems = Vec::new();
    for member in ["common", "userspace", "xtask", "tests"] {
        let folder = tree::root().join(member).join("tests");
        if folder.is_dir() {
            stems.extend(stems_in(&folder).with_context(|| format!("cannot list {}", folder.display()))?);
        }
    }
    stems.retain(|stem| Level::of_file(stem) == level);
    stems.sort();
    Ok(stems)
}

fn stems_in(folder: &Path) -> std::io::Result<Vec<String>> {
    let mut stems = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        // As cargo finds them: `name.rs`, or a folder with a `main.rs`.
        let is_test = path.extension().is_some_and(|extension| extension == "rs") || path.join("main.rs").is_file();
        if let (true, Some(stem)) = (is_test, path.file_stem()) {
            stems.push(stem.to_string_lossy().into_owned());
        }
    }
    Ok(stems)
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn a_result_line_of_the_runner_is_read() {
        let line = "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.02s";
        assert_eq!(
            Totals::of_line(line),
            Some(Totals {
                passed: 12,
                failed: 3,
                ignored: 1
            })
        );
        assert_eq!(Totals::of_line("test a_test ... ok"), None);
    }

    #[test]
    fn tests_that_were_named_and_did_not_run_are_a_failure() {
        let ran = |passed, failed| Totals {
            passed,
            failed,
            ignored: 0,
        };
        assert_eq!(ran(3, 0).with_at_least(3), ran(3, 0));
        assert_eq!(ran(1, 2).with_at_least(3), ran(1, 2));
        assert_eq!(ran(2, 0).with_at_least(3), ran(2, 1));
        assert_eq!(ran(0, 0).with_at_least(3), ran(0, 1));
    }

    #[test]
    fn what_a_person_says_to_the_tests_goes_through_sudo() {
        let said = said_by_person(|name| (name != "WARREN_KEEP_LOGS").then(|| "120".to_owned()));
        assert_eq!(
            said,
            [
                ("WARREN_CHURN_SECONDS", "120".to_owned()),
                ("WARREN_REPLACEMENT_RATE", "120".to_owned()),
            ]
        );
    }

    #[test]
    fn the_name_of_a_file_says_its_level() {
        assert_eq!(Level::of_file("kernel_pins"), Level::Kernel);
        assert_eq!(Level::of_file("net_relay"), Level::Net);
        assert_eq!(Level::of_file("cluster_identity"), Level::Cluster);
        assert_eq!(Level::of_file("imports"), Level::Pure);
        assert_eq!(Level::of_file("network"), Level::Pure);
    }

    #[test]
    fn a_level_that_does_not_exist_is_refused_by_name() {
        let error = Level::named("smoke").expect_err("no such level").to_string();
        assert!(
            error.contains("\"smoke\"") && error.contains("pure, kernel, net and cluster"),
            "{error}"
        );
    }

    #[test]
    fn a_level_a_cluster_and_a_profile_may_be_named_in_any_order() {
        let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        for line in [
            "cluster --release --cluster kubeconfig",
            "--cluster kubeconfig cluster --release",
        ] {
            let expected = Asked {
                levels: vec![Level::Cluster],
                cluster: Choice::Kubeconfig,
                release: true,
                istiod: false,
            };
            assert_eq!(asked(&words(line)).expect(line), expected);
        }
        let all = Asked {
            levels: LEVELS.to_vec(),
            ..Asked::default()
        };
        assert_eq!(asked(&[]).expect("all"), all);
        assert!(asked(&words("cluster --istiod")).expect("known").istiod);
        for line in ["pure net", "--cluster", "--cluster kind"] {
            assert!(asked(&words(line)).is_err(), "{line}");
        }
    }

    #[test]
    fn tests_beside_istiod_run_where_they_are_asked_for_and_can() {
        let asked = |cluster, istiod| Asked {
            cluster,
            istiod,
            ..Asked::default()
        };
        assert_eq!(without_istiod(&asked(Choice::Rig, true)), None);
        assert!(asked(Choice::Rig, true).istiod_runs());
        assert!(!asked(Choice::Rig, false).istiod_runs() && !asked(Choice::Kubeconfig, true).istiod_runs());
        let said = |cluster, istiod| without_istiod(&asked(cluster, istiod)).unwrap_or_default();
        assert!(said(Choice::Rig, false).contains("--istiod"));
        assert!(said(Choice::Kubeconfig, true).contains("a cluster of ours"));
    }
}
