//! What is made before the daemon is compiled. Each product has a function of its own.

use std::{env, error::Error, fs, io, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    kernel_programs()?;
    certificate_service()
}

/// Names the two object files of `cargo xtask build-ebpf` in the environment of the build, for `include_bytes_aligned!`.
fn kernel_programs() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-env-changed=WARREN_BPF_DIR");
    let built = match env::var_os("WARREN_BPF_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("../target/bpf"),
    };
    for (program, variable) in [("steer", "WARREN_BPF_STEER"), ("arrive", "WARREN_BPF_ARRIVE")] {
        let object = built.join(format!("{program}.o"));
        println!("cargo:rerun-if-changed={}", object.display());
        let carried = PathBuf::from(env::var("OUT_DIR")?).join(format!("{program}.o"));
        let content = match fs::read(&object) {
            Ok(content) => {
                without_debug_sections(&content).ok_or_else(|| format!("{} is no object file", object.display()))?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(format!(
                    "there are no kernel programs at {}; build them with `cargo xtask build-ebpf`",
                    built.display()
                )
                .into());
            }
            Err(error) => return Err(format!("cannot read {}: {error}", object.display()).into()),
        };
        fs::write(&carried, content)?;
        println!("cargo:rustc-env={variable}={}", carried.display());
    }
    Ok(())
}

/// The object without its DWARF, which is six sevenths of it and which the kernel does not read (it reads BTF). The
/// sections keep their places, so that nothing refers to another one than before.
fn without_debug_sections(object: &[u8]) -> Option<Vec<u8>> {
    /// Where a 64-bit little-endian ELF header says where the sections are, how many, and which one has their names.
    const TABLE: usize = 40;
    const COUNT: usize = 60;
    const NAMES: usize = 62;
    const HEADER: usize = 64;
    const ENTRY: usize = 64;
    let half = |at: usize| {
        Some(usize::from(u16::from_le_bytes(
            object.get(at..at + 2)?.try_into().ok()?,
        )))
    };
    let word = |at: usize| Some(u32::from_le_bytes(object.get(at..at + 4)?.try_into().ok()?) as usize);
    let long = |at: usize| usize::try_from(u64::from_le_bytes(object.get(at..at + 8)?.try_into().ok()?)).ok();
    /// In an entry of the table: the kind (0 is none, 8 has no content), the content's place and size, its alignment.
    const KIND: usize = 4;
    const PLACE: usize = 24;
    const SIZE: usize = 32;
    const ALIGNMENT: usize = 48;

    let table = long(TABLE)?;
    let entry = |index: usize| table + index * ENTRY;
    let names = long(entry(half(NAMES)?) + PLACE)?;
    let mut kept = object.get(..HEADER)?.to_vec();
    let mut entries = Vec::new();
    for index in 0..half(COUNT)? {
        let at = entry(index);
        let mut header = object.get(at..at + ENTRY)?.to_vec();
        let name = object.get(names + word(at)?..)?;
        if name.starts_with(b".debug") || name.starts_with(b".rel.debug") {
            header[KIND..].fill(0);
        } else if !matches!(word(at + KIND)?, 0 | 8) {
            kept.resize(kept.len().next_multiple_of(long(at + ALIGNMENT)?.max(1)), 0);
            header[PLACE..PLACE + 8].copy_from_slice(&(kept.len() as u64).to_le_bytes());
            let place = long(at + PLACE)?;
            kept.extend(object.get(place..place + long(at + SIZE)?)?);
        }
        entries.extend(header);
    }
    kept.resize(kept.len().next_multiple_of(8), 0);
    let table = (kept.len() as u64).to_le_bytes();
    kept[TABLE..TABLE + 8].copy_from_slice(&table);
    kept.extend(entries);
    Some(kept)
}

/// Rust types for the CA's gRPC call, without protoc.
fn certificate_service() -> Result<(), Box<dyn Error>> {
    const PROTO: &str = "proto/istio_ca.proto";
    println!("cargo:rerun-if-changed={PROTO}");
    let descriptors = protox::compile([PROTO], ["proto"])?;
    tonic_prost_build::configure()
        .build_transport(false)
        .compile_fds(descriptors)?;
    Ok(())
}
