//! Starting other programs: said aloud, failing by name, and as root only where asked, with the reason.

use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};

/// Tells the person what happens next. On stderr, so that stdout stays for results.
pub(crate) fn say(text: &str) {
    eprintln!("▸ {text}");
}

/// Prints a result. A closed pipe is the reader's choice, not an error.
pub(crate) fn print(text: &str) {
    let mut stdout = std::io::stdout();
    let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
}

/// Runs `command` with its output shown, and fails if it does.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let line = shown(command);
    let status = command.status().with_context(|| format!("cannot start `{line}`"))?;
    if !status.success() {
        bail!("`{line}` failed ({status})");
    }
    Ok(())
}

/// Runs `command` silently; its output appears only when it fails. Returns what it printed on stdout.
pub(crate) fn read(command: &mut Command) -> Result<String> {
    let line = shown(command);
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start `{line}`"))?;
    if !output.status.success() {
        bail!(
            "`{line}` failed ({}): {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs one step of a longer task and says how long it took.
pub(crate) fn step(what: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    step_of(what, work)
}

/// As [`step`], for one that makes something.
pub(crate) fn step_of<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    say(what);
    let begin = Instant::now();
    let made = work().with_context(|| what.to_owned())?;
    say(&format!("{what}: done in {:.1} s", begin.elapsed().as_secs_f32()));
    Ok(made)
}

/// Becomes `command`: this program ends here, so a Ctrl-C reaches the one that has things to clean up, and no other.
pub(crate) fn become_program(mut command: Command) -> anyhow::Error {
    let line = shown(&command);
    anyhow!(command.exec()).context(format!("cannot start `{line}`"))
}

/// Whether we are root already.
pub(crate) fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}

/// A command that runs `program` as root, by sudo if need be; `reason` tells the person what for.
///
/// The environment is handed over name by name, since sudo drops it.
pub(crate) fn as_root(program: &str, environment: &[(&str, String)], reason: &str) -> Result<Command> {
    if is_root() {
        let mut command = Command::new(program);
        command.envs(environment.iter().map(|(name, value)| (*name, value.as_str())));
        return Ok(command);
    }
    let Some(sudo) = crate::tree::find("sudo") else {
        bail!("{reason}: this needs root, and there is no sudo; run it as root: `{program}`");
    };
    say(&format!("sudo: {reason}"));
    let mut command = Command::new(sudo);
    command
        .arg("--")
        .arg("env")
        .args(environment.iter().map(|(name, value)| format!("{name}={value}")))
        .arg(program);
    Ok(command)
}

/// The command as one would type it, without the folder of its program.
pub(crate) fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let mut line = program
        .file_name()
        .unwrap_or(program.as_os_str())
        .to_string_lossy()
        .into_owned();
    for argument in command.get_args() {
        line.push(' ');
        line.push_str(&argument.to_string_lossy());
    }
    line
}
