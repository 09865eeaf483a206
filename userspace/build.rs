//! Finds the kernel programs that `cargo xtask build-ebpf` built, so that the binary carries them.

use std::{env, fs, path::PathBuf};

fn main() {
    kernel_programs();
}

/// Names the two object files in the environment of the build, for `include_bytes_aligned!`.
fn kernel_programs() {
    println!("cargo:rerun-if-env-changed=WARREN_BPF_DIR");
    let built = env::var_os("WARREN_BPF_DIR").map_or_else(
        || PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default()).join("../target/bpf"),
        PathBuf::from,
    );
    for (program, variable) in [("steer", "WARREN_BPF_STEER"), ("arrive", "WARREN_BPF_ARRIVE")] {
        let mut object = built.join(format!("{program}.o"));
        println!("cargo:rerun-if-changed={}", object.display());
        if !object.exists() {
            object = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join(format!("{program}.o"));
            if let Err(error) = fs::write(&object, []) {
                panic!("cannot write {}: {error}", object.display());
            }
        }
        println!("cargo:rustc-env={variable}={}", object.display());
    }
}
