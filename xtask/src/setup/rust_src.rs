//! The source of `core`, which cargo builds for the kernel's target. It must belong to the very rustc that compiles it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{run, tree};

/// Debian's package of it comes from this suite; a suite holds several versions.
const SUITE: &str = "trixie-backports";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const BY_HAND: &str = "rustup component add rust-src";

/// Puts it into rustc's sysroot, unless it is there.
pub(crate) fn install() -> Result<()> {
    let library = tree::sysroot()?.join("lib/rustlib/src/rust/library");
    if is_there(&library) {
        return Ok(());
    }
    run::say("rust-src is missing: the source of `core`, from which the kernel programs are built");
    let Err(first) = run::step(&format!("`{BY_HAND}`"), by_rustup) else {
        return check(&library);
    };
    run::say(&format!("{first:#}; trying Debian's package of the same version"));
    run::step(&format!("rust-src from Debian {SUITE}"), || from_debian(&library))
        .with_context(|| format!("rust-src is missing, and could not be installed; to do it by hand: {BY_HAND}"))?;
    check(&library)
}

fn is_there(library: &Path) -> bool {
    library.join("core/src/lib.rs").is_file() && library.join("Cargo.lock").is_file()
}

fn check(library: &Path) -> Result<()> {
    if !is_there(library) {
        bail!(
            "rust-src was installed, and yet {} is not complete; try: {BY_HAND}",
            library.display()
        );
    }
    Ok(())
}

fn by_rustup() -> Result<()> {
    if tree::find("rustup").is_none() {
        bail!("there is no rustup");
    }
    // A machine that cannot reach rustup's server may notice only after many minutes.
    run::read(
        Command::new("timeout")
            .args(["180", "rustup", "component", "add", "rust-src"])
            .current_dir(tree::root()),
    )
    .map(drop)
}

/// Fetches the package with an apt configuration of our own, so that the machine's stays as it is, and unpacks it
/// without installing it. Needs no root.
fn from_debian(library: &Path) -> Result<()> {
    for command in ["apt-get", "apt-cache", "dpkg"] {
        if tree::find(command).is_none() {
            bail!("there is no {command}");
        }
    }
    let mirror = debian_mirror()
        .context("this machine's apt configuration names no Debian mirror, from which to take the package")?;
    let apt = PrivateApt::new(&mirror)?;
    run::read(apt.command("apt-get").args(["-q", "update"]))?;
    let rustc = tree::rustc_version()?;
    let listed = run::read(apt.command("apt-cache").args(["madison", "rust-src"]))?;
    let version = version_for(&rustc, &listed)
        .with_context(|| format!("{SUITE} has no rust-src of version {rustc}"))?
        .to_owned();
    run::say(&format!("downloading rust-src {version}, 45 MB"));
    run::read(
        apt.command("apt-get")
            .args(["-q", "download", &format!("rust-src={version}")]),
    )?;
    let package = std::fs::read_dir(&apt.folder)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .context("apt-get downloaded nothing")?;
    let unpacked = apt.folder.join("unpacked");
    run::read(Command::new("dpkg").arg("-x").args([&package, &unpacked]))?;
    put_in_place(&unpacked.join(format!("usr/src/rustc-{rustc}/library")), library)?;
    std::fs::remove_dir_all(&apt.folder).with_context(|| format!("cannot remove {}", apt.folder.display()))
}

/// Copies beside the goal, then renames: half a source tree would pass for a whole one at the next look.
fn put_in_place(source: &Path, library: &Path) -> Result<()> {
    let parent = library.parent().context("the sysroot has no parent")?;
    let half = parent.join("library.new");
    let script = "mkdir -p \"$1\" && rm -rf \"$2\" \"$4\" && cp -r \"$3\" \"$2\" && mv \"$2\" \"$4\"";
    let sysroot_is_ours = std::fs::create_dir_all(parent).is_ok();
    let mut command = if sysroot_is_ours {
        Command::new("sh")
    } else {
        run::as_root(
            "sh",
            &[],
            "copying rust-src into the toolchain's folder, which belongs to root",
        )?
    };
    run::run(
        command
            .args(["-c", script, "sh"])
            .args([parent, &half, source, library]),
    )
}

/// An apt that knows one suite of one mirror and touches nothing of the machine's.
struct PrivateApt {
    folder: PathBuf,
}

impl PrivateApt {
    fn new(mirror: &str) -> Result<Self> {
        let folder = tree::tools().join("apt");
        if folder.exists() {
            std::fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
        }
        for part in ["lists/partial", "cache/archives/partial"] {
            let part = folder.join(part);
            std::fs::create_dir_all(&part).with_context(|| format!("cannot make {}", part.display()))?;
        }
        let signed_by = if Path::new(KEYRING).exists() {
            format!("[signed-by={KEYRING}] ")
        } else {
            String::new()
        };
        std::fs::write(
            folder.join("sources.list"),
            format!("deb {signed_by}{mirror} {SUITE} main\n"),
        )?;
        Ok(Self { folder })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let options = [
            format!("Dir::Etc::sourcelist={}", self.folder.join("sources.list").display()),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
            format!("Dir::State::lists={}", self.folder.join("lists").display()),
            format!("Dir::Cache={}", self.folder.join("cache").display()),
            // The files lie in the person's folder, where apt's own user may not look.
            "APT::Sandbox::User=".to_owned(),
        ];
        for option in options {
            command.arg("-o").arg(option);
        }
        command.current_dir(&self.folder);
        command
    }
}

/// The first Debian mirror that the machine's own apt uses.
fn debian_mirror() -> Option<String> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = std::fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.flatten().map(|entry| entry.path()));
    }
    files.sort();
    files
        .into_iter()
        .filter_map(|file| std::fs::read_to_string(file).ok())
        .find_map(|text| mirror_in(&text))
}

/// Finds it in either of apt's formats: lines `deb [options] URI suite component`, or stanzas with `URIs:`.
fn mirror_in(text: &str) -> Option<String> {
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    let is_source = |line: &&str| line.starts_with("deb ") || line.starts_with("URIs:");
    let words = lines.filter(is_source).flat_map(str::split_whitespace);
    words
        .filter(|word| word.starts_with("http://") || word.starts_with("https://"))
        .map(|uri| uri.trim_end_matches('/'))
        .find(|uri| uri.ends_with("/debian"))
        .map(str::to_owned)
}

/// The version whose number is rustc's, out of what `apt-cache madison` prints.
fn version_for<'a>(rustc: &str, madison: &'a str) -> Option<&'a str> {
    let versions = madison.lines().filter_map(|line| line.split('|').nth(1)).map(str::trim);
    let mut fitting = versions.filter(|version| version.strip_prefix(rustc).is_some_and(|rest| rest.starts_with('+')));
    fitting.next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_found_in_both_formats_of_apt() {
        let lines = "# deb http://old.example/debian stable main\n\
                     deb https://other.example/apt stable main\n\
                     deb [signed-by=/x.gpg] http://mirror.example/debian bookworm main\n";
        assert_eq!(mirror_in(lines).as_deref(), Some("http://mirror.example/debian"));
        let stanza =
            "Types: deb\nURIs: http://mirror.example/debian-security http://mirror.example/debian/\nSuites: x\n";
        assert_eq!(mirror_in(stanza).as_deref(), Some("http://mirror.example/debian"));
        assert_eq!(mirror_in("deb http://archive.example/ubuntu noble main\n"), None);
    }

    #[test]
    fn the_source_must_be_of_the_very_rustc() {
        let madison = " rust-src | 1.96.1+dfsg1-1~bpo13+1 | http://m/debian trixie-backports/main amd64 Packages\n \
                        rust-src | 1.95.0+dfsg1-2~bpo13+1 | http://m/debian trixie-backports/main amd64 Packages\n";
        assert_eq!(version_for("1.95.0", madison), Some("1.95.0+dfsg1-2~bpo13+1"));
        assert_eq!(version_for("1.95", madison), None);
        assert_eq!(version_for("1.94.0", madison), None);
    }
}
