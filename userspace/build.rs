//! What is made before the daemon is compiled. Each product has a function of its own.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    certificate_service()
}

/// Rust types for the CA's gRPC call, without protoc.
fn certificate_service() -> Result<(), Box<dyn std::error::Error>> {
    const PROTO: &str = "proto/istio_ca.proto";
    println!("cargo:rerun-if-changed={PROTO}");
    let descriptors = protox::compile([PROTO], ["proto"])?;
    tonic_prost_build::configure()
        .build_transport(false)
        .compile_fds(descriptors)?;
    Ok(())
}
