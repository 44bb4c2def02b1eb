//! Compiles the .proto files with protox (pure Rust, no `protoc` to install) into tonic code and the
//! descriptor set that gRPC reflection serves.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

const FILES: [&str; 3] =
    ["consort/v1/common.proto", "consort/v1/federation.proto", "consort/v1/operator.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(FILES, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    // Chunk payloads become reference-counted `Bytes`: no copy between the socket and the spool.
    tonic_prost_build::configure()
        .bytes(".consort.v1.ModelChunk.payload")
        .bytes(".consort.v1.DeltaChunk.payload")
        .bytes(".consort.v1.FilePart.data")
        .compile_fds(descriptors)?;
    Ok(())
}
