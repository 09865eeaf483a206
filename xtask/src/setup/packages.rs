//! System commands and the Debian packages that bring them.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::{run, tree};

/// A command of the system that a task uses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    /// Any one of these will do.
    commands: &'static [&'static str],
    package: &'static str,
    why: &'static str,
    required: bool,
}

impl Wanted {
    pub(crate) const fn required(commands: &'static [&'static str], package: &'static str, why: &'static str) -> Self {
        Self {
            commands,
            package,
            why,
            required: true,
        }
    }

    /// Its absence costs a detail, not the task.
    pub(crate) const fn optional(commands: &'static [&'static str], package: &'static str, why: &'static str) -> Self {
        Self {
            commands,
            package,
            why,
            required: false,
        }
    }

    fn is_missing(&self) -> bool {
        !self.commands.iter().any(|command| tree::find(command).is_some())
    }
}

/// Installs the packages of those commands that are not there.
pub(crate) fn install(wanted: &[Wanted]) -> Result<()> {
    let missing: Vec<Wanted> = wanted.iter().copied().filter(Wanted::is_missing).collect();
    let (required, optional): (Vec<Wanted>, Vec<Wanted>) = missing.into_iter().partition(|one| one.required);
    if !required.is_empty() {
        apt_get_install(&required)?;
        if let Some(still) = required.iter().find(|one| one.is_missing()) {
            bail!(
                "{} is installed, and yet there is no {} ({})",
                still.package,
                still.commands.join(" or "),
                still.why
            );
        }
    }
    for one in optional {
        if let Err(error) = apt_get_install(&[one]) {
            run::say(&format!("goes on without {} ({}): {error:#}", one.package, one.why));
        }
    }
    Ok(())
}

fn apt_get_install(missing: &[Wanted]) -> Result<()> {
    let list: Vec<String> = missing
        .iter()
        .map(|one| format!("{} ({}; package {})", one.commands[0], one.why, one.package))
        .collect();
    let mut names: Vec<&str> = missing.iter().map(|one| one.package).collect();
    names.dedup();
    let by_hand = format!("apt-get install --no-install-recommends {}", names.join(" "));
    if tree::find("apt-get").is_none() {
        bail!(
            "this machine lacks {}, and has no apt-get; install them with its own package manager",
            list.join(", ")
        );
    }
    if !run::is_root() && tree::find("sudo").is_none() {
        bail!(
            "this machine lacks {}; there is no sudo, so run as root: {by_hand}",
            list.join(", ")
        );
    }
    run::say(&format!("this machine lacks {}", list.join(", ")));

    let services = Services::before(&names);
    let hint = || format!("could not install {}; to do it by hand: {by_hand}", names.join(", "));
    if !has_package_lists() {
        run::step("apt-get update (there are no package lists yet)", update).with_context(hint)?;
        run::step(&format!("installing {}", names.join(", ")), || install_packages(&names)).with_context(hint)?;
    } else if let Err(first) = run::step(&format!("installing {}", names.join(", ")), || install_packages(&names)) {
        // Lists that are older than the mirror name files that are gone.
        run::say(&format!("{first:#}; trying again with fresh package lists"));
        run::step("apt-get update", update).with_context(hint)?;
        run::step(&format!("installing {}", names.join(", ")), || install_packages(&names)).with_context(hint)?;
    }
    services.switch_off_new_ones();
    Ok(())
}

fn has_package_lists() -> bool {
    let Ok(entries) = std::fs::read_dir("/var/lib/apt/lists") else {
        return false;
    };
    entries
        .flatten()
        .any(|entry| entry.file_name().to_string_lossy().contains("_Packages"))
}

fn update() -> Result<()> {
    run::run(apt_get("refreshing the package lists")?.args(["-q", "update"]))
}

fn install_packages(names: &[&str]) -> Result<()> {
    let reason = format!("installing {}", names.join(", "));
    run::run(
        apt_get(&reason)?
            .args(["-q", "-y", "--no-install-recommends", "install"])
            .args(names),
    )
}

fn apt_get(reason: &str) -> Result<Command> {
    let environment = [("DEBIAN_FRONTEND", "noninteractive".to_owned())];
    let mut command = run::as_root("apt-get", &environment, reason)?;
    // Another apt at work (unattended upgrades of a fresh machine) is waited for, not an error.
    command
        .args(["-o", "DPkg::Lock::Timeout=300", "-o", "Dpkg::Use-Pty=0"])
        .stdin(Stdio::null());
    Ok(command)
}

/// Servers that their packages switch on at once. Nobody asked for a web server on this machine, so those that were
/// not there before are switched off again.
struct Services {
    new: Vec<&'static str>,
}

impl Services {
    fn before(packages: &[&str]) -> Self {
        let brought = [
            ("nginx", "nginx.service"),
            ("mariadb-server", "mariadb.service"),
            ("iperf3", "iperf3.service"),
        ];
        let is_new = |unit: &str| !Path::new("/usr/lib/systemd/system").join(unit).exists();
        let new = brought
            .into_iter()
            .filter(|(package, unit)| packages.contains(package) && is_new(unit));
        Self {
            new: new.map(|(_, unit)| unit).collect(),
        }
    }

    fn switch_off_new_ones(self) {
        if !Path::new("/run/systemd/system").exists() {
            return;
        }
        for unit in self.new {
            run::say(&format!(
                "{unit} came with its package; it is switched off, since the demo starts its own"
            ));
            let switched = run::as_root("systemctl", &[], "switching off a service that was just installed")
                .and_then(|mut command| run::read(command.args(["disable", "--now", unit])));
            if let Err(error) = switched {
                run::say(&format!("{unit} stays on: {error:#}"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_several_commands_is_enough() {
        assert!(!Wanted::required(&["surely-not-installed", "sh"], "dash", "").is_missing());
        assert!(Wanted::required(&["surely-not-installed"], "none", "").is_missing());
    }
}
