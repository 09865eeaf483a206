//! `cargo xtask`: every developer task of Warren under one name. This file reads the command line and nothing else;
//! each task has a file of its own.

mod cluster;
mod ebpf;
mod image;
mod licences;
mod lint;
mod manifests;
mod programs;
mod run;
mod setup;
mod tests;
mod tree;

use std::process::ExitCode;

use anyhow::{Result, bail};

const HELP: &str = "\
Warren's developer tasks.

Usage: cargo xtask <TASK> [ARGUMENTS]

Tasks:
  setup          install what this machine lacks to build, test, demonstrate and measure Warren
  build-ebpf     build the kernel programs into target/bpf
  build          build the release binary, target/release/warren, with the kernel programs inside
  image          write the container image as an archive, target/image/warren-VERSION-ARCH.tar
  manifests      render deploy/manifests from the Helm charts; --check only compares
  demo           two nodes and four pods on this machine, real traffic, every claim shown
  test [LEVEL]   run the tests: pure, kernel, net or cluster; without a level all of them
  lint           format, clippy for the host and for the bpf target, import walls, licences, advisories
  bench          measure the mesh beside plain connections and beside the least an encrypted path costs;
                 bench scale: one node's daemon on a cluster of up to 20,000 pods
  help [TASK]    this text, or a task's own

`demo`, `test` and `bench` run the part of `setup` that they need by themselves.
";

const SETUP_HELP: &str = "\
Install what this machine lacks. Running it again is quick and changes nothing.

Usage: cargo xtask setup

What it looks for, and what it does when it is missing:
  system commands   (ip, nft, tcpdump, nginx, MariaDB or OpenSSH, iperf3, wrk …)   apt-get install, by sudo if need be
  rust-src          the source of `core`, for the kernel's target                  rustup, else Debian's package of it
  bpf-linker        links the kernel programs                                      cargo install into target/tools

Services that come with such a package (nginx, MariaDB) are left switched off: the demo starts its own.
";

const BUILD_EBPF_HELP: &str = "\
Build the kernel programs into target/bpf/{steer,arrive}.o, which the build of `warren` embeds.
A file there is replaced only when its bytes changed.

Usage: cargo xtask build-ebpf
";

const BUILD_HELP: &str = "\
Build target/release/warren. It is one static file: kernel programs included, and no library, compiler, clang or kernel
headers are needed where it runs.

Usage: cargo xtask build
";

const IMAGE_HELP: &str = "\
Write the container image warren.mesh/warren:VERSION as an archive in OCI's layout, which `kind load image-archive`,
`ctr image import` and `docker load` read. It holds the static binary and nothing else; the same binary gives the same
bytes. Needs no Docker. Without --arch, an image for this machine's architecture, and one for the other where a cross
toolchain is installed.

Usage: cargo xtask image [--arch ARCH] [--tag TAG] [--binary FILE]

  --arch ARCH    amd64 or arm64, that one alone
  --tag TAG      instead of the version
  --binary FILE  put this binary in, instead of building one; a dynamically linked one brings its libraries along
";

const MANIFESTS_HELP: &str = "\
Render deploy/manifests/*.yaml from the Helm charts in deploy/charts, which are the one source. Needs helm.

Usage: cargo xtask manifests [--check]

  --check  change nothing: fail if what is committed is not what the charts give, if `helm lint --strict` finds anything,
           or if a wrong value is not refused; without helm it says that it looked at nothing
";

const DEMO_HELP: &str = "\
Build Warren, then show it at work: two nodes, four pods in the mesh and one outside it, as network namespaces on this
machine, with a real nginx, a real MariaDB (or OpenSSH) and a TCP echo. Each thing shown is a line with ✓ or ✗; anything
that is not so ends the demo with a failure. Nothing leaves the machine, and all of it is cleaned up at the end, also
after Ctrl-C.
Needs root: an ordinary user is asked for sudo.

Usage: cargo xtask demo [--ipv6] [--keep] [--clean]

  --ipv6   run it on IPv6
  --keep   leave everything running at the end, and print how to enter a pod
  --clean  only remove what a run with --keep left; the next run does so as well
";

const TEST_HELP: &str = "\
Run the tests. The last line holds the totals, `N passed, N failed`.

Usage: cargo xtask test [LEVEL] [--release] [--cluster rig|kubeconfig] [--istiod]
                        [-- ARGUMENTS OF THE TESTS' RUNNER]

Levels:
  pure     unit tests, and integration tests that need no privilege
  kernel   the programs in the running kernel (root)               userspace/tests/kernel_*.rs
  net      nodes and pods as network namespaces (root)             userspace/tests/net_*.rs, tests/tests/net_*.rs
  cluster  Warren on a real Kubernetes (root)                      userspace/tests/cluster_*.rs, tests/tests/cluster_*.rs

Without a level all of them run. Tests that need root are built by you and started by sudo.

  --release             with the programs under test as they are released; what tests assert of speed, where they are asked
                        to by WARREN_CHURN_SECONDS and the like, holds for these
  --cluster rig         (default) Kubernetes from tests/kube, two nodes in network namespaces; built once, in 6 minutes,
                        into $WARREN_CACHE or ~/.cache/warren
  --cluster kubeconfig  the cluster that KUBECONFIG leads to, such as kind with two workers; tests that stop nodes or the
                        API server are skipped. An image goes into kind by itself, elsewhere it must be there
  --istiod              builds Istio's control plane as well, as a second certificate authority, and runs the tests with it

Where a machine cannot run level cluster, it is skipped and the last lines say what is missing.
";

const LINT_HELP: &str = "\
Check everything that needs no running code: cargo fmt, clippy with warnings as errors for the host and for the bpf
target, the import walls between the folders of userspace/src, the manifests against their Helm charts where there is
helm, the licences of all dependencies, and the advisories when cargo-deny is installed.

Usage: cargo xtask lint
";

const BENCH_HELP: &str = "\
Build everything for release and measure. Arguments go to the benchmark as they are; `cargo xtask bench -- --help`
lists them. Needs root: an ordinary user is asked for sudo.

Usage: cargo xtask bench [--pin] [--out FILE] …
       cargo xtask bench scale [--pods N,N] [--rate N] [--seconds N] [--out FILE]

`bench scale` brings a real API server up (tests/kube), fills it with generated objects, and measures one node's daemon at
each size while the cluster changes: memory, CPU, the time from the API server's acknowledgement of a change to the
snapshot that has it, and what it asks of the API server.
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match dispatch(&arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(arguments: &[String]) -> Result<ExitCode> {
    let Some((task, rest)) = arguments.split_first() else {
        eprint!("{HELP}");
        return Ok(ExitCode::from(2));
    };
    // After `--` the arguments belong to the program that the task starts.
    let asks_for_help = rest
        .iter()
        .take_while(|argument| *argument != "--")
        .any(|argument| is_help(argument));
    if is_help(task) || task == "help" || asks_for_help {
        let topic = if is_help(task) || task == "help" {
            rest.first().map(String::as_str)
        } else {
            Some(task.as_str())
        };
        run::print(help(topic)?);
        return Ok(ExitCode::SUCCESS);
    }
    match task.as_str() {
        "setup" => no_arguments(rest)
            .and_then(|()| setup::all())
            .map(|()| ExitCode::SUCCESS),
        "build-ebpf" => {
            no_arguments(rest)?;
            setup::for_building()?;
            ebpf::build()?;
            Ok(ExitCode::SUCCESS)
        }
        "build" => no_arguments(rest)
            .and_then(|()| programs::build())
            .map(|()| ExitCode::SUCCESS),
        "image" => image::build(rest).map(|()| ExitCode::SUCCESS),
        "manifests" => manifests::run(rest).map(|()| ExitCode::SUCCESS),
        "demo" => programs::demo(rest),
        "bench" => programs::bench(rest),
        "test" => tests::run(rest),
        "lint" => no_arguments(rest)
            .and_then(|()| lint::run())
            .map(|()| ExitCode::SUCCESS),
        unknown => bail!("there is no task {unknown:?}; `cargo xtask help` lists them"),
    }
}

fn is_help(argument: &str) -> bool {
    argument == "--help" || argument == "-h"
}

fn no_arguments(rest: &[String]) -> Result<()> {
    match rest.first() {
        None => Ok(()),
        Some(argument) => bail!("this task takes no argument, but was given {argument:?}"),
    }
}

fn help(topic: Option<&str>) -> Result<&'static str> {
    Ok(match topic {
        None => HELP,
        Some("setup") => SETUP_HELP,
        Some("build-ebpf") => BUILD_EBPF_HELP,
        Some("build") => BUILD_HELP,
        Some("image") => IMAGE_HELP,
        Some("manifests") => MANIFESTS_HELP,
        Some("demo") => DEMO_HELP,
        Some("test") => TEST_HELP,
        Some("lint") => LINT_HELP,
        Some("bench") => BENCH_HELP,
        Some(unknown) => bail!("there is no task {unknown:?}; `cargo xtask help` lists them"),
    })
}
