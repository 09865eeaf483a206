//! `cargo xtask image`: the container image as an archive, written here, byte by byte the same for the same binary. It needs
//! neither Docker nor a registry. What is in it and how such an archive is laid out is in `archive`.

mod archive;
mod contents;
mod cross;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{programs, run, setup, tree};
use archive::Image;
use contents::Contents;

pub(crate) use cross::tool as cross_tool;

/// The image's name without its tag: the one that the Helm chart has.
const REPOSITORY: &str = "warren.mesh/warren";

/// What a processor is called: by images, and by Rust.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Architecture {
    pub(crate) image: &'static str,
    pub(crate) rust: &'static str,
    /// `e_machine` of its programs.
    elf: u16,
}

const ARCHITECTURES: [Architecture; 2] = [
    Architecture {
        image: "amd64",
        rust: "x86_64",
        elf: 62,
    },
    Architecture {
        image: "arm64",
        rust: "aarch64",
        elf: 183,
    },
];

impl Architecture {
    fn of_host() -> Result<Self> {
        let triple = tree::host_triple()?;
        ARCHITECTURES
            .into_iter()
            .find(|architecture| triple.starts_with(architecture.rust))
            .with_context(|| format!("no image is built on {triple}; use a machine of amd64 or arm64"))
    }

    /// Which one a program is built for.
    fn of_program(binary: &Path) -> Result<Self> {
        let bytes = std::fs::read(binary).with_context(|| format!("cannot read {}", binary.display()))?;
        let machine = contents::machine(&bytes).with_context(|| binary.display().to_string())?;
        ARCHITECTURES
            .into_iter()
            .find(|architecture| architecture.elf == machine)
            .with_context(|| format!("{} is for neither amd64 nor arm64", binary.display()))
    }

    pub(crate) fn triple(self) -> String {
        format!("{}-unknown-linux-gnu", self.rust)
    }
}

/// What the command line asks for.
#[derive(Debug, Default, PartialEq, Eq)]
struct Options {
    architecture: Option<Architecture>,
    binary: Option<PathBuf>,
    tag: Option<String>,
}

impl Options {
    fn of(arguments: &[String]) -> Result<Self> {
        let mut options = Self::default();
        let mut words = arguments.iter();
        while let Some(word) = words.next() {
            let mut value = || words.next().with_context(|| format!("{word} needs a value"));
            match word.as_str() {
                "--arch" => {
                    let name = value()?;
                    let known = ARCHITECTURES.into_iter().find(|known| known.image == name);
                    options.architecture =
                        Some(known.with_context(|| format!("no image is built for {name:?}: amd64 or arm64"))?);
                }
                "--binary" => options.binary = Some(value()?.into()),
                "--tag" => options.tag = Some(value()?.clone()),
                unknown => bail!("there is no {unknown:?}; `cargo xtask help image` lists what there is"),
            }
        }
        Ok(options)
    }
}

/// Writes `target/image/warren-<tag>-<arch>.tar`, for the host's architecture and for the other one where it can be
/// cross-compiled; prints each archive's path.
pub(crate) fn build(arguments: &[String]) -> Result<()> {
    let options = Options::of(arguments)?;
    let tag = options.tag.clone().unwrap_or_else(|| tree::version().to_owned());
    let host = Architecture::of_host()?;
    if let Some(binary) = &options.binary {
        let architecture = Architecture::of_program(binary)?;
        if let Some(asked) = options.architecture.filter(|asked| *asked != architecture) {
            bail!(
                "{} is for {}, not for {}",
                binary.display(),
                architecture.image,
                asked.image
            );
        }
        let archive = write(binary, architecture, &tag)?;
        run::print(&format!("{}\n", archive.display()));
        return Ok(());
    }
    setup::for_building()?;
    for architecture in ARCHITECTURES {
        if options.architecture.is_some_and(|asked| asked != architecture) {
            continue;
        }
        if architecture != host
            && let Err(lack) = cross::check(architecture)
        {
            if options.architecture.is_some() {
                return Err(lack);
            }
            run::say(&format!("{lack:#}"));
            continue;
        }
        let archive = write(&programs::build_static(architecture)?, architecture, &tag)?;
        run::print(&format!("{}\n", archive.display()));
    }
    Ok(())
}

/// The archive of an image for this machine around `binary`.
pub(crate) fn of_binary(binary: &Path, tag: &str) -> Result<PathBuf> {
    write(binary, Architecture::of_host()?, tag)
}

fn write(binary: &Path, architecture: Architecture, tag: &str) -> Result<PathBuf> {
    let folder = tree::target().join("image");
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let contents = Contents::around(
        &stripped(binary, architecture, &folder)?,
        Architecture::of_host()? == architecture,
    )?;
    let image = Image {
        reference: format!("{REPOSITORY}:{tag}"),
        architecture: architecture.image,
        version: tree::version(),
        contents,
    };
    let archive = folder.join(format!("warren-{tag}-{}.tar", architecture.image));
    // Renamed into place: whoever reads the old one meanwhile reads it whole.
    let half = archive.with_extension("tar.new");
    let bytes = image.archive().context("cannot put the image together")?;
    std::fs::write(&half, &bytes).with_context(|| format!("cannot write {}", half.display()))?;
    std::fs::rename(&half, &archive).with_context(|| format!("cannot write {}", archive.display()))?;
    run::say(&format!("{} ({} MB)", image.reference, bytes.len() / 1_000_000));
    Ok(archive)
}

/// The binary without debugging information, which is most of its size; names of functions stay.
fn stripped(binary: &Path, architecture: Architecture, folder: &Path) -> Result<PathBuf> {
    let (strip, otherwise) = if Architecture::of_host()? == architecture {
        ("strip".to_owned(), "there is no strip: it comes with gcc".to_owned())
    } else {
        (
            cross_tool(architecture, "strip"),
            cross::missing_tool(architecture, "strip"),
        )
    };
    let result = folder.join("warren");
    run::run(
        Command::new(tree::find(&strip).context(otherwise)?)
            .args(["--strip-debug", "-o"])
            .arg(&result)
            .arg(binary),
    )?;
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_option_or_architecture_is_refused_by_name() {
        for (words, expected) in [
            (vec!["--arch", "riscv64"], "riscv64"),
            (vec!["--push"], "--push"),
            (vec!["--tag"], "--tag needs a value"),
        ] {
            let arguments: Vec<String> = words.into_iter().map(str::to_owned).collect();
            let error = Options::of(&arguments).expect_err("must be refused");
            assert!(error.to_string().contains(expected), "{error}");
        }
    }
    #[test]
    fn a_program_is_taken_for_the_processor_it_was_built_for() {
        let own = Architecture::of_program(Path::new("/proc/self/exe")).expect("the running program");
        assert_eq!(own, Architecture::of_host().expect("a host"));
        let [amd64, arm64] = ARCHITECTURES;
        let other = if own == amd64 { arm64 } else { amd64 };
        let words = ["--arch", other.image, "--binary", "/proc/self/exe"].map(str::to_owned);
        let error = build(&words).expect_err("must be refused").to_string();
        assert!(
            error.contains(&format!("is for {}, not for {}", own.image, other.image)),
            "{error}"
        );
    }
}
