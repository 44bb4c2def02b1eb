//! Consort's wire protocol: the code generated from `proto/consort/v1/*.proto`.
//!
//! This crate holds nothing else and depends on nothing else in the workspace. The documentation of
//! every message and field is in the .proto files, which are the protocol's specification.

/// The `consort.v1` package.
#[allow(clippy::all, clippy::pedantic, unused_qualifications)]
pub mod v1 {
    tonic::include_proto!("consort.v1");

    /// The encoded descriptor set of this package, for gRPC reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
}

/// The protocol version that this build speaks; both sides must have the same.
pub const PROTOCOL_VERSION: u32 = 2;

/// No message of the protocol is larger than this many bytes, in either direction.
pub const MESSAGE_BYTES_MAX: usize = 8 * 1024 * 1024;
