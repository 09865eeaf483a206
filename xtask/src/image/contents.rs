//! What lies in the image: the binary and nothing else, if it is static as a release's is. A dynamically linked one, as
//! tests build it, brings its loader and libraries along.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::run;

/// How a 64-bit little-endian ELF file begins.
const ELF64: &[u8] = b"\x7fELF\x02\x01";

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Contents {
    /// Relative to the root, each behind the one it is in.
    pub(super) folders: Vec<String>,
    pub(super) files: Vec<File>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct File {
    /// Relative to the root.
    pub(super) path: String,
    pub(super) mode: u32,
    pub(super) bytes: Vec<u8>,
}

impl Contents {
    /// The binary at `/warren`, with what it cannot start without; `native` if it is for this machine's processor.
    pub(super) fn around(binary: &Path, native: bool) -> Result<Self> {
        let bytes = std::fs::read(binary).with_context(|| format!("cannot read {}", binary.display()))?;
        let libraries = if is_dynamic(&bytes)? {
            if !native {
                bail!(
                    "{} is not static, and the libraries of another processor are not looked for here; build it with \
                     RUSTFLAGS=-Ctarget-feature=+crt-static",
                    binary.display()
                );
            }
            let libraries = libraries(binary)?;
            run::say(&format!(
                "{} is not static: {} libraries go with it",
                binary.display(),
                libraries.len()
            ));
            libraries
        } else {
            Vec::new()
        };
        let mut files = vec![File {
            path: "warren".to_owned(),
            mode: 0o755,
            bytes,
        }];
        let mut folders = BTreeSet::new();
        for library in libraries {
            let path = library.trim_start_matches('/').to_owned();
            folders.extend(folders_of(&path));
            let bytes = std::fs::read(&library).with_context(|| format!("cannot read {library}"))?;
            files.push(File {
                path,
                mode: 0o755,
                bytes,
            });
        }
        Ok(Self {
            folders: folders.into_iter().collect(),
            files,
        })
    }
}

/// The folders that lead to `path`, outermost first.
fn folders_of(path: &str) -> Vec<String> {
    path.match_indices('/').map(|(at, _)| path[..at].to_owned()).collect()
}

/// The processor that an ELF file is for, as `e_machine` numbers it.
pub(super) fn machine(elf: &[u8]) -> Result<u16> {
    const MACHINE: std::ops::Range<usize> = 18..20;
    match elf.get(MACHINE).map(<[u8; 2]>::try_from) {
        Some(Ok(bytes)) if elf.starts_with(ELF64) => Ok(u16::from_le_bytes(bytes)),
        Some(_) | None => bail!("it is no 64-bit ELF file"),
    }
}

/// Whether an ELF file asks for a loader: it has a program header of type `PT_INTERP`.
fn is_dynamic(elf: &[u8]) -> Result<bool> {
    const INTERPRETER: u32 = 3;
    /// In a 64-bit little-endian header: where the program headers are, the size of one, how many.
    const TABLE: usize = 32;
    const SIZE: usize = 54;
    const COUNT: usize = 56;
    let half = |at: usize| Some(usize::from(u16::from_le_bytes(elf.get(at..at + 2)?.try_into().ok()?)));
    let read = || {
        if !elf.starts_with(ELF64) {
            return None;
        }
        let table = usize::try_from(u64::from_le_bytes(elf.get(TABLE..TABLE + 8)?.try_into().ok()?)).ok()?;
        let mut kinds = (0..half(COUNT)?).map(|index| {
            let at = table + index * half(SIZE)?;
            Some(u32::from_le_bytes(elf.get(at..at + 4)?.try_into().ok()?))
        });
        Some(kinds.any(|kind| kind == Some(INTERPRETER)))
    };
    match read() {
        Some(dynamic) => Ok(dynamic),
        None => bail!("the binary is no 64-bit ELF file"),
    }
}

/// Loader and libraries, by the paths at which the loader looks for them.
fn libraries(binary: &Path) -> Result<Vec<String>> {
    let listed = run::read(Command::new("ldd").arg(binary))?;
    Ok(paths_in(&listed))
}

/// From lines such as `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)` and `/lib64/ld-linux-x86-64.so.2 (0x…)`.
fn paths_in(listed: &str) -> Vec<String> {
    let path = |line: &str| {
        let place = line.split_once("=> ").map_or(line, |(_, place)| place).trim();
        let path = place.split_once(" (").map_or(place, |(path, _)| path);
        path.starts_with('/').then(|| path.to_owned())
    };
    listed.lines().filter_map(path).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_taken_by_their_paths_and_the_kernels_own_is_left_out() {
        let listed = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x00007f)\n\t\
                      /lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        assert_eq!(
            paths_in(listed),
            ["/lib/x86_64-linux-gnu/libm.so.6", "/lib64/ld-linux-x86-64.so.2"]
        );
    }

    #[test]
    fn folders_come_outermost_first() {
        assert_eq!(folders_of("lib/x86/libc.so"), ["lib", "lib/x86"]);
    }

    #[test]
    fn this_test_is_a_dynamic_program_and_a_text_is_none() {
        let own = std::fs::read("/proc/self/exe").expect("the running program");
        assert!(is_dynamic(&own).expect("an ELF file"));
        assert!(is_dynamic(b"#!/bin/sh").is_err());
        assert!(machine(b"#!/bin/sh, and then some").is_err());
    }

    #[test]
    fn a_dynamic_program_for_another_processor_is_refused_with_what_to_do() {
        let error = Contents::around(Path::new("/proc/self/exe"), false).expect_err("must be refused");
        assert!(error.to_string().contains("+crt-static"), "{error}");
    }
}
