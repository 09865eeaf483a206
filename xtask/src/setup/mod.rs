//! `cargo xtask setup`: what a fresh Debian or Ubuntu lacks beyond rustup and a C linker. Each part looks first, so
//! that running it again is quick, and says what it installs and why.

mod bpf_linker;
mod packages;
mod rust_src;

use anyhow::Result;

use crate::run;
use packages::Wanted;

const BUILDING: &[Wanted] = &[
    Wanted::required(
        &["cc", "gcc", "clang"],
        "gcc",
        "compiles the C parts of the TLS library",
    ),
    Wanted::required(&["make"], "make", "builds the allocator"),
];

const DEMO: &[Wanted] = &[
    Wanted::required(
        &["ip"],
        "iproute2",
        "makes the network namespaces that stand for nodes and pods",
    ),
    Wanted::required(&["ss"], "iproute2", "shows sockets"),
    Wanted::required(&["nsenter"], "util-linux", "enters a pod"),
    Wanted::required(&["nft"], "nftables", "shows that the mesh leaves no packet filter rule"),
    Wanted::required(&["tcpdump"], "tcpdump", "captures what goes between the nodes"),
    Wanted::required(&["nginx"], "nginx", "the HTTP server in a pod"),
    Wanted::required(
        &["mariadbd", "mysqld", "sshd"],
        "mariadb-server",
        "the server in a pod that speaks first",
    ),
    Wanted::required(&["curl"], "curl", "the HTTP client in a pod"),
    Wanted::optional(&["bpftool"], "bpftool", "shows the loaded kernel programs"),
];

const BENCH: &[Wanted] = &[
    Wanted::required(&["iperf3"], "iperf3", "measures throughput"),
    Wanted::required(&["wrk"], "wrk", "measures HTTP requests"),
];

/// Everything, for a machine to work on Warren.
pub(crate) fn all() -> Result<()> {
    packages::install(&[BUILDING, DEMO, BENCH].concat())?;
    toolchain()?;
    run::say("setup: this machine has all that Warren's tasks need");
    Ok(())
}

/// What `cargo xtask build` needs.
pub(crate) fn for_building() -> Result<()> {
    packages::install(BUILDING)?;
    toolchain()
}

/// What the demo and the tests with root need.
pub(crate) fn for_demo() -> Result<()> {
    packages::install(&[BUILDING, DEMO].concat())?;
    toolchain()
}

/// What the benchmark needs.
pub(crate) fn for_bench() -> Result<()> {
    packages::install(&[BUILDING, DEMO, BENCH].concat())?;
    toolchain()
}

fn toolchain() -> Result<()> {
    rust_src::install()?;
    bpf_linker::install()
}
