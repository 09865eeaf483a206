//! `cargo xtask manifests`: the plain manifests, rendered from the Helm charts, which are the one source. `--check` also
//! holds the charts to what they promise.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::{run, tree};

/// A chart, the file that it is rendered to, and the values that make it whole without Helm.
struct Chart {
    name: &'static str,
    values: &'static [&'static str],
}

const CHARTS: [Chart; 2] = [
    Chart {
        name: "warren",
        values: &["createNamespace=true"],
    },
    Chart {
        name: "warren-crds",
        values: &[],
    },
];

/// Values of the chart `warren` that its schema must refuse, each for the reason behind it.
const REFUSED: [(&str, &str); 13] = [
    ("nod.drainSeconds=1", "a word that nobody knows"),
    ("mesh.trustdomain=a", "a known word, misspelt"),
    ("mesh.trustDomain=Two Words", "no trust domain"),
    ("mesh.clusterRanges={10.0.0.0}", "an address that is no range"),
    ("image.pullPolicy=Sometimes", "no policy of Kubernetes"),
    ("image.digest=sha256:123", "a digest that is too short"),
    ("log.format=xml", "no form of the log"),
    ("controller.replicas=0", "no replica at all"),
    ("node.drainSeconds=-1", "a time before now"),
    ("cni.binDir=opt/cni/bin", "a folder that is not absolute"),
    ("ca.address=http://ca:15012", "an authority without TLS"),
    ("controller.enabled=false", "no authority at all"),
    (
        "ca.rootConfigMap=roots",
        "a ConfigMap that our own controller does not write",
    ),
];

/// Renders the charts, or with `--check` looks whether that would change anything.
pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let check = match arguments {
        [] => false,
        [only] if only == "--check" => true,
        [other, ..] => bail!("there is no {other:?}; `cargo xtask help manifests` lists what there is"),
    };
    let Some(helm) = helm() else {
        let how = "there is no helm: put it into PATH, or build the test cluster, which brings it (tests/kube)";
        ensure!(check, "{how}");
        run::say(&format!("SKIPPED: manifests are not compared with the charts: {how}"));
        return Ok(());
    };
    for chart in &CHARTS {
        let rendered = render(&helm, chart)?;
        let file = tree::root().join(format!("deploy/manifests/{}.yaml", chart.name));
        if !check {
            std::fs::write(&file, rendered).with_context(|| format!("cannot write {}", file.display()))?;
            run::print(&format!("{}\n", file.display()));
            continue;
        }
        let committed = std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        if let Some(line) = first_difference(&committed, &rendered) {
            bail!(
                "{}:{line}: this is not what the chart gives; run `cargo xtask manifests`",
                file.display()
            );
        }
        has_our_version(&tree::root().join("deploy/charts").join(chart.name).join("Chart.yaml"))?;
        run::read(Command::new(&helm).args(["lint", "--strict"]).arg(folder(chart)))?;
    }
    if check {
        refusals(&helm)?;
        run::say("the manifests are what the charts give, lint finds nothing, and wrong values are refused");
    }
    Ok(())
}

/// What `--check` does.
pub(crate) fn check() -> Result<()> {
    run(&["--check".to_owned()])
}

/// In PATH, or where the test cluster's programs are.
fn helm() -> Option<PathBuf> {
    let of_cluster = crate::tree::cache().map(|cache| cache.join("kube/bin/helm"));
    tree::find("helm").or_else(|| of_cluster.filter(|path| path.is_file()))
}

fn folder(chart: &Chart) -> PathBuf {
    tree::root().join("deploy/charts").join(chart.name)
}

fn template(helm: &Path, chart: &Chart) -> Command {
    let mut command = Command::new(helm);
    command
        .args(["template", chart.name])
        .arg(folder(chart))
        .args(["--namespace", "warren-system"]);
    command
}

fn render(helm: &Path, chart: &Chart) -> Result<String> {
    let mut command = template(helm, chart);
    for value in chart.values {
        command.args(["--set", value]);
    }
    let rendered = run::read(&mut command)?;
    let mut text = format!(
        "# Rendered from deploy/charts/{} by `cargo xtask manifests`: change it there.\n",
        chart.name
    );
    for line in rendered.lines() {
        text.push_str(line.trim_end());
        text.push('\n');
    }
    Ok(text)
}

fn refusals(helm: &Path) -> Result<()> {
    let chart = &CHARTS[0];
    for (value, why) in REFUSED {
        let output = template(helm, chart)
            .args(["--set", value])
            .output()
            .context("cannot start helm")?;
        ensure!(!output.status.success(), "the chart takes `{value}`, which is {why}");
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            said.contains("values don't meet the specifications of the schema"),
            "`{value}` is refused, but not by the schema: {said}"
        );
    }
    Ok(())
}

/// The chart is released with everything else.
fn has_our_version(file: &Path) -> Result<()> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    for key in ["version: ", "appVersion: "] {
        let found = text.lines().find_map(|line| line.strip_prefix(key));
        ensure!(
            found == Some(tree::version()),
            "{}: {key}must be {}, as in Cargo.toml",
            file.display(),
            tree::version()
        );
    }
    Ok(())
}

/// The number of the first line that is not the same.
fn first_difference(one: &str, other: &str) -> Option<usize> {
    let (mut left, mut right) = (one.lines(), other.lines());
    let mut number = 0;
    loop {
        number += 1;
        match (left.next(), right.next()) {
            (None, None) => return None,
            (a, b) if a == b => {}
            _ => return Some(number),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_that_differs_is_named() {
        assert_eq!(first_difference("a\nb\n", "a\nb\n"), None);
        assert_eq!(first_difference("a\nb\n", "a\nc\n"), Some(2));
        assert_eq!(first_difference("a\n", "a\nb\n"), Some(2));
    }
}
